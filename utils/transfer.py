"""Values on their way between host and device, without a wait of the one for the other.

A GPU works off what it is given while the host goes on. The host may be ahead by about a step.
"""

from functools import cached_property

import torch
from torch import Tensor

KNOWN_AT_ONCE = ("cpu",)  # kinds of devices whose values the host has without waiting


def sent(values: Tensor, device: torch.device) -> Tensor:
    """`values` of the host, on `device`.

    From memory that the system may move, a copy would begin only once the GPU has done all else.
    """
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def lag(device: torch.device) -> int:
    """How many steps later the host asks for a value of a step.

    A CPU knows it at once. A GPU would run out of work if it was asked before it has the next step to do.
    """
    return 0 if device.type in KNOWN_AT_ONCE else 1


class Later:
    """One number of the device, which sets off for the host now."""

    def __init__(self, number: Tensor):
        self._number, self._arrived = number, None
        if number.is_cuda:
            self._number = torch.empty(number.shape, dtype=number.dtype, pin_memory=True)
            self._number.copy_(number, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    @cached_property
    def value(self) -> float:
        """The number. Whoever asks waits until the device has come that far."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._number.item()
