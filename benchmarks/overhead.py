"""Measure what a training run costs beside forward, backward and update.

    python -m benchmarks.overhead --rounds 7

Three loops take the same steps of the same configured run, in turn. Each does everything that the one before
it does, and more. What the last one loses against the first is the price of all that is logged and guarded.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.loaders import Rates, alternate, rules_dataset, small_dataset
from config import compose
from config.schema import PretrainConfig
from dataset.batch import Batch, Samples, materialise
from models.act import act_step, initial_carry
from models.losses import act_loss
from training.diagnostics import context_diagnostics
from training.meter import Meter, log_step
from training.start import prepare
from training.step import train_step
from utils.arguments import parser_of, positive
from utils.device import choose_device, describe
from utils.distributed import World
from utils.environment import git_commit, peak_memory_gb
from utils.errors import reports_user_errors
from utils.logging import RunLogger

ALONE = World()
# The loops, each with everything of the one before it.
BARE = "forward, backward, update"
UPDATE = "+ norms, finiteness, clipping, EMA"
LOGGED = "+ metrics, log lines, diagnostics"
TARGET = 0.95  # share of the bare loop's speed
WARM_UP = 3  # steps


class Loop:
    """Measures the samples per second of one kind of loop. Each has its own model, from the same seed."""

    def __init__(self, kind: str, config: PretrainConfig, folder: Path, device: torch.device):
        self.kind, self.device = kind, device
        # Compiling would make the loops differ in more than what they do.
        changes = {"ema": config.ema and kind != BARE, "device": device.type, "threads": 1, "compile": False}
        run = prepare(config.model_copy(update=changes), ALONE)
        self.config = run.config
        self.store, self.table, self.sampler, self.state = run.store, run.table, run.sampler, run.state
        folder.mkdir(parents=True)
        self.logger = RunLogger(
            config.logging, folder, config.project_name, config.name, {}, ALONE, config.train_steps, 0
        )
        self.meter = Meter()

    def __call__(self, steps: float) -> float:
        """The rate of one round of so many steps."""
        # On a CPU the process's own clock, which stands still while others have the processor.
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        started = clock()
        for _ in range(int(steps)):
            samples = self.sampler.sample(self.state.step)
            batch = materialise(samples, self.store, self.table)
            if self.kind == BARE:
                self._bare_step(batch)
                continue
            result = train_step(self.state, batch, self.config, ALONE)
            if self.kind == LOGGED:
                self.meter.add(result, self.config.global_batch_size)
                if self.state.step % self.config.log_interval == 0:
                    self._log(samples)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return int(steps) * self.config.global_batch_size / (clock() - started)

    def _bare_step(self, batch: Batch) -> None:
        """The plainest step that trains the same model: nothing is counted, clipped or averaged."""
        state = self.state
        state.model.train()
        carry = state.carries.get(batch.bucket) or initial_carry(state.model, batch.data)
        output = act_step(state.model, carry, batch.data)
        loss, _ = act_loss(output, self.config.objective)
        (loss / self.config.global_batch_size).backward()
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        state.carries[batch.bucket] = output.carry
        state.step += 1

    def _log(self, samples: Samples) -> None:
        """What the training loop does at a log interval."""
        values = self.meter.read()
        with self.meter.paused():
            values["timing/peak_memory_gb"] = peak_memory_gb(self.device)
            values |= context_diagnostics(
                self.state.model, samples, self.store, self.table, self.config.seed, self.state.step, ALONE
            )
            log_step(self.logger, self.state, self.config, values)


@dataclass(frozen=True)
class Overhead:
    """Samples per second of each loop, and its share of the bare loop's speed in the same round."""

    rates: dict[str, Rates]

    def share(self, kind: str) -> tuple[float, float, float]:
        """Median, lowest and highest share over the rounds."""
        # By round, since both were measured under the same load of the machine there.
        shares = np.array(self.rates[kind].rounds) / np.array(self.rates[BARE].rounds)
        return float(np.median(shares)), float(shares.min()), float(shares.max())

    def lines(self) -> list[str]:
        """One line per loop."""
        texts = []
        for kind, rate in self.rates.items():
            median, low, high = self.share(kind)
            texts.append(f"{kind:<40}{str(rate):<26}{median:7.1%} [{low:.1%}, {high:.1%}]")
        return texts


def compare(config: PretrainConfig, rounds: int, work: Path, device: torch.device) -> Overhead:
    """Measure all loops in rounds of as many steps as there are between two log lines, after a warm-up."""
    loops: dict[str, Callable[[float], float]] = {
        kind: Loop(kind, config, work / f"run{number}", device)
        for number, kind in enumerate((BARE, UPDATE, LOGGED))
    }
    alternate(loops, 1, WARM_UP)
    return Overhead(alternate(loops, rounds, config.log_interval))


def configurations(work: Path) -> dict[str, PretrainConfig]:
    """The recipes that are measured, by name, with small datasets built for them."""
    # The dataset of the recipe demo has two kinds of tasks, the small one here a single kind.
    of_one_kind = ("data.query_sampling=any", "data.subset_shares=null")
    recipes = {
        "rules_smoke": (rules_dataset(work / "rules"), ()),
        "demo": (small_dataset(work), of_one_kind),
    }
    return {
        name: compose.load(
            PretrainConfig,
            "pretrain",
            [f"experiment={name}", f"data.path='{path}'", "logging.progress=false", *more],
        )
        for name, (path, more) in recipes.items()
    }


@reports_user_errors
def main() -> None:
    parser = parser_of("benchmarks.overhead", __doc__)
    parser.add_argument("--rounds", type=positive, default=7, help="that count (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args()
    device = choose_device(options.device, ALONE)
    torch.set_num_threads(1)  # the processor time of several threads is not the time that a step takes
    print(f"{describe(device)}; {git_commit()}; samples/s, share of the bare loop's", flush=True)
    print(f"median [lowest, highest] of {options.rounds} rounds", flush=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as work:
        for name, config in configurations(Path(work)).items():
            overhead = compare(config, options.rounds, Path(work) / name, device)
            print(f"\nexperiment={name}", *overhead.lines(), sep="\n", flush=True)
            share = overhead.share(LOGGED)[0]
            verdict = "holds" if share >= TARGET else "FAILS"
            print(f"{verdict}  at least {TARGET:.0%} of the bare loop's speed: {share:.1%}", flush=True)


if __name__ == "__main__":
    main()
