"""The device of this process, and what makes it fast."""

import ctypes
import functools
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal

import torch

from utils.distributed import World
from utils.errors import ProcessError, UserError
from utils.processor import BFLOAT16_UNITS, bfloat16_unit

CPU_COMPILE_STEPS = 500  # compiling takes some 20 s there, which shorter runs do not win back
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def choose_device(name: str, world: World) -> torch.device:
    """`auto` takes the local rank's GPU where there is one, else the CPU. Raises `UserError` when a named
    device is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device=cuda, but PyTorch finds no usable GPU; use device=cpu or device=auto")
        if world.local_size > torch.cuda.device_count():
            raise UserError(
                f"{world.local_size} processes on this machine, but PyTorch finds "
                f"{torch.cuda.device_count()} GPU(s)"
            )
        torch.cuda.set_device(world.local_rank)
        return torch.device("cuda", world.local_rank)
    keep_freed_memory()
    return torch.device("cpu")


def faster_dtype(device: torch.device) -> tuple[Literal["float32", "bfloat16"], str]:
    """The dtype of matrix products that are faster on `device`, and why."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "this GPU multiplies it"
        return "float32", "this GPU does not multiply bfloat16"
    if unit := bfloat16_unit():
        return "bfloat16", f"this CPU multiplies it ({unit})"
    return "float32", f"this CPU does not multiply bfloat16 ({' or '.join(BFLOAT16_UNITS)})"


def only_deterministic(on: bool) -> None:
    """From now on, PyTorch refuses operations that may give other bits each time, or allows them again.

    On a GPU this takes other kernels, and cuBLAS needs its workspace fixed before it is first used.
    """
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.deterministic = on


def keep_freed_memory() -> None:
    """Stop glibc from handing large buffers back to the kernel after every operation: page faults are a large
    share of a CPU step."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def should_compile(
    wanted: bool | Literal["auto"], device: torch.device, steps: int, say: Callable[[str], None] = print
) -> bool:
    """Whether a run of so many steps compiles what `compile=wanted` asks for.

    `auto` does if it can, on a CPU for long runs alone; where it cannot, `say` hears why in a line.
    Raises `UserError` where it is asked for and the machine cannot.
    """
    long_enough = device.type == "cuda" or steps >= CPU_COMPILE_STEPS
    if not wanted or (wanted == "auto" and not long_enough):
        return False
    if missing := _missing_compiler(device):
        problem = f"needs {missing}, which this machine lacks"
    elif failure := compile_failure(device.type):
        problem = f"does not work on this machine ({failure})"
    else:
        return True
    if wanted == "auto":
        say(f"compile=auto: nothing is compiled, since that {problem}")
        return False
    raise UserError(f"compile=true {problem}; install what is missing, or say compile=false")


@functools.cache
def compile_failure(device: str) -> str | None:
    """Why the smallest of compilations fails, or None. A compiler without the headers of Python is a common
    reason."""
    try:
        torch.compile(lambda x: x.sin() + x)(torch.ones(8, device=device))
    except Exception as error:  # PyTorch raises whatever its compiler stumbles over
        return in_a_line(error)
    return None


def in_a_line(error: Exception) -> str:
    """What PyTorch or a compiler that it has called says is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), (lines or [type(error).__name__])[0])[:200]


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
    """Turn the device's or the machine's lack of memory into one message: what did not fit, and what to
    change."""
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
