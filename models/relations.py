"""Relations: other cells of its own grid that a cell is told of directly, however far away they are.

Attention addresses offsets. "The same place in the mirrored grid" lies at another offset for every cell, so
that no head finds it. A relation is an index instead. It is made from the grid's tokens alone, and a block
gathers a small projection through it (`models.layers.Relate`).

All places count in the frame of the grid: its own rows, columns and offset on the canvas. An answer may be
larger than its input. Cells outside the input's frame are then told of places inside it: a turned grid of
2x3 has a third row. A smaller answer changes nothing. What no relation reaches is left to attention.
Shapes: N grids, C the canvas side, L = C * C cells, R places per cell, S tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import AfterValidator
from torch import Tensor

from dataset.canvas import ARC, Vocabulary
from models.frames import COPIES, CROPS, PANELS, copies, count_of_panels, crops, panels
from models.grids import NONE, Grids, following
from models.moves import falls, slides

RelationName = Literal[
    "symmetries",
    "neighbours",
    "around",
    "shifts",
    "motions",
    "falls",
    "slides",
    "copies",
    "crops",
    "panels",
    "rays",
    "lines",
    "objects",
    "colours",
]


def each_once(names: list) -> list:
    """The same names. Raises ValueError where one stands twice."""
    if len(set(names)) < len(names):
        raise ValueError(f"a name stands twice in {names}")
    return names


Relations = Annotated[list[RelationName], AfterValidator(each_once)]


def _symmetries(grids: Grids) -> Tensor:
    return grids.images(grids.row, grids.column)[..., 1:]  # the first one is the grid as it is


def _steps(reach: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows and columns that lie between a cell and each cell around it, up to `reach` away."""
    width = 2 * reach + 1
    own = width * width // 2  # the cell itself, which is left out
    number = torch.cat((torch.arange(own, device=device), torch.arange(own + 1, width**2, device=device)))
    return number // width - reach, number % width - reach


def _neighbours(grids: Grids) -> Tensor:
    rows, columns = _steps(1, grids.canvas.device)
    return grids.places(*torch.broadcast_tensors(grids.row + rows, grids.column + columns))


def _over_the_border(reach: int) -> Callable[[Grids], Tensor]:
    """The places up to `reach` away in a grid that begins again behind each border."""

    def places(grids: Grids) -> Tensor:
        rows, columns = _steps(reach, grids.canvas.device)
        # A canvas without a grid must not divide by zero.
        row = (grids.row + rows) % grids.rows.clamp_min(1)
        column = (grids.column + columns) % grids.columns.clamp_min(1)
        row = torch.where(rearrange(grids.inside, "n r c -> n r c 1"), row, NONE)
        return grids.places(row, column)

    return places


def _motions(grids: Grids) -> Tensor:
    """The places of a symmetry and a shift, or of one of them alone."""
    cells = torch.arange(grids.side**2, device=grids.canvas.device)
    own = rearrange(cells, "l -> 1 l 1").expand(len(grids.canvas), -1, -1)
    images = torch.cat((own, _symmetries(grids)), dim=2)
    shifted = F.pad(torch.cat((own, _over_the_border(2)(grids)), dim=2), (0, 0, 0, 1), value=NONE)
    rows = (images % shifted.shape[1]).flatten(1)  # NONE becomes the row that was added
    both = shifted.to(torch.int16).take_along_dim(rows[..., None], 1)  # a canvas has few cells
    return rearrange(both, "n (l r) s -> n l (r s)", r=images.shape[2])[..., 1:]


def _rays(grids: Grids) -> Tensor:
    """The next coloured cell to the right, below, to the left and above."""
    line = torch.arange(grids.side, device=grids.canvas.device)

    def ahead(cells: Tensor) -> Tensor:
        """How many cells further along its line (N, C, C) the next coloured one is; 0 for none."""
        later = following(cells)
        return torch.where(later < grids.side, later - line, 0)

    def turned(cells: Tensor) -> Tensor:
        return rearrange(cells, "n r c -> n c r")

    coloured = grids.coloured
    right, below = ahead(coloured), turned(ahead(turned(coloured)))
    left = -ahead(coloured.flip(2)).flip(2)
    above = -turned(ahead(turned(coloured.flip(1)))).flip(1)
    steps = torch.stack((right, grids.side * below, left, grids.side * above), dim=-1)
    numbers = rearrange(torch.arange(grids.side**2, device=line.device), "(r c) -> r c 1", c=grids.side)
    return grids.of_cells(torch.where(steps != 0, numbers + steps, NONE))


def _lines(grids: Grids) -> Tensor:
    row, column = torch.broadcast_tensors(grids.row, grids.column)
    zero = torch.zeros_like(row)
    first = grids.places(torch.cat((row, zero, zero), -1), torch.cat((zero, column, zero), -1))
    return torch.where(rearrange(grids.inside, "n r c -> n (r c) 1"), first, NONE)


def _objects(grids: Grids) -> Tensor:
    """The first cell of the cells of one colour that are joined over edges."""
    return grids.of_cells(grids.objects)


def _colours(grids: Grids) -> Tensor:
    """The first cell of the same colour."""
    tokens, cells = rearrange(grids.canvas, "n r c -> n (r c)"), grids.side**2
    number = torch.arange(cells, device=tokens.device)
    alphabet = rearrange(torch.arange(grids.vocabulary.size, device=tokens.device), "v -> v 1")
    first = torch.where(tokens[:, None] == alphabet, number, cells - 1).amin(2)  # (N, V)
    return grids.of_cells(rearrange(first.gather(1, tokens.long()), "n (r c) -> n r c 1", c=grids.side))


