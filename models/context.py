"""What the recursion knows of the task: prefix tokens that join the state, and memory tokens that its attention reads.

This is the one interface through which TRM and ETRM differ: `PuzzleEmbedding` looks a learned row up, a demonstration
encoder (models/encoders) computes the context from the task's own pairs.
Shapes: B batch, P prefix tokens, M memory tokens, K demonstrations, L cells, D hidden.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from config.base import Config
from models.colours import ColourPath
from models.layers import worth_packing

# noise(*shape) draws a standard normal (B, *shape) for the batch's rows, the same whatever the number of processes.
Noise = Callable[..., Tensor]


@dataclass
class Context:
    """The task, ready to be read, in the forward dtype.

    prefix (B, P, D) at the scale of the embedding tables (RMS 1 / sqrt(D)), since the core multiplies its whole input by
    sqrt(D). The first `P - len(prefix_cells)` tokens are registers without a place on the canvas, the others lie on the
    cells `prefix_cells`. prefix_mask (B, P): valid tokens, None when all are.
    memory (B, M, D) at RMS 1, the scale of the state, with memory_mask (B, M) and memory_cells (M,), the canvas cell
    (0..L-1) of each token, (B, 1, M) once `packed`; or None.
    prefix_places (B, P, R): the places of the prefix tokens under the core's relations (models/relations.py); None: without any.
    colours: what the demonstrations' inputs show at the cells of the tokens `told` (models/colours.py); None: not said.
    state: what the next ACT step's `ContextModule.forward` gets, by name, (B, ...); what is not named stays as it was.
    losses: auxiliary terms by name, (B,) each, which `ObjectiveConfig.<name>_weight` weighs.
    """

    prefix: Tensor
    prefix_mask: Tensor | None = None
    prefix_cells: Tensor | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None
    memory_cells: Tensor | None = None
    prefix_places: Tensor | None = None
    colours: ColourPath | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)

    @property
    def told(self) -> Tensor:
        """The tokens that depend on the demonstrations: the memory, or the prefix where there is none."""
        return self.prefix if self.memory is None else self.memory

    def shifted(self, shift: Tensor) -> "Context":
        """This context with `shift`, of the shape of `told`, added to the tokens that depend on the demonstrations."""
        moved = self.told + shift.to(self.told.dtype)
        return replace(self, prefix=moved) if self.memory is None else replace(self, memory=moved)

    def select(self, rows: Tensor) -> "Context":
        """The context of the given rows (n,) alone; places on the canvas are the same for all, before `packed`."""

        def chosen(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[rows]

        return replace(
            self,
            prefix=self.prefix[rows],
            prefix_mask=chosen(self.prefix_mask),
            memory=chosen(self.memory),
            memory_mask=chosen(self.memory_mask),
            prefix_places=chosen(self.prefix_places),
            colours=self.colours and self.colours[rows],
            state={name: value[rows] for name, value in self.state.items()},
            losses={name: value[rows] for name, value in self.losses.items()},
        )

    def packed(self) -> "Context":
        """This context without the padding of its memory, M no more than the most real tokens that a sample has, where that saves
        work: every block projects the memory and attends to it."""
        if self.memory is None or self.memory_mask is None or not worth_packing(self.memory_mask):
            return self
        first = self.memory_mask.int().argsort(dim=1, descending=True, stable=True)[:, : int(self.memory_mask.sum(1).max())]
        return replace(
            self,
            memory=self.memory.take_along_dim(first[:, :, None], 1),
            memory_mask=self.memory_mask.gather(1, first),
            memory_cells=self.memory_cells[first][:, None],
            colours=self.colours and self.colours.map(self.colours.of_tokens.take_along_dim(first[:, None], 2)),
        )

    def by_colour(self, shown: Tensor) -> Tensor:
        """What `ColourPath.means` hands, at RMS 1 of a token, to the cells of a query that shows (B, Q, L)."""
        if self.memory is not None:
            return self.colours.means(self.memory, self.memory_mask, shown)
        return math.sqrt(self.prefix.shape[-1]) * self.colours.means(self.prefix, self.prefix_mask, shown)

    def summary(self) -> Tensor:
        """One float32 vector per sample: the prefix laid out flat (B, P * D), or the mean (B, D) over the valid tokens where
        their number depends on the demonstrations."""
        mask = self.prefix_mask if self.memory is None else self.memory_mask
        told = self.told.float()
        if mask is None:
            return told.flatten(1)
        return (told * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


class EncoderConfig(Config):
    """The base of every encoder's configuration, beside its class in models/encoders."""

    name: str

    @property
    def readers(self) -> dict[str, tuple[str, bool]]:
        """Settings that only some encoders of this kind read -> which do, and whether this one does. The others leave them null."""
        return {}

    @model_validator(mode="after")
    def _check_readers(self) -> "EncoderConfig":
        for name, (reader, reads) in self.readers.items():
            if reads and getattr(self, name) is None:
                raise ValueError(f"encoder.{name} must be given with {reader}")
        return self

    @property
    def gives_memory(self) -> bool:
        """Whether the context has memory tokens, which only attention can read."""
        return False

    @property
    def prefix_grows(self) -> bool:
        """Whether the number of prefix tokens depends on the demonstrations, so that the state has no fixed length."""
        return False

    @property
    def gives_colours(self) -> bool:
        """Whether the context says which input colour each token is of, for the recursion's path by colour."""
        return False

    @property
    def gives_kl(self) -> bool:
        """Whether the context comes with a KL term, `objective.kl_weight`'s."""
        return False


