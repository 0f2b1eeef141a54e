"""Square mazes: generator, shortest paths, fingerprints, for many mazes at once.

Grids are (B, side, side) uint8 indices into `CHARACTERS`, the ancestors' alphabet: wall, open, start, goal,
path. A path moves in the four directions. Its length is its number of moves.
"""

import numpy as np

from dataset.augment import dihedral

CHARACTERS = "# SGo"
WALL, OPEN, START, GOAL, PATH = range(len(CHARACTERS))
MIN_SIDE = 5  # 2x2 rooms


def generate(
    side: int, count: int, loops: float, min_path_length: int, rng: np.random.Generator
) -> np.ndarray:
    """Mazes (<= count, side, side) with a start and a goal at least `min_path_length` moves apart.

    Rooms lie on every second row and column. A random depth-first walk joins them to a tree, which makes
    long paths. Then each remaining wall between two rooms falls with probability `loops`. An even side has
    a second wall line on a random border in each direction. Start and goal are uniform over the open cells
    that are far enough apart. A maze without such a goal is left out, so fewer than `count` may come back.
    """
    rooms = (side - 1) // 2
    mazes = np.zeros((count, side, side), np.uint8)
    mazes[:, 1 : 2 * rooms : 2, 1 : 2 * rooms : 2] = OPEN
    _carve_trees(mazes.reshape(count, -1), side, rooms, rng)
    inner = mazes[:, 1 : 2 * rooms, 1 : 2 * rooms]
    inner[:, ::2, 1::2][rng.random((count, rooms, rooms - 1)) < loops] = OPEN
    inner[:, 1::2, ::2][rng.random((count, rooms - 1, rooms)) < loops] = OPEN
    # Rooms and walls alternate, so an even side has a line to spare in each direction.
    if side % 2 == 0:
        for axis in (1, 2):
            shifted = rng.random(count) < 0.5
            mazes[shifted] = np.roll(mazes[shifted], 1, axis)
    flat, every = mazes.reshape(count, -1), np.arange(count)
    # The largest of random numbers above 0, one per cell: a uniform choice for all mazes at once.
    start = ((flat == OPEN) * (1 - rng.random(flat.shape))).argmax(axis=1)
    far = distances(mazes, start).reshape(count, -1) >= max(min_path_length, 1)
    goal = (far * (1 - rng.random(flat.shape))).argmax(axis=1)
    flat[every, start], flat[every, goal] = START, GOAL
    return mazes[far.any(axis=1)]


def _carve_trees(flat: np.ndarray, side: int, rooms: int, rng: np.random.Generator) -> None:
    """Open walls of (B, side * side) mazes until the rooms form a spanning tree.

    One step of every maze's walk is made at a time.
    """
    every = np.arange(len(flat))
    # A frame of visited rooms keeps the walk inside.
    visited = np.ones((len(flat), rooms + 2, rooms + 2), bool)
    visited[:, 1:-1, 1:-1] = False
    visited = np.reshape(visited, (len(flat), -1))
    moves = np.array([1, -1, rooms + 2, -rooms - 2])
    trail = np.zeros((len(flat), rooms * rooms), np.int64)
    row, column = rng.integers(1, rooms + 1, (2, len(flat)))
    trail[:, 0] = row * (rooms + 2) + column
    visited[every, trail[:, 0]] = True
    depth = np.zeros(len(flat), np.int64)
    # Every room but the first is entered once and, but for the last ones, left once.
    for _ in range(2 * rooms * rooms - 2):
        here = trail[every, depth]
        free = ~visited[every[:, None], here[:, None] + moves]
        move = moves[(free * (1 - rng.random(free.shape))).argmax(axis=1)]
        ahead = free.any(axis=1)
        maze, room, move = every[ahead], here[ahead], move[ahead]
        visited[maze, room + move] = True
        # The wall between two rooms is the cell half-way between theirs.
        rows, columns = np.divmod(room, rooms + 2)
        row_step, column_step = np.divmod(room + move, rooms + 2) - np.stack([rows, columns])
        flat[maze, (2 * rows - 1 + row_step) * side + 2 * columns - 1 + column_step] = OPEN
        # A dead end goes one room back along the trail.
        depth = np.maximum(depth + np.where(ahead, 1, -1), 0)
        trail[maze, depth[maze]] = room + move


