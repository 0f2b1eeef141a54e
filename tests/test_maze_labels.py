"""Which of several shortest paths is the label, and what becomes of it when the maze is turned."""

from collections import deque

import numpy as np
import pytest
import torch

from dataset import build_maze_dataset
from dataset.augment import dihedral
from dataset.batch import Bucket, materialise
from dataset.canvas import labels_of
from dataset.games import GAMES
from dataset.generate import maze, scattered_maze
from dataset.npy import export
from dataset.samplers import PairSampler
from dataset.store import Store
from tests.support.runs import load_config


def plain_first_path(cells: np.ndarray) -> np.ndarray:
    """A queue and a dictionary of who found whom."""
    (start,), (goal,) = (list(map(tuple, np.argwhere(cells == kind))) for kind in (maze.START, maze.GOAL))
    came_from, queue = {start: start}, deque([start])
    while queue:
        row, column = queue.popleft()
        for step in ((row + 1, column), (row, column - 1), (row, column + 1), (row - 1, column)):
            inside = min(step) >= 0 and max(step) < len(cells)
            if inside and step not in came_from and cells[step] != maze.WALL:
                came_from[step] = (row, column)
                queue.append(step)
    answer = cells.copy()
    here = came_from.get(goal, start)
    while here != start:
        answer[here] = maze.PATH
        here = came_from[here]
    return answer


def scattered(side: int, count: int, seed: int = 0) -> np.ndarray:
    """Mazes with many shortest paths, and some without any."""
    rng = np.random.default_rng(seed)
    mazes = (rng.random((count, side, side)) > 0.3).astype(np.uint8)
    flat, every = mazes.reshape(count, -1), np.arange(count)
    places = rng.random(flat.shape).argsort(axis=1)
    flat[every, places[:, 0]], flat[every, places[:, 1]] = maze.START, maze.GOAL
    return mazes


def build(folder, *options) -> Store:
    arguments = ["--output-dir", folder, "--side", 9, "--train-puzzles", 30, "--test-puzzles", 5, *options]
    build_maze_dataset.build(build_maze_dataset.parse_arguments(list(map(str, arguments))))
    return Store.load(folder)


def test_many_labels_at_once_are_those_of_a_plain_search():
    mazes = scattered(12, 200)
    _, lengths, unique = maze.shortest_paths(mazes)
    assert (lengths < 0).any() and not unique.all()
    labels = maze.first_paths(mazes)
    assert np.array_equal(labels, np.stack([plain_first_path(cells) for cells in mazes]))
    assert np.array_equal(maze.marks_shortest_path(mazes, labels), lengths > 0)


def test_a_turned_label_is_often_not_the_label_of_the_turned_maze():
    mazes = scattered(12, 400)
    mazes = mazes[maze.shortest_paths(mazes)[1] > 10]
    labels = maze.first_paths(mazes)
    game = GAMES["maze"]
    for index in range(1, 8):
        turned = game.turned_answers(mazes, index)
        assert np.array_equal(dihedral(turned, index), maze.first_paths(dihedral(mazes, index)))
        # Only left and right come one after the other in the rule's order, so their exchange matters least.
        assert (turned != labels).any(axis=(1, 2)).mean() > (0 if index == 4 else 0.3)
        # Each of them is a shortest path of the maze nevertheless.
        assert maze.marks_shortest_path(mazes, turned).all()


@pytest.mark.parametrize("augmentation", ["random", "table"])
def test_training_shows_the_label_of_the_maze_as_it_is_turned(augmentation, tmp_path):
    store = build(tmp_path / "d", "--loops", 0.6, "--aug")
    config = load_config(store, "data=maze", "data.buckets=[9]", f"data.augmentation={augmentation}").data
    samples = PairSampler(store, config, 0, 256).sample(0, Bucket(9, 0))
    assert set(samples.transform.tolist()) == set(range(8))
    data = materialise(samples, store, store.grid_table).data
    shown = data["inputs"].numpy().reshape(-1, 9, 9) - 1
    wanted = torch.from_numpy(maze.first_paths(shown).reshape(len(shown), -1) + 1)
    assert torch.equal(data["labels"], labels_of(wanted))
    # Without the rule some of these labels would be other ones.
    straight = np.stack(
        [
            dihedral(store.pair(pair).answer, index)
            for pair, index in zip(samples.query.tolist(), samples.transform.tolist(), strict=True)
        ]
    )
    assert (straight.reshape(len(shown), -1) + 1 != wanted.numpy()).any()


def test_exported_copies_follow_the_rule_too(tmp_path):
    store = build(tmp_path / "d", "--loops", 0.6, "--aug")
    export(store, tmp_path / "npy")
    inputs, labels = (
        np.load(tmp_path / "npy" / "train" / f"all__{name}.npy").reshape(-1, 9, 9) - 1
        for name in ("inputs", "labels")
    )
    assert len(inputs) == 8 * 30 and np.array_equal(maze.first_paths(inputs), labels)


def test_a_dataset_names_the_rule_of_its_labels(tmp_path):
    by_rule = build(tmp_path / "first", "--loops", 0.5)
    assert by_rule.metadata.details["labels"] == "breadth_first" and by_rule.pair_turned is not None
    unique = build(tmp_path / "unique", "--paths", "unique")
    assert unique.metadata.details["labels"] == "unique" and unique.pair_turned is None
    assert not by_rule.turned_labels_contradict and not unique.turned_labels_contradict
    unique.metadata.details["labels"] = "given"
    assert unique.turned_labels_contradict


def test_scattered_walls_leave_exactly_the_mazes_with_a_long_path():
    rng = np.random.default_rng(0)
    mazes = (rng.random((500, 12, 12)) > 0.35).astype(np.uint8)
    start = mazes.reshape(500, -1).argmax(axis=1)
    for moves in (1, 9, 20):
        far = maze.distances(mazes, start).reshape(500, -1).max(axis=1) >= moves
        found = scattered_maze._with_far_cells(mazes, start, moves)
        assert 0 < len(found) < 500 and np.array_equal(found, np.flatnonzero(far))
    made = scattered_maze.generate(12, 4000, 20, rng)
    _, lengths, unique = maze.shortest_paths(made)
    assert len(made) > 10 and lengths.min() >= 20 and not unique.all()
    shares = (made == maze.WALL).mean(axis=(1, 2))
    assert 0.25 < shares.mean() < 0.5
    assert all(((made == kind).sum(axis=(1, 2)) == 1).all() for kind in (maze.START, maze.GOAL))
