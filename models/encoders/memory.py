"""The `memory` encoder: every demonstration cell stays a token that the recursion can look up.

A token is the sum of the input colour's and the output colour's embedding at one cell of the common canvas, so that
"what becomes of this cell" is in one place. A small transformer runs over each demonstration; nothing is pooled.
Shapes: B batch, K demonstrations, L cells, M = K * L, D hidden.
"""

import math
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import NonNegativeInt
from torch import Tensor, nn

from dataset.canvas import PAD, VOCAB_SIZE
from models.context import Context, ContextModule, EncoderConfig
from models.layers import AttentionBlock, Embedding, keys_mask, rotary_square, truncated_normal

if TYPE_CHECKING:
    from models.trm import ArchConfig


class MemoryEncoderConfig(EncoderConfig):
    """num_layers: transformer blocks over each demonstration.

    placement: `memory` gives the tokens as extra keys and values, computed once per ACT step; `prefix` makes them part
    of the recursive state.
    """

    name: Literal["memory"]
    num_layers: NonNegativeInt
    placement: Literal["memory", "prefix"]

    @property
    def gives_memory(self) -> bool:
        return self.placement == "memory"

    @property
    def prefix_grows(self) -> bool:
        return self.placement == "prefix"


class MemoryEncoder(ContextModule):
    """One register token as prefix (position 0 feeds the q_head) and all demonstration cells as memory or as prefix."""

    def __init__(self, config: MemoryEncoderConfig, arch: "ArchConfig"):
        super().__init__()
        self.config, self.arch = config, arch
        self.embed_input = Embedding(VOCAB_SIZE, arch.hidden_size, arch.dtype)
        self.embed_output = Embedding(VOCAB_SIZE, arch.hidden_size, arch.dtype)
        self.layers = nn.ModuleList(AttentionBlock(arch.hidden_size, arch.num_heads, arch.expansion) for _ in range(config.num_layers))
        self.register = nn.Parameter(truncated_normal(1, arch.hidden_size, std=1.0))

    def prefix_length(self, demos: int, cells: int) -> int:
        return 1 + (demos * cells if self.config.placement == "prefix" else 0)

    def forward(self, data: dict[str, Tensor]) -> Context:
        demo_inputs, demo_labels, demo_mask = data["demo_inputs"], data["demo_labels"], data["demo_mask"]
        batch, demos, cells = demo_inputs.shape
        real = ((demo_inputs != PAD) | (demo_labels != PAD)) & demo_mask[:, :, None]  # (B, K, L)
        x = (self.embed_input(demo_inputs) + self.embed_output(demo_labels)).flatten(0, 1)  # (B * K, L, D)
        x = math.sqrt(x.shape[-1] / 2) * x  # RMS 1
        rotary = rotary_square(round(cells**0.5), self.arch.hidden_size // self.arch.num_heads, x.device)
        mask = keys_mask(real.flatten(0, 1))
        for layer in self.layers:
            x = layer(x, rotary, mask)
        tokens, valid = x.view(batch, demos * cells, -1), real.flatten(1)
        register = self.register.to(x.dtype).expand(batch, 1, -1)
        places = torch.arange(cells, device=x.device).repeat(demos)
        if self.config.placement == "memory":
            return Context(prefix=self.as_prefix(register), memory=tokens, memory_mask=valid, memory_cells=places)
        always = torch.ones(batch, 1, dtype=torch.bool, device=x.device)
        return Context(
            prefix=self.as_prefix(torch.cat((register, tokens), 1)), prefix_mask=torch.cat((always, valid), 1), prefix_cells=places
        )
