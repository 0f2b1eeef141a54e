"""The configuration that all architectures share; models/trm.py adds what each of them has of its own."""

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from models.positions import POSITION_KINDS, ROTATIONS
from models.relations import Relations
from utils.config import Config
from utils.device import faster_dtype

ForwardDtype = Literal["auto", "float32", "bfloat16"]


class ArchConfig(Config):
    """What all architectures have in common.

    halt_max_steps: ACT steps of a sample at most.
    halt_exploration_prob: how often a training sample has to take some steps before it may halt.
    halt_threshold: in evaluation a sample stops once its halting confidence reaches this; null: never early.
    halt_pooling: what the q_head reads, the first state token or the mean over the input's cells.
    act_enabled: false trains every sample for all `halt_max_steps`.
    no_ACT_continue: false learns to halt by Q-learning, with a value for going on, too.
    forward_dtype: of the activations; auto: the faster one on the device, which `on` settles.
    mlp_t: tokens are mixed by a SwiGLU over the sequence instead of attention.
    puzzle_emb_ndim, puzzle_emb_len: of the puzzle rows; unused beside an encoder.
    relations: what every block reads of the query at each cell besides attention (models/relations.py).
    dropout: in training, the share of what each branch of a block adds that is left out.
    carry_noise: in training, the deviation of what is added to the states between two ACT steps.
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
    forward_dtype: ForwardDtype
    mlp_t: bool
    puzzle_emb_ndim: NonNegativeInt
    puzzle_emb_len: NonNegativeInt
    relations: Relations
    dropout: Annotated[float, Field(ge=0, lt=1)]
    carry_noise: Annotated[float, Field(ge=0, allow_inf_nan=False)]

    @model_validator(mode="after")
    def _check(self) -> "ArchConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"arch.hidden_size={self.hidden_size} is not divisible by arch.num_heads={self.num_heads}"
            )
        rotation = ROTATIONS.get(self.pos_encodings)
        if rotation and self.hidden_size // self.num_heads % rotation.multiple:
            raise ValueError(
                f"arch.pos_encodings={self.pos_encodings} needs hidden_size / num_heads "
                f"divisible by {rotation.multiple}"
            )
        if rotation and rotation.values and self.num_heads < 2:
            raise ValueError(
                f"arch.pos_encodings={self.pos_encodings} turns the values of half of the heads "
                "and needs arch.num_heads >= 2"
            )
        if self.mlp_t and rotation:
            raise ValueError(
                "arch.mlp_t=true has no attention to rotate; "
                f"set arch.pos_encodings to none or learned, not {self.pos_encodings}"
            )
        if self.mlp_t and self.relations:
            raise ValueError(
                f"arch.relations={self.relations} are read beside attention, "
                "which arch.mlp_t=true has none of"
            )
        return self

    @property
    def draws(self) -> bool:
        """Whether an ACT step of training draws random numbers."""
        return bool(self.dropout or self.carry_noise)

    @property
    def learns_to_continue(self) -> bool:
        """Whether q_continue is trained, by Q-learning."""
        return self.act_enabled and not self.no_ACT_continue

    @property
    def fixes_length(self) -> bool:
        """Whether there are weights per position, so that all sequences have the same length."""
        return self.mlp_t or self.pos_encodings == "learned"

    @property
    def fixes_canvas(self) -> bool:
        """Whether all canvases must have the same size.

        They must also with places along the sequence, which mean other cells on a canvas of another size.
        """
        rotation = ROTATIONS.get(self.pos_encodings)
        return self.fixes_length or (rotation is not None and not rotation.on_canvas)

    @property
    def fixed_by(self) -> str:
        """The setting that decides how the core knows positions, as an error names it."""
        return "arch.mlp_t=true" if self.mlp_t else f"arch.pos_encodings={self.pos_encodings}"

    def on(self, device: torch.device) -> "ArchConfig":
        """These settings with the dtype that `forward_dtype=auto` stands for on `device`."""
        if self.forward_dtype != "auto":
            return self
        return self.model_copy(update={"forward_dtype": faster_dtype(device)[0]})

    @property
    def dtype(self) -> torch.dtype:
        """The activations' dtype."""
        assert self.forward_dtype != "auto", "`on` settles the dtype before a model is built"
        return getattr(torch, self.forward_dtype)
