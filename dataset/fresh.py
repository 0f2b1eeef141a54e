"""Training tasks without end: generated while a model trains, replaced every so many steps (`data.fresh`).

The tasks of a step are a function of the run's seed and the step alone. So they are the same for any number
of workers and of processes, and a resumed run continues with the same ones.
"""

import json
import multiprocessing
from collections.abc import Collection
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import numpy as np

from dataset.batch import DataConfig
from dataset.generate.makers import make_tasks, maker_of, start_worker
from dataset.samplers import EpisodeSampler
from dataset.store import LEFT_OUT, TRAIN, Store
from dataset.task import Task
from dataset.writer import About, pack
from utils.errors import UserError

MADE_AT_ONCE = 128  # tasks, by one process
# A seed has so many numbers for its tasks. Those of stored tasks are below the first seed's.
NUMBERS_OF_SEED = 2**40


class FreshTasks:
    """The sampler of every step, whose dataset holds the tasks that are fresh at that step.

    Raises `UserError` for a subset whose generator is not known. Every process makes all tasks itself.
    """

    def __init__(
        self, store: Store, config: DataConfig, seed: int, global_batch_size: int, rank: int, world: int
    ):
        assert config.fresh, "only a configuration with fresh tasks needs them"
        self.config, self.fresh, self.seed = config, config.fresh, seed
        self._share = global_batch_size, rank, world
        self.made_by = _made_by(store, self.fresh.tasks)
        self.kept = _without(store, self.fresh.tasks)
        self.asked = np.unique(store.pair_fingerprint[_pairs_of(store, store.task_split != TRAIN)])
        self._workers: ProcessPoolExecutor | None = None
        self._coming: dict[int, list[tuple[str, Future[list[Task]]]]] = {}
        self._round = -1
        self._sampler: EpisodeSampler | None = None

    def at(self, step: int) -> EpisodeSampler:
        """The sampler of `step`. It stays the same one until its tasks are replaced."""
        number = step // self.fresh.steps
        if self._sampler is None or number != self._round:
            store = joined(self.kept, self.tasks(number))
            self._round = number
            self._sampler = EpisodeSampler(store, self.config, self.seed, *self._share)
            if self.fresh.workers:
                self._coming = {number + 1: self._ask_for(number + 1)}
        return self._sampler

    def tasks(self, number: int) -> dict[str, list[Task]]:
        """The fresh tasks of each subset while round `number` lasts, of `data.fresh.steps` steps.

        Those that show a pair of a task which is not trained on are left out, and those that are too large.
        """
        if self.fresh.workers:
            try:
                coming = self._coming.get(number) or self._ask_for(number)
                made = [(name, part.result()) for name, part in coming]
            except BrokenProcessPool:
                raise UserError(
                    "a process that makes tasks for data.fresh was ended from outside, perhaps for lack of "
                    "memory; data.fresh.workers=0 does without such processes"
                ) from None
        else:
            made = [(name, make_tasks(*part)) for name, part in self._parts(number)]
        largest = self.kept.metadata.max_grid_size
        tasks: dict[str, list[Task]] = {name: [] for name in self.fresh.tasks}
        for name, part in made:
            tasks[name] += [task for task in part if task.max_side <= largest and self._is_new(task)]
        return tasks

    def close(self) -> None:
        """End the workers. What they are making is not waited for."""
        if self._workers is not None:
            self._workers.shutdown(wait=False, cancel_futures=True)

    def _is_new(self, task: Task) -> bool:
        return not np.isin([pair.fingerprint for pair in task.pairs], self.asked).any()

    def _ask_for(self, number: int) -> list[tuple[str, Future[list[Task]]]]:
        if self._workers is None:
            # A copy of this process would hold its threads' locks and its device.
            clean = multiprocessing.get_context("spawn")
            self._workers = ProcessPoolExecutor(self.fresh.workers, clean, start_worker)
        return [(name, self._workers.submit(make_tasks, *part)) for name, part in self._parts(number)]

    def _parts(self, number: int) -> list[tuple[str, tuple[str, str, range]]]:
        """What is made of each subset for a round, in parts that do not depend on the number of workers."""
        parts = []
        for name, count in self.fresh.tasks.items():
            start = (1 + self.seed) * NUMBERS_OF_SEED + number * count
            made_by, where = json.dumps(self.made_by[name]), _where(self.kept, name)
            for first in range(0, count, MADE_AT_ONCE):
                last = min(first + MADE_AT_ONCE, count)
                parts.append((name, (made_by, where, range(start + first, start + last))))
        return parts


