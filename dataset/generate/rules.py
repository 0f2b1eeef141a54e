"""Rules on small grids, and the check that a task's demonstrations determine its answer.

A rule is one stage or two, each a family of `dataset.generate.rule_families` and its parameters: `gravity(down) > recolour(3->5)`.
Nothing here knows any of the families: one that is added there takes part in every draw and every check.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from dataset.generate.rule_families import COLOURS, FAMILIES, Family, may_become
from dataset.task import NUM_COLOURS
from utils.errors import UserError

PROBES = 16
FOREIGN_COLOURS = 2
MAX_OBJECTS = 4
CELLS_AT_ONCE = 2**14

Stages = tuple[str, ...]
Rule = tuple[tuple[str, tuple[int, ...]], ...]
Case = tuple[np.ndarray, np.ndarray]


def apply(rule: Rule, grids: np.ndarray) -> np.ndarray:
    """`rule` on grids (N, R, C) uint8; a transposing rule returns (N, C, R)."""
    for name, values in rule:
        grids = FAMILIES[name].apply(np.array([values]), grids[None])[0]
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


def draw_inputs(
    rng: np.random.Generator, rule: Rule, demonstrations: int, queries: int, shape: tuple[int, int]
) -> np.ndarray:
    """(demonstrations + queries, rows, columns) inputs in a style that suits the rule, with few colours, the rule's among them.

    The queries show no colour that the demonstrations do not.
    """
    styles = sorted({style for name in stages_of(rule) for style in FAMILIES[name].inputs})
    style = styles[rng.integers(len(styles))]
    named = colours_of(rule)
    others = [colour for colour in rng.permutation(COLOURS).tolist() if colour not in named]
    palette = np.array(named + others, np.uint8)[
        : NUM_COLOURS if style == "all colours" else max(len(named) + 1, 2 + rng.integers(4))
    ]
    grids = _draw_grids(rng, style, palette, demonstrations + queries, shape)
    shown = np.bincount(grids[:demonstrations].ravel(), minlength=NUM_COLOURS) > 0
    shown[0] = False
    if shown.any():
        known = np.where(
            shown, np.arange(NUM_COLOURS), rng.choice(np.flatnonzero(shown), NUM_COLOURS)
        ).astype(np.uint8)
        known[0] = 0
        grids[demonstrations:] = known[grids[demonstrations:]]
    return grids


def _draw_grids(
    rng: np.random.Generator, style: str, palette: np.ndarray, count: int, shape: tuple[int, int]
) -> np.ndarray:
    density = {"noise": 0.5, "all colours": 0.5, "sparse": 0.2, "markers": 0.1}.get(style)
    if density is None:
        return _draw_objects(rng, style == "frames", palette, count, shape)
    cells = palette[1:] if style == "markers" and len(palette) > 1 else palette
    grids = cells[rng.integers(len(cells), size=(count, *shape))] * (rng.random((count, *shape)) < density)
    if style == "markers":
        for grid in grids:
            for row, column in rng.integers(0, shape, (rng.integers(1, 3), 2)).tolist():
                near = grid[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]
                if not (near == palette[0]).any():  # patterns must not overlap
                    grid[row, column] = palette[0]
    return grids


def _draw_objects(
    rng: np.random.Generator, hollow: bool, palette: np.ndarray, count: int, shape: tuple[int, int]
) -> np.ndarray:
    """Two to four rectangles, or frames if `hollow`, of different colours on each of `count` grids, the later ones on top."""
    colours = rng.permuted(np.tile(palette, (count, 1)), axis=1)[:, :MAX_OBJECTS]
    extent = np.minimum(rng.integers(3 if hollow else 1, 5 if hollow else 4, (*colours.shape, 2)), shape)
    place = rng.integers(0, np.array(shape) - extent + 1)
    last = extent - 1
    at = [
        np.arange(side) - place[..., axis, None] for axis, side in enumerate(shape)
    ]  # (count, objects, side): 0 is the first cell

    def where(inside: Sequence[np.ndarray], either: bool = False) -> np.ndarray:
        rows, columns = inside[0][..., :, None], inside[1][..., None, :]
        return rows | columns if either else rows & columns

    bodies = where([(at[axis] >= 0) & (at[axis] <= last[..., axis, None]) for axis in (0, 1)])
    if hollow:
        bodies &= where(
            [(at[axis] == 0) | (at[axis] == last[..., axis, None]) for axis in (0, 1)], either=True
        )
    else:  # shapes other than rectangles: a corner may be missing
        corner = rng.integers(0, 2, extent.shape) * last
        missing = (extent > 1).all(axis=2) & (rng.random(colours.shape) < 0.5)
        bodies &= ~(
            where([at[axis] == corner[..., axis, None] for axis in (0, 1)]) & missing[..., None, None]
        )
    bodies &= (np.arange(colours.shape[1]) < rng.integers(2, MAX_OBJECTS + 1, (count, 1)))[..., None, None]
    grids = np.zeros((count, *shape), np.uint8)
    for number in range(colours.shape[1]):
        grids = np.where(bodies[:, number], colours[:, number, None, None], grids)
    return grids


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
        palette = np.array(COLOURS, np.uint8)
        styles = sorted({style for family in FAMILIES.values() for style in family.inputs})
        self.probes = [
            np.concatenate(
                [_draw_grids(rng, style, rng.permutation(palette), PROBES, shape) for style in styles]
            )
            for shape in shapes
        ]
        known = {self.key(())}
        self.blocks: dict[str, list[np.ndarray]] = {}
        self.sizes: dict[str, int | None] = {}
        for name in families:
            self.blocks[name] = []
            for block in FAMILIES[name].blocks:
                images = [FAMILIES[name].apply(block, probes[None]) for probes in self.probes]
                if keep_shape and images[-1].shape[1:] != self.probes[-1].shape:
                    continue
                new = []
                for number, key in enumerate(map(_digest, zip(*images, strict=True))):
                    if key not in known:
                        new.append(number)
                        known.add(key)
                if new:
                    self.blocks[name].append(block[new])
            if FAMILIES[name].fit is None and not self.blocks[name]:
                raise UserError(
                    f"family {name} has no rule of its own on {rows[0]}..{rows[1]} x {columns[0]}..{columns[1]} grids"
                )
            self.sizes[name] = None if FAMILIES[name].fit else sum(map(len, self.blocks[name]))
        self.single_keys = frozenset(known)

    @property
    def families(self) -> list[str]:
        """The names of the families that take part."""
        return list(self.blocks)

    @lru_cache(2**12)  # noqa: B019 - a library lives as long as its process
    def key(self, rule: Rule) -> bytes:
        """Equal for rules that act alike on the probe grids."""
        return _digest(apply(rule, probes) for probes in self.probes)

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
            rules = [
                (*rule, (name, tuple(row.tolist())))
                for rule in rules
                for block in self.blocks[name]
                for row in block
            ]
        return rules

    def explanations(
        self, cases: list[Case], demonstrations: int, stages: int
    ) -> list[tuple[set[Stages], np.ndarray]]:
        """Of each case the families of all rules of `stages` stages that fit its demonstrations, and which queries all of them
        answer alike.

        A case is inputs (K + Q, rows, columns) and outputs uint8, the K demonstrations before the Q queries; its part of the
        result is a set and (Q,) bool. Cases of one shape are looked at together, in the order of how many colours they show.
        """
        by_shape: dict[tuple, list[int]] = {}
        for number, (inputs, outputs) in enumerate(cases):
            by_shape.setdefault((inputs.shape, outputs.shape), []).append(number)
        found: list[tuple[set[Stages], np.ndarray] | None] = [None] * len(cases)
        for (shape, _), numbers in by_shape.items():
            inputs, outputs, colours = _renumbered(
                *(np.stack([cases[i][role] for i in numbers]) for role in (0, 1))
            )
            order = colours.argsort(kind="stable")
            at_once = max(1, CELLS_AT_ONCE // int(np.prod(shape)))
            for part in (order[start : start + at_once] for start in range(0, len(order), at_once)):
                blocks = self._blocks_of(min(int(colours[part].max()) + FOREIGN_COLOURS, NUM_COLOURS - 1))
                families, determined = _explain(inputs[part], outputs[part], demonstrations, blocks, stages)
                for i, *result in zip(part, families, determined, strict=True):
                    found[numbers[i]] = tuple(result)
        return found

    @cache  # noqa: B019 - the same
    def _blocks_of(self, colours: int) -> dict[str, list[np.ndarray]]:
        """The rules that name colours up to this one."""
        chosen = {
            name: [block[(block[:, list(FAMILIES[name].colours)] <= colours).all(axis=1)] for block in blocks]
            for name, blocks in self.blocks.items()
        }
        return {name: [block for block in blocks if len(block)] for name, blocks in chosen.items()}


def _digest(images: Iterable[np.ndarray]) -> bytes:
    digest = hashlib.sha256()
    for image in images:
        digest.update(bytes(image.shape[1:]) + image.tobytes())
    return digest.digest()


# --- The check, for tasks of one shape at a time: T tasks of N = K + Q pairs ---


@dataclass(frozen=True)
class _Images:
    """The different images (U, N, R, C) of one shape that first stages make of inputs: of which task (U,), made by which stages,
    and which of the different first demonstrations they have, (U,), of `first` (G,), which are indices of images.
    """

    grids: np.ndarray
    task: np.ndarray
    origins: list[set[Stages]]
    first: np.ndarray
    group: np.ndarray


def _renumbered(inputs: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """inputs and outputs (T, N, ., .) with the c colours 1..9 that a task shows made 1..c, and c (T,): it makes no difference to
    how rules explain it. Of the colours shown nowhere two are enough to stand for all.
    """
    count = len(inputs)
    shown = np.zeros((count, NUM_COLOURS), bool)
    shown[:, 0] = True
    for grids in (inputs, outputs):
        shown[np.arange(count)[:, None, None, None], grids] = True
    number = (~shown).argsort(axis=1, kind="stable").argsort(axis=1).astype(np.uint8)
    return *(number[np.arange(count)[:, None, None, None], grids] for grids in (inputs, outputs)), shown.sum(
        axis=1
    ) - 1


def _explain(
    inputs: np.ndarray,
    outputs: np.ndarray,
    demonstrations: int,
    blocks: dict[str, list[np.ndarray]],
    stages: int,
) -> tuple[list[set[Stages]], np.ndarray]:
    """The families of all rules of `blocks` that explain each task, and the queries (T, Q) that all of them answer alike."""
    found: list[set[Stages]] = [set() for _ in inputs]
    determined = np.ones((len(inputs), inputs.shape[1] - demonstrations), bool)
    for images in _first_stages(inputs, blocks if stages == 2 else None):
        may = may_become(images.grids[images.first, 0], outputs[images.task[images.first], 0])
        for name, listed in blocks.items():
            family = FAMILIES[name]
            possible = np.logical_and.reduce(
                [np.ones(len(images.first), bool), *(may[kept] for kept in family.keeps)]
            )
            if not possible.any():
                continue
            for rows, agrees in _last_stages(family, listed, images, possible, outputs, demonstrations):
                np.logical_and.at(determined, images.task[rows], agrees)
                for row in set(rows.tolist()):
                    found[images.task[row]].update((*origin, name) for origin in images.origins[row])
    return found, determined


def _first_stages(inputs: np.ndarray, blocks: dict[str, list[np.ndarray]] | None) -> Iterator[_Images]:
    """The different images of inputs (T, N, R, C) under all listed first stages; without `blocks` the inputs themselves."""
    count = len(inputs)
    by_shape: dict[tuple[int, ...], list[tuple[Stages, np.ndarray]]] = {}
    if blocks is None:
        by_shape[inputs.shape[2:]] = [((), inputs[None])]
    else:
        for name, listed in blocks.items():
            for block in listed:
                images = FAMILIES[name].apply(block, inputs.reshape(1, -1, *inputs.shape[2:]))
                by_shape.setdefault(images.shape[2:], []).append(((name,), images))
    for shape, made in by_shape.items():
        grids = np.concatenate([images.reshape(-1, inputs.shape[1], *shape) for _, images in made])
        task = np.tile(np.arange(count), len(grids) // count)
        rows, number = _distinct(task, grids)
        origins: list[set[Stages]] = [set() for _ in rows]
        start = 0
        for stages, images in made:
            stop = start + images.size // grids[0].size
            for i in number[start:stop].tolist():
                origins[i].add(stages)
            start = stop
        grids, task = grids[rows], task[rows]
        yield _Images(grids, task, origins, *_distinct(task, grids[:, 0]))


def _distinct(task: np.ndarray, grids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the different (task, grids) of task (U,) and grids (U, ...), and which of these each one is, (U,)."""
    data, size = grids.tobytes(), grids[0].size
    index: dict[tuple[int, bytes], int] = {}
    number = [
        index.setdefault((t, data[i * size : (i + 1) * size]), len(index))
        for i, t in enumerate(task.tolist())
    ]
    return np.unique(number, return_index=True)[1], np.array(number)


