"""What every architecture shares: its configuration, the tiny networks, embeddings, positions and heads around a context.

An architecture (models/trm.py) declares its networks and states and says how one update changes a state. This module
embeds the input, runs the updates of one ACT step, the last of them with gradient, and reads the answer.
Shapes: B batch, P prefix tokens, L cells, S = P + L, M memory tokens, D hidden, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from config.base import Config
from dataset.batch import DataConfig
from dataset.canvas import PAD, VOCAB_SIZE
from dataset.store import Store
from models.colours import looked_at
from models.context import Context, EncoderConfig, PuzzleEmbedding
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
    weights_cast_once,
)
from models.relations import NONE, Index, Relations, count_of, moved, places_of, relate

SQRT_HALF = 0.707106781  # the original's digits: the recursion amplifies a difference in the last bit
Q_HEAD_BIAS = -5.0  # halting starts close to "never", which lets the answer be learned first

States = tuple[Tensor, ...]  # (B, S, D) each, the answer state first
Apply = Callable[[str, Tensor, Tensor | None], Tensor]  # network name, state, what is added to it -> new state


class ArchConfig(Config):
    """What all architectures have in common; models/trm.py adds layers and cycles.

    act_enabled: false trains every sample for all halt_max_steps. halt_threshold: null evaluates every sample for all
    halt_max_steps, a probability lets it stop once its halting confidence reaches it. halt_pooling: the q_head reads
    the first state token, or the mean over the input's cells. puzzle_emb_*: of the puzzle rows, unused beside an encoder.
    relations: cells of the query that every block reads at each cell besides attention (models/relations.py).
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
    relations: Relations = []  # what checkpoints from before there were any have

    @model_validator(mode="after")
    def _check(self) -> "ArchConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(f"arch.hidden_size={self.hidden_size} is not divisible by arch.num_heads={self.num_heads}")
        multiple = {"rope": 2, "rope2d": 4, "rope2d_values": 4}.get(self.pos_encodings, 1)
        if self.hidden_size // self.num_heads % multiple:
            raise ValueError(f"arch.pos_encodings={self.pos_encodings} needs hidden_size / num_heads divisible by {multiple}")
        if self.pos_encodings == "rope2d_values" and self.num_heads < 2:
            raise ValueError("arch.pos_encodings=rope2d_values turns the values of half of the heads and needs arch.num_heads >= 2")
        if self.mlp_t and self.pos_encodings.startswith("rope"):
            raise ValueError(
                f"arch.mlp_t=true has no attention to rotate; set arch.pos_encodings to none or learned, not {self.pos_encodings}"
            )
        if self.mlp_t and self.relations:
            raise ValueError(f"arch.relations={self.relations} are read beside attention, which arch.mlp_t=true has none of")
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

    @classmethod
    def of(cls, store: Store, data: DataConfig) -> "DataSizes":
        """The sizes of a dataset on the canvases that `data` configures."""
        cells = data.sides[0] ** 2 if len(data.sides) == 1 else None
        return cls(store.game.vocabulary.size, store.metadata.num_puzzle_identifiers, cells)


@dataclass
class ModelOutput:
    """New states (B, S, D) with gradient, logits (B, L, V) and float32 halting logits (B,)."""

    states: States
    logits: Tensor
    q_halt_logits: Tensor
    q_continue_logits: Tensor


