"""What a training run costs beside forward, backward and update: python -m benchmarks.overhead [--rounds N]

The same steps of the same configured run, over and over, by loops that do more and more, in turn, so that what else the
machine does meets all of them. What the last one loses against the first is the price of everything that is logged and guarded.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.loaders import Rates, alternate, small_dataset
from benchmarks.processes import run
from config import compose
from config.schema import PretrainConfig
from dataset.batch import materialise
from models.act import act_step, initial_carry
from models.losses import act_loss
from training.diagnostics import context_diagnostics
from training.meter import Meter, log_step
from training.start import prepare
from training.step import train_step
from utils.device import choose_device, describe
from utils.distributed import World
from utils.environment import git_commit, peak_memory_gb
from utils.errors import reports_user_errors
from utils.logging import RunLogger

ALONE = World()
# The loops, each with everything of the one before it.
BARE, UPDATE, LOGGED = (
    "forward, backward, update",
    "+ norms, finiteness, clipping, EMA",
    "+ metrics, log lines, diagnostics",
)
TARGET = 0.95
WARM_UP = 3  # steps


class Loop:
    """Measures the samples per second of one kind of loop; each has a model of its own, from the same seed."""

    def __init__(self, kind: str, config: PretrainConfig, folder: Path, device: torch.device):
        self.kind, self.config, self.device = kind, config, device
        changes = {"ema": config.ema and kind != BARE, "device": device.type, "compile": False}
        run = prepare(config.model_copy(update=changes), ALONE)
        self.store, self.table, self.sampler, self.state = run.store, run.table, run.sampler, run.state
        folder.mkdir(parents=True)
        self.logger = RunLogger(
            config.logging, folder, config.project_name, config.name, {}, ALONE, config.train_steps, 0
        )
        self.meter = Meter()

    def __call__(self, steps: float) -> float:
        """One round. On a CPU the clock is the process's own, which stands still while others have the processor."""
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

    def _bare_step(self, batch) -> None:
        state = self.state
        state.model.train()
        output = act_step(
            state.model, state.carries.get(batch.bucket) or initial_carry(state.model, batch.data), batch.data
        )
        loss, _ = act_loss(output, self.config.objective)
        (loss / self.config.global_batch_size).backward()
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        state.carries[batch.bucket] = output.carry
        state.step += 1

    def _log(self, samples) -> None:
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
    """All loops in every round, which is as long as it takes to write one log line; a few steps before that are not counted."""
    loops: dict[str, Callable[[float], float]] = {
        kind: Loop(kind, config, work / f"run{number}", device)
        for number, kind in enumerate((BARE, UPDATE, LOGGED))
    }
    alternate(loops, 1, WARM_UP)
    return Overhead(alternate(loops, rounds, config.log_interval))


def configurations(work: Path) -> dict[str, PretrainConfig]:
    """The sizes that are measured, with datasets made for it."""
    rules = work / "rules"
    options = "--families colour_permutation --stages 1 --test-splits test_rules --rows 4 6 --columns 4 6 --train-tasks 2000"
    run(
        [
            "-m",
            "dataset.build_rules_dataset",
            *options.split(),
            "--test-tasks",
            "10",
            "--output-dir",
            str(rules),
        ]
    )
    recipes = {
        "rules_smoke": (rules,),
        "demo": (small_dataset(work), "data.query_sampling=any", "data.subset_shares=null"),
    }
    return {
        name: compose.load(
            PretrainConfig,
            "pretrain",
            [f"experiment={name}", f"data.path='{path}'", "logging.progress=false", *more],
        )
        for name, (path, *more) in recipes.items()
    }


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default 7)")
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
            print(
                f"{'holds' if share >= TARGET else 'FAILS'}  at least {TARGET:.0%} of the bare loop's speed: {share:.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
