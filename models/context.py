"""What the recursion knows of the task: prefix tokens that join the state, memory that attention reads.

TRM and ETRM differ here and nowhere else. `PuzzleEmbedding` looks up a learned row. A demonstration encoder
(models/encoders) computes the context from the task's own pairs.
Shapes: B batch, P prefix tokens, M memory tokens, K demonstrations, L cells, D hidden.
"""

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import model_validator
from torch import Tensor, nn

from dataset.batch import BatchData, DataConfig
from dataset.task import MAX_SIDE
from models import colours
from models.arch import ArchConfig
from models.drafts import DraftSettings
from models.layers import worth_packing
from models.noise import Noise
from utils.config import Config


@dataclass
class Context:
    """The task, ready to be read, in the forward dtype.

    prefix: (B, P, D) at RMS 1 / sqrt(D), the scale of the embedding tables. The core multiplies by sqrt(D).
    prefix_mask: (B, P), the valid tokens; None when all are.
    prefix_cells: the canvas cells on which the last tokens of the prefix lie. The tokens before them are
        registers, without a place on the canvas.
    memory: (B, M, D) at RMS 1, the scale of the state; or None.
    memory_mask: (B, M), the valid tokens.
    memory_cells: (M,), the canvas cell 0..L-1 of each token; (B, 1, M) once `packed`.
    prefix_places: (B, P, R), the places of the prefix tokens under the core's relations
        (models/relations.py); None: they have none.
    colours: (B, T), what the demonstrations' inputs show at the cells of the tokens `told`; None: it is not
        said.
    state: what `ContextModule.forward` gets at the next ACT step, by name, (B, ...). Other names stay.
    losses: auxiliary terms by name, (B,) each, which `ObjectiveConfig.<name>_weight` weighs.
    """

    prefix: Tensor
    prefix_mask: Tensor | None = None
    prefix_cells: Tensor | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None
    memory_cells: Tensor | None = None
    prefix_places: Tensor | None = None
    colours: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)

    @property
    def told(self) -> Tensor:
        """The tokens that depend on the demonstrations: the memory, or the prefix where there is none."""
        return self.prefix if self.memory is None else self.memory

    def shifted(self, shift: Tensor) -> "Context":
        """This context with `shift`, of the shape of `told`, added to these tokens."""
        moved = self.told + shift.to(self.told.dtype)
        return replace(self, prefix=moved) if self.memory is None else replace(self, memory=moved)

    def select(self, rows: Tensor) -> "Context":
        """The context of the rows (n,) alone, before `packed`: places on the canvas belong to all rows."""

        def chosen(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[rows]

        return replace(
            self,
            prefix=self.prefix[rows],
            prefix_mask=chosen(self.prefix_mask),
            memory=chosen(self.memory),
            memory_mask=chosen(self.memory_mask),
            prefix_places=chosen(self.prefix_places),
            colours=chosen(self.colours),
            state={name: value[rows] for name, value in self.state.items()},
            losses={name: value[rows] for name, value in self.losses.items()},
        )

    def packed(self) -> "Context":
        """This context without padding in its memory, where that saves work.

        M becomes the most valid tokens that a sample has. Every block projects the memory and attends to it.
        """
        if self.memory is None or self.memory_mask is None or not worth_packing(self.memory_mask):
            return self
        assert self.memory_cells is not None, "a memory comes with the places of its tokens"
        most = int(self.memory_mask.sum(1).max())
        # A stable order keeps the tokens of a demonstration together, in their own order.
        first = self.memory_mask.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        return replace(
            self,
            memory=self.memory.take_along_dim(first[:, :, None], 1),
            memory_mask=self.memory_mask.gather(1, first),
            memory_cells=self.memory_cells[first][:, None],
            colours=None if self.colours is None else self.colours.gather(1, first),
        )

    def by_colour(self, inputs: Tensor) -> Tensor:
        """What `colours.means` hands to each cell of a query (B, L), at RMS 1 of a token."""
        assert self.colours is not None, "the encoder does not say which token shows which colour"
        mask = self.prefix_mask if self.memory is None else self.memory_mask
        assert mask is not None, "tokens of demonstrations come with a mask"
        scale = math.sqrt(self.prefix.shape[-1]) if self.memory is None else 1.0
        return scale * colours.means(self.told, mask, self.colours, inputs)

    def summary(self) -> Tensor:
        """One float32 vector per sample.

        It is the prefix laid out flat (B, P * D). Where the number of tokens depends on the demonstrations,
        it is the mean (B, D) over the valid ones.
        """
        mask = self.prefix_mask if self.memory is None else self.memory_mask
        told = self.told.float()
        if mask is None:
            return rearrange(told, "b p d -> b (p d)")
        return (told * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


class EncoderConfig(Config):
    """The base of every encoder's configuration, beside its class in models/encoders."""

    name: str

    @property
    def readers(self) -> dict[str, tuple[str, bool]]:
        """Settings that only some encoders of this kind read -> which do, and whether this one does.

        Those that do not leave them null.
        """
        return {}

    def check(self, arch: ArchConfig, data: DataConfig) -> None:
        """Raise `ValueError` for a core or for data that this encoder does not go with.

        Only a new run is held to these rules. A rule that concerns this configuration alone is a validator.
        """
        # Checkpoints may hold what was set without effect; a new run may not.
        for name, (reader, reads) in self.readers.items():
            if not reads and (value := getattr(self, name)) is not None:
                raise ValueError(f"encoder.{name}={value} is read only with {reader}; leave it null")
        if data.sides[-1] > MAX_SIDE:
            raise ValueError(
                f"an encoder reads ARC grids, up to {MAX_SIDE} cells a side; "
                f"data.buckets ends with {data.sides[-1]}"
            )
        if arch.hidden_size // arch.num_heads % 4:
            raise ValueError(
                "an encoder places cells in two dimensions and needs arch.hidden_size / arch.num_heads "
                "divisible by 4"
            )
        if arch.mlp_t and self.gives_memory:
            raise ValueError(
                f"arch.mlp_t=true has no attention that could read the memory of encoder={self.name}"
            )
        if self.prefix_grows and arch.fixes_length:
            raise ValueError(
                f"{arch.fixed_by} needs a state of fixed length, "
                "but encoder.placement=prefix grows with the demonstrations"
            )

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
        """Whether the number of prefix tokens, and so the state's length, depends on the demonstrations."""
        return False

    @property
    def tells_colours(self) -> bool:
        """Whether the context says which tokens show which colour, for the recursion's path for colours."""
        return False

    @property
    def drafts(self) -> DraftSettings | None:
        """How the drafts are looked up that encoder and recursion read; None: they read none."""
        return None

    @property
    def gives_kl(self) -> bool:
        """Whether the context comes with a KL term, `objective.kl_weight`'s."""
        return False


class ContextModule(nn.Module):
    """Maps the data of a batch to a `Context`, with gradient at every ACT step.

    It may keep a state per sample between ACT steps. The carry holds it, detached; new samples reset it.

    refines: the context changes from one ACT step to the next. Evaluation may not compute it once for all.
    """

    refines = False

    @staticmethod
    def as_prefix(tokens: Tensor) -> Tensor:
        """Tokens (B, P, D) of RMS 1 at the scale that `Context.prefix` asks for."""
        return tokens / math.sqrt(tokens.shape[-1])

    def prefix_length(self, demos: int, cells: int) -> int:
        """P for batches of `demos` demonstrations on canvases of `cells` cells."""
        raise NotImplementedError

    def initial_state(self, data: BatchData, noise: Noise | None = None) -> dict[str, Tensor]:
        """The state (B, ...) of samples that start now. `noise` is None in evaluation: nothing is drawn."""
        return {}

    def forward(self, data: BatchData, state: dict[str, Tensor] | None = None) -> Context:
        """The context of `data` after the state that the carry holds; None starts afresh, without noise."""
        raise NotImplementedError


class PuzzleEmbedding(ContextModule):
    """One learned row per puzzle identifier, spread over prefix tokens: all that a TRM knows of its task.

    length: of the prefix; 0: as many tokens as the row fills. Tokens that it does not fill are zero.

    Row 0 is the blank identifier.
    The table is a float32 buffer. A training forward gathers the batch's rows as a leaf with a gradient, and
    `training.optim.SparseSignSGD` updates the touched rows alone.
    """

    weights: Tensor

    def __init__(self, count: int, ndim: int, length: int, hidden_size: int, dtype: torch.dtype):
        super().__init__()
        self.length = length or -(ndim // -hidden_size)
        if self.length * hidden_size < ndim:
            raise ValueError(
                f"puzzle_emb_ndim={ndim} does not fit into puzzle_emb_len={self.length} tokens "
                f"of hidden_size={hidden_size}"
            )
        self.hidden_size, self.dtype = hidden_size, dtype
        self.register_buffer("weights", torch.zeros(count, ndim))
        # Identifiers (B,) and rows (B, ndim) with their gradient, since the last update.
        self.gathered: list[tuple[Tensor, Tensor]] = []

    def prefix_length(self, demos: int, cells: int) -> int:
        return self.length

    def start_anew(self, count: int) -> None:
        """Make this the table of `count` other identifiers. Rows begin at the mean of the learned ones."""
        mean = self.weights[1:].mean(0) if len(self.weights) > 1 else self.weights[0]
        self.weights = mean.repeat(count, 1)  # a copy: rows that einops repeats share their memory

    def forward(self, data: BatchData, state: dict[str, Tensor] | None = None) -> Context:
        identifiers = data["puzzle_identifiers"]
        rows = self.weights[identifiers]
        if self.training and torch.is_grad_enabled() and not rows.requires_grad:
            rows.requires_grad_()
            self.gathered.append((identifiers, rows))
        padded = F.pad(rows.to(self.dtype), (0, self.length * self.hidden_size - rows.shape[-1]))
        return Context(prefix=rearrange(padded, "b (p d) -> b p d", d=self.hidden_size))
