"""The dataset on disk: every task once, plus a table of its augmentations. Grids are drawn onto a canvas when needed.

tasks.npz           grids (N, G, G) uint8, shapes (N, 2), pair_input / pair_output (P,) grid indices (-1: unknown
                    answer), pair_fingerprint (P,) uint64 (dataset.augment.fingerprints), task_pairs (T + 1,) first
                    pair of each task, task_demonstrations (T,), task_split (T,) 0 train / 1 test, task_subset (T,)
augmentations.npz   task_rows (T + 1,) first row of each task, dihedral (A,), colours (A, 10); row 0 is the identity
identifiers.json    the ancestors' puzzle names: entry 0 is <blank>, entry 1 + i is row i
test_puzzles.json   the evaluation tasks in the ARC format
dataset.json        `Metadata`
"""

import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError

from config.base import Config
from dataset import augment
from dataset.canvas import GridTable
from dataset.task import Pair, Task
from utils.errors import UserError
from utils.files import directory_written_whole, read_json, sha256_of, write_json

FORMAT = 1
BLANK_IDENTIFIER = "<blank>"
TRAIN, TEST = 0, 1
SPLITS = {"train": TRAIN, "test": TEST}
_ARRAY_FILES = ("tasks.npz", "augmentations.npz")

Layout = Literal["puzzle", "fewshot"]


class Leak(Config):
    """A pair that a training task and an evaluation task share, up to dihedral transform and recolouring."""

    train_task: str
    test_task: str


class Metadata(Config):
    """What `dataset.json` says of a dataset."""

    format: int
    layout: Layout
    protocol: Literal["inductive", "transductive"]
    source: str
    seed: int
    num_aug: int
    max_grid_size: int
    subsets: dict[str, int]
    test_subsets: list[str]
    num_puzzle_identifiers: int
    augmentations_per_task: dict[str, int]
    leaks: list[Leak]
    dropped_train_tasks: list[str]
    sha256: dict[str, str]

    @property
    def content_hash(self) -> str:
        """One hash that changes with any task, split, augmentation or identifier."""
        return self.sha256["tasks.npz"][:16] + self.sha256["augmentations.npz"][:16]


@dataclass(frozen=True)
class Store:
    """A loaded dataset; arrays as the module's docstring names them."""

    path: Path
    metadata: Metadata
    identifiers: list[str]
    task_ids: list[str]
    subset_names: list[str]
    grids: np.ndarray
    shapes: np.ndarray
    pair_input: np.ndarray
    pair_output: np.ndarray
    pair_fingerprint: np.ndarray
    task_pairs: np.ndarray
    task_demonstrations: np.ndarray
    task_split: np.ndarray
    task_subset: np.ndarray
    task_rows: np.ndarray
    dihedral: np.ndarray
    colours: np.ndarray

    def tasks_of(self, split: str, limit: int | None = None, subsets: list[str] | None = None) -> np.ndarray:
        """Indices of a split's tasks, of all subsets or the named ones, at most the first `limit`."""
        chosen = self.task_split == SPLITS[split]
        if subsets is not None:
            for name in subsets:
                if name not in self.subset_names:
                    raise UserError(f"{self.path}: no subset '{name}'; it has {', '.join(self.subset_names)}")
            chosen &= np.isin(self.task_subset, [self.subset_names.index(name) for name in subsets])
        return np.flatnonzero(chosen)[:limit]

    def task(self, index: int) -> Task:
        """Task `index` as grids."""
        pairs = tuple(self.pair(p) for p in range(self.task_pairs[index], self.task_pairs[index + 1]))
        count = int(self.task_demonstrations[index])
        return Task(self.task_ids[index], pairs[:count], pairs[count:])

    def pair(self, index: int) -> Pair:
        """Pair `index` as grids."""
        answer = int(self.pair_output[index])
        return Pair(self._grid(self.pair_input[index]), None if answer < 0 else self._grid(answer))

    def _grid(self, index: int) -> np.ndarray:
        rows, columns = self.shapes[index]
        return self.grids[index, :rows, :columns]

    @cached_property
    def grid_table(self) -> GridTable:
        """The grids as CPU tensors for `canvas.render`."""
        return GridTable(torch.from_numpy(self.grids), torch.from_numpy(self.shapes.astype(np.int64)))

    @cached_property
    def pair_side(self) -> np.ndarray:
        """(P, 2) int: longest side of each pair's input and of its output (0 when unknown)."""
        side = self.shapes.max(axis=1).astype(np.int64)
        return np.stack([side[self.pair_input], np.where(self.pair_output < 0, 0, side[self.pair_output])], axis=1)


