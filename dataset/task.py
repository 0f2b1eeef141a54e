"""One ARC task: demonstration pairs and query pairs, validated when it is read."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from utils.errors import UserError

MAX_SIDE = 30
NUM_COLOURS = 10


class OversizedGridError(UserError):
    """A grid has a side of more than 30 cells."""


def in_order_of_hashes(task_ids: Sequence[str]) -> list[int]:
    """The places of ids by their hashes. With some more ids nearly the same ones come first."""
    return sorted(range(len(task_ids)), key=lambda place: hashlib.sha256(task_ids[place].encode()).digest())


@dataclass(eq=False)
class Pair:
    """An input grid and, where it is known, its output grid; both uint8 (rows, columns) with colours 0..9.

    `dataset.augment.fingerprints` keeps its result in `fingerprint`, which is 0 until then.
    """

    input: np.ndarray
    output: np.ndarray | None
    fingerprint: int = 0

    @property
    def answer(self) -> np.ndarray:
        """The output grid of a pair whose answer is known."""
        assert self.output is not None, "the answer to this pair is unknown"
        return self.output


@dataclass(frozen=True)
class Task:
    """A task: at least one demonstration, at least one query. Every demonstration has an output."""

    id: str
    demonstrations: tuple[Pair, ...]
    queries: tuple[Pair, ...]

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Demonstrations first, then queries."""
        return self.demonstrations + self.queries

    @property
    def max_side(self) -> int:
        """The longest side over all grids of the task."""
        return max(
            max(grid.shape) for pair in self.pairs for grid in (pair.input, pair.output) if grid is not None
        )

    @classmethod
    def from_json(cls, task_id: str, value: Any, where: str) -> "Task":
        """Read the ARC format `{"train": [{"input", "output"}], "test": [...]}`.

        `where` names the file in errors. Raises `UserError` that names file, task, pair and cell.
        """
        place = f"{where}: task {task_id}"
        if not isinstance(value, dict):
            raise UserError(
                f"{place}: expected an object with 'train' and 'test', found {type(value).__name__}"
            )
        for key in ("train", "test"):
            if not isinstance(value.get(key), list):
                raise UserError(f"{place}: '{key}' is missing or not a list of pairs")
            if not value[key]:
                raise UserError(
                    f"{place}: '{key}' is empty; a task needs at least one demonstration and one query"
                )
        demonstrations = tuple(
            _read_pair(pair, f"{place}, train pair {i}", True) for i, pair in enumerate(value["train"])
        )
        queries = tuple(
            _read_pair(pair, f"{place}, test pair {i}", False) for i, pair in enumerate(value["test"])
        )
        return cls(task_id, demonstrations, queries)

    def to_json(self) -> dict:
        """The task in the ARC format; a query without a known answer has no 'output'."""

        def pair_json(pair: Pair) -> dict:
            grids = {"input": pair.input.tolist()}
            if pair.output is not None:
                grids["output"] = pair.output.tolist()
            return grids

        return {
            "train": [pair_json(p) for p in self.demonstrations],
            "test": [pair_json(p) for p in self.queries],
        }


def _read_pair(value: Any, place: str, needs_output: bool) -> Pair:
    if not isinstance(value, dict) or "input" not in value:
        raise UserError(f"{place}: expected an object with 'input' and 'output'")
    if needs_output and value.get("output") is None:
        raise UserError(f"{place}: 'output' is missing; only a query may come without an answer")
    output = value.get("output")
    return Pair(
        read_grid(value["input"], f"{place}, input"),
        None if output is None else read_grid(output, f"{place}, output"),
    )


def read_grid(value: Any, place: str) -> np.ndarray:
    """A validated uint8 (rows, columns) grid from nested lists.

    Raises `UserError` for the first thing that is wrong, `OversizedGridError` for a side beyond 30. `place`
    stands first in the message.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list) or not value or not all(isinstance(row, list) and row for row in value):
        raise UserError(f"{place}: expected a non-empty list of non-empty rows")
    rows, columns = len(value), len(value[0])
    # The fast way for grids that are right. The loops below only look for what to say of a wrong one.
    if all(len(row) == columns for row in value) and set(map(type, chain.from_iterable(value))) == {int}:
        grid = np.array(value)
        if max(rows, columns) <= MAX_SIDE and grid.min() >= 0 and grid.max() < NUM_COLOURS:
            return grid.astype(np.uint8)
    for r, row in enumerate(value):
        if len(row) != columns:
            raise UserError(f"{place}: ragged grid, row {r} has {len(row)} cells where row 0 has {columns}")
        for c, cell in enumerate(row):
            if isinstance(cell, bool) or not isinstance(cell, int) or not 0 <= cell < NUM_COLOURS:
                raise UserError(f"{place}: cell ({r}, {c}) is {cell!r}; colours are the integers 0..9")
    raise OversizedGridError(
        f"{place}: grid is {rows}x{columns}; the largest allowed is {MAX_SIDE}x{MAX_SIDE}"
    )
