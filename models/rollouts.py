"""Several attempts at one sample: random initial states, and noise on the answer state before every ACT step.

Every number drawn is a function of its row's key, the ACT step and the place in the state. So an attempt
depends on no other row of its batch.
Sources: noise as in PTRM (arXiv 2605.19943), random starts and residuals as in EqR (arXiv 2605.21488).
Shapes: B rows, S tokens, D hidden.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.core import States

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's constants as signed integers
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
_HALF, _LOW = 2**-32, 2**32 - 1
_AT_ONCE = 2**24  # numbers


@dataclass(frozen=True)
class Rollouts:
    """What makes the rows of a batch attempts that differ.

    keys: (B,) int64, one per row.
    sigma: the standard deviation of the noise on the answer state, whose RMS is about 1.
    random_init: whether all states begin at standard normal numbers instead of the model's initial states.
    """

    keys: Tensor
    sigma: float
    random_init: bool

    def started(self, states: States) -> States:
        """The states (B, S, D) that the first ACT step begins with, before its noise."""
        if not self.random_init:
            return states
        drawn = (self._normal(self.keys, -1 - place, state) for place, state in enumerate(states))
        return tuple(values.to(state.dtype) for values, state in zip(drawn, states, strict=True))

    def disturbed(self, states: States, rows: Tensor, step: int) -> States:
        """The states (n, S, D) of the rows (n,) with noise on the answer, for ACT step `step`."""
        if not self.sigma:
            return states
        answer, *others = states
        noise = self._normal(self.keys[rows], step, answer)
        return (answer + self.sigma * noise).to(answer.dtype), *others

    @staticmethod
    def _normal(keys: Tensor, stream: int, like: Tensor) -> Tensor:
        count = like[0].numel()
        # In portions, since what a number is made of takes several times its memory.
        parts = _mix(keys + stream).split(max(1, _AT_ONCE // count))
        return torch.cat([hashed_normal(part, count) for part in parts]).view(like.shape)


def residual(before: States, after: States) -> Tensor:
    """(B,) how far an ACT step has moved the states: the RMS of the change of a number in them."""
    squares = [
        (new.float() - old.float()).square().mean((1, 2)) for old, new in zip(before, after, strict=True)
    ]
    return torch.stack(squares).mean(0).sqrt()


def hashed_normal(keys: Tensor, count: int) -> Tensor:
    """(n, count) float32 standard normal numbers, each a function of its row's key (n,) and its place.

    SplitMix64 counts from the key, and Box and Muller's transform makes two numbers of each value.
    """
    places = torch.arange(-(count // -2), device=keys.device)
    bits = _mix(keys[:, None] + places * _GOLDEN)
    first, second = (bits >> 32) & _LOW, bits & _LOW
    radius = ((first + 1).float() * _HALF).log().mul(-2).sqrt()  # never the logarithm of zero
    angle = second.float() * (2 * math.pi * _HALF)
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)[:, :count]


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's step on int64, which wraps around (`dataset.augment.mix` is the same on the host)."""
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """`x` to the right, with zeros from the left: the shift of signed integers repeats the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