class ContextModule(nn.Module):
    """Maps the data of a batch to a `Context`, with gradient at every ACT step.

    A module may keep a state per sample between ACT steps. The carry holds it, detached, and resets it for a new sample.
    refines: the context changes from one ACT step to the next, so that evaluation may not compute it once for all.
    """

    refines = False

    @staticmethod
    def as_prefix(tokens: Tensor) -> Tensor:
        """Tokens (B, P, D) of RMS 1 at the scale that `Context.prefix` asks for."""
        return tokens / math.sqrt(tokens.shape[-1])

    def prefix_length(self, demos: int, cells: int) -> int:
        """P for batches of `demos` demonstrations on canvases of `cells` cells."""
        raise NotImplementedError

    def initial_state(self, data: dict[str, Tensor], noise: Noise | None = None) -> dict[str, Tensor]:
        """The state (B, ...) of samples that start now. `noise` is None in evaluation, where nothing is drawn."""
        return {}

    def forward(self, data: dict[str, Tensor], state: dict[str, Tensor] | None = None) -> Context:
        """The context of `data` after the state that the carry holds; None starts afresh, without noise."""
        raise NotImplementedError


class PuzzleEmbedding(ContextModule):
    """One learned row per puzzle identifier, spread over `length` prefix tokens (zero-padded); TRM's only task knowledge.

    The table is a float32 buffer: each training forward gathers the batch's rows as a leaf with a gradient, and
    `training.optim.SparseSignSGD` turns those gradients into updates of the touched rows. `length` 0 derives the
    number of tokens from the row's width. Row 0 is the blank identifier.
    """

    weights: Tensor

    def __init__(self, count: int, ndim: int, length: int, hidden_size: int, dtype: torch.dtype):
        super().__init__()
        self.length = length or -(ndim // -hidden_size)
        if self.length * hidden_size < ndim:
            raise ValueError(f"puzzle_emb_ndim={ndim} does not fit into puzzle_emb_len={self.length} tokens of hidden_size={hidden_size}")
        self.hidden_size, self.dtype = hidden_size, dtype
        self.register_buffer("weights", torch.zeros(count, ndim))
        self.gathered: list[tuple[Tensor, Tensor]] = []  # (identifiers (B,), rows (B, ndim) with gradient) since the last update

    def prefix_length(self, demos: int, cells: int) -> int:
        return self.length

    def start_anew(self, count: int) -> None:
        """Make this the table of `count` other identifiers, whose rows all begin at the mean of the learned ones."""
        mean = self.weights[1:].mean(0) if len(self.weights) > 1 else self.weights[0]
        self.weights = mean.repeat(count, 1)

    def forward(self, data: dict[str, Tensor], state: dict[str, Tensor] | None = None) -> Context:
        identifiers = data["puzzle_identifiers"]
        rows = self.weights[identifiers]
        if self.training and torch.is_grad_enabled() and not rows.requires_grad:
            rows.requires_grad_()
            self.gathered.append((identifiers, rows))
        padded = F.pad(rows.to(self.dtype), (0, self.length * self.hidden_size - rows.shape[-1]))
        return Context(prefix=padded.unflatten(-1, (self.length, self.hidden_size)))
