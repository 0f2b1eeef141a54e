"""The families of rules on small grids: what they do, which rules they have, and how one is read off demonstrations.

A family applies many parameter sets to many grids at once. It is either listed (all its parameters are known) or fitted (they
are too many, and are read off the demonstrations); a fitted family stands only last.
To add one: a function that applies it, and an entry of `FAMILIES` with its parameters (`blocks`, or `draw` and `fit`). The
builder offers every entry, and the tests hold each to what it claims and to be closed under recolouring: with a permutation
of 1..9 before and its inverse after, a rule is again one of its family. So a permutation as the first of two stages would be
no new rule, and colours that a task does not show are interchangeable.
The `pattern` family is the Pattern task of "Searching Latent Program Spaces" (Macfarlane and Bonnet, 2024).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from dataset.augment import dihedral, random_colours
from dataset.task import NUM_COLOURS

COLOURS = range(1, NUM_COLOURS)
DIRECTIONS = (
    "right",
    "down",
    "left",
    "up",
)  # that many quarter turns, counter-clockwise, make it point to the right
STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))  # the same: rows, columns
SYMMETRIES = ("", "turn left", "turn twice", "turn right", "mirror", "flip", "transpose", "transpose other")
FILLS = ("enclosed", "rows", "columns")
COUNTS = ("keep most", "keep least", "paint most", "paint least", "bar")
PROPERTIES = ("corner", "left heavy", "odd")
BRANCHES = (2, 4, 5)  # the symmetries that keep a grid's shape
MAX_SHIFT = 2


# --- What the families do ---
# parameters (P, d) and grids (1, N, R, C), the same for all of them, or (P, N, R, C), uint8 -> (P, N, R, C) uint8


def _column(values: np.ndarray) -> np.ndarray:
    return values.astype(np.uint8)[:, None, None, None]


def _select(images: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Of images (kinds, 1 or P, ...) the one of each parameter set's kind (P,): (P, ...)."""
    return images[kinds, np.arange(len(kinds)) % images.shape[1]]


