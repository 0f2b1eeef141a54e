"""The assembly of a run, made once and used by training, doctor, batch finder, benchmarks and tests.

`prepare(config, world)` gives a `Run` that is ready to step. Its parts are made in the order of their needs:
device, data, sampler, state. What looks at a run (the doctor) asks for one part after the other.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from dataset.batch import TASKS, Batch, DataConfig, DataSizes, Samples, materialise
from dataset.canvas import GridTable
from dataset.fresh import FreshTasks
from dataset.samplers import SAMPLERS, Sampler
from dataset.store import Store
from models.core import RecursiveModel
from models.fused import compile_fused
from models.pretrained import load_decoder, pairs_behind, trained_config
from models.trial import settle_threads
from models.trm import build_model, count_parameters
from training.config import TrainingConfig
from training.ema import EMA
from training.optim import build_optimizers
from training.state import TrainState
from training.step import StepResult, train_step
from training.task_errors import TaskErrors
from utils import checkpoint, distributed
from utils.config import flatten
from utils.device import choose_device, describe, faster_dtype, only_deterministic, should_compile
from utils.distributed import World
from utils.environment import git_commit
from utils.errors import UserError
from utils.files import exclusive, write_json
from utils.processor import all_threads
from utils.transfer import sent

# What a resumed run may do differently: how long, how often and where to, but not what is trained on what.
RESUMABLE_DIFFERENCES = {
    "train_steps",
    "max_seconds",
    "log_interval",
    "eval_interval",
    "eval_tasks",
    "patience",
    "min_delta",
    "deterministic",
    "max_nonfinite_steps",
    "micro_batch_size",
    "checkpoint_interval",
    "checkpoint_minutes",
    "keep_checkpoints",
    "keep_best_checkpoints",
    "resume",
    "threads",
    "timeout_minutes",
    "logging",
    "evaluation",
    "device",
    "compile",
    "output_dir",
    "run_name",
    "project_name",
}

C = TypeVar("C", bound=TrainingConfig)


class Run(Generic[C]):
    """One run: what its configuration becomes on this process. Every part is made when it is first asked
    for."""

    def __init__(self, config: C, world: World):
        self.asked, self.world = config, world
        self.folder = Path(config.output_dir) / config.name
        self._fresh_table: tuple[Store, GridTable] | None = None
        self.notes: list[str] = []  # what is to be said once there is a log to say it in

    @cached_property
    def device(self) -> torch.device:
        """The device, with the process group started and the fused functions compiled where that is asked
        for."""
        config = self.asked
        device = choose_device(config.device, self.world)
        only_deterministic(config.deterministic)
        # The switch is global to the process, so a run that is not assembled here would be another program.
        compile_fused(should_compile(config.compile, device, config.train_steps, self.notes.append))
        distributed.start(self.world, device, config.timeout_minutes)
        return device

    @cached_property
    def config(self) -> C:
        """What was asked for, with the dtype that `arch.forward_dtype=auto` stands for.

        A checkpoint that is continued decides it, else the device: bfloat16 where it is faster in every
        process.
        """
        asked = self.asked
        if asked.arch.forward_dtype != "auto":
            return asked
        here, why = faster_dtype(self.device)
        if "float32" in distributed.gather_objects(here):
            why = why if here == "float32" else "another process has a device that does not multiply bfloat16"
            here = "float32"
        dtype = trained_config(self.continued)["arch"]["forward_dtype"] if self.continued else here
        alone = f", where this machine would take {here}" if dtype != here else ""
        why = f"as in the checkpoint{alone}" if self.continued else why
        self.notes.append(f"arch.forward_dtype=auto: {dtype}, {why}")
        return asked.model_copy(update={"arch": asked.arch.model_copy(update={"forward_dtype": dtype})})

    @cached_property
    def continued(self) -> dict[str, Any] | None:
        """What the checkpoint that `resume` will continue says of itself, the same in every process; None
        without one."""
        _ = self.device  # the processes meet there
        found = _info_to_continue(self) if self.world.is_main else None
        return distributed.gather_objects(found)[0]

    @cached_property
    def threads(self) -> int:
        """The CPU's threads of this process, set: as asked, as in the checkpoint that is continued, or as is
        fastest."""
        config, samples = self.config, self.config.global_batch_size // self.world.size
        # Checkpoints from before there was a choice do not say, and took all.
        kept = self.continued.get("threads", all_threads()) if self.continued else None
        said = settle_threads(config.threads, self.model, config.data, samples, kept)
        self.notes += [said] if said else []
        return torch.get_num_threads()

    @cached_property
    def store(self) -> Store:
        """The dataset, with the validation tasks held out."""
        store = Store.load(self.config.data.path, *self.config.layouts).hold_out(self.config.validation)
        if self.config.data.turns and store.turned_labels_contradict:
            self.notes.append(
                f"{store.path} does not say what the answers to turned puzzles are: its labels break ties by "
                "a rule that does not turn, so that turned copies have wrong ones; "
                "build it again, or set data.augmentation=none"
            )
        return store

    @cached_property
    def table(self) -> GridTable:
        """The dataset's grids, on the device."""
        return self.store.grid_table.to(self.device)

    @cached_property
    def fresh(self) -> FreshTasks | None:
        """What replaces training tasks by new ones, if something does."""
        return FreshTasks(self.store, *self._sampled) if self.config.data.fresh else None

    @cached_property
    def sampler(self) -> Sampler:
        """The sampler of the dataset's layout, for this process's share of a batch.

        With `data.fresh` it is that of the last step that was sampled.
        """
        if self.fresh:
            return self.fresh.at(0)
        return SAMPLERS[self.store.metadata.layout](self.store, *self._sampled)

    @property
    def _sampled(self) -> tuple[DataConfig, int, int, int, int]:
        config, world = self.config, self.world
        return config.data, config.seed, config.global_batch_size, world.rank, world.size

    @property
    def sampled_store(self) -> Store:
        """The dataset whose tasks the sampler's draws name: `store`, or that with the fresh tasks."""
        return self.sampler.store

    @property
    def sampled_table(self) -> GridTable:
        """The grids of `sampled_store`, on the device."""
        store = self.sampled_store
        if store is self.store:
            return self.table
        if self._fresh_table is None or self._fresh_table[0] is not store:
            self._fresh_table = (store, store.grid_table.to(self.device))
        return self._fresh_table[1]

    @cached_property
    def sizes(self) -> DataSizes:
        """What the data decides of the model."""
        return DataSizes.of(self.store, self.config.data)

    @cached_property
    def model(self) -> RecursiveModel:
        """The model with its first weights, on the device."""
        torch.manual_seed(self.config.seed)  # right before: the first weights depend on nothing else
        return build_model(self.config.arch, self.sizes, self.config.encoder).to(self.device)

    @cached_property
    def _trained(self) -> tuple[TrainState, str]:
        config = self.config
        optimizers, name = build_optimizers(self.model, config, self.device)
        ema = EMA(self.model, config.ema_rate) if config.ema else None
        errors, data = None, config.data
        if data.error_weighted is not None:
            tasks = len(self.store.task_ids)
            errors = TaskErrors(tasks, data.error_weighted, data.error_interval, self.device)
        return TrainState(self.model, optimizers, ema, self.sampler.trained_pairs, task_errors=errors), name

    @property
    def state(self) -> TrainState:
        """Model, optimisers, averages and carries."""
        return self._trained[0]

    @property
    def optimizer(self) -> str:
        """The optimisers in a word, for the log and the checkpoint."""
        return self._trained[1]

    @cached_property
    def info(self) -> dict[str, Any]:
        """What a checkpoint says of the run."""
        config, metadata = self.config, self.store.metadata
        trained_on = self.store.trained_on(config.data.augmentation, config.data.max_train_groups)
        return {
            "config": config.model_dump(),
            "sizes": vars(self.sizes),
            "data": {
                "path": config.data.path,
                "layout": metadata.layout,
                "game": metadata.game,
                "protocol": metadata.protocol,
                "hash": metadata.content_hash,
                **({"trained_on": trained_on} if trained_on else {}),
            },
            "parameters": count_parameters(self.model),
            "optimizer": self.optimizer,
            "git_commit": git_commit(),
            "torch": torch.__version__,
            "threads": self.threads if self.device.type == "cpu" else None,
            "device": describe(self.device),
        }

    def batch(self, samples: Samples) -> Batch:
        """The tensors of a sampler's draw, on the device."""
        batch = materialise(samples, self.sampled_store, self.sampled_table)
        if self.state.task_errors:
            tasks = np.searchsorted(self.store.task_pairs, samples.query, side="right") - 1
            batch.data[TASKS] = sent(torch.from_numpy(tasks), self.device)
        return batch

    def samples(self) -> Samples:
        """This process's part of the batch of the state's step."""
        step, errors = self.state.step, self.state.task_errors
        if self.fresh and (sampler := self.fresh.at(step)) is not self.sampler:
            self.sampler = sampler
            self.state.trained_pairs = np.union1d(self.state.trained_pairs, sampler.trained_pairs)
        return self.sampler.sample(step, factors=errors.factors(step) if errors else None)

    def step(self, samples: Samples) -> StepResult:
        """One call of `train_step` on a sampler's draw."""
        return train_step(self.state, self.batch(samples), self.config, self.world)

    def close(self) -> None:
        """End the processes that make tasks for it."""
        if self.fresh:
            self.fresh.close()

    def batch_line(self, samples: Samples) -> str:
        """What a step had to hold in memory."""
        side, demos = samples.bucket
        demonstrations = f", {demos} demonstrations" if demos else ""
        batch, processes = self.config.global_batch_size, self.world.size
        return f"global_batch_size={batch} over {processes} process(es), canvas side {side}{demonstrations}"

    def model_line(self) -> str:
        """What is trained, and how large it is."""
        config, parameters = self.config, count_parameters(self.model)
        encoder = f", encoder {config.encoder.name} {parameters['context']:,}" if config.encoder else ""
        rows = f", puzzle table {parameters['puzzle_table']:,}" if parameters["puzzle_table"] else ""
        return f"{config.arch.name}: core {parameters['core']:,} parameters{encoder}{rows}"

    def data_line(self) -> str:
        """How many tasks train on which canvases."""
        sampler = self.sampler
        tasks = len({task for choice in sampler.chances.choices.values() for task in choice.tasks.tolist()})
        sides = sorted({bucket.side for bucket in sampler.buckets})
        held_out = len(self.store.tasks_of("validation"))
        validation = f", {held_out} held out for validation" if held_out else ""
        skipped = len(sampler.skipped_tasks)
        left_out = f"; {skipped} tasks do not fit the canvas or the demonstration limits" if skipped else ""
        changing = self.config.data.fresh
        fresh = f" ({', '.join(changing.tasks)}: new ones every {changing.steps} steps)" if changing else ""
        return f"{tasks} training tasks{fresh} on canvases {sides}{validation}{left_out}"


