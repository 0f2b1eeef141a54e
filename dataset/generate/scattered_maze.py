"""Mazes of scattered walls, as Maze-Hard has them: every cell is a wall by chance, and the path is long.

Grids are those of dataset/generate/maze.py. What was measured on Maze-Hard's 2000 mazes, and is matched, is
in the docstring of `generate`.
"""

import numpy as np

from dataset.generate.maze import GOAL, OPEN, START, WALL, distances

SHARES = (0.3, 0.5)  # of walls, a uniform number for each maze
MOST_SIDE = 62  # a row is a 64-bit mask with room on both sides
LARGE_SHARE = 0.25  # of the cells are far from the start; very few mazes have more
COMPACTED_EVERY = 8  # steps, after which mazes that are settled leave the batch


def generate(side: int, tries: int, min_path_length: int, rng: np.random.Generator) -> np.ndarray:
    """The mazes (n, side, side) of `tries` random ones whose path has at least `min_path_length` moves.

    A maze's share of walls is uniform, its cells are independent, and there is no border. Start and goal are
    two different open cells, all pairs alike. Everything with a shorter shortest path is left out. So is
    nearly all: of side 30 and 109 moves one maze of some ten thousand is left.

    Maze-Hard (HRM, arXiv 2506.21734) is like that. Over its 2000 mazes the walls of cells 1 or 2 apart are
    uncorrelated, and border cells are walls as often as the others. Its shortest path has at least 109 moves.
    """
    share = rng.uniform(*SHARES, tries).astype(np.float32)
    mazes = (rng.random((tries, side, side), np.float32) >= share[:, None, None]).astype(np.uint8)
    flat = mazes.reshape(tries, -1)
    start = ((flat == OPEN) * (1 - rng.random(flat.shape, np.float32))).argmax(axis=1)
    # A maze without an open cell has its "start" in a wall, from where nothing is far.
    left = _with_far_cells(mazes, start, min_path_length)
    mazes, flat, start = mazes[left], flat[left], start[left]
    far = distances(mazes, start).reshape(flat.shape) >= min_path_length
    # A uniform goal would be far with the share of far cells as probability.
    share_far = far.sum(axis=1) / np.maximum((flat == OPEN).sum(axis=1) - 1, 1)
    kept = rng.random(len(flat)) < share_far / LARGE_SHARE
    mazes, start, far = mazes[kept], start[kept], far[kept]
    goal = (far * (1 - rng.random(far.shape))).argmax(axis=1)
    flat, every = mazes.reshape(len(mazes), side * side), np.arange(len(mazes))
    flat[every, start], flat[every, goal] = START, GOAL
    return mazes


def _with_far_cells(mazes: np.ndarray, start: np.ndarray, moves: int) -> np.ndarray:
    """Indices of the mazes (B, side, side) with a cell at least so many moves from `start` (B,).

    All mazes are flooded together, a row of cells as the bits of one number.
    """
    count, side, _ = mazes.shape
    bits = np.uint64(1) << np.arange(1, side + 1, dtype=np.uint64)
    unseen = ((mazes != WALL) @ bits).T.copy()  # (side, B)
    every = np.arange(count)
    row, column = np.divmod(start, side)
    front = np.zeros_like(unseen)
    front[row, every] = bits[column] & unseen[row, every]
    for step in range(moves):
        unseen &= ~front
        spread = (front << np.uint64(1)) | (front >> np.uint64(1))
        spread[1:] |= front[:-1]
        spread[:-1] |= front[1:]
        front = spread & unseen
        if step % COMPACTED_EVERY == 0:
            going = front.any(axis=0)
            every, front, unseen = every[going], front[:, going], unseen[:, going]
    return every[front.any(axis=0)]
