"""What an objective is: the splits of a batch's loss, and the number of the objective that each piece of it
belongs to.

A split names the axes along which the loss falls apart. Rows of `SPLITS` are all there is to one. Shapes: S
ACT steps, G samples of the global batch, B of them here, L cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
from pydantic import NonNegativeFloat, PositiveInt, model_validator

from models.losses import ObjectiveConfig
from training.aggregation import AGGREGATORS
from utils.errors import nearest

SPLITS: dict[str, tuple[str, ...]] = {
    "sum": (),
    "loss_terms": ("term",),
    "instance": ("sample",),
    "cell": ("cell",),
    "instance_cell": ("sample", "cell"),
    "internal": ("final", "cycle"),
    "internal_only": ("cycle",),
    "supervision": ("step",),
    "supervision_instance": ("step", "sample"),
    "supervision_cell": ("step", "cell"),
    "supervision_instance_cell": ("step", "sample", "cell"),
}
"""Name -> axes: loss term, ACT step, sample, cell of the canvas, H cycle (`final`: the last one's loss keeps
its weight 1)."""

NUMBERED = ("step", "sample", "cell")  # the axes whose pieces can be dealt into random groups


def _as(split: str, **others: Any) -> dict[str, Any]:
    return {"split": split, **others}


# The ancestor's names, those of its enumeration and those of its README, and what they are here.
ALIASES: dict[str, dict[str, Any]] = {
    "lm_loss_vs_q_halt_loss": _as("loss_terms"),
    "iwrm_with_q_halt_in": _as("instance"),
    "iwrm_with_q_halt_out": _as("instance", halting="apart"),
    "pixelwise_q_halt_in": _as("cell"),
    "pixelwise_q_halt_out": _as("cell", halting="apart"),
    "iwrm_pixelwise_q_halt_in": _as("instance_cell"),
    "iwrm_pixelwise_q_halt_out": _as("instance_cell", halting="apart"),
    "stack_internal_losses": _as("internal"),
    "stack_internal_losses_only": _as("internal_only"),
    "stack_internal_and_sum": _as("internal", aggregator="sum"),
    "stack_supervisions": _as("supervision"),
    "stack_supervisions_and_sum": _as("sum"),
    "stack_supervisions_and_iwrm": _as("supervision_instance"),
    "stack_supervisions_and_pixelwise": _as("supervision_cell"),
    "stack_supervisions_and_iwrm_pixelwise": _as("supervision_instance_cell"),
    "iwrm_q_halt_in": _as("instance"),
    "iwrm_q_halt_out": _as("instance", halting="apart"),
}


class DescentConfig(ObjectiveConfig):
    """The loss, and how it is descended: what an objective is (`split`), and how their gradients become one
    (`aggregator`).

    halting: the halting loss belongs to its sample's (or step's) objective, `inside`, or makes objectives of
    its own, `apart`; inside, with a split by cells, each cell carries an equal share of it. internal_weight:
    of the token losses after the earlier H cycles, split=internal. groups: the pieces are dealt at random
    into so many objectives, anew at every update.
    """

    split: str
    aggregator: str
    halting: Literal["inside", "apart"]
    internal_weight: NonNegativeFloat
    groups: PositiveInt | None

    @model_validator(mode="before")
    @classmethod
    def _from_ancestor(cls, values: Any) -> Any:
        return {**values, **ALIASES.get(values.get("split", ""), {})} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check_descent(self) -> "DescentConfig":
        for name, known in (("split", SPLITS), ("aggregator", AGGREGATORS)):
            if getattr(self, name) not in known:
                found = getattr(self, name)
                hint = f"there is no such {name}{nearest(found, known)}; there are {', '.join(known)}"
                raise ValueError(f"objective.{name}={found}: {hint}")
        if self.halting == "apart" and self.split in ("sum", "loss_terms"):
            raise ValueError(
                f"objective.halting=apart with objective.split={self.split}: say split=loss_terms, where it "
                "always is"
            )
        if self.halting == "apart" and not self.halt_loss_weight:
            raise ValueError(
                "objective.halting=apart with objective.halt_loss_weight=0: there is no halting loss"
            )
        if self.groups is not None and not set(self.axes) & set(NUMBERED):
            raise ValueError(
                f"objective.groups={self.groups} deals samples, cells or ACT steps; "
                f"split={self.split} has none"
            )
        return self

    @property
    def axes(self) -> tuple[str, ...]:
        """Along which the loss falls apart."""
        return SPLITS[self.split]

    def refuse(self, mode: str, cycles: int, sizes: "Sizes") -> None:
        """Raise `ValueError` for what a run of this mode, of so many H cycles and of these sizes cannot
        do."""
        if "step" in self.axes and mode != "supervised":
            raise ValueError(
                f"objective.split={self.split} compares the ACT steps of one update, which only "
                "mode=supervised has"
            )
        if "cycle" in self.axes and cycles < 2:
            raise ValueError(
                f"objective.split={self.split} compares H cycles and needs arch.H_cycles of at least 2, "
                f"found {cycles}"
            )
        if self.contrastive_weight and "sample" in self.axes:
            raise ValueError(
                f"objective.contrastive_weight={self.contrastive_weight} compares all samples of a batch, "
                f"which objective.split={self.split} takes apart"
            )
        limit, count = AGGREGATORS[self.aggregator].limit, self.count(sizes, cycles)
        if limit is not None and count > limit:
            fits = limit // (2 if self.halting == "apart" else 1)
            raise ValueError(
                f"objective.split={self.split} makes up to {count} objectives, and "
                f"aggregator={self.aggregator} takes {limit}: its quadratic programmes grow steeply; "
                f"set objective.groups={fits} or less, or another aggregator"
            )

    def count(self, sizes: "Sizes", cycles: int = 1) -> int:
        """The largest number of objectives of one update."""
        if "term" in self.axes:
            return 2 + sum(self.weight(name) > 0 for name in ("kl", "reconstruct", "contrastive"))
        numbering = Numbering(self, sizes)
        cycled = cycles if "cycle" in self.axes else 1
        return numbering.own * cycled + (self.halting == "apart") * numbering.halting


@dataclass(frozen=True)
class Sizes:
    """How many there are along each axis that can be numbered."""

    step: int
    sample: int
    cell: int

    def of(self, axes: Sequence[str]) -> tuple[int, ...]:
        """The sizes along some of the axes, in the order of `NUMBERED`."""
        return tuple(getattr(self, axis) for axis in NUMBERED if axis in axes)


class Numbering:
    """The number of the objective that a piece of the loss belongs to: its place along the split's axes, or
    the group that it was dealt into. Halting losses that make objectives of their own are numbered after the
    others.

    real (G, L) bool: the cells with a label, which alone are dealt. rng deals alike in all processes.
    """

    def __init__(
        self,
        config: DescentConfig,
        sizes: Sizes,
        real: np.ndarray | None = None,
        rng: np.random.Generator | None = None,
    ):
        self.axes = [axis for axis in NUMBERED if axis in config.axes]
        # Halting is a matter of the sample, whose cells may lie in different objectives.
        self.halting_axes = [
            axis for axis in NUMBERED if axis in self.axes or (axis == "sample" and "cell" in self.axes)
        ]
        self.halting_axes = [axis for axis in self.halting_axes if axis != "cell"]
        self.sizes = sizes
        self.own, self.halting = prod(sizes.of(self.axes)), prod(sizes.of(self.halting_axes))
        self.dealt = self.dealt_halting = None
        if config.groups is not None:
            self.own, self.halting = min(self.own, config.groups), min(self.halting, config.groups)
            if real is not None and rng is not None:
                self.dealt = self._deal(self.axes, config.groups, real, rng)
                same = self.axes == self.halting_axes
                self.dealt_halting = (
                    self.dealt if same else self._deal(self.halting_axes, config.groups, real, rng)
                )

    @property
    def total(self) -> int:
        """How many numbers are given at most."""
        return self.own + self.halting

    def of_cells(self, step: int, samples: np.ndarray) -> np.ndarray:
        """(B, L) of the tokens of some samples, by their rows of the global batch."""
        numbers = self._numbers(self.axes, step, samples[:, None], np.arange(self.sizes.cell)[None])
        return np.broadcast_to(
            numbers if self.dealt is None else self.dealt[numbers], (len(samples), self.sizes.cell)
        )

    def of_halting(self, step: int, samples: np.ndarray) -> np.ndarray:
        """(B,) of the halting losses of some samples, where they are apart."""
        numbers = np.broadcast_to(self._numbers(self.halting_axes, step, samples, None), len(samples))
        return self.own + (numbers if self.dealt_halting is None else self.dealt_halting[numbers])

    def _numbers(
        self, axes: Sequence[str], step: int, samples: np.ndarray, cells: np.ndarray | None
    ) -> np.ndarray:
        number: Any = np.zeros((), np.int64)
        for axis, place in zip(NUMBERED, (step, samples, cells), strict=True):
            number = number * getattr(self.sizes, axis) + place if axis in axes else number
        return number

    def _deal(
        self, axes: Sequence[str], count: int, real: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """The group, of `count`, of each number along `axes`, equally many in each but for one; -1 where
        nothing has a label."""
        kept = tuple(index for index, axis in enumerate(("sample", "cell")) if axis not in axes)
        present = np.broadcast_to(
            real.any(axis=kept), (self.sizes.step, *self.sizes.of([a for a in axes if a != "step"]))
        )
        places = np.flatnonzero(present.reshape(-1) if "step" in axes else present[0].reshape(-1))
        groups = np.full(prod(self.sizes.of(axes)), -1, np.int32)
        groups[rng.permutation(places)] = np.arange(len(places)) % count
        return groups
