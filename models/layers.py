"""Shared layers: casted linear maps, RMS norm, attention with an optional memory, SwiGLU, blocks.

Parameters are float32, so that small updates and the EMA never round away, and cast at use.
Shapes: B batch, S state tokens, M memory tokens, L cells, D hidden, H heads, E = D / H, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.fused import Fused
from models.positions import Rotary
from models.relations import Index, count_of

NORM_EPS = 1e-5
# With fewer keys, the backward pass of bfloat16 attention on CPUs is up to six times slower than of float32.
SLOW_BACKWARD_KEYS = 640
# Tokens are packed from this length on, and up to this share of valid ones.
PACKED_LENGTH, PACKED_SHARE = 100, 0.8
CHANNELS = 8  # that a token tells under a relation
_TRUNCATED_STD = 0.8796256610342398  # of a standard normal cut at +-2


def truncated_normal(*shape: int, std: float) -> Tensor:
    """A float32 tensor from a normal truncated at two deviations, rescaled to have the deviation `std`."""
    if std == 0:
        return torch.zeros(shape)
    scale = std / _TRUNCATED_STD
    return nn.init.trunc_normal_(torch.empty(shape), std=scale, a=-2 * scale, b=2 * scale)


class Linear(nn.Module):
    """Linear map with LeCun-normal float32 weights, cast at use. (..., in) -> (..., out)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(truncated_normal(out_features, in_features, std=in_features**-0.5))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.cast: Tensor | None = None

    def start_at(self, value: float | Tensor) -> None:
        """Let the map begin as the constant `value`, one number or one per output, which takes a bias."""
        assert self.bias is not None, "a map without a bias is no constant"
        with torch.no_grad():
            self.weight.zero_()
            self.bias.copy_(torch.as_tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) if self.cast is None else self.cast
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


@contextmanager
def weights_cast_once(modules: list[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Inside the context the linear maps of `modules` are cast to `dtype` already, and know no gradient.

    The recursion without gradient applies them many times; one cast serves all of them.
    """
    linears = [layer for module in modules for layer in module.modules() if isinstance(layer, Linear)]
    for linear in linears:
        linear.cast = linear.weight.detach().to(dtype)
    try:
        yield
    finally:
        for linear in linears:
            linear.cast = None


class Embedding(nn.Module):
    """Rows (N, D) of RMS 1 / sqrt(D); their reader multiplies by sqrt(D). (...) -> (..., D)."""

    def __init__(self, count: int, hidden_size: int, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.weight = nn.Parameter(truncated_normal(count, hidden_size, std=hidden_size**-0.5))

    def forward(self, index: Tensor) -> Tensor:
        # Tokens come as bytes, which no look-up takes.
        return F.embedding(index.int(), self.weight.to(self.dtype))


@Fused
def rms_norm(x: Tensor) -> Tensor:
    """Weightless RMS norm over the last dimension, computed in float32."""
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + NORM_EPS)).to(x.dtype)


def layer_norm(x: Tensor) -> Tensor:
    """Weightless layer norm over the last dimension, computed in float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=NORM_EPS).to(x.dtype)


@dataclass(frozen=True)
class KeyValue:
    """Keys and values (B, H, M, E) of one block's memory."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Packed:
    """Sequences of these lengths, one after the other in a single row. Each attends to itself alone."""

    lengths: list[int]


def worth_packing(valid: Tensor) -> bool:
    """Whether to leave invalid tokens (N, S) out of the computation.

    It pays on CPUs, where shapes may change from batch to batch, and where enough tokens are left out to
    outweigh attention that takes one sequence after the other. Under `vmap` and in a compiled graph shapes
    must be known.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(valid):
        return False
    return (
        valid.device.type == "cpu"
        and valid.shape[1] >= PACKED_LENGTH
        and 0 < float(valid.float().mean()) < PACKED_SHARE
    )


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | Packed | None) -> Tensor:
    """Scaled dot-product attention (B, H, S, E).

    mask: broadcasts to (B, H, S, keys), True where a key may be seen; None shows all.
    """
    # One call for each sequence: a mask over all of them would cost the square of their whole length.
    if isinstance(mask, Packed):
        sequences = zip(*(x.split(mask.lengths, dim=2) for x in (query, key, value)), strict=True)
        return torch.cat([attend(q, k, v, None) for q, k, v in sequences], dim=2)
    dtype = query.dtype
    if query.device.type == "cpu" and query.requires_grad and key.shape[2] < SLOW_BACKWARD_KEYS:
        query, key, value = query.float(), key.float(), value.float()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).to(dtype)