def _where(store: Store, subset: str) -> str:
    return f"subset '{subset}' of {store.path}"


def _made_by(store: Store, subsets: Collection[str]) -> dict[str, dict]:
    """What makes the tasks of each of the subsets. Raises `UserError`."""
    known = store.metadata.details.get("made_by", {})
    trained = {store.subset_names[number] for number in store.task_subset[store.task_split == TRAIN]}
    for name in subsets:
        if name not in known or name not in trained:
            there = ", ".join(sorted(known.keys() & trained)) or "none"
            raise UserError(
                f"data.fresh: no generator makes tasks of {_where(store, name)}; generated subsets: {there}"
            )
        maker_of(known[name], _where(store, name))
    return {name: known[name] for name in subsets}


def _without(store: Store, subsets: Collection[str]) -> Store:
    """The dataset without the training tasks of the subsets."""
    numbers = [store.subset_names.index(name) for name in subsets]
    replaced = (store.task_split == TRAIN) & np.isin(store.task_subset, numbers)
    return replace(store, task_split=np.where(replaced, LEFT_OUT, store.task_split).astype(np.uint8))


def _pairs_of(store: Store, tasks: np.ndarray) -> np.ndarray:
    """(P,) bool, the pairs of the tasks (T,) bool."""
    return np.repeat(tasks, np.diff(store.task_pairs))


def joined(store: Store, tasks: dict[str, list[Task]]) -> Store:
    """The dataset with further training tasks of its subsets behind its own. They have no identifiers."""
    about = About(layout=store.metadata.layout, source=str(store.path), seed=store.metadata.seed)
    new = pack({name: subset for name, subset in tasks.items() if subset}, [], about).store()
    side = max(store.grids.shape[1], new.grids.shape[1])
    grids, pairs, rows = len(store.grids), store.task_pairs[-1], store.task_rows[-1]
    subsets = np.array([store.subset_names.index(name) for name in new.subset_names], np.int32)
    return replace(
        store,
        task_ids=store.task_ids + new.task_ids,
        grids=np.concatenate([_padded(store.grids, side), _padded(new.grids, side)]),
        shapes=np.concatenate([store.shapes, new.shapes]),
        pair_input=np.concatenate([store.pair_input, new.pair_input + grids]),
        pair_output=np.concatenate([store.pair_output, new.pair_output + grids]),
        pair_fingerprint=np.concatenate([store.pair_fingerprint, new.pair_fingerprint]),
        task_pairs=np.concatenate([store.task_pairs, new.task_pairs[1:] + pairs]),
        task_demonstrations=np.concatenate([store.task_demonstrations, new.task_demonstrations]),
        task_split=np.concatenate([store.task_split, new.task_split]),
        task_subset=np.concatenate([store.task_subset, subsets[new.task_subset]]),
        task_rows=np.concatenate([store.task_rows, new.task_rows[1:] + rows]),
        dihedral=np.concatenate([store.dihedral, new.dihedral]),
        colours=np.concatenate([store.colours, new.colours]),
    )


def _padded(grids: np.ndarray, side: int) -> np.ndarray:
    more = side - grids.shape[1]
    return np.pad(grids, ((0, 0), (0, more), (0, more)))
