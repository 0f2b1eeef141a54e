"""The dataset on disk: every task once, plus a table of its augmentations.

tasks.npz           grids (N, G, G) uint8, shapes (N, 2)
                    pair_input, pair_output (P,) grid indices, -1 for an unknown answer
                    pair_turned (P, 8) grid indices of the answers under each dihedral transform, turned
                    back; only where a game breaks ties by a rule that does not turn with the grid
                    pair_fingerprint (P,) uint64 (`dataset.augment.fingerprints`)
                    task_pairs (T + 1,) first pair of each task, task_demonstrations (T,) how many come first
                    task_split (T,) 0 train, 1 test, task_ids (T,)
                    task_subset (T,) index into subset_names (S,)
augmentations.npz   task_rows (T + 1,) first view row of each task, dihedral (A,), colours (A, 10), or more
                    columns where a game has more cell values
identifiers.json    the ancestors' puzzle names: entry `identifiers_start + i` names view row i
test_puzzles.json   the evaluation tasks in the ARC format
dataset.json        `Metadata`

A view row is one augmentation of one task; the first of each task is the identity. Grids are drawn onto a
canvas only when they are needed. dataset/layouts.py says what the layouts mean.
"""

import hashlib
import zipfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError, field_validator

from dataset.augment import BLANK_NAME
from dataset.canvas import GridTable
from dataset.games import GAMES, Game
from dataset.layouts import LAYOUTS, Layout, LayoutName
from dataset.task import Pair, Task, in_order_of_hashes
from utils.config import Config
from utils.errors import UserError
from utils.files import read_json, sha256_of

FORMAT = 2  # a dataset of another format is refused
MARKER = "dataset.json"
BLANK_IDENTIFIER = BLANK_NAME
TRAIN, TEST = 0, 1
SPLITS = {"train": TRAIN, "test": TEST}
# Never on disk: `Store.hold_out` makes the one of training tasks, `Store.limited` the other of any.
VALIDATION, LEFT_OUT = 2, 3
ARRAY_FILES = ("tasks.npz", "augmentations.npz")


class Leak(Config):
    """A pair that a training task and an evaluation task share, up to dihedral transform and recolouring."""

    train_task: str
    test_task: str


class Metadata(Config):
    """What `dataset.json` says of a dataset.

    game: a name of `dataset.games.GAMES`.
    left_out: the ids of the tasks that were left out, by reason.
    details: what a generator says of its puzzles.
    """

    format: int
    game: str
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

    @field_validator("game")
    @classmethod
    def _known(cls, game: str) -> str:
        if game not in GAMES:
            raise ValueError(f"the games are {', '.join(GAMES)}, found '{game}'")
        return game

    @property
    def content_hash(self) -> str:
        """One hash that changes with any task, split, augmentation or identifier."""
        arrays = self.sha256["tasks.npz"][:16] + self.sha256["augmentations.npz"][:16]
        # The arrays do not say where the learned rows begin, nor what the copies of a puzzle are drawn from.
        beside = []
        if LAYOUTS[self.layout].learns_rows and self.identifiers_start != 1:
            beside = [self.identifiers_start]
        if LAYOUTS[self.layout].shares_rule and self.num_aug:
            beside = [self.num_aug, self.seed]
        return hashlib.sha256(f"{arrays} {beside}".encode()).hexdigest()[:32] if beside else arrays


