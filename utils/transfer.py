"""Values on their way between host and device, without a wait of the one for the other."""

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """`values` of the host, on `device`.

    From memory that the system may move, a copy would begin only once the GPU has done all else.
    """
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
