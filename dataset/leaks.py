"""Does an evaluation pair occur in training? Compared by content, up to dihedral transform and recolouring."""

from collections.abc import Callable, Iterable

from dataset.augment import canonical_pair
from dataset.store import Layout, Leak
from dataset.task import Pair, Task


def find_leaks(train: list[Task], test: list[Task], layout: Layout) -> list[Leak]:
    """The (training task, evaluation task) pairs of tasks that share a pair.

    In the few-shot layout every pair of an evaluation task must be new. In the puzzle layout its demonstrations are
    training data by definition, so only its queries are compared, also with the other evaluation tasks' demonstrations.
    """
    training = _owners(train, lambda task: task.pairs)
    other = _owners(test, lambda task: task.demonstrations) if layout == "puzzle" else {}
    leaks = set()
    for task in test:
        for pair in _labelled(task.pairs if layout == "fewshot" else task.queries):
            key = canonical_pair(pair)
            owners = training.get(key, set()) | (other.get(key, set()) - {task.id})
            leaks.update((owner, task.id) for owner in owners)
    return [Leak(train_task=owner, test_task=task_id) for owner, task_id in sorted(leaks)]


def _owners(tasks: list[Task], pairs_of: Callable[[Task], Iterable[Pair]]) -> dict[bytes, set[str]]:
    owners: dict[bytes, set[str]] = {}
    for task in tasks:
        for pair in _labelled(pairs_of(task)):
            owners.setdefault(canonical_pair(pair), set()).add(task.id)
    return owners


def _labelled(pairs: Iterable[Pair]) -> list[Pair]:
    return [pair for pair in pairs if pair.output is not None]
