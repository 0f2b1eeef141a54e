"""The dataset on disk: every task once, plus a table of its augmentations. Grids are drawn onto a canvas when needed.

tasks.npz           grids (N, G, G) uint8, shapes (N, 2), pair_input / pair_output (P,) grid indices (-1: unknown
                    answer), pair_fingerprint (P,) uint64 (dataset.augment.fingerprints), task_pairs (T + 1,) first
                    pair of each task, task_demonstrations (T,), task_split (T,) 0 train / 1 test, task_subset (T,)
augmentations.npz   task_rows (T + 1,) first row of each task, dihedral (A,), colours (A, 10); row 0 is the identity
identifiers.json    the ancestors' puzzle names: entry `identifiers_start + i` is row i, those before it are <blank>
test_puzzles.json   the evaluation tasks in the ARC format
dataset.json        `Metadata`

Three layouts: `puzzle` (a learned row per augmented puzzle; the evaluation tasks' demonstrations are training data),
`fewshot` (evaluation tasks occur in no form in training), `pairs` (Sudoku, mazes: one rule for all, every pair is a task
of its own without demonstrations, and all share the blank identifier).
"""

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError

from dataset import augment
from dataset.canvas import GridTable
from dataset.games import GAMES, Game
from dataset.task import MAX_SIDE, Pair, Task
from utils.config import Config
from utils.errors import UserError
from utils.files import check_replaceable, directory_written_whole, read_json, sha256_of, write_json

FORMAT = 2
MARKER = "dataset.json"
BLANK_IDENTIFIER = "<blank>"
TRAIN, TEST = 0, 1
SPLITS = {"train": TRAIN, "test": TEST}
VALIDATION = 2  # not on disk: `Store.hold_out` makes it of training tasks
LEFT_OUT = 3  # not on disk, either: `Store.limited`
_ARRAY_FILES = ("tasks.npz", "augmentations.npz")

Layout = Literal["puzzle", "fewshot", "pairs"]
# dihedral (n,) uint8 and colours (n, 10) uint8 of a task's rows
Rows = tuple[np.ndarray, np.ndarray]


class Leak(Config):
    """A pair that a training task and an evaluation task share, up to dihedral transform and recolouring."""

    train_task: str
    test_task: str


class Metadata(Config):
    """What `dataset.json` says of a dataset.

    left_out: reason -> ids of the tasks that were left out for it. details: what a generator says of its puzzles.
    """

    format: int
    game: Literal["arc", "sudoku", "maze"]
    layout: Layout
    protocol: Literal["inductive", "transductive"]
    source: str
    seed: int
    num_aug: int
    max_grid_size: int
    subsets: dict[str, int]
    test_subsets: list[str]
    identifiers_start: int
    num_puzzle_identifiers: int
    augmentations_per_task: dict[str, int]
    leaks: list[Leak]
    left_out: dict[str, list[str]]
    details: dict[str, Any]
    sha256: dict[str, str]

    @property
    def content_hash(self) -> str:
        """One hash that changes with any task, split, augmentation or identifier."""
        arrays = self.sha256["tasks.npz"][:16] + self.sha256["augmentations.npz"][:16]
        beside = []  # what the arrays do not hold: where the learned rows begin, and what a puzzle's copies are drawn from
        if self.layout == "puzzle" and self.identifiers_start != 1:
            beside = [self.identifiers_start]
        if self.layout == "pairs" and self.num_aug:
            beside = [self.num_aug, self.seed]
        return hashlib.sha256(f"{arrays} {beside}".encode()).hexdigest()[:32] if beside else arrays


