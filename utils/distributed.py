"""The one place for collectives. Every function is a no-op, or the identity, in a single process."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among its peers: global rank, number of processes, and the rank on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> "World":
        """What torchrun's variables say; a single process without them."""
        names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        return cls(*(int(os.environ.get(name, default)) for name, default in names.items()))

    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and writes shared files."""
        return self.rank == 0


def start(world: World, device: torch.device) -> None:
    """Join the process group, if there are several processes. On CUDA, tensors on the host travel by gloo."""
    if world.size > 1 and not dist.is_initialized():
        on_gpu = device.type == "cuda"
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)


def close() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for every process."""
    if dist.is_initialized():
        dist.barrier()


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum the gradients of all processes in place, as one flat message per dtype. Which parameters have one is the same
    everywhere, since every process runs the same model."""
    if not dist.is_initialized():
        return
    alike: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            alike.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in alike.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)])


def sum_tensor(value: Tensor) -> Tensor:
    """The elementwise sum over processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def gather_rows(value: Tensor) -> Tensor:
    """Concatenate equally shaped tensors of all processes along the first dimension, in rank order, with gradient."""
    return _GatherRows.apply(value) if dist.is_initialized() else value


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather_objects(value: Any) -> list[Any]:
    """One picklable object of each process, in rank order, on every process. For small things: tables of votes, names."""
    if not dist.is_initialized():
        return [value]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts
