"""Writing a dataset: tasks and their augmentations become the arrays of a `Store`, in memory or on disk.

`pack` makes the arrays, `Packed.save` the files of dataset/store.py, `Packed.store` a dataset that was never on a disk.
Deterministic: the same tasks and seed give the same bytes, whatever PYTHONHASHSEED.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dataset import augment
from dataset.layouts import LAYOUTS, LayoutName
from dataset.store import (
    ARRAY_FILES,
    BLANK_IDENTIFIER,
    FORMAT,
    MARKER,
    SPLITS,
    TEST,
    TRAIN,
    Leak,
    Metadata,
    Store,
)
from dataset.task import MAX_SIDE, Task
from utils.errors import UserError
from utils.files import check_replaceable, directory_written_whole, read_json, sha256_of, write_json

# dihedral (n,) uint8 and colours (n, 10) uint8 of a task's rows
Rows = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class About:
    """What is said of a dataset beside its tasks (`Metadata`), and how many augmentations each task has at most.

    augmentations: the tasks' rows (identity first) in the order of the identifiers; None draws up to `num_aug` per task.
    extra_files: name -> JSON value, stored beside.
    """

    layout: LayoutName
    source: str
    seed: int
    num_aug: int = 0
    max_grid_size: int = MAX_SIDE
    leaks: Sequence[Leak] = ()
    left_out: Mapping[str, list[str]] = field(default_factory=dict)
    identifiers_start: int = 1
    augmentations: Mapping[str, Rows] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    extra_files: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Packed:
    """A dataset in memory: the arrays of both files, the JSON values beside them, and the metadata without hashes."""

    tasks: dict[str, np.ndarray]
    augmentations: dict[str, np.ndarray]
    values: dict[str, Any]
    metadata: dict[str, Any]

    def save(self, output: Path) -> Metadata:
        """Write the dataset to the folder `output`: all of it or nothing."""
        with directory_written_whole(output, marker=MARKER) as folder:
            np.savez_compressed(folder / ARRAY_FILES[0], **self.tasks)
            np.savez_compressed(folder / ARRAY_FILES[1], **self.augmentations)
            for name, value in self.values.items():
                write_json(folder / name, value)
            digests = {name: sha256_of(folder / name) for name in (*ARRAY_FILES, *self.values)}
            description = Metadata(format=FORMAT, sha256=digests, **self.metadata)
            write_json(folder / MARKER, description.model_dump(), indent=1)
        return description

    def store(self) -> Store:
        """The dataset as `Store.load` would give it. It has no files, and so neither hashes nor identifiers."""
        arrays = {**self.tasks, **self.augmentations}
        return Store(
            path=Path(self.metadata["source"]),
            metadata=Metadata(format=FORMAT, sha256={}, **self.metadata),
            task_ids=arrays.pop("task_ids").tolist(),
            subset_names=arrays.pop("subset_names").tolist(),
            **arrays,
        )


def check_output(output: Path) -> None:
    """Raise `UserError` unless a dataset may be written to `output`: for builders to ask before their work."""
    check_replaceable(output.resolve(), MARKER)


def write_dataset(
    output: Path, tasks: Mapping[str, Sequence[Task]], test_subsets: Sequence[str], **about: Any
) -> Metadata:
    """Pack and save a dataset of named subsets; `about` are the fields of `About`. Raises `UserError` (see `pack`)."""
    return pack(tasks, test_subsets, About(**about)).save(output)


def pack(tasks: Mapping[str, Sequence[Task]], test_subsets: Sequence[str], about: About) -> Packed:
    """A dataset of named subsets, of which the named test subsets form the test split.

    Tasks stand in the order of subsets and ids, or in that of `about.augmentations`. Raises `UserError` for duplicate ids.
    """
    splits = [(name, TRAIN) for name in tasks if name not in test_subsets]
    splits += [(name, TEST) for name in test_subsets]
    subset_names = [name for name, _ in splits]
    flat = [
        (task, split, number)
        for number, (name, split) in enumerate(splits)
        for task in sorted(tasks[name], key=lambda t: t.id)
    ]
    _refuse_duplicates([task.id for task, _, _ in flat], subset_names)
    if about.augmentations is not None:
        position = {task_id: i for i, task_id in enumerate(about.augmentations)}
        flat.sort(key=lambda entry: position[entry[0].id])
    rows = {task.id: _rows_of(task, about) for task, _, _ in flat}
    names = [name for task_id, own in rows.items() for name in augment.names_of(task_id, *own)]
    arrays = {
        **_arrays([task for task, _, _ in flat]),
        "task_split": np.array([split for _, split, _ in flat], np.uint8),
        "task_subset": np.array([subset for _, _, subset in flat], np.int32),
        "task_ids": np.array(list(rows)),
        "subset_names": np.array(subset_names),
    }
    table = {
        "task_rows": np.cumsum([0] + [len(own[0]) for own in rows.values()]),
        "dihedral": np.concatenate([own[0] for own in rows.values()]),
        "colours": np.concatenate([own[1] for own in rows.values()]),
    }
    values = {
        "identifiers.json": [BLANK_IDENTIFIER] * about.identifiers_start + names,
        "test_puzzles.json": {task.id: task.to_json() for task, split, _ in flat if split == TEST},
        **about.extra_files,
    }
    metadata = {
        "game": "arc",
        "layout": about.layout,
        "protocol": "transductive" if about.leaks or LAYOUTS[about.layout].learns_rows else "inductive",
        "source": about.source,
        "seed": about.seed,
        "num_aug": about.num_aug,
        "max_grid_size": about.max_grid_size,
        "subsets": {name: len(tasks[name]) for name in subset_names},
        "test_subsets": list(test_subsets),
        "identifiers_start": about.identifiers_start,
        "num_puzzle_identifiers": about.identifiers_start + len(names),
        "augmentations_per_task": {name: len(own[0]) - 1 for name, own in rows.items()}
        if about.num_aug
        else {},
        "leaks": list(about.leaks),
        "left_out": dict(about.left_out),
        "details": dict(about.details),
    }
    return Packed(arrays, table, values, metadata)


def _refuse_duplicates(ids: list[str], subset_names: list[str]) -> None:
    if len(set(ids)) < len(ids):
        duplicate = next(task_id for task_id in ids if ids.count(task_id) > 1)
        raise UserError(
            f"task {duplicate} occurs more than once in subsets {', '.join(subset_names)}; one id is one puzzle"
        )


def _rows_of(task: Task, about: About) -> Rows:
    """The task's augmentations, the identity first."""
    if about.augmentations is not None:
        return about.augmentations[task.id]
    return augment.draw(task, about.num_aug, augment.task_rng(about.seed, task.id))


