"""Augmentations of ARC tasks: a dihedral transform 0..7 and a permutation of the ten colours.

Names follow the original TRM: `id|||t3|||0123456789`. Colour 0 (the background) stays in place.
"""

import hashlib
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from dataset.task import MAX_SIDE, NUM_COLOURS, Pair, Task

NAME_SEPARATOR = "|||"
BLANK_NAME = "<blank>"
IDENTITY_COLOURS = np.arange(NUM_COLOURS, dtype=np.uint8)
DIHEDRAL_INVERSE = (0, 3, 2, 1, 4, 5, 6, 7)
_DIHEDRAL: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    lambda grid: grid,
    lambda grid: np.rot90(grid, 1, axes=(-2, -1)),  # counter-clockwise
    lambda grid: np.rot90(grid, 2, axes=(-2, -1)),
    lambda grid: np.rot90(grid, 3, axes=(-2, -1)),
    lambda grid: grid[..., ::-1],
    lambda grid: grid[..., ::-1, :],
    lambda grid: grid.swapaxes(-2, -1),
    lambda grid: np.rot90(grid, 1, axes=(-2, -1))[..., ::-1],  # transpose along the other diagonal
)
_FINGERPRINTED_AT_ONCE = 4096
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_TRANSFORM_NAMES = tuple(f"t{index}" for index in range(8))
# The original tries this many times as many augmentations as are wanted before a puzzle counts as exhausted.
RETRIES = 5


def dihedral(grid: np.ndarray, index: int) -> np.ndarray:
    """Apply symmetry `index` (0 identity, 1-3 rotations, 4-7 reflections) to (..., rows, columns) arrays."""
    return _DIHEDRAL[index](grid)


def apply(grid: np.ndarray, index: int, colours: np.ndarray) -> np.ndarray:
    """Recolour with `colours` (10,), then transform."""
    return np.ascontiguousarray(dihedral(colours[grid], index))


def invert(grid: np.ndarray, index: int, colours: np.ndarray) -> np.ndarray:
    """Undo `apply`."""
    return np.ascontiguousarray(np.argsort(colours).astype(np.uint8)[dihedral(grid, DIHEDRAL_INVERSE[index])])


def names_of(task_id: str, dihedral: np.ndarray, colours: np.ndarray) -> list[str]:
    """The ancestors' names of a task's augmentations, dihedral (n,) and colours (n, 10).

    The first augmentation is the identity; its name is the bare id.
    """
    digits = (colours + ord("0")).tobytes().decode()
    texts = (digits[i : i + NUM_COLOURS] for i in range(NUM_COLOURS, len(digits), NUM_COLOURS))
    augmented = zip(dihedral[1:].tolist(), texts, strict=True)
    return [
        task_id,
        *(f"{task_id}{NAME_SEPARATOR}t{index}{NAME_SEPARATOR}{text}" for index, text in augmented),
    ]


def parse_name(name: str) -> tuple[str, int, np.ndarray]:
    """`(task id, dihedral, colours)` of a name. Raises `ValueError` if it is none."""
    if NAME_SEPARATOR not in name:
        return name, 0, IDENTITY_COLOURS
    task_id, transform, colours = name.rsplit(NAME_SEPARATOR, 2)
    if transform not in _TRANSFORM_NAMES or sorted(colours) != list("0123456789"):
        raise ValueError(f"'{name}' is not a puzzle identifier")
    return task_id, int(transform[1:]), np.frombuffer(colours.encode(), np.uint8) - ord("0")


def unfit_for_a_name(task_id: str) -> str | None:
    """Why an id cannot name a puzzle in the ancestors' layout, None if it can."""
    if not task_id:
        return "has an empty id"
    if task_id == BLANK_NAME:
        return "has the name of the blank puzzle, which stands for no task"
    if NAME_SEPARATOR in task_id:
        return f"has {NAME_SEPARATOR} in its id, which separates an id from its augmentation"
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in task_id):
        return "has an id with a character that is no text"
    return None