def prepare(config: C, world: World) -> Run[C]:
    """The run that `config` describes, every part made, at step 0. Raises `UserError` for what cannot be
    trained."""
    run = Run(config, world)
    _ = run.device, run.store, run.sampler, run.state, run.threads
    return run


@contextmanager
def alone_in(run: Run) -> Iterator[None]:
    """Inside the context no other training writes into the run's folder. The first process holds the lock for
    all."""
    with ExitStack() as stack:
        problem = ""
        if run.world.is_main:
            try:
                stack.enter_context(exclusive(run.folder, "trains in this folder"))
            except UserError as error:
                problem = str(error)
        if problem := distributed.gather_objects(problem)[0]:
            raise UserError(problem)
        yield


def resume(run: Run) -> dict[Path, str]:
    """Continue this run's newest whole checkpoint (auto), a named one, or refuse to overwrite an earlier run
    (never).

    Processes that torchrun restarts continue what they have saved, whatever the run began with. Returns the
    newer checkpoints that were passed over because they are damaged, each with its damage.
    """
    config, folder = run.config, run.folder
    # All continue what the first process sees.
    looked_at = checkpoint.newest_whole(folder / "checkpoints") if run.world.is_main else (None, {})
    existing, damaged = distributed.gather_objects(looked_at)[0]
    how = "auto" if existing and run.world.restarts else config.resume
    if how == "never":
        if existing:
            raise UserError(
                f"{folder} already holds checkpoints and resume=never would overwrite them; choose another "
                "run_name"
            )
        return damaged
    path = existing if how == "auto" else checkpoint.resolve(how)
    if path is None:
        if damaged:
            raise UserError(f"{folder} has no whole checkpoint left: {'; '.join(damaged.values())}")
        return damaged
    if existing and path.resolve() != existing.resolve():
        raise UserError(
            f"{folder} holds {existing.name}, which continuing from {path} would overwrite; choose another "
            "run_name"
        )
    _check_same_run(run, path)
    run.state.load(path, run.world, run.device)
    return damaged


