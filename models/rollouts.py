"""Several attempts at one sample: random initial states, and noise on the answer state before every ACT step.

Every number drawn is a function of its row's key, the ACT step and the place in the state (models/noise.py).
So an attempt depends on no other row of its batch.
Sources: noise as in PTRM (arXiv 2605.19943), random starts and residuals as in EqR (arXiv 2605.21488).
Shapes: B rows, S tokens, D hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.core import States
from models.noise import WORD, Draws, mixed

_AT_ONCE = 2**24  # numbers


@dataclass(frozen=True)
class Rollouts:
    """What makes the rows of a batch attempts that differ.

    keys: (B,) words of 32 bits, one per row.
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
        drawn = (_normal(self.keys, WORD - place, state) for place, state in enumerate(states))
        return tuple(values.to(state.dtype) for values, state in zip(drawn, states, strict=True))

    def disturbed(self, states: States, rows: Tensor, step: int) -> States:
        """The states (n, S, D) of the rows (n,) with noise on the answer, for ACT step `step`."""
        if not self.sigma:
            return states
        answer, *others = states
        noise = _normal(self.keys[rows], step, answer)
        return (answer + self.sigma * noise).to(answer.dtype), *others


def residual(before: States, after: States) -> Tensor:
    """(B,) how far an ACT step has moved the states: the RMS of the change of a number in them."""
    squares = [
        (new.float() - old.float()).square().mean((1, 2)) for old, new in zip(before, after, strict=True)
    ]
    return torch.stack(squares).mean(0).sqrt()


def _normal(keys: Tensor, stream: int, like: Tensor) -> Tensor:
    """Standard normal numbers of the shape of `like` (n, S, D), for rows with these keys (n,)."""
    own = mixed(keys ^ mixed(stream))
    # In portions, since what a number is made of takes several times its memory.
    rows = max(1, _AT_ONCE // like[0].numel())
    parts = zip(own.split(rows), like.split(rows), strict=True)
    return torch.cat([Draws(key).normal(part) for key, part in parts])
