"""Does an evaluation task occur in training? Compared by id, and pair by pair by content, up to dihedral transform and recolouring."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dataset.augment import fingerprints
from dataset.layouts import LAYOUTS, LayoutName
from dataset.store import Leak, Store
from dataset.task import Task


def find_leaks(train: Sequence[Task], test: Sequence[Task], layout: LayoutName) -> list[Leak]:
    """The (training task, evaluation task) pairs of tasks that have the same id or share a pair.

    In the few-shot layout every pair of an evaluation task must be new. In the puzzle layout its demonstrations are
    training data by definition, so only its queries are compared, also with the other evaluation tasks' demonstrations.
    """
    tasks = [*train, *test]
    flat = fingerprints([pair for task in tasks for pair in task.pairs])
    prints = np.split(flat, np.cumsum([len(task.pairs) for task in tasks])[:-1])
    owners: dict[int, set[str]] = {}
    for task, keys in zip(train, prints, strict=False):
        for key in keys[keys > 0].tolist():
            owners.setdefault(key, set()).add(task.id)
    neighbours: dict[int, set[str]] = {}
    for task, keys in zip(test, prints[len(train) :], strict=True) if LAYOUTS[layout].learns_rows else ():
        for key in keys[: len(task.demonstrations)].tolist():
            neighbours.setdefault(key, set()).add(task.id)
    training_ids = {task.id for task in train}
    leaks = {(task.id, task.id) for task in test if task.id in training_ids}
    for task, keys in zip(test, prints[len(train) :], strict=True):
        asked = keys if LAYOUTS[layout].reads_demonstrations else keys[len(task.demonstrations) :]
        for key in asked[asked > 0].tolist():
            leaks.update(
                (owner, task.id)
                for owner in owners.get(key, set()) | (neighbours.get(key, set()) - {task.id})
            )
    return [Leak(train_task=owner, test_task=task_id) for owner, task_id in sorted(leaks)]


UNKNOWN_PAIRS = np.array(
    [np.iinfo(np.uint64).max], np.uint64
)  # among fingerprints: training data of which nothing is known


@dataclass(frozen=True)
class Seen:
    """tasks: those of `asked` tasks that a model may know from its training. why: the reason, in words."""

    tasks: np.ndarray
    asked: int
    why: str

    def __bool__(self) -> bool:
        return len(self.tasks) > 0


def tasks_seen(store: Store, tasks: np.ndarray, trained: np.ndarray) -> Seen:
    """Which of `tasks` share a labelled pair with `trained`, the fingerprints of everything a model was trained on."""
    if np.isin(UNKNOWN_PAIRS, trained).any():
        return Seen(
            tasks,
            len(tasks),
            "nothing is known of the training data of the weights that the model started from",
        )
    shared = np.isin(store.pair_fingerprint, trained[trained > 0])
    seen = np.array(
        [task for task in tasks if shared[store.task_pairs[task] : store.task_pairs[task + 1]].any()],
        dtype=np.int64,
    )
    return Seen(
        seen,
        len(tasks),
        f"{len(seen)} of the {len(tasks)} tasks share a pair with the training data, up to symmetry and colours",
    )
