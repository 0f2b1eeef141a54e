"""Reading demonstration pairs: every cell as a token, and the pooling of a pair's tokens into one vector.

No token attends to another pair, nor to padding unless asked to. Empty slots change nothing.
Shapes: B batch, K demonstrations, L cells, N tokens of a pair, W width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from einops import rearrange, repeat
from pydantic import AfterValidator, NonNegativeInt, model_validator
from torch import Tensor, nn

from dataset.batch import BatchData, DataConfig
from dataset.canvas import PAD, VOCAB_SIZE
from dataset.task import MAX_SIDE
from models.arch import ArchConfig
from models.conditions import ConditionName
from models.drafts import (
    DRAFTS,
    DRAFTS_PER_GRID,
    DraftSettings,
    draft_embedding,
    embedded,
    with_drafts,
)
from models.encoders.blocks import BlockConfig, SelfBlock
from models.grids import NONE
from models.layers import (
    CrossAttention,
    Embedding,
    Linear,
    Packed,
    keys_mask,
    rms_norm,
    truncated_normal,
    worth_packing,
)
from models.positions import ROTATIONS, Rotary
from models.relations import Index, RelationName, Relations, after_registers, each_once, moved, places_of


class PairConfig(BlockConfig):
    """How a demonstration pair is read.

    num_layers: blocks over each pair.
    pair_tokens: `summed` adds the embeddings of input and output at each cell of their common canvas. "What
        becomes of this cell" is then one token. `concatenated` keeps two tokens per cell.
    positions: `embedded` adds learned embeddings of row and column, the others rotate (models/positions.py).
    shared_colours: one colour table for inputs and outputs. A channel embedding then tells them apart. With
        `embedded` positions it does so in any case.
    attend_padding: cells outside the grids count as tokens, too.
    relations: what the blocks read of a pair's input at each cell besides attention (models/relations.py).
    draft_places, draft_conditions: how drafts of all grids are looked up (models/drafts.py). Without places
        there are none.
    """

    num_layers: NonNegativeInt
    pair_tokens: Literal["summed", "concatenated"]
    positions: Literal["rope2d", "rope2d_values", "rope", "embedded"]
    shared_colours: bool
    attend_padding: bool
    relations: Relations
    draft_places: Relations
    draft_conditions: Annotated[list[ConditionName | RelationName], AfterValidator(each_once)]

    # Whether places reach what is read of a pair only through its layers. The tokens of a memory keep theirs.
    needs_layers: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check_colours(self) -> "PairConfig":
        blind = self.positions != "embedded" or getattr(self, "pooling_method", "") == "cls"
        if self.needs_layers and self.num_layers == 0 and blind:
            raise ValueError(
                "encoder.num_layers=0 would not see where cells are; use at least 1, "
                "or encoder.positions=embedded without cls"
            )
        if self.relations and self.num_layers == 0:
            raise ValueError(
                f"encoder.relations={self.relations} are read by blocks, and encoder.num_layers=0 leaves none"
            )
        if self.draft_conditions and not self.draft_places:
            raise ValueError(
                f"encoder.draft_conditions={self.draft_conditions} refine what encoder.draft_places finds, "
                "which are none"
            )
        if self.shared_colours and self.pair_tokens == "summed":
            raise ValueError(
                "encoder.shared_colours=true with encoder.pair_tokens=summed cannot tell input from output; "
                "use concatenated"
            )
        return self

    @property
    def drafts(self) -> DraftSettings | None:
        return DraftSettings(self.draft_places, self.draft_conditions) if self.draft_places else None

    def heads(self, arch: ArchConfig) -> int:
        """Attention heads of the encoder's blocks."""
        return arch.num_heads

    def check(self, arch: ArchConfig, data: DataConfig) -> None:
        super().check(arch, data)
        rotation = ROTATIONS.get(self.positions)
        if rotation and rotation.values and self.heads(arch) < 2:
            raise ValueError(
                f"encoder.positions={self.positions} turns the values of half of the encoder's heads, "
                f"found {self.heads(arch)}"
            )
        if self.num_layers == 0 and rotation and arch.pos_encodings not in ROTATIONS:
            raise ValueError(
                f"encoder.num_layers=0 leaves the places of cells to the core, which arch.pos_encodings="
                f"{arch.pos_encodings} does not tell it; use at least 1, or encoder.positions=embedded"
            )


