"""Does an evaluation task occur in training?

Tasks are compared by id, and pair by pair up to dihedral transform and recolouring.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dataset.augment import fingerprints
from dataset.layouts import LAYOUTS, LayoutName
from dataset.store import Leak, Store
from dataset.task import Pair, Task


def find_leaks(train: Sequence[Task], test: Sequence[Task], layout: LayoutName) -> list[Leak]:
    """Every training task and evaluation task that have the same id or share a pair.

    In the few-shot layout every pair of an evaluation task must be new. In the puzzle layout its
    demonstrations are training data by definition. So only its queries are compared, with the training tasks
    and with the demonstrations of the other evaluation tasks.
    """
    chosen = LAYOUTS[layout]
    tasks = [*train, *test]
    prints = _pair_prints(tasks)
    train_prints, test_prints = prints[: len(train)], prints[len(train) :]
    owners: dict[int, set[str]] = {}
    for task, keys in zip(train, train_prints, strict=True):
        for key in keys[keys > 0].tolist():  # 0: the answer is unknown, so nothing can be compared
            owners.setdefault(key, set()).add(task.id)
    # With learned rows the demonstrations of an evaluation task are trained on, and may give another's
    # query away.
    neighbours: dict[int, set[str]] = {}
    for task, keys in zip(test, test_prints, strict=True) if chosen.learns_rows else ():
        for key in keys[: len(task.demonstrations)].tolist():
            neighbours.setdefault(key, set()).add(task.id)
    training_ids = {task.id for task in train}
    leaks = {(task.id, task.id) for task in test if task.id in training_ids}
    for task, keys in zip(test, test_prints, strict=True):
        must_be_new = keys if chosen.reads_demonstrations else keys[len(task.demonstrations) :]
        for key in must_be_new[must_be_new > 0].tolist():
            trained_on = owners.get(key, set()) | (neighbours.get(key, set()) - {task.id})
            leaks.update((owner, task.id) for owner in trained_on)
    return [Leak(train_task=owner, test_task=task_id) for owner, task_id in sorted(leaks)]


class Known:
    """The pairs and the input grids of some tasks, up to symmetry and recolouring."""

    def __init__(self, tasks: Sequence[Task]):
        pairs = np.unique(fingerprints([pair for task in tasks for pair in task.pairs]))
        self.pairs = pairs[pairs > 0]  # 0: the answer is unknown
        self.inputs = np.unique(np.concatenate([np.zeros(0, np.uint64), *_input_prints(tasks)]))

    def sharing(self, tasks: Sequence[Task]) -> tuple[set[str], set[str]]:
        """The ids of the tasks that share a pair with them, and of those that share an input grid alone."""
        pairs, inputs = (
            {task.id for task, own in zip(tasks, prints, strict=True) if np.isin(own, known).any()}
            for prints, known in (
                (_pair_prints(tasks), self.pairs),
                (_input_prints(tasks), self.inputs),
            )
        )
        return pairs, inputs - pairs


def _pair_prints(tasks: Sequence[Task]) -> list[np.ndarray]:
    return _by_task(tasks, [pair for task in tasks for pair in task.pairs])


def _input_prints(tasks: Sequence[Task]) -> list[np.ndarray]:
    return _by_task(tasks, [Pair(pair.input, pair.input) for task in tasks for pair in task.pairs])


def _by_task(tasks: Sequence[Task], pairs: Sequence[Pair]) -> list[np.ndarray]:
    borders = np.cumsum([len(task.pairs) for task in tasks])[:-1]
    return np.split(fingerprints(pairs), borders) if tasks else []


# Stands among the fingerprints for training data of which nothing is known.
UNKNOWN_PAIRS = np.array([np.iinfo(np.uint64).max], np.uint64)


def nothing_known(trained: np.ndarray) -> bool:
    """Whether `trained`, the fingerprints of a model's training data, leave open what it has seen."""
    return bool(np.isin(UNKNOWN_PAIRS, trained).any())


@dataclass(frozen=True)
class Seen:
    """The tasks that a model may know from its training.

    tasks: their indices. asked: how many tasks were looked at. why: the reason, in words.
    """

    tasks: np.ndarray
    asked: int
    why: str

    def __bool__(self) -> bool:
        return len(self.tasks) > 0


def tasks_seen(store: Store, tasks: np.ndarray, trained: np.ndarray) -> Seen:
    """Which of `tasks` share a labelled pair with the fingerprints `trained` of a model's training data.

    If nothing is known of that data, every task may have been seen.
    """
    if nothing_known(trained):
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
        f"{len(seen)} of the {len(tasks)} tasks share a pair with the training data, "
        "up to symmetry and colours",
    )
