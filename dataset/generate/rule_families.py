"""The families of rules on small grids: their parameters, and how one is read off demonstrations.

A family is either listed or fitted. All parameters of a listed family are known. Those of a fitted family
are too many, and are read off the demonstrations. A fitted family stands only last.

A new family needs a function in `rule_functions` that applies it, and an entry of `FAMILIES` with its
parameters (`blocks`, or `draw` and `fit`). The builder offers every entry. The tests hold each to what it
claims, and to be closed under recolouring: with a permutation of 1..9 before and its inverse after, a rule
is again one of its family. So a permutation as the first of two stages would be no new rule, and colours
that a task does not show are interchangeable.

The `pattern` family is the Pattern task of "Searching Latent Program Spaces" (Macfarlane and Bonnet, 2024).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from dataset.augment import random_colours
from dataset.generate import rule_functions as functions
from dataset.generate.rule_functions import (
    BRANCHES,
    COLOURS,
    COUNTS,
    DIRECTIONS,
    FILLS,
    MAX_SHIFT,
    PROPERTIES,
    SYMMETRIES,
    moved_by,
    pattern_part,
    per_grid,
    with_frame,
)
from dataset.task import NUM_COLOURS

# --- Fitting a family as the last stage ---
#
# A `fit` function takes images of a first stage and answers, (U, K + Q, R, C) each, K demonstrations before Q
# queries. It returns fits (U,): does a rule of the family explain all demonstrations? And agrees (U, Q): does
# every such rule give the query's answer?


def _read_table(keys: np.ndarray, answers: np.ndarray, size: int) -> np.ndarray:
    """(U, size, 10) bool: which colours the answers (U, K, R, C) show for each value of the keys."""
    seen = np.zeros((len(keys), size * NUM_COLOURS), bool)
    seen[np.arange(len(keys))[:, None, None, None], keys * np.uint8(NUM_COLOURS) + answers] = True
    return seen.reshape(len(keys), size, NUM_COLOURS)


def _look_up(seen: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The colour that `seen` (U, size, 10) gives each of keys (U, ...).

    A key without one gets NUM_COLOURS, which equals no answer.
    """
    table = np.where(seen.any(axis=2), seen.argmax(axis=2), NUM_COLOURS).astype(np.uint8)
    return table[np.arange(len(keys))[:, None, None, None], keys]


def _fit_colour_permutation(
    images: np.ndarray, answers: np.ndarray, demonstrations: int
) -> tuple[np.ndarray, np.ndarray]:
    seen = _read_table(images[:, :demonstrations], answers[:, :demonstrations], NUM_COLOURS)
    seen[:, 0, 0] = True  # the background stays
    fits = np.all(seen.sum(axis=1) <= 1, axis=1) & np.all(seen.sum(axis=2) <= 1, axis=1)
    sources, targets = (np.asarray(seen.any(axis=axis)) for axis in (2, 1))
    # If all colours but one are seen, the last one has a single place left.
    all_but_one = fits & np.equal(sources.sum(axis=1), NUM_COLOURS - 1)
    seen[all_but_one, sources[all_but_one].argmin(axis=1), targets[all_but_one].argmin(axis=1)] = True
    right = np.equal(_look_up(seen, images[:, demonstrations:]), answers[:, demonstrations:])
    return fits, right.all(axis=(2, 3))


def _fit_pattern(
    images: np.ndarray, answers: np.ndarray, demonstrations: int
) -> tuple[np.ndarray, np.ndarray]:
    # One marker colour that is nowhere stands for all such.
    markers = np.arange(1, min(images.max(initial=0) + 2, NUM_COLOURS))
    # Away from its markers a pattern changes nothing. In the first demonstration that rules out most markers.
    marked = with_frame(images[:, 0] == per_grid(markers), False)  # (markers, U, R + 2, C + 2)
    wide = marked | moved_by(marked, 0, 1) | moved_by(marked, 0, -1)
    near = (wide | moved_by(wide, 1, 0) | moved_by(wide, -1, 0))[..., 1:-1, 1:-1]
    marker, image = np.nonzero((near | (images[:, 0] == answers[:, 0])).all(axis=(2, 3)))
    images, answers, count = images[image], answers[image], len(images)
    part = pattern_part(images == per_grid(markers[marker]))
    outside = part < 0
    keys = np.where(outside, 9, part).astype(np.uint8)
    seen = _read_table(keys[:, :demonstrations], answers[:, :demonstrations], 10)[:, :9]
    in_pattern = _look_up(seen, np.minimum(keys, 8)) == answers
    right = np.where(outside, images == answers, in_pattern).all(axis=(2, 3))
    fits = right[:, :demonstrations].all(axis=1) & (seen.sum(axis=2) <= 1).all(axis=1)
    # Several markers may explain an image. A query is determined only if they all give its answer.
    fits_any = np.zeros(count, bool)
    fits_any[image[fits]] = True
    agrees_all = np.ones((count, images.shape[1] - demonstrations), bool)
    np.logical_and.at(agrees_all, image[fits], right[fits, demonstrations:])
    return fits_any, agrees_all


