"""Count how many computed tokens are real, and measure what other canvases are worth.

    python -m benchmarks.real_tokens data/arc1 --canvases 10,15,20,30:2 every5:2 every2:1 --rounds 3

--canvases are sides and a margin; every5 stands for 5, 10, ... 30. Each is counted over training samples.
Then one training step after another is made on them, in turns and on one thread. Ratios are to the first.
Whether frames of other shapes, laid out without gaps, would win tells `benchmarks.packing`.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.data import machine
from benchmarks.steps import buckets, build_sampler
from config import compose
from config.schema import PretrainConfig
from dataset.batch import Batch, DataSizes, materialise
from dataset.canvas import IGNORE_LABEL_ID, PAD
from dataset.samplers import Sampler
from dataset.store import Store
from dataset.task import MAX_SIDE
from models.act import initial_carry
from tools.info import describe
from tools.summary import meta_data, on_meta
from training.start import Run
from utils.arguments import natural, parser_of, positive
from utils.distributed import World
from utils.environment import git_commit
from utils.errors import reports_user_errors

CPU = torch.device("cpu")
EVERY = "every"
NAME = 26  # characters of a column


@dataclass(frozen=True)
class Canvases:
    """Sides and margin of the canvases, under the name by which they were asked for."""

    name: str
    sides: list[int]
    margin: int

    @classmethod
    def read(cls, text: str) -> "Canvases":
        """From SIDES:MARGIN. Raises `ArgumentTypeError`."""
        sides, _, margin = text.partition(":")
        try:
            if sides.startswith(EVERY):
                step = int(sides.removeprefix(EVERY))
                return cls(text, list(range(MAX_SIDE, 0, -step))[::-1], int(margin))
            return cls(text, [int(side) for side in sides.split(",")], int(margin))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is neither 10,15,20,30:2 nor {EVERY}5:2, sides and a margin"
            ) from None

    @property
    def overrides(self) -> list[str]:
        """As for pretrain_etrm.py."""
        return ["data.canvas=task", f"data.buckets={self.sides}", f"data.canvas_margin={self.margin}"]

    def config(self, dataset: Path, overrides: list[str], *more: str) -> PretrainConfig:
        """The training run on these canvases."""
        own = ["data=arc1", f"data.path='{dataset}'", "compile=false", "device=cpu", "threads=1"]
        return compose.load(PretrainConfig, "pretrain", [*own, *overrides, *self.overrides, *more])


@dataclass
class Tokens:
    """Real and computed tokens: of queries; of demonstrations on their canvases, as GPUs compute them; of the
    memory, which CPUs cut to the fullest sample of a batch."""

    query: np.ndarray
    demos: np.ndarray
    memory: np.ndarray

    @classmethod
    def of(cls, batch: Batch) -> "Tokens":
        """Those of a batch, one token for each cell of a pair."""
        data = batch.data
        query = (data["inputs"] != PAD) | (data["labels"] != IGNORE_LABEL_ID)
        nothing = torch.zeros(batch.size, 0, dtype=torch.bool)
        demos = nothing
        if "demo_inputs" in data:
            demos = ((data["demo_inputs"] != PAD) | (data["demo_labels"] != PAD)).flatten(1)
        most = batch.size * int(demos.sum(1).max())
        real = int(demos.sum())
        return cls(
            np.array([int(query.sum()), query.numel()]),
            np.array([real, demos.numel()]),
            np.array([real, most]),
        )

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.query + other.query, self.demos + other.demos, self.memory + other.memory)

    def shares(self) -> list[str]:
        """The real ones of each kind, in percent of those computed."""
        kinds = (self.query, self.demos, self.memory)
        return [f"{real / computed:.1%}" if computed else "-" for real, computed in kinds]


def count_tokens(store: Store, sampler: Sampler, draws: int) -> Tokens:
    """The tokens of so many batches, in the shares in which training meets its buckets."""
    order = islice(buckets(sampler), draws)
    drawn = (sampler.sample(step, bucket) for step, bucket in enumerate(order))
    batches = (Tokens.of(materialise(samples, store, store.grid_table)) for samples in drawn)
    total = next(batches)
    for tokens in batches:
        total = total + tokens
    return total


@dataclass(frozen=True)
class Statistics:
    """What the number of buckets does to training in `mode=act`, where each has a carry.

    - buckets: of side and demonstrations.
    - in_flight: samples whose ACT steps have begun, all carries together.
    - gigabytes: of the carries.
    - tasks: different ones in a batch, the mean.
    - wait: updates from a sample's first ACT step to its last, the median over samples.
    - unfinished: share of the samples in buckets whose samples never make all ACT steps in the run.
    """

    buckets: int
    in_flight: int
    gigabytes: float
    tasks: float
    wait: float
    unfinished: float

    @classmethod
    def of(cls, config: PretrainConfig, store: Store, sampler: Sampler) -> "Statistics":
        """Expected values of a run, from the chances of its buckets and tasks."""
        batch, chances = config.global_batch_size, sampler.chances
        share = np.diff(chances.bucket_cumulative, prepend=0.0)
        model = on_meta(config, DataSizes.of(store, config.data))
        size, tasks = 0, []
        for bucket in sampler.buckets:
            carry = initial_carry(model, meta_data(bucket, config.encoder is not None, batch))
            size += sum(x.nbytes for x in (*carry.states, *carry.data.values(), carry.steps, carry.halted))
            chance = np.diff(chances.choices[bucket].cumulative, prepend=0.0)
            tasks.append(float((1 - (1 - chance) ** batch).sum()))
        wait = config.arch.halt_max_steps / share
        order = np.argsort(wait)
        median = wait[order][np.searchsorted(share[order].cumsum(), 0.5)]
        unfinished = float(share[wait > config.train_steps].sum())
        count = len(share)
        return cls(count, batch * count, size / 1e9, float(share @ tasks), float(median), unfinished)

    def cells(self) -> list[str]:
        """As text, in the order of the fields."""
        numbers = [str(self.buckets), f"{self.in_flight:,}", f"{self.gigabytes:.2f}", f"{self.tasks:.1f}"]
        return [*numbers, f"{self.wait:,.0f}", f"{self.unfinished:.1%}"]


def contestant(config: PretrainConfig) -> Callable[[int], np.ndarray]:
    """A function from a number of training steps to their samples, processor seconds and wall seconds."""
    run = Run(config, World())
    _ = run.threads
    order = buckets(run.sampler)

    def measure(steps: int) -> np.ndarray:
        processor, wall = time.process_time(), time.perf_counter()
        for bucket in islice(order, steps):
            run.step(run.sampler.sample(run.state.step, bucket))
        spent = time.process_time() - processor, time.perf_counter() - wall
        return np.array([steps * config.global_batch_size, *spent])

    return measure


def race(contestants: list[Callable[[int], np.ndarray]], rounds: int, steps: int) -> np.ndarray:
    """(contestants, rounds, 3) what `contestant` measures, in turns, after a step that is not counted."""
    for measure in contestants:
        measure(1)
    found = []
    for number in range(rounds):
        found.append([measure(steps) for measure in contestants])
        seconds = " ".join(f"{spent[1]:.1f}" for spent in found[-1])
        print(f"round {number + 1}: {seconds} s of the processor", flush=True)
    return np.array(found).swapaxes(0, 1)


def ratio(values: np.ndarray, base: np.ndarray) -> str:
    """Of seconds per sample (rounds, samples and seconds): over all rounds [lowest, highest round]."""
    found = (values[:, 0] / values[:, 1]) / (base[:, 0] / base[:, 1])
    total, base = values.sum(0), base.sum(0)
    whole = (total[0] / total[1]) / (base[0] / base[1])
    return f"{whole:.2f} [{found.min():.2f}, {found.max():.2f}]"


def print_counts(options: argparse.Namespace) -> None:
    """A line for each of the canvases: shares of real tokens, then what `Statistics` says."""
    kinds = ("query", "demos", "memory", "buckets", "in flight", "carry GB", "tasks", "wait", "unfinished")
    print(f"{'':<{NAME}}" + "".join(f"{kind:>11}" for kind in kinds) + f"{'answers fit':>14}")
    for canvases in options.canvases:
        config = canvases.config(options.dataset, options.overrides)
        store = Store.load(options.dataset, *config.layouts)
        sampler = build_sampler(config, store)
        cells = count_tokens(store, sampler, options.draws).shares()
        cells += Statistics.of(config, store, sampler).cells()
        test = describe(store, config.data)["canvas"]["total"]["test"]
        fit = f"{test['answers_fit']}/{test['labelled_queries']}"
        line = "".join(f"{cell:>11}" for cell in cells)
        print(f"{canvases.name:<{NAME}}{line}{fit:>14}", flush=True)


def print_race(options: argparse.Namespace) -> None:
    """A line for each of the canvases: samples/s of the training step, and ratios to the first."""
    batch = f"global_batch_size={options.batch}"
    configs = [canvases.config(options.dataset, options.overrides, batch) for canvases in options.canvases]
    found = race([contestant(config) for config in configs], options.rounds, options.steps)
    print(f"\n{'':<{NAME}}{'samples/s':>12}{'ratio, processor':>24}{'ratio, wall':>24}")
    for canvases, values in zip(options.canvases, found, strict=True):
        rate = values[:, 0].sum() / values[:, 1].sum()
        ratios = [ratio(values[:, [0, clock]], found[0][:, [0, clock]]) for clock in (1, 2)]
        print(f"{canvases.name:<{NAME}}{rate:>12.3f}{ratios[0]:>24}{ratios[1]:>24}")


@reports_user_errors
def main() -> None:
    parser = parser_of("benchmarks.real_tokens", __doc__)
    add = parser.add_argument
    add("dataset", type=Path, help="the folder of an ARC dataset")
    add("--canvases", type=Canvases.read, nargs="+", required=True, metavar="SIDES:MARGIN", help="see above")
    add("--draws", type=positive, default=200, help="batches that are counted (default: %(default)s)")
    add("--rounds", type=natural, default=3, help="of training; 0: only count (default: %(default)s)")
    add("--steps", type=positive, default=16, help="of a turn (default: %(default)s)")
    add("--batch", type=positive, default=4, help="samples of a measured step (default: %(default)s)")
    add("--overrides", nargs="+", default=[], metavar="key=value", help="as for pretrain_etrm.py")
    options = parser.parse_args()
    options.dataset = options.dataset.resolve()
    print(f"{machine(CPU)}; {git_commit()}", flush=True)
    print_counts(options)
    if options.rounds:
        torch.set_num_threads(1)  # the processor time of several threads is not the time that a step takes
        print_race(options)


if __name__ == "__main__":
    main()
