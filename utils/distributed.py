"""The one place for collectives. Every function is a no-op, or the identity, in a single process."""

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401  imported after `start`, it keeps the group alive
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from utils.errors import PeerLost

TIMEOUT_MINUTES = 30.0
# What gloo and NCCL say when a peer is gone or silent.
_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|timed? ?out|broken pipe|socket|remote process|nccl|gloo",
    re.IGNORECASE,
)
_meetings = itertools.count()
_apart_from: int | None = None  # the number of processes inside `apart`


@dataclass(frozen=True)
class World:
    """This process among its peers: global rank, number of processes, the same on this machine, and how often
    torchrun has restarted them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0

    @classmethod
    def from_environment(cls) -> "World":
        """What torchrun's variables say; a single process without them."""
        names = {
            "RANK": 0,
            "WORLD_SIZE": 1,
            "LOCAL_RANK": 0,
            "LOCAL_WORLD_SIZE": 1,
            "TORCHELASTIC_RESTART_COUNT": 0,
        }
        return cls(*(int(os.environ.get(name, default)) for name, default in names.items()))

    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and writes shared files."""
        return self.rank == 0


def start(world: World, device: torch.device, timeout_minutes: float = TIMEOUT_MINUTES) -> None:
    """Join the process group, if there are several processes. On CUDA, tensors on the host travel by gloo.

    A process that waits for another one for `timeout_minutes` gives up, so a dead or frozen peer never hangs
    the others.
    """
    if world.size > 1 and not dist.is_initialized():
        on_gpu, timeout = device.type == "cuda", timedelta(minutes=timeout_minutes)
        # torchrun on one machine keeps one store over its restarts, where the dead processes' addresses would
        # be found. The machines of a larger run count restarts differently.
        generation = str(world.restarts) if world.local_size == world.size else "all"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.PrefixStore(generation, next(rendezvous("env://", timeout=timeout))[0]),
            rank=world.rank,
            world_size=world.size,
            device_id=device if on_gpu else None,
            timeout=timeout,
        )


@contextmanager
def reports_lost_peers() -> Iterator[None]:
    """Turn what a collective raises when a peer is gone or silent into one message (`PeerLost`)."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip().splitlines()
        if World.from_environment().size == 1 or not text or not _LOST.search(text[0]):
            raise
        raise PeerLost(
            f"another process of this run failed or stopped answering ({text[0][:200]}); its own message "
            "says why. The same command "
            "continues from the last checkpoint, and torchrun --max-restarts N does so by itself"
        ) from None


def close() -> None:
    """Leave the process group. Its threads end here: one that is alive while the interpreter ends can crash
    it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _together() -> bool:
    """Whether there are other processes to exchange values with."""
    return dist.is_initialized() and _apart_from is None


@contextmanager
def apart(world: World) -> Iterator[None]:
    """Inside the context no function here waits for another process.

    Shapes are those of the whole world. Each process's own values stand for those of the others.
    """
    global _apart_from
    _apart_from = world.size
    try:
        yield
    finally:
        _apart_from = None


def meet(word: str, minutes: float) -> list[str]:
    """Wait for every process, at most so many minutes; what each has to say, in rank order.

    It goes by the group's store. The timeout of collectives, which runs from the first process that enters
    one, does not matter. Raises `PeerLost` with the ranks that did not come.
    """
    if not _together():
        return [word]
    store, number = dist.distributed_c10d._get_default_store(), next(_meetings)
    keys = [f"meeting {number}, rank {rank}" for rank in range(dist.get_world_size())]
    store.set(keys[dist.get_rank()], word)
    try:
        store.wait(keys, timedelta(minutes=minutes))
    except dist.DistStoreError:
        silent = ", ".join(str(rank) for rank, key in enumerate(keys) if not store.check([key]))
        raise PeerLost(f"rank {silent} did not get ready within {minutes:g} minutes") from None
    return [store.get(key).decode() for key in keys]


def barrier() -> None:
    """Wait for every process."""
    if _together():
        dist.barrier()


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum the gradients of all processes in place, as one flat message per dtype. Which parameters have one
    is the same everywhere, since every process runs the same model."""
    if not _together():
        return
    alike: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            alike.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in alike.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(
            gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
        )


def sum_tensor(value: Tensor) -> Tensor:
    """The elementwise sum over processes, in place."""
    if _together():
        dist.all_reduce(value)
    return value


def any_true(*flags: bool) -> list[bool]:
    """Of each flag, whether it is set in any process: one message, so that all of them take the same turn."""
    return [bool(count) for count in sum_tensor(torch.tensor(flags, dtype=torch.float32)).tolist()]


def gather_rows(value: Tensor) -> Tensor:
    """Concatenate equally shaped tensors of all processes along the first dimension, in rank order, with
    gradient."""
    if _together():
        return _GatherRows.apply(value)
    return torch.cat([value] * _apart_from) if _apart_from else value


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
    """One picklable object of each process, in rank order, on every process. For small things: tables of
    votes, names."""
    if not _together():
        return [value] * (_apart_from or 1)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts
