"""Is everything in place for a long run? python -m tools.doctor [key=value ...], as for pretrain_etrm.py, also under torchrun.

Real steps of the configured run, on its device and its data: train, evaluate, save, load, in a folder that is deleted
afterwards. The run's own folder is only looked at. Prints a checklist; exit status 2 where something failed.
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

from config import compose
from config.schema import PretrainConfig
from dataset.batch import Samples
from dataset.samplers import Sampler
from evaluation.in_training import averaged_weights, check_best_metric, log_pictures
from evaluation.run import evaluate
from training.diagnostics import context_diagnostics
from training.meter import Meter
from training.start import Run, resume, start_from_pretrained
from utils import distributed
from utils.device import describe
from utils.distributed import World
from utils.environment import GIGABYTE, peak_memory_gb
from utils.errors import UserError
from utils.logging import RunLogger, require_extras

Tell = Callable[[str], None]  # what a check has found out

STEPS = 3  # the first is slower than all others and is not counted
LOOKED_AT = 100  # steps whose batches are searched for the largest
HOUR = 3600


class Checklist:
    """Prints `ok` or `failed` for one check after the other and stops at the first that failed."""

    def __init__(self, world: World):
        self.world = world

    @contextmanager
    def check(self, name: str) -> Iterator[Tell]:
        """A check: what it finds out is told to the function that the context gives."""
        found: list[str] = []
        started = time.perf_counter()
        try:
            yield found.append
        except Exception as error:
            self._fail(name, error)
        if self.world.is_main:
            print(
                f"ok      {name:<12} {'; '.join(found)} ({time.perf_counter() - started:.1f} s)", flush=True
            )

    def _fail(self, name: str, error: Exception) -> None:
        """Every process that fails says so itself: the others may be waiting for it."""
        who = "" if self.world.size == 1 else f" on process {self.world.rank}"
        print(f"failed  {name:<12} {_what_to_do(error)}{who}", flush=True)
        sys.exit(2)


def examine(overrides: list[str]) -> None:
    """The checklist, from the configuration to the loaded checkpoint."""
    world = World.from_environment()
    checks = Checklist(world)
    with checks.check("config") as tell:
        config = compose.load(PretrainConfig, "pretrain", overrides)
        require_extras(config.logging)
        tell(f"run {config.name}")
    run = Run(config, world)
    with checks.check("device") as tell:
        tell(f"{describe(run.device)}, {world.size} process(es)")
    with checks.check("folder") as tell:
        made = _make_scratch(Path(config.output_dir)) if world.is_main else ""
        scratch = Path(distributed.gather_objects(made)[0])
        tell(f"{scratch.parent} can be written, {shutil.disk_usage(scratch).free / GIGABYTE:.1f} GB are free")
    try:
        Rehearsal(run, scratch).perform(checks)
        distributed.barrier()
    finally:  # on every process: a failing one ends the others without warning
        shutil.rmtree(scratch, ignore_errors=True)
    if world.is_main:
        print("all is well: python pretrain_etrm.py with the same arguments starts the run", flush=True)
    distributed.close()


class Rehearsal:
    """The run in small, one method per check, in the folder `scratch`."""

    def __init__(self, run: Run[PretrainConfig], scratch: Path):
        self.run, self.scratch = run, scratch
        self.values: dict[str, Any] = {}
        self.scores: dict[str, float] = {}

    def perform(self, checks: Checklist) -> None:
        """All checks in the order in which a run would meet their troubles."""
        for check in (
            self.data, self.model, self.start, self.train, self.evaluate, self.logging, self.save, self.load,
        ):  # fmt: skip
            with checks.check(check.__name__) as tell:
                check(tell)

    def data(self, tell: Tell) -> None:
        """The dataset, its sampler, and whether its scores can choose the best checkpoint."""
        run, config = self.run, self.run.config
        check_best_metric(config, run.store)
        _ = run.table
        tell(f"{config.data.path} ({run.store.metadata.protocol}), {run.data_line()}")

    def model(self, tell: Tell) -> None:
        """The model and its optimisers."""
        tell(f"{self.run.model_line()}; {self.run.optimizer}")

    def start(self, tell: Tell) -> None:
        """Where the run would go on, or start from."""
        resume(self.run)
        step = self.run.state.step
        imported = None if step else start_from_pretrained(self.run, self.scratch)
        tell(f"continues at step {step}" if step else imported or "starts afresh")

    def train(self, tell: Tell) -> None:
        """A few steps on the largest batch."""
        run, config, state = self.run, self.run.config, self.run.state
        meter, samples, remaining = (
            Meter(),
            _largest(run.sampler, state.step),
            config.train_steps - state.step,
        )
        # The last stage takes the most: what was frozen trains, contexts are moved.
        state.step = config.train_steps
        for step in range(STEPS):
            if step == 1:
                meter.read()
            result = run.step(samples)
            if not result.updated:
                raise UserError(
                    "the gradient is not finite; try arch.forward_dtype=float32, or a lower lr if the run was resumed"
                )
            meter.add(result, config.global_batch_size)
        self.values = meter.read() | context_diagnostics(
            run.model, samples, run.store, run.table, config.seed, state.step, run.world
        )
        memory = self.values["timing/peak_memory_gb"] = peak_memory_gb(run.device)
        seconds = self.values["timing/train_ms_per_step"] / 1000
        side, demos = samples.bucket
        tell(f"loss {self.values['train/loss']:.3f}; {memory:.2f} GB")
        tell(f"{seconds:.3g} s per step on the largest canvas, {side}x{side} with {demos} demonstrations")
        tell(f"at most {seconds * remaining / HOUR:.3g} hours of training")

    def evaluate(self, tell: Tell) -> None:
        """As many tasks as one batch holds, without controls."""
        run, config = self.run, self.run.config
        settings = config.evaluation.model_copy(update={"controls": []})
        with averaged_weights(run.state):
            result = evaluate(
                run.model,
                run.store,
                config.data,
                settings,
                config.objective,
                run.device,
                run.world,
                seed=config.seed,
                trained_pairs=run.state.trained_pairs,
                split=config.evaluated_split,
                max_tasks=max(1, settings.batch_size // settings.num_views),
            )
        self.scores = result.metrics()
        counts = result.counts
        tell(
            f"{config.evaluated_split}, {result.protocol}, {counts['tasks']} tasks, {counts['queries']} queries"
        )

    def logging(self, tell: Tell) -> None:
        """The numbers and pictures of a step, written to the scratch folder and nowhere else."""
        run, config = self.run, self.run.config
        step = run.state.step
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
        if room < (kept + 1) * size:  # the new one is complete before the oldest goes
            raise UserError(
                f"{kept + 1} checkpoints of {size / GIGABYTE:.2f} GB do not fit in {room / GIGABYTE:.2f} GB; "
                "free some disk, choose another output_dir, or lower keep_checkpoints"
            )
        tell(f"{size / GIGABYTE:.3f} GB a checkpoint, {kept} are kept")

    def load(self, tell: Tell) -> None:
        """The checkpoint, read back into a model that has forgotten its weights."""
        run = self.run
        saved = {name: value.cpu().clone() for name, value in run.model.state_dict().items()}
        for value in run.model.state_dict().values():
            value.zero_()
        run.state.load(self.path, run.world, run.device)
        loaded = run.model.state_dict()
        different = [name for name, value in loaded.items() if not torch.equal(value.cpu(), saved[name])]
        if different:
            raise UserError(
                f"a loaded checkpoint is not what was saved: {', '.join(different[:3])}; the disk may be damaged"
            )
        tell("every weight as it was saved")


def _make_scratch(output_dir: Path) -> str:
    """An empty folder where the run's own will be, so that what can be written here can be written there."""
    output_dir.mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix=".doctor-", dir=output_dir)


def _largest(sampler: Sampler, step: int) -> Samples:
    """Of the next steps' batches the one with the most cells."""
    batches = (sampler.sample(number) for number in range(step, step + LOOKED_AT))
    return max(batches, key=lambda samples: samples.bucket.side**2 * (1 + 2 * samples.bucket.demos))


def _what_to_do(error: Exception) -> str:
    """The error in one line, with a remedy where one is known; what nobody foresaw is shown in full as well."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {error.filename}"
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return (
            f"out of memory; lower global_batch_size or evaluation.batch_size, or use more processes ({text})"
        )
    traceback.print_exception(error)
    return f"{type(error).__name__}: {text}; see the traceback"


if __name__ == "__main__":
    examine(sys.argv[1:])
