"""Metric sums between two log lines, turned into means with their own denominators. Every name is explained
in docs/metrics.md."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from models.losses import is_per_row
from training.aggregation import ANCESTORS_NAMES
from training.state import TrainState
from training.step import StepConfig, StepResult
from utils import distributed
from utils.logging import RunLogger


class Meter:
    """Accumulates on the device; only `read` waits for the sums."""

    def __init__(self) -> None:
        self._grad_norms: dict[str, Tensor] = {}
        self._rate = 0.0  # samples per second of the last interval
        self._clear()

    def add(self, result: StepResult, samples: int) -> None:
        """Take the metric sums of a call of `train_step`; `samples` (the global batch size) take part in each
        of its updates. Waits until it is known whether they were made."""
        if result.updated:  # a skipped step's sums are not numbers
            for name, value in result.metrics.items():
                self._sums[name] = self._sums.get(name, 0) + value
        self._grad_norms = result.grad_norms
        self._steps += result.steps
        self._samples += samples * result.steps
        self._skipped += not result.updated

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep what happens inside (evaluation, saving) out of the training speed."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def read(self) -> dict[str, float | None]:
        """Means over all processes since the last call, which start anew."""
        names = sorted(self._sums)
        sums = {"count": 0.0}
        if names:
            totals = torch.stack([self._sums[name].double() for name in names])
            sums = dict(zip(names, distributed.sum_tensor(totals).tolist(), strict=True))
        seconds = time.perf_counter() - self._start
        self._rate = self._samples / seconds
        values = {
            name if name.startswith("jacobian/") else f"train/{name}": _mean(sums, name)
            for name in names
            if name not in ("rows", "count", "jacobian/updates")
        }
        values |= {theirs: values[name] for theirs, name in ANCESTORS_NAMES.items() if name in values}
        values |= {
            "train/count": sums["count"],
            **{f"grad/{name}_norm": float(norm) for name, norm in self._grad_norms.items()},
            "train/skipped_steps": float(self._skipped),
            "timing/train_samples_per_second": self._rate,
            "timing/train_ms_per_sample": 1000 * seconds / self._samples,
            "timing/train_ms_per_step": 1000 * seconds / self._steps,
            "timing/train_time_per_interval_seconds": seconds,
            "timing/train_samples_this_interval": float(self._samples),
        }
        self._clear()
        return values

    def evaluated(self, samples: int, seconds: float) -> dict[str, float]:
        """The speed of an evaluation of `samples` views over all processes, against that of training since
        the last log line."""
        rate = samples / seconds
        values = {
            "timing/eval_samples_per_second": rate,
            "timing/eval_ms_per_sample": 1000 / rate,
            "timing/eval_time_per_interval_seconds": seconds,
            "timing/eval_samples_this_interval": float(samples),
        }
        if self._rate:
            values |= {
                "timing/train_vs_eval_throughput_ratio": self._rate / rate,
                "timing/eval_vs_train_time_ratio": self._rate / rate,
            }
        return values

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._grad_norms = {}
        self._steps = self._samples = self._skipped = 0
        self._start = time.perf_counter()


class Pace:
    """How fast a run's first rounds are, once what is slow for once (compiling, warming up) is over."""

    SKIPPED, TIMED = 5, 10  # rounds

    def __init__(self) -> None:
        self._rounds = self._steps = 0
        self._seconds = 0.0

    def add(self, seconds: float, steps: int) -> bool:
        """Take a round of `steps` updates. True once, when enough of them have been timed."""
        self._rounds += 1
        if self.SKIPPED < self._rounds <= self.SKIPPED + self.TIMED:
            self._steps += steps
            self._seconds += seconds
        return self._rounds == self.SKIPPED + self.TIMED

    def forecast(self, step: int, last: int, seconds_left: float | None) -> str:
        """How long it will take from `step` to the step `last`, and where a limit of time ends it before."""
        per_step = self._seconds / self._steps
        words = f"about {duration(per_step * (last - step))} for the {last - step} steps left"
        words += f", at {per_step:.2g} s a step"
        if seconds_left is None or per_step * (last - step) <= seconds_left:
            return words
        reached = step + int(max(0, seconds_left) / per_step)
        return f"{words}; max_seconds ends it near step {reached}, and the same command continues"


def duration(seconds: float) -> str:
    """So many seconds in words."""
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "minutes")):
        if seconds < limit:
            return f"{max(1, round(seconds / unit))} {name}"
    return f"{seconds / 3600:.1f} hours"


def log_step(logger: RunLogger, state: TrainState, config: StepConfig, values: dict) -> None:
    """A line in metrics.jsonl and beside the progress bar, with rates and stage of the last update."""
    rates = {
        group["part"]: group["lr"] for o in state.optimizers for group in o.param_groups if "part" in group
    }
    frozen = {part: not config.trains(part, state.step - 1) for part in rates}
    rate = state.optimizers[0].param_groups[0]["lr"]
    staging = {"train/lr": rate, "train/decoder_frozen": float(frozen["core"])}
    if "encoder" in rates:
        staging |= {"train/encoder_frozen": float(frozen["encoder"]), "train/encoder_lr": rates["encoder"]}
    if cycles := config.cycles_at(state.step - config.mode.updates):
        staging |= dict(zip(("train/H_cycles", "train/L_cycles"), map(float, cycles), strict=True))
    logger.log(state.step, {**values, **staging})
    shown = {"loss": "train/lm_loss", "acc": "train/accuracy", "exact": "train/exact_accuracy"}
    texts = {short: f"{values[name]:.3f}" for short, name in shown.items() if values.get(name) is not None}
    logger.progress(state.step, {**texts, "samples/s": f"{values['timing/train_samples_per_second']:.0f}"})


def _mean(sums: dict[str, float], name: str) -> float | None:
    """None (no such sample) rather than a number when nothing halted since the last log line."""
    per_update = name.startswith("jacobian/")
    denominator = sums["jacobian/updates" if per_update else "rows" if is_per_row(name) else "count"]
    return sums[name] / denominator if denominator else None
