"""Rules on small grids, and the check that a task's demonstrations determine its answer.

A rule is one stage or two, each a family and its parameters: `gravity(down) > recolour(3->5)`. A family applies many
parameter sets to many grids at once. It is either listed (all its parameters are known) or fitted (they are too many, and
are read off the demonstrations); a fitted family stands only last. Every family is closed under recolouring: with a
permutation of 1..9 before and its inverse after, a rule is again one of its family. A permutation as the first of two
stages would therefore be no new rule, and colours that a task does not show are interchangeable.
The `pattern` family is the Pattern task of "Searching Latent Program Spaces" (Macfarlane and Bonnet, 2024).
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np

from dataset.augment import dihedral, random_colours
from dataset.task import NUM_COLOURS
from utils.errors import UserError

COLOURS = range(1, NUM_COLOURS)
DIRECTIONS = ("right", "down", "left", "up")  # that many quarter turns, counter-clockwise, make it point to the right
SYMMETRIES = ("", "turn left", "turn twice", "turn right", "mirror", "flip", "transpose", "transpose other")
FILLS = ("enclosed", "rows", "columns")
COUNTS = ("keep most", "keep least", "paint most", "paint least", "bar")
PROPERTIES = ("corner", "left heavy", "odd")
BRANCHES = (2, 4, 5)  # the symmetries that keep a grid's shape
MAX_SHIFT = 2
PROBES = 16
FOREIGN_COLOURS = 2

Stages = tuple[str, ...]
Rule = tuple[tuple[str, tuple[int, ...]], ...]


# --- What the families do: parameters (P, d) and grids (N, R, C) uint8 -> (P, N, R, C) uint8 ---


def _column(values: np.ndarray) -> np.ndarray:
    return values.astype(np.uint8)[:, None, None, None]


def _geometry(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    return np.stack([dihedral(grids, index) for index in parameters[:, 0]])


def _recolour(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    return np.where(grids == _column(parameters[:, 0]), _column(parameters[:, 1]), grids)


def _colour_permutation(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    return parameters.astype(np.uint8)[:, grids]


def _shift(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    count, rows, columns = grids.shape
    row = (np.arange(rows) - parameters[:, :1]) % rows
    column = (np.arange(columns) - parameters[:, 1:]) % columns
    return grids.reshape(count, -1)[:, row[:, :, None] * columns + column[:, None, :]].swapaxes(0, 1)


def _gravity(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    def fall(turns: int) -> np.ndarray:
        turned = np.rot90(grids, turns, axes=(-2, -1))
        order = (turned > 0).argsort(axis=-1, kind="stable")
        return np.rot90(np.take_along_axis(turned, order, axis=-1), -turns, axes=(-2, -1))

    return np.stack([fall(turns) for turns in parameters[:, 0]])


def _move(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """All cells of a colour as one rigid body, until the border or another colour stops it, or at most one step."""
    count, rows, columns = grids.shape
    colour, turns, one_step = parameters[:, :1].astype(np.uint8), parameters[:, 1], parameters[:, 2:] == 1
    side = max(rows, columns)
    square = np.full((count, side, side), NUM_COLOURS, np.uint8)  # what is outside the grid stops a body as another colour does
    square[:, :rows, :columns] = grids
    turned = np.stack([np.rot90(square, i, axes=(-2, -1)) for i in range(len(DIRECTIONS))])[turns]  # (P, N, S, S)
    turned = np.ascontiguousarray(turned.transpose(2, 3, 0, 1))  # (S, S, P, N): long inner loops
    body = turned == colour
    others = (turned > 0) & ~body
    place, free = body, np.ones((len(parameters), count), bool)
    for _ in range(1, side):
        ahead = np.zeros_like(place)
        ahead[:, 1:] = place[:, :-1]
        free = free & ~(ahead & others).any(axis=(0, 1)) & ~place[:, -1].any(axis=0)
        place = np.where(free, ahead, place)
        free &= ~one_step
    moved = np.where(place, colour, np.where(body, np.uint8(0), turned)).transpose(2, 3, 0, 1)
    result = np.empty((len(parameters), *grids.shape), np.uint8)
    for i in np.unique(turns):
        result[turns == i] = np.rot90(moved[turns == i], -i, axes=(-2, -1))[..., :rows, :columns]
    return result


def _fill(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    kind, colour = parameters[:, 0], _column(parameters[:, 1])
    background = grids == 0
    area = np.empty((len(parameters), *grids.shape), bool)
    if (kind == FILLS.index("enclosed")).any():
        area[kind == FILLS.index("enclosed")] = ~_reached_from_outside(background)
    marked = grids == colour
    for name, axis in (("rows", -1), ("columns", -2)):
        area[kind == FILLS.index(name)] = marked[kind == FILLS.index(name)].any(axis=axis, keepdims=True)
    return np.where(area & background, colour, grids)


def _reached_from_outside(background: np.ndarray) -> np.ndarray:
    """The background cells (N, R, C) that steps over edges through the background join to the border."""
    inside = np.zeros(np.array(background.shape) + (0, 2, 2), bool)
    inside[:, 1:-1, 1:-1] = True
    passable = ~inside
    passable[:, 1:-1, 1:-1] = background
    reached = ~inside
    while True:
        grown = reached.copy()
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown[:, :, 1:] |= reached[:, :, :-1]
        grown[:, :, :-1] |= reached[:, :, 1:]
        grown &= passable
        if np.array_equal(grown, reached):
            return reached[:, 1:-1, 1:-1]
        reached = grown


def _count(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    number, cells = len(grids), grids.reshape(len(grids), -1)
    counts = np.zeros((number, NUM_COLOURS), np.int64)
    np.add.at(counts, (np.arange(number)[:, None], cells), 1)
    counts[:, 0] = 0
    extremes = {"most": counts.max(axis=1), "least": np.where(counts > 0, counts, cells.shape[1]).min(axis=1)}
    images = []
    for kind in COUNTS[:-1]:
        action, extreme = kind.split()
        chosen = (counts == extremes[extreme][:, None]) & (counts > 0)  # (N, 10)
        if action == "keep":
            images.append(cells * np.take_along_axis(chosen, cells.astype(np.int64), axis=1))
        else:
            paint = np.where(chosen.sum(axis=1) == 1, chosen.argmax(axis=1), 0)[:, None]
            images.append(np.where((cells > 0) & (paint > 0), paint, cells))
    kind, colour = parameters.T
    bars = np.where(np.arange(cells.shape[1]) < counts.T[colour][:, :, None], colour[:, None, None], 0)
    images.append(np.zeros_like(cells))
    result = np.where((kind < len(COUNTS) - 1)[:, None, None], np.stack(images)[kind], bars).astype(np.uint8)
    return result.reshape(len(parameters), *grids.shape)


def _conditional(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    coloured, half = grids > 0, grids.shape[2] // 2
    left, right = (side.sum(axis=(1, 2)) for side in (coloured[:, :, :half], coloured[:, :, grids.shape[2] - half :]))
    holds = np.stack([coloured[:, 0, 0], left > right, coloured.sum(axis=(1, 2)) % 2 == 1])
    images = np.stack([dihedral(grids, index) for index in BRANCHES])
    kind, then, otherwise = parameters.T
    return np.where(holds[kind][:, :, None, None], images[then], images[otherwise])


def _large_objects(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    """Objects: cells of one colour joined over edges. Larger than one: has a neighbour; than two: so has a neighbour of it."""
    rows, columns = grids.shape[1:]
    framed = np.pad(grids, ((0, 0), (1, 1), (1, 1)))
    steps = ((0, 1), (2, 1), (1, 0), (1, 2))
    joined = [(framed[:, r : r + rows, c : c + columns] == grids) & (grids > 0) for r, c in steps]
    neighbours = np.sum(joined, axis=0)
    middle = np.pad(neighbours > 1, ((0, 0), (1, 1), (1, 1)))
    beside = [near & middle[:, r : r + rows, c : c + columns] for near, (r, c) in zip(joined, steps, strict=True)]
    larger = np.stack([neighbours > 0, (neighbours > 1) | np.any(beside, axis=0)])
    return np.where(larger[parameters[:, 0] - 1], _column(parameters[:, 1]), grids)


def _pattern(parameters: np.ndarray, grids: np.ndarray) -> np.ndarray:
    part = _pattern_part(grids == _column(parameters[:, 0]))
    cells = np.take_along_axis(parameters[:, 1:], np.maximum(part, 0).reshape(len(parameters), -1), axis=1)
    return np.where(part < 0, grids, cells.reshape(part.shape)).astype(np.uint8)


def _pattern_part(marked: np.ndarray) -> np.ndarray:
    """Which cell 0..8 of a 3x3 pattern around the marked cells covers each cell of (..., R, C), -1 for none.

    Where two patterns overlap, that of the later marker in reading order is on top.
    """
    part = np.full(marked.shape, -1, np.int8)
    for index in reversed(range(9)):
        np.copyto(part, index, where=_moved(marked, index // 3 - 1, index % 3 - 1))
    return part


def _moved(marked: np.ndarray, down: int, right: int) -> np.ndarray:
    """`marked` (..., R, C) bool moved by -1, 0 or 1 cells each way, nothing where it comes in from the border."""
    rows, columns = marked.shape[-2:]
    framed = np.zeros((*marked.shape[:-2], rows + 2, columns + 2), bool)
    framed[..., 1:-1, 1:-1] = marked
    return framed[..., 1 - down : 1 - down + rows, 1 - right : 1 - right + columns]


# --- Fitting a family as the last stage ---
# images (U, K + Q, R, C) of a first stage and answers (K + Q, R, C), K demonstrations before Q queries -> fits (U,): does a rule
# of the family explain all demonstrations; agrees (U, Q): does every such rule give the query's answer.


def _read_table(keys: np.ndarray, answers: np.ndarray, demonstrations: int, size: int) -> np.ndarray:
    """seen (U, size, 10) bool: which colours the demonstrations' answers show where keys (U, K + Q, R, C) have a value."""
    count = len(keys)
    seen = np.zeros((count, size * NUM_COLOURS), bool)
    codes = keys[:, :demonstrations] * np.uint8(NUM_COLOURS) + answers[:demonstrations]
    seen[np.arange(count)[:, None, None, None], codes] = True
    return seen.reshape(count, size, NUM_COLOURS)


