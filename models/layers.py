"""Shared layers: casted linear maps, RMS norm, rotary positions, attention with an optional memory, SwiGLU, blocks.

Parameters are float32 and cast to the activations' dtype at use, so that small updates and the EMA never round away.
Shapes: B batch, S state tokens, M memory tokens, L cells, D hidden, H heads, E = D / H, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from models.relations import Index

NORM_EPS = 1e-5
ROPE_THETA = 10000.0
# With fewer keys, the backward pass of PyTorch's bfloat16 attention on CPUs is up to six times slower than the float32 one.
SLOW_BACKWARD_KEYS = 640
PACKED_LENGTH, PACKED_SHARE = 100, 0.8
POSITION_KINDS = Literal["rope", "rope2d", "rope2d_values", "learned", "none"]
# A rotation is compiled anew for other strides, with and without gradients; beyond the limit PyTorch runs it uncompiled.
_VARIANTS_COMPILED = 64
_TRUNCATED_STD = 0.8796256610342398  # of a standard normal cut at +-2


class Fused:
    """A chain of elementwise operations that takes one pass over memory once `compile_fused` has compiled it."""

    known: list["Fused"] = []

    def __init__(self, function: Callable):
        self.function = self.call = function
        self.known.append(self)

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)


def compile_fused(on: bool) -> None:
    """From now on, run every `Fused` function compiled, for shapes of any size, or as it is written."""
    if on:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS_COMPILED)
    for fused in Fused.known:
        fused.call = torch.compile(fused.function, dynamic=True) if on else fused.function


def truncated_normal(*shape: int, std: float) -> Tensor:
    """A float32 tensor from a normal truncated at two deviations and rescaled so that `std` is its true deviation."""
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

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) if self.cast is None else self.cast
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


@contextmanager
def weights_cast_once(modules: list[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Inside the context the linear maps of `modules` are cast to `dtype` already, and know no gradient."""
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
class Rotary:
    """cos and sin (S, E) of a sequence's rotary positions, or (B, 1, S, E) where they differ by sample.

    values: in half of the heads attention turns the values, too, and turns back what a token reads by that token's own position.
    What these heads read says where it was, seen from the reader; otherwise positions decide what is read and leave no trace in it.
    """

    cos: Tensor
    sin: Tensor
    values: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate queries, keys or values (B, H, S, E), in the table's float32."""
        return _rotate(x, self.cos, self.sin)

    def turn_values(self, value: Tensor) -> Tensor:
        """What attention averages, from values (B, H, S, E)."""
        if not self.values:
            return value
        turned, plain = value.chunk(2, dim=1)
        return torch.cat((self(turned), plain), dim=1)

    def turn_back(self, read: Tensor) -> Tensor:
        """What tokens at these positions have read (B, H, S, E)."""
        if not self.values:
            return read
        turned, plain = read.chunk(2, dim=1)
        return torch.cat((_rotate(turned, self.cos, -self.sin), plain), dim=1)

    def rows(self, index: Tensor) -> "Rotary":
        """The positions of selected rows."""
        return replace(self, cos=self.cos[index], sin=self.sin[index])

    def after_registers(self, count: int) -> "Rotary":
        """`count` unrotated rows, then this table."""
        return replace(self, cos=F.pad(self.cos, (0, 0, count, 0), value=1.0), sin=F.pad(self.sin, (0, 0, count, 0)))


@Fused
def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos[..., :half], sin[..., :half]  # both halves of a head turn alike
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2).flatten(-2).to(x.dtype)


@functools.lru_cache(maxsize=64)
def rotary_line(length: int, head_dim: int, device: torch.device) -> Rotary:
    """1-D rotary positions 0..length-1 (the original TRM)."""
    frequency = 1.0 / ROPE_THETA ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency).repeat(1, 2)
    return Rotary(angle.cos(), angle.sin())


