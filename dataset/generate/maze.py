"""Square mazes: generator, shortest paths, fingerprints, for many mazes at once.

Grids are (B, side, side) uint8 indices into `CHARACTERS`, the ancestors' alphabet: wall, open, start, goal, path. A path
moves in the four directions; its length is its number of moves.
"""

import numpy as np

from dataset.augment import dihedral

CHARACTERS = "# SGo"
WALL, OPEN, START, GOAL, PATH = range(len(CHARACTERS))
MIN_SIDE = 5  # 2x2 rooms


def generate(
    side: int, count: int, loops: float, min_path_length: int, rng: np.random.Generator
) -> np.ndarray:
    """Mazes (<= count, side, side) with a start and a goal at least `min_path_length` moves apart, where a maze has such a goal.

    Rooms lie on every second row and column; a random depth-first walk joins them to a tree, which makes long paths, and
    then each remaining wall between two rooms falls with probability `loops`. An even side has a second wall line on a
    random border in each direction. Start and goal are uniform over the open cells that are far enough apart.
    """
    rooms = (side - 1) // 2
    mazes = np.zeros((count, side, side), np.uint8)
    mazes[:, 1 : 2 * rooms : 2, 1 : 2 * rooms : 2] = OPEN
    _carve_trees(mazes.reshape(count, -1), side, rooms, rng)
    inner = mazes[:, 1 : 2 * rooms, 1 : 2 * rooms]
    inner[:, ::2, 1::2][rng.random((count, rooms, rooms - 1)) < loops] = OPEN
    inner[:, 1::2, ::2][rng.random((count, rooms - 1, rooms)) < loops] = OPEN
    if side % 2 == 0:
        for axis in (1, 2):
            shifted = rng.random(count) < 0.5
            mazes[shifted] = np.roll(mazes[shifted], 1, axis)
    flat, every = mazes.reshape(count, -1), np.arange(count)
    start = ((flat == OPEN) * (1 - rng.random(flat.shape))).argmax(axis=1)
    far = distances(mazes, start).reshape(count, -1) >= max(min_path_length, 1)
    goal = (far * (1 - rng.random(flat.shape))).argmax(axis=1)
    flat[every, start], flat[every, goal] = START, GOAL
    return mazes[far.any(axis=1)]


def _carve_trees(flat: np.ndarray, side: int, rooms: int, rng: np.random.Generator) -> None:
    """Open walls of (B, side * side) mazes until the rooms are a spanning tree: one step of every maze's walk at a time."""
    every = np.arange(len(flat))
    visited = np.ones(
        (len(flat), rooms + 2, rooms + 2), bool
    )  # a frame of visited rooms keeps the walk inside
    visited[:, 1:-1, 1:-1] = False
    visited = visited.reshape(len(flat), -1)
    moves = np.array([1, -1, rooms + 2, -rooms - 2])
    trail = np.zeros((len(flat), rooms * rooms), np.int64)
    row, column = rng.integers(1, rooms + 1, (2, len(flat)))
    trail[:, 0] = row * (rooms + 2) + column
    visited[every, trail[:, 0]] = True
    depth = np.zeros(len(flat), np.int64)
    for _ in range(2 * rooms * rooms - 2):  # every room is entered once and, but for the last ones, left once
        here = trail[every, depth]
        free = ~visited[every[:, None], here[:, None] + moves]
        move = moves[(free * (1 - rng.random(free.shape))).argmax(axis=1)]
        ahead = free.any(axis=1)
        maze, room, move = every[ahead], here[ahead], move[ahead]
        visited[maze, room + move] = True
        rows, columns = np.divmod(room, rooms + 2)
        row_step, column_step = np.divmod(room + move, rooms + 2) - np.stack([rows, columns])
        flat[maze, (2 * rows - 1 + row_step) * side + 2 * columns - 1 + column_step] = OPEN
        depth = np.maximum(depth + np.where(ahead, 1, -1), 0)
        trail[maze, depth[maze]] = room + move


def distances(mazes: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Moves from cell `origin` (B,) (row * side + column) to every cell, (B, side, side) int32, -1 where there is no way."""
    count, side, _ = mazes.shape
    width = side + 2
    unseen = np.zeros((count, width, width), bool)  # framed by walls
    unseen[:, 1:-1, 1:-1] = mazes != WALL
    result = np.full(unseen.shape, -1, np.int32)
    moves = np.array([1, -1, width, -width])
    rows, columns = np.divmod(origin, side)
    front = (np.arange(count) * width + rows + 1) * width + columns + 1
    length = 0
    while len(front):
        result.reshape(-1)[front] = length
        unseen.reshape(-1)[front] = False
        front = (front[:, None] + moves).ravel()
        front = np.unique(front[unseen.reshape(-1)[front]])
        length += 1
    return result[:, 1:-1, 1:-1]


def shortest_paths(mazes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Answers (B, side, side) that mark every cell on any shortest path, path lengths (B,), and which paths are unique (B,).

    Length -1 where no path joins start and goal; nothing is marked then. Every maze must have one start and one goal.
    """
    flat = mazes.reshape(-1, mazes.shape[1] ** 2)
    start, goal = (flat == START).argmax(axis=1), (flat == GOAL).argmax(axis=1)
    from_start, from_goal = distances(mazes, start), distances(mazes, goal)
    length = from_start.reshape(flat.shape)[np.arange(len(flat)), goal]
    on_path = (from_start >= 0) & (from_start + from_goal == length[:, None, None])
    answers = np.where(on_path & (mazes == OPEN), np.uint8(PATH), mazes)
    return answers, length, on_path.sum(axis=(1, 2)) == length + 1


def fingerprints(mazes: np.ndarray) -> np.ndarray:
    """(B,) uint64, equal exactly for mazes that a rotation or reflection maps to each other (up to 64-bit collisions)."""
    weights = np.random.default_rng(0).integers(0, 1 << 64, mazes[0].size, np.uint64)
    return np.min([dihedral(mazes, index).reshape(len(mazes), -1) @ weights for index in range(8)], axis=0)
