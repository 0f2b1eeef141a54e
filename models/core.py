"""What every architecture shares: the tiny networks, and the embeddings, positions and heads around them.

An architecture (models/trm.py) declares its networks and states, and says how one update changes a state.
This module embeds the input, runs the updates of one ACT step, and reads the answer. Only the last updates
carry a gradient.
Shapes: B batch, P prefix tokens, L cells, S = P + L, M memory tokens, D hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dataset.batch import BatchData, DataSizes
from dataset.canvas import PAD
from models.arch import ArchConfig
from models.context import Context, EncoderConfig, PuzzleEmbedding
from models.drafts import DraftReader, with_drafts
from models.encoders import build_encoder
from models.layers import (
    AttentionBlock,
    Drop,
    Embedding,
    KeyValue,
    Linear,
    MixerBlock,
    kept,
    relate,
    truncated_normal,
    weights_cast_once,
)
from models.noise import Draws
from models.positions import ROTATIONS, Rotary
from models.relations import Index, after_registers, moved, places_of

PLACES = "places"  # beside a sample's data: places of the cells of `inputs`, (B, L, R) int32
SQRT_HALF = 0.707106781  # the original's digits: the recursion amplifies a difference in the last bit
Q_HEAD_BIAS = -5.0  # halting starts close to "never", which lets the answer be learned first

# (B, S, D) each, the answer state first.
States = tuple[Tensor, ...]
# The network's name, a state and what is added to it -> the new state.
Apply = Callable[[str, Tensor, Tensor | None], Tensor]


@dataclass
class ModelOutput:
    """New states (B, S, D) with gradient, logits (B, L, V) and float32 halting logits (B,).

    earlier_logits: (B, L, V) after each H cycle but the last, only inside `answers_after_every_cycle`.
    """

    states: States
    logits: Tensor
    q_halt_logits: Tensor
    q_continue_logits: Tensor
    earlier_logits: tuple[Tensor, ...] = ()


class ReasoningModule(nn.Module):
    """A tiny network: what is injected is added to the state, then come its blocks."""

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
        drop: Drop,
    ) -> Tensor:
        x = state if injection is None else state + injection
        for layer, keys_values in zip(self.layers, memory, strict=True):
            x = layer(x, rotary, mask, keys_values, index, drop)
        return x


class RecursiveModel(nn.Module):
    """The base of all architectures.

    The context comes from `encoder`, or without one from a learned row per puzzle.
    """

    # The name of a network -> the configuration key that holds its number of layers.
    networks: dict[str, str]
    every_cycle_answers = False
    cycles: tuple[int, int] | None = None  # H and L cycles inside `at_depth`

    def __init__(self, config: ArchConfig, sizes: DataSizes, encoder: EncoderConfig | None = None):
        super().__init__()
        self.config = config
        self.vocabulary = sizes.vocabulary
        hidden = config.hidden_size
        # The order in which modules are made is that of their random draws: it belongs to what a seed means.
        self.context = build_encoder(encoder, config) if encoder else _puzzle_rows(config, sizes)
        self.embed_tokens = Embedding(sizes.vocab_size, hidden, config.dtype)
        self.lm_head = Linear(hidden, sizes.vocab_size)
        self.q_head = Linear(hidden, 2, bias=True)
        self.q_head.start_at(Q_HEAD_BIAS)
        if config.fixes_length:
            if sizes.seq_len is None:
                raise ValueError(
                    "arch.mlp_t and learned positions need one canvas size: data.canvas=full, "
                    "or a single entry in data.buckets"
                )
            length = self.context.prefix_length(0, sizes.seq_len) + sizes.seq_len
        if config.pos_encodings == "learned":
            self.embed_pos = Embedding(length, hidden, config.dtype)

        def block() -> nn.Module:
            if config.mlp_t:
                return MixerBlock(hidden, length, config.expansion)
            branch = relate(hidden, config.relations)
            return AttentionBlock(hidden, config.num_heads, config.expansion, branch)

        self.colour_proj = Linear(hidden, hidden) if encoder and encoder.tells_colours else None
        self.drafts = encoder.drafts if encoder else None
        self.draft_reader = DraftReader(hidden, config.dtype) if self.drafts else None
        for name, depth in self.networks.items():
            self.add_module(name, ReasoningModule([block() for _ in range(getattr(config, depth))]))
        for name in self.state_names:
            self.register_buffer(f"{name}_init", truncated_normal(hidden, std=1.0))

    @property
    def heads(self) -> list[Linear]:
        """The maps from states to answers."""
        return [self.lm_head, self.q_head, *([self.draft_reader.copy_head] if self.draft_reader else [])]

    @property
    def state_names(self) -> tuple[str, ...]:
        """The states in the carry's order, the answer first. `<name>_init` (D,) is what each begins at."""
        return ("H", "L")

    @property
    def updates(self) -> tuple[int, int, int]:
        """How often states are updated in one ACT step, as three numbers.

        Latent updates before each answer update; answer updates; updates, from the last, with gradient.
        """
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

    def prepared(self, data: BatchData) -> BatchData:
        """`data` with the drafts and places that this model reads, unless they are there."""
        if self.drafts:
            data = with_drafts(data, self.drafts)
        if not self.config.relations or PLACES in data:
            return data
        return {**data, PLACES: places_of(self.config.relations, data["inputs"], self.vocabulary)}

    def forward(
        self,
        states: States,
        data: BatchData,
        context: Context,
        draws: Draws | None = None,
    ) -> ModelOutput:
        """One ACT step from states (B, S, D) on the queries `inputs` (B, L) of `data`.

        draws: for dropout, in the cycles without gradient, too. Without them nothing is dropped.
        """
        data = self.prepared(data)
        inputs, places = data["inputs"], data.get(PLACES)
        tokens = self._embed(data, context)
        rate = self.config.dropout
        drop = partial(draws.dropped, rate=rate) if draws is not None and rate else kept
        apply = self._bind(inputs.shape[1], context.packed(), places, drop)
        states, earlier = self._recur(states, tokens, apply)

        def read(answer: Tensor) -> Tensor:
            logits = self.lm_head(answer[:, -inputs.shape[1] :])
            if self.draft_reader is None:
                return logits
            return self.draft_reader.handed_on(logits, answer[:, 0], data)

        answer = states[0]
        q_logits = self.q_head(self._summary(answer, inputs)).float()
        return ModelOutput(states, read(answer), q_logits[:, 0], q_logits[:, 1], tuple(map(read, earlier)))

    def _recur(self, states: States, tokens: Tensor, apply: Apply) -> tuple[States, list[Tensor]]:
        """All updates of one ACT step: the states after them, and the answer states after earlier cycles.

        The last updates, `updates[2]` of them, carry a gradient.
        With `every_cycle_answers` the last updates of an earlier cycle do, too, and the states are detached
        after it. Earlier answers then leave the gradient of the step's own answer as it is.
        """
        latent, cycles, with_gradient = self.updates
        length = latent + 1
        # The number of each latent update in its cycle; None stands for the answer update that closes it.
        schedule = (*range(latent), None) * cycles
        tail = len(schedule) - with_gradient
        networks = [self.get_submodule(name) for name in self.networks]

        def run(states: States, steps: tuple[int | None, ...]) -> States:
            for step in steps:
                states = (
                    self.answer(states, tokens, apply)
                    if step is None
                    else self.think(states, tokens, step, apply)
                )
            return states

        answers: list[Tensor] = []
        position = 0
        for end in range(length if self.every_cycle_answers else len(schedule), len(schedule) + 1, length):
            start = max(position, tail if end > tail else end - with_gradient)
            # The paper's approximation: what is remembered for the gradient does not grow with the cycles.
            with torch.no_grad(), weights_cast_once(networks, tokens.dtype):
                states = run(states, schedule[position:start])
            states = run(states, schedule[start:end])
            answers.append(states[0])
            if end <= tail:
                states = tuple(state.detach() for state in states)
            position = end
        return states, answers[:-1]

    def _summary(self, answer: Tensor, inputs: Tensor) -> Tensor:
        """What the q_head reads (B, D)."""
        if self.config.halt_pooling == "first":
            return answer[:, 0]
        real = (inputs != PAD).unsqueeze(-1)
        cells = answer[:, -inputs.shape[1] :].float()  # the mean is rounded once, at its end
        return ((cells * real).sum(1) / real.sum(1).clamp_min(1)).to(answer.dtype)

    def _embed(self, data: BatchData, context: Context) -> Tensor:
        """Prefix and cells as one sequence (B, S, D)."""
        cells = self.embed_tokens(data["inputs"])
        if self.draft_reader is not None:
            of_cells, of_all = self.draft_reader(data)
            tokens = torch.cat((context.prefix, cells + of_cells), dim=1) + of_all
        else:
            tokens = torch.cat((context.prefix, cells), dim=1)
        if self.config.pos_encodings == "learned":
            positions = self.embed_pos(torch.arange(tokens.shape[1], device=tokens.device))
            tokens = SQRT_HALF * (tokens + positions)  # keeps the variance of the sum
        tokens = math.sqrt(self.config.hidden_size) * tokens
        if self.colour_proj is None:
            return tokens
        handed = self.colour_proj(context.by_colour(data["inputs"]))
        return tokens + F.pad(handed, (0, 0, context.prefix.shape[1], 0))

    def _bind(self, cells: int, context: Context, places: Tensor | None, drop: Drop) -> Apply:
        """The networks as functions of a state alone. They know its positions, its mask and its places.

        Each block reads its own projection of the memory, which is made here, once per ACT step.
        """
        prefix = context.prefix.shape[1]
        prefix_cells = context.prefix_cells
        on_canvas = 0 if prefix_cells is None else len(prefix_cells)
        registers = prefix - on_canvas
        table = self._positions(registers, cells, context.prefix.device)
        rotary = table
        # Prefix tokens on the canvas stand at the positions of their cells.
        if table is not None and prefix_cells is not None:
            first = torch.arange(registers, device=context.prefix.device)
            rest = torch.arange(registers, registers + cells, device=context.prefix.device)
            rotary = table.rows(torch.cat((first, prefix_cells + registers, rest)))
        of_memory = None
        if table is not None and context.memory_cells is not None:
            of_memory = table.rows(context.memory_cells + registers)
        mask = self._mask(prefix, cells, context)
        index = self._index(context, places)

        def memory(network: nn.Module) -> list[KeyValue | None]:
            assert isinstance(network, ReasoningModule)
            if context.memory is None:
                return [None] * len(network.layers)
            blocks = (layer for layer in network.layers if isinstance(layer, AttentionBlock))
            return [block.self_attn.project_memory(context.memory, of_memory) for block in blocks]

        memories = {name: memory(self.get_submodule(name)) for name in self.networks}

        def apply(name: str, state: Tensor, injection: Tensor | None) -> Tensor:
            return self.get_submodule(name)(state, injection, rotary, mask, memories[name], index, drop)

        return apply

    def _index(self, context: Context, places: Tensor | None) -> Index | None:
        """What all tokens of the state read under the core's relations; `places` are those of the query."""
        relations = self.config.relations
        if not relations or places is None:
            return None
        prefix = context.prefix.shape[1]
        if context.prefix_places is None:
            return Index.of(after_registers(places, prefix), relations)
        return Index.of(torch.cat((context.prefix_places, moved(places, prefix)), dim=1), relations)

    def _positions(self, registers: int, cells: int, device: torch.device) -> Rotary | None:
        """Rotary positions of registers and cells; None where positions are learned, or there are none."""
        head_dim = self.config.hidden_size // self.config.num_heads
        rotation = ROTATIONS.get(self.config.pos_encodings)
        if rotation is None:
            return None
        if rotation.on_canvas:
            return rotation.table(cells, head_dim, device).after_registers(registers)
        # Along the sequence the registers have places of their own, as in the original TRM.
        return rotation.table(registers + cells, head_dim, device)

    @staticmethod
    def _mask(prefix: int, cells: int, context: Context) -> Tensor | None:
        """The keys (B, 1, 1, S + M) that attention may see: all cells, and valid tokens of the context."""
        if context.prefix_mask is None and context.memory_mask is None:
            return None
        batch = context.prefix.shape[0]
        # Cells of the canvas are seen in any case, padding included, as in the original.
        keys = torch.ones(batch, prefix + cells, dtype=torch.bool, device=context.prefix.device)
        if context.prefix_mask is not None:
            keys = torch.cat((context.prefix_mask, keys[:, prefix:]), dim=1)
        if context.memory_mask is not None:
            keys = torch.cat((keys, context.memory_mask), dim=1)
        return rearrange(keys, "b keys -> b 1 1 keys")


@contextmanager
def answers_after_every_cycle(model: RecursiveModel, wanted: bool) -> Iterator[None]:
    """Inside the context the model also answers after each earlier H cycle, if `wanted`, with a gradient
    within the cycle."""
    model.every_cycle_answers = wanted
    try:
        yield
    finally:
        model.every_cycle_answers = False


@contextmanager
def at_depth(model: RecursiveModel, cycles: tuple[int, int] | None) -> Iterator[None]:
    """Inside the context an ACT step has other H and L cycles than the architecture says; None: the same.

    No weight and no state depends on their number. Fewer H cycles than carry a gradient all carry one.
    """
    model.cycles = cycles
    try:
        yield
    finally:
        model.cycles = None


def _puzzle_rows(config: ArchConfig, sizes: DataSizes) -> PuzzleEmbedding:
    # A row of no numbers is that of a model which was told nothing of its task: nano-trm's, for one rule.
    return PuzzleEmbedding(
        sizes.num_puzzle_identifiers,
        config.puzzle_emb_ndim,
        config.puzzle_emb_len,
        config.hidden_size,
        config.dtype,
    )