@functools.lru_cache(maxsize=64)
def rotary_square(side: int, head_dim: int, device: torch.device, values: bool = False) -> Rotary:
    """2-D rotary positions of a side x side canvas in row-major order: half of each head turns with the row, half with the column."""
    frequency = 1.0 / ROPE_THETA ** (torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=device) / (head_dim // 2))
    turn = torch.outer(torch.arange(side, dtype=torch.float32, device=device), frequency)  # (side, E / 4)
    rows, columns = turn[:, None].expand(side, side, -1), turn[None].expand(side, side, -1)
    angle = torch.cat((rows, columns), dim=-1).reshape(side * side, -1).repeat(1, 2)
    return Rotary(angle.cos(), angle.sin(), values)


@dataclass(frozen=True)
class KeyValue:
    """Keys and values (B, H, M, E) of one block's memory."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Packed:
    """Sequences of these lengths that lie one after the other in a single row, each of which attends to itself alone."""

    lengths: list[int]


def worth_packing(valid: Tensor) -> bool:
    """Whether to leave invalid tokens (N, S) out of the computation: on CPUs, where shapes may change from batch to batch, and
    where it saves more than the attention of one sequence after the other costs. Never under `vmap` or in a compiled graph, where
    shapes must be known."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(valid):
        return False
    return valid.device.type == "cpu" and valid.shape[1] >= PACKED_LENGTH and 0 < float(valid.float().mean()) < PACKED_SHARE


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | Packed | None) -> Tensor:
    """Scaled dot-product attention (B, H, S, E); `mask` broadcasts to (B, H, S, keys), True where a key may be seen."""
    if isinstance(mask, Packed):
        sequences = zip(*(x.split(mask.lengths, dim=2) for x in (query, key, value)), strict=True)
        return torch.cat([attend(*sequence, None) for sequence in sequences], dim=2)
    dtype = query.dtype
    if query.device.type == "cpu" and query.requires_grad and key.shape[2] < SLOW_BACKWARD_KEYS:
        query, key, value = query.float(), key.float(), value.float()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).to(dtype)


def split_heads(x: Tensor, num_heads: int, parts: int) -> tuple[Tensor, ...]:
    """(B, S, parts * D) -> `parts` tensors (B, H, S, E)."""
    return x.unflatten(-1, (parts * num_heads, -1)).transpose(1, 2).chunk(parts, dim=1)


class Attention(nn.Module):
    """Multi-head self-attention; `memory` adds keys and values that are not part of the sequence.

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
        key, value = split_heads(F.linear(memory, self.qkv_proj.weight[hidden_size:].to(memory.dtype)), self.num_heads, 2)
        key = rms_norm(key) if self.qk_norm else key
        if rotary is not None:
            key, value = rotary(key), rotary.turn_values(value)
        return KeyValue(key, value)

    def forward(self, x: Tensor, rotary: Rotary | None, mask: Tensor | Packed | None = None, memory: KeyValue | None = None) -> Tensor:
        heads = self.qkv_proj(x).unflatten(-1, (3 * self.num_heads, -1)).transpose(1, 2)
        both, value = heads.split((2 * self.num_heads, self.num_heads), dim=1)  # queries and keys, (B, 2 H, S, E)
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
        return self.o_proj(read.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Queries (B, Q, D) read a set (B, N, D); masked members never matter, and an empty set contributes zero."""

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
        read = self.o_proj(attend(query, key, value, keys_mask(mask)).transpose(1, 2).flatten(2))
        return read * mask.any(-1)[:, None, None]


def keys_mask(valid: Tensor) -> Tensor:
    """Attention mask (B, 1, 1, N) of valid keys (B, N). A row without any valid key sees all of them: finite, to be discarded."""
    return (valid | ~valid.any(-1, keepdim=True))[:, None, None, :]


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


class AttentionBlock(nn.Module):
    """Post-norm transformer block. relate: a branch beside attention that reads a sequence through an `Index` (models/relations.py)."""

    def __init__(self, hidden_size: int, num_heads: int, expansion: float, relate: nn.Module | None = None):
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
        index: "Index | None" = None,
    ) -> Tensor:
        y = x + self.self_attn(x, rotary, mask, memory)
        x = rms_norm(y if self.relate is None else y + self.relate(x, index))
        return rms_norm(x + self.mlp(x))


class MixerBlock(nn.Module):
    """Post-norm block whose token mixing is a SwiGLU over the sequence (the paper's TRM-MLP, `mlp_t`); fixed length."""

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
        index: "Index | None" = None,
    ) -> Tensor:
        x = x.transpose(1, 2)
        x = rms_norm(x + self.mlp_t(x)).transpose(1, 2)
        return rms_norm(x + self.mlp(x))
