"""The `memory` encoder: every demonstration cell stays a token that the recursion can look up. Nothing is pooled.

Shapes: B batch, K demonstrations, N tokens of a pair, M = K * N, D hidden.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from models.arch import ArchConfig
from models.context import Context, ContextModule
from models.encoders.pairs import PairConfig, PairEncoder
from models.layers import truncated_normal


class MemoryEncoderConfig(PairConfig):
    """placement: `memory` gives the tokens as extra keys and values, computed once per ACT step; `prefix` makes them part
    of the recursive state.
    """

    name: Literal["memory"]
    placement: Literal["memory", "prefix"]

    needs_layers: ClassVar[bool] = False

    @property
    def gives_memory(self) -> bool:
        return self.placement == "memory"

    @property
    def prefix_grows(self) -> bool:
        return self.placement == "prefix"


class MemoryEncoder(ContextModule):
    """One register token as prefix (position 0 feeds the q_head) and all demonstration cells as memory or as prefix."""

    def __init__(self, config: MemoryEncoderConfig, arch: ArchConfig):
        super().__init__()
        self.config = config
        self.pairs = PairEncoder(config, arch, arch.hidden_size, arch.num_heads)
        self.register = nn.Parameter(truncated_normal(1, arch.hidden_size, std=1.0))

    def prefix_length(self, demos: int, cells: int) -> int:
        tokens = demos * cells * (1 if self.config.pair_tokens == "summed" else 2)
        return 1 + (tokens if self.config.placement == "prefix" else 0)

    def forward(self, data: dict[str, Tensor], state: dict[str, Tensor] | None = None) -> Context:
        read = self.pairs(data)
        tokens, valid, cells = (
            read.tokens.flatten(1, 2),
            read.valid.flatten(1),
            read.cells.repeat(read.tokens.shape[1]),
        )
        register = self.register.to(tokens.dtype).expand(len(tokens), 1, -1)
        if self.config.placement == "memory":
            return Context(
                prefix=self.as_prefix(register), memory=tokens, memory_mask=valid, memory_cells=cells
            )
        always = torch.ones_like(valid[:, :1])
        return Context(
            prefix=self.as_prefix(torch.cat((register, tokens), 1)),
            prefix_mask=torch.cat((always, valid), 1),
            prefix_cells=cells,
        )
