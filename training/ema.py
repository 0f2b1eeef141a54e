"""Exponential moving average of the parameters, in float32, swapped in place for evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Averages every parameter. The puzzle table is a buffer and stays raw, as in the original: its sign-SGD
    rows are touched too rarely for an average to mean anything, and a copy would double the largest tensor of
    the run."""

    def __init__(self, model: nn.Module, rate: float):
        self.rate = rate
        self.parameters = dict(model.named_parameters())
        self.shadow = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current parameters by 1 - rate."""
        torch._foreach_lerp_(list(self.shadow.values()), list(self.parameters.values()), 1 - self.rate)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside the context the model has the averaged weights; no copy of anything is made."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.shadow[name] = self.shadow[name], parameter.data

    @torch.no_grad()
    def load(self, shadow: dict[str, Tensor]) -> None:
        """Take the averages from a checkpoint."""
        for name, value in self.shadow.items():
            value.copy_(shadow[name])
