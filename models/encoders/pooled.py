"""Pooled encoders: one vector per demonstration, gathered into P prefix tokens, through a bottleneck or not.

    pair encoder (pairs.py)  x  aggregator  x  bottleneck  ->  output tokens

Every combination is a row of YAML values; the seed ETRM's eight encoders of this kind, and the paper's LPN, are in
config/encoder. Compared with `memory` the bottleneck is the pooling.
Shapes: B batch, K demonstrations, A aggregated vectors, P output tokens, Z latent, W width, D hidden of the core.
LPN: "Searching Latent Program Spaces" (arXiv 2411.08706), whose tokens for the grids' shapes our EOS cells stand for.
"""

import math
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from models.arch import ArchConfig
from models.context import Context, ContextModule, Noise
from models.encoders.blocks import ReadBlock
from models.encoders.pairs import POOLING, MeanPool, PairConfig, PairVectors
from models.layers import Linear, rms_norm, truncated_normal

MAX_LOG_VARIANCE = 10.0


class PooledEncoderConfig(PairConfig):
    """hidden_size, num_heads: the encoder's own width, or null for the core's.

    pooling_method: how a pair's tokens become one vector. aggregator: the `mean` over demonstrations, from which a linear
    map makes all output tokens, or `queries`, one learned token per output token that reads them in `set_layers` blocks.
    bottleneck: `latent_dim` numbers per demonstration before aggregating, or per aggregated vector after it. variational:
    the latent is drawn from a normal, whose deviation starts at `initial_sigma`; in evaluation it is the mean.
    """

    hidden_size: PositiveInt | None
    num_heads: PositiveInt | None
    pooling_method: POOLING
    aggregator: Literal["mean", "queries"]
    set_layers: NonNegativeInt
    output_tokens: PositiveInt
    bottleneck: Literal["none", "demonstration", "aggregate"]
    latent_dim: PositiveInt | None
    variational: bool
    initial_sigma: PositiveFloat | None

    @model_validator(mode="after")
    def _check(self) -> "PooledEncoderConfig":
        if (self.hidden_size is None) != (self.num_heads is None):
            raise ValueError(
                "encoder.hidden_size and encoder.num_heads belong together: give both, or null for the core's"
            )
        if self.hidden_size and self.num_heads and self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"encoder.hidden_size={self.hidden_size} must be divisible by 4 * encoder.num_heads={self.num_heads}, so that "
                "each head can place cells in two dimensions"
            )
        if (self.aggregator == "queries") != (self.set_layers > 0):
            raise ValueError(
                f"encoder.set_layers={self.set_layers} does not fit encoder.aggregator={self.aggregator}: only queries has any"
            )
        if self.variational and self.bottleneck == "none":
            raise ValueError(
                "encoder.variational=true needs a latent; set encoder.bottleneck to demonstration or aggregate"
            )
        return self

    @property
    def readers(self) -> dict[str, tuple[str, bool]]:
        return {
            "latent_dim": ("an encoder.bottleneck", self.bottleneck != "none"),
            "initial_sigma": ("encoder.variational", self.variational),
        }

    def heads(self, arch: ArchConfig) -> int:
        return self.num_heads or arch.num_heads

    @property
    def gives_kl(self) -> bool:
        return self.variational


