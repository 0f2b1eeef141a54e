"""Grids as pixels, (H, W, 3) uint8 red, green, blue, in the look of their game."""

import numpy as np

from dataset.games.drawing import Drawing, ink, rgb
from utils.images import lettering


def colour(*values: int) -> np.ndarray:
    """A colour as an array, (3,) uint8."""
    return np.array(values, np.uint8)


PAPER, LINE, INK = colour(247, 247, 245), colour(85, 85, 85), colour(29, 29, 27)
RIGHT, WRONG, CHANGED = colour(24, 121, 78), colour(194, 47, 36), colour(255, 212, 0)
LEAST_FOR_LETTERS = 12  # pixels of a cell


def grid_pixels(
    grid: np.ndarray,
    drawing: Drawing,
    cell: int,
    given: np.ndarray | None = None,
    right: np.ndarray | None = None,
    changed: np.ndarray | None = None,
) -> np.ndarray:
    """A grid of `cell` pixels per cell, with lines between and around the cells.

    given, right, changed: masks of the grid's shape. The first shades cells, the others frame them.
    """
    rows, columns = grid.shape
    pixels = np.tile(LINE, (rows * cell + 1, columns * cell + 1, 1))
    for row, column in np.ndindex(grid.shape):
        inside = pixels[row * cell + 1 : (row + 1) * cell, column * cell + 1 : (column + 1) * cell]
        if right is not None:
            inside = _framed(inside, RIGHT if right[row, column] else WRONG)
        if changed is not None and changed[row, column]:
            inside = _framed(inside, CHANGED)
        shaded = given is not None and drawing.given and given[row, column]
        _fill(inside, drawing, int(grid[row, column]), bool(shaded))
    if drawing.box:
        for axis, size in enumerate(drawing.box):
            lines = np.swapaxes(pixels, 0, axis)
            for border in range(0, len(lines), size * cell):
                lines[max(border - 1, 0) : border + 2] = INK
    return pixels


def _fill(inside: np.ndarray, drawing: Drawing, value: int, given: bool) -> None:
    """Paint one cell, and write into it what its game writes there."""
    paper = drawing.given if given and drawing.given else drawing.colours[value]
    inside[:] = rgb(paper)
    letter = drawing.written[value].strip() if drawing.written else ""
    if not letter or len(inside) < LEAST_FOR_LETTERS:
        return
    drawn = lettering(letter, round(len(inside) * 0.75), colour(*ink(paper)), colour(*rgb(paper)))
    # As much of the line of letters as the cell holds, with the same margin on both sides.
    starts = [(there - here) // 2 for there, here in zip(inside.shape, drawn.shape[:2], strict=False)]
    (to_row, from_row), (to_column, from_column) = ((max(start, 0), max(-start, 0)) for start in starts)
    place = inside[to_row:, to_column:][: drawn.shape[0], : drawn.shape[1]]
    place[:] = drawn[from_row:, from_column:][: place.shape[0], : place.shape[1]]


def _framed(pixels: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Draw a frame into a cell (H, W, 3), and return the pixels that are left within it."""
    side = min(pixels.shape[:2])
    # A thin dark line inside the frame tells it from a cell of the same colour, where there is room.
    thick, line = max(1, side // 8), int(side >= 12)
    pixels[:] = frame
    pixels = pixels[thick:-thick, thick:-thick]
    pixels[:] = LINE
    return pixels[line:-line, line:-line] if line else pixels
