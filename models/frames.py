"""Where the cells of an answer come from that has a frame of its own: copies, crops and panels of its input.

The answer's first cell stands where the input's does. A cell without a place lies outside the answer.
Shapes: N grids, C the canvas side, L = C * C cells, R places per cell.
"""

import functools
import itertools
import math

import torch
from einops import rearrange
from torch import Tensor

from dataset.task import NUM_COLOURS
from models.grids import NONE, Grids
from utils.transfer import sent

# Images of the grid side by side, by dihedral index: 0 as it is, 4 its columns mirrored, 5 its rows, 2 both.
_MIRRORED = {(False, False): 0, (False, True): 4, (True, False): 5, (True, True): 2}
_IMAGES: list[tuple[tuple[int, ...], ...]] = [
    *(((0,) * columns,) * rows for rows, columns in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (3, 3))),
    ((0, 4),), ((4, 0),), ((0,), (5,)), ((5,), (0,)),
    *(
        tuple(tuple(_MIRRORED[row != first, column != second] for column in (0, 1)) for row in (0, 1))
        for first in (0, 1) for second in (0, 1)
    ),
    ((0, 1), (3, 2)), ((0, 3), (1, 2)),
]  # fmt: skip
_MOST_IMAGES = 3  # side by side
_SCALES = torch.tensor([(1, 2, 2, 3, 4), (2, 1, 2, 3, 4)])  # of rows, of columns
PANELS = ((1, 2), (1, 3), (2, 1), (3, 1), (2, 2))  # how many panels a grid has down and across
COPIES = len(_IMAGES) + _SCALES.shape[1] + 2
CROPS = 2 * (NUM_COLOURS + 3)
_TABLE = torch.full((_MOST_IMAGES + 1, _MOST_IMAGES + 1, len(_IMAGES)), NONE)
for _number, _rows in enumerate(_IMAGES):
    _TABLE[: len(_rows), : len(_rows[0]), _number] = torch.tensor(_rows)


@functools.cache
def _on_device(device: torch.device) -> tuple[Tensor, Tensor]:
    return sent(_TABLE, device), sent(_SCALES, device)


def copies(grids: Grids) -> Tensor:
    """Places in a larger answer, R = `COPIES`: images side by side, enlarged cells, a grid of grids.

    In a grid of grids each coloured cell, or each cell of the background, is a copy of the whole grid.
    """
    # A canvas without a grid must not divide by zero.
    rows, columns = grids.rows.clamp_min(1), grids.columns.clamp_min(1)
    images = grids.images(grids.row % rows, grids.column % columns)
    row_block, column_block = _floor(grids.row, rows), _floor(grids.column, columns)
    table, scales = _on_device(grids.canvas.device)
    at = (
        torch.where((each < 0) | (each > _MOST_IMAGES), _MOST_IMAGES, each)[..., 0]
        for each in (row_block, column_block)
    )
    image = rearrange(table[tuple(at)], "n r c blocks -> n (r c) blocks")
    side_by_side = torch.where(image < 0, NONE, images.gather(2, image.clamp_min(0)))
    enlarged = torch.broadcast_tensors(_floor(grids.row, scales[0]), _floor(grids.column, scales[1]))
    # A grid of grids. Where there is no copy, the answer shows the block's own cell.
    of_block = grids.places(*torch.broadcast_tensors(row_block, column_block))
    copy = torch.where(of_block >= 0, images[..., :1], NONE)
    tokens = rearrange(grids.canvas, "n r c -> n (r c) 1")
    coloured = tokens.gather(1, of_block.clamp_min(0)) > grids.vocabulary.first
    of_grids = [torch.where(coloured == wanted, copy, of_block) for wanted in (True, False)]
    return torch.cat((side_by_side, grids.places(*enlarged), *of_grids), dim=-1)


def _floor(of: Tensor, by: Tensor | int) -> Tensor:
    return of.div(by, rounding_mode="floor")


