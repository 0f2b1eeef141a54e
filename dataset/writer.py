"""Writing a dataset: tasks and their augmentations become the arrays of a `Store`, in memory or on disk.

`pack` makes the arrays. `Packed.save` writes the files of dataset/store.py. `Packed.store` gives a dataset
that never was on a disk. The same tasks and seed give the same bytes, whatever PYTHONHASHSEED.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from tqdm import tqdm

from dataset import augment
from dataset.layouts import LAYOUTS, LayoutName
from dataset.store import (
    ARRAY_FILES,
    BLANK_IDENTIFIER,
    FORMAT,
    MARKER,
    TEST,
    TRAIN,
    Leak,
    Metadata,
    Store,
)
from dataset.task import MAX_SIDE, Task
from utils.errors import UserError
from utils.files import check_replaceable, directory_written_whole, read_json, sha256_of, write_json

SplitName = Literal["train", "test"]
# dihedral (n,) uint8 and colours (n, 10) uint8 of one task's augmentations, the identity first
ViewRows = tuple[np.ndarray, np.ndarray]
Entry = tuple[Task, int, int]  # a task, its split and its subset


@dataclass(frozen=True)
class About:
    """What is said of a dataset beside its tasks (`Metadata`).

    num_aug: at most so many augmentations are drawn per task.
    augmentations: the tasks' view rows in the order of the identifiers. None draws them.
    extra_files: JSON values to store beside, by file name.
    """

    layout: LayoutName
    source: str
    seed: int
    num_aug: int = 0
    max_grid_size: int = MAX_SIDE
    leaks: Sequence[Leak] = ()
    left_out: Mapping[str, list[str]] = field(default_factory=dict)
    identifiers_start: int = 1
    augmentations: Mapping[str, ViewRows] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    extra_files: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Packed:
    """A dataset in memory.

    tasks, augmentations: the arrays of tasks.npz and augmentations.npz. values: the JSON values beside
    them, by file name. metadata: the description, still without hashes.
    """

    tasks: dict[str, np.ndarray]
    augmentations: dict[str, np.ndarray]
    values: dict[str, Any]
    metadata: Metadata

    def save(self, output: Path) -> Metadata:
        """Write the dataset to the folder `output`, all or nothing. Returns the metadata with hashes."""
        with directory_written_whole(output, marker=MARKER) as folder:
            for file, arrays in zip(ARRAY_FILES, (self.tasks, self.augmentations), strict=True):
                # NumPy's types take each array for the option that is no array.
                np.savez_compressed(folder / file, **cast(dict[str, Any], arrays))
            for name, value in self.values.items():
                write_json(folder / name, value)
            digests = {name: sha256_of(folder / name) for name in (*ARRAY_FILES, *self.values)}
            metadata = self.metadata.model_copy(update={"sha256": digests})
            write_json(folder / MARKER, metadata.model_dump(), indent=1)
        return metadata

    def store(self) -> Store:
        """The dataset as `Store.load` would give it. Without files it has neither hashes nor identifiers."""
        arrays = {**self.tasks, **self.augmentations}
        return Store(
            path=Path(self.metadata.source),
            metadata=self.metadata,
            task_ids=arrays.pop("task_ids").tolist(),
            subset_names=arrays.pop("subset_names").tolist(),
            **arrays,
        )


def check_output(output: Path) -> None:
    """Raise `UserError` unless a dataset may be written to `output`. Builders ask before their work."""
    check_replaceable(output.resolve(), MARKER)


def write_dataset(
    output: Path, tasks: Mapping[str, Sequence[Task]], test_subsets: Sequence[str], **about: Any
) -> Metadata:
    """Pack and save a dataset of named subsets. `about` are the fields of `About`.

    Raises `UserError` like `pack`, and for an id that cannot name a puzzle.
    """
    for subset, members in tasks.items():
        for task in members:
            if reason := augment.unfit_for_a_name(task.id):
                raise UserError(f"subset '{subset}': task {task.id!r} {reason}; give it another name")
    return pack(tasks, test_subsets, About(**about)).save(output)


def pack(tasks: Mapping[str, Sequence[Task]], test_subsets: Sequence[str], about: About) -> Packed:
    """A dataset of named subsets, of which the named test subsets form the test split.

    Tasks are ordered by subset and id, or like `about.augmentations`. Raises `UserError` for duplicate ids.
    """
    splits = [(name, TRAIN) for name in tasks if name not in test_subsets]
    splits += [(name, TEST) for name in test_subsets]
    subset_names = [name for name, _ in splits]
    entries = [
        (task, split, subset)
        for subset, (name, split) in enumerate(splits)
        for task in sorted(tasks[name], key=lambda t: t.id)
    ]
    _refuse_duplicates([task.id for task, _, _ in entries], subset_names)
    if about.augmentations is not None:
        # Puzzle identifiers number the tasks in this order.
        position = {task_id: i for i, task_id in enumerate(about.augmentations)}
        entries.sort(key=lambda entry: position[entry[0].id])
    view_rows = {
        task.id: _view_rows_of(task, about) for task in _told([task for task, _, _ in entries], about)
    }
    names = [name for task_id, views in view_rows.items() for name in augment.names_of(task_id, *views)]
    values = {
        "identifiers.json": [BLANK_IDENTIFIER] * about.identifiers_start + names,
        "test_puzzles.json": {task.id: task.to_json() for task, split, _ in entries if split == TEST},
        **about.extra_files,
    }
    metadata = Metadata(
        format=FORMAT,
        game="arc",
        layout=about.layout,
        protocol="transductive" if about.leaks or LAYOUTS[about.layout].learns_rows else "inductive",
        source=about.source,
        seed=about.seed,
        num_aug=about.num_aug,
        max_grid_size=about.max_grid_size,
        subsets={name: len(tasks[name]) for name in subset_names},
        test_subsets=list(test_subsets),
        identifiers_start=about.identifiers_start,
        num_puzzle_identifiers=about.identifiers_start + len(names),
        augmentations_per_task=_number_drawn(view_rows) if about.num_aug else {},
        leaks=list(about.leaks),
        left_out=dict(about.left_out),
        details=dict(about.details),
        sha256={},
    )
    return Packed(_task_arrays(entries, subset_names), _table_of(view_rows), values, metadata)


def _refuse_duplicates(ids: list[str], subset_names: list[str]) -> None:
    if len(set(ids)) < len(ids):
        duplicate = next(task_id for task_id in ids if ids.count(task_id) > 1)
        subsets = ", ".join(subset_names)
        raise UserError(
            f"task {duplicate} occurs more than once in subsets {subsets}; one id is one puzzle, and "
            "build_arc_dataset --drop-duplicates keeps the first"
        )


def _told(tasks: list[Task], about: About) -> Iterable[Task]:
    """The tasks; a terminal shows how many have their augmentations where some are to be drawn."""
    drawn = about.num_aug > 0 and about.augmentations is None
    return tqdm(tasks, "augmentations", unit="task", leave=False, disable=None if drawn else True)


def _view_rows_of(task: Task, about: About) -> ViewRows:
    if about.augmentations is not None:
        return about.augmentations[task.id]
    return augment.draw(task, about.num_aug, augment.task_rng(about.seed, task.id))


def _number_drawn(view_rows: Mapping[str, ViewRows]) -> dict[str, int]:
    """How many augmentations beside the identity each task has."""
    return {task_id: len(dihedral) - 1 for task_id, (dihedral, _) in view_rows.items()}


def _table_of(view_rows: Mapping[str, ViewRows]) -> dict[str, np.ndarray]:
    """The arrays of augmentations.npz."""
    return {
        "task_rows": np.cumsum([0] + [len(dihedral) for dihedral, _ in view_rows.values()]),
        "dihedral": np.concatenate([dihedral for dihedral, _ in view_rows.values()]),
        "colours": np.concatenate([colours for _, colours in view_rows.values()]),
    }


def _task_arrays(entries: list[Entry], subset_names: list[str]) -> dict[str, np.ndarray]:
    """The arrays of tasks.npz."""
    tasks = [task for task, _, _ in entries]
    pairs = [pair for task in tasks for pair in task.pairs]
    grids = [grid for pair in pairs for grid in (pair.input, pair.output) if grid is not None]
    side = max(max(grid.shape) for grid in grids)
    pixels = np.zeros((len(grids), side, side), np.uint8)
    for square, grid in zip(pixels, grids, strict=True):
        square[: grid.shape[0], : grid.shape[1]] = grid
    # A pair has two grids, or one if its answer is unknown.
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
        "task_split": np.array([split for _, split, _ in entries], np.uint8),
        "task_subset": np.array([subset for _, _, subset in entries], np.int32),
        "task_ids": np.array([task.id for task in tasks]),
        "subset_names": np.array(subset_names),
    }


def read_identifiers(file: Path) -> tuple[int, dict[str, ViewRows]]:
    """The number of the first puzzle in an ancestor's identifiers.json, and the view rows of each task.

    Raises `UserError` unless the file is a list in which each task's names follow each other. They begin with
    the bare id.
    """
    names = read_json(file)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file}: expected a list of puzzle names")
    start = next((i for i, name in enumerate(names) if name != BLANK_IDENTIFIER), len(names))
    if start == len(names):
        raise UserError(f"{file} names no puzzle; only ARC datasets have identifiers")
    return start, _view_rows_named(names[start:], str(file))


def _view_rows_named(names: Sequence[str], where: str) -> dict[str, ViewRows]:
    parsed: dict[str, list[tuple[int, np.ndarray]]] = {}
    previous = None
    for name in names:
        try:
            task_id, index, colours = augment.parse_name(name)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        new = task_id != previous
        if new != (name == task_id) or (new and task_id in parsed):
            raise UserError(
                f"{where}: '{name}' is out of place; "
                "a task's names must follow each other, beginning with the bare id"
            )
        parsed.setdefault(task_id, []).append((index, colours))
        previous = task_id
    return {
        task_id: (
            np.array([index for index, _ in views], np.uint8),
            np.stack([colours for _, colours in views]),
        )
        for task_id, views in parsed.items()
    }
