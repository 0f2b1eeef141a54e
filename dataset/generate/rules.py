"""Rules on small grids, and the check that a task's demonstrations determine its answer.

A rule is one stage or two, each a family of `rule_families` and its parameters. An example is
`gravity(down) > recolour(3->5)`. Nothing here knows any of the families. One that is added there takes part
in every draw and every check.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from dataset.generate.rule_families import FAMILIES, Family, may_become
from dataset.generate.rule_functions import COLOURS
from dataset.generate.rule_grids import draw_grids
from dataset.task import NUM_COLOURS
from utils.errors import UserError

PROBES = 16  # grids of each style and shape that tell rules apart
FOREIGN_COLOURS = 2  # stand for all colours that a task does not show
CELLS_AT_ONCE = 2**14  # cells of the cases that are explained together, to bound the memory

Stages = tuple[str, ...]  # names of families
Rule = tuple[tuple[str, tuple[int, ...]], ...]  # of each stage its family and parameters
Case = tuple[np.ndarray, np.ndarray]  # inputs and outputs of one task


def apply(rule: Rule, grids: np.ndarray) -> np.ndarray:
    """`rule` on grids (N, R, C) uint8. A transposing rule returns (N, C, R)."""
    for name, values in rule:
        grids = FAMILIES[name].apply(np.array([values]), grids[None])[0]
    return grids


def describe(rule: Rule) -> str:
    """A readable name, such as `gravity(down) > recolour(3->5)`."""
    return " > ".join(f"{name}({FAMILIES[name].describe(*values)})" for name, values in rule)


def stages_of(rule: Rule) -> Stages:
    """The families of a rule's stages."""
    return tuple(name for name, _ in rule)


def colours_of(rule: Rule) -> list[int]:
    """The colours that a rule names, those of its last stage first."""
    named = [values[column] for name, values in reversed(rule) for column in FAMILIES[name].colours]
    return list(dict.fromkeys(int(colour) for colour in named if colour))


# --- Grids to ask about ---


def draw_inputs(
    rng: np.random.Generator, rule: Rule, demonstrations: int, queries: int, shape: tuple[int, int]
) -> np.ndarray:
    """Inputs (demonstrations + queries, rows, columns) in a style that suits the rule.

    They have few colours, among them those of the rule. The queries show only colours of the demonstrations.
    """
    styles = sorted({style for name in stages_of(rule) for style in FAMILIES[name].inputs})
    style = styles[rng.integers(len(styles))]
    named = colours_of(rule)
    others = [colour for colour in rng.permutation(COLOURS).tolist() if colour not in named]
    size = NUM_COLOURS if style == "all colours" else max(len(named) + 1, 2 + rng.integers(4))
    palette = np.array(named + others, np.uint8)[:size]
    grids = draw_grids(rng, style, palette, demonstrations + queries, shape)
    shown = np.bincount(grids[:demonstrations].ravel(), minlength=NUM_COLOURS) > 0
    shown[0] = False
    # What a rule does to a colour that no demonstration shows could not be known.
    if shown.any():
        instead = rng.choice(np.flatnonzero(shown), NUM_COLOURS)
        known = np.where(shown, np.arange(NUM_COLOURS), instead).astype(np.uint8)
        known[0] = 0
        grids[demonstrations:] = known[grids[demonstrations:]]
    return grids


# --- The library ---