# --- The table ---


@dataclass(frozen=True)
class Family:
    """A kind of rule.

    apply: what its rules do (`rule_functions`). describe: one set of parameters in words.
    inputs: the styles of grids that suit it (`rule_grids.draw_grids`).
    keeps: what every rule of it leaves as it is (see `may_become`), so that most grids need not be tried.
    colours: the columns of the parameters that hold colours, where 0 stands for none.
    blocks: the parameters of a listed family, (P, d) int64 each. The images of one block have one shape.
    draw, fit: of a fitted family: random parameters (d,), and the check described above.
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
    """For each thing to keep, which images (U, R, C) such a rule may turn into their answers (U, R', C').

    The keys are the values of `Family.keeps`, the values are (U,) bool.
    """
    cells, wanted = images.reshape(len(images), -1), answers.reshape(len(images), -1)
    histogram = (np.sort(cells) == np.sort(wanted)).all(axis=1)
    if images.shape != answers.shape:
        nothing = np.zeros(len(images), bool)
        names = ("background", "coloured cells", "other colours", "one new colour")
        return {"histogram": histogram} | dict.fromkeys(names, nothing)
    same = cells == wanted
    # What the changed cells become, if all become the same.
    new = np.where(same, 0, wanted).max(axis=1, keepdims=True)
    # The colour that moved, if only one did.
    moved = np.where(same, 0, np.maximum(cells, wanted)).max(axis=1, keepdims=True)
    came, went = (cells == 0) & (wanted == moved), (cells == moved) & (wanted == 0)
    return {
        "histogram": histogram,
        "background": ((cells == 0) == (wanted == 0)).all(axis=1),
        "coloured cells": (same | (cells == 0)).all(axis=1),
        "other colours": (same | came | went).all(axis=1),
        "one new colour": (same | (wanted == 0) | (wanted == new)).all(axis=1),
    }


def _block(parameters: Iterable[tuple[int, ...]]) -> np.ndarray:
    return np.array(list(parameters), np.int64)


FAMILIES: dict[str, Family] = {
    "geometry": Family(
        functions.geometry,
        lambda index: SYMMETRIES[index],
        inputs=("noise", "objects"),
        keeps=("histogram",),
        blocks=(_block((i,) for i in (2, 4, 5)), _block((i,) for i in (1, 3, 6, 7))),
    ),
    "colour_permutation": Family(
        functions.colour_permutation,
        lambda *colours: "".join(map(str, colours)),
        inputs=("all colours",),
        keeps=("background",),
        draw=lambda rng: random_colours(rng, 1)[0],
        fit=_fit_colour_permutation,
    ),
    "recolour": Family(
        functions.recolour,
        lambda source, target: f"{source}->{target}",
        inputs=("noise", "objects"),
        keeps=("background", "one new colour"),
        colours=(0, 1),
        blocks=(_block((a, b) for a in COLOURS for b in COLOURS if a != b),),
    ),
    "gravity": Family(
        functions.gravity,
        lambda turns: DIRECTIONS[turns],
        inputs=("noise", "objects"),
        keeps=("histogram",),
        blocks=(_block((turns,) for turns in range(4)),),
    ),
    "shift": Family(
        functions.shift,
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
        functions.fill,
        lambda kind, colour: f"{FILLS[kind]} {colour}",
        inputs=("sparse", "frames"),
        keeps=("coloured cells", "one new colour"),
        colours=(1,),
        blocks=(_block((kind, c) for kind in range(len(FILLS)) for c in COLOURS),),
    ),
    "move": Family(
        functions.move,
        lambda colour, turns, steps: (
            f"{colour} {DIRECTIONS[turns]} {'one step' if steps else 'until blocked'}"
        ),
        inputs=("objects", "sparse"),
        keeps=("histogram", "other colours"),
        colours=(0,),
        blocks=(_block((c, turns, steps) for c in COLOURS for turns in range(4) for steps in (0, 1)),),
    ),
    "count": Family(
        functions.count,
        lambda kind, colour: f"{COUNTS[kind]} {colour}" if colour else COUNTS[kind],
        inputs=("noise", "objects"),
        keeps=("one new colour",),
        colours=(1,),
        blocks=(
            _block([(kind, 0) for kind in range(len(COUNTS) - 1)] + [(len(COUNTS) - 1, c) for c in COLOURS]),
        ),
    ),
    "pattern": Family(
        functions.pattern,
        lambda marker, *cells: f"{marker}: {''.join(map(str, cells))}",
        inputs=("markers",),
        colours=(0,),
        draw=lambda rng: rng.integers(1, NUM_COLOURS, 10),
        fit=_fit_pattern,
    ),
    "conditional": Family(
        functions.conditional,
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
        functions.large_objects,
        lambda size, colour: f"larger than {size}: {colour}",
        inputs=("noise", "objects"),
        keeps=("background", "one new colour"),
        colours=(1,),
        blocks=(_block((size, c) for size in (1, 2) for c in COLOURS),),
    ),
}
