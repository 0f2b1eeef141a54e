"""The contestants of a speed comparison, which take turns, and what their rounds took."""

import argparse
import json
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.matching import STEPS, sizes, their_config
from benchmarks.processes import ROOT, Contestant
from benchmarks.useful import linear_rate
from utils.device import choose_device
from utils.distributed import World


@dataclass(frozen=True)
class Side:
    """One contestant.

    - steps: how many it makes in a round.
    - flops: its useful FLOPs per sample; None for one that reports them, or where nothing is counted.
    - foreign: an ancestor. One step warms it up.
    """

    name: str
    contestant: Contestant
    steps: int
    flops: float | None = None
    foreign: bool = False


@dataclass
class Result:
    """What the rounds of one contestant took."""

    side: Side
    rounds: list[dict[str, float]]

    @property
    def rates(self) -> np.ndarray:
        """Samples per second, by round."""
        return np.array([done["samples"] / done["seconds"] for done in self.rounds])

    @property
    def useful_rate(self) -> float | None:
        """Useful FLOP/s over all rounds, None where nothing is counted."""
        seconds = sum(done["seconds"] for done in self.rounds)
        if self.side.flops is not None:
            return self.side.flops * sum(done["samples"] for done in self.rounds) / seconds
        return sum(done["flops"] for done in self.rounds) / seconds if "flops" in self.rounds[0] else None

    @property
    def memory(self) -> float:
        """The peak over all rounds, in bytes."""
        return self.rounds[-1]["memory"]  # a contestant reports its peak so far


def spread(values: np.ndarray, digits: int) -> str:
    """The values as text: median [lowest, highest]."""
    return f"{np.median(values):,.{digits}f} [{values.min():,.{digits}f}, {values.max():,.{digits}f}]"


class Race:
    """The contestants of one comparison, each in a process of its own."""

    def __init__(self, options: argparse.Namespace, work: Path, exits: ExitStack):
        self.options, self.work, self.exits = options, work, exits
        self.sides: list[Side] = []

    def theirs(self, what: str, flops: float | None, **options: Any) -> None:
        """Enter the ancestor. `what` and `options` are the command line of benchmarks/ancestors/steps.py."""
        options |= {
            "config": their_config(self.options),
            "device": self.options.device,
            "threads": self.options.threads,
        }
        command = [str(STEPS), what, json.dumps(options)]
        contestant = self._start(command, self.options.against)
        self.sides.append(Side("theirs", contestant, self.options.steps, flops, foreign=True))

    def ours(
        self, name: str, what: str, steps: int, overrides: list[str], processes: int = 1, **options: Any
    ) -> None:
        """Enter a configuration of ours. `what` and `options` are the command line of benchmarks/steps.py.

        Several processes share the threads.
        """
        options |= {"overrides": overrides, "threads": self.options.threads // processes}
        launcher = []
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        contestant = self._start([*launcher, "-m", "benchmarks.steps", what, json.dumps(options)], ROOT)
        self.sides.append(Side(name, contestant, steps))

    def _start(self, command: list[str], pythonpath: Path) -> Contestant:
        """Start a contestant, which ends with the comparison."""
        contestant = Contestant(command, pythonpath, self.work / f"{len(self.sides)}.log")
        self.exits.enter_context(closing(contestant))
        return contestant

    def run(self) -> tuple[list[Result], float]:
        """The results of all rounds, and the median rate of `F.linear` between them, in FLOP/s."""
        dtype = getattr(torch, sizes(self.options)["forward_dtype"])
        device = choose_device(self.options.device, World())
        results, rates = [Result(side, []) for side in self.sides], []
        for side in self.sides:
            # Not counted. Ours meets all its canvases in a round, and compiles for each.
            side.contestant(1 if side.foreign else side.steps)
        for _ in range(self.options.rounds):
            # In every round, since the machine may be slower in some of them.
            rates.append(linear_rate(device, dtype))
            for result in results:
                result.rounds.append(result.side.contestant(result.side.steps))
        return results, float(np.median(rates))
