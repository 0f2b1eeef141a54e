"""Random tasks and the datasets made of them."""

from pathlib import Path

import numpy as np

from dataset.store import Store
from dataset.task import Pair, Task
from dataset.writer import write_dataset


def random_task(
    rng: np.random.Generator, task_id: str, demonstrations: int = 3, queries: int = 1, side: int = 5
) -> Task:
    """A task of random grids with different shapes."""

    def grid() -> np.ndarray:
        return rng.integers(0, 10, rng.integers(1, side + 1, 2)).astype(np.uint8)

    pairs = [Pair(grid(), grid()) for _ in range(demonstrations + queries)]
    return Task(task_id, tuple(pairs[:demonstrations]), tuple(pairs[demonstrations:]))


def write_store(
    folder: Path,
    layout: str = "fewshot",
    train: int = 6,
    test: int = 5,
    num_aug: int = 3,
    side: int = 5,
    seed: int = 0,
) -> Store:
    """A dataset of random tasks with 2 to 4 demonstrations and 1 to 2 queries."""
    rng = np.random.default_rng(seed)
    tasks = {
        name: [random_task(rng, f"{name}{i}", 2 + i % 3, 1 + i % 2, side) for i in range(count)]
        for name, count in (("a", train), ("b", test))
    }
    write_dataset(
        folder,
        tasks,
        ["b"],
        layout=layout,
        source="random",
        seed=seed,
        num_aug=num_aug,
        max_grid_size=side,
    )
    return Store.load(folder, layout)


def puzzle_of(text: str) -> np.ndarray:
    """One square Sudoku from its cells in reading order, a point for a blank: (1, side, side)."""
    side = int(len(text) ** 0.5)
    return np.array([0 if c == "." else int(c) for c in text], np.uint8).reshape(1, side, side)
