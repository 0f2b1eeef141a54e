"""Latency, throughput and memory of inference: python -m experiments.efficiency checkpoint=runs/NAME batch_size=32

--warmup 10 batches first, then --steps 50 are timed: batches of the evaluation set, over and over as often as needed. Any key
of evaluate.py but a protocol that adapts applies. Prints and writes exp6_results.json into output_dir (default: experiments/
in the run's folder):
  batch_size, steps_measured, throughput_samples_per_sec, avg_latency_batch_ms, avg_latency_sample_ms, peak_memory_gb, and
  warmup_steps, warmup_seconds, loading_ms_per_batch, throughput_with_loading_samples_per_sec, act_steps_per_sample,
  latency_batch_ms_p50, latency_batch_ms_p95, peak_memory_of
A sample is one view of one query. Latency is the model's time from a batch on the device to all its answers on the device
(all ACT steps), a sample's its share of a batch, counting real rows only. Loading is drawing the grids; decoding and voting
are not part of it. The warm-up is in none of the other numbers. Memory is the peak of the process: the GPU's if it ran
there, the resident memory otherwise, libraries included.
"""

import resource
import sys
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch

from dataset.batch import materialise
from evaluation.session import Session
from experiments.commands import folder_of, for_model, opened
from models.act import solve
from utils.device import clock
from utils.errors import UserError, reports_user_errors
from utils.files import write_json


def measure(session: Session, warmup: int, steps: int) -> dict[str, Any]:
    """exp6_results.json."""
    on_gpu = session.device.type == "cuda"
    batches = list(session.questions().batches(session.config.batch_size))
    if not batches or steps < 1 or warmup < 0:
        raise UserError(
            "nothing to measure: it takes a query that fits the canvas, --steps of 1 or more and --warmup of 0 or more"
        )
    table = session.store.grid_table.to(session.device)
    model = session.model.eval()
    loading, solving, samples, act_steps = [], [], 0, 0.0
    started = first_timed = clock(session.device)
    for i, batch in enumerate(islice(cycle(batches), warmup + steps)):
        if i == warmup:
            first_timed = clock(session.device)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(session.device)
        begin = clock(session.device)
        data = materialise(batch.samples, session.store, table, with_labels=False).data
        drawn = clock(session.device)
        answer = solve(model, data)
        done = clock(session.device)
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
        "peak_memory_gb": peak_memory(session.device) / 1e9,
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
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@reports_user_errors
def main() -> None:
    arguments = for_model("experiments.efficiency", __doc__, warmup=10, steps=50)
    session = opened(arguments.overrides)
    if session.world.size > 1:
        raise UserError("one process is measured, without torchrun")
    result = measure(session, arguments.warmup, arguments.steps)
    path = folder_of(session) / "exp6_results.json"
    write_json(path, result, indent=1)
    for name, value in result.items():
        if name != "about":
            print(f"{name:<42}{value:.3f}" if isinstance(value, float) else f"{name:<42}{value}")
    print(f"{result['about']['device']}; {path}")


if __name__ == "__main__":
    main()
