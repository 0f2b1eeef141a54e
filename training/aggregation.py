"""How the gradients of many objectives become one: weights found from their Gramian, and what the Gramian
says of them.

The methods are those of torchjd (https://torchjd.org) that need the Gramian alone and keep nothing from step
to step, so that a resumed run goes on exactly. Source: "Jacobian Descent for Multi-Objective Optimization"
(arXiv 2406.16232). Shapes: m objectives.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.extras import install

# Beside gradients of length 1 / sqrt(m); with torchjd's own 1e-4 an update of many objectives may raise some
# of them.
REGULARISATION = 1e-8

# What an ancestor logs -> our name of it.
ANCESTORS_NAMES = {
    "gd_similarity": "jacobian/gd_similarity",
    **{f"grammian_{kind}": f"jacobian/gramian_{kind}" for kind in ("min", "mean", "median")},
}

Weighting = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Aggregator:
    """A weighting of torchjd by the name of its class, None for the plain sum.

    mean: its weights are those of a mean and are multiplied by m, so that without a conflict every method
    gives the gradient of the summed loss. limit: more objectives take too long (measured: 64 take 0.1 s, 128
    take 2 s, 256 take 24 s).
    """

    weighting: str | None
    mean: bool = True
    limit: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    projects: bool = False


AGGREGATORS = {
    "mean": Aggregator(None),
    "sum": Aggregator(None),
    "upgrad": Aggregator("UPGradWeighting", limit=64, projects=True),
    "dualproj": Aggregator("DualProjWeighting", projects=True),
    "mgda": Aggregator("MGDAWeighting"),
    "pcgrad": Aggregator("PCGradWeighting", mean=False),
    "imtlg": Aggregator("IMTLGWeighting"),
    "aligned_mtl": Aggregator("AlignedMTLWeighting"),
    "cagrad": Aggregator("CAGradWeighting", options={"c": 0.5}),
    "fairgrad": Aggregator("FairGradWeighting", options={"alpha": 2.0}),
    "random": Aggregator("RandomWeighting"),
}


def weighting(name: str) -> Weighting | None:
    """The method `name`, a function of the Gramian (m, m); None for the plain sum. Raises `UserError` without
    its package."""
    row = AGGREGATORS[name]
    if row.weighting is None:
        return None
    try:
        module = import_module("torchjd.aggregation")
        options = dict(row.options)
        if row.projects:
            projector = import_module("torchjd.linalg").QuadprogProjector
            options["projector"] = EvenProjector(projector(norm_eps=0.0, reg_eps=REGULARISATION))
        return getattr(module, row.weighting)(**options)
    except (ImportError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"objective.aggregator={name} needs the package torchjd: {install('torchjd')} ({reason})"
        ) from None


class EvenProjector:
    """torchjd's projection onto the dual cone with all gradients brought to one length first: its
    regularisation would leave those that are much shorter than the others unprotected."""

    def __init__(self, projector: Callable[[Tensor, Tensor], Tensor]):
        self.projector = projector

    def __call__(self, preferences: Tensor, gramian: Tensor) -> Tensor:
        """Weights (..., m) of the projections of what `preferences` (..., m) weigh, from the Gramian (m,
        m)."""
        lengths = gramian.diagonal().sqrt()
        lengths = torch.where(lengths > 0, lengths, 1.0)
        return (
            self.projector(preferences * lengths, positive(gramian / torch.outer(lengths, lengths))) / lengths
        )


def weigh(name: str, method: Weighting | None, gramian: Tensor, seed: int) -> tuple[Tensor, bool]:
    """The weights (m,) float64 on the CPU of the gradients whose Gramian (m, m) this is, and whether the
    method failed, which leaves the mean. Nothing but Gramian and seed decides."""
    count = len(gramian)
    even = torch.ones(count, dtype=torch.float64)
    if (
        method is None or count == 1 or not gramian.isfinite().all()
    ):  # what is not finite is skipped as an update
        return even, False
    gramian = gramian.double().cpu()
    gramian = (gramian + gramian.T) / 2
    scale = gramian.trace()
    if not scale:
        return even, False
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            weights = method(gramian / scale)
    except Exception:  # whatever a solver raises on a Gramian that it cannot handle; it is counted
        return even, True
    if not weights.isfinite().all():
        return even, True
    return weights.double() * (count if AGGREGATORS[name].mean else 1), False


def positive(gramian: Tensor) -> Tensor:
    """The nearest symmetric matrix (m, m) without negative eigenvalues, which rounding gives a Gramian."""
    values, vectors = torch.linalg.eigh((gramian + gramian.T) / 2)
    return (vectors * values.clamp_min(0)) @ vectors.T


def statistics(gramian: Tensor, weights: Tensor) -> dict[str, float]:
    """What to log of an update of objectives with this Gramian (m, m) and these weights (m,).

    gd_similarity: the cosine between the update and that of gradient descent. gramian_min, _mean, _median: of
    the inner products between different objectives. conflicts: the share of those below zero.
    weights_entropy: 1 for equal weights, 0 for a single one.
    """
    gramian, weights = gramian.double().cpu(), weights.double()
    count = len(gramian)
    even = torch.ones(count, dtype=torch.float64)
    tiny = torch.finfo(torch.float64).tiny
    lengths = (weights @ gramian @ weights) * (even @ gramian @ even)
    others = (
        gramian[~torch.eye(count, dtype=torch.bool)] if count > 1 else torch.zeros(1, dtype=torch.float64)
    )
    share = weights.clamp_min(0) / weights.clamp_min(0).sum().clamp_min(tiny)
    values = {
        "objectives": count,
        "gd_similarity": weights @ gramian @ even / lengths.clamp_min(tiny).sqrt(),
        "gramian_min": others.min(),
        "gramian_mean": others.mean(),
        "gramian_median": others.median(),
        "conflicts": (others < 0).double().mean(),
        "weights_entropy": torch.special.entr(share).sum() / np.log(max(count, 2)),
    }
    return {name: float(value) for name, value in values.items()}
