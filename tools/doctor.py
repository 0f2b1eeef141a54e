"""Check that everything is in place for a long run.

    python -m tools.doctor data=arc1 run_name=first

Give the keys and the launcher (python or torchrun) of the run that will follow. The doctor takes real steps
of that run, on its device and its data: it trains, evaluates, saves and loads. It works in a folder that it
deletes afterwards, and only reads the run's own folder. It prints a checklist and exits with status 2 where a
check failed.
"""

import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from config import compose
from config.schema import PretrainConfig
from dataset.batch import Samples
from dataset.samplers import Sampler
from evaluation.in_training import averaged_weights, check_best_metric, log_pictures, respondent_of
from evaluation.run import Ask, evaluate
from tools.find_batch_size import cells_of
from training.diagnostics import context_diagnostics
from training.meter import Meter
from training.start import Run, resume, start_from_pretrained
from training.warm_up import warm_up
from utils import distributed
from utils.arguments import parser_of
from utils.device import describe
from utils.distributed import World
from utils.environment import GIGABYTE, peak_memory_gb
from utils.errors import UserError, reports_user_errors
from utils.logging import RunLogger, require_extras

Tell = Callable[[str], None]  # takes a fact that a check has found out

STEPS = 3  # the first step is slower than all others and is not counted
SEARCHED_STEPS = 100  # the largest batch is searched among those of so many steps
HOUR = 3600  # seconds


class Checklist:
    """Prints `ok` or `failed` for one check after the other, and stops at the first failure."""

    def __init__(self, world: World):
        self.world = world

    @contextmanager
    def check(self, name: str) -> Iterator[Tell]:
        """One check. The context gives a function that takes each fact to print behind `ok`."""
        facts: list[str] = []
        started = time.perf_counter()
        try:
            yield facts.append
        except Exception as error:
            self._fail(name, error)
        if self.world.is_main:
            seconds = time.perf_counter() - started
            print(f"ok      {name:<12} {'; '.join(facts)} ({seconds:.1f} s)", flush=True)

    def _fail(self, name: str, error: Exception) -> None:
        """Print the failure and exit."""
        # Every process that fails speaks for itself: the others may be waiting for it.
        who = "" if self.world.size == 1 else f" on process {self.world.rank}"
        print(f"failed  {name:<12} {_what_to_do(error)}{who}", flush=True)
        sys.exit(2)


def examine(overrides: list[str]) -> None:
    """Run the whole checklist, from the configuration to the loaded checkpoint."""
    world = World.from_environment()
    checks = Checklist(world)
    with checks.check("config") as tell:
        config = compose.load(PretrainConfig, "pretrain", overrides)
        require_extras(config.logging)
        tell(f"run {config.name}")
    run = Run(config, world)
    with checks.check("device") as tell:
        tell(f"{describe(run.device)}, {run.config.arch.forward_dtype}, {world.size} process(es)")
    with checks.check("folder") as tell:
        made = _make_scratch(Path(config.output_dir)) if world.is_main else ""
        scratch = Path(distributed.gather_objects(made)[0])
        tell(f"{scratch.parent} can be written, {shutil.disk_usage(scratch).free / GIGABYTE:.1f} GB are free")
    try:
        Rehearsal(run, scratch).perform(checks)
        distributed.barrier()
    finally:
        # Every process deletes: one that fails ends the others without warning, the first one included.
        shutil.rmtree(scratch, ignore_errors=True)
    if world.is_main:
        print("all is well: python pretrain_etrm.py with the same arguments starts the run", flush=True)
    distributed.close()


