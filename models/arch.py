"""The configuration that all architectures share; models/trm.py adds what each of them has of its own."""

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from models.layers import POSITION_KINDS
from utils.config import Config


class ArchConfig(Config):
    """What all architectures have in common; models/trm.py adds layers and cycles.

    act_enabled: false trains every sample for all halt_max_steps. halt_threshold: null evaluates every sample for all
    halt_max_steps, a probability lets it stop once its halting confidence reaches it. halt_pooling: the q_head reads
    the first state token, or the mean over the input's cells. puzzle_emb_*: of the puzzle rows, unused beside an encoder.
    """

    name: str
    hidden_size: PositiveInt
    num_heads: PositiveInt
    expansion: PositiveFloat
    halt_max_steps: PositiveInt
    halt_exploration_prob: Annotated[float, Field(ge=0, le=1)]
    halt_threshold: Annotated[float, Field(gt=0, lt=1)] | None
    halt_pooling: Literal["first", "mean"]
    act_enabled: bool
    no_ACT_continue: bool
    pos_encodings: POSITION_KINDS
    forward_dtype: Literal["float32", "bfloat16"]
    mlp_t: bool
    puzzle_emb_ndim: NonNegativeInt
    puzzle_emb_len: NonNegativeInt

    @model_validator(mode="after")
    def _check(self) -> "ArchConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"arch.hidden_size={self.hidden_size} is not divisible by arch.num_heads={self.num_heads}"
            )
        multiple = {"rope": 2, "rope2d": 4, "rope2d_values": 4}.get(self.pos_encodings, 1)
        if self.hidden_size // self.num_heads % multiple:
            raise ValueError(
                f"arch.pos_encodings={self.pos_encodings} needs hidden_size / num_heads divisible by {multiple}"
            )
        if self.pos_encodings == "rope2d_values" and self.num_heads < 2:
            raise ValueError(
                "arch.pos_encodings=rope2d_values turns the values of half of the heads and needs arch.num_heads >= 2"
            )
        if self.mlp_t and self.pos_encodings.startswith("rope"):
            raise ValueError(
                f"arch.mlp_t=true has no attention to rotate; set arch.pos_encodings to none or learned, not {self.pos_encodings}"
            )
        return self

    @property
    def fixed_by(self) -> str:
        """The setting that decides how the core knows positions, as an error names it."""
        return "arch.mlp_t=true" if self.mlp_t else f"arch.pos_encodings={self.pos_encodings}"

    @property
    def dtype(self) -> torch.dtype:
        """The activations' dtype."""
        return getattr(torch, self.forward_dtype)
