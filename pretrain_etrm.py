"""Train a TRM or an ETRM.

    python pretrain_etrm.py data=arc1 run_name=first
    torchrun --nproc-per-node 4 pretrain_etrm.py data=arc1 run_name=first

Configuration -> run (device, data, model, optimisers) -> resume -> loop (step, log, save, evaluate) -> close.
`--cfg job` prints the resolved configuration.
"""

import sys
import time
from collections import deque
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from config.compose import launch
from config.schema import PretrainConfig
from dataset.batch import Samples
from dataset.store import Store
from evaluation.in_training import best_line, check_best_metric, log_evaluation, log_pictures
from evaluation.report import training_curves
from training.diagnostics import context_diagnostics
from training.meter import Meter, Pace, log_step
from training.nonfinite import dump_batch
from training.start import Run, alone_in, prepare, resume, start_from_pretrained
from training.step import StepResult
from training.warm_up import warm_up
from utils import checkpoint, distributed
from utils.device import describe, explains_out_of_memory
from utils.distributed import World
from utils.environment import append_start, environment, peak_memory_gb
from utils.errors import Stopped, UserError, reports_user_errors
from utils.files import write_atomically
from utils.images import write_curves
from utils.logging import RunLogger, read_metrics
from utils.signals import StopRequest
from utils.transfer import lag

LESS_MEMORY = (
    "lower global_batch_size (python -m tools.find_batch_size with the same options finds what fits), or "
    "data.buckets, data.max_demos or arch.hidden_size, or spread the batch over more processes"
)


@distributed.reports_lost_peers()
def train(config: PretrainConfig) -> None:
    """One training run from its configuration to its last checkpoint."""
    run = prepare(config, World.from_environment())
    check_best_metric(config, run.store)
    with alone_in(run), closing(run):
        damaged = resume(run)
        decoder_report = None if run.state.step else start_from_pretrained(run, run.folder)
        logger = open_logger(run)
        for path, damage in damaged.items():
            kept = checkpoint.set_aside(path) if run.world.is_main else path
            logger.say(f"warning: {damage}; the checkpoint is kept as {kept}")
        if decoder_report:
            logger.say(decoder_report)

        loop = Loop(run, logger)
        try:
            stopped_by = loop.train()
        finally:
            logger.close()

        if run.world.is_main:
            draw_curves(run.folder)
    # torchrun ends all processes as soon as one has ended as stopped, also one that still draws.
    distributed.barrier()
    distributed.close()
    where = f"step {run.state.step}: checkpoint {run.folder}/checkpoints/step_{run.state.step}"
    if stopped_by:
        raise Stopped(f"stopped by {stopped_by} at {where}; the same command continues it")
    unfinished = f"max_seconds={config.max_seconds}: {config.train_steps - run.state.step} steps are left, "
    ended_early = loop.out_of_time and run.state.step < config.train_steps
    if run.world.is_main:
        early = [unfinished + "and the same command continues"] if ended_early else []
        print("\n".join([where, *early, *best_line(run)]))


def draw_curves(folder: Path) -> None:
    """curves.png. A training that has ended well does not fail for want of a picture."""
    try:
        write_curves(folder / "curves.png", training_curves(read_metrics(folder / "metrics.jsonl")))
    except UserError as error:
        print(f"no curves.png: {error}", file=sys.stderr)


def open_logger(run: Run[PretrainConfig]) -> RunLogger:
    """The run's logger, after config.yaml and environment.json are written and the run has said what it
    is."""
    config, folder, world, info = run.config, run.folder, run.world, run.info
    if world.is_main:
        write_atomically(folder / "config.yaml", lambda path: OmegaConf.save(config.model_dump(), path))
        about = {name: value for name, value in info.items() if name != "config"}
        append_start(
            folder / "environment.json", {"step": run.state.step, **about, **environment(run.device, world)}
        )
    logger = RunLogger(
        config.logging,
        folder,
        config.project_name,
        config.name,
        info,
        world,
        config.train_steps,
        run.state.step,
    )
    logger.say(
        f"{folder}: {run.model_line()}; {run.optimizer}; {describe(run.device)}, {world.size} process(es)"
    )
    logger.say(f"data: {config.data.path} ({run.store.metadata.protocol}), {run.data_line()}")
    for note in [*run.notes, *(f"warning: {warning}" for warning in config.warnings)]:
        logger.say(note)
    if run.state.step:
        logger.say(f"resumed at step {run.state.step}")
    return logger