class Library:
    """All rules of one stage of some families, and of two stages if `stages` is 2.

    Rules count as one if they act alike on a fixed set of probe grids, and as none if they change no probe.
    `rows` and `columns` are the ranges of the grids' shapes. On grids of one row or column only rules that
    keep the shape take part. Raises `UserError` for a family without a rule on such grids.
    """

    def __init__(self, families: list[str], stages: int, rows: tuple[int, int], columns: tuple[int, int]):
        self.stages = stages
        shapes = sorted({(rows[0], columns[0]), (rows[1], columns[1])})
        keep_shape = 1 in (rows[1], columns[1])
        # Fixed probes: which rules count as one must not depend on a dataset's seed.
        rng = np.random.default_rng(0)
        palette = np.array(COLOURS, np.uint8)
        styles = sorted({style for family in FAMILIES.values() for style in family.inputs})
        self.probes = [
            np.concatenate(
                [draw_grids(rng, style, rng.permutation(palette), PROBES, shape) for style in styles]
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
                # Families come in order: a rule that an earlier one has, too, belongs to the earlier one.
                new = []
                for number, key in enumerate(map(_digest, zip(*images, strict=True))):
                    if key not in known:
                        new.append(number)
                        known.add(key)
                if new:
                    self.blocks[name].append(block[new])
            if FAMILIES[name].fit is None and not self.blocks[name]:
                grids = f"{rows[0]}..{rows[1]} x {columns[0]}..{columns[1]} grids"
                raise UserError(f"family {name} has no rule of its own on {grids}")
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
        """How many rules of these families there are, infinite for fitted ones.

        Different descriptions of one rule count each.
        """
        sizes = [self.sizes[name] for name in stages]
        known = [size for size in sizes if size is not None]
        return float(np.prod(known)) if len(known) == len(sizes) else float("inf")

    def draw(self, rng: np.random.Generator, stages: Stages) -> Rule:
        """A random rule of these families."""

        def values(name: str) -> np.ndarray:
            if (draw := FAMILIES[name].draw) is not None:
                return draw(rng)
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
        """What rules of `stages` stages explain each case.

        A case is inputs (K + Q, rows, columns) and outputs uint8, the K demonstrations before the Q
        queries. Its part of the result is the families of all rules that fit its demonstrations, and which
        queries all of these rules answer right, (Q,) bool.
        """
        by_shape: dict[tuple, list[int]] = {}
        for number, (inputs, outputs) in enumerate(cases):
            by_shape.setdefault((inputs.shape, outputs.shape), []).append(number)
        found: dict[int, tuple[set[Stages], np.ndarray]] = {}
        for (shape, _), numbers in by_shape.items():
            inputs, outputs, colours = _renumbered(
                *(np.stack([cases[i][role] for i in numbers]) for role in (0, 1))
            )
            # Cases of few colours need fewer rules. Sorted, they do not stand beside cases of many.
            order = colours.argsort(kind="stable")
            at_once = max(1, CELLS_AT_ONCE // int(np.prod(shape)))
            for part in (order[start : start + at_once] for start in range(0, len(order), at_once)):
                blocks = self._blocks_of(min(int(colours[part].max()) + FOREIGN_COLOURS, NUM_COLOURS - 1))
                families, determined = _explain(inputs[part], outputs[part], demonstrations, blocks, stages)
                for i, own, determines in zip(part, families, determined, strict=True):
                    found[numbers[i]] = (own, determines)
        return [found[number] for number in range(len(cases))]

    @cache  # noqa: B019 - a library lives as long as its process
    def _blocks_of(self, colours: int) -> dict[str, list[np.ndarray]]:
        """The parameters of the listed rules that name no colour above `colours`."""
        chosen = {
            name: [block[(block[:, list(FAMILIES[name].colours)] <= colours).all(axis=1)] for block in blocks]
            for name, blocks in self.blocks.items()
        }
        return {name: [block for block in blocks if len(block)] for name, blocks in chosen.items()}


def _digest(images: Iterable[np.ndarray]) -> bytes:
    """A hash of images (N, R, C) and their shapes."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(bytes(image.shape[1:]) + image.tobytes())
    return digest.digest()


# --- The check, for tasks of one shape at a time: T tasks of N = K + Q pairs ---


@dataclass(frozen=True)
class _Images:
    """The different images of one shape that first stages make of inputs.

    grids: (U, N, R, C). task: (U,) of which task. origins: the stages that make each image.
    first: (G,) one image for each different first demonstration. group: (U,) which of these each image has.
    """

    grids: np.ndarray
    task: np.ndarray
    origins: list[set[Stages]]
    first: np.ndarray
    group: np.ndarray


def _renumbered(inputs: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs and outputs (T, N, ., .) whose colours are 1..c, and the number c (T,) of colours of each task.

    How rules explain a task does not depend on which colours it has. Of the colours shown nowhere, two are
    enough to stand for all.
    """
    count = len(inputs)
    shown = np.zeros((count, NUM_COLOURS), bool)
    shown[:, 0] = True
    for grids in (inputs, outputs):
        shown[np.arange(count)[:, None, None, None], grids] = True
    number = (~shown).argsort(axis=1, kind="stable").argsort(axis=1).astype(np.uint8)
    renumbered = (number[np.arange(count)[:, None, None, None], grids] for grids in (inputs, outputs))
    return *renumbered, shown.sum(axis=1) - 1


def _explain(
    inputs: np.ndarray,
    outputs: np.ndarray,
    demonstrations: int,
    blocks: dict[str, list[np.ndarray]],
    stages: int,
) -> tuple[list[set[Stages]], np.ndarray]:
    """The families of all rules that explain each task, and which queries (T, Q) all of these answer right.

    `blocks` are the listed rules to try. The fitted families take part, too.
    """
    found: list[set[Stages]] = [set() for _ in inputs]
    determined = np.ones((len(inputs), inputs.shape[1] - demonstrations), bool)
    for images in _first_stages(inputs, blocks if stages == 2 else None):
        may = may_become(images.grids[images.first, 0], outputs[images.task[images.first], 0])
        for name, listed in blocks.items():
            family = FAMILIES[name]
            # Most images cannot become their answer by any rule of the family, which is quick to see.
            possible = np.ones(len(images.first), bool)
            for kept in family.keeps:
                possible &= may[kept]
            if not possible.any():
                continue
            for which, agrees in _last_stages(family, listed, images, possible, outputs, demonstrations):
                np.logical_and.at(determined, images.task[which], agrees)
                for image in set(which.tolist()):
                    found[images.task[image]].update((*origin, name) for origin in images.origins[image])
    return found, determined


def _first_stages(inputs: np.ndarray, blocks: dict[str, list[np.ndarray]] | None) -> Iterator[_Images]:
    """The different images of inputs (T, N, R, C) under all listed first stages, shape by shape.

    Without `blocks` they are the inputs themselves.
    """
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
        # Many first stages make the same image of a task. The last stage has to be tried only once for it.
        distinct, number = _distinct(task, grids)
        origins: list[set[Stages]] = [set() for _ in distinct]
        start = 0
        for stages, images in made:
            stop = start + images.size // grids[0].size
            for i in number[start:stop].tolist():
                origins[i].add(stages)
            start = stop
        grids, task = grids[distinct], task[distinct]
        yield _Images(grids, task, origins, *_distinct(task, grids[:, 0]))


def _distinct(task: np.ndarray, grids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the different pairs of task (U,) and grids (U, ...), and which of these each one is (U,)."""
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
    """The images (F,) from which a rule of the family explains all demonstrations.

    Also which queries it answers right, (F, Q) bool. An image may come several times, with different rules.
    `possible` (G,) bool are the groups to try.
    """
    first = images.first[possible]
    wanted = outputs[images.task[first], 0]
    if family.fit is not None:
        if images.grids.shape[2:] == outputs.shape[2:]:
            possible = possible.copy()
            possible[possible], _ = family.fit(images.grids[first, :1], wanted[:, None], 1)
            candidates = np.flatnonzero(possible[images.group])
            fits, agrees = family.fit(
                images.grids[candidates], outputs[images.task[candidates]], demonstrations
            )
            yield candidates[fits], agrees[fits]
        return
    candidates = np.flatnonzero(possible[images.group])
    group = (possible.cumsum() - 1)[images.group[candidates]]
    # The first demonstration rules out nearly all parameters, and many images share it.
    for block in blocks:
        made = family.apply(block, images.grids[first, 0][None])  # (P, G, R, C)
        if made.shape[2:] != wanted.shape[1:]:
            continue
        match = (made == wanted).reshape(*made.shape[:2], -1).all(axis=2)
        chosen, at = np.nonzero(match[:, group])
        found = candidates[at]
        for number in range(1, demonstrations):
            fits = _equal(family, block[chosen], images, found, outputs, slice(number, number + 1))[:, 0]
            chosen, found = chosen[fits], found[fits]
        if len(found):
            yield found, _equal(family, block[chosen], images, found, outputs, slice(demonstrations, None))


def _equal(
    family: Family,
    parameters: np.ndarray,
    images: _Images,
    which: np.ndarray,
    outputs: np.ndarray,
    pairs: slice,
) -> np.ndarray:
    """(F, pairs): of which pairs each of parameters (F, d) makes the outputs from its image `which` (F,)."""
    if not len(which):
        return np.ones((0, 1), bool)
    made = family.apply(parameters, images.grids[which, pairs])
    return (made == outputs[images.task[which], pairs]).all(axis=(2, 3))
