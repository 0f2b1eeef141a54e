"""Reading demonstration pairs: every cell as a token, and the pooling of a pair's tokens into one vector.

No token attends to padding (unless asked to) or to another pair, so empty slots change nothing.
Shapes: B batch, K demonstrations, L cells, N tokens of a pair, W width.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, model_validator
from torch import Tensor, nn

from dataset.canvas import PAD, VOCAB_SIZE
from dataset.task import MAX_SIDE
from models.encoders.blocks import BlockConfig, SelfBlock
from models.layers import (
    CrossAttention,
    Embedding,
    Linear,
    Packed,
    Rotary,
    keys_mask,
    rms_norm,
    rotary_line,
    rotary_square,
    truncated_normal,
    worth_packing,
)
from models.relations import NONE, Index, Relations, moved, places_of

if TYPE_CHECKING:
    from models.core import ArchConfig


class PairConfig(BlockConfig):
    """How a demonstration pair is read.

    num_layers: blocks over each pair. pair_tokens: `summed` adds the input's and the output's embedding at each cell of
    their common canvas, so that "what becomes of this cell" is one token; `concatenated` keeps two tokens per cell.
    positions: `rope2d` and `rope` turn queries and keys, by row and column or along the sequence of tokens; `rope2d_values` turns
    the values, too (`models.layers.Rotary`); `embedded` adds learned embeddings of row and column. shared_colours: one colour
    table for inputs and outputs, which then differ by a channel embedding; so they do with `embedded` positions. attend_padding:
    cells outside the grids count as tokens, too. relations: cells of the pair's input that the blocks read at each cell besides
    (models/relations.py).
    """

    num_layers: NonNegativeInt
    pair_tokens: Literal["summed", "concatenated"]
    positions: Literal["rope2d", "rope2d_values", "rope", "embedded"]
    shared_colours: bool
    attend_padding: bool
    relations: Relations = []  # what checkpoints from before there were any have

    # Whether what is read of a pair depends on places only through its layers; a memory's tokens keep their own.
    needs_layers: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check_colours(self) -> "PairConfig":
        if self.needs_layers and self.num_layers == 0 and (self.positions != "embedded" or getattr(self, "pooling_method", "") == "cls"):
            raise ValueError(
                "encoder.num_layers=0 would not see where cells are; use at least 1, or encoder.positions=embedded without cls"
            )
        if self.relations and self.num_layers == 0:
            raise ValueError(f"encoder.relations={self.relations} are read by blocks, and encoder.num_layers=0 leaves none")
        if self.shared_colours and self.pair_tokens == "summed":
            raise ValueError("encoder.shared_colours=true with encoder.pair_tokens=summed cannot tell input from output; use concatenated")
        return self


@dataclass
class PairTokens:
    """tokens (B, K, N, W) at RMS 1, valid (B, K, N), and cells (N,), each token's place on the canvas, without register tokens."""

    tokens: Tensor
    valid: Tensor
    cells: Tensor


