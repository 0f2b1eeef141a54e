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
from torch import Tensor

from models.grids import STEPS, Grids, following

ConditionName = Literal["sizes", "ranks", "borders", "rows", "columns", "nearby", "crowds", "ahead"]


def _sizes(grids: Grids) -> Tensor:
    """Whether its object has more than one cell, and whether it has more than two."""
    size = grids.of_object(grids.inside)
    return torch.stack((size > 1, size > 2), dim=1)


def _ranks(grids: Grids) -> Tensor:
    """Of a coloured object: is none larger, is none smaller, and its place by size, up to 9."""
    size = grids.of_object(grids.coloured)  # (N, L)
    # Which sizes there are: those of the cells that belong to no object are not told apart, and left out.
    there = torch.zeros(len(size), size.shape[1] + 1, dtype=torch.long, device=size.device)
    there = there.scatter(1, size, 1)
    there[:, 0] = 0
    larger = there.flip(1).cumsum(1).flip(1) - there
    place, last = (1 + larger.gather(1, size)), there.sum(1, keepdim=True)
    of_objects = torch.stack((1 + (place == 1).long(), 1 + (place == last).long(), place.clamp_max(9)), dim=1)
    return torch.where(size[:, None] > 0, of_objects, 0)


def _borders(grids: Grids) -> Tensor:
    """Whether its object touches the border of the grid. Enclosed background does not."""
    inside = F.pad(grids.inside, (1, 1, 1, 1))
    within = inside[:, 2:, 1:-1] & inside[:, :-2, 1:-1] & inside[:, 1:-1, 2:] & inside[:, 1:-1, :-2]
    return (grids.of_object(~within) > 0)[:, None]


def _rows(grids: Grids) -> Tensor:
    """Which colours its row shows."""
    shown = grids.of_colours()
    return shown.any(3, keepdim=True).expand(shown.shape).flatten(2)


def _columns(grids: Grids) -> Tensor:
    """Which colours its column shows."""
    shown = grids.of_colours()
    return shown.any(2, keepdim=True).expand(shown.shape).flatten(2)


def _nearby(grids: Grids) -> Tensor:
    """Where a colour stands among the 3x3 cells around it, 1 to 9, the last in reading order; 0: nowhere."""
    side = grids.side
    around = F.pad(grids.of_colours(), (1, 1, 1, 1))
    found = torch.zeros_like(around[..., 1:-1, 1:-1], dtype=torch.long)
    for place in range(9):
        row, column = divmod(place, 3)
        found = torch.where(around[..., row : row + side, column : column + side], place + 1, found)
    return found.flatten(2)


def _crowds(grids: Grids) -> Tensor:
    """How many of the four and of the eight cells around it are coloured."""
    coloured = F.pad(grids.coloured.float()[:, None], (1, 1, 1, 1))
    around = torch.ones(2, 1, 3, 3, device=coloured.device)
    around[:, :, 1, 1] = 0
    around[0, :, ::2, ::2] = 0
    return F.conv2d(coloured, around).flatten(2)


def _ahead(grids: Grids) -> Tensor:
    """The next colour to the right, below, to the left and above; 0 for none.

    Then the colour that two opposite sides agree on: across, down, either. Then how many sides show one.
    """
    number = grids.canvas - grids.vocabulary.first
    seen = []
    for turns in range(len(STEPS)):
        line = torch.rot90(number.clamp_min(0), turns, (1, 2))
        colour = F.pad(line, (0, 1)).gather(2, following(line > 0))
        seen.append(torch.rot90(colour, -turns, (1, 2)))
    right, below, left, above = seen
    across, down = (torch.where(one == other, one, 0) for one, other in ((right, left), (below, above)))
    either = torch.where(across > 0, across, down)
    count = (torch.stack(seen) > 0).sum(0)
    return torch.stack([*seen, across, down, either, count], dim=1).flatten(2)


@dataclass(frozen=True)
class Condition:
    """What a grid says of its cells.

    counts: how many values each of the F numbers has. values: from grids to the numbers (N, F, L).
    """

    counts: tuple[int, ...]
    values: Callable[[Grids], Tensor]


CONDITIONS: dict[str, Condition] = {
    "sizes": Condition((2, 2), _sizes),
    "ranks": Condition((3, 3, 10), _ranks),
    "borders": Condition((2,), _borders),
    "rows": Condition((2,) * 9, _rows),
    "columns": Condition((2,) * 9, _columns),
    "nearby": Condition((10,) * 9, _nearby),
    "crowds": Condition((5, 9), _crowds),
    "ahead": Condition((10, 10, 10, 10, 10, 10, 10, 5), _ahead),
}


TRAITS = 9  # of a grid


def traits_of(grids: Grids) -> Tensor:
    """What grids may have, by which a rule may choose what it does: (N, `TRAITS`) bool.

    A coloured cell in each corner; more coloured cells to the left, right, above, below; an odd number.
    """
    coloured = grids.coloured
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
