"""The `perceiver` encoder: a fixed number of latents read the cells of all demonstrations, then each other.

Between `memory` and the pooled encoders: cells are looked up, and the context's length does not depend on their number.
Shapes: B batch, K demonstrations, N tokens of a pair, P latents, D hidden.
Source: "Perceiver: General Perception with Iterative Attention" (arXiv 2103.03206).
"""

from typing import Literal

from pydantic import PositiveInt
from torch import Tensor, nn

from models.arch import ArchConfig
from models.context import Context, ContextModule
from models.encoders.blocks import ReadBlock, SelfBlock
from models.encoders.pairs import PairConfig, PairEncoder
from models.layers import rms_norm, truncated_normal


class PerceiverEncoderConfig(PairConfig):
    """output_tokens: P, the latents. latent_layers: rounds of one cross-attention and one self-attention block."""

    name: Literal["perceiver"]
    output_tokens: PositiveInt
    latent_layers: PositiveInt


class PerceiverEncoder(ContextModule):
    """P prefix tokens, invariant to the order of the demonstrations and to empty slots."""

    def __init__(self, config: PerceiverEncoderConfig, arch: ArchConfig):
        super().__init__()
        self.config = config
        size = (arch.hidden_size, arch.num_heads)
        self.pairs = PairEncoder(config, arch, *size)
        self.latents = nn.Parameter(truncated_normal(config.output_tokens, arch.hidden_size, std=1.0))
        self.reads = nn.ModuleList(
            ReadBlock(*size, arch.expansion, config) for _ in range(config.latent_layers)
        )
        self.mixes = nn.ModuleList(
            SelfBlock(*size, arch.expansion, config) for _ in range(config.latent_layers)
        )

    def prefix_length(self, demos: int, cells: int) -> int:
        return self.config.output_tokens

    def forward(self, data: dict[str, Tensor], state: dict[str, Tensor] | None = None) -> Context:
        read = self.pairs(data)
        members, valid = read.tokens.flatten(1, 2), read.valid.flatten(1)  # (B, K * N, D)
        x = self.latents.to(members.dtype).expand(len(members), -1, -1)
        for look, mix in zip(self.reads, self.mixes, strict=True):
            x = mix(look(x, members, valid))
        return Context(prefix=self.as_prefix(rms_norm(x)))
