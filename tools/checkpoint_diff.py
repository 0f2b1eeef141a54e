"""What two checkpoints differ in: settings, and weights, tensor by tensor."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from models.foreign import read_foreign
from models.pretrained import trained_config
from training.start import flatten
from utils import checkpoint


@dataclass(frozen=True)
class Held:
    """A checkpoint's or a file's weights under our names, which of them, and its settings by dotted key."""

    path: Path
    which: str
    weights: dict[str, Tensor]
    settings: dict[str, Any]


def held(path: Path, which: str | None = None) -> Held:
    """What `path` holds: a checkpoint, a run, or another system's file.

    which: raw or ema; None: what an evaluation would use. Raises `UserError`.
    """
    if path.is_file():
        foreign = read_foreign(path)
        weights = foreign.weights if which == "raw" else foreign.best
        settings = {f"arch.{key}": value for key, value in flatten(foreign.settings or {}).items()}
        return Held(path, "ema" if weights is foreign.averaged else "the file's", weights, settings)
    path = checkpoint.resolve(path)
    which = which or checkpoint.best_kind(path)
    return Held(
        path,
        which,
        checkpoint.load_weights(path, which),
        flatten(trained_config(checkpoint.load_info(path))),
    )


def diff(first: Held, second: Held) -> dict[str, Any]:
    """Differing settings and weights, as JSON values.

    A tensor's `norm` is that of the difference, `relative` its share of the first one's norm, and `largest`
    the largest absolute difference.
    """
    keys = sorted(first.settings.keys() | second.settings.keys())
    # A foreign file tells few settings, which is no difference.
    both = [key for key in keys if key in first.settings and key in second.settings]
    known = both if first.path.is_file() or second.path.is_file() else keys
    settings = {
        key: [first.settings.get(key), second.settings.get(key)]
        for key in known
        if first.settings.get(key) != second.settings.get(key)
    }
    shared = sorted(first.weights.keys() & second.weights.keys())
    same_shape = [name for name in shared if first.weights[name].shape == second.weights[name].shape]
    tensors = {name: _distance(first.weights[name], second.weights[name]) for name in same_shape}
    return {
        "first": f"{first.path} ({first.which})",
        "second": f"{second.path} ({second.which})",
        "settings": settings,
        "only_first": sorted(first.weights.keys() - second.weights.keys()),
        "only_second": sorted(second.weights.keys() - first.weights.keys()),
        "shapes": {
            name: [list(first.weights[name].shape), list(second.weights[name].shape)]
            for name in shared
            if name not in tensors
        },
        "equal": [name for name, found in tensors.items() if not found["largest"]],
        "weights": {name: found for name, found in tensors.items() if found["largest"]},
    }


def _distance(a: Tensor, b: Tensor) -> dict[str, float]:
    a, b = a.double(), b.double()
    difference, norm = a - b, a.norm().item()
    found = difference.norm().item()
    largest = difference.abs().max().item() if difference.numel() else 0.0
    return {
        "norm": found,
        "relative": found / norm if norm else math.inf if found else 0.0,
        "largest": largest,
    }


def lines_of(found: dict[str, Any]) -> list[str]:
    """What `diff` found, for a terminal: the weights that have moved most come first."""
    lines = [f"- {found['first']}", f"+ {found['second']}", ""]
    lines += [f"{key}: {before} -> {after}" for key, (before, after) in found["settings"].items()]
    if not found["settings"]:
        lines.append("no setting differs")
    lines.append("")
    lines += [f"only in the first: {name}" for name in found["only_first"]]
    lines += [f"only in the second: {name}" for name in found["only_second"]]
    lines += [f"{name}: shape {before} -> {after}" for name, (before, after) in found["shapes"].items()]
    moved = sorted(found["weights"].items(), key=lambda item: -item[1]["relative"])
    lines.append(f"{len(moved)} tensors differ, {len(found['equal'])} are equal bit by bit")
    if moved:
        lines.append(f"  {'tensor':<48}{'norm':>12}{'relative':>12}{'largest':>12}")
    lines += [
        f"  {name:<48}{row['norm']:>12.4g}{row['relative']:>12.4g}{row['largest']:>12.4g}"
        for name, row in moved
    ]
    return lines