def write_pairs(
    output: Path,
    splits: Mapping[Literal["train", "test"], tuple[np.ndarray, np.ndarray]],
    *,
    game: Literal["sudoku", "maze"],
    source: str,
    seed: int,
    num_aug: int,
    details: Mapping[str, Any],
    fingerprints: Mapping[Literal["train", "test"], np.ndarray],
) -> Metadata:
    """Write a dataset of puzzles that share one rule: per split inputs and answers, each (n, rows, columns) uint8.

    `fingerprints` (n,) uint64 are equal for puzzles that a symmetry of the game maps to each other.

    `num_aug` is the number of symmetric copies of each training puzzle that `data.augmentation=table` draws from
    (`Game.stored_symmetries`); they are a function of the seed and take no space.
    """
    counts = {name: len(inputs) for name, (inputs, _) in splits.items()}
    total = sum(counts.values())
    inputs, answers = (np.concatenate([pair[role] for pair in splits.values()]) for role in (0, 1))
    pairs = np.arange(total, dtype=np.int32)
    arrays = {
        "grids": np.stack([inputs, answers], axis=1).reshape(2 * total, *inputs.shape[1:]),
        "shapes": np.tile(np.array(inputs.shape[1:], np.uint8), (2 * total, 1)),
        "pair_input": 2 * pairs,
        "pair_output": 2 * pairs + 1,
        "pair_fingerprint": np.concatenate([fingerprints[name] for name in counts])
        | np.uint64(1),  # 0 is an unknown answer
        "task_pairs": np.arange(total + 1),
        "task_demonstrations": np.zeros(total, np.int32),
        "task_split": np.concatenate(
            [np.full(count, SPLITS[name], np.uint8) for name, count in counts.items()]
        ),
        "task_subset": np.repeat(np.arange(len(counts), dtype=np.int32), list(counts.values())),
        "task_ids": np.array([f"{name}_{i:07d}" for name, count in counts.items() for i in range(count)]),
        "subset_names": np.array(list(counts)),
    }
    table = {
        "task_rows": np.arange(total + 1),
        "dihedral": np.zeros(total, np.uint8),
        "colours": augment.identity_colours(total),
    }
    metadata = {
        "game": game,
        "layout": "pairs",
        "protocol": "inductive",
        "source": source,
        "seed": seed,
        "num_aug": num_aug,
        "max_grid_size": max(inputs.shape[1:]),
        "subsets": counts,
        "test_subsets": ["test"],
        "identifiers_start": 1,
        "num_puzzle_identifiers": 1,
        "augmentations_per_task": {},
        "leaks": [],
        "left_out": {},
        "details": dict(details),
    }
    return Packed(arrays, table, {"identifiers.json": [BLANK_IDENTIFIER]}, metadata).save(output)


