"""One contestant of a speed comparison, in a process of its own, which measures only when it is asked to.

Each line of its input is a number of steps; its answer is a line of JSON. Nothing of ours or of an ancestor's is imported
here: both sides are timed by the same code.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

import torch


def answer_channel() -> TextIO:
    """The standard output, for answers alone: whatever else is printed from now on goes to the log."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def serve(
    step: Callable[[], dict[str, float]],
    device: torch.device,
    answers: TextIO,
    questions: Iterable[str | int] | None = None,
) -> None:
    """Answer until the questions (default: the input) end: the sums of what the steps return, their seconds, and the peak memory so
    far in bytes."""
    for line in sys.stdin if questions is None else questions:
        started = time.perf_counter()
        done = [step() for _ in range(int(line))]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
        sums = {name: sum(values[name] for values in done) for name in done[0]}
        print(
            json.dumps({**sums, "seconds": seconds, "memory": peak_memory(device)}), file=answers, flush=True
        )


def peak_memory(device: torch.device) -> int:
    """Bytes: what PyTorch allocated on a GPU, the resident set on a CPU (which `getrusage` would inherit from the parent)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
