"""The recursive core of TRM and ETRM: one tiny network applied again and again to an answer state and a latent state.

    here            paper   meaning
    z_H             y       answer state, read by lm_head
    z_L             z       latent reasoning state
    L_cycles        n       latent updates before each answer update
    H_cycles        T       answer updates per ACT step; only the last one carries a gradient
    halt_max_steps  N_sup   ACT steps (supervision steps) per sample at most

Shapes: B batch, P prefix tokens, L cells, S = P + L, M memory tokens, D hidden, V vocabulary.
Source: "Less is More: Recursive Reasoning with Tiny Networks" (arXiv 2510.04871); numerically the original TRM code.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from config.base import Config
from models.context import Context, ContextModule, EncoderConfig, PuzzleEmbedding
from models.encoders import build_encoder
from models.layers import (
    POSITION_KINDS,
    AttentionBlock,
    Embedding,
    KeyValue,
    Linear,
    MixerBlock,
    Rotary,
    rotary_line,
    rotary_square,
    truncated_normal,
)

SQRT_HALF = 0.707106781  # the original's digits: the recursion amplifies a difference in the last bit
Q_HEAD_BIAS = -5.0  # halting starts close to "never", which lets the answer be learned first


class ArchConfig(Config):
    """The recursive core; `puzzle_emb_*` matter to `name: trm` only."""

    name: Literal["trm", "etrm"]
    hidden_size: PositiveInt
    num_heads: PositiveInt
    expansion: PositiveFloat
    L_layers: PositiveInt
    H_cycles: PositiveInt
    L_cycles: PositiveInt
    halt_max_steps: PositiveInt
    halt_exploration_prob: Annotated[float, Field(ge=0, le=1)]
    no_ACT_continue: bool
    pos_encodings: POSITION_KINDS
    forward_dtype: Literal["float32", "bfloat16"]
    mlp_t: bool
    puzzle_emb_ndim: NonNegativeInt
    puzzle_emb_len: NonNegativeInt

    @model_validator(mode="after")
    def _check(self) -> "ArchConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(f"arch.hidden_size={self.hidden_size} is not divisible by arch.num_heads={self.num_heads}")
        multiple = {"rope": 2, "rope2d": 4}.get(self.pos_encodings, 1)
        if self.hidden_size // self.num_heads % multiple:
            raise ValueError(f"arch.pos_encodings={self.pos_encodings} needs hidden_size / num_heads divisible by {multiple}")
        if self.mlp_t and self.pos_encodings in ("rope", "rope2d"):
            raise ValueError(
                f"arch.mlp_t=true has no attention to rotate; set arch.pos_encodings to none or learned, not {self.pos_encodings}"
            )
        if self.name == "trm" and self.puzzle_emb_ndim < 1:
            raise ValueError("arch.puzzle_emb_ndim must be at least 1: a TRM knows its task only through the puzzle embedding")
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The activations' dtype."""
        return getattr(torch, self.forward_dtype)


@dataclass(frozen=True)
class DataSizes:
    """What the data decides: vocabulary, number of puzzle identifiers, and the cells of the canvas when there is only one."""

    vocab_size: int
    num_puzzle_identifiers: int
    seq_len: int | None


@dataclass
class ModelOutput:
    """New states (B, S, D) with gradient, logits (B, L, V) and float32 halting logits (B,)."""

    z_H: Tensor
    z_L: Tensor
    logits: Tensor
    q_halt_logits: Tensor
    q_continue_logits: Tensor


