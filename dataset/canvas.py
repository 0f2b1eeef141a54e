"""Grids on a square canvas: tokens PAD 0, EOS 1, colours 2..11.

Below a grid at offset (r, c) stands one row of EOS, to its right one column of EOS, where the canvas has
room. Everything else is PAD. Games whose grids fill the canvas have no EOS.
Shapes: N grids, G the stored side, C the canvas side, L = C * C cells in row-major order.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataset.task import MAX_SIDE, NUM_COLOURS
from utils.transfer import sent

PAD = 0
EOS = 1
IGNORE_LABEL_ID = -100


@dataclass(frozen=True)
class Vocabulary:
    """PAD 0, then EOS if there is one, then one token per cell value 0..symbols - 1."""

    symbols: int
    eos: bool

    @property
    def first(self) -> int:
        """The token of cell value 0."""
        return 1 + self.eos

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.first + self.symbols


ARC = Vocabulary(NUM_COLOURS, eos=True)
VOCAB_SIZE = ARC.size

# One line per dihedral index: the source row and the source column of cell (r, c) of a transformed grid,
# each as coefficients of r, c, rows - 1 and columns - 1. rows x columns is the shape *before* the
# transform.
_SOURCE = torch.tensor(
    [
        [[1, 0, 0, 0], [0, 1, 0, 0]],
        [[0, 1, 0, 0], [-1, 0, 0, 1]],
        [[-1, 0, 1, 0], [0, -1, 0, 1]],
        [[0, -1, 1, 0], [1, 0, 0, 0]],
        [[1, 0, 0, 0], [0, -1, 0, 1]],
        [[-1, 0, 1, 0], [0, 1, 0, 0]],
        [[0, 1, 0, 0], [1, 0, 0, 0]],
        [[0, -1, 1, 0], [-1, 0, 0, 1]],
    ]
)
TRANSPOSES = torch.tensor([False, True, False, True, False, False, True, True])


@functools.cache
def _on_device(device: torch.device) -> tuple[Tensor, Tensor]:
    return sent(_SOURCE, device), sent(TRANSPOSES, device)


def sources(device: torch.device) -> Tensor:
    """Where cell (r, c) of a transformed grid comes from, (8, 2, 4), by dihedral index.

    Row and column are coefficients of r, c, rows - 1 and columns - 1 of the grid before the transform.
    """
    return _on_device(device)[0]


@dataclass(frozen=True)
class GridTable:
    """All grids of a store on one device.

    pixels: (N, G, G) uint8 colours, zero outside the grid. shapes: (N, 2) int64 rows and columns.
    """

    pixels: Tensor
    shapes: Tensor

    def to(self, device: torch.device) -> "GridTable":
        """The same table on `device`."""
        return GridTable(self.pixels.to(device), self.shapes.to(device))


def render(
    table: GridTable,
    grid: Tensor,
    transform: Tensor,
    colours: Tensor,
    offset: Tensor,
    side: int,
    vocabulary: Vocabulary = ARC,
    order: Tensor | None = None,
) -> Tensor:
    """Draw augmented grids onto a canvas, on the table's device and without a Python loop.

    grid: (N,) index into the table.
    transform, colours: (N,) dihedral 0..7 and (N, 10) colour that each colour becomes.
    offset: (N, 2) place of the top-left cell *after* the transform.
    side: C, the side of the canvas.
    order: (N, 2, C) rows and columns to show, of transformed grids that fill the canvas.

    Returns (N, C * C) uint8 tokens. The caller makes sure that the grids fit.
    """
    device = table.pixels.device
    shape = table.shapes[grid]  # (N, 2)
    source_of, transposes = _on_device(device)
    source = source_of[transform]  # (N, 2, 4)
    turned_shape = torch.where(transposes[transform, None], shape.flip(-1), shape)  # (N, 2)
    cells = torch.arange(side, device=device)
    r = cells[None, :] - offset[:, :1]  # (N, C) row inside the grid
    c = cells[None, :] - offset[:, 1:]  # (N, C)
    constant = (source[:, :, 2:] * (shape - 1)[:, None, :]).sum(-1)  # (N, 2)
    stored = table.pixels.shape[-1]
    # The flat source index is affine in r and c. So one outer sum gives it for the whole canvas.
    row_step = source[:, 0, 0] * stored + source[:, 1, 0]
    column_step = source[:, 0, 1] * stored + source[:, 1, 1]
    index = constant[:, :1] * stored + constant[:, 1:]  # (N, 1)
    rows, columns = (r, c) if order is None else order.unbind(1)
    index = (
        index[:, :, None]
        + (row_step[:, None] * rows)[:, :, None]
        + (column_step[:, None] * columns)[:, None, :]
    )  # (N, C, C)
    # Cells outside the grid point anywhere. They are clamped to something that exists and overwritten below.
    pixels = table.pixels.flatten(1)[grid].gather(1, index.flatten(1).clamp_(0, stored * stored - 1))
    tokens = (colours.to(torch.uint8) + vocabulary.first).gather(1, pixels.long()).view(-1, side, side)
    # Products of the marks along both axes tell the kinds of cells apart: 1 is a cell of the grid, 2 is
    # EOS, 0 and 4 (the corner behind both ends) are PAD.
    along_rows, along_columns = _along(r, turned_shape[:, :1]), _along(c, turned_shape[:, 1:])
    place = along_rows[:, :, None] * along_columns[:, None, :]
    outside = (place == 2).to(torch.uint8) * EOS if vocabulary.eos else PAD
    return torch.where(place == 1, tokens, outside).flatten(1)


def _along(position: Tensor, length: Tensor) -> Tensor:
    """Marks along an axis: 1 inside the grid, 2 right behind it, 0 elsewhere."""
    return ((position >= 0) & (position < length)).to(torch.uint8) + 2 * (position == length).to(torch.uint8)


def labels_of(tokens: Tensor) -> Tensor:
    """int64 labels from answer tokens. As in the original PAD is not supervised: IGNORE_LABEL_ID."""
    tokens = tokens.long()
    return tokens.masked_fill(tokens == PAD, IGNORE_LABEL_ID)


def encode(grid: np.ndarray, side: int = MAX_SIDE, offset: tuple[int, int] = (0, 0)) -> np.ndarray:
    """One grid (rows, columns) as (side * side,) uint8 tokens: the plain reference of `render`."""
    rows, columns = grid.shape
    canvas = np.full((side, side), PAD, dtype=np.uint8)
    r, c = offset
    # Slices of one row or column, not indices: they are empty where the canvas has no room for EOS.
    canvas[r : r + rows, c : c + columns] = grid + ARC.first
    canvas[r + rows : r + rows + 1, c : c + columns] = EOS
    canvas[r : r + rows, c + columns : c + columns + 1] = EOS
    return canvas.ravel()


def undraw(tokens: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """The grid that stands somewhere on a canvas (L,), and its offset: the inverse of `encode`.

    Raises `ValueError` unless the coloured cells are one rectangle. For predictions see `decode`.
    """
    side = round(len(tokens) ** 0.5)
    canvas = tokens.reshape(side, side)
    rows, columns = (np.flatnonzero((canvas >= ARC.first).any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        raise ValueError("the canvas shows no grid")
    grid = canvas[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if grid.min() < ARC.first or grid.max() >= ARC.size:
        raise ValueError("the canvas does not show one rectangular grid")
    return (grid - ARC.first).astype(np.uint8), (int(rows[0]), int(columns[0]))


def decode(tokens: np.ndarray, vocabulary: Vocabulary = ARC) -> list[np.ndarray]:
    """The grids that (N, L) tokens show: of each canvas the largest all-colour rectangle anchored at (0, 0).

    The original TRM decodes like this. A canvas whose first cell is no colour gives an empty (0, 0) grid.
    """
    side = round(tokens.shape[1] ** 0.5)
    canvas = tokens.reshape(-1, side, side)
    coloured = (canvas >= vocabulary.first) & (canvas < vocabulary.size)
    run = np.cumprod(coloured, axis=2, dtype=np.int64).sum(axis=2)  # (N, C) leading colour cells of each row
    width = np.minimum.accumulate(run, axis=1)  # (N, C) of the widest rectangle that ends with each row
    rows = (width * np.arange(1, side + 1)).argmax(axis=1)  # the original's tie-break: fewer rows
    return [
        (canvas[i, : r + 1, : width[i, r]] - vocabulary.first).astype(np.uint8)
        if width[i, r]
        else np.zeros((0, 0), np.uint8)
        for i, r in enumerate(rows)
    ]


def smallest_bucket(side: int, buckets: tuple[int, ...]) -> int | None:
    """The smallest canvas of ascending `buckets` that holds a grid of `side`, or None."""
    return next((bucket for bucket in buckets if bucket >= side), None)
