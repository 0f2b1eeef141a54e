"""Updates that are made before it is known whether they may be.

Whether a gradient is finite is known on the device. A host that waits for it leaves a GPU without work. So
the update is made in any case, and where the gradient was not finite, the device puts back what was before.
The host takes back its own part, such as counts of updates, when it hears of it: before the next update.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from utils.transfer import Later, lag


class Verdict:
    """Whether an update was made. finite: () bool on the device, the same in every process."""

    def __init__(self, finite: Tensor, take_back: Callable[[], None] | None = None):
        self.finite = finite
        self._heard, self._take_back = Later(finite), take_back

    @property
    def made(self) -> bool:
        """Whoever asks waits for the device. The first to hear of a failure takes back the host's part."""
        made = bool(self._heard.value)
        if not made and self._take_back is not None:
            self._take_back()
            self._take_back = None
        return made


@torch.no_grad()
def attempt(
    finite: Tensor, apply: Callable[[], None], optimizers: list[Any], averages: Iterable[Tensor]
) -> Verdict:
    """Call `apply`, which changes parameters, optimisers and `averages` in place, unless `finite` is false.

    On a CPU it is then not called. Elsewhere nothing that it did to tensors of the device is left, not a bit.
    Puzzle rows are up to `SparseSignSGD`, which knows what it touches.
    """
    if not lag(finite.device):
        verdict = Verdict(finite)
        if verdict.made:
            apply()
        return verdict
    changing = _changing(finite.device, optimizers, averages)
    before = [torch.cat([tensor.flatten() for tensor in alike]) for alike in changing]
    take_back = _host_part(finite.device, optimizers)
    apply()
    for alike, flat in zip(changing, before, strict=True):
        kept = torch.where(finite, torch.cat([tensor.flatten() for tensor in alike]), flat)
        parts = kept.split([tensor.numel() for tensor in alike])
        torch._foreach_copy_(alike, [p.view_as(t) for p, t in zip(parts, alike, strict=True)])
    return Verdict(finite, take_back)


def _changing(device: torch.device, optimizers: list[Any], averages: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors on `device` that an update changes, in lists of one kind and dtype each."""
    kinds: dict[tuple[Any, ...], list[Tensor]] = {}
    for number, optimizer in enumerate(optimizers):
        for parameter, values in _states(optimizer).items():
            for name, value in {"": parameter, **values}.items():
                if isinstance(value, Tensor) and value.device == device:
                    kinds.setdefault((number, name, value.dtype), []).append(value)
    for value in averages:
        kinds.setdefault(("average", value.dtype), []).append(value)
    return list(kinds.values())


def _states(optimizer: Any) -> dict[Tensor, dict[str, Any]]:
    """The parameters that the next update changes, each with what the optimiser remembers of it."""
    return {
        parameter: optimizer.state.get(parameter, {})
        for group in optimizer.param_groups
        for parameter in group.get("params", ())
        if parameter.grad is not None
    }


def _host_part(device: torch.device, optimizers: list[Any]) -> Callable[[], None]:
    """A function that gives the optimisers back the rates, and what the host remembers, as they are now."""
    rates = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    known = [
        (optimizer.state, parameter, {name: _copy(v) for name, v in values.items() if not _is_on(device, v)})
        for optimizer in optimizers
        for parameter, values in _states(optimizer).items()
    ]
    fresh = [(state, parameter) for state, parameter, _ in known if parameter not in state]

    def take_back() -> None:
        for group, rate in rates:
            group["lr"] = rate
        for state, parameter, values in known:
            state[parameter].update(values)
        for state, parameter in fresh:
            del state[parameter]

    return take_back


def _is_on(device: torch.device, value: Any) -> bool:
    return isinstance(value, Tensor) and value.device == device


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