def write(
    output: Path,
    tasks: dict[str, list[Task]],
    test_subsets: list[str],
    *,
    layout: Layout,
    source: str,
    seed: int,
    num_aug: int,
    max_grid_size: int,
    leaks: list[Leak],
    dropped_train_tasks: list[str],
    extra_files: dict[str, Any] | None = None,
) -> Metadata:
    """Write a dataset of named subsets; the named test subsets form the test split. All or nothing is written.

    `extra_files` are written as JSON beside the rest, by name.

    Deterministic: the same tasks and seed give the same bytes. Raises `UserError` for duplicate task ids.
    """
    splits = [(name, TRAIN) for name in tasks if name not in test_subsets] + [(name, TEST) for name in test_subsets]
    subset_names = [name for name, _ in splits]
    flat = [(task, split, i) for i, (name, split) in enumerate(splits) for task in sorted(tasks[name], key=lambda t: t.id)]
    ids = [task.id for task, _, _ in flat]
    if len(set(ids)) < len(ids):
        duplicate = next(task_id for task_id in ids if ids.count(task_id) > 1)
        raise UserError(f"task {duplicate} occurs more than once in subsets {', '.join(subset_names)}; one id is one puzzle")
    drawn = [augment.draw(task, num_aug, augment.task_rng(seed, task.id)) for task, _, _ in flat]
    names = [BLANK_IDENTIFIER] + [
        augment.name_of(task.id, int(index), colours)
        for (task, _, _), rows in zip(flat, drawn, strict=True)
        for index, colours in zip(*rows, strict=True)
    ]
    leaky = bool(leaks) or layout == "puzzle"
    with directory_written_whole(output, marker="dataset.json") as folder:
        np.savez_compressed(
            folder / "tasks.npz",
            **_pack([task for task, _, _ in flat]),
            task_split=np.array([split for _, split, _ in flat], np.uint8),
            task_subset=np.array([subset for _, _, subset in flat], np.int32),
            task_ids=np.array(ids),
            subset_names=np.array(subset_names),
        )
        np.savez_compressed(
            folder / "augmentations.npz",
            task_rows=np.cumsum([0] + [len(index) for index, _ in drawn]),
            dihedral=np.concatenate([index for index, _ in drawn]),
            colours=np.concatenate([colours for _, colours in drawn]),
        )
        write_json(folder / "identifiers.json", names)
        write_json(folder / "test_puzzles.json", {task.id: task.to_json() for task, split, _ in flat if split == TEST})
        for name, value in (extra_files or {}).items():
            write_json(folder / name, value)
        metadata = Metadata(
            format=FORMAT,
            layout=layout,
            protocol="transductive" if leaky else "inductive",
            source=source,
            seed=seed,
            num_aug=num_aug,
            max_grid_size=max_grid_size,
            subsets={name: len(tasks[name]) for name in subset_names},
            test_subsets=test_subsets,
            num_puzzle_identifiers=len(names),
            augmentations_per_task={task.id: len(rows[0]) - 1 for (task, _, _), rows in zip(flat, drawn, strict=True)} if num_aug else {},
            leaks=leaks,
            dropped_train_tasks=dropped_train_tasks,
            sha256={
                name: sha256_of(folder / name) for name in (*_ARRAY_FILES, "identifiers.json", "test_puzzles.json", *(extra_files or {}))
            },
        )
        write_json(folder / "dataset.json", metadata.model_dump(), indent=1)
    return metadata


def _pack(tasks: list[Task]) -> dict[str, np.ndarray]:
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


def load(path: Path | str, layout: Layout | None = None) -> Store:
    """Load a dataset, checking hashes; `layout` refuses the other kind (a TRM trained on few-shot data, or the reverse).

    Raises `UserError` for a missing, foreign, damaged or unsuitable dataset.
    """
    path = Path(path)
    if not (path / "dataset.json").is_file():
        raise UserError(f"no dataset at {path} (dataset.json is missing); build one with: python -m dataset.build_arc_dataset --help")
    try:
        metadata = Metadata(**read_json(path / "dataset.json"))
    except (ValidationError, TypeError) as error:
        raise UserError(f"{path}/dataset.json is not of this framework's format: {error}") from None
    if metadata.format != FORMAT:
        raise UserError(f"{path} has dataset format {metadata.format}, this version reads {FORMAT}; build the dataset again")
    if layout is not None and metadata.layout != layout:
        raise UserError(f"{path} has layout '{metadata.layout}' but this model needs '{layout}'; build it with --layout {layout}")
    for name, digest in metadata.sha256.items():
        if not (path / name).is_file():
            raise UserError(f"{path}: {name} is missing; build the dataset again")
        if sha256_of(path / name) != digest:
            raise UserError(f"{path}: {name} is damaged (its hash differs from dataset.json); build the dataset again")
    arrays: dict[str, np.ndarray] = {}
    try:
        for name in _ARRAY_FILES:
            with np.load(path / name) as file:
                arrays.update(file)
    except (ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot read {name}: {error}") from None
    return Store(
        path=path,
        metadata=metadata,
        identifiers=read_json(path / "identifiers.json"),
        task_ids=arrays.pop("task_ids").tolist(),
        subset_names=arrays.pop("subset_names").tolist(),
        **arrays,
    )