def _last_stages(
    family: Family,
    blocks: list[np.ndarray],
    images: _Images,
    possible: np.ndarray,
    outputs: np.ndarray,
    demonstrations: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The images from which a rule of the family explains all demonstrations, (F,), and which queries it answers, (F, Q). Only
    the groups that are `possible` (G,) can; the first demonstration rules out nearly all parameters.
    """
    first = images.first[possible]
    wanted = outputs[images.task[first], 0]
    if family.fit is not None:
        if images.grids.shape[2:] == outputs.shape[2:]:
            possible = possible.copy()
            possible[possible], _ = family.fit(images.grids[first, :1], wanted[:, None], 1)
            rows = np.flatnonzero(possible[images.group])
            fits, agrees = family.fit(images.grids[rows], outputs[images.task[rows]], demonstrations)
            yield rows[fits], agrees[fits]
        return
    rows = np.flatnonzero(possible[images.group])
    group = (possible.cumsum() - 1)[images.group[rows]]
    for block in blocks:
        made = family.apply(block, images.grids[first, 0][None])  # (P, G, R, C)
        if made.shape[2:] != wanted.shape[1:]:
            continue
        match = (made == wanted).reshape(*made.shape[:2], -1).all(axis=2)
        chosen, at = np.nonzero(match[:, group])
        found = rows[at]
        for number in range(1, demonstrations):
            fits = _equal(family, block[chosen], images, found, outputs, slice(number, number + 1))[:, 0]
            chosen, found = chosen[fits], found[fits]
        if len(found):
            yield found, _equal(family, block[chosen], images, found, outputs, slice(demonstrations, None))


def _equal(
    family: Family,
    parameters: np.ndarray,
    images: _Images,
    rows: np.ndarray,
    outputs: np.ndarray,
    pairs: slice,
) -> np.ndarray:
    """Which outputs of some pairs each of parameters (F, d) makes of its images `rows` (F,): (F, pairs)."""
    if not len(rows):
        return np.ones((0, 1), bool)
    return (family.apply(parameters, images.grids[rows, pairs]) == outputs[images.task[rows], pairs]).all(
        axis=(2, 3)
    )