@dataclass(frozen=True)
class Step:
    """A step that was made: the batch sampled at `step` from `store`, and what the device found."""

    step: int
    samples: Samples
    store: Store
    result: StepResult


class Loop:
    """Steps until train_steps, max_seconds or the end of patience, or until a signal asks to stop."""

    def __init__(self, run: Run[PretrainConfig], logger: RunLogger):
        self.run, self.config, self.state, self.logger = run, run.config, run.state, logger
        self.checkpoints = run.folder / "checkpoints"
        self.meter, self.pace = Meter(), Pace()
        self.skipped_in_a_row = 0
        self.cycles: tuple[int, int] | None = None
        self.out_of_time = False
        self.unseen: deque[Step] = deque()
        self.started = self.saved_at = time.monotonic()
        self.saved = self.state.step

    def train(self) -> str | None:
        """Train; the name of the signal that stopped it, if one did."""
        config, state = self.config, self.state
        if not config.train_steps:
            self.save()
        self.make_up_for_evaluation()
        with StopRequest() as stop:
            if self.goes_on:
                self.warm_up()
            while self.goes_on:
                samples = self.run.samples()
                self.step(samples)
                # One collective for all three, since every process has to take the same turn below.
                now = time.monotonic()
                stopping, self.out_of_time, overdue = distributed.any_true(
                    stop.signal is not None,
                    config.max_seconds is not None and now - self.started > config.max_seconds,
                    config.checkpoint_minutes is not None
                    and now - self.saved_at > 60 * config.checkpoint_minutes,
                )
                last = stopping or self.out_of_time or state.step == config.train_steps
                logging = self.due(config.log_interval) or last
                saving = self.due(config.checkpoint_interval) or overdue or last or self.evaluation_due()
                if logging or saving:
                    self.look_at_steps()
                if logging:
                    self.log(samples)
                # What follows is no training: it stays out of the measured speed.
                with self.meter.paused():
                    # An evaluation follows its checkpoint, so that a failing evaluation loses no training.
                    if saving:
                        self.save()
                    if self.evaluation_due() and not stopping:
                        self.evaluate()
                    interval = config.logging.images_interval
                    if interval and (self.due(interval) or last) and not stopping:
                        log_pictures(self.run, self.logger)
                if stopping:
                    return stop.signal or "a signal to another process"
                if self.out_of_time:
                    break
        return None

    @property
    def goes_on(self) -> bool:
        """Whether there are steps left, and patience for them."""
        config, state = self.config, self.state
        return state.step < config.train_steps and not state.out_of_patience(
            config.patience, config.min_delta
        )

    def warm_up(self) -> None:
        """Compile what the first step needs, together."""
        with self.meter.paused():
            seconds = warm_up(self.run)
        if seconds is not None:
            said = f"compiled before step {self.state.step + 1} in {seconds:.1f} s"
            self.logger.say(f"{said}, until the last of {self.run.world.size} processes was ready")

    def due(self, every: int | None) -> bool:
        """Whether an interval of so many steps has just ended. Some modes make several updates per round."""
        return every is not None and self.state.step % every < self.config.mode.updates

    def evaluation_due(self) -> bool:
        """Whether this step is evaluated: at the end of each interval and of the run."""
        every = self.config.eval_interval
        return every is not None and (self.due(every) or self.state.step == self.config.train_steps)

    def step(self, samples: Samples) -> None:
        """One sampled batch. Raises `UserError` when the gradient is not finite for too many in a row."""
        self.announce_depth()
        run, step, started = self.run, self.state.step, time.monotonic()
        with explains_out_of_memory(f"training step {step + 1}, {run.batch_line(samples)}", LESS_MEMORY):
            self.unseen.append(Step(step, samples, run.sampled_store, run.step(samples)))
        self.look_at_steps(but=lag(run.device))
        if self.pace.add(time.monotonic() - started, self.state.step - step):
            limit = self.config.max_seconds
            left = None if limit is None else limit - (time.monotonic() - self.started)
            self.logger.say(self.pace.forecast(self.state.step, self.config.train_steps, left))

    def look_at_steps(self, but: int = 0) -> None:
        """Take in what became of the steps made, but for the last ones, which the device may be busy with."""
        while len(self.unseen) > but:
            made = self.unseen.popleft()
            self.meter.add(made.result, self.config.global_batch_size)
            self.skipped_in_a_row = 0 if made.result.updated else self.skipped_in_a_row + 1
            if not made.result.updated:
                self.refuse_to_go_on(made)

    def announce_depth(self) -> None:
        """Say how deep the recursion is from this step on, where it changes in the course of the training."""
        cycles = self.config.cycles_at(self.state.step)
        if cycles and cycles != self.cycles:
            self.cycles = cycles
            self.logger.say(f"step {self.state.step}: depth (H, L) = {cycles}")

    def refuse_to_go_on(self, skipped: Step) -> None:
        """Keep the batch of a skipped step; after too many of them in a row the run is lost, and more steps
        help nobody."""
        run, step = self.run, skipped.step + skipped.result.steps
        dumped = dump_batch(
            run.folder, skipped.step, skipped.samples, skipped.result, skipped.store, run.world
        )
        if self.skipped_in_a_row >= self.config.max_nonfinite_steps:
            raise UserError(
                f"step {step}: the gradient was not finite {self.skipped_in_a_row} times in a row; "
                f"last checkpoint: step {self.saved}; the batches are in {dumped.parent}"
            )

    def log(self, samples: Samples) -> None:
        """The means since the last line, what the context carries, and the memory."""
        run, step = self.run, self.state.step
        values = self.meter.read()
        with self.meter.paused(), explains_out_of_memory(f"what is measured at step {step}", LESS_MEMORY):
            values["timing/peak_memory_gb"] = peak_memory_gb(run.device)
            values |= context_diagnostics(
                *(run.state.model, samples, run.sampled_store, run.sampled_table),
                *(run.config.seed, step, run.world),
            )
            log_step(self.logger, run.state, run.config, values)

    def save(self) -> None:
        """A checkpoint of this step, unless there is one."""
        if self.saved != self.state.step or not self.state.step:
            run, config = self.run, self.config
            self.state.save(
                self.checkpoints, run.world, run.info, config.keep_checkpoints, config.keep_best_checkpoints
            )
            self.saved, self.saved_at = self.state.step, time.monotonic()

    def evaluate(self) -> None:
        """Score this step's checkpoint."""
        log_evaluation(self.run, self.logger, self.meter, self.checkpoint)

    @property
    def checkpoint(self) -> Path:
        """The folder of this step's checkpoint."""
        return self.checkpoints / f"step_{self.state.step}"

    def make_up_for_evaluation(self) -> None:
        """Evaluate the checkpoint that a run resumes from, where it was killed before its evaluation
        ended."""
        lacking = self.run.world.is_main and checkpoint.lacks_evaluation(self.checkpoint)
        (unfinished,) = distributed.any_true(lacking)
        if unfinished and self.evaluation_due():
            with self.meter.paused():
                self.evaluate()


@reports_user_errors
def main() -> None:
    launch("pretrain", PretrainConfig, train, __doc__)


if __name__ == "__main__":
    main()