@dataclass(frozen=True)
class Store:
    """A loaded dataset; arrays as the module's docstring names them."""

    path: Path
    metadata: Metadata
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

    @classmethod
    def load(cls, path: Path | str, *layouts: Layout) -> "Store":
        """Load a dataset, checking hashes; `layouts`, where given, refuses any other (a TRM trained on few-shot data, or the reverse).

        Raises `UserError` for a missing, foreign, damaged or unsuitable dataset.
        """
        path = Path(path)
        if not (path / "dataset.json").is_file():
            raise UserError(f"no dataset at {path} (dataset.json is missing); build one with: python -m dataset.build_arc_dataset --help")
        content = read_json(path / "dataset.json")
        if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
            raise UserError(f"{path} has dataset format {content['format']}, this version reads {FORMAT}; build the dataset again")
        try:
            metadata = Metadata(**content)
        except (ValidationError, TypeError) as error:
            raise UserError(f"{path}/dataset.json is not of this framework's format: {error}") from None
        if layouts and metadata.layout not in layouts:
            wanted = " or ".join(f"'{layout}'" for layout in layouts)
            game = f"a {metadata.game} has no demonstrations: use arch=trm, or another arch without an encoder"
            advice = game if metadata.layout == "pairs" else f"build it with --layout {layouts[0]}"
            raise UserError(f"{path} has layout '{metadata.layout}' but this model needs {wanted}; {advice}")
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
        return cls(
            path=path,
            metadata=metadata,
            task_ids=arrays.pop("task_ids").tolist(),
            subset_names=arrays.pop("subset_names").tolist(),
            **arrays,
        )

    @property
    def game(self) -> Game:
        """Vocabulary and symmetries of the grids."""
        return GAMES[self.metadata.game]

    @cached_property
    def identifiers(self) -> list[str]:
        """Puzzle names by identifier."""
        return read_json(self.path / "identifiers.json")

    def identifiers_of(self, rows: np.ndarray) -> np.ndarray:
        """The puzzle identifiers of augmentation rows; with the layout `pairs` all are blank."""
        return np.zeros_like(rows) if self.metadata.layout == "pairs" else rows + self.metadata.identifiers_start

    def tasks_of(self, split: str, limit: int | None = None, subsets: list[str] | None = None) -> np.ndarray:
        """Indices of a split's tasks, of all subsets or the named ones, at most the first `limit`."""
        chosen = self.task_split == {**SPLITS, "validation": VALIDATION}[split]
        if subsets is not None:
            for name in subsets:
                if name not in self.subset_names:
                    raise UserError(f"{self.path}: no subset '{name}'; it has {', '.join(self.subset_names)}")
            chosen &= np.isin(self.task_subset, [self.subset_names.index(name) for name in subsets])
        return np.flatnonzero(chosen)[:limit]

    def hold_out(self, amount: int | float | None) -> "Store":
        """The same dataset with `amount` training tasks, a number or a share below 1, as the split `validation`.

        Which ones depends on the tasks' ids alone. Raises `UserError` where that leaves no task for either purpose, and for
        the layout `puzzle`, whose model knows a task only by a row that it learns in training.
        """
        if amount is None:
            return self
        if self.metadata.layout == "puzzle":
            raise UserError(f"validation={amount}: a model with puzzle rows cannot answer tasks held out of training; use an encoder")
        train = np.flatnonzero(self.task_split == TRAIN)
        count = amount if isinstance(amount, int) else round(amount * len(train))
        if not 0 < count < len(train):
            raise UserError(
                f"validation={amount} takes {count} of the {len(train)} training tasks of {self.path}; some must remain on both sides"
            )
        order = sorted(train.tolist(), key=lambda task: hashlib.sha256(self.task_ids[task].encode()).digest())
        split = self.task_split.copy()
        split[order[:count]] = VALIDATION
        return replace(self, task_split=split)

    def limited(self, split: str, limit: int | None) -> "Store":
        """The same dataset with the first `limit` tasks of `split`; the others are in no split."""
        if limit is None:
            return self
        splits = self.task_split.copy()
        splits[self.tasks_of(split)[limit:]] = LEFT_OUT
        return replace(self, task_split=splits)

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


def check_output(output: Path) -> None:
    """Raise `UserError` unless a dataset may be written to `output`: for builders to ask before their work."""
    check_replaceable(output.resolve(), MARKER)


