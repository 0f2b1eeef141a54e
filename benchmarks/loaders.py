"""Training examples per second: our samplers and the ancestors' loaders, in turn."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.processes import DRIVE, run, their_build
from config import compose
from config.schema import PretrainConfig
from dataset.batch import DataConfig, materialise
from dataset.samplers import SAMPLERS
from dataset.store import Store
from utils.files import write_json

BATCH = 256
AUGMENTATIONS = 8  # few, so that the ancestor's files stay in the page cache
# The loaders: whose, what they show, and the canvas.
PUZZLES_THEIRS, PUZZLES = "original, puzzles, 30x30", "ours, puzzles, 30x30"
EPISODES_THEIRS, EPISODES, SMALL_EPISODES = (
    "ETRM ancestor, episodes, 30x30",
    "ours, episodes, 30x30",
    "ours, episodes, 10x10",
)


@dataclass(frozen=True)
class Rates:
    """Examples per second of one contestant, one number per round."""

    rounds: list[float]

    @property
    def median(self) -> float:
        return float(np.median(self.rounds))

    def __str__(self) -> str:
        return f"{self.median:,.0f} [{min(self.rounds):,.0f}, {max(self.rounds):,.0f}]"


class OurRate:
    """Measures training examples per second of a dataset: sampled, and drawn as tokens on the device."""

    def __init__(self, dataset: Path, config: DataConfig, device: torch.device):
        self.store, self.device, self.step = Store.load(dataset), device, 0
        self.sampler = SAMPLERS[self.store.metadata.layout](self.store, config, 0, BATCH)
        self.table = self.store.grid_table.to(device)
        self.sampling = self.drawing = 0.0

    def __call__(self, seconds: float) -> float:
        """One round; the first batch is not counted."""
        self._batch()
        self.sampling, self.drawing, count = 0.0, 0.0, 0
        while self.sampling + self.drawing < seconds:
            count += self._batch()
        return count / (self.sampling + self.drawing)

    @property
    def sampling_share(self) -> float:
        """The share of the last round's time that the sampler took; the rest drew the tokens."""
        return self.sampling / (self.sampling + self.drawing)

    def _batch(self) -> int:
        start = time.perf_counter()
        samples = self.sampler.sample(self.step)
        sampled = time.perf_counter()
        size = materialise(samples, self.store, self.table).size
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.sampling += sampled - start
        self.drawing += time.perf_counter() - sampled
        self.step += 1
        return size


def their_rate(checkout: Path, loader: str, data: Path, device: torch.device) -> Callable[[float], float]:
    """Measures training examples per second of an ancestor's loader."""
    options = {"loader": loader, "data": str(data), "batch_size": BATCH, "device": device.type}
    return lambda seconds: float(
        run([str(DRIVE), "rate", json.dumps({**options, "seconds": seconds})], checkout)
    )


def alternate(
    contestants: dict[str, Callable[[float], float]], rounds: int, seconds: float
) -> dict[str, Rates]:
    """Every contestant in every round, so that what else the machine does meets all of them."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            rates[name].append(contestant(seconds))
    return {name: Rates(values) for name, values in rates.items()}


def data_config(name: str, path: Path, *overrides: str) -> DataConfig:
    """A data configuration of config/data, for the dataset at `path`."""
    arch = "trm" if name == "arc1_puzzle" else "etrm"
    return compose.load(
        PretrainConfig, "pretrain", [f"arch={arch}", f"data={name}", f"data.path='{path}'", *overrides]
    ).data


def small_dataset(work: Path) -> Path:
    """Our dataset of the recipe arc1-small."""
    run(["-m", "dataset.build_arc_dataset", "--recipe", "arc1-small", "--output-dir", str(work / "small")])
    return work / "small"


def etrm_dataset(etrm: Path, dataset: Path, work: Path) -> Path:
    """The ETRM ancestor's dataset of the training tasks of ours."""
    ours, prefix = Store.load(dataset, "fewshot"), work / "tasks"
    tasks = [ours.task(index) for index in ours.tasks_of("train")]
    write_json(Path(f"{prefix}_training_challenges.json"), {task.id: task.to_json() for task in tasks})
    output = work / "small-original"
    run(
        their_build(str(prefix), ["training"], AUGMENTATIONS, output, "dataset.build_arc_dataset_encoder"),
        etrm,
    )
    return output


def batches(
    trm: Path, etrm: Path | None, work: Path, rounds: int, seconds: float, device: torch.device
) -> dict[str, Rates]:
    """The rates of all loaders; `work` holds what `check` left there."""
    imported, small = work / "imported", small_dataset(work)
    ours = {
        PUZZLES: OurRate(imported, data_config("arc1_puzzle", imported), device),
        EPISODES: OurRate(small, data_config("arc1_small", small, "data.canvas=full"), device),
        SMALL_EPISODES: OurRate(small, data_config("arc1_small", small, "data.buckets=[10]"), device),
    }
    theirs = {PUZZLES_THEIRS: their_rate(trm, "puzzle_dataset:PuzzleDataset", work / "original", device)}
    if etrm:
        loader = "dataset.fewshot_puzzle_dataset:FewShotPuzzleDataset"
        theirs[EPISODES_THEIRS] = their_rate(etrm, loader, etrm_dataset(etrm, small, work), device)
    rates = alternate({**theirs, **ours}, rounds, seconds)
    for name, rate in rates.items():
        share = f", {ours[name].sampling_share:.0%} of the time in the sampler" if name in ours else ""
        print(f"{name:<48}{rate}{share}")
    return rates
