"""A step whose gradient was not finite: what was asked is written to the run folder, to be looked at or run
again."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset.batch import Bucket, Samples
from dataset.store import Store
from training.step import StepResult
from utils import checkpoint
from utils.distributed import World
from utils.files import write_atomically

KEPT = 32


def dump_batch(
    folder: Path, step: int, samples: Samples, result: StepResult, store: Store, world: World
) -> Path:
    """Write this process's part of the batch sampled at `step` (0-based, as samplers count) to
    `folder/nonfinite/`.

    The file holds the samples, their tasks' ids, the step's metric sums and gradient norms, and `worked_on`,
    the tensors that the step worked on: a row whose ACT `steps` are 1 is the sample's, one with more is of an
    earlier batch. Of a process's files the newest 32 are kept. Raises `UserError`.
    """
    path = folder / "nonfinite" / f"step_{step}_rank_{world.rank}.pt"
    before = sorted(
        path.parent.glob(f"step_*_rank_{world.rank}.pt"), key=lambda file: int(file.name.split("_")[1])
    )
    task = np.searchsorted(store.task_pairs, samples.query, side="right") - 1
    content = {
        "step": step,
        "world_size": world.size,
        "samples": {f.name: _tensor(getattr(samples, f.name)) for f in fields(samples)},
        "tasks": [store.task_ids[index] for index in task],
        "worked_on": {name: value.cpu() for name, value in result.worked_on.items()},
        "metrics": {name: float(value) for name, value in result.metrics.items()},
        "grad_norms": {name: float(value) for name, value in result.grad_norms.items()},
    }
    write_atomically(path, lambda temporary: checkpoint.save_torch(content, temporary))
    for old in before[: 1 - KEPT]:
        old.unlink()
    return path


def load_batch(path: Path) -> tuple[dict[str, Any], Samples]:
    """What `dump_batch` wrote, and its samples for `dataset.batch.materialise`. Raises `UserError`."""
    content = checkpoint.load_torch(path)
    values: dict[str, Any] = {
        name: value.numpy() if isinstance(value, torch.Tensor) else value
        for name, value in content["samples"].items()
    }
    return content, Samples(**{**values, "bucket": Bucket(*values["bucket"])})


def _tensor(value: Any) -> Any:
    """Files are read without executing anything, which leaves tensors and plain values."""
    return (
        torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(value, np.ndarray)
        else tuple(value)
        if value is not None
        else None
    )