def distances(mazes: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Moves from cell `origin` (B,), which is row * side + column, to every cell.

    Returns (B, side, side) int32, -1 for cells that cannot be reached.
    """
    count, side, _ = mazes.shape
    width = side + 2
    unseen = np.zeros((count, width, width), bool)  # framed by walls
    unseen[:, 1:-1, 1:-1] = mazes != WALL
    result = np.full(unseen.shape, -1, np.int32)
    moves = np.array([1, -1, width, -width])
    rows, columns = np.divmod(origin, side)
    # Breadth first, the fronts of all mazes together as flat indices into the framed grids.
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
    """Answers (B, side, side) that mark every cell on any shortest path, lengths (B,), which are unique (B,).

    Every maze must have one start and one goal. If no path joins them, the length is -1 and nothing is
    marked.
    """
    flat = mazes.reshape(-1, mazes.shape[1] ** 2)
    start, goal = (flat == START).argmax(axis=1), (flat == GOAL).argmax(axis=1)
    from_start, from_goal = distances(mazes, start), distances(mazes, goal)
    length = from_start.reshape(flat.shape)[np.arange(len(flat)), goal]
    # A cell lies on a shortest path exactly when the ways to it and from it add up to the shortest length.
    on_path = (from_start >= 0) & (from_start + from_goal == length[:, None, None])
    answers = np.where(on_path & (mazes == OPEN), np.uint8(PATH), mazes)
    return answers, length, on_path.sum(axis=(1, 2)) == length + 1


def first_paths(mazes: np.ndarray) -> np.ndarray:
    """Answers (B, side, side) that mark one shortest path each, the labels' rule of Maze-Hard.

    It is the path that a breadth-first search from the start finds first. A cell's neighbours are visited in
    the order down, left, right, up. Nothing is marked where no path leads to the goal. Every maze must have
    one start and one goal.
    """
    count, side, _ = mazes.shape
    width = side + 2
    unseen = np.zeros((count, width, width), bool)  # framed by walls
    unseen[:, 1:-1, 1:-1] = mazes != WALL
    moves = np.array([width, -1, 1, -width])
    answers = np.full(unseen.shape, WALL, np.uint8)
    answers[:, 1:-1, 1:-1] = mazes
    flat, open_, came_from = answers.ravel(), unseen.ravel(), np.zeros(unseen.size, np.int64)
    start, goal = (np.flatnonzero(flat == cell) for cell in (START, GOAL))
    front = start
    # Breadth first, the queues of all mazes together: those who were found first stay first.
    while len(front) and open_[goal].any():
        open_[front] = False
        reached, reached_from = (front[:, None] + moves).ravel(), front.repeat(len(moves))
        fresh = open_[reached]
        reached, reached_from = reached[fresh], reached_from[fresh]
        earliest = np.sort(np.unique(reached, return_index=True)[1])
        front = reached[earliest]
        came_from[front] = reached_from[earliest]
    here = came_from[goal]  # 0, which lies in the frame, for a goal that was not reached
    while len(here := here[(flat[here] != START) & (here > 0)]):
        flat[here] = PATH
        here = came_from[here]
    return answers[:, 1:-1, 1:-1]


def marks_path(mazes: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Which answers (B, side, side) mark one path from start to goal and change nothing else: (B,) bool.

    The marks can be followed without a choice: none lies beside the path, and it does not touch itself.
    """
    return _marked_length(mazes, answers) > 0


def marks_shortest_path(mazes: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Which answers (B, side, side) mark a shortest path, any one of several: (B,) bool."""
    marked = _marked_length(mazes, answers)
    return (marked > 0) & (marked == _lengths(mazes))


def _marked_length(mazes: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Moves (B,) of the path that each answer marks, -1 where it marks none or something else, too."""
    unmarked = np.where((answers == PATH) & (mazes == OPEN), np.uint8(OPEN), answers)
    same = (unmarked == mazes).all(axis=(1, 2))
    length = _lengths(np.where(answers == OPEN, np.uint8(WALL), answers))
    # Within the marks a shortest way that uses all of them is the only one.
    return np.where(same & (length == (answers == PATH).sum(axis=(1, 2)) + 1), length, -1)


def _lengths(mazes: np.ndarray) -> np.ndarray:
    """Moves (B,) from start to goal, -1 where there is no way."""
    flat = mazes.reshape(len(mazes), -1)
    start, goal = (flat == START).argmax(axis=1), (flat == GOAL).argmax(axis=1)
    return distances(mazes, start).reshape(flat.shape)[np.arange(len(flat)), goal]


def fingerprints(mazes: np.ndarray) -> np.ndarray:
    """(B,) uint64, equal for mazes that a rotation or reflection maps to each other.

    Other mazes differ, up to the chance of a 64-bit collision.
    """
    weights = np.random.default_rng(0).integers(0, 1 << 64, mazes[0].size, np.uint64)
    return np.min([dihedral(mazes, index).reshape(len(mazes), -1) @ weights for index in range(8)], axis=0)
