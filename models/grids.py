"""Where grids stand on their canvases, and what can be said of all their cells at once.

All places count in the frame of the grid: its own rows, columns and offset on the canvas. Shapes are static,
and nothing waits for the device.
Shapes: N grids, C the canvas side, L = C * C cells, R places per cell.
"""

import functools

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dataset.canvas import Vocabulary, sources
from dataset.task import NUM_COLOURS

NONE = -1  # in the place of a cell: there is none
STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))  # rows and columns to the right, below, to the left, above


class Grids:
    """Where N grids stand on their canvases, read off tokens (N, L) of a vocabulary.

    canvas: (N, C, C) tokens.
    inside, coloured: (N, C, C), the cells that belong to the grid, and those that are no background.
    row, column: of each cell of the canvas from the grid's first, (N, C, 1, 1) and (N, 1, C, 1).
    rows, columns: (N, 1, 1, 1), how many the grid has; zero where a canvas shows none.
    """

    def __init__(self, tokens: Tensor, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self._objects: Tensor | None = None
        self.side = round(tokens.shape[-1] ** 0.5)
        self.canvas = rearrange(tokens, "n (r c) -> n r c", c=self.side)
        self.inside = self.canvas >= vocabulary.first
        self.coloured = self.canvas > vocabulary.first
        line = torch.arange(self.side, device=tokens.device)
        row, rows = self._along(self.inside.any(2), line)
        column, columns = self._along(self.inside.any(1), line)
        self.row, self.column = rearrange(row, "n r -> n r 1 1"), rearrange(column, "n c -> n 1 c 1")
        self.rows, self.columns = (rearrange(count, "n 1 -> n 1 1 1") for count in (rows, columns))

    def _along(self, inside: Tensor, line: Tensor) -> tuple[Tensor, Tensor]:
        """Each line's number (N, C) from the grid's first, and how many lines (N, 1) the grid has."""
        first = torch.where(inside, line, self.side).amin(1, keepdim=True)
        return line - first, inside.sum(1, keepdim=True)

    def of_colours(self) -> Tensor:
        """Where the grids show each colour but the background, (N, 9, C, C)."""
        colours = self.vocabulary.first + torch.arange(1, NUM_COLOURS, device=self.canvas.device)
        return self.canvas[:, None] == rearrange(colours, "c -> c 1 1")

    def of_object(self, cells: Tensor) -> Tensor:
        """How many of the `cells` (N, C, C) belong to the object of each cell, (N, L)."""
        first, wanted = (rearrange(each, "n r c -> n (r c)") for each in (self.objects[..., 0], cells.long()))
        return torch.zeros_like(first).scatter_add(1, first, wanted).gather(1, first)

    @property
    def objects(self) -> Tensor:
        """The first cell (N, C, C, 1) of those of one colour that are joined over edges with each cell."""
        if self._objects is None:
            self._objects = self._joined()
        return self._objects

    def _joined(self) -> Tensor:
        """`objects`, by FastSV (arXiv 1910.05971), whose labels settle in about log2(L) rounds."""
        tokens, cells = rearrange(self.canvas, "n r c -> n (r c)"), self.side**2
        number = torch.arange(cells, device=tokens.device)
        row, column = number // self.side, number % self.side
        joined = []
        for r, c in STEPS:
            there = (row + r >= 0) & (row + r < self.side) & (column + c >= 0) & (column + c < self.side)
            beside = torch.where(there, number + r * self.side + c, number)
            joined.append(torch.where(tokens[:, beside] == tokens, beside, number))
        parent = grand = number.expand(tokens.shape)
        # The number of rounds does not depend on the grids: nothing waits for the device, shapes stay static.
        for _ in range(2 + (cells - 1).bit_length()):
            least = functools.reduce(torch.minimum, (grand.gather(1, beside) for beside in joined))
            parent = parent.scatter_reduce(1, parent, least, "amin").minimum(least).minimum(grand)
            grand = parent.gather(1, parent)
        return rearrange(grand, "n (r c) -> n r c 1", c=self.side)

    def images(self, row: Tensor, column: Tensor) -> Tensor:
        """Where cells (N, C, 1, 1), (N, 1, C, 1) of each turn and mirror image come from, (N, L, 8)."""
        source = sources(self.canvas.device)  # (8, 2, 4)
        at = (
            source[:, axis, 0] * row
            + source[:, axis, 1] * column
            + source[:, axis, 2] * (self.rows - 1)
            + source[:, axis, 3] * (self.columns - 1)
            for axis in (0, 1)
        )
        return self.places(*at)

    def places(self, row: Tensor, column: Tensor) -> Tensor:
        """The cells (N, L, R) of the canvas for rows and columns (N, C, C, R) of the grid.

        They are `NONE` where the grid has no such row or column.
        """
        inside = (row >= 0) & (row < self.rows) & (column >= 0) & (column < self.columns)
        # The number of the canvas's first line, minus the grid's offset, takes a place back to the canvas.
        first_row, first_column = self.row[:, :1], self.column[:, :, :1]
        places = torch.where(inside, (row - first_row) * self.side + column - first_column, NONE)
        return rearrange(places, "n r c places -> n (r c) places")

    def of_cells(self, places: Tensor) -> Tensor:
        """Places (N, C, C, R) on the canvas as (N, L, R), `NONE` for cells outside the grid."""
        inside = rearrange(self.inside, "n r c -> n r c 1")
        return rearrange(torch.where(inside, places, NONE), "n r c places -> n (r c) places")


def following(marked: Tensor) -> Tensor:
    """The place of the next marked cell further along each line (..., C), C for none."""
    side = marked.shape[-1]
    line = torch.arange(side, device=marked.device)
    here_or_later = torch.where(marked, line, side).flip(-1).cummin(-1).values.flip(-1)
    return F.pad(here_or_later[..., 1:], (0, 1), value=side)
