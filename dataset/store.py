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
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError

from dataset.canvas import GridTable
from dataset.games import GAMES, Game
from dataset.layouts import LAYOUTS, Layout, LayoutName
from dataset.task import Pair, Task
from utils.config import Config
from utils.errors import UserError
from utils.files import read_json, sha256_of

FORMAT = 2
MARKER = "dataset.json"
BLANK_IDENTIFIER = "<blank>"
TRAIN, TEST = 0, 1
SPLITS = {"train": TRAIN, "test": TEST}
VALIDATION = 2  # not on disk: `Store.hold_out` makes it of training tasks
LEFT_OUT = 3  # not on disk, either: `Store.limited`
ARRAY_FILES = ("tasks.npz", "augmentations.npz")


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
    layout: LayoutName
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
        if LAYOUTS[self.layout].learns_rows and self.identifiers_start != 1:
            beside = [self.identifiers_start]
        if LAYOUTS[self.layout].shares_rule and self.num_aug:
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
    def load(cls, path: Path | str, *layouts: LayoutName) -> "Store":
        """Load a dataset, checking hashes; `layouts`, where given, refuses any other (a TRM trained on few-shot data, or the reverse).

        Raises `UserError` for a missing, foreign, damaged or unsuitable dataset.
        """
        path = Path(path)
        if not (path / "dataset.json").is_file():
            raise UserError(
                f"no dataset at {path} (dataset.json is missing); build one with: python -m dataset.build_arc_dataset --help"
            )
        content = read_json(path / "dataset.json")
        if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
            raise UserError(
                f"{path} has dataset format {content['format']}, this version reads {FORMAT}; build the dataset again"
            )
        try:
            metadata = Metadata(**content)
        except (ValidationError, TypeError) as error:
            raise UserError(f"{path}/dataset.json is not of this framework's format: {error}") from None
        if layouts and metadata.layout not in layouts:
            wanted = " or ".join(f"'{layout}'" for layout in layouts)
            game = (
                f"a {metadata.game} has no demonstrations: use arch=trm, or another arch without an encoder"
            )
            advice = game if LAYOUTS[metadata.layout].shares_rule else f"build it with --layout {layouts[0]}"
            raise UserError(f"{path} has layout '{metadata.layout}' but this model needs {wanted}; {advice}")
        for name, digest in metadata.sha256.items():
            if not (path / name).is_file():
                raise UserError(f"{path}: {name} is missing; build the dataset again")
            if sha256_of(path / name) != digest:
                raise UserError(
                    f"{path}: {name} is damaged (its hash differs from dataset.json); build the dataset again"
                )
        arrays: dict[str, np.ndarray] = {}
        try:
            for name in ARRAY_FILES:
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

    @property
    def layout(self) -> Layout:
        """How a model gets to know the tasks."""
        return LAYOUTS[self.metadata.layout]

    @cached_property
    def identifiers(self) -> list[str]:
        """Puzzle names by identifier."""
        return read_json(self.path / "identifiers.json")

    def identifiers_of(self, rows: np.ndarray) -> np.ndarray:
        """The puzzle identifiers of augmentation rows; with the layout `pairs` all are blank."""
        return np.zeros_like(rows) if self.layout.shares_rule else rows + self.metadata.identifiers_start

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
        if self.layout.learns_rows:
            raise UserError(
                f"validation={amount}: a model with puzzle rows cannot answer tasks held out of training; use an encoder"
            )
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
        return np.stack(
            [side[self.pair_input], np.where(self.pair_output < 0, 0, side[self.pair_output])], axis=1
        )
