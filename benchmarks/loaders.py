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
EPISODES_THEIRS, EPISODES = "ETRM ancestor, episodes, 30x30", "ours, episodes, 30x30"
SMALL_EPISODES = "ours, episodes, 10x10"
RULES = "--families colour_permutation --stages 1 --test-splits test_rules --rows 4 6 --columns 4 6"


@dataclass(frozen=True)
class Rates:
    """Examples per second of one contestant, one number per round."""

    rounds: list[float]

    @property
    def median(self) -> float:
        """The rate of a usual round, which a round that something disturbed does not change."""
        return float(np.median(self.rounds))

    def __str__(self) -> str:
        return f"{self.median:,.0f} [{min(self.rounds):,.0f}, {max(self.rounds):,.0f}]"


class OurRate:
    """Measures our training examples per second: sampled, and drawn as tokens on the device."""

    def __init__(self, dataset: Path, config: DataConfig, device: torch.device):
        self.store, self.device, self.step = Store.load(dataset), device, 0
        self.sampler = SAMPLERS[self.store.metadata.layout](self.store, config, 0, BATCH)
        self.table = self.store.grid_table.to(device)
        self.sampling = self.drawing = 0.0

    def __call__(self, seconds: float) -> float:
        """The rate of one round of at least so many seconds."""
        self._batch()  # not counted, since caches are cold after the others' turns
        self.sampling, self.drawing, count = 0.0, 0.0, 0
        while self.sampling + self.drawing < seconds:
            count += self._batch()
        return count / (self.sampling + self.drawing)

    @property
    def sampling_share(self) -> float:
        """The share of the last round's time that the sampler took. The rest drew the tokens."""
        return self.sampling / (self.sampling + self.drawing)

    def _batch(self) -> int:
        """Make one batch, and return its size."""
        start = time.perf_counter()
        samples = self.sampler.sample(self.step)
        sampled = time.perf_counter()
        size = materialise(samples, self.store, self.table).size
        # A GPU works on after the call has returned.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.sampling += sampled - start
        self.drawing += time.perf_counter() - sampled
        self.step += 1
        return size


def their_rate(checkout: Path, loader: str, data: Path, device: torch.device) -> Callable[[float], float]:
    """A function from seconds to training examples per second, which measures an ancestor's loader."""
    options = {"loader": loader, "data": str(data), "batch_size": BATCH, "device": device.type}

    def measure(seconds: float) -> float:
        return float(run([str(DRIVE), "rate", json.dumps({**options, "seconds": seconds})], checkout))

    return measure


def alternate(
    contestants: dict[str, Callable[[float], float]], rounds: int, seconds: float
) -> dict[str, Rates]:
    """Measure every contestant in every round."""
    # In turn, so that other work of the machine slows all of them alike.
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            rates[name].append(contestant(seconds))
    return {name: Rates(values) for name, values in rates.items()}


def data_config(name: str, path: Path, *overrides: str) -> DataConfig:
    """The data configuration `name` of config/data, for the dataset at `path`."""
    arch = "trm" if name == "arc1_puzzle" else "etrm"
    choices = [f"arch={arch}", f"data={name}", f"data.path='{path}'"]
    return compose.load(PretrainConfig, "pretrain", [*choices, *overrides]).data


def small_dataset(work: Path) -> Path:
    """The folder of our dataset of the recipe arc1-small, built in `work`."""
    run(["-m", "dataset.build_arc_dataset", "--recipe", "arc1-small", "--output-dir", str(work / "small")])
    return work / "small"


def rules_dataset(folder: Path) -> Path:
    """The folder of a dataset for the recipe rules_smoke, with as few tasks as measurements need."""
    sizes = "--train-tasks 2000 --test-tasks 10"
    run(["-m", "dataset.build_rules_dataset", *f"{RULES} {sizes}".split(), "--output-dir", str(folder)])
    return folder


def etrm_dataset(etrm: Path, dataset: Path, work: Path) -> Path:
    """The folder of the ETRM ancestor's dataset of the training tasks of ours."""
    ours, prefix = Store.load(dataset, "fewshot"), work / "tasks"
    tasks = [ours.task(index) for index in ours.tasks_of("train")]
    write_json(Path(f"{prefix}_training_challenges.json"), {task.id: task.to_json() for task in tasks})
    output, builder = work / "small-original", "dataset.build_arc_dataset_encoder"
    run(their_build(str(prefix), ["training"], AUGMENTATIONS, output, builder), etrm)
    return output


def batches(
    trm: Path, etrm: Path | None, work: Path, rounds: int, seconds: float, device: torch.device
) -> dict[str, Rates]:
    """Print and return the rates of all loaders. `work` holds what `check` left there."""
    # Both sides show the same tasks: puzzles of the original's dataset, episodes of ours.
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