def _look_up(seen: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The colour that `seen` (U, size, 10) tells for each of keys (U, ...), and NUM_COLOURS, no colour, where it tells none."""
    table = np.where(seen.any(axis=2), seen.argmax(axis=2), NUM_COLOURS)
    return table[np.arange(len(keys))[:, None, None, None], keys]


def _fit_colour_permutation(images: np.ndarray, answers: np.ndarray, demonstrations: int) -> tuple[np.ndarray, np.ndarray]:
    seen = _read_table(images, answers, demonstrations, NUM_COLOURS)
    seen[:, 0, 0] = True
    fits = (seen.sum(axis=1) <= 1).all(axis=1) & (seen.sum(axis=2) <= 1).all(axis=1)
    sources, targets = seen.any(axis=2), seen.any(axis=1)
    all_but_one = fits & (sources.sum(axis=1) == NUM_COLOURS - 1)  # the last colour has one place left
    seen[all_but_one, sources[all_but_one].argmin(axis=1), targets[all_but_one].argmin(axis=1)] = True
    return fits, (_look_up(seen, images[:, demonstrations:]) == answers[demonstrations:]).all(axis=(2, 3))


def _fit_pattern(images: np.ndarray, answers: np.ndarray, demonstrations: int) -> tuple[np.ndarray, np.ndarray]:
    fits_any = np.zeros(len(images), bool)
    agrees_all = np.ones((len(images), len(answers) - demonstrations), bool)
    shown = np.flatnonzero(np.bincount(images.reshape(-1), minlength=NUM_COLOURS)[1:]) + 1
    marked = images[:, 0] == _column(shown)  # (markers, U, R, C)
    wide = marked | _moved(marked, 0, 1) | _moved(marked, 0, -1)
    near = wide | _moved(wide, 1, 0) | _moved(wide, -1, 0)
    markers, rows = np.nonzero((near | (images[:, 0] == answers[0])).all(axis=(2, 3)))
    part = _pattern_part(images[rows] == _column(shown[markers]))
    outside = part < 0
    keys = np.where(outside, 9, part).astype(np.uint8)
    seen = _read_table(keys, answers, demonstrations, 10)[:, :9]
    right = np.where(outside, images[rows] == answers, _look_up(seen, np.minimum(keys, 8)) == answers).all(axis=(2, 3))
    fits = right[:, :demonstrations].all(axis=1) & (seen.sum(axis=2) <= 1).all(axis=1)
    np.logical_or.at(fits_any, rows, fits)
    np.logical_and.at(agrees_all, rows, right[:, demonstrations:] | ~fits[:, None])
    return fits_any, agrees_all


def _may_become(images: np.ndarray, answer: np.ndarray) -> dict[str, np.ndarray]:
    """Which images (U, R, C) a rule that keeps this or that (`Family.keeps`) may turn into the answer (R', C')."""
    count = len(images)
    cells, wanted = images.reshape(count, -1), answer.reshape(-1)
    may = {"": np.ones(count, bool), "histogram": (np.sort(cells) == np.sort(wanted)).all(axis=1)}
    if images.shape[1:] != answer.shape:
        return may | dict.fromkeys(("background", "coloured cells", "other colours"), np.zeros(count, bool))
    same = cells == wanted
    highest = np.where(same, 0, np.maximum(cells, wanted)).max(axis=1, keepdims=True)  # the colour that changed, if only one did
    return may | {
        "background": ((cells == 0) == (wanted == 0)).all(axis=1),
        "coloured cells": (same | (cells == 0)).all(axis=1),
        "other colours": may["histogram"] & (same | (cells == 0) & (wanted == highest) | (cells == highest) & (wanted == 0)).all(axis=1),
    }


# --- The table ---


@dataclass(frozen=True)
class Family:
    """A kind of rule. `blocks` lists the parameters of a listed family, (P, d) int64 each, so that the images of one block
    have one shape; a fitted family has `draw` and `fit` instead. The columns `colours` hold colours (0 stands for none).
    `inputs` names the styles of grids that suit it, `keeps` what every rule of it leaves as it is (see `_may_become`).
    """

    apply: Callable[[np.ndarray, np.ndarray], np.ndarray]
    describe: Callable[..., str]
    inputs: tuple[str, ...]
    keeps: str = ""
    colours: tuple[int, ...] = ()
    blocks: tuple[np.ndarray, ...] = ()
    draw: Callable[[np.random.Generator], np.ndarray] | None = None
    fit: Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]] | None = None


def _block(rows: Iterable[tuple[int, ...]]) -> np.ndarray:
    return np.array(list(rows), np.int64)


FAMILIES: dict[str, Family] = {
    "geometry": Family(
        _geometry,
        lambda index: SYMMETRIES[index],
        inputs=("noise", "objects"),
        keeps="histogram",
        blocks=(_block((i,) for i in (2, 4, 5)), _block((i,) for i in (1, 3, 6, 7))),
    ),
    "colour_permutation": Family(
        _colour_permutation,
        lambda *colours: "".join(map(str, colours)),
        inputs=("all colours",),
        keeps="background",
        draw=lambda rng: random_colours(rng, 1)[0],
        fit=_fit_colour_permutation,
    ),
    "recolour": Family(
        _recolour,
        lambda source, target: f"{source}->{target}",
        inputs=("noise", "objects"),
        keeps="background",
        colours=(0, 1),
        blocks=(_block((a, b) for a in COLOURS for b in COLOURS if a != b),),
    ),
    "gravity": Family(
        _gravity,
        lambda turns: DIRECTIONS[turns],
        inputs=("noise", "objects"),
        keeps="histogram",
        blocks=(_block((turns,) for turns in range(4)),),
    ),
    "shift": Family(
        _shift,
        lambda rows, columns: f"{rows:+d},{columns:+d}",
        inputs=("noise", "objects"),
        keeps="histogram",
        blocks=(_block((r, c) for r in range(-MAX_SHIFT, MAX_SHIFT + 1) for c in range(-MAX_SHIFT, MAX_SHIFT + 1) if r or c),),
    ),
    "fill": Family(
        _fill,
        lambda kind, colour: f"{FILLS[kind]} {colour}",
        inputs=("sparse", "frames"),
        keeps="coloured cells",
        colours=(1,),
        blocks=(_block((kind, c) for kind in range(len(FILLS)) for c in COLOURS),),
    ),
    "move": Family(
        _move,
        lambda colour, turns, steps: f"{colour} {DIRECTIONS[turns]} {'one step' if steps else 'until blocked'}",
        inputs=("objects", "sparse"),
        keeps="other colours",
        colours=(0,),
        blocks=(_block((c, turns, steps) for c in COLOURS for turns in range(4) for steps in (0, 1)),),
    ),
    "count": Family(
        _count,
        lambda kind, colour: f"{COUNTS[kind]} {colour}" if colour else COUNTS[kind],
        inputs=("noise", "objects"),
        colours=(1,),
        blocks=(_block([(kind, 0) for kind in range(len(COUNTS) - 1)] + [(len(COUNTS) - 1, c) for c in COLOURS]),),
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
        keeps="histogram",
        blocks=(_block((kind, a, b) for kind in range(len(PROPERTIES)) for a in range(3) for b in range(3) if a != b),),
    ),
    "large_objects": Family(
        _large_objects,
        lambda size, colour: f"larger than {size}: {colour}",
        inputs=("noise", "objects"),
        keeps="background",
        colours=(1,),
        blocks=(_block((size, c) for size in (1, 2) for c in COLOURS),),
    ),
}


# --- Rules ---


def apply(rule: Rule, grids: np.ndarray) -> np.ndarray:
    """`rule` on grids (N, R, C) uint8; a transposing rule returns (N, C, R)."""
    for name, values in rule:
        grids = FAMILIES[name].apply(np.array([values]), grids)[0]
    return grids


def describe(rule: Rule) -> str:
    """A readable name, such as `gravity(down) > recolour(3->5)`."""
    return " > ".join(f"{name}({FAMILIES[name].describe(*values)})" for name, values in rule)


def stages_of(rule: Rule) -> Stages:
    """The families of its stages."""
    return tuple(name for name, _ in rule)


def colours_of(rule: Rule) -> list[int]:
    """The colours that a rule names, those of its last stage first."""
    named = [values[column] for name, values in reversed(rule) for column in FAMILIES[name].colours]
    return list(dict.fromkeys(int(colour) for colour in named if colour))


# --- Grids to ask about ---


def draw_inputs(rng: np.random.Generator, rule: Rule, demonstrations: int, queries: int, shape: tuple[int, int]) -> np.ndarray:
    """(demonstrations + queries, rows, columns) inputs in a style that suits the rule, with few colours, the rule's among them.

    The queries show no colour that the demonstrations do not.
    """
    styles = sorted({style for name in stages_of(rule) for style in FAMILIES[name].inputs})
    style = styles[rng.integers(len(styles))]
    named = colours_of(rule)
    others = [int(colour) for colour in rng.permutation(COLOURS) if colour not in named]
    palette = np.array(named + others, np.uint8)[: NUM_COLOURS if style == "all colours" else max(len(named) + 1, 2 + rng.integers(4))]
    grids = np.stack([_draw_grid(rng, style, palette, shape) for _ in range(demonstrations + queries)])
    shown = np.unique(grids[:demonstrations])
    shown = shown[shown > 0]
    known = np.arange(NUM_COLOURS, dtype=np.uint8)
    known[1:] = [colour if colour in shown or not len(shown) else rng.choice(shown) for colour in COLOURS]
    grids[demonstrations:] = known[grids[demonstrations:]]
    return grids


def _draw_grid(rng: np.random.Generator, style: str, palette: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    density = {"noise": 0.5, "all colours": 0.5, "sparse": 0.2, "markers": 0.1}.get(style)
    if density is not None:
        cells = palette[1:] if style == "markers" and len(palette) > 1 else palette
        grid = (rng.choice(cells, shape) * (rng.random(shape) < density)).astype(np.uint8)
        if style == "markers":
            for marker in rng.integers(0, shape, (rng.integers(1, 3), 2)):
                near = grid[max(marker[0] - 2, 0) : marker[0] + 3, max(marker[1] - 2, 0) : marker[1] + 3]
                if not (near == palette[0]).any():  # patterns must not overlap
                    grid[tuple(marker)] = palette[0]
        return grid
    grid = np.zeros(shape, np.uint8)
    for colour in rng.permutation(palette)[: 2 + rng.integers(3)]:
        height, width = np.minimum(rng.integers(3 if style == "frames" else 1, 5 if style == "frames" else 4, 2), shape)
        top, left = rng.integers(0, (shape[0] - height + 1, shape[1] - width + 1))
        body = np.ones((height, width), bool)
        if style == "frames":
            body[1:-1, 1:-1] = False
        elif height > 1 and width > 1:
            body[rng.choice([0, -1]), rng.choice([0, -1])] = rng.random() < 0.5  # shapes other than rectangles
        grid[top : top + height, left : left + width][body] = colour
    return grid


# --- The library ---


class Library:
    """All rules of one stage, and of two stages if `stages` is 2, of some families on grids within a range of shapes.

    Rules that act alike on a fixed set of probe grids count as one, and rules that change none of them as none. Grids of one
    row or column keep their shape. Raises `UserError` for a family without a rule on such grids.
    """

    def __init__(self, families: list[str], stages: int, rows: tuple[int, int], columns: tuple[int, int]):
        self.stages = stages
        shapes = sorted({(rows[0], columns[0]), (rows[1], columns[1])})
        keep_shape = 1 in (rows[1], columns[1])
        rng = np.random.default_rng(0)
        rule: Rule = ()
        palette = np.array(COLOURS, np.uint8)
        styles = sorted({style for family in FAMILIES.values() for style in family.inputs})
        self.probes = [
            np.stack([_draw_grid(rng, style, rng.permutation(palette), shape) for style in styles for _ in range(PROBES)])
            for shape in shapes
        ]
        known = {self.key(rule)}
        self.blocks: dict[str, list[np.ndarray]] = {}
        self.sizes: dict[str, int | None] = {}
        for name in families:
            self.blocks[name] = []
            for block in FAMILIES[name].blocks:
                own = []
                for values in block:
                    rule = ((name, tuple(values.tolist())),)
                    key = self.key(rule)
                    changes_shape = apply(rule, self.probes[-1]).shape != self.probes[-1].shape
                    if key not in known and not (keep_shape and changes_shape):
                        own.append(values)
                        known.add(key)
                if own:
                    self.blocks[name].append(np.stack(own))
            if FAMILIES[name].fit is None and not self.blocks[name]:
                raise UserError(f"family {name} has no rule of its own on {rows[0]}..{rows[1]} x {columns[0]}..{columns[1]} grids")
            self.sizes[name] = None if FAMILIES[name].fit else sum(map(len, self.blocks[name]))
        self.single_keys = frozenset(known)

    @property
    def families(self) -> list[str]:
        """The names of the families that take part."""
        return list(self.blocks)

    def key(self, rule: Rule) -> bytes:
        """Equal for rules that act alike on the probe grids."""
        digest = hashlib.sha256()
        for probes in self.probes:
            images = np.ascontiguousarray(apply(rule, probes))
            digest.update(bytes(images.shape[1:]) + images.tobytes())
        return digest.digest()

    def size(self, stages: Stages) -> float:
        """How many rules of these families there are, different descriptions of one rule included; infinite for fitted ones."""
        sizes = [self.sizes[name] for name in stages]
        return float("inf") if None in sizes else float(np.prod(sizes))

    def draw(self, rng: np.random.Generator, stages: Stages) -> Rule:
        """A random rule of these families."""

        def values(name: str) -> np.ndarray:
            if FAMILIES[name].draw is not None:
                return FAMILIES[name].draw(rng)
            return rng.choice(np.concatenate(self.blocks[name]))

        return tuple((name, tuple(values(name).tolist())) for name in stages)

    def rules(self, stages: Stages) -> list[Rule]:
        """Every rule of listed families."""
        rules: list[Rule] = [()]
        for name in stages:
            rules = [(*rule, (name, tuple(row.tolist()))) for rule in rules for block in self.blocks[name] for row in block]
        return rules

    def explanations(self, inputs: np.ndarray, outputs: np.ndarray, demonstrations: int, stages: int) -> tuple[set[Stages], np.ndarray]:
        """The families of all rules of `stages` stages that fit the demonstrations, and which queries all of them answer alike.

        inputs and outputs (K + Q, rows, columns) uint8, the K demonstrations before the Q queries; returns a set and (Q,) bool.
        Colours shown nowhere are represented by two of them: which of them a rule names makes no difference to what it does here.
        """
        shown = set(np.unique(inputs).tolist()) | set(np.unique(outputs).tolist()) | {0}
        foreign = [colour for colour in COLOURS if colour not in shown][:FOREIGN_COLOURS]
        blocks = self._blocks_of(frozenset([*shown, *foreign]))
        found: set[Stages] = set()
        determined = np.ones(len(inputs) - demonstrations, bool)
        for origins, images in _distinct_images(inputs, blocks if stages == 2 else None):
            first, group = _distinct(images[:, 0])
            possible = _may_become(first, outputs[0])
            for name, listed in blocks.items():
                family = FAMILIES[name]
                candidates = np.flatnonzero(possible[family.keeps])
                if not len(candidates):
                    continue
                if family.fit is None:
                    rows, fits, agrees = _fit_listed(family.apply, listed, first, candidates, group, images, outputs, demonstrations)
                elif images.shape[2:] == outputs.shape[1:]:
                    rows = np.flatnonzero(possible[family.keeps][group])
                    fits, agrees = family.fit(images[rows], outputs, demonstrations)
                else:
                    continue
                determined &= (agrees | ~fits[:, None]).all(axis=0)
                found.update((*origin, name) for row in rows[fits] for origin in origins[row])
        return found, determined

    @cache  # noqa: B019 - a library lives as long as its process
    def _blocks_of(self, colours: frozenset[int]) -> dict[str, list[np.ndarray]]:
        allowed = list(colours)
        chosen = {
            name: [block[np.isin(block[:, list(FAMILIES[name].colours)], allowed).all(axis=1)] for block in blocks]
            for name, blocks in self.blocks.items()
        }
        return {name: [block for block in blocks if len(block)] for name, blocks in chosen.items()}


def _distinct_images(inputs: np.ndarray, blocks: dict[str, list[np.ndarray]] | None) -> Iterable[tuple[list[set[Stages]], np.ndarray]]:
    """The different images (U, N, R, C) of `inputs` under all listed first stages, a stack per shape, and the families that
    make each. Without `blocks`: the inputs themselves, made by no stage.
    """
    if blocks is None:
        yield [{()}], inputs[None]
        return
    by_shape: dict[tuple[int, ...], tuple[dict[bytes, int], list[set[Stages]], list[np.ndarray]]] = {}
    for name, listed in blocks.items():
        for block in listed:
            images = np.ascontiguousarray(FAMILIES[name].apply(block, inputs))
            index, origins, kept = by_shape.setdefault(images.shape[2:], ({}, [], []))
            for image in images:
                row = index.setdefault(image.tobytes(), len(kept))
                if row == len(kept):
                    kept.append(image)
                    origins.append(set())
                origins[row].add((name,))
    for _, origins, kept in by_shape.values():
        yield origins, np.stack(kept)


def _distinct(grids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different grids (G, R, C) of `grids` (U, R, C), and which of them each one is, (U,)."""
    index: dict[bytes, int] = {}
    group = np.array([index.setdefault(grid.tobytes(), len(index)) for grid in grids])
    return np.frombuffer(b"".join(index), np.uint8).reshape(-1, *grids.shape[1:]), group


def _fit_listed(
    function: Callable[[np.ndarray, np.ndarray], np.ndarray],
    blocks: list[np.ndarray],
    first: np.ndarray,
    candidates: np.ndarray,
    group: np.ndarray,
    images: np.ndarray,
    answers: np.ndarray,
    demonstrations: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of images, and for them what a family's `fit` gives. images[u, 0] is first[group[u]]; of `first`, only `candidates`
    can fit. The first demonstration rules out nearly all parameters.
    """
    fits_any = np.zeros(len(images), bool)
    agrees_all = np.ones((len(images), len(answers) - demonstrations), bool)
    for block in blocks:
        outputs = function(block, first[candidates])  # (P, G, R, C)
        if outputs.shape[2:] != answers.shape[1:]:
            continue
        match = (outputs == answers[0]).reshape(*outputs.shape[:2], -1).all(axis=2)
        for column in np.flatnonzero(match.any(axis=0)):
            rows = np.flatnonzero(group == candidates[column])
            outputs = function(block[match[:, column]], images[rows].reshape(-1, *images.shape[2:]))
            equal = (outputs.reshape(-1, len(rows), len(answers), answers[0].size) == answers.reshape(len(answers), -1)).all(axis=3)
            fits = equal[:, :, :demonstrations].all(axis=2)  # (P, U)
            fits_any[rows] |= fits.any(axis=0)
            agrees_all[rows] &= (equal[:, :, demonstrations:] | ~fits[:, :, None]).all(axis=0)
    rows = np.flatnonzero(fits_any)
    return rows, fits_any[rows], agrees_all[rows]
