"""The `standard` encoder of the seed ETRM: one pooled vector per demonstration, read by learned query tokens.

Kept to compare against: its bottleneck is the pooling. Unlike the seed's it never attends to padding, places cells in
two dimensions, and hands on a context of the token embeddings' scale.
Shapes: B batch, K demonstrations, L cells, P query tokens, D hidden.
"""

import math
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from dataset.canvas import PAD, VOCAB_SIZE
from models.context import Context, ContextModule, EncoderConfig
from models.layers import (
    AttentionBlock,
    CrossAttention,
    Embedding,
    Linear,
    Rotary,
    SwiGLU,
    keys_mask,
    rms_norm,
    rotary_square,
    truncated_normal,
)

if TYPE_CHECKING:
    from models.trm import ArchConfig


class StandardEncoderConfig(EncoderConfig):
    """num_layers: blocks over each pair. set_layers: cross-attention blocks over the demonstrations.

    pooling_method: how a pair's cells become one vector. output_tokens: P, learnable queries, the context's length.
    """

    name: Literal["standard"]
    num_layers: PositiveInt
    set_layers: PositiveInt
    pooling_method: Literal["mean", "attention", "weighted"]
    output_tokens: PositiveInt


class MeanPool(nn.Module):
    """Mean over valid members: (N, L, D), (N, L) -> (N, D)."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1).to(x.dtype)


class WeightedPool(nn.Module):
    """Mean under a learned softmax weight per member."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.score = Linear(hidden_size, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        score = self.score(x).squeeze(-1).float()
        weight = score.masked_fill(~mask, torch.finfo(score.dtype).min).softmax(-1) * mask
        return (x * weight.to(x.dtype)[:, :, None]).sum(1)


class AttentionPool(nn.Module):
    """One learned query attends to all valid members."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.query = nn.Parameter(truncated_normal(1, hidden_size, std=1.0))
        self.read = CrossAttention(hidden_size, num_heads)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.read(self.query.to(x.dtype).expand(len(x), 1, -1), x, mask).squeeze(1)


class SetBlock(nn.Module):
    """Query tokens read the set of demonstrations: post-norm cross-attention and feed-forward."""

    def __init__(self, hidden_size: int, num_heads: int, expansion: float):
        super().__init__()
        self.read = CrossAttention(hidden_size, num_heads)
        self.mlp = SwiGLU(hidden_size, expansion)

    def forward(self, tokens: Tensor, members: Tensor, mask: Tensor) -> Tensor:
        tokens = rms_norm(tokens + self.read(tokens, members, mask))
        return rms_norm(tokens + self.mlp(tokens))


class StandardEncoder(ContextModule):
    """P prefix tokens, invariant to the order of the demonstrations and to empty slots."""

    def __init__(self, config: StandardEncoderConfig, arch: "ArchConfig"):
        super().__init__()
        self.config, self.arch = config, arch
        hidden, heads = arch.hidden_size, arch.num_heads
        self.embed_input = Embedding(VOCAB_SIZE, hidden, arch.dtype)
        self.embed_output = Embedding(VOCAB_SIZE, hidden, arch.dtype)
        self.layers = nn.ModuleList(AttentionBlock(hidden, heads, arch.expansion) for _ in range(config.num_layers))
        pools = {"mean": lambda: MeanPool(), "weighted": lambda: WeightedPool(hidden), "attention": lambda: AttentionPool(hidden, heads)}
        self.pool = pools[config.pooling_method]()
        self.proj = Linear(hidden, hidden)
        self.query_tokens = nn.Parameter(truncated_normal(config.output_tokens, hidden, std=1.0))
        self.set_layers = nn.ModuleList(SetBlock(hidden, heads, arch.expansion) for _ in range(config.set_layers))

    def prefix_length(self, demos: int, cells: int) -> int:
        return self.config.output_tokens

    def forward(self, data: dict[str, Tensor]) -> Context:
        demo_inputs, demo_labels, demo_mask = data["demo_inputs"], data["demo_labels"], data["demo_mask"]
        batch, demos, cells = demo_inputs.shape
        pairs = torch.cat((demo_inputs, demo_labels), dim=-1).flatten(0, 1)  # (B * K, 2 L)
        real = (pairs != PAD) & demo_mask.flatten()[:, None]
        x = torch.cat((self.embed_input(demo_inputs), self.embed_output(demo_labels)), dim=2).flatten(0, 1)  # (B * K, 2 L, D)
        x = math.sqrt(x.shape[-1]) * x  # RMS 1
        square = rotary_square(round(cells**0.5), self.arch.hidden_size // self.arch.num_heads, x.device)
        rotary = Rotary(square.cos.repeat(2, 1), square.sin.repeat(2, 1))
        mask = keys_mask(real)
        for layer in self.layers:
            x = layer(x, rotary, mask)
        members = rms_norm(self.proj(self.pool(x, real))).view(batch, demos, -1)
        tokens = self.query_tokens.to(x.dtype).expand(batch, -1, -1)
        for layer in self.set_layers:
            tokens = layer(tokens, members, demo_mask)
        return Context(prefix=self.as_prefix(tokens))