def read_identifiers(file: Path) -> tuple[int, dict[str, Rows]]:
    """Number of the first puzzle of an ancestor's identifiers.json, and the augmentations that its names stand for, by task.

    Raises `UserError` unless it is a list in which every task's names follow each other and begin with the bare id.
    """
    names = read_json(file)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file}: expected a list of puzzle names")
    start = next((i for i, name in enumerate(names) if name != BLANK_IDENTIFIER), len(names))
    if start == len(names):
        raise UserError(f"{file} names no puzzle; only ARC datasets have identifiers")
    return start, _rows_of_names(names[start:], str(file))


def _rows_of_names(names: Sequence[str], where: str) -> dict[str, Rows]:
    parsed: dict[str, list[tuple[int, np.ndarray]]] = {}
    previous = None
    for name in names:
        try:
            task_id, index, colours = augment.parse_name(name)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        if (task_id != previous) != (name == task_id) or (task_id != previous and task_id in parsed):
            raise UserError(
                f"{where}: '{name}' is out of place; a task's names must follow each other, beginning with the bare id"
            )
        parsed.setdefault(task_id, []).append((index, colours))
        previous = task_id
    return {
        task_id: (
            np.array([index for index, _ in rows], np.uint8),
            np.stack([colours for _, colours in rows]),
        )
        for task_id, rows in parsed.items()
    }


def _arrays(tasks: list[Task]) -> dict[str, np.ndarray]:
    pairs = [pair for task in tasks for pair in task.pairs]
    grids = [grid for pair in pairs for grid in (pair.input, pair.output) if grid is not None]
    side = max(max(grid.shape) for grid in grids)
    pixels = np.zeros((len(grids), side, side), np.uint8)
    for row, grid in zip(pixels, grids, strict=True):
        row[: grid.shape[0], : grid.shape[1]] = grid
    known = np.array([pair.output is not None for pair in pairs])
    first = np.cumsum(1 + known) - (1 + known)
    return {
        "grids": pixels,
        "shapes": np.array([grid.shape for grid in grids], np.uint8),
        "pair_input": first.astype(np.int32),
        "pair_output": np.where(known, first + 1, -1).astype(np.int32),
        "pair_fingerprint": augment.fingerprints(pairs),
        "task_pairs": np.cumsum([0] + [len(task.pairs) for task in tasks]),
        "task_demonstrations": np.array([len(task.demonstrations) for task in tasks], np.int32),
    }
