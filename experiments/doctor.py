"""Is everything in place for a long run? python -m utils.doctor [key=value ...], as for pretrain_etrm.py, also under torchrun.

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

import torch

from config import compose
from config.schema import PretrainConfig
from dataset.batch import Samples, materialise
from dataset.samplers import SAMPLERS, Sampler
from evaluation.evaluate import evaluate
from models.core import DataSizes
from models.trm import build_model, count_parameters
from pretrain_etrm import averaged_weights, data_line, log_pictures, model_line, open_store, resume, start_from_pretrained
from training.diagnostics import context_diagnostics
from training.ema import EMA
from training.meter import Meter
from training.optim import build_optimizers
from training.state import TrainState
from training.step import StepSettings, train_step
from utils import distributed
from utils.device import choose_device, describe
from utils.distributed import World
from utils.environment import GIGABYTE, peak_memory_gb
from utils.errors import UserError
from utils.logging import RunLogger, require_extras

STEPS = 3  # the first is slower than all others and is not counted
LOOKED_AT = 100  # steps whose batches are searched for the largest
HOUR = 3600


class Checklist:
    """Prints `ok` or `failed` for one check after the other and stops at the first that failed."""

    def __init__(self, world: World):
        self.world = world

    @contextmanager
    def check(self, name: str) -> Iterator[Callable[[str], None]]:
        """A check: what it finds out is told to the function that the context gives."""
        found: list[str] = []
        started = time.perf_counter()
        try:
            yield found.append
        except Exception as error:
            self._fail(name, error)
        if self.world.is_main:
            print(f"ok      {name:<12} {'; '.join(found)} ({time.perf_counter() - started:.1f} s)", flush=True)

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
    with checks.check("device") as tell:
        device = choose_device(config.device, world)
        distributed.start(world, device)
        tell(f"{describe(device)}, {world.size} process(es)")
    with checks.check("folder") as tell:
        scratch = Path(distributed.gather_objects(_make_scratch(Path(config.output_dir)) if world.is_main else "")[0])
        tell(f"{scratch.parent} can be written, {shutil.disk_usage(scratch).free / GIGABYTE:.1f} GB are free")
    try:
        _rehearse(checks, config, scratch, world, device)
        distributed.barrier()
    finally:  # on every process: a failing one ends the others without warning
        shutil.rmtree(scratch, ignore_errors=True)
    if world.is_main:
        print("all is well: python pretrain_etrm.py with the same arguments starts the run", flush=True)
    distributed.close()


def _rehearse(checks: Checklist, config: PretrainConfig, scratch: Path, world: World, device: torch.device) -> None:
    with checks.check("data") as tell:
        store = open_store(config)
        sampler = SAMPLERS[store.metadata.layout](store, config.data, config.seed, config.global_batch_size, world.rank, world.size)
        table = store.grid_table.to(device)
        tell(f"{config.data.path} ({store.metadata.protocol}), {data_line(sampler)}")

    with checks.check("model") as tell:
        torch.manual_seed(config.seed)
        model = build_model(config.arch, DataSizes.of(store, config.data), config.encoder).to(device)
        optimizers, optimizer_name = build_optimizers(model, config, device)
        state = TrainState(model, optimizers, EMA(model, config.ema_rate) if config.ema else None, sampler.trained_pairs)
        info = {"config": config.model_dump(), "parameters": count_parameters(model)}
        tell(f"{model_line(info)}; {optimizer_name}")

    with checks.check("start") as tell:
        resume(state, config, store, Path(config.output_dir) / config.name, world, device)
        imported = None if state.step else start_from_pretrained(state, config, store, scratch, world)
        tell(f"continues at step {state.step}" if state.step else imported or "starts afresh")

    meter = Meter()
    with checks.check("train") as tell:
        settings = StepSettings.of(config, world)
        samples, remaining = _largest(sampler, state.step), config.train_steps - state.step
        state.step = config.train_steps  # the last stage takes the most: what was frozen trains, contexts are moved
        for step in range(STEPS):
            if step == 1:
                meter.read()
            result = train_step(state, materialise(samples, store, table), settings)
            if not result.updated:
                raise UserError("the gradient is not finite; try arch.forward_dtype=float32, or a lower lr if the run was resumed")
            meter.add(result, config.global_batch_size)
        values = meter.read() | context_diagnostics(model, samples, store, table, config.seed, state.step, world)
        values["timing/peak_memory_gb"] = peak_memory_gb(device)
        seconds = values["timing/train_ms_per_step"] / 1000
        cell, hours = samples.cell, seconds * remaining / HOUR
        tell(f"loss {values['train/loss']:.3f}; {values['timing/peak_memory_gb']:.2f} GB")
        tell(f"{seconds:.3g} s per step on the largest canvas, {cell.side}x{cell.side} with {cell.demos} demonstrations")
        tell(f"at most {hours:.3g} hours of training")

    with checks.check("evaluate") as tell:
        settings = config.evaluation.model_copy(update={"controls": []})
        tasks = max(1, settings.batch_size // settings.num_views)
        split = "validation" if config.validation else "test"
        with averaged_weights(state):
            result = evaluate(
                model,
                store,
                config.data,
                settings,
                config.objective,
                device,
                world,
                seed=config.seed,
                trained_pairs=state.trained_pairs,
                split=split,
                max_tasks=tasks,
            )
        tell(f"{split}, {result.protocol}, {result.counts['tasks']} tasks, {result.counts['queries']} queries")

    with checks.check("logging") as tell:
        quiet = config.logging.model_copy(update={"wandb": "disabled", "progress": False})
        logger = RunLogger(quiet, scratch, config.project_name, config.name, info, world, config.train_steps, state.step)
        logger.log(state.step, values | result.metrics())
        if config.logging.images_interval:
            log_pictures(logger, state, store, config, table, world)
        logger.close()
        tell(f"{len(values)} training and {len(result.metrics())} evaluation metrics")

    with checks.check("save") as tell:
        path = state.save(scratch, world, info, keep=1)
        size = sum(file.stat().st_size for file in path.iterdir())
        room = shutil.disk_usage(path).free + size
        if room < (config.keep_checkpoints + 1) * size:  # the new one is complete before the oldest goes
            raise UserError(
                f"{config.keep_checkpoints + 1} checkpoints of {size / GIGABYTE:.2f} GB do not fit in {room / GIGABYTE:.2f} GB; "
                "free some disk, choose another output_dir, or lower keep_checkpoints"
            )
        tell(f"{size / GIGABYTE:.3f} GB a checkpoint, {config.keep_checkpoints} are kept")

    with checks.check("load") as tell:
        saved = {name: value.cpu().clone() for name, value in model.state_dict().items()}
        for value in model.state_dict().values():
            value.zero_()
        state.load(path, world, device)
        different = [name for name, value in model.state_dict().items() if not torch.equal(value.cpu(), saved[name])]
        if different:
            raise UserError(f"a loaded checkpoint is not what was saved: {', '.join(different[:3])}; the disk may be damaged")
        tell("every weight as it was saved")


def _make_scratch(output_dir: Path) -> str:
    """An empty folder where the run's own will be, so that what can be written here can be written there."""
    output_dir.mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix=".doctor-", dir=output_dir)


def _largest(sampler: Sampler, step: int) -> Samples:
    """Of the next steps' batches the one with the most cells."""
    batches = (sampler.sample(number) for number in range(step, step + LOOKED_AT))
    return max(batches, key=lambda samples: samples.cell.side**2 * (1 + 2 * samples.cell.demos))


def _what_to_do(error: Exception) -> str:
    """The error in one line, with a remedy where one is known; what nobody foresaw is shown in full as well."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {error.filename}"
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return f"out of memory; lower global_batch_size or evaluation.batch_size, or use more processes ({text})"
    traceback.print_exception(error)
    return f"{type(error).__name__}: {text}; see the traceback"


if __name__ == "__main__":
    examine(sys.argv[1:])
