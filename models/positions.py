"""How tokens know where they are: rotary tables, and the kinds of positions.

To add a rotary encoding: a row in `ROTATIONS`, and its name in `POSITION_KINDS` and `PairConfig.positions`.
Shapes: B batch, H heads, S tokens, E the width of a head.
Source: "RoFormer: Enhanced Transformer with Rotary Position Embedding" (arXiv 2104.09864).
"""

import functools
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from models.fused import Fused

ROPE_THETA = 10000.0
# Of the recursion: a name in `ROTATIONS`, or embeddings that are learned (models/core.py), or nothing.
POSITION_KINDS = Literal["rope", "rope2d", "rope2d_values", "learned", "none"]


@dataclass(frozen=True)
class Rotary:
    """cos and sin (S, E) of a sequence's rotary positions, or (B, 1, S, E) where they differ by sample.

    values: half of the heads also turn the values. What such a head reads is turned back by the reader's own
    position, so that it says where it was, seen from the reader. In other heads positions decide what is read
    and leave no trace in it.
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
        """What tokens at these positions have read, from the averaged values (B, H, S, E)."""
        if not self.values:
            return read
        turned, plain = read.chunk(2, dim=1)
        return torch.cat((_rotate(turned, self.cos, -self.sin), plain), dim=1)

    def rows(self, index: Tensor) -> "Rotary":
        """The positions of selected rows."""
        return replace(self, cos=self.cos[index], sin=self.sin[index])

    def after_registers(self, count: int) -> "Rotary":
        """`count` rows that turn nothing, then this table."""
        return replace(
            self, cos=F.pad(self.cos, (0, 0, count, 0), value=1.0), sin=F.pad(self.sin, (0, 0, count, 0))
        )


@Fused
def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos[..., :half], sin[..., :half]  # both halves of a head turn alike
    return (
        torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2).flatten(-2).to(x.dtype)
    )


@functools.lru_cache(maxsize=64)
def rotary_line(length: int, head_dim: int, device: torch.device) -> Rotary:
    """1-D rotary positions 0..length-1, as in the original TRM."""
    angle = repeat(_angles(length, head_dim, device), "s e -> s (two e)", two=2)
    return Rotary(angle.cos(), angle.sin())


@functools.lru_cache(maxsize=64)
def rotary_square(side: int, head_dim: int, device: torch.device, values: bool = False) -> Rotary:
    """2-D rotary positions of a side x side canvas in row-major order.

    Half of each head turns with the row, half with the column.
    """
    line = _angles(side, head_dim // 2, device)
    rows, columns = repeat(line, "r e -> r c e", c=side), repeat(line, "c e -> r c e", r=side)
    angle = repeat(torch.cat((rows, columns), dim=-1), "r c e -> (r c) (two e)", two=2)
    return Rotary(angle.cos(), angle.sin(), values)


def _angles(length: int, width: int, device: torch.device) -> Tensor:
    """The angles (length, width / 2) of positions 0..length-1, a frequency for every two channels."""
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    place = torch.arange(length, dtype=torch.float32, device=device)
    return torch.outer(place, 1.0 / ROPE_THETA**exponent)


@dataclass(frozen=True)
class Rotation:
    """A rotary encoding.

    multiple: of what the width of a head has to be a multiple.
    on_canvas: turns by row and column of the canvas, otherwise along the sequence.
    values: as in `Rotary`; half of the heads do, so that it takes two.
    """

    multiple: int
    on_canvas: bool = False
    values: bool = False

    def table(self, length: int, head_dim: int, device: torch.device) -> Rotary:
        """The positions of `length` tokens in a line, or of a square canvas with `length` cells."""
        if self.on_canvas:
            return rotary_square(round(length**0.5), head_dim, device, self.values)
        return rotary_line(length, head_dim, device)


ROTATIONS = {
    "rope": Rotation(multiple=2),
    "rope2d": Rotation(multiple=4, on_canvas=True),
    "rope2d_values": Rotation(multiple=4, on_canvas=True, values=True),
}