def split_heads(x: Tensor, num_heads: int, parts: int) -> tuple[Tensor, ...]:
    """(B, S, parts * D) -> `parts` tensors (B, H, S, E)."""
    return rearrange(x, "b s (part h e) -> part b h s e", part=parts, h=num_heads).unbind()


class Attention(nn.Module):
    """Multi-head self-attention. `memory` adds keys and values that are not part of the sequence.

    qk_norm: RMS norm of each head's queries and keys, which bounds the attention logits.
    """

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool = False):
        super().__init__()
        self.num_heads, self.qk_norm = num_heads, qk_norm
        self.qkv_proj = Linear(hidden_size, 3 * hidden_size)
        self.o_proj = Linear(hidden_size, hidden_size)

    def project_memory(self, memory: Tensor, rotary: Rotary | None) -> KeyValue:
        """Keys and values of memory tokens (B, M, D), with this layer's own projections."""
        hidden_size = memory.shape[-1]
        key, value = split_heads(
            F.linear(memory, self.qkv_proj.weight[hidden_size:].to(memory.dtype)), self.num_heads, 2
        )
        key = rms_norm(key) if self.qk_norm else key
        if rotary is not None:
            key, value = rotary(key), rotary.turn_values(value)
        return KeyValue(key, value)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        mask: Tensor | Packed | None = None,
        memory: KeyValue | None = None,
    ) -> Tensor:
        heads = rearrange(self.qkv_proj(x), "b s (h e) -> b h s e", h=3 * self.num_heads)
        # Queries and keys, (B, 2 H, S, E), stay together while they are treated alike.
        both, value = heads.split((2 * self.num_heads, self.num_heads), dim=1)
        if self.qk_norm:
            both = rms_norm(both)
        if rotary is not None:
            both, value = rotary(both), rotary.turn_values(value)
        query, key = both.chunk(2, dim=1)
        if memory is not None:
            key, value = torch.cat((key, memory.key), dim=2), torch.cat((value, memory.value), dim=2)
        read = attend(query, key, value, mask)
        if rotary is not None:
            read = rotary.turn_back(read)
        return self.o_proj(rearrange(read, "b h s e -> b s (h e)"))


