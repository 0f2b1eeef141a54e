"""What the rules of each family do to grids.

A function applies many parameter sets to many grids at once: parameters (P, d), and grids (1, N, R, C), the
same for all of them, or (P, N, R, C), uint8. The result is (P, N, R', C') uint8. The first line of each
docstring lists the d parameters in their order.
"""

import numpy as np

from dataset.augment import dihedral
from dataset.task import NUM_COLOURS

COLOURS = range(1, NUM_COLOURS)
# As many quarter turns, counter-clockwise, as a direction's index make it point to the right.
DIRECTIONS = ("right", "down", "left", "up")
STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))  # rows and columns of one step in each direction
SYMMETRIES = ("", "turn left", "turn twice", "turn right", "mirror", "flip", "transpose", "transpose other")
FILLS = ("enclosed", "rows", "columns")
COUNTS = ("keep most", "keep least", "paint most", "paint least", "bar")
PROPERTIES = ("corner", "left heavy", "odd")
BRANCHES = (2, 4, 5)  # the symmetries that keep a grid's shape
MAX_SHIFT = 2


def per_grid(values: np.ndarray) -> np.ndarray:
    """A value per parameter set (P,) such that it broadcasts against grids (P, N, R, C)."""
    return values.astype(np.uint8)[:, None, None, None]


