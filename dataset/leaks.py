"""Does an evaluation pair occur in training? Compared by content, up to dihedral transform and recolouring."""

import numpy as np

from dataset.augment import fingerprints
from dataset.store import Layout, Leak, Store
from dataset.task import Task


def find_leaks(train: list[Task], test: list[Task], layout: Layout) -> list[Leak]:
    """The (training task, evaluation task) pairs of tasks that share a pair.

    In the few-shot layout every pair of an evaluation task must be new. In the puzzle layout its demonstrations are
    training data by definition, so only its queries are compared, also with the other evaluation tasks' demonstrations.
    """
    tasks = [*train, *test]
    flat = fingerprints([pair for task in tasks for pair in task.pairs])
    ends = np.cumsum([len(task.pairs) for task in tasks])
    prints = {id(task): flat[end - len(task.pairs) : end] for task, end in zip(tasks, ends, strict=True)}
    owners: dict[int, set[str]] = {}
    for task in train:
        for key in prints[id(task)]:
            owners.setdefault(int(key), set()).add(task.id)
    neighbours: dict[int, set[str]] = {}
    for task in test if layout == "puzzle" else []:
        for key in prints[id(task)][: len(task.demonstrations)]:
            neighbours.setdefault(int(key), set()).add(task.id)
    leaks = set()
    for task in test:
        asked = prints[id(task)] if layout == "fewshot" else prints[id(task)][len(task.demonstrations) :]
        for key in asked[asked > 0]:
            found = owners.get(int(key), set()) | (neighbours.get(int(key), set()) - {task.id})
            leaks.update((owner, task.id) for owner in found)
    return [Leak(train_task=owner, test_task=task_id) for owner, task_id in sorted(leaks)]


def tasks_seen(store: Store, tasks: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Which of `tasks` share a labelled pair with `trained`, the fingerprints of everything a model was trained on."""
    seen = np.isin(store.pair_fingerprint, trained[trained > 0])
    return np.array([task for task in tasks if seen[store.task_pairs[task] : store.task_pairs[task + 1]].any()], dtype=np.int64)