def crops(grids: Grids) -> Tensor:
    """Places in a part of the grid, R = `CROPS`: a box around some cells, and that box without its rim.

    The box is as small as can be. The cells: all coloured ones; those of each colour; of the most and of the
    least frequent colour; of the largest coloured object.
    """
    shown, coloured = grids.of_colours(), grids.coloured[:, None]
    count = shown.sum((2, 3))  # (N, 9)
    order = torch.arange(NUM_COLOURS - 1, device=count.device)  # of equal counts the first, on every device
    most = (count * NUM_COLOURS - order).argmax(1)
    least = (torch.where(count > 0, count, grids.side**2 + 1) * NUM_COLOURS + order).argmin(1)
    number = torch.arange(len(shown), device=count.device)
    size = grids.of_object(grids.coloured)
    cells = torch.arange(size.shape[1], device=size.device)
    # The first cell of the first of the largest objects stands for it.
    largest = rearrange((size * len(cells) - cells).argmax(1), "n -> n 1 1 1")
    of_largest = (rearrange(grids.objects, "n r c 1 -> n 1 r c") == largest) & coloured
    masks = torch.cat(
        (coloured, shown, shown[number, most][:, None], shown[number, least][:, None], of_largest), dim=1
    )
    row, rows = _extent(masks.any(3))
    column, columns = _extent(masks.any(2))
    # From the canvas to the grid: its rows begin at the first cell inside it.
    row = row + rearrange(grids.row[:, 0, :, 0], "n 1 -> n 1")
    column = column + rearrange(grids.column[:, :, 0, 0][:, :1], "n 1 -> n 1")
    found = []
    for rim in (0, 1):
        down, across = (rearrange(each - 2 * rim, "n m -> n 1 1 m") for each in (rows, columns))
        within = (grids.row >= 0) & (grids.row < down) & (grids.column >= 0) & (grids.column < across)
        there = grids.row + rearrange(row + rim, "n m -> n 1 1 m")
        places = grids.places(
            there.masked_fill(~within, NONE), grids.column + rearrange(column + rim, "n m -> n 1 1 m")
        )
        found.append(places)
    return torch.cat(found, dim=-1)


def _extent(lines: Tensor) -> tuple[Tensor, Tensor]:
    """The first of some lines (N, M, C) of a canvas, and how many there are from it to the last, (N, M)."""
    side = lines.shape[-1]
    number = torch.arange(side, device=lines.device)
    first = torch.where(lines, number, side).amin(2)
    last = torch.where(lines, number, -1).amax(2)
    return first, (last - first + 1).clamp_min(0)


def panels(grids: Grids) -> Tensor:
    """Places in one of several equal panels, by `PANELS`, with or without lines between them.

    All panels of a partition come first, then the one with most coloured cells, and the one with fewest.
    """
    return torch.cat([_partition(grids, *counts) for counts in PANELS], dim=-1)


def count_of_panels(down: int, across: int) -> int:
    """The places that `panels` has for one partition."""
    return down * across + 2


def pairs_of_panels() -> list[tuple[int, int]]:
    """The places of `panels` that are different panels of one partition, in pairs."""
    pairs, start = [], 0
    for counts in PANELS:
        pairs += [(start + a, start + b) for a, b in itertools.permutations(range(math.prod(counts)), 2)]
        start += count_of_panels(*counts)
    return pairs


def _partition(grids: Grids, down: int, across: int) -> Tensor:
    (height, row_step, even_rows), (width, column_step, even_columns) = (
        _divided(grids.rows, down), _divided(grids.columns, across),
    )  # fmt: skip
    number = torch.arange(down * across, device=grids.canvas.device)
    within = (grids.row >= 0) & (grids.row < height) & (grids.column >= 0) & (grids.column < width)
    within = within & even_rows & even_columns
    row = (grids.row + (number // across) * row_step).masked_fill(~within, NONE)
    places = grids.places(row, grids.column + (number % across) * column_step)  # (N, L, down * across)
    tokens = rearrange(grids.canvas, "n r c -> n (r c) 1").expand(-1, -1, places.shape[2])
    coloured = (tokens.gather(1, places.clamp_min(0)) > grids.vocabulary.first) & (places >= 0)
    count = coloured.sum(1) * len(number) - number  # of equal ones the first
    chosen = torch.stack((count.argmax(1), (count + 2 * number).argmin(1)), dim=1)
    chosen = rearrange(chosen, "n two -> n 1 two").expand(-1, places.shape[1], -1)
    return torch.cat((places, places.gather(2, chosen)), dim=2)


def _divided(length: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The length of each of several parts, the step from one to the next, and whether they are equal."""
    lined = (length + 1) % parts == 0  # a line between them
    part = torch.where(lined, (length + 1) // parts - 1, length // parts) if parts > 1 else length
    even = (lined | (length % parts == 0)) & (part > 0) if parts > 1 else part > 0
    return part, torch.where(lined, part + 1, part), even
