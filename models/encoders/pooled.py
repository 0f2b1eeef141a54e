"""Pooled encoders: one vector per demonstration, gathered into P prefix tokens, through a bottleneck or not.

    pair encoder (pairs.py)  x  aggregator  x  bottleneck  ->  output tokens

Every combination is a file of values in config/encoder. There are the ancestor's eight encoders of this kind,
and the paper's LPN. What `memory` does without is the pooling of a pair.
Shapes: B batch, K demonstrations, A aggregated vectors, P output tokens, Z latent, W width, D of the core.
Source of LPN: "Searching Latent Program Spaces" (arXiv 2411.08706). Its tokens for the shapes of grids are
our EOS cells.
"""

import math
from typing import Literal

from einops import rearrange, repeat
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from dataset.batch import BatchData
from models.arch import ArchConfig
from models.context import Context, ContextModule
from models.encoders.blocks import ReadBlock
from models.encoders.pairs import POOLING, MeanPool, PairConfig, PairVectors
from models.layers import Linear, rms_norm, truncated_normal
from models.noise import Noise

MAX_LOG_VARIANCE = 10.0  # a variance and its inverse stay far from overflow


class PooledEncoderConfig(PairConfig):
    """How a pair becomes a vector, and the vectors become tokens.

    hidden_size, num_heads: the encoder's own width; null: the core's.
    pooling_method: how a pair's tokens become one vector.
    aggregator: `mean` over demonstrations, from which a linear map makes all output tokens; or `queries`, one
        learned token per output token, which read the demonstrations.
    set_layers: blocks in which the queries read.
    bottleneck: `latent_dim` numbers per demonstration before aggregating, or per aggregated vector after it.
    variational: the latent is drawn from a normal; in evaluation it is the mean.
    initial_sigma: the deviation at which that normal starts.
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
                f"encoder.hidden_size={self.hidden_size} must be divisible by "
                f"4 * encoder.num_heads={self.num_heads}, so that each head can place cells in two dimensions"
            )
        if (self.aggregator == "queries") != (self.set_layers > 0):
            raise ValueError(
                f"encoder.set_layers={self.set_layers} does not fit encoder.aggregator={self.aggregator}: "
                "only queries has any"
            )
        if self.variational and self.bottleneck == "none":
            raise ValueError(
                "encoder.variational=true needs a latent; "
                "set encoder.bottleneck to demonstration or aggregate"
            )
        return self

    @property
    def readers(self) -> dict[str, tuple[str, bool]]:
        return {
            "latent_dim": ("an encoder.bottleneck", self.bottleneck != "none"),
            "initial_sigma": ("encoder.variational", self.variational),
        }

    @property
    def latent_size(self) -> int:
        """Numbers of a latent. There is one only with a bottleneck."""
        assert self.latent_dim is not None, "the configuration asks for it with encoder.bottleneck"
        return self.latent_dim

    def heads(self, arch: ArchConfig) -> int:
        return self.num_heads or arch.num_heads

    @property
    def gives_kl(self) -> bool:
        return self.variational


class MeanAggregator(nn.Module):
    """The mean over valid demonstrations: (B, K, W) -> (B, 1, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = MeanPool()

    def forward(self, members: Tensor, mask: Tensor) -> Tensor:
        return self.pool(members, mask)[:, None]


class QueryAggregator(nn.Module):
    """Learned query tokens read the set of demonstrations: (B, K, W) -> (B, P, W)."""

    def __init__(self, config: PooledEncoderConfig, width: int, num_heads: int, expansion: float):
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(truncated_normal(config.output_tokens, width, std=1.0))
        self.layers = nn.ModuleList(
            ReadBlock(width, num_heads, expansion, config) for _ in range(config.set_layers)
        )

    def forward(self, members: Tensor, mask: Tensor) -> Tensor:
        x = repeat(self.queries.to(members.dtype), "p w -> b p w", b=len(members))
        for layer in self.layers:
            x = layer(x, members, mask)
        return self.config.final_norm(x)


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) in nats, summed over the last dimension."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)


class Bottleneck(nn.Module):
    """A vector (..., W) to its latent (..., Z), or through the latent back to the width if `decoded`.

    Means and variances are float32 in any forward dtype.
    """

    def __init__(self, config: PooledEncoderConfig, width: int, decoded: bool):
        super().__init__()
        latent = config.latent_size
        self.mean = Linear(width, latent)
        self.log_variance = Linear(width, latent, bias=True) if config.variational else None
        if self.log_variance is not None:
            assert config.initial_sigma is not None, "the configuration asks for it with encoder.variational"
            # At first every latent has the same deviation, whatever it is of.
            self.log_variance.start_at(2 * math.log(config.initial_sigma))
        self.decode = Linear(latent, width) if decoded else nn.Identity()

    def forward(self, x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The latent, and its KL (...) if it is variational. Without `noise` the latent is the mean."""
        latent, kl = self.mean(x.float()), None
        if self.log_variance is not None:
            log_variance = self.log_variance(x.float()).clamp(-MAX_LOG_VARIANCE, MAX_LOG_VARIANCE)
            kl = gaussian_kl(latent, log_variance)
            if noise is not None:
                latent = latent + noise * (0.5 * log_variance).exp()
        return self.decode(latent.to(x.dtype)), kl


class PooledEncoder(ContextModule):
    """P prefix tokens, invariant to the order of the demonstrations and to empty slots.

    The noise of a variational latent is drawn once per sample and held in the carry. A sample sees the same
    context at all its ACT steps.
    `Context.losses["kl"]` is the KL of a sample's latent in nats, summed over its dimensions. It is summed
    over the aggregated vectors, and averaged over the demonstrations where each has its own.
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
        self.bottleneck: Bottleneck | None = None
        if config.bottleneck != "none":
            # Only cross-attention asks for the width again.
            decoded = queries and config.bottleneck == "demonstration"
            self.bottleneck = Bottleneck(config, width, decoded)
            width = width if decoded else config.latent_size
        self.output = Linear(width, config.output_tokens // self.aggregated * arch.hidden_size)

    def prefix_length(self, demos: int, cells: int) -> int:
        return self.config.output_tokens

    def initial_state(self, data: BatchData, noise: Noise | None = None) -> dict[str, Tensor]:
        if noise is None or not self.config.variational:
            return {}
        latents = data["demo_mask"].shape[1] if self.config.bottleneck == "demonstration" else self.aggregated
        return {"noise": noise.normal(latents, self.config.latent_size)}

    def forward(self, data: BatchData, state: dict[str, Tensor] | None = None) -> Context:
        mask, losses, noise = data["demo_mask"], {}, None
        if self.training and self.config.variational:
            assert state and "noise" in state, (
                "a variational encoder in training needs the noise that `initial_state` draws"
            )
            noise = state["noise"]
        x = self.vectors(data)  # (B, K, W)
        if self.bottleneck is not None and self.config.bottleneck == "demonstration":
            x, kl = self.bottleneck(x, noise)
            if kl is not None:
                losses["kl"] = (kl * mask).sum(1) / mask.sum(1).clamp_min(1)
        x = self.aggregate(x, mask)  # (B, A, W)
        if self.bottleneck is not None and self.config.bottleneck == "aggregate":
            x, kl = self.bottleneck(x, noise)
            if kl is not None:
                losses["kl"] = kl.sum(1)
        # Every aggregated vector makes as many of the output tokens.
        each = self.config.output_tokens // self.aggregated
        tokens = rearrange(self.output(x), "b a (t d) -> b (a t) d", t=each)
        return Context(prefix=self.as_prefix(rms_norm(tokens)), losses=losses)
