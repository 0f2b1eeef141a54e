"""Grids as text for a terminal, side by side."""

import re

import numpy as np

from dataset.games.drawing import Drawing, ink, rgb

GAP = 4  # characters between grids
ESCAPES = re.compile("\033\\[[0-9;]*m")


def block(
    heading: list[str], grid: np.ndarray, drawing: Drawing, coloured: bool, given: np.ndarray | None = None
) -> list[str]:
    """A heading of at most two lines, and the grid below it.

    given: the cells that the question fills, shaded in a grid of its shape.
    """
    shaded = given if given is not None and given.shape == grid.shape else np.zeros(grid.shape, bool)
    return [*(heading + [""])[:2], *_grid_lines(grid, drawing, coloured, shaded)]


def _grid_lines(grid: np.ndarray, drawing: Drawing, coloured: bool, given: np.ndarray) -> list[str]:
    """A grid's rows: coloured cells two characters wide, or characters with lines between boxes."""
    rows = []
    for number, row in enumerate(grid):
        if not coloured:
            if drawing.box and number and number % drawing.box[0] == 0:
                rows.append(_between_boxes(len(row), drawing))
            rows.append(_plain_row(row, drawing))
            continue
        cells = (_cell(value, drawing, bool(one)) for value, one in zip(row, given[number], strict=True))
        rows.append("".join(cells) + "\033[0m")
    return rows


def _plain_row(row: np.ndarray, drawing: Drawing) -> str:
    cells = [drawing.characters[value] for value in row]
    if not drawing.box:
        return drawing.gap.join(cells)
    width = drawing.box[1]
    parts = (drawing.gap.join(cells[start : start + width]) for start in range(0, len(cells), width))
    return f"{drawing.gap}|{drawing.gap}".join(parts)


def _between_boxes(columns: int, drawing: Drawing) -> str:
    assert drawing.box is not None
    width = len(_plain_row(np.zeros(drawing.box[1], np.int64), drawing))
    gap = "-" * len(drawing.gap)
    return f"{gap}+{gap}".join(["-" * width] * (columns // drawing.box[1]))


def _cell(value: int, drawing: Drawing, given: bool) -> str:
    colour = drawing.given if given and drawing.given else drawing.colours[value]
    written = drawing.written[value] if drawing.written else " "
    letters = "38;2;{};{};{};".format(*ink(colour)) if written.strip() else ""
    return "\033[{}48;2;{};{};{}m{}".format(letters, *rgb(colour), f"{written} ")


def side_by_side(blocks: list[list[str]], width: int) -> list[str]:
    """Blocks beside each other as far as `width` goes, the others below."""
    lines: list[str] = []
    row: list[list[str]] = []
    for block in [*blocks, None]:
        if row and (block is None or sum(_width(one) + GAP for one in row) + _width(block) > width):
            height = max(map(len, row))
            padded = [
                [line + " " * (_width(one) - _visible(line)) for line in one + [""] * (height - len(one))]
                for one in row
            ]
            lines += ([""] if lines else []) + [
                (" " * GAP).join(parts).rstrip() for parts in zip(*padded, strict=True)
            ]
            row = []
        if block is not None:
            row.append(block)
    return lines


def _width(block: list[str]) -> int:
    return max(map(_visible, block))


def _visible(line: str) -> int:
    """The characters that a terminal shows of `line`."""
    return len(ESCAPES.sub("", line))
