"""Relations: other cells of its own grid that a cell is told of directly, however far away they are.

Attention addresses offsets. "The same place in the mirrored grid" has another offset for every cell, so that no head finds
it; a relation is an index instead, made from the grid's tokens alone, through which a block gathers a small projection.
All places count in the frame of the grid: its own rows, columns and offset on the canvas. A cell outside that frame, where an
answer larger than its input may lie, is told of places inside it, too: the frame that a turn gives a grid of 2x3 has a third
row. A smaller answer changes nothing. What lies beyond the reach of every relation is attention's.
Shapes: N grids, C the canvas side, L = C * C cells, R places per cell, S tokens, D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator
from torch import Tensor, nn

from dataset.canvas import ARC, sources
from models.layers import Linear

NONE = -1
CHANNELS = 8  # that a token tells under a relation
RelationName = Literal["symmetries", "neighbours"]


def _each_once(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError(f"a relation stands twice in {names}")
    return names


Relations = Annotated[list[RelationName], AfterValidator(_each_once)]


class Grids:
    """Where N grids stand on their canvases, read off tokens (N, L).

    row, column: of each cell of the canvas, (N, C, 1, 1) and (N, 1, C, 1), from the grid's first. rows, columns: (N, 1, 1, 1),
    how many the grid has; zero where a canvas shows none.
    """

    def __init__(self, tokens: Tensor):
        self.side = round(tokens.shape[-1] ** 0.5)
        self.canvas = tokens.unflatten(-1, (self.side, self.side))
        line = torch.arange(self.side, device=tokens.device)
        inside = self.canvas >= ARC.first
        (self.row, self.rows), (self.column, self.columns) = (
            self._along(inside.any(axis), line) for axis in (2, 1)
        )
        self.first = self.row[:, :1], self.column[:, :1]  # minus the offset
        self.row, self.column = self.row[..., None, None], self.column[:, None, :, None]
        self.rows, self.columns = self.rows[..., None, None], self.columns[..., None, None]

    def _along(self, inside: Tensor, line: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.where(inside, line, self.side).amin(1, keepdim=True)
        return line - first, inside.sum(1, keepdim=True)

    def places(self, row: Tensor, column: Tensor) -> Tensor:
        """The cells (N, L, R) that rows and columns (N, C, C, R) of the grid are on the canvas, `NONE` where it has no such."""
        inside = (row >= 0) & (row < self.rows) & (column >= 0) & (column < self.columns)
        first_row, first_column = (first[..., None, None] for first in self.first)
        return torch.where(inside, (row - first_row) * self.side + column - first_column, NONE).flatten(1, 2)


def _symmetries(grids: Grids) -> Tensor:
    of = sources(grids.canvas.device)[1:]  # (7, 2, 4), the identity left out
    at = [of[:, axis, 0] * grids.row + of[:, axis, 1] * grids.column for axis in (0, 1)]
    last = [of[:, axis, 2] * (grids.rows - 1) + of[:, axis, 3] * (grids.columns - 1) for axis in (0, 1)]
    return grids.places(at[0] + last[0], at[1] + last[1])


def _neighbours(grids: Grids) -> Tensor:
    steps = torch.arange(9, device=grids.canvas.device)
    steps = steps[steps != 4]
    return grids.places(*torch.broadcast_tensors(grids.row + steps // 3 - 1, grids.column + steps % 3 - 1))


@dataclass(frozen=True)
class Relation:
    """count: R. places: from grids to the cell of the canvas (N, L, R) that each of them names, or `NONE`."""

    count: int
    places: Callable[[Grids], Tensor]


RELATIONS: dict[str, Relation] = {
    # Where a cell comes from under each turn and mirror image of its grid.
    "symmetries": Relation(7, _symmetries),
    # The cells around it.
    "neighbours": Relation(8, _neighbours),
}


def count_of(names: Sequence[str]) -> int:
    """R of all these relations together."""
    return sum(RELATIONS[name].count for name in names)


@torch.no_grad()
def places_of(names: Sequence[str], tokens: Tensor) -> Tensor:
    """The places (N, L, R) int32 that relations name for each cell of canvases (N, L), `NONE` where there is none."""
    grids = Grids(tokens)
    return torch.cat([RELATIONS[name].places(grids) for name in names], dim=-1).to(torch.int32)


def moved(places: Tensor, by: Tensor | int) -> Tensor:
    """The same places in a sequence in which each of them stands `by` tokens later."""
    return torch.where(places >= 0, places + by, NONE)


@dataclass(frozen=True)
class Index:
    """Places as a block reads them: rows (N * S * R,) of the told (N * S * relations + 1, channels), the last of which is zero."""

    rows: Tensor

    @classmethod
    def of(cls, places: Tensor, names: Sequence[str]) -> "Index":
        """From places (N, S, R) under these relations that are tokens of the same sequence."""
        count, length, _ = places.shape
        device = places.device
        relation = torch.cat(
            [torch.full((RELATIONS[name].count,), k, device=device) for k, name in enumerate(names)]
        )
        start = length * torch.arange(count, device=device)[:, None, None]
        rows = (start + places) * len(names) + relation
        return cls(torch.where(places >= 0, rows, count * length * len(names)).flatten())


class Relate(nn.Module):
    """What each token is told of its places: for every relation a projection, gathered from each place of it and projected back.

    (N, S, D) -> (N, S, D). A token without any place is told nothing: zero.
    """

    def __init__(self, hidden_size: int, names: Sequence[str]):
        super().__init__()
        self.down_proj = Linear(hidden_size, CHANNELS * len(names))
        self.up_proj = Linear(CHANNELS * count_of(names), hidden_size)

    def forward(self, x: Tensor, index: Index) -> Tensor:
        told = F.pad(self.down_proj(x).reshape(-1, CHANNELS), (0, 0, 0, 1))
        return self.up_proj(told.index_select(0, index.rows).view(*x.shape[:2], -1))


def relate(hidden_size: int, names: Sequence[str]) -> Relate | None:
    """The branch of a block for these relations; without any there is none, nor a weight of it."""
    return Relate(hidden_size, names) if names else None
