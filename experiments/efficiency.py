"""Measure latency, throughput and memory of inference.

    python -m experiments.efficiency checkpoint=runs/NAME batch_size=32 --warmup 10 --steps 50

Any key of evaluate.py applies, except a protocol that adapts the model. The batches are those of the
evaluation, over and over as often as needed: first --warmup of them, then --steps that are timed. The command
prints the numbers and writes exp6_results.json into output_dir (default: a folder of `experiments` in the
run's folder):

    batch_size, steps_measured, throughput_samples_per_sec, avg_latency_batch_ms, avg_latency_sample_ms,
    peak_memory_gb, peak_memory_of, warmup_steps, warmup_seconds, loading_ms_per_batch,
    throughput_with_loading_samples_per_sec, act_steps_per_sample, latency_batch_ms_p50, latency_batch_ms_p95

A sample is one view of one query. A batch's latency is the model's time for all ACT steps: from the batch on
the device to its answers on the device. A sample's latency is its share of the batch, of which only real rows
count. Loading is the drawing of the grids. Decoding and voting are not measured, and the warm-up is in none
of the other numbers. Memory is the peak of the process: on a GPU what was allocated there, else the resident
memory, libraries included.
"""

import resource
import sys
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataset.batch import materialise
from evaluation.session import Session
from experiments.commands import folder_of, for_model, opened
from models.act import solve
from utils.device import clock
from utils.errors import UserError, reports_user_errors
from utils.files import write_json


def measure(session: Session, warmup: int, steps: int) -> dict[str, Any]:
    """The content of exp6_results.json, a name of the ancestor's. Raises `UserError` without a query."""
    respondent = session.respondent
    device = respondent.device
    on_gpu = device.type == "cuda"
    batches = list(session.questions().batches(session.config.batch_size))
    if not batches or steps < 1 or warmup < 0:
        raise UserError(
            "nothing to measure: it takes a query that fits the canvas, "
            "--steps of 1 or more and --warmup of 0 or more"
        )
    model = respondent.model.eval()
    loading, solving, samples, act_steps = [], [], 0, 0.0
    started = first_timed = clock(device)
    for i, batch in enumerate(islice(cycle(batches), warmup + steps)):
        if i == warmup:
            first_timed = clock(device)
            if on_gpu:  # a process's own peak on a CPU cannot be reset
                torch.cuda.reset_peak_memory_stats(device)
        begin = clock(device)
        data = materialise(batch.samples, respondent.store, respondent.table, with_labels=False).data
        drawn = clock(device)
        answer = solve(model, data)
        done = clock(device)
        if i >= warmup:
            loading.append(drawn - begin)
            solving.append(done - drawn)
            samples += batch.valid
            act_steps += answer.steps[: batch.valid].float().sum().item()
    return {
        "batch_size": session.config.batch_size,
        "steps_measured": steps,
        "throughput_samples_per_sec": samples / sum(solving),
        "avg_latency_batch_ms": 1e3 * float(np.mean(solving)),
        "avg_latency_sample_ms": 1e3 * sum(solving) / samples,
        "peak_memory_gb": peak_memory(device) / 1e9,
        "peak_memory_of": "GPU" if on_gpu else "process",
        "warmup_steps": warmup,
        "warmup_seconds": first_timed - started,
        "loading_ms_per_batch": 1e3 * float(np.mean(loading)),
        "throughput_with_loading_samples_per_sec": samples / (sum(solving) + sum(loading)),
        "act_steps_per_sample": act_steps / samples,
        "latency_batch_ms_p50": 1e3 * float(np.percentile(solving, 50)),
        "latency_batch_ms_p95": 1e3 * float(np.percentile(solving, 95)),
        "about": session.about(),
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU, or the largest resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # macOS counts bytes, Linux kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@reports_user_errors
def main() -> None:
    parser = for_model("experiments.efficiency", __doc__)
    parser.add_argument("--warmup", type=int, default=10, help="batches before (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="timed batches (default: %(default)s)")
    options = parser.parse_intermixed_args()
    session = opened(options.overrides)
    if session.respondent.world.size > 1:
        raise UserError("one process is measured, without torchrun")
    result = measure(session, options.warmup, options.steps)
    path = folder_of(session) / "exp6_results.json"
    write_json(path, result, indent=1)
    for name, value in result.items():
        if name != "about":
            print(f"{name:<42}{value:.3f}" if isinstance(value, float) else f"{name:<42}{value}")
    print(f"{result['about']['device']}; {path}")


if __name__ == "__main__":
    main()