class ReasoningModule(nn.Module):
    """A tiny network: injection by addition, then its blocks."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self,
        state: Tensor,
        injection: Tensor | None,
        rotary: Rotary | None,
        mask: Tensor | None,
        memory: list[KeyValue | None],
        index: Index | None,
    ) -> Tensor:
        x = state if injection is None else state + injection
        for layer, keys_values in zip(self.layers, memory, strict=True):
            x = layer(x, rotary, mask, keys_values, index)
        return x


class RecursiveModel(nn.Module):
    """The base of all architectures. The context is computed by `encoder`, or without one a learned row per puzzle."""

    networks: dict[str, str]  # name of a network -> the configuration key that holds its number of layers

    def __init__(self, config: ArchConfig, sizes: DataSizes, encoder: EncoderConfig | None = None):
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.context = build_encoder(encoder, config) if encoder else _puzzle_rows(config, sizes)
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
            length = self.context.prefix_length(0, sizes.seq_len) + sizes.seq_len
        if config.pos_encodings == "learned":
            self.embed_pos = Embedding(length, hidden, config.dtype)

        def block() -> nn.Module:
            if config.mlp_t:
                return MixerBlock(hidden, length, config.expansion)
            return AttentionBlock(hidden, config.num_heads, config.expansion, relate(hidden, config.relations))

        if config.relations and sizes.vocab_size != VOCAB_SIZE:
            raise ValueError(f"arch.relations={config.relations} are those of ARC grids, which this dataset has none of")
        self.colour_proj = Linear(hidden, hidden) if encoder and encoder.gives_colours else None
        evidence = encoder.evidence if encoder and encoder.gives_colours else []
        self.place_names = list(dict.fromkeys([*config.relations, *evidence]))  # the core's own come first
        for name, depth in self.networks.items():
            self.add_module(name, ReasoningModule([block() for _ in range(getattr(config, depth))]))
        for name in self.state_names:
            self.register_buffer(f"{name}_init", truncated_normal(hidden, std=1.0))

    @property
    def state_names(self) -> tuple[str, ...]:
        """The states in the carry's order, the answer first; `<name>_init` (D,) is each one's initial value."""
        return ("H", "L")

    @property
    def updates(self) -> tuple[int, int, int]:
        """Latent updates before each answer update, answer updates per ACT step, and how many of all updates, from the
        last, carry a gradient."""
        raise NotImplementedError

    def think(self, states: States, tokens: Tensor, step: int, apply: Apply) -> States:
        """The latent update number `step` of a cycle; `tokens` (B, S, D) are context and input."""
        raise NotImplementedError

    def answer(self, states: States, tokens: Tensor, apply: Apply) -> States:
        """The answer update that closes a cycle."""
        raise NotImplementedError

    def initial_states(self) -> States:
        """Each state's initial value (D,)."""
        return tuple(self.get_buffer(f"{name}_init") for name in self.state_names)

    def placed(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """`data` with the `places` (B, L, R) that this model's relations name for its `inputs`, unless they are there."""
        if not self.place_names or "places" in data:
            return data
        return data | {"places": places_of(self.place_names, data["inputs"])}

    def forward(self, states: States, inputs: Tensor, context: Context, places: Tensor | None = None) -> ModelOutput:
        """One ACT step from states (B, S, D) on input tokens (B, L). places: what `placed` adds for them, computed if missing."""
        if self.place_names and places is None:
            places = places_of(self.place_names, inputs)
        tokens = self._embed(inputs, context, places)
        apply = self._bind(inputs.shape[1], context.packed(), places)
        latent, cycles, with_gradient = self.updates
        schedule = (*range(latent), None) * cycles
        first_with_gradient = len(schedule) - with_gradient

        def run(states: States, steps: tuple[int | None, ...]) -> States:
            for step in steps:
                states = self.answer(states, tokens, apply) if step is None else self.think(states, tokens, step, apply)
            return states

        with torch.no_grad(), weights_cast_once([self.get_submodule(name) for name in self.networks], tokens.dtype):
            states = run(states, schedule[:first_with_gradient])
        states = run(states, schedule[first_with_gradient:])
        answer = states[0]
        q_logits = self.q_head(self._summary(answer, inputs)).float()
        logits = self.lm_head(answer[:, -inputs.shape[1] :])
        return ModelOutput(states, logits, q_logits[:, 0], q_logits[:, 1])

    def _summary(self, answer: Tensor, inputs: Tensor) -> Tensor:
        """What the q_head reads (B, D)."""
        if self.config.halt_pooling == "first":
            return answer[:, 0]
        real = (inputs != PAD).unsqueeze(-1)
        cells = answer[:, -inputs.shape[1] :].float()
        return ((cells * real).sum(1) / real.sum(1).clamp_min(1)).to(answer.dtype)

    def _embed(self, inputs: Tensor, context: Context, places: Tensor | None) -> Tensor:
        """Prefix and cells as one sequence (B, S, D)."""
        tokens = torch.cat((context.prefix, self.embed_tokens(inputs)), dim=1)
        if self.config.pos_encodings == "learned":
            positions = self.embed_pos(torch.arange(tokens.shape[1], device=tokens.device))
            tokens = SQRT_HALF * (tokens + positions)  # keeps the variance of the sum
        tokens = math.sqrt(self.config.hidden_size) * tokens
        if self.colour_proj is None:
            return tokens
        shown = looked_at(inputs, places, self.place_names, context.colours)
        return tokens + F.pad(self.colour_proj(context.by_colour(shown)), (0, 0, context.prefix.shape[1], 0))

    def _bind(self, cells: int, context: Context, places: Tensor | None) -> Apply:
        """The networks, applied at the state's positions, under its mask, reading their own projections of the memory and the
        query's `places` (B, L, R)."""
        prefix = context.prefix.shape[1]
        on_canvas = 0 if context.prefix_cells is None else len(context.prefix_cells)
        registers = prefix - on_canvas
        table = self._positions(registers, cells, context.prefix.device)
        rotary = table
        if table is not None and on_canvas:
            first = torch.arange(registers, device=context.prefix.device)
            rest = torch.arange(registers, registers + cells, device=context.prefix.device)
            rotary = table.rows(torch.cat((first, context.prefix_cells + registers, rest)))
        of_memory = table.rows(context.memory_cells + registers) if table is not None and context.memory is not None else None
        mask = self._mask(prefix, cells, context)
        index = None
        if self.config.relations:
            own = places[..., : count_of(self.config.relations)]
            index = Index.of(self._state_places(own, context), self.config.relations)

        def memory(network: ReasoningModule) -> list[KeyValue | None]:
            if context.memory is None:
                return [None] * len(network.layers)
            return [layer.self_attn.project_memory(context.memory, of_memory) for layer in network.layers]

        memories = {name: memory(self.get_submodule(name)) for name in self.networks}

        def apply(name: str, state: Tensor, injection: Tensor | None) -> Tensor:
            return self.get_submodule(name)(state, injection, rotary, mask, memories[name], index)

        return apply

    @staticmethod
    def _state_places(places: Tensor, context: Context) -> Tensor:
        """The places (B, S, R) of all tokens of the state, from those of the query's cells."""
        prefix = context.prefix.shape[1]
        of_cells = moved(places, prefix)
        if context.prefix_places is None:
            return F.pad(of_cells, (0, 0, prefix, 0), value=NONE)
        return torch.cat((context.prefix_places, of_cells), dim=1)

    def _positions(self, registers: int, cells: int, device: torch.device) -> Rotary | None:
        head_dim = self.config.hidden_size // self.config.num_heads
        if self.config.pos_encodings == "rope":
            return rotary_line(registers + cells, head_dim, device)
        if self.config.pos_encodings in ("rope2d", "rope2d_values"):
            values = self.config.pos_encodings == "rope2d_values"
            return rotary_square(round(cells**0.5), head_dim, device, values).after_registers(registers)
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


def _puzzle_rows(config: ArchConfig, sizes: DataSizes) -> PuzzleEmbedding:
    if not config.puzzle_emb_ndim:
        raise ValueError("arch.puzzle_emb_ndim must be at least 1: without an encoder the task is known only by its puzzle row")
    return PuzzleEmbedding(sizes.num_puzzle_identifiers, config.puzzle_emb_ndim, config.puzzle_emb_len, config.hidden_size, config.dtype)