class PairEncoder(nn.Module):
    """The tokens of every pair after `num_layers` blocks over the pair; `registers` learned tokens stand before them."""

    def __init__(self, config: PairConfig, arch: "ArchConfig", width: int, num_heads: int, registers: int = 0):
        super().__init__()
        self.config, self.head_dim = config, width // num_heads
        tables = 1 if config.shared_colours else 2
        self.colours = nn.ModuleList(Embedding(VOCAB_SIZE, width, arch.dtype) for _ in range(tables))
        embedded = config.positions == "embedded"
        self.places = nn.ModuleList(Embedding(MAX_SIDE, width, arch.dtype) for _ in range(2 * embedded))  # row, column
        channels = config.pair_tokens == "concatenated" and (config.shared_colours or embedded)
        self.channels = Embedding(2, width, arch.dtype) if channels else None
        self.layers = nn.ModuleList(
            SelfBlock(width, num_heads, arch.expansion, config, config.relations) for _ in range(config.num_layers)
        )
        self.registers = nn.Parameter(truncated_normal(registers, width, std=1.0)) if registers else None

    def forward(self, data: dict[str, Tensor]) -> PairTokens:
        inputs, outputs, mask = data["demo_inputs"], data["demo_labels"], data["demo_mask"]
        batch, demos, cells = inputs.shape
        places = torch.arange(cells, device=inputs.device)
        grids = [self.colours[0](inputs), self.colours[-1](outputs)]  # (B, K, L, W) each
        if self.config.pair_tokens == "summed":
            x, real, terms = grids[0] + grids[1], (inputs != PAD) | (outputs != PAD), 2
        else:
            x, real, terms = torch.cat(grids, dim=2), torch.cat((inputs, outputs), dim=2) != PAD, 1
            places = places.repeat(2)
        side = round(cells**0.5)
        if self.places:
            rows, columns = self.places
            x, terms = x + rows(places // side) + columns(places % side), terms + 2
        if self.channels is not None:
            x, terms = x + self.channels(torch.arange(2, device=x.device)).repeat_interleave(cells, dim=0), terms + 1
        x = math.sqrt(x.shape[-1] / terms) * x.flatten(0, 1)  # RMS 1
        valid = (real | self.config.attend_padding) & mask[:, :, None]
        registers = 0 if self.registers is None else len(self.registers)
        if self.registers is not None:
            x = torch.cat((self.registers.to(x.dtype).expand(len(x), -1, -1), x), dim=1)
            valid = torch.cat((torch.ones_like(valid[..., :registers]), valid), dim=2)
        rotary, rows = self._rotary(side, places, registers), valid.flatten(0, 1)
        related = self._related(inputs.flatten(0, 1), registers) if self.config.relations else None
        blocks = self._blocks_packed if worth_packing(rows) else self._blocks
        return PairTokens(self.config.final_norm(blocks(x, rotary, rows, related)).unflatten(0, (batch, demos)), valid, places)

    def _related(self, inputs: Tensor, registers: int) -> Tensor:
        """The places (N, S, R) of each token of a pair: cells of its input (N, L), for both tokens of a cell alike."""
        related = moved(places_of(self.config.relations, inputs), registers)
        related = related.repeat(1, 1 if self.config.pair_tokens == "summed" else 2, 1)
        return F.pad(related, (0, 0, registers, 0), value=NONE)

    def _blocks(self, x: Tensor, rotary: Rotary | None, valid: Tensor, related: Tensor | None) -> Tensor:
        keys, index = keys_mask(valid), None if related is None else Index.of(related, self.config.relations)
        for layer in self.layers:
            x = layer(x, rotary, keys, index)
        return x

    def _blocks_packed(self, x: Tensor, rotary: Rotary | None, valid: Tensor, related: Tensor | None) -> Tensor:
        """The same for valid tokens (zero elsewhere), which lie in one row without what is between them."""
        index = valid.flatten().nonzero().squeeze(1)
        lengths = Packed([length for length in valid.sum(1).tolist() if length])
        rotary = None if rotary is None else rotary.rows(index % x.shape[1])
        packed = x.flatten(0, 1)[index][None]
        if related is not None:
            related = Index.of(_packed_places(related, valid, index), self.config.relations)
        for layer in self.layers:
            packed = layer(packed, rotary, lengths, related)
        return torch.zeros_like(x).flatten(0, 1).index_copy(0, index, packed[0]).view_as(x)

    def _rotary(self, side: int, places: Tensor, registers: int) -> Rotary | None:
        if self.config.positions == "embedded":
            return None
        if self.config.positions == "rope":
            return rotary_line(len(places), self.head_dim, places.device).after_registers(registers)
        values = self.config.positions == "rope2d_values"
        return rotary_square(side, self.head_dim, places.device, values).rows(places).after_registers(registers)


def _packed_places(places: Tensor, valid: Tensor, kept: Tensor) -> Tensor:
    """Places (N, S, R) among the tokens `kept` (T,) of all sequences alone, (1, T, R). Where one is, its grid is, and a token."""
    count, length, _ = places.shape
    start = length * torch.arange(count, device=places.device)[:, None, None]
    later = moved(places, start).flatten(0, 1)[kept]
    rank = valid.flatten().cumsum(0) - 1
    return torch.where(later >= 0, rank[later.clamp_min(0)], NONE)[None]


class MeanPool(nn.Module):
    """Mean over valid members: (N, L, W), (N, L) -> (N, W)."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1).to(x.dtype)


class WeightedPool(nn.Module):
    """Mean under a learned softmax weight per member."""

    def __init__(self, width: int):
        super().__init__()
        self.score = Linear(width, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        score = self.score(x).squeeze(-1).float()
        weight = score.masked_fill(~mask, torch.finfo(score.dtype).min).softmax(-1) * mask
        return (x * weight.to(x.dtype)[:, :, None]).sum(1)


class AttentionPool(nn.Module):
    """One learned query attends to all valid members."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.query = nn.Parameter(truncated_normal(1, width, std=1.0))
        self.read = CrossAttention(width, num_heads)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.read(self.query.to(x.dtype).expand(len(x), 1, -1), x, mask).squeeze(1)


class ClsPool(nn.Module):
    """The first token: a register that attended to all others."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x[:, 0]


POOLING = Literal["mean", "attention", "weighted", "cls"]


class PairVectors(nn.Module):
    """One vector per pair, (B, K, W) at RMS 1: its tokens pooled as `pooling_method` says. Empty slots hold anything finite."""

    def __init__(self, config: PairConfig, pooling_method: POOLING, arch: "ArchConfig", width: int, num_heads: int):
        super().__init__()
        self.pairs = PairEncoder(config, arch, width, num_heads, registers=int(pooling_method == "cls"))
        pools = {
            "mean": MeanPool,
            "cls": ClsPool,
            "weighted": lambda: WeightedPool(width),
            "attention": lambda: AttentionPool(width, num_heads),
        }
        self.pool = pools[pooling_method]()

    def forward(self, data: dict[str, Tensor]) -> Tensor:
        read = self.pairs(data)
        pooled = self.pool(read.tokens.flatten(0, 1), read.valid.flatten(0, 1))
        return rms_norm(pooled).view(*read.tokens.shape[:2], -1)