@dataclass(frozen=True)
class Store:
    """A loaded dataset, its arrays named as in the module's docstring."""

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
    pair_turned: np.ndarray | None = None

    @classmethod
    def load(cls, path: Path | str, *layouts: LayoutName) -> "Store":
        """Load a dataset and check its hashes. If `layouts` are given, any other layout is refused.

        Raises `UserError` for a missing, foreign, damaged or unsuitable dataset.
        """
        path = Path(path)
        metadata = _read_metadata(path)
        if layouts and metadata.layout not in layouts:
            wanted = " or ".join(f"'{layout}'" for layout in layouts)
            if LAYOUTS[metadata.layout].shares_rule:
                advice = (
                    f"a {metadata.game} has no demonstrations: "
                    "use arch=trm, or another arch without an encoder"
                )
            else:
                advice = f"build it with --layout {layouts[0]}"
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
        """What the grids are, on boards of this size."""
        return GAMES[self.metadata.game].of_side(self.metadata.max_grid_size)

    @property
    def checks(self) -> list[str]:
        """The names of the checks that the game has for answers to these puzzles."""
        return list(self.game.checks) if self.game.checkable(self.metadata.details) else []

    @property
    def turned_labels_contradict(self) -> bool:
        """Whether a turned answer may not be the answer to the turned puzzle, and nobody knows that one."""
        labels = self.metadata.details.get("labels", self.metadata.details.get("paths", "given"))
        return self.game.tie_break is not None and self.pair_turned is None and labels == "given"

    def trained_on(self, augmentation: str, limit: int | None) -> str | None:
        """What a model trains on here, in words: how many puzzles of how many, and their copies.

        augmentation, limit: `data.augmentation` and `data.max_train_groups`. None for ARC tasks.
        """
        if not self.layout.shares_rule:
            return None
        puzzles, offered = (
            len(self.tasks_of("train", limit)),
            self.metadata.details.get("offered_train_puzzles"),
        )
        count = f"{puzzles:,} of {offered:,} puzzles" if offered else f"{puzzles:,} puzzles"
        if puzzles == offered:
            count = f"all {puzzles:,} puzzles"
        copies = {
            "table": f"{self.metadata.num_aug + 1:,} symmetric copies of each",
            "none": "no augmentation",
            "turns": "a fresh symmetry of each sample, with the same digits",
        }
        return f"{count}, {copies.get(augmentation, 'a fresh symmetry of each sample')}"

    @property
    def layout(self) -> Layout:
        """How a model gets to know the tasks."""
        return LAYOUTS[self.metadata.layout]

    @cached_property
    def identifiers(self) -> list[str]:
        """Puzzle names by identifier."""
        return read_json(self.path / "identifiers.json")

    def identifiers_of(self, view_rows: np.ndarray) -> np.ndarray:
        """The puzzle identifiers of view rows. With the layout `pairs` all are blank."""
        if self.layout.shares_rule:
            return np.zeros_like(view_rows)
        return view_rows + self.metadata.identifiers_start

    def tasks_of(self, split: str, limit: int | None = None, subsets: list[str] | None = None) -> np.ndarray:
        """Indices of a split's tasks, of all subsets or the named ones, at most the first `limit`.

        Raises `UserError` for an unknown subset.
        """
        chosen = self.task_split == {**SPLITS, "validation": VALIDATION}[split]
        if subsets is not None:
            for name in subsets:
                if name not in self.subset_names:
                    known = ", ".join(self.subset_names)
                    raise UserError(f"{self.path}: no subset '{name}'; it has {known}")
            chosen &= np.isin(self.task_subset, [self.subset_names.index(name) for name in subsets])
        return np.flatnonzero(chosen)[:limit]

    def hold_out(self, amount: int | float | None) -> "Store":
        """The same dataset with `amount` training tasks as the split `validation`.

        `amount` is a number of tasks, or a share below 1. The tasks' ids alone decide which ones are taken.
        Raises `UserError` if no task is left for either purpose, and for the layout `puzzle`: there a model
        knows a task only by a row that it learns in training.
        """
        if amount is None:
            return self
        if self.layout.learns_rows:
            raise UserError(
                f"validation={amount}: a model with puzzle rows cannot answer tasks held out of training; "
                "use an encoder"
            )
        train = np.flatnonzero(self.task_split == TRAIN)
        count = amount if isinstance(amount, int) else round(amount * len(train))
        if not 0 < count < len(train):
            raise UserError(
                f"validation={amount} takes {count} of the {len(train)} training tasks of {self.path}; "
                "some must remain on both sides"
            )
        order = in_order_of_hashes([self.task_ids[task] for task in train])
        split = self.task_split.copy()
        split[train[order[:count]]] = VALIDATION
        return replace(self, task_split=split)

    def limited(self, split: str, limit: int | None) -> "Store":
        """The same dataset with the first `limit` tasks of `split`. Its other tasks are in no split."""
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

    def answers_under(self, pairs: np.ndarray, transform: np.ndarray) -> np.ndarray:
        """Grid indices of the answers to pairs that are shown under dihedral transforms of the same shape.

        -1 stands for an unknown answer.
        """
        return self.pair_output[pairs] if self.pair_turned is None else self.pair_turned[pairs, transform]

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


def _read_metadata(path: Path) -> Metadata:
    """The description of the dataset in the folder `path`. Raises `UserError`."""
    if not (path / MARKER).is_file():
        raise UserError(
            f"no dataset at {path} ({MARKER} is missing); "
            "build one with: python -m dataset.build_arc_dataset --help"
        )
    content = read_json(path / MARKER)
    if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{path} has dataset format {content['format']}, this version reads {FORMAT}; "
            "build the dataset again"
        )
    try:
        return Metadata.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        problem = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise UserError(f"{path}/{MARKER} is not of this framework's format: {problem}") from None
