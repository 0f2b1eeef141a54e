"""Dihedral transforms and colour permutations: one augmentation is (dihedral 0..7, permutation of the ten colours).

Names follow the original TRM: `id|||t3|||0123456789`. Colour 0 (the background) stays in place.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from dataset.task import NUM_COLOURS, Pair, Task

NAME_SEPARATOR = "|||"
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
# Draws of a duplicate are retried this often per wanted augmentation before a puzzle counts as exhausted.
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


def name_of(task_id: str, index: int, colours: np.ndarray) -> str:
    """The ancestors' identifier of an augmented puzzle; the unaugmented one is the bare task id."""
    if index == 0 and np.array_equal(colours, IDENTITY_COLOURS):
        return task_id
    return f"{task_id}{NAME_SEPARATOR}t{index}{NAME_SEPARATOR}{''.join(map(str, colours))}"


def parse_name(name: str) -> tuple[str, int, np.ndarray]:
    """`(task id, dihedral, colours)` of an identifier."""
    if NAME_SEPARATOR not in name:
        return name, 0, IDENTITY_COLOURS
    task_id, transform, colours = name.rsplit(NAME_SEPARATOR, 2)
    return task_id, int(transform[1:]), np.array([int(c) for c in colours], dtype=np.uint8)


def random_colours(rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` permutations (count, 10) uint8 of the colours 1..9; 0 keeps its place."""
    order = rng.random((count, NUM_COLOURS - 1)).argsort(axis=1) + 1
    return np.concatenate([np.zeros((count, 1), np.uint8), order.astype(np.uint8)], axis=1)


def task_rng(seed: int, task_id: str) -> np.random.Generator:
    """A generator that depends on the seed and the task alone, not on the order in which tasks are processed."""
    digest = hashlib.sha256(task_id.encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest[:16], dtype=np.uint32).tolist()])


def draw(task: Task, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The identity and up to `count` augmentations that give pairwise different puzzles.

    Returns dihedral (n,) uint8 and colours (n, 10) uint8, n <= count + 1: a symmetric or nearly colourless task has fewer.
    """
    transforms, colours = [0], [IDENTITY_COLOURS]
    if count == 0:
        return np.array(transforms, dtype=np.uint8), np.stack(colours)
    seen = {_puzzle_key(task, 0, IDENTITY_COLOURS)}
    for _ in range(RETRIES):
        if len(transforms) == count + 1:
            break
        for index, permutation in zip(rng.integers(0, 8, count), random_colours(rng, count), strict=True):
            key = _puzzle_key(task, index, permutation)
            if key not in seen:
                seen.add(key)
                transforms.append(int(index))
                colours.append(permutation)
                if len(transforms) == count + 1:
                    break
    return np.array(transforms, dtype=np.uint8), np.stack(colours)


def _puzzle_key(task: Task, index: int, colours: np.ndarray) -> bytes:
    keys = sorted(_pair_key(pair, index, colours) for pair in task.pairs)
    return hashlib.sha256(b"".join(keys)).digest()


def _pair_key(pair: Pair, index: int, colours: np.ndarray) -> bytes:
    digest = hashlib.sha256()
    for grid in (pair.input, pair.output):
        if grid is not None:
            transformed = apply(grid, index, colours)
            digest.update(bytes(transformed.shape) + transformed.tobytes())
        digest.update(b"|")
    return digest.digest()


def fingerprints(pairs: Sequence[Pair]) -> np.ndarray:
    """(n,) uint64, equal for two pairs exactly when a dihedral transform and a recolouring of 1..9 maps one to the other
    (up to the chance of a 64-bit collision). A pair without a known output is 0.
    """
    result = np.zeros(len(pairs), np.uint64)
    by_shape: dict[tuple, list[int]] = {}
    for i, pair in enumerate(pairs):
        if pair.output is not None:
            by_shape.setdefault((pair.input.shape, pair.output.shape), []).append(i)
    for rows in by_shape.values():
        inputs, outputs = np.stack([pairs[i].input for i in rows]), np.stack([pairs[i].output for i in rows])
        keys = [_canonical_keys(inputs, outputs, index) for index in range(8)]
        for i, variants in zip(rows, zip(*keys, strict=True), strict=True):
            result[i] = int.from_bytes(hashlib.sha256(min(variants)).digest()[:8], "little") | 1
    return result


def _canonical_keys(inputs: np.ndarray, outputs: np.ndarray, index: int) -> list[bytes]:
    """For equally shaped pairs (n, rows, columns): both grids after transform `index`, colours renumbered as they appear."""
    grids = [dihedral(stack, index) for stack in (inputs, outputs)]
    cells = np.concatenate([grid.reshape(len(grid), -1) for grid in grids], axis=1)
    shown = cells[:, :, None] == np.arange(1, NUM_COLOURS)  # (n, cells, 9)
    first = np.where(shown.any(axis=1), shown.argmax(axis=1), cells.shape[1])
    number = first.argsort(axis=1, kind="stable").argsort(axis=1).astype(np.uint8) + 1
    renumbered = np.take_along_axis(np.concatenate([np.zeros((len(cells), 1), np.uint8), number], axis=1), cells.astype(np.int64), axis=1)
    shapes = bytes(grids[0].shape[1:]) + bytes(grids[1].shape[1:])
    return [shapes + row.tobytes() for row in renumbered]
