"""Conditions: small numbers that a grid says of each of its cells, such as whether it belongs to an object.

"Objects larger than one become red" and "a row that shows red is filled" are rules of a colour and a
condition. What a condition is worth for a task is counted on its demonstrations (models/drafts.py).
Shapes: N grids, C the canvas side, L = C * C cells, F numbers per cell.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dataset.task import NUM_COLOURS
from models.grids import Grids

VALUES = 10  # of a condition, at most
ConditionName = Literal["sizes", "borders", "rows", "columns", "nearby"]


def _colours(grids: Grids) -> Tensor:
    """Where the grid shows each colour but the background, (N, 9, C, C)."""
    colours = grids.vocabulary.first + torch.arange(1, NUM_COLOURS, device=grids.canvas.device)
    return grids.canvas[:, None] == rearrange(colours, "c -> c 1 1")


def _of_object(grids: Grids, cells: Tensor) -> Tensor:
    """How many of the `cells` (N, C, C) belong to the object of each cell, (N, L)."""
    first, wanted = (rearrange(each, "n r c -> n (r c)") for each in (grids.objects[..., 0], cells.long()))
    return torch.zeros_like(first).scatter_add(1, first, wanted).gather(1, first)


def _sizes(grids: Grids) -> Tensor:
    """Whether its object has more than one cell, and whether it has more than two."""
    size = _of_object(grids, grids.inside)
    return torch.stack((size > 1, size > 2), dim=1)


def _borders(grids: Grids) -> Tensor:
    """Whether its object touches the border of the grid. Enclosed background does not."""
    inside = F.pad(grids.inside, (1, 1, 1, 1))
    within = inside[:, 2:, 1:-1] & inside[:, :-2, 1:-1] & inside[:, 1:-1, 2:] & inside[:, 1:-1, :-2]
    return (_of_object(grids, ~within) > 0)[:, None]


def _rows(grids: Grids) -> Tensor:
    """Which colours its row shows."""
    shown = _colours(grids)
    return shown.any(3, keepdim=True).expand(shown.shape).flatten(2)


def _columns(grids: Grids) -> Tensor:
    """Which colours its column shows."""
    shown = _colours(grids)
    return shown.any(2, keepdim=True).expand(shown.shape).flatten(2)


def _nearby(grids: Grids) -> Tensor:
    """Where a colour stands among the 3x3 cells around it, 1 to 9, the last in reading order; 0: nowhere."""
    side = grids.side
    around = F.pad(_colours(grids), (1, 1, 1, 1))
    found = torch.zeros_like(around[..., 1:-1, 1:-1], dtype=torch.long)
    for place in range(9):
        row, column = divmod(place, 3)
        found = torch.where(around[..., row : row + side, column : column + side], place + 1, found)
    return found.flatten(2)


@dataclass(frozen=True)
class Condition:
    """count: F. values: from grids to the numbers 0..`VALUES` - 1 (N, F, L)."""

    count: int
    values: Callable[[Grids], Tensor]


CONDITIONS: dict[str, Condition] = {
    "sizes": Condition(2, _sizes),
    "borders": Condition(1, _borders),
    "rows": Condition(9, _rows),
    "columns": Condition(9, _columns),
    "nearby": Condition(9, _nearby),
}


TRAITS = 9  # of a grid


def traits_of(grids: Grids) -> Tensor:
    """What grids may have, by which a rule may choose what it does: (N, `TRAITS`) bool.

    A coloured cell in each corner; more coloured cells to the left, right, above, below; an odd number.
    """
    coloured = grids.canvas > grids.vocabulary.first
    row, column = grids.row[..., 0], grids.column[..., 0]  # (N, C, 1), (N, 1, C)
    last_row, last_column = grids.rows[..., 0] - 1, grids.columns[..., 0] - 1
    corners = [
        coloured & (row == at_row) & (column == at_column)
        for at_row in (0, last_row)
        for at_column in (0, last_column)
    ]
    halves = (2 * column - last_column, 2 * row - last_row)  # below zero in the first half
    heavier = [
        ((sign * half < 0) & coloured, (sign * half > 0) & coloured) for half in halves for sign in (1, -1)
    ]
    return torch.stack(
        [
            *(corner.any((1, 2)) for corner in corners),
            *(one.sum((1, 2)) > other.sum((1, 2)) for one, other in heavier),
            coloured.sum((1, 2)) % 2 == 1,
        ],
        dim=1,
    )


def values_of(name: str, grids: Grids) -> Tensor:
    """The numbers (N, F, L) int64 that one condition says of every cell."""
    return CONDITIONS[name].values(grids).long()