def _select(images: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """(P, ...): of images (kinds, 1 or P, ...) the one of each parameter set's kind (P,)."""
    return images[kinds, np.arange(len(kinds)) % images.shape[1]]


def geometry(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """parameters: the dihedral transform."""
    symmetries, kinds = np.unique(parameters[:, 0], return_inverse=True)
    return _select(np.stack([dihedral(grids, index) for index in symmetries]), kinds)


def recolour(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """parameters: a colour, and what it becomes."""
    return np.where(grids == per_grid(parameters[:, 0]), per_grid(parameters[:, 1]), grids)


def colour_permutation(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """parameters: what each of the ten colours becomes."""
    cells = grids.reshape(len(grids), -1).astype(np.intp)
    recoloured = np.take_along_axis(parameters.astype(np.uint8), cells, axis=1)
    return recoloured.reshape(-1, *grids.shape[1:])


def shift(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """parameters: rows down and columns right. What leaves the grid comes in at the other side."""
    rows, columns = grids.shape[2:]
    row = (np.arange(rows) - parameters[:, :1]) % rows
    column = (np.arange(columns) - parameters[:, 1:]) % columns
    source = (row[:, :, None] * columns + column[:, None, :]).reshape(len(parameters), 1, -1)
    shifted = np.take_along_axis(grids.reshape(*grids.shape[:2], -1), source, axis=2)
    return shifted.reshape(-1, *grids.shape[1:])


def gravity(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """parameters: the direction in which all coloured cells fall."""

    def fall(turns: int) -> np.ndarray:
        turned = np.rot90(grids, turns, axes=(-2, -1))
        # Sorted stably, the coloured cells of a row end at its right, in their order.
        order = (turned > 0).argsort(axis=-1, kind="stable")
        return np.rot90(np.take_along_axis(turned, order, axis=-1), -turns, axes=(-2, -1))

    return _select(np.stack([fall(turns) for turns in range(len(DIRECTIONS))]), parameters[:, 0])


def move(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """parameters: a colour, a direction, and 1 for one step only.

    All cells of the colour move as one rigid body, until the border or another colour stops it.
    """
    rows, columns = grids.shape[2:]
    colour, turns, one_step = parameters[:, :1].astype(np.uint8), parameters[:, 1], parameters[:, 2:] == 1
    side = max(rows, columns)
    # Squares can be turned into one array. What is outside the grid stops a body like another colour.
    square = np.full((side, side, *grids.shape[:2]), NUM_COLOURS, np.uint8)
    square[:rows, :columns] = grids.transpose(2, 3, 0, 1)  # cells first, for long inner loops
    turned = np.stack([np.rot90(square, i) for i in range(len(DIRECTIONS))], axis=2)  # (S, S, 4, 1 or P, N)
    turned = np.ascontiguousarray(turned[:, :, turns, np.arange(len(turns)) % len(grids)])  # (S, S, P, N)
    body = turned == colour
    others = (turned > 0) & ~body
    place, free = body, body.any(axis=(0, 1))  # where the body is, and whether it can go on
    while free.any():
        ahead = np.zeros_like(place)
        ahead[:, 1:] = place[:, :-1]
        free = free & ~(ahead & others).any(axis=(0, 1)) & ~place[:, -1].any(axis=0)
        place = np.where(free, ahead, place)
        free &= ~one_step
    moved = np.where(place, colour, np.where(body, np.uint8(0), turned))
    result = np.empty((len(parameters), *grids.shape[1:]), np.uint8)
    for i in np.unique(turns):
        result[turns == i] = np.rot90(moved[:, :, turns == i], -i)[:rows, :columns].transpose(2, 3, 0, 1)
    return result


def fill(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """parameters: one of FILLS, and a colour.

    The colour fills the enclosed background, or the background of every row (column) that shows it.
    """
    kind, colour = per_grid(parameters[:, 0]), per_grid(parameters[:, 1])
    background, marked = grids == 0, grids == colour
    area = np.where(
        kind == FILLS.index("rows"), marked.any(axis=-1, keepdims=True), marked.any(axis=-2, keepdims=True)
    )
    enclosed = parameters[:, 0] == FILLS.index("enclosed")
    area[enclosed] = ~_reached_from_outside(background if len(grids) == 1 else background[enclosed])
    return np.where(area & background, colour, grids)


def _reached_from_outside(background: np.ndarray) -> np.ndarray:
    """The background cells (..., R, C) that are joined to the border, over edges, through background."""
    # The frame is reached from the start: every border cell of the background touches it.
    passable = with_frame(background, True)
    reached = with_frame(np.zeros_like(background), True)
    while True:
        grown = reached.copy()
        for step in STEPS:
            grown |= moved_by(reached, *step)
        grown &= passable
        if np.array_equal(grown, reached):
            return reached[..., 1:-1, 1:-1]
        reached = grown


def count(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """parameters: one of COUNTS, and a colour for a bar, else 0.

    The most (least) frequent colour is kept alone, or all coloured cells are painted in it. A bar has as
    many cells in reading order as the grid has of the colour.
    """
    cells = grids.reshape(*grids.shape[:2], -1).astype(np.intp)
    # One count for all grids: the colours of each are moved to a range of their own.
    offsets = np.arange(0, cells[..., 0].size * NUM_COLOURS, NUM_COLOURS).reshape(*cells.shape[:2], 1)
    counts = np.bincount((cells + offsets).ravel(), minlength=offsets.size * NUM_COLOURS)
    counts = counts.reshape(*cells.shape[:2], NUM_COLOURS)
    counts[..., 0] = 0
    extremes = {"most": counts.max(axis=2), "least": np.where(counts > 0, counts, cells.shape[2]).min(axis=2)}
    colours = np.arange(NUM_COLOURS)
    becomes = []  # which colour each colour becomes, (1 or P, N, 10)
    for kind in COUNTS[:-1]:
        action, extreme = kind.split()
        chosen = (counts == extremes[extreme][..., None]) & (counts > 0)
        if action == "keep":
            becomes.append(np.where(chosen, colours, 0))
        else:  # with several most (least) frequent colours nothing is painted
            only = (chosen.sum(axis=2) == 1)[..., None] & (colours > 0)
            becomes.append(np.where(only, chosen.argmax(axis=2)[..., None], colours))
    kind, colour = parameters.T
    bar = kind == len(COUNTS) - 1
    result = np.empty((len(parameters), *cells.shape[1:]), np.uint8)
    own = np.arange(len(parameters)) % len(grids)
    table = np.stack(becomes).astype(np.uint8)[kind[~bar], own[~bar]]
    result[~bar] = np.take_along_axis(table, cells if len(cells) == 1 else cells[~bar], axis=2)
    number = counts[own[bar], :, colour[bar]][..., None]  # (bars, N, 1)
    result[bar] = (np.arange(cells.shape[2]) < number) * colour[bar].astype(np.uint8)[:, None, None]
    return result.reshape(-1, *grids.shape[1:])


def conditional(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """parameters: one of PROPERTIES, and two of BRANCHES: what to do if it holds, and if not."""
    coloured, half = grids > 0, grids.shape[3] // 2
    left, right = (
        side.sum(axis=(2, 3)) for side in (coloured[..., :half], coloured[..., grids.shape[3] - half :])
    )
    holds = np.stack([coloured[..., 0, 0], left > right, coloured.sum(axis=(2, 3)) % 2 == 1])
    images = np.stack([dihedral(grids, index) for index in BRANCHES])
    kind, then, otherwise = parameters.T
    return np.where(_select(holds, kind)[:, :, None, None], _select(images, then), _select(images, otherwise))


def large_objects(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """parameters: a size, 1 or 2, and the colour that larger objects become.

    An object is cells of one colour, joined over edges. A cell of an object larger than 1 has a neighbour.
    If the object is larger than 2, the cell has two, or its neighbour has two.
    """
    framed = with_frame(grids, 0)
    joined = [(framed > 0) & (moved_by(framed, *step) == framed) for step in STEPS]
    neighbours = np.sum(joined, axis=0, dtype=np.uint8)
    middle = np.asarray(neighbours > 1)
    beside = [near & moved_by(middle, *step) for near, step in zip(joined, STEPS, strict=True)]
    larger = np.stack([neighbours > 0, middle | np.any(beside, axis=0)])[..., 1:-1, 1:-1]
    return np.where(_select(larger, parameters[:, 0] - 1), per_grid(parameters[:, 1]), grids)


def pattern(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """parameters: the colour of markers, and nine colours for the 3x3 cells around each marker."""
    part = pattern_part(grids == per_grid(parameters[:, 0]))
    cells = np.take_along_axis(parameters[:, 1:], np.maximum(part, 0).reshape(len(parameters), -1), axis=1)
    return np.where(part < 0, grids, cells.reshape(part.shape)).astype(np.uint8)


def pattern_part(marked: np.ndarray) -> np.ndarray:
    """Which cell 0..8 of a 3x3 pattern around a marked cell covers each cell of (..., R, C), -1 for none.

    If two patterns overlap, that of the later marker in reading order is on top.
    """
    framed = with_frame(marked, False)
    part = np.full(framed.shape, -1, np.int8)
    for index in reversed(range(9)):
        np.copyto(part, index, where=moved_by(framed, index // 3 - 1, index % 3 - 1))
    return np.ascontiguousarray(part[..., 1:-1, 1:-1])


def with_frame(grids: np.ndarray, value: int) -> np.ndarray:
    """(..., R + 2, C + 2): `grids` (..., R, C) with a frame of one cell of `value`."""
    framed = np.full((*grids.shape[:-2], grids.shape[-2] + 2, grids.shape[-1] + 2), value, grids.dtype)
    framed[..., 1:-1, 1:-1] = grids
    return framed


def moved_by(framed: np.ndarray, down: int, right: int) -> np.ndarray:
    """Framed grids whose insides moved by -1, 0 or 1 cells each way. Their frames then mean nothing.

    All grids move as one row of cells, which is much faster than each by itself. Over the edges of one grid
    only the frames of its neighbours come in, and all frames are equal.
    """
    return np.roll(framed, down * framed.shape[-1] + right)