class MeanAggregator(nn.Module):
    """(B, K, W) -> (B, 1, W), the mean over valid demonstrations."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = MeanPool()

    def forward(self, members: Tensor, mask: Tensor) -> Tensor:
        return self.pool(members, mask)[:, None]


class QueryAggregator(nn.Module):
    """(B, K, W) -> (B, P, W): learned query tokens read the set of demonstrations."""

    def __init__(self, config: PooledEncoderConfig, width: int, num_heads: int, expansion: float):
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(truncated_normal(config.output_tokens, width, std=1.0))
        self.layers = nn.ModuleList(
            ReadBlock(width, num_heads, expansion, config) for _ in range(config.set_layers)
        )

    def forward(self, members: Tensor, mask: Tensor) -> Tensor:
        x = self.queries.to(members.dtype).expand(len(members), -1, -1)
        for layer in self.layers:
            x = layer(x, members, mask)
        return self.config.final_norm(x)


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) in nats, summed over the last dimension."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)


class Bottleneck(nn.Module):
    """(..., W) -> latent (..., Z), or decoded to the width again for a reader that needs it.

    Means and variances are float32 in any forward dtype.
    """

    def __init__(self, config: PooledEncoderConfig, width: int, decoded: bool):
        super().__init__()
        self.mean = Linear(width, config.latent_dim)
        self.log_variance = Linear(width, config.latent_dim, bias=True) if config.variational else None
        if self.log_variance is not None:
            nn.init.zeros_(self.log_variance.weight)
            nn.init.constant_(self.log_variance.bias, 2 * math.log(config.initial_sigma))
        self.decode = Linear(config.latent_dim, width) if decoded else nn.Identity()

    def forward(self, x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Also the KL (...) of each latent, None if it is not variational. Without `noise` the latent is the mean."""
        latent, kl = self.mean(x.float()), None
        if self.log_variance is not None:
            log_variance = self.log_variance(x.float()).clamp(-MAX_LOG_VARIANCE, MAX_LOG_VARIANCE)
            kl = gaussian_kl(latent, log_variance)
            if noise is not None:
                latent = latent + noise * (0.5 * log_variance).exp()
        return self.decode(latent.to(x.dtype)), kl


class PooledEncoder(ContextModule):
    """P prefix tokens, invariant to the order of the demonstrations and to empty slots.

    A variational latent's noise is drawn once per sample and held in the carry, so that a sample sees the same context at
    all its ACT steps. `Context.losses["kl"]` is the KL of a sample's latent in nats, summed over its dimensions (and over the
    aggregated vectors), and averaged over the demonstrations where each has its own.
    """

    def __init__(self, config: PooledEncoderConfig, arch: ArchConfig):
        super().__init__()
        self.config = config
        width, heads = config.hidden_size or arch.hidden_size, config.heads(arch)
        self.vectors = PairVectors(config, config.pooling_method, arch, width, heads)
        queries = config.aggregator == "queries"
        self.aggregate = (
            QueryAggregator(config, width, heads, arch.expansion) if queries else MeanAggregator()
        )
        self.aggregated = config.output_tokens if queries else 1
        self.bottleneck = None
        if config.bottleneck != "none":
            decoded = (
                queries and config.bottleneck == "demonstration"
            )  # only cross-attention asks for the width again
            self.bottleneck = Bottleneck(config, width, decoded)
            width = width if decoded else config.latent_dim
        self.output = Linear(width, config.output_tokens // self.aggregated * arch.hidden_size)

    def prefix_length(self, demos: int, cells: int) -> int:
        return self.config.output_tokens

    def initial_state(self, data: dict[str, Tensor], noise: Noise | None = None) -> dict[str, Tensor]:
        if noise is None or not self.config.variational:
            return {}
        latents = data["demo_mask"].shape[1] if self.config.bottleneck == "demonstration" else self.aggregated
        return {"noise": noise(latents, self.config.latent_dim)}

    def forward(self, data: dict[str, Tensor], state: dict[str, Tensor] | None = None) -> Context:
        mask, losses, noise = data["demo_mask"], {}, None
        if self.training and self.config.variational:
            assert state and "noise" in state, (
                "a variational encoder in training needs the noise that `initial_state` draws"
            )
            noise = state["noise"]
        x = self.vectors(data)  # (B, K, W)
        if self.config.bottleneck == "demonstration":
            x, kl = self.bottleneck(x, noise)
            if kl is not None:
                losses["kl"] = (kl * mask).sum(1) / mask.sum(1).clamp_min(1)
        x = self.aggregate(x, mask)  # (B, A, W)
        if self.config.bottleneck == "aggregate":
            x, kl = self.bottleneck(x, noise)
            if kl is not None:
                losses["kl"] = kl.sum(1)
        tokens = self.output(x).view(len(x), self.config.output_tokens, -1)  # (B, P, D)
        return Context(prefix=self.as_prefix(rms_norm(tokens)), losses=losses)