@dataclass(frozen=True)
class Relation:
    """What is looked at from a cell.

    count: R.
    places: from grids to the cells of the canvas (N, L, R) that each of them names, or `NONE`.
    shared: cells that name the same cell are a group. Each is told the group's mean and size.
    framed: the places are those of a grid with a frame of its own. A cell without a place lies outside it.
    """

    count: int
    places: Callable[[Grids], Tensor]
    shared: bool = False
    framed: bool = False


RELATIONS: dict[str, Relation] = {
    # Where a cell comes from under each turn and mirror image of its grid.
    "symmetries": Relation(7, _symmetries, framed=True),
    # The cells around it.
    "neighbours": Relation(8, _neighbours),
    # The same over the border, where the grid begins again.
    "around": Relation(8, _over_the_border(1)),
    # The same up to two cells away.
    "shifts": Relation(24, _over_the_border(2)),
    # A symmetry and a shift up to two cells away, or one of them.
    "motions": Relation(199, _motions, framed=True),
    # Where a cell comes from when all coloured cells fall, to each side.
    "falls": Relation(4, falls),
    # The same when the cells of one colour move to one side as one body: until they are stopped, or one step.
    "slides": Relation(72, slides),
    # Where it comes from in a larger answer: images side by side, enlarged cells, a grid of grids.
    "copies": Relation(COPIES, copies, framed=True),
    # In a smaller answer: the box around some cells, with or without its rim.
    "crops": Relation(CROPS, crops, framed=True),
    # One of two to four equal panels.
    "panels": Relation(sum(count_of_panels(*each) for each in PANELS), panels, framed=True),
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


@torch.no_grad()
def places_of(names: Sequence[str], tokens: Tensor, vocabulary: Vocabulary = ARC) -> Tensor:
    """The places (N, L, R) int32 that relations name for each cell of canvases (N, L), or `NONE`."""
    grids = Grids(tokens, vocabulary)
    return torch.cat([RELATIONS[name].places(grids).to(torch.int32) for name in names], dim=-1)


def moved(places: Tensor, by: Tensor | int) -> Tensor:
    """The same places in a sequence in which each of them stands `by` tokens later."""
    return torch.where(places >= 0, places + by, NONE)


def after_registers(places: Tensor, count: int) -> Tensor:
    """Places (N, S, R) of a sequence that begins with `count` more tokens, which have no places."""
    return F.pad(moved(places, count), (0, 0, count, 0), value=NONE)


@dataclass(frozen=True)
class Group:
    """One column of places that are shared.

    relation: the number of its relation.
    of_token: (N * S,) the group of every token, N * S for none.
    size: (N * S + 1, 1) of the groups.
    """

    relation: int
    of_token: Tensor
    size: Tensor

    def mean(self, told: Tensor) -> Tensor:
        """What each group is told (N * S, channels) by its tokens (N * S, channels).

        It is their mean. The logarithm of their number takes the place of the last channel.
        """
        total = told.new_zeros(len(self.size), told.shape[1] - 1, dtype=torch.float32)
        total = total.index_add(0, self.of_token, told[:, :-1].float())
        size = (1 + self.size).log2() / 4  # of the order of the other channels
        return torch.cat((total / self.size.clamp_min(1), size), dim=1)[:-1].to(told.dtype)


@dataclass(frozen=True)
class Index:
    """Places as a block reads them.

    rows: (N * S * R,) into what is told: (N * S * relations, channels), then a row of zeros, then N * S rows
        for each of the groups.
    groups: one for each column of places that are shared.
    """

    rows: Tensor
    groups: list[Group]

    @classmethod
    def of(cls, places: Tensor, names: Sequence[str]) -> "Index":
        """From places (N, S, R) under these relations that are tokens of the same sequence."""
        count, length, _ = places.shape
        device, tokens = places.device, count * length
        start = rearrange(length * torch.arange(count, device=device), "n -> n 1 1")
        place = start + places
        # The row of a place is its token times `step` plus `first`, which depend on the column alone.
        step: list[Tensor] = []
        first: list[Tensor] = []
        groups: list[Group] = []
        column = 0
        for number, name in enumerate(names):
            relation = RELATIONS[name]
            step.append(_fill(relation.count, 1 if relation.shared else len(names), device))
            if not relation.shared:
                first.append(_fill(relation.count, number, device))
            for shared in range(column, column + relation.count) if relation.shared else ():
                of_token = torch.where(places[..., shared] >= 0, place[..., shared], tokens).flatten()
                ones = torch.ones(tokens, 1, device=device)
                size = torch.zeros(tokens + 1, 1, device=device).index_add(0, of_token, ones)
                first.append(_fill(1, tokens * (len(names) + len(groups)) + 1, device))
                groups.append(Group(number, of_token, size))
            column += relation.count
        rows = place * torch.cat(step) + torch.cat(first)
        return cls(torch.where(places >= 0, rows, tokens * len(names)).flatten(), groups)


def _fill(count: int, value: int, device: torch.device) -> Tensor:
    """One number `count` times, made on the device: it would have to wait for a copy from the host."""
    return torch.full((count,), value, device=device)
