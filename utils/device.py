"""The device of this process, and what makes it fast."""

import ctypes
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal

import torch

from utils.distributed import World
from utils.errors import ProcessError, UserError

CPU_COMPILE_STEPS = 500  # compiling takes some 20 s there, which shorter runs do not win back
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def choose_device(name: str, world: World) -> torch.device:
    """`auto` takes the local rank's GPU where there is one, else the CPU. Raises `UserError` when a named device is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device=cuda, but PyTorch finds no usable GPU; use device=cpu or device=auto")
        if world.local_size > torch.cuda.device_count():
            raise UserError(
                f"{world.local_size} processes on this machine, but PyTorch finds {torch.cuda.device_count()} GPU(s)"
            )
        torch.cuda.set_device(world.local_rank)
        return torch.device("cuda", world.local_rank)
    keep_freed_memory()
    return torch.device("cpu")


def keep_freed_memory() -> None:
    """Stop glibc from handing large buffers back to the kernel after every operation: page faults are a large share of a CPU step."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def should_compile(wanted: bool | Literal["auto"], device: torch.device, steps: int) -> bool:
    """Whether a run of so many steps compiles what `compile=wanted` asks for: `auto` does if it can, on a CPU for long runs alone.

    Raises `UserError` where it is asked for and the machine lacks a compiler.
    """
    if wanted == "auto":
        return (device.type == "cuda" or steps >= CPU_COMPILE_STEPS) and not _missing_compiler(device)
    if wanted and (missing := _missing_compiler(device)):
        raise UserError(
            f"compile=true needs {missing}, which this machine lacks; install it, or say compile=false"
        )
    return wanted


def _missing_compiler(device: torch.device) -> str | None:
    variable, usual = ("CC", ("cc", "gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    if not any(map(shutil.which, [os.environ[variable]] if variable in os.environ else usual)):
        return f"a {'C' if variable == 'CC' else 'C++'} compiler ({usual[-2]})"
    return "the package triton" if device.type == "cuda" and not find_spec("triton") else None


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def explains_out_of_memory(what: str, remedy: str) -> Iterator[None]:
    """Turn the device's or the machine's lack of memory into one message: what did not fit, and what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ProcessError(f"out of memory in {what}; {remedy}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is how PyTorch or numpy report that memory is exhausted, on the GPU or on the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def describe(device: torch.device) -> str:
    """A word for logs and result files."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