class ReasoningModule(nn.Module):
    """The tiny network: injection by addition, then its blocks."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self, state: Tensor, injection: Tensor, rotary: Rotary | None, mask: Tensor | None, memory: list[KeyValue | None]
    ) -> Tensor:
        x = state + injection
        for layer, keys_values in zip(self.layers, memory, strict=True):
            x = layer(x, rotary, mask, keys_values)
        return x


class RecursiveModel(nn.Module):
    """The core around a context module. Construct `TRM` or `ETRM`, or both by name with `build_model`."""

    H_init: Tensor
    L_init: Tensor

    def __init__(self, config: ArchConfig, sizes: DataSizes, context: ContextModule):
        super().__init__()
        self.config = config
        self.context = context
        hidden = config.hidden_size
        self.embed_tokens = Embedding(sizes.vocab_size, hidden, config.dtype)
        self.lm_head = Linear(hidden, sizes.vocab_size)
        self.q_head = Linear(hidden, 2, bias=True)
        nn.init.zeros_(self.q_head.weight)
        nn.init.constant_(self.q_head.bias, Q_HEAD_BIAS)
        if config.mlp_t or config.pos_encodings == "learned":
            if sizes.seq_len is None:
                raise ValueError(
                    "arch.mlp_t and learned positions need one canvas size: data.canvas=full, or a single entry in data.buckets"
                )
            length = context.prefix_length(0, sizes.seq_len) + sizes.seq_len
        if config.pos_encodings == "learned":
            self.embed_pos = Embedding(length, hidden, config.dtype)
        if config.mlp_t:
            layers = [MixerBlock(hidden, length, config.expansion) for _ in range(config.L_layers)]
        else:
            layers = [AttentionBlock(hidden, config.num_heads, config.expansion) for _ in range(config.L_layers)]
        self.L_level = ReasoningModule(layers)
        self.register_buffer("H_init", truncated_normal(hidden, std=1.0))
        self.register_buffer("L_init", truncated_normal(hidden, std=1.0))

    def forward(self, z_H: Tensor, z_L: Tensor, inputs: Tensor, context: Context) -> ModelOutput:
        """One ACT step from states (B, S, D) on input tokens (B, L)."""
        config = self.config
        tokens = self._embed(inputs, context)
        rotary, mask, memory = self._read(inputs.shape[1], context)

        def refine(z_H: Tensor, z_L: Tensor) -> tuple[Tensor, Tensor]:
            for _ in range(config.L_cycles):
                z_L = self.L_level(z_L, z_H + tokens, rotary, mask, memory)
            return self.L_level(z_H, z_L, rotary, mask, memory), z_L

        with torch.no_grad():
            for _ in range(config.H_cycles - 1):
                z_H, z_L = refine(z_H, z_L)
        z_H, z_L = refine(z_H, z_L)
        q_logits = self.q_head(z_H[:, 0]).float()
        logits = self.lm_head(z_H[:, -inputs.shape[1] :])
        return ModelOutput(z_H, z_L, logits, q_logits[:, 0], q_logits[:, 1])

    def _embed(self, inputs: Tensor, context: Context) -> Tensor:
        """Prefix and cells as one sequence (B, S, D)."""
        tokens = torch.cat((context.prefix, self.embed_tokens(inputs)), dim=1)
        if self.config.pos_encodings == "learned":
            positions = self.embed_pos(torch.arange(tokens.shape[1], device=tokens.device))
            tokens = SQRT_HALF * (tokens + positions)  # keeps the variance of the sum
        return math.sqrt(self.config.hidden_size) * tokens

    def _read(self, cells: int, context: Context) -> tuple[Rotary | None, Tensor | None, list[KeyValue | None]]:
        """Positions of the state, the mask over state and memory keys, and each block's memory keys and values."""
        prefix = context.prefix.shape[1]
        on_canvas = 0 if context.prefix_cells is None else len(context.prefix_cells)
        registers = prefix - on_canvas
        table = self._positions(registers, cells, context.prefix.device)
        rotary = table
        if table is not None and on_canvas:
            first = torch.arange(registers, device=context.prefix.device)
            rest = torch.arange(registers, registers + cells, device=context.prefix.device)
            rotary = table.rows(torch.cat((first, context.prefix_cells + registers, rest)))
        memory: list[KeyValue | None] = [None] * len(self.L_level.layers)
        if context.memory is not None:
            places = table.rows(context.memory_cells + registers) if table is not None else None
            memory = [layer.self_attn.project_memory(context.memory, places) for layer in self.L_level.layers]
        return rotary, self._mask(prefix, cells, context), memory

    def _positions(self, registers: int, cells: int, device: torch.device) -> Rotary | None:
        head_dim = self.config.hidden_size // self.config.num_heads
        if self.config.pos_encodings == "rope":
            return rotary_line(registers + cells, head_dim, device)
        if self.config.pos_encodings == "rope2d":
            return rotary_square(round(cells**0.5), head_dim, device).after_registers(registers)
        return None

    @staticmethod
    def _mask(prefix: int, cells: int, context: Context) -> Tensor | None:
        if context.prefix_mask is None and context.memory_mask is None:
            return None
        batch = context.prefix.shape[0]
        whole = torch.ones(batch, prefix + cells, dtype=torch.bool, device=context.prefix.device)
        state = whole if context.prefix_mask is None else torch.cat((context.prefix_mask, whole[:, prefix:]), dim=1)
        keys = state if context.memory_mask is None else torch.cat((state, context.memory_mask), dim=1)
        return keys[:, None, None, :]


class TRM(RecursiveModel):
    """The context is a learned row per puzzle identifier: it cannot solve a task that was not in training."""

    def __init__(self, config: ArchConfig, sizes: DataSizes):
        context = PuzzleEmbedding(
            sizes.num_puzzle_identifiers, config.puzzle_emb_ndim, config.puzzle_emb_len, config.hidden_size, config.dtype
        )
        super().__init__(config, sizes, context)


class ETRM(RecursiveModel):
    """The context is computed from the task's own demonstration pairs, so any task can be asked."""

    def __init__(self, config: ArchConfig, sizes: DataSizes, encoder: EncoderConfig):
        super().__init__(config, sizes, build_encoder(encoder, config))


def build_model(config: ArchConfig, sizes: DataSizes, encoder: EncoderConfig | None) -> RecursiveModel:
    """The model that `arch.name` names."""
    if config.name == "trm":
        return TRM(config, sizes)
    assert encoder is not None, "the schema requires an encoder for arch=etrm"
    return ETRM(config, sizes, encoder)


def count_parameters(model: RecursiveModel) -> dict[str, int]:
    """Parameters of the recursive core, of the context module, and rows times width of the puzzle table."""
    context = sum(p.numel() for p in model.context.parameters())
    table = model.context.weights.numel() if isinstance(model.context, PuzzleEmbedding) else 0
    return {"core": sum(p.numel() for p in model.parameters()) - context, "context": context, "puzzle_table": table}