class Rehearsal:
    """The run in small, in the folder `scratch`: one method per check."""

    def __init__(self, run: Run[PretrainConfig], scratch: Path):
        self.run, self.scratch = run, scratch
        self.values: dict[str, Any] = {}
        self.scores: dict[str, float] = {}

    def perform(self, checks: Checklist) -> None:
        """All checks, in the order in which the run would fail."""
        before_training = (self.data, self.model, self.start)
        afterwards = (self.train, self.evaluate, self.logging, self.save, self.load)
        for check in (*before_training, *afterwards):
            with checks.check(check.__name__) as tell:
                check(tell)

    def data(self, tell: Tell) -> None:
        """The dataset, its sampler, and whether its scores can choose the best checkpoint."""
        run, config = self.run, self.run.config
        check_best_metric(config, run.store)
        _ = run.table  # made on first use; a device without room for it should fail here
        tell(f"{config.data.path} ({run.store.metadata.protocol}), {run.data_line()}")

    def model(self, tell: Tell) -> None:
        """The model and its optimizers."""
        tell(f"{self.run.model_line()}; {self.run.optimizer}")
        _ = self.run.threads
        for note in self.run.notes:
            tell(note)

    def start(self, tell: Tell) -> None:
        """The checkpoint that the run would continue, or the weights it would start from."""
        resume(self.run)
        step = self.run.state.step
        imported = None if step else start_from_pretrained(self.run, self.scratch)
        tell(f"continues at step {step}" if step else imported or "starts afresh")

    def train(self, tell: Tell) -> None:
        """A few steps on the largest batch."""
        run, config, state = self.run, self.run.config, self.run.state
        meter = Meter()
        warm_up(run)
        samples = _largest(run.sampler, state.step)
        remaining_steps = config.train_steps - state.step
        # The last stage takes the most memory: frozen parts train by then, and contexts are moved.
        state.step = config.train_steps
        for step in range(STEPS):
            if step == 1:
                meter.read()  # forget the first step
            result = run.step(samples)
            if not result.updated:
                raise UserError(
                    "the gradient is not finite; try arch.forward_dtype=float32, "
                    "or a lower lr if the run was resumed"
                )
            meter.add(result, config.global_batch_size)
        self.values = meter.read() | context_diagnostics(
            run.model, samples, run.sampled_store, run.sampled_table, config.seed, state.step, run.world
        )
        memory = self.values["timing/peak_memory_gb"] = peak_memory_gb(run.device)
        seconds = self.values["timing/train_ms_per_step"] / 1000
        side, demos = samples.bucket
        tell(f"loss {self.values['train/loss']:.3f}; {memory:.2f} GB")
        tell(f"{seconds:.3g} s per step on the largest canvas, {side}x{side} with {demos} demonstrations")
        tell(f"at most {seconds * remaining_steps / HOUR:.3g} hours of training")

    def evaluate(self, tell: Tell) -> None:
        """An evaluation of as many tasks as one batch holds, without controls."""
        run, config = self.run, self.run.config
        # A control asks every query once more, which would check nothing new.
        settings = config.evaluation.model_copy(update={"controls": []})
        tasks = max(1, settings.batch_size // settings.num_views)
        with averaged_weights(run.state):
            ask = Ask(config.seed, config.evaluated_split, max_tasks=tasks, keep_predictions=False)
            result = evaluate(respondent_of(run), settings, ask)
        self.scores = result.metrics()
        counts = result.counts
        asked = f"{counts['tasks']} tasks, {counts['queries']} queries"
        tell(f"{config.evaluated_split}, {result.protocol}, {asked}")

    def logging(self, tell: Tell) -> None:
        """The numbers and pictures of a step, written to the scratch folder and nowhere else."""
        run, config = self.run, self.run.config
        step = run.state.step
        # A rehearsal must not appear among the runs of a W&B project.
        quiet = config.logging.model_copy(update={"wandb": "disabled", "progress": False})
        info = {"config": run.info["config"], "parameters": run.info["parameters"]}
        logger = RunLogger(
            quiet, self.scratch, config.project_name, config.name, info, run.world, config.train_steps, step
        )
        logger.log(step, self.values | self.scores)
        if config.logging.images_interval:
            log_pictures(run, logger)
        logger.close()
        tell(f"{len(self.values)} training and {len(self.scores)} evaluation metrics")

    def save(self, tell: Tell) -> None:
        """A checkpoint, and room for as many as the run keeps."""
        run, kept = self.run, self.run.config.keep_checkpoints
        self.path = run.state.save(self.scratch, run.world, run.info, keep=1)
        size = sum(file.stat().st_size for file in self.path.iterdir())
        room = shutil.disk_usage(self.path).free + size
        # One more than the run keeps: a new checkpoint is complete before the oldest goes.
        if room < (kept + 1) * size:
            raise UserError(
                f"{kept + 1} checkpoints of {size / GIGABYTE:.2f} GB do not fit in {room / GIGABYTE:.2f} GB; "
                "free some disk, choose another output_dir, or lower keep_checkpoints"
            )
        tell(f"{size / GIGABYTE:.3f} GB a checkpoint, {kept} are kept")

    def load(self, tell: Tell) -> None:
        """The checkpoint, read back into a model that has forgotten its weights."""
        run = self.run
        saved = {name: value.cpu().clone() for name, value in run.model.state_dict().items()}
        # Without this a load that does nothing would pass.
        for value in run.model.state_dict().values():
            value.zero_()
        run.state.load(self.path, run.world, run.device)
        loaded = run.model.state_dict()
        different = [name for name, value in loaded.items() if not torch.equal(value.cpu(), saved[name])]
        if different:
            raise UserError(
                f"a loaded checkpoint is not what was saved: {', '.join(different[:3])}; "
                "the disk may be damaged"
            )
        tell("every weight as it was saved")


def _make_scratch(output_dir: Path) -> str:
    """The path of a new empty folder in `output_dir`."""
    # Beside the run's own folder, so that both are on the same disk and under the same permissions.
    output_dir.mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix=".doctor-", dir=output_dir)


def _largest(sampler: Sampler, step: int) -> Samples:
    """The batch with the most cells among those of the next steps."""
    batches = (sampler.sample(number) for number in range(step, step + SEARCHED_STEPS))
    return max(batches, key=lambda samples: cells_of(samples.bucket))


def _what_to_do(error: Exception) -> str:
    """The error in one line, with a remedy where one is known. Prints the traceback of an unforeseen one."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {error.filename}"
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        advice = "lower global_batch_size or evaluation.batch_size, or use more processes"
        return f"out of memory; {advice} ({text})"
    traceback.print_exception(error)
    return f"{type(error).__name__}: {text}; see the traceback"


@reports_user_errors
def main() -> None:
    parser = parser_of("tools.doctor", __doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for pretrain_etrm.py")
    examine(parser.parse_args().overrides)


if __name__ == "__main__":
    main()