def write_dataset(
    output: Path,
    tasks: Mapping[str, Sequence[Task]],
    test_subsets: Sequence[str],
    *,
    layout: Layout,
    source: str,
    seed: int,
    num_aug: int = 0,
    max_grid_size: int = MAX_SIDE,
    leaks: Sequence[Leak] = (),
    left_out: Mapping[str, list[str]] | None = None,
    identifiers_start: int = 1,
    augmentations: Mapping[str, Rows] | None = None,
    details: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, Any] | None = None,
) -> Metadata:
    """Write a dataset of named subsets; the named test subsets form the test split. All or nothing is written.

    `augmentations` gives the tasks' rows (identity first) in the order of the identifiers; otherwise up to `num_aug` are
    drawn per task, and tasks stand in the order of subsets and ids. `extra_files`: name -> JSON value, stored beside.
    Deterministic: the same tasks and seed give the same bytes. Raises `UserError` for duplicate task ids.
    """
    splits = [(name, TRAIN) for name in tasks if name not in test_subsets] + [(name, TEST) for name in test_subsets]
    subset_names = [name for name, _ in splits]
    flat = [(task, split, i) for i, (name, split) in enumerate(splits) for task in sorted(tasks[name], key=lambda t: t.id)]
    ids = [task.id for task, _, _ in flat]
    if len(set(ids)) < len(ids):
        duplicate = next(task_id for task_id in ids if ids.count(task_id) > 1)
        raise UserError(f"task {duplicate} occurs more than once in subsets {', '.join(subset_names)}; one id is one puzzle")
    if augmentations is None:
        rows = {task.id: augment.draw(task, num_aug, augment.task_rng(seed, task.id)) for task, _, _ in flat}
    else:
        position = {task_id: i for i, task_id in enumerate(augmentations)}
        flat.sort(key=lambda entry: position[entry[0].id])
        rows = {task.id: augmentations[task.id] for task, _, _ in flat}
    ids = [task.id for task, _, _ in flat]
    names = [BLANK_IDENTIFIER] * identifiers_start + [name for task_id in ids for name in augment.names_of(task_id, *rows[task_id])]
    arrays = {
        **_pack([task for task, _, _ in flat]),
        "task_split": np.array([split for _, split, _ in flat], np.uint8),
        "task_subset": np.array([subset for _, _, subset in flat], np.int32),
        "task_ids": np.array(ids),
        "subset_names": np.array(subset_names),
    }
    table = {
        "task_rows": np.cumsum([0] + [len(rows[task_id][0]) for task_id in ids]),
        "dihedral": np.concatenate([rows[task_id][0] for task_id in ids]),
        "colours": np.concatenate([rows[task_id][1] for task_id in ids]),
    }
    return _write_files(
        output,
        arrays,
        table,
        {
            "identifiers.json": names,
            "test_puzzles.json": {task.id: task.to_json() for task, split, _ in flat if split == TEST},
            **(extra_files or {}),
        },
        game="arc",
        layout=layout,
        protocol="transductive" if leaks or layout == "puzzle" else "inductive",
        source=source,
        seed=seed,
        num_aug=num_aug,
        max_grid_size=max_grid_size,
        subsets={name: len(tasks[name]) for name in subset_names},
        test_subsets=list(test_subsets),
        identifiers_start=identifiers_start,
        num_puzzle_identifiers=len(names),
        augmentations_per_task={task_id: len(rows[task_id][0]) - 1 for task_id in ids} if num_aug else {},
        leaks=list(leaks),
        left_out=dict(left_out or {}),
        details=dict(details or {}),
    )


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
    (`Game.stored_views`); they are a function of the seed and take no space.
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
        "pair_fingerprint": np.concatenate([fingerprints[name] for name in counts]) | np.uint64(1),  # 0 is an unknown answer
        "task_pairs": np.arange(total + 1),
        "task_demonstrations": np.zeros(total, np.int32),
        "task_split": np.concatenate([np.full(count, SPLITS[name], np.uint8) for name, count in counts.items()]),
        "task_subset": np.repeat(np.arange(len(counts), dtype=np.int32), list(counts.values())),
        "task_ids": np.array([f"{name}_{i:07d}" for name, count in counts.items() for i in range(count)]),
        "subset_names": np.array(list(counts)),
    }
    table = {"task_rows": np.arange(total + 1), "dihedral": np.zeros(total, np.uint8), "colours": augment.identity_colours(total)}
    return _write_files(
        output,
        arrays,
        table,
        {"identifiers.json": [BLANK_IDENTIFIER]},
        game=game,
        layout="pairs",
        protocol="inductive",
        source=source,
        seed=seed,
        num_aug=num_aug,
        max_grid_size=max(inputs.shape[1:]),
        subsets=counts,
        test_subsets=["test"],
        identifiers_start=1,
        num_puzzle_identifiers=1,
        augmentations_per_task={},
        leaks=[],
        left_out={},
        details=dict(details),
    )


def _write_files(
    output: Path, tasks: dict[str, np.ndarray], augmentations: dict[str, np.ndarray], values: dict[str, Any], **metadata: Any
) -> Metadata:
    with directory_written_whole(output, marker=MARKER) as folder:
        np.savez_compressed(folder / "tasks.npz", **tasks)
        np.savez_compressed(folder / "augmentations.npz", **augmentations)
        for name, value in values.items():
            write_json(folder / name, value)
        digests = {name: sha256_of(folder / name) for name in (*_ARRAY_FILES, *values)}
        description = Metadata(format=FORMAT, sha256=digests, **metadata)
        write_json(folder / "dataset.json", description.model_dump(), indent=1)
    return description


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
            raise UserError(f"{where}: '{name}' is out of place; a task's names must follow each other, beginning with the bare id")
        parsed.setdefault(task_id, []).append((index, colours))
        previous = task_id
    return {
        task_id: (np.array([index for index, _ in rows], np.uint8), np.stack([colours for _, colours in rows]))
        for task_id, rows in parsed.items()
    }


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
