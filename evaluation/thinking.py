"""How long and how widely a model thinks at test time: ACT steps, and rollouts that differ by noise."""

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from dataset.views import EvaluationSet, ViewBatch
from evaluation.selection import Select
from models.arch import ArchConfig
from models.rollouts import Rollouts
from utils.config import Config


class ThinkingConfig(Config):
    """Depth and width of the answers.

    halt_max_steps, halt_threshold: as trained, or others.
    rollouts: attempts at each view.
    sigma: deviation of the noise on the answer state before every ACT step (PTRM, arXiv 2605.19943).
    random_init: all states begin at random numbers (EqR, arXiv 2605.21488).
    select: which attempts at a view vote (evaluation/selection.py).
    """

    halt_max_steps: PositiveInt | Literal["checkpoint"]
    halt_threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["checkpoint"] | None
    rollouts: PositiveInt
    sigma: Annotated[NonNegativeFloat, Field(allow_inf_nan=False)]
    random_init: bool
    select: Select

    @model_validator(mode="after")
    def _check_width(self) -> "ThinkingConfig":
        if self.rollouts > 1 and not self.draws:
            raise ValueError(
                f"rollouts={self.rollouts} would all be the same with sigma=0; "
                "give sigma, for example 0.3, or random_init=true"
            )
        return self

    @property
    def draws(self) -> bool:
        """Whether an attempt depends on random numbers."""
        return self.sigma > 0 or self.random_init

    def deepened(self, arch: ArchConfig) -> ArchConfig:
        """The configuration of the model with the ACT steps asked for."""
        changes = {"halt_max_steps": self.halt_max_steps, "halt_threshold": self.halt_threshold}
        return arch.model_copy(
            update={name: value for name, value in changes.items() if value != "checkpoint"}
        )

    def rollouts_of(
        self, questions: EvaluationSet, batch: ViewBatch, seed: int, device: torch.device
    ) -> Rollouts | None:
        """What makes the rows of a batch differ. None: nothing is drawn."""
        if not self.draws:
            return None
        keys = torch.from_numpy(questions.rollout_keys(batch, seed)).to(device)
        return Rollouts(keys, self.sigma, self.random_init)


AS_TRAINED = ThinkingConfig(
    halt_max_steps="checkpoint",
    halt_threshold="checkpoint",
    rollouts=1,
    sigma=0.0,
    random_init=False,
    select="votes",
)