@dataclass
class PairTokens:
    """The tokens of a batch's pairs, registers first.

    tokens: (B, K, N, W) at RMS 1.
    valid: (B, K, N).
    cells: each token's place on the canvas, registers left out.
    """

    tokens: Tensor
    valid: Tensor
    cells: Tensor


class PairEncoder(nn.Module):
    """The tokens of every pair after `num_layers` blocks over the pair.

    registers: how many learned tokens stand before them.
    """

    def __init__(self, config: PairConfig, arch: ArchConfig, width: int, num_heads: int, registers: int = 0):
        super().__init__()
        self.config, self.head_dim = config, width // num_heads
        tables = 1 if config.shared_colours else 2
        self.colours = nn.ModuleList(Embedding(VOCAB_SIZE, width, arch.dtype) for _ in range(tables))
        embedded = config.positions == "embedded"
        # Row and column.
        self.places = nn.ModuleList(Embedding(MAX_SIDE, width, arch.dtype) for _ in range(2 * embedded))
        channels = config.pair_tokens == "concatenated" and (config.shared_colours or embedded)
        self.channels = Embedding(2, width, arch.dtype) if channels else None
        self.drafts = draft_embedding(width, arch.dtype) if config.drafts else None
        self.layers = nn.ModuleList(
            SelfBlock(width, num_heads, arch.expansion, config, config.relations)
            for _ in range(config.num_layers)
        )
        self.registers = nn.Parameter(truncated_normal(registers, width, std=1.0)) if registers else None

    def forward(self, data: BatchData) -> PairTokens:
        inputs, outputs, mask = data["demo_inputs"], data["demo_labels"], data["demo_mask"]
        batch, demos, cells = inputs.shape
        places = torch.arange(cells, device=inputs.device)
        grids = [self.colours[0](inputs), self.colours[-1](outputs)]  # (B, K, L, W) each
        # `terms` counts the embeddings that a token is the sum of.
        if self.config.pair_tokens == "summed":
            x, real, terms = grids[0] + grids[1], (inputs != PAD) | (outputs != PAD), 2
        else:
            x, real, terms = torch.cat(grids, dim=2), torch.cat((inputs, outputs), dim=2) != PAD, 1
            places = repeat(places, "l -> (grid l)", grid=2)
        side = round(cells**0.5)
        if self.places:
            rows, columns = self.places
            x, terms = x + rows(places // side) + columns(places % side), terms + 2
        if self.drafts is not None and self.config.drafts is not None:
            drafts = with_drafts(data, self.config.drafts)[DRAFTS][:, :, :demos]
            of_cells = embedded(self.drafts, drafts)
            x = x + repeat(of_cells, "b k l w -> b k (grid l) w", grid=x.shape[2] // cells)
            terms += DRAFTS_PER_GRID
        if self.channels is not None:
            channels = self.channels(torch.arange(2, device=x.device))
            x, terms = x + repeat(channels, "grid w -> (grid l) w", l=cells), terms + 1
        x = math.sqrt(x.shape[-1] / terms) * rearrange(x, "b k n w -> (b k) n w")  # RMS 1
        valid = (real | self.config.attend_padding) & mask[:, :, None]
        registers = 0 if self.registers is None else len(self.registers)
        if self.registers is not None:
            x = torch.cat((repeat(self.registers.to(x.dtype), "r w -> n r w", n=len(x)), x), dim=1)
            valid = torch.cat((torch.ones_like(valid[..., :registers]), valid), dim=2)
        rotary, seen = self._rotary(cells, places, registers), rearrange(valid, "b k n -> (b k) n")
        blocks = self._blocks_packed if worth_packing(seen) else self._blocks
        x = self.config.final_norm(blocks(x, rotary, seen, self._related(inputs, registers)))
        return PairTokens(rearrange(x, "(b k) n w -> b k n w", b=batch, k=demos), valid, places)

    def _related(self, inputs: Tensor, registers: int) -> Tensor | None:
        """The places (B * K, N, R) of each token among the cells of its pair's input (B, K, L).

        None where no relation is read.
        """
        if not self.config.relations:
            return None
        related = places_of(self.config.relations, rearrange(inputs, "b k l -> (b k) l"))
        # Both tokens of a cell read its input, which stands first.
        grids = 1 if self.config.pair_tokens == "summed" else 2
        return after_registers(repeat(related, "n l r -> n (grid l) r", grid=grids), registers)

    def _blocks(self, x: Tensor, rotary: Rotary | None, valid: Tensor, related: Tensor | None) -> Tensor:
        keys = keys_mask(valid)
        index = None if related is None else Index.of(related, self.config.relations)
        for layer in self.layers:
            x = layer(x, rotary, keys, index)
        return x

    def _blocks_packed(
        self, x: Tensor, rotary: Rotary | None, valid: Tensor, related: Tensor | None
    ) -> Tensor:
        """The same for valid tokens, and zero elsewhere. They lie in one row, with nothing between them."""
        kept = valid.flatten().nonzero().squeeze(1)
        lengths = Packed([length for length in valid.sum(1).tolist() if length])
        rotary = None if rotary is None else rotary.rows(kept % x.shape[1])
        laid_out = rearrange(x, "n s w -> (n s) w")
        packed = laid_out[kept][None]
        index = None
        if related is not None:
            index = Index.of(_packed_places(related, valid, kept), self.config.relations)
        for layer in self.layers:
            packed = layer(packed, rotary, lengths, index)
        return torch.zeros_like(laid_out).index_copy(0, kept, packed[0]).view_as(x)

    def _rotary(self, cells: int, places: Tensor, registers: int) -> Rotary | None:
        rotation = ROTATIONS.get(self.config.positions)
        if rotation is None:
            return None
        if rotation.on_canvas:
            table = rotation.table(cells, self.head_dim, places.device).rows(places)
        else:
            table = rotation.table(len(places), self.head_dim, places.device)
        return table.after_registers(registers)


def _packed_places(places: Tensor, valid: Tensor, kept: Tensor) -> Tensor:
    """Places (N, S, R) among the tokens `kept` (T,) of all sequences alone, (1, T, R).

    A place is a cell of a grid, and so a valid token wherever its pair is shown.
    """
    start = places.shape[1] * torch.arange(len(places), device=places.device)
    in_row = rearrange(moved(places, rearrange(start, "n -> n 1 1")), "n s r -> (n s) r")[kept]
    rank = valid.flatten().cumsum(0) - 1
    return torch.where(in_row >= 0, rank[in_row.clamp_min(0)], NONE)[None]


class MeanPool(nn.Module):
    """The mean over valid members: (N, L, W), (N, L) -> (N, W)."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1).to(x.dtype)


class WeightedPool(nn.Module):
    """The mean under a learned softmax weight per member."""

    def __init__(self, width: int):
        super().__init__()
        self.score = Linear(width, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        score = self.score(x).squeeze(-1).float()
        # Without any valid member the softmax is uniform; the mask then leaves zero.
        weight = score.masked_fill(~mask, torch.finfo(score.dtype).min).softmax(-1) * mask
        return (x * weight.to(x.dtype)[:, :, None]).sum(1)


class AttentionPool(nn.Module):
    """One learned query attends to all valid members."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.query = nn.Parameter(truncated_normal(1, width, std=1.0))
        self.read = CrossAttention(width, num_heads)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query = repeat(self.query.to(x.dtype), "q w -> n q w", n=len(x))
        return rearrange(self.read(query, x, mask), "n 1 w -> n w")


class ClsPool(nn.Module):
    """The first token: a register that attended to all others."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x[:, 0]


POOLING = Literal["mean", "attention", "weighted", "cls"]


class PairVectors(nn.Module):
    """One vector per pair, (B, K, W) at RMS 1: its tokens, pooled as `pooling_method` says.

    Empty slots hold anything finite.
    """

    def __init__(
        self, config: PairConfig, pooling_method: POOLING, arch: ArchConfig, width: int, num_heads: int
    ):
        super().__init__()
        self.pairs = PairEncoder(config, arch, width, num_heads, registers=int(pooling_method == "cls"))
        pools: dict[str, Callable[[], nn.Module]] = {
            "mean": MeanPool,
            "cls": ClsPool,
            "weighted": lambda: WeightedPool(width),
            "attention": lambda: AttentionPool(width, num_heads),
        }
        self.pool = pools[pooling_method]()

    def forward(self, data: BatchData) -> Tensor:
        read = self.pairs(data)
        tokens, valid = (rearrange(x, "b k n ... -> (b k) n ...") for x in (read.tokens, read.valid))
        return rearrange(rms_norm(self.pool(tokens, valid)), "(b k) w -> b k w", b=len(read.valid))