def _info_to_continue(run: Run) -> dict[str, Any] | None:
    """The info of the checkpoint that `resume` will continue, if it can be read."""
    how, steps = run.asked.resume, checkpoint.steps(run.folder / "checkpoints")
    if how == "never" and not run.world.restarts:
        return None
    candidates = [Path(how)] if how not in ("auto", "never") else list(reversed(steps))
    for path in candidates:
        with suppress(UserError):  # a damaged one is passed over, or `resume` will say what is wrong
            return checkpoint.load_info(checkpoint.resolve(path))
    return None


def _check_same_run(run: Run, path: Path) -> None:
    """Raise `UserError` unless the checkpoint `path` was trained as `run` would continue it."""
    info = checkpoint.load_info(path)
    ours, theirs = flatten(run.config.model_dump()), flatten(trained_config(info))
    different = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    different = [
        key
        for key in different
        if key.split(".")[0] not in RESUMABLE_DIFFERENCES and key not in ("data.path", "data.fresh.workers")
    ]
    if different:
        shown = ", ".join(f"{key}: {theirs.get(key)} then, {ours.get(key)} now" for key in different[:5])
        raise UserError(
            f"{path} belongs to a run with another configuration ({shown}); choose another run_name to "
            "start a new run"
        )
    if info["data"]["hash"] != run.store.metadata.content_hash:
        raise UserError(
            f"{path} was trained on other data than {run.store.path} holds now; rebuild that dataset or "
            "start a new run"
        )


def start_from_pretrained(run: Run, folder: Path) -> str | None:
    """Load `load_pretrained_decoder`, if any, into a new run. `folder`/pretrained_decoder.json says what
    became of each weight; the words returned sum it up."""
    config, state = run.config, run.state
    if config.load_pretrained_decoder is None:
        return None
    report = load_decoder(state.model, config, run.store.identifiers)
    state.trained_pairs = np.union1d(state.trained_pairs, pairs_behind(Path(config.load_pretrained_decoder)))
    if state.ema:
        state.ema.load(dict(state.model.named_parameters()))
    if run.world.is_main:
        write_json(folder / "pretrained_decoder.json", vars(report), indent=1)
    return report.summary()