def _geometry(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    symmetries, kinds = np.unique(parameters[:, 0], return_inverse=True)
    return _select(np.stack([dihedral(grids, index) for index in symmetries]), kinds)


def _recolour(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    return np.where(grids == _column(parameters[:, 0]), _column(parameters[:, 1]), grids)


def _colour_permutation(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    cells = grids.reshape(len(grids), -1)
    return np.take_along_axis(parameters.astype(np.uint8), cells.astype(np.intp), axis=1).reshape(
        -1, *grids.shape[1:]
    )


def _shift(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    rows, columns = grids.shape[2:]
    row = (np.arange(rows) - parameters[:, :1]) % rows
    column = (np.arange(columns) - parameters[:, 1:]) % columns
    source = (row[:, :, None] * columns + column[:, None, :]).reshape(len(parameters), 1, -1)
    return np.take_along_axis(grids.reshape(*grids.shape[:2], -1), source, axis=2).reshape(
        -1, *grids.shape[1:]
    )


def _gravity(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    def fall(turns: int) -> np.ndarray:
        turned = np.rot90(grids, turns, axes=(-2, -1))
        order = (turned > 0).argsort(axis=-1, kind="stable")
        return np.rot90(np.take_along_axis(turned, order, axis=-1), -turns, axes=(-2, -1))

    return _select(np.stack([fall(turns) for turns in range(len(DIRECTIONS))]), parameters[:, 0])


def _move(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """All cells of a colour as one rigid body, until the border or another colour stops it, or at most one step."""
    rows, columns = grids.shape[2:]
    colour, turns, one_step = parameters[:, :1].astype(np.uint8), parameters[:, 1], parameters[:, 2:] == 1
    side = max(rows, columns)
    square = np.full(
        (side, side, *grids.shape[:2]), NUM_COLOURS, np.uint8
    )  # what is outside stops a body as another colour does
    square[:rows, :columns] = grids.transpose(2, 3, 0, 1)  # cells first: long inner loops
    turned = np.stack([np.rot90(square, i) for i in range(len(DIRECTIONS))], axis=2)  # (S, S, 4, 1 or P, N)
    turned = np.ascontiguousarray(turned[:, :, turns, np.arange(len(turns)) % len(grids)])  # (S, S, P, N)
    body = turned == colour
    others = (turned > 0) & ~body
    place, free = body, body.any(axis=(0, 1))
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


def _fill(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    kind, colour = _column(parameters[:, 0]), _column(parameters[:, 1])
    background, marked = grids == 0, grids == colour
    area = np.where(
        kind == FILLS.index("rows"), marked.any(axis=-1, keepdims=True), marked.any(axis=-2, keepdims=True)
    )
    enclosed = parameters[:, 0] == FILLS.index("enclosed")
    area[enclosed] = ~_reached_from_outside(background if len(grids) == 1 else background[enclosed])
    return np.where(area & background, colour, grids)


def _reached_from_outside(background: np.ndarray) -> np.ndarray:
    """The background cells (..., R, C) that steps over edges through the background join to the border."""
    passable = _framed(background, True)
    reached = _framed(np.zeros_like(background), True)
    while True:
        grown = reached.copy()
        for step in STEPS:
            grown |= _moved(reached, *step)
        grown &= passable
        if np.array_equal(grown, reached):
            return reached[..., 1:-1, 1:-1]
        reached = grown


def _count(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    cells = grids.reshape(*grids.shape[:2], -1).astype(np.intp)
    offsets = np.arange(0, cells[..., 0].size * NUM_COLOURS, NUM_COLOURS).reshape(*cells.shape[:2], 1)
    counts = np.bincount((cells + offsets).ravel(), minlength=offsets.size * NUM_COLOURS).reshape(
        *cells.shape[:2], NUM_COLOURS
    )
    counts[..., 0] = 0
    extremes = {"most": counts.max(axis=2), "least": np.where(counts > 0, counts, cells.shape[2]).min(axis=2)}
    colours = np.arange(NUM_COLOURS)
    becomes = []  # which colour each colour becomes, (1 or P, N, 10)
    for kind in COUNTS[:-1]:
        action, extreme = kind.split()
        chosen = (counts == extremes[extreme][..., None]) & (counts > 0)
        if action == "keep":
            becomes.append(np.where(chosen, colours, 0))
        else:
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


def _conditional(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    coloured, half = grids > 0, grids.shape[3] // 2
    left, right = (
        side.sum(axis=(2, 3)) for side in (coloured[..., :half], coloured[..., grids.shape[3] - half :])
    )
    holds = np.stack([coloured[..., 0, 0], left > right, coloured.sum(axis=(2, 3)) % 2 == 1])
    images = np.stack([dihedral(grids, index) for index in BRANCHES])
    kind, then, otherwise = parameters.T
    return np.where(_select(holds, kind)[:, :, None, None], _select(images, then), _select(images, otherwise))


def _large_objects(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """Objects: cells of one colour joined over edges. Larger than one: has a neighbour; than two: so has a neighbour of it."""
    framed = _framed(grids, 0)
    joined = [(framed > 0) & (_moved(framed, *step) == framed) for step in STEPS]
    neighbours = np.sum(joined, axis=0, dtype=np.uint8)
    middle = neighbours > 1
    beside = [near & _moved(middle, *step) for near, step in zip(joined, STEPS, strict=True)]
    larger = np.stack([neighbours > 0, middle | np.any(beside, axis=0)])[..., 1:-1, 1:-1]
    return np.where(_select(larger, parameters[:, 0] - 1), _column(parameters[:, 1]), grids)


def _pattern(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    part = _pattern_part(grids == _column(parameters[:, 0]))
    cells = np.take_along_axis(parameters[:, 1:], np.maximum(part, 0).reshape(len(parameters), -1), axis=1)
    return np.where(part < 0, grids, cells.reshape(part.shape)).astype(np.uint8)


def _pattern_part(marked: np.ndarray) -> np.ndarray:
    """Which cell 0..8 of a 3x3 pattern around the marked cells covers each cell of (..., R, C), -1 for none.

    Where two patterns overlap, that of the later marker in reading order is on top.
    """
    framed = _framed(marked, False)
    part = np.full(framed.shape, -1, np.int8)
    for index in reversed(range(9)):
        np.copyto(part, index, where=_moved(framed, index // 3 - 1, index % 3 - 1))
    return np.ascontiguousarray(part[..., 1:-1, 1:-1])


def _framed(grids: np.ndarray, value: int) -> np.ndarray:
    """`grids` (..., R, C) with a frame of one cell: (..., R + 2, C + 2)."""
    framed = np.full((*grids.shape[:-2], grids.shape[-2] + 2, grids.shape[-1] + 2), value, grids.dtype)
    framed[..., 1:-1, 1:-1] = grids
    return framed


def _moved(framed: np.ndarray, down: int, right: int) -> np.ndarray:
    """The insides of framed grids moved by -1, 0 or 1 cells each way; what the frames then hold is of no meaning.

    All grids move as one row of cells, many times as fast as each by itself: over their edges come their equal frames.
    """
    return np.roll(framed, down * framed.shape[-1] + right)


# --- Fitting a family as the last stage ---
# images of a first stage and answers, (U, K + Q, R, C) each, K demonstrations before Q queries -> fits (U,): does a rule of the
# family explain all demonstrations; agrees (U, Q): does every such rule give the query's answer.


def _read_table(keys: np.ndarray, answers: np.ndarray, size: int) -> np.ndarray:
    """seen (U, size, 10) bool: which colours the answers show where keys (U, K, R, C) have a value."""
    seen = np.zeros((len(keys), size * NUM_COLOURS), bool)
    seen[np.arange(len(keys))[:, None, None, None], keys * np.uint8(NUM_COLOURS) + answers] = True
    return seen.reshape(len(keys), size, NUM_COLOURS)


def _look_up(seen: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The colour that `seen` (U, size, 10) tells for each of keys (U, ...), and NUM_COLOURS, no colour, where it tells none."""
    table = np.where(seen.any(axis=2), seen.argmax(axis=2), NUM_COLOURS).astype(np.uint8)
    return table[np.arange(len(keys))[:, None, None, None], keys]


def _fit_colour_permutation(
    images: np.ndarray, answers: np.ndarray, demonstrations: int
) -> tuple[np.ndarray, np.ndarray]:
    seen = _read_table(images[:, :demonstrations], answers[:, :demonstrations], NUM_COLOURS)
    seen[:, 0, 0] = True
    fits = (seen.sum(axis=1) <= 1).all(axis=1) & (seen.sum(axis=2) <= 1).all(axis=1)
    sources, targets = seen.any(axis=2), seen.any(axis=1)
    all_but_one = fits & (sources.sum(axis=1) == NUM_COLOURS - 1)  # the last colour has one place left
    seen[all_but_one, sources[all_but_one].argmin(axis=1), targets[all_but_one].argmin(axis=1)] = True
    return fits, (_look_up(seen, images[:, demonstrations:]) == answers[:, demonstrations:]).all(axis=(2, 3))


def _fit_pattern(
    images: np.ndarray, answers: np.ndarray, demonstrations: int
) -> tuple[np.ndarray, np.ndarray]:
    markers = np.arange(
        1, min(images.max(initial=0) + 2, NUM_COLOURS)
    )  # one that is nowhere stands for all such
    marked = _framed(images[:, 0] == _column(markers), False)  # (markers, U, R + 2, C + 2)
    wide = marked | _moved(marked, 0, 1) | _moved(marked, 0, -1)
    near = (wide | _moved(wide, 1, 0) | _moved(wide, -1, 0))[..., 1:-1, 1:-1]
    marker, rows = np.nonzero((near | (images[:, 0] == answers[:, 0])).all(axis=(2, 3)))
    images, answers, count = images[rows], answers[rows], len(images)
    part = _pattern_part(images == _column(markers[marker]))
    outside = part < 0
    keys = np.where(outside, 9, part).astype(np.uint8)
    seen = _read_table(keys[:, :demonstrations], answers[:, :demonstrations], 10)[:, :9]
    right = np.where(outside, images == answers, _look_up(seen, np.minimum(keys, 8)) == answers).all(
        axis=(2, 3)
    )
    fits = right[:, :demonstrations].all(axis=1) & (seen.sum(axis=2) <= 1).all(axis=1)
    fits_any = np.zeros(count, bool)
    fits_any[rows[fits]] = True
    agrees_all = np.ones((count, images.shape[1] - demonstrations), bool)
    np.logical_and.at(agrees_all, rows[fits], right[fits, demonstrations:])
    return fits_any, agrees_all


# --- The table ---


@dataclass(frozen=True)
class Family:
    """A kind of rule. `blocks` lists the parameters of a listed family, (P, d) int64 each, so that the images of one block
    have one shape; a fitted family has `draw` and `fit` instead. The columns `colours` hold colours (0 stands for none).
    `inputs` names the styles of grids that suit it (see `dataset.generate.rules`), `keeps` what every rule of it leaves as it is (see
    `may_become`), so that most grids need not be tried.
    """

    apply: Callable[[np.ndarray, np.ndarray], np.ndarray]
    describe: Callable[..., str]
    inputs: tuple[str, ...]
    keeps: tuple[str, ...] = ()
    colours: tuple[int, ...] = ()
    blocks: tuple[np.ndarray, ...] = ()
    draw: Callable[[np.random.Generator], np.ndarray] | None = None
    fit: Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]] | None = None


def may_become(images: np.ndarray, answers: np.ndarray) -> dict[str, np.ndarray]:
    """Which images (U, R, C) a rule that keeps this or that may turn into their answers (U, R', C'), (U,) bool each."""
    cells, wanted = images.reshape(len(images), -1), answers.reshape(len(images), -1)
    histogram = (np.sort(cells) == np.sort(wanted)).all(axis=1)
    if images.shape != answers.shape:
        nothing = np.zeros(len(images), bool)
        names = ("background", "coloured cells", "other colours", "one new colour")
        return {"histogram": histogram} | dict.fromkeys(names, nothing)
    same = cells == wanted
    new = np.where(same, 0, wanted).max(
        axis=1, keepdims=True
    )  # what the changed cells become, if all become the same
    moved = np.where(same, 0, np.maximum(cells, wanted)).max(
        axis=1, keepdims=True
    )  # the colour that moved, if only one did
    return {
        "histogram": histogram,
        "background": ((cells == 0) == (wanted == 0)).all(axis=1),
        "coloured cells": (same | (cells == 0)).all(axis=1),
        "other colours": (same | (cells == 0) & (wanted == moved) | (cells == moved) & (wanted == 0)).all(
            axis=1
        ),
        "one new colour": (same | (wanted == 0) | (wanted == new)).all(axis=1),
    }


def _block(rows: Iterable[tuple[int, ...]]) -> np.ndarray:
    return np.array(list(rows), np.int64)


FAMILIES: dict[str, Family] = {
    "geometry": Family(
        _geometry,
        lambda index: SYMMETRIES[index],
        inputs=("noise", "objects"),
        keeps=("histogram",),
        blocks=(_block((i,) for i in (2, 4, 5)), _block((i,) for i in (1, 3, 6, 7))),
    ),
    "colour_permutation": Family(
        _colour_permutation,
        lambda *colours: "".join(map(str, colours)),
        inputs=("all colours",),
        keeps=("background",),
        draw=lambda rng: random_colours(rng, 1)[0],
        fit=_fit_colour_permutation,
    ),
    "recolour": Family(
        _recolour,
        lambda source, target: f"{source}->{target}",
        inputs=("noise", "objects"),
        keeps=("background", "one new colour"),
        colours=(0, 1),
        blocks=(_block((a, b) for a in COLOURS for b in COLOURS if a != b),),
    ),
    "gravity": Family(
        _gravity,
        lambda turns: DIRECTIONS[turns],
        inputs=("noise", "objects"),
        keeps=("histogram",),
        blocks=(_block((turns,) for turns in range(4)),),
    ),
    "shift": Family(
        _shift,
        lambda rows, columns: f"{rows:+d},{columns:+d}",
        inputs=("noise", "objects"),
        keeps=("histogram",),
        blocks=(
            _block(
                (r, c)
                for r in range(-MAX_SHIFT, MAX_SHIFT + 1)
                for c in range(-MAX_SHIFT, MAX_SHIFT + 1)
                if r or c
            ),
        ),
    ),
    "fill": Family(
        _fill,
        lambda kind, colour: f"{FILLS[kind]} {colour}",
        inputs=("sparse", "frames"),
        keeps=("coloured cells", "one new colour"),
        colours=(1,),
        blocks=(_block((kind, c) for kind in range(len(FILLS)) for c in COLOURS),),
    ),
    "move": Family(
        _move,
        lambda colour, turns, steps: (
            f"{colour} {DIRECTIONS[turns]} {'one step' if steps else 'until blocked'}"
        ),
        inputs=("objects", "sparse"),
        keeps=("histogram", "other colours"),
        colours=(0,),
        blocks=(_block((c, turns, steps) for c in COLOURS for turns in range(4) for steps in (0, 1)),),
    ),
    "count": Family(
        _count,
        lambda kind, colour: f"{COUNTS[kind]} {colour}" if colour else COUNTS[kind],
        inputs=("noise", "objects"),
        keeps=("one new colour",),
        colours=(1,),
        blocks=(
            _block([(kind, 0) for kind in range(len(COUNTS) - 1)] + [(len(COUNTS) - 1, c) for c in COLOURS]),
        ),
    ),
    "pattern": Family(
        _pattern,
        lambda marker, *cells: f"{marker}: {''.join(map(str, cells))}",
        inputs=("markers",),
        colours=(0,),
        draw=lambda rng: rng.integers(1, NUM_COLOURS, 10),
        fit=_fit_pattern,
    ),
    "conditional": Family(
        _conditional,
        lambda kind, a, b: f"{PROPERTIES[kind]}: {SYMMETRIES[BRANCHES[a]]}, else {SYMMETRIES[BRANCHES[b]]}",
        inputs=("noise", "objects"),
        keeps=("histogram",),
        blocks=(
            _block(
                (kind, a, b) for kind in range(len(PROPERTIES)) for a in range(3) for b in range(3) if a != b
            ),
        ),
    ),
    "large_objects": Family(
        _large_objects,
        lambda size, colour: f"larger than {size}: {colour}",
        inputs=("noise", "objects"),
        keeps=("background", "one new colour"),
        colours=(1,),
        blocks=(_block((size, c) for size in (1, 2) for c in COLOURS),),
    ),
}
