"""Mazes: shortest paths and fingerprints."""

from collections import Counter, deque

import numpy as np
import pytest

from dataset.augment import dihedral
from dataset.generate import maze


def walk(cells: np.ndarray, origin: tuple[int, int]) -> dict[tuple[int, int], int]:
    """Plain breadth-first search."""
    length, queue = {origin: 0}, deque([origin])
    while queue:
        row, column = queue.popleft()
        for step in ((row, column + 1), (row, column - 1), (row + 1, column), (row - 1, column)):
            if step not in length and min(step) >= 0 and max(step) < len(cells) and cells[step] != maze.WALL:
                length[step] = length[(row, column)] + 1
                queue.append(step)
    return length


@pytest.mark.parametrize("side", [5, 6, 15, 30])
@pytest.mark.parametrize("loops", [0.0, 0.3])
def test_marked_cells_are_exactly_those_on_shortest_paths(side, loops):
    mazes = maze.generate(side, 20, loops, 1, np.random.default_rng(side))
    answers, lengths, unique = maze.shortest_paths(mazes)
    for cells, answer, length, only in zip(mazes, answers, lengths, unique, strict=True):
        (start,), (goal,) = (list(map(tuple, np.argwhere(cells == kind))) for kind in (maze.START, maze.GOAL))
        to, back = walk(cells, start), walk(cells, goal)
        assert len(to) == (cells != maze.WALL).sum() and to[goal] == length >= 1
        on_path = {cell for cell in to if to[cell] + back[cell] == length}
        assert {tuple(cell) for cell in np.argwhere(answer == maze.PATH)} == on_path - {start, goal}
        assert only == (max(Counter(to[cell] for cell in on_path).values()) == 1)
        assert np.array_equal(np.where(answer == maze.PATH, maze.OPEN, answer), cells)
    if not loops:
        rooms = (side - 1) // 2
        assert (
            unique.all() and ((mazes != maze.WALL).sum(axis=(1, 2)) == 2 * rooms**2 - 1).all()
        )  # a spanning tree


def test_a_maze_without_a_way_has_no_path():
    blocked = np.zeros((1, 5, 5), np.uint8)
    blocked[0, 1, 1], blocked[0, 3, 3] = maze.START, maze.GOAL
    answers, length, unique = maze.shortest_paths(blocked)
    assert length[0] == -1 and np.array_equal(answers, blocked) and not unique[0]


def test_maze_fingerprints_are_equal_up_to_rotation_and_reflection_only():
    mazes = maze.generate(9, 200, 0.1, 1, np.random.default_rng(0))
    prints = maze.fingerprints(mazes)
    assert len(set(prints.tolist())) == 200
    assert all(np.array_equal(maze.fingerprints(dihedral(mazes, index)), prints) for index in range(8))