class CrossAttention(nn.Module):
    """Queries (B, Q, D) read a set (B, N, D). Masked members never matter; an empty set contributes zero."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool = False):
        super().__init__()
        self.num_heads, self.qk_norm = num_heads, qk_norm
        self.q_proj = Linear(hidden_size, hidden_size)
        self.kv_proj = Linear(hidden_size, 2 * hidden_size)
        self.o_proj = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, members: Tensor, mask: Tensor) -> Tensor:
        (query,) = split_heads(self.q_proj(x), self.num_heads, 1)
        key, value = split_heads(self.kv_proj(members), self.num_heads, 2)
        if self.qk_norm:
            query, key = rms_norm(query), rms_norm(key)
        read = attend(query, key, value, keys_mask(mask))
        return self.o_proj(rearrange(read, "b h q e -> b q (h e)")) * mask.any(-1)[:, None, None]


def keys_mask(valid: Tensor) -> Tensor:
    """Attention mask (B, 1, 1, N) of valid keys (B, N).

    A row without any valid key sees all of them: what it reads is finite, and to be discarded.
    """
    return rearrange(valid | ~valid.any(-1, keepdim=True), "b n -> b 1 1 n")


def swiglu_width(hidden_size: int, expansion: float) -> int:
    """Inner width: two thirds of expansion * hidden_size, rounded up to a multiple of 256."""
    return -(round(expansion * hidden_size * 2 / 3) // -256) * 256


class SwiGLU(nn.Module):
    """Gated feed-forward. (..., D) -> (..., D)."""

    def __init__(self, hidden_size: int, expansion: float):
        super().__init__()
        width = swiglu_width(hidden_size, expansion)
        self.gate_up_proj = Linear(hidden_size, 2 * width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_gated(self.gate_up_proj(x)))


@Fused
def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class SiluMLP(nn.Module):
    """Feed-forward without a gate. (..., D) -> (..., D)."""

    def __init__(self, hidden_size: int, expansion: float):
        super().__init__()
        width = round(expansion * hidden_size)
        self.up_proj = Linear(hidden_size, width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.up_proj(x)))


class Relate(nn.Module):
    """What each token is told of its places (models/relations.py): (N, S, D) -> (N, S, D).

    Every relation has a projection to a few channels. They are gathered from each of its places and projected
    back. A token without any place is told nothing: zero.
    """

    def __init__(self, hidden_size: int, names: Sequence[str]):
        super().__init__()
        self.relations = len(names)
        self.down_proj = Linear(hidden_size, CHANNELS * len(names))
        self.up_proj = Linear(CHANNELS * count_of(names), hidden_size)

    def forward(self, x: Tensor, index: Index) -> Tensor:
        told = rearrange(self.down_proj(x), "n s (relation c) -> (n s) relation c", relation=self.relations)
        means = [group.mean(told[:, group.relation]) for group in index.groups]
        told = rearrange(told, "tokens relation c -> (tokens relation) c")
        told = torch.cat([F.pad(told, (0, 0, 0, 1)), *means])  # the zeros are what no place tells
        read = told.index_select(0, index.rows)
        return self.up_proj(rearrange(read, "(n s place) c -> n s (place c)", n=x.shape[0], s=x.shape[1]))


def relate(hidden_size: int, names: Sequence[str]) -> Relate | None:
    """The branch of a block for these relations. Without any there is none, nor a weight of it."""
    return Relate(hidden_size, names) if names else None


# What becomes of what a branch adds: `Draws.dropped` in training with dropout.
Drop = Callable[[Tensor], Tensor]


def kept(branch: Tensor) -> Tensor:
    """A `Drop` that drops nothing."""
    return branch


class AttentionBlock(nn.Module):
    """Post-norm transformer block. relate: a branch beside attention, which reads through an `Index`."""

    def __init__(self, hidden_size: int, num_heads: int, expansion: float, relate: Relate | None = None):
        super().__init__()
        self.self_attn = Attention(hidden_size, num_heads)
        self.relate = relate
        self.mlp = SwiGLU(hidden_size, expansion)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None = None,
        mask: Tensor | None = None,
        memory: KeyValue | None = None,
        index: Index | None = None,
        drop: Drop = kept,
    ) -> Tensor:
        y = x + drop(self.self_attn(x, rotary, mask, memory))
        x = rms_norm(y if self.relate is None else y + drop(self.relate(x, index)))
        return rms_norm(x + drop(self.mlp(x)))


class MixerBlock(nn.Module):
    """Post-norm block that mixes the tokens of a fixed length by a SwiGLU (the paper's TRM-MLP)."""

    def __init__(self, hidden_size: int, length: int, expansion: float):
        super().__init__()
        self.mlp_t = SwiGLU(length, expansion)
        self.mlp = SwiGLU(hidden_size, expansion)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None = None,
        mask: Tensor | None = None,
        memory: KeyValue | None = None,
        index: Index | None = None,
        drop: Drop = kept,
    ) -> Tensor:
        x = rearrange(x, "b s d -> b d s")
        x = rearrange(rms_norm(x + drop(self.mlp_t(x))), "b d s -> b s d")
        return rms_norm(x + drop(self.mlp(x)))
