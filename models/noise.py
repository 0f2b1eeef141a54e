"""What a training step draws for its rows, the same whatever portion or process a row is computed in.

Few numbers are drawn on the host, for the whole global batch. Those that every block needs are computed on
the device instead, each a hash of its row's key, of the number of the draw and of its place.
Shapes: B rows of a batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from models.fused import Fused

WORD = 0xFFFFFFFF  # words of 32 bits are held in int64, so that no product of theirs overflows
Word = TypeVar("Word", int, Tensor)


@dataclass(frozen=True)
class Noise:
    """The random numbers of one training step.

    normal(*shape): standard normal numbers (B, *shape), which differ from call to call.
    keys(): a word (B,) for each row, always the same.
    """

    normal: Callable[..., Tensor]
    keys: Callable[[], Tensor]

    def of_act_step(self, steps: Tensor) -> "Draws":
        """What rows that have taken `steps` (B,) ACT steps draw at their next one, also where several of them
        share an update."""
        return Draws(mixed(self.keys() ^ mixed(steps.long())))


class Draws:
    """Numbers of one ACT step. The order of the draws decides what each of them gives."""

    def __init__(self, keys: Tensor):
        self.keys, self.count = keys, 0

    def dropped(self, x: Tensor, rate: float) -> Tensor:
        """`x` (B, ...) with a share `rate` of its numbers zero, and the others scaled up to the same mean."""
        return _dropped(x, self._next(), round(rate * (WORD + 1)), 1 / (1 - rate))

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers, float32, of the shape of `like` (B, ...)."""
        return _normal(like, self._next())

    def _next(self) -> Tensor:
        self.count += 1
        return mixed(self.keys ^ mixed(self.count))


def mixed(x: Word) -> Word:
    """A hash of words, a number or a tensor, that no other word shares.

    Source: the constants of "hash-prospector", found by Chris Wellons and users of that program.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & WORD
    x = ((x ^ (x >> 15)) * 0x735A2D97) & WORD
    return x ^ (x >> 15)


def _words(like: Tensor, keys: Tensor) -> Tensor:
    """A word for every number of `like` (B, ...)."""
    places = torch.arange(math.prod(like.shape[1:]), device=like.device).view(like.shape[1:])
    return mixed(mixed(places) ^ keys.view(-1, *[1] * (like.ndim - 1)))


@Fused
def _dropped(x: Tensor, keys: Tensor, threshold: int, scale: float) -> Tensor:
    return torch.where(_words(x, keys) >= threshold, x * scale, 0.0)


@Fused
def _normal(like: Tensor, keys: Tensor) -> Tensor:
    # The odd numbers between -2^24 and 2^24, which float32 holds exactly; none of them is at an end.
    uniform = ((_words(like, keys) >> 8) * 2 + 1 - (1 << 24)).float() / (1 << 24)
    return math.sqrt(2) * torch.erfinv(uniform)
