"""Blocks of the demonstration encoders, and the options that all of them share.

Shapes: N sequences, S tokens, Q query tokens, M set members, W width.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from models.context import EncoderConfig
from models.layers import Attention, CrossAttention, Packed, Rotary, SiluMLP, SwiGLU, layer_norm, rms_norm
from models.relations import Index, relate

NORMS = {"rms": rms_norm, "layer": layer_norm}
MLPS = {"swiglu": SwiGLU, "silu": SiluMLP}


class BlockConfig(EncoderConfig):
    """norm: without learned weights, whichever. norm_style: before each branch, or after each sum.

    qk_norm: normalise queries and keys. layer_scale: initial value of a learned factor per channel on every branch, or null.
    """

    norm: Literal["rms", "layer"]
    norm_style: Literal["post", "pre"]
    mlp: Literal["swiglu", "silu"]
    qk_norm: bool
    layer_scale: PositiveFloat | None

    def final_norm(self, x: Tensor) -> Tensor:
        """What has to follow the last block: pre-norm blocks leave their sum as it is."""
        return NORMS[self.norm](x) if self.norm_style == "pre" else x


class Residual(nn.Module):
    """x plus a branch of x, normalised before the branch or after the sum. relate: what is read through an `Index` joins it."""

    def __init__(self, branch: nn.Module, width: int, config: BlockConfig, relate: nn.Module | None = None):
        super().__init__()
        self.relate = relate
        self.branch, self.norm, self.pre = branch, NORMS[config.norm], config.norm_style == "pre"
        self.scale = None if config.layer_scale is None else nn.Parameter(torch.full((width,), config.layer_scale))

    def forward(self, x: Tensor, *arguments: Tensor | Rotary | Packed | None, index: Index | None = None) -> Tensor:
        z = self.norm(x) if self.pre else x
        y = self.branch(z, *arguments)
        if self.relate is not None:
            y = y + self.relate(z, index)
        if self.scale is not None:
            y = y * self.scale.to(y.dtype)
        return x + y if self.pre else self.norm(x + y)


class SelfBlock(nn.Module):
    """Tokens (N, S, W) attend to each other where `mask` allows, and read their places if they have any; then a feed-forward."""

    def __init__(self, width: int, num_heads: int, expansion: float, config: BlockConfig, relations: Sequence[str] = ()):
        super().__init__()
        self.attention = Residual(Attention(width, num_heads, config.qk_norm), width, config, relate(width, relations))
        self.mlp = Residual(MLPS[config.mlp](width, expansion), width, config)

    def forward(
        self, x: Tensor, rotary: Rotary | None = None, mask: Tensor | Packed | None = None, index: Index | None = None
    ) -> Tensor:
        return self.mlp(self.attention(x, rotary, mask, index=index))


class ReadBlock(nn.Module):
    """Tokens (N, Q, W) read the valid ones of a set of members (N, M, W), then a feed-forward."""

    def __init__(self, width: int, num_heads: int, expansion: float, config: BlockConfig):
        super().__init__()
        self.read = Residual(CrossAttention(width, num_heads, config.qk_norm), width, config)
        self.mlp = Residual(MLPS[config.mlp](width, expansion), width, config)

    def forward(self, x: Tensor, members: Tensor, valid: Tensor) -> Tensor:
        return self.mlp(self.read(x, members, valid))