def identity_colours(count: int, colours: int = NUM_COLOURS) -> np.ndarray:
    """(count, colours) uint8: every colour maps to itself."""
    return np.tile(np.arange(colours, dtype=np.uint8), (count, 1))


def colours_of(uniform: np.ndarray) -> np.ndarray:
    """Permutations (n, 10) uint8 of the colours 1..9 from uniform numbers (n, 9). Colour 0 stays 0."""
    order = uniform.argsort(axis=1).astype(np.uint8) + np.uint8(1)
    return np.concatenate([np.zeros((len(uniform), 1), np.uint8), order], axis=1)


def random_colours(rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` random permutations (count, 10) uint8 of the colours 1..9."""
    return colours_of(rng.random((count, NUM_COLOURS - 1)))


def hashed_uniform(keys: np.ndarray, count: int) -> np.ndarray:
    """(n, count) uniform numbers in [0, 1), each row a function of its integer keys (n, m)."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return (mix(hashed(keys)[:, None] + steps) >> np.uint64(11)) * 2.0**-53  # a double holds 53 bits


def hashed(keys: np.ndarray) -> np.ndarray:
    """(n,) uint64 made of integer keys (n, m), which hardly ever collide."""
    state = np.zeros(len(keys), np.uint64)
    for column in keys.T.astype(np.uint64):
        state = mix(state + column)
    return state


def task_rng(seed: int, task_id: str) -> np.random.Generator:
    """A generator that depends on the seed and the task alone, so that the order of tasks does not matter."""
    return np.random.default_rng([seed, *_digest(task_id, np.uint32, 16).tolist()])


def task_key(task_id: str) -> int:
    """A number of 64 bits that stands for a task."""
    return int(_digest(task_id, np.uint64, 8)[0])


def _digest(text: str, dtype: type, count: int) -> np.ndarray:
    """The first `count` bytes of the text's SHA-256."""
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:count], dtype=dtype)


def draw(task: Task, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The identity and up to `count` augmentations that give pairwise different puzzles.

    Returns dihedral (n,) uint8 and colours (n, 10) uint8 with n <= count + 1. A symmetric or nearly
    colourless task has fewer. By the original's rule two augmentations count once when they give the same set
    of pairs. 64-bit hashes tell whether they do.
    """
    index, colours = np.zeros(1, np.uint8), IDENTITY_COLOURS[None]
    if count == 0:
        return index, colours
    hasher = _PuzzleHasher(task)
    keys = hasher(index, colours)
    for _ in range(RETRIES):
        index = np.concatenate([index, rng.integers(0, 8, count).astype(np.uint8)])
        colours = np.concatenate([colours, random_colours(rng, count)])
        keys = np.concatenate([keys, hasher(index[len(keys) :], colours[len(keys) :])])
        # The first of each puzzle in the order of drawing: what is kept does not depend on later rounds.
        first = np.sort(np.unique(keys, return_index=True)[1])[: count + 1]
        index, colours, keys = index[first], colours[first], keys[first]
        if len(keys) == count + 1:
            break
    return index, colours


def turns(task: Task, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`draw` without recolouring: the identity and up to `count` turns and reflections, at most seven."""
    # Random draws among eight would repeat some of them and leave others out.
    index, colours = np.arange(8, dtype=np.uint8), identity_colours(8)
    keys = _PuzzleHasher(task)(index, colours)
    first = np.sort(np.unique(keys, return_index=True)[1])[: count + 1]
    return index[first], colours[first]


class _PuzzleHasher:
    """64-bit keys of augmented puzzles without drawing them.

    A grid's hash is the sum over its cells of position weight times colour value (mod 2^64). So for each
    symmetry it is the dot product of ten weight sums with the permuted colour values. A puzzle's key is the
    sum of its pairs' mixed hashes. Like the original's sorted list it does not depend on the order of pairs.
    """

    _weights = np.random.default_rng(0).integers(0, 2**64, (2, MAX_SIDE, MAX_SIDE), dtype=np.uint64)
    _values = np.random.default_rng(1).integers(0, 2**64, NUM_COLOURS, dtype=np.uint64)

    def __init__(self, task: Task):
        sums = np.zeros((8, len(task.pairs), NUM_COLOURS), np.uint64)  # of each symmetry, pair and colour
        shapes = np.zeros((8, len(task.pairs)), np.uint64)
        for number, pair in enumerate(task.pairs):
            for role, grid in enumerate((pair.input, pair.output)):
                if grid is None:
                    continue
                for index in range(8):
                    shown = dihedral(grid, index)
                    weights = self._weights[role, : shown.shape[0], : shown.shape[1]]
                    np.add.at(sums[index, number], shown, weights)
                    shapes[index, number] = (
                        shapes[index, number] * 1024 + shown.shape[0] * 32 + shown.shape[1]
                    )
        self.sums, self.shapes = sums, mix(shapes)

    def __call__(self, index: np.ndarray, colours: np.ndarray) -> np.ndarray:
        """(n,) uint64 keys of augmentations (n,), (n, 10)."""
        grids = (self.sums[index] * self._values[colours][:, None, :]).sum(axis=2)  # (n, pairs), wrapping
        return mix(grids + self.shapes[index]).sum(axis=1)


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's step: a bijection of uint64 that spreads every bit, so that sums hardly ever collide."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def fingerprints(pairs: Sequence[Pair]) -> np.ndarray:
    """(n,) uint64, equal for pairs that a dihedral transform and a recolouring of 1..9 map to each other.

    Other pairs differ, up to the chance of a 64-bit collision. A pair without a known output has 0.
    """
    by_shape: dict[tuple, list[Pair]] = {}
    for pair in pairs:
        if pair.output is not None and pair.fingerprint == 0:
            by_shape.setdefault((pair.input.shape, pair.answer.shape), []).append(pair)
    for alike in by_shape.values():
        values = stacked_fingerprints(
            np.stack([pair.input for pair in alike]), np.stack([pair.answer for pair in alike])
        )
        for pair, value in zip(alike, values.tolist(), strict=True):
            pair.fingerprint = value
    return np.array([pair.fingerprint for pair in pairs], np.uint64)


def stacked_fingerprints(inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """`fingerprints` of pairs of equal shapes: inputs (n, rows, columns), outputs (n, rows', columns')."""
    result = np.zeros(len(inputs), np.uint64)
    for start in range(0, len(inputs), _FINGERPRINTED_AT_ONCE):
        part = slice(start, start + _FINGERPRINTED_AT_ONCE)
        keys = [_canonical_keys(inputs[part], outputs[part], index) for index in range(8)]
        smallest = (min(variants) for variants in zip(*keys, strict=True))
        # The lowest bit is set, because 0 stands for an unknown answer.
        result[part] = [int.from_bytes(hashlib.sha256(key).digest()[:8], "little") | 1 for key in smallest]
    return result


def _canonical_keys(inputs: np.ndarray, outputs: np.ndarray, index: int) -> list[bytes]:
    """For equally shaped pairs (n, rows, columns): both grids after transform `index`, as bytes.

    The colours 1..9 are renumbered in the order in which they appear, so that recoloured pairs are equal.
    """
    grids = [dihedral(stack, index) for stack in (inputs, outputs)]
    cells = np.concatenate([grid.reshape(len(grid), -1) for grid in grids], axis=1)
    count, length = cells.shape
    pair_and_colour = cells + np.arange(count)[:, None] * NUM_COLOURS  # index into a flat (count, 10)
    # Where each colour of each pair appears first; `length` where it never does.
    first = np.full(count * NUM_COLOURS, length)
    np.minimum.at(first, pair_and_colour.ravel(), np.tile(np.arange(length), count))
    number = np.zeros((count, NUM_COLOURS), np.uint8)
    number[:, 1:] = (
        first.reshape(count, NUM_COLOURS)[:, 1:].argsort(axis=1, kind="stable").argsort(axis=1) + 1
    )
    renumbered = number.ravel()[pair_and_colour]
    shapes = bytes(grids[0].shape[1:]) + bytes(grids[1].shape[1:])
    return [shapes + row.tobytes() for row in renumbered]
