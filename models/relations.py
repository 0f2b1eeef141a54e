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
RelationName = Literal["symmetries", "neighbours", "around", "shifts", "rays", "lines", "objects", "colours"]


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
        self.inside = inside

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


def _around(grids: Grids) -> Tensor:
    steps = torch.arange(9, device=grids.canvas.device)
    steps = steps[steps != 4]
    rows, columns = grids.rows.clamp_min(1), grids.columns.clamp_min(1)
    inside = grids.inside[..., None]
    row = torch.where(inside, (grids.row + steps // 3 - 1) % rows, NONE)
    return grids.places(row, (grids.column + steps % 3 - 1) % columns)


def _shifts(grids: Grids) -> Tensor:
    steps = torch.arange(25, device=grids.canvas.device)
    steps = steps[steps != 12]
    rows, columns = grids.rows.clamp_min(1), grids.columns.clamp_min(1)
    row = torch.where(grids.inside[..., None], (grids.row + steps // 5 - 2) % rows, NONE)
    return grids.places(row, (grids.column + steps % 5 - 2) % columns)


def _rays(grids: Grids) -> Tensor:
    """The next coloured cell to the right, below, to the left and above."""
    coloured = grids.canvas > ARC.first
    line = torch.arange(grids.side, device=grids.canvas.device)
    found = []
    for cells in (coloured, coloured.transpose(1, 2)):
        after = (
            torch.where(cells, line, grids.side).flip(-1).cummin(-1).values.flip(-1)
        )  # at this cell or behind
        before = torch.where(cells, line, NONE).cummax(-1).values
        after = F.pad(after[..., 1:], (0, 1), value=grids.side)
        found += [torch.where(after < grids.side, after, NONE), F.pad(before[..., :-1], (1, 0), value=NONE)]
    right, left, below, above = (found[0], found[1], found[2].transpose(1, 2), found[3].transpose(1, 2))
    numbers = line[:, None] * grids.side + line  # (C, C)
    along = [torch.where(at >= 0, at - line, 0) for at in (right, left)]
    across = [torch.where(at >= 0, at - line[:, None], 0) for at in (below, above)]
    steps = [along[0], grids.side * across[0], along[1], grids.side * across[1]]
    places = [torch.where(step != 0, numbers + step, NONE) for step in steps]
    return torch.where(grids.inside[..., None], torch.stack(places, dim=-1), NONE).flatten(1, 2)


def _lines(grids: Grids) -> Tensor:
    row, column = torch.broadcast_tensors(grids.row, grids.column)
    zero = torch.zeros_like(row)
    first = grids.places(torch.cat((row, zero, zero), -1), torch.cat((zero, column, zero), -1))
    return torch.where(grids.inside.flatten(1)[..., None], first, NONE)


def _objects(grids: Grids) -> Tensor:
    """The first cell of the cells of one colour that are joined over edges. Source: FastSV (arXiv 1910.05971), whose labels
    settle in about log2(L) rounds."""
    tokens, cells = grids.canvas.flatten(1), grids.side**2
    number = torch.arange(cells, device=tokens.device)
    row, column = number // grids.side, number % grids.side
    joined = []
    for r, c in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        there = (row + r >= 0) & (row + r < grids.side) & (column + c >= 0) & (column + c < grids.side)
        beside = torch.where(there, number + r * grids.side + c, number)
        joined.append(torch.where(tokens[:, beside] == tokens, beside, number))
    parent = grand = number.expand(tokens.shape)
    for _ in range(2 + (cells - 1).bit_length()):
        least = torch.stack([grand.gather(1, beside) for beside in joined]).amin(0)
        parent = parent.scatter_reduce(1, parent, least, "amin").minimum(least).minimum(grand)
        grand = parent.gather(1, parent)
    return torch.where(grids.inside.flatten(1), grand, NONE)[..., None]


def _colours(grids: Grids) -> Tensor:
    tokens, cells = grids.canvas.flatten(1), grids.side**2
    number = torch.arange(cells, device=tokens.device)
    alphabet = torch.arange(ARC.size, device=tokens.device)
    first = torch.where(tokens[:, None] == alphabet[:, None], number, cells - 1).amin(2)  # (N, V)
    return torch.where(grids.inside.flatten(1), first.gather(1, tokens.long()), NONE)[..., None]


@dataclass(frozen=True)
class Relation:
    """count: R. places: from grids to the cell of the canvas (N, L, R) that each of them names, or `NONE`. shared: cells that name
    the same cell are a group, and each is told the mean of what all of them tell, and their number."""

    count: int
    places: Callable[[Grids], Tensor]
    shared: bool = False


RELATIONS: dict[str, Relation] = {
    # Where a cell comes from under each turn and mirror image of its grid.
    "symmetries": Relation(7, _symmetries),
    # The cells around it.
    "neighbours": Relation(8, _neighbours),
    # The same over the border, where the grid begins again.
    "around": Relation(8, _around),
    # The same up to two cells away.
    "shifts": Relation(24, _shifts),
    # The next coloured cell in each direction.
    "rays": Relation(4, _rays),
    # The cell's row, its column, and the whole grid.
    "lines": Relation(3, _lines, shared=True),
    # The cells of its colour that are joined with it.
    "objects": Relation(1, _objects, shared=True),
    # All cells of its colour.
    "colours": Relation(1, _colours, shared=True),
}


def count_of(names: Sequence[str]) -> int:
    """R of all these relations together."""
    return sum(RELATIONS[name].count for name in names)


def chosen(places: Tensor, names: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """Of the places (N, L, R) under `names` those under the `wanted` relations, which are among them."""
    parts = dict(zip(names, places.split([RELATIONS[name].count for name in names], dim=-1), strict=True))
    return torch.cat([parts[name] for name in wanted], dim=-1)


@torch.no_grad()
def places_of(names: Sequence[str], tokens: Tensor) -> Tensor:
    """The places (N, L, R) int32 that relations name for each cell of canvases (N, L), `NONE` where there is none."""
    grids = Grids(tokens)
    return torch.cat([RELATIONS[name].places(grids) for name in names], dim=-1).to(torch.int32)


def moved(places: Tensor, by: Tensor | int) -> Tensor:
    """The same places in a sequence in which each of them stands `by` tokens later."""
    return torch.where(places >= 0, places + by, NONE)


def _fill(count: int, value: int, device: torch.device) -> Tensor:
    return torch.full((count,), value, device=device)


@dataclass(frozen=True)
class Index:
    """Places as a block reads them.

    rows (N * S * R,): of what is told, (N * S * relations, channels), then a row of zeros, then N * S rows for each of the groups.
    groups: for each column of places that are shared its relation, the group (N * S,) of every token, N * S for none, and the
    sizes (N * S + 1, 1) of the groups.
    """

    rows: Tensor
    groups: list[tuple[int, Tensor, Tensor]]

    @classmethod
    def of(cls, places: Tensor, names: Sequence[str]) -> "Index":
        """From places (N, S, R) under these relations that are tokens of the same sequence."""
        count, length, _ = places.shape
        device, tokens = places.device, count * length
        place = length * torch.arange(count, device=device)[:, None, None] + places
        step, first, column, groups = [], [], 0, []
        for number, name in enumerate(names):
            relation = RELATIONS[name]
            for _ in range(relation.count if relation.shared else 0):
                first.append(_fill(1, tokens * (len(names) + len(groups)) + 1, device))
                group = torch.where(places[..., column] >= 0, place[..., column], tokens).flatten()
                ones = torch.ones(tokens, 1, device=device)
                groups.append(
                    (number, group, torch.zeros(tokens + 1, 1, device=device).index_add(0, group, ones))
                )
                column += 1
            if not relation.shared:
                first.append(_fill(relation.count, number, device))
                column += relation.count
            step.append(_fill(relation.count, 1 if relation.shared else len(names), device))
        rows = place * torch.cat(step) + torch.cat(first)
        return cls(torch.where(places >= 0, rows, tokens * len(names)).flatten(), groups)


class Relate(nn.Module):
    """What each token is told of its places: for every relation a projection, gathered from each place of it and projected back.

    (N, S, D) -> (N, S, D). A token without any place is told nothing: zero.
    """

    def __init__(self, hidden_size: int, names: Sequence[str]):
        super().__init__()
        self.relations = len(names)
        self.down_proj = Linear(hidden_size, CHANNELS * len(names))
        self.up_proj = Linear(CHANNELS * count_of(names), hidden_size)

    def forward(self, x: Tensor, index: Index) -> Tensor:
        told = self.down_proj(x).reshape(-1, self.relations, CHANNELS)
        means = [self._mean(told[:, relation], group, size) for relation, group, size in index.groups]
        told = torch.cat([F.pad(told.flatten(0, 1), (0, 0, 0, 1)), *means])
        return self.up_proj(told.index_select(0, index.rows).view(*x.shape[:2], -1))

    @staticmethod
    def _mean(told: Tensor, group: Tensor, size: Tensor) -> Tensor:
        """Of each group (N * S, channels): the mean, and in the place of the last channel the logarithm of its size."""
        total = told.new_zeros(size.shape[0], CHANNELS - 1, dtype=torch.float32).index_add(
            0, group, told[:, :-1].float()
        )
        return torch.cat((total / size.clamp_min(1), (1 + size).log2() / 4), dim=1)[:-1].to(told.dtype)


def relate(hidden_size: int, names: Sequence[str]) -> Relate | None:
    """The branch of a block for these relations; without any there is none, nor a weight of it."""
    return Relate(hidden_size, names) if names else None
