"""Random grids in the styles that suit the families of rules."""

from collections.abc import Sequence

import numpy as np

MAX_OBJECTS = 4


def draw_grids(
    rng: np.random.Generator, style: str, palette: np.ndarray, count: int, shape: tuple[int, int]
) -> np.ndarray:
    """Grids (count, *shape) uint8 in a style: noise, all colours, sparse, markers, objects or frames.

    palette: (c,) the colours to use. With markers the first of them marks one or two places of each grid.
    """
    density = {"noise": 0.5, "all colours": 0.5, "sparse": 0.2, "markers": 0.1}.get(style)
    if density is None:
        return _draw_objects(rng, style == "frames", palette, count, shape)
    cells = palette[1:] if style == "markers" and len(palette) > 1 else palette
    grids = cells[rng.integers(len(cells), size=(count, *shape))] * (rng.random((count, *shape)) < density)
    if style == "markers":
        for grid in grids:
            for row, column in rng.integers(0, shape, (rng.integers(1, 3), 2)).tolist():
                near = grid[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]
                # The 3x3 patterns around two markers must not overlap.
                if not (near == palette[0]).any():
                    grid[row, column] = palette[0]
    return grids


def _draw_objects(
    rng: np.random.Generator, hollow: bool, palette: np.ndarray, count: int, shape: tuple[int, int]
) -> np.ndarray:
    """Grids of two to four rectangles, or frames if `hollow`, of different colours.

    Later ones lie on top. All grids are drawn at once: bodies (count, objects, rows, columns).
    """
    colours = rng.permuted(np.tile(palette, (count, 1)), axis=1)[:, :MAX_OBJECTS]
    extent = np.minimum(rng.integers(3 if hollow else 1, 5 if hollow else 4, (*colours.shape, 2)), shape)
    place = rng.integers(0, np.array(shape) - extent + 1)
    last = extent - 1
    # (count, objects, side) of each axis: the place inside the object, 0 for its first cell
    at = [np.arange(side) - place[..., axis, None] for axis, side in enumerate(shape)]

    def where(inside: Sequence[np.ndarray], either: bool = False) -> np.ndarray:
        rows, columns = inside[0][..., :, None], inside[1][..., None, :]
        return rows | columns if either else rows & columns

    bodies = where([(at[axis] >= 0) & (at[axis] <= last[..., axis, None]) for axis in (0, 1)])
    if hollow:
        edge = [(at[axis] == 0) | (at[axis] == last[..., axis, None]) for axis in (0, 1)]
        bodies &= where(edge, either=True)
    else:
        # Half of the rectangles lack a corner, so that not all objects are symmetric.
        corner = rng.integers(0, 2, extent.shape) * last
        missing = (extent > 1).all(axis=2) & (rng.random(colours.shape) < 0.5)
        at_corner = where([at[axis] == corner[..., axis, None] for axis in (0, 1)])
        bodies &= ~(at_corner & missing[..., None, None])
    number_of_objects = rng.integers(2, MAX_OBJECTS + 1, (count, 1))
    bodies &= (np.arange(colours.shape[1]) < number_of_objects)[..., None, None]
    grids = np.zeros((count, *shape), np.uint8)
    for number in range(colours.shape[1]):
        grids = np.where(bodies[:, number], colours[:, number, None, None], grids)
    return grids
