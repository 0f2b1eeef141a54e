"""What the machine's processor is good at, and how many threads compute on it."""

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

# Instructions that multiply bfloat16 faster than float32, the better first, as Linux names them.
BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16")
# Values of ONEDNN_MAX_CPU_ISA that keep oneDNN from them; any other value allows both.
_WITHOUT_AMX = {"AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512", "AVX10_2_512"}
_WITHOUT_BOTH = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
_WITHOUT_AVX512 = {"default", "avx2"}  # of ATEN_CPU_CAPABILITY, which limits PyTorch's own kernels
_CPUINFO = Path("/proc/cpuinfo")

SET_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # torchrun sets the first one for several processes
MEASURING = 0.5  # seconds that threads are compared, the first turns aside


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instruction sets of the CPU, as Linux names them; none where the system does not say."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def bfloat16_unit() -> str | None:
    """What multiplies bfloat16 on this CPU, one of `BFLOAT16_UNITS`; None where float32 is faster.

    Heeds the limits that the environment sets to oneDNN and PyTorch.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    older = os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in _WITHOUT_AVX512
    if older or limit in _WITHOUT_BOTH or not torch.backends.mkldnn.is_available():
        return None
    usable = BFLOAT16_UNITS[1:] if limit in _WITHOUT_AMX else BFLOAT16_UNITS
    return next((unit for unit in usable if unit in cpu_flags()), None)


@functools.cache
def all_threads() -> int:
    """How many threads PyTorch takes by itself, before any choice: one per core, or as its caller set it."""
    return torch.get_num_threads()


def choose_threads(
    asked: int | Literal["auto"],
    kept: int | None,
    work: Callable[[], object],
    clock: Callable[[], float] = time.perf_counter,
) -> str | None:
    """Set how many threads compute on this CPU, and return what is to be said of the choice.

    asked: a number is taken. `auto` keeps to what the environment sets, else to `kept`, and else takes the
    faster of one thread and all: on a busy machine several threads may wait for each other.
    kept: the threads of the checkpoint that is continued, if any. Other numbers may change the last bits.
    work: what is timed, such as a forward pass.
    """
    most = all_threads()
    said = None
    if asked != "auto":
        torch.set_num_threads(asked)
    elif not any(map(os.environ.get, SET_BY)):
        if kept is not None and kept <= most:
            torch.set_num_threads(kept)
            return f"threads=auto: {kept}, as in the checkpoint" if most > 1 else None
        said = _take_the_faster(most, work, clock) if most > 1 else None
    if kept not in (None, torch.get_num_threads()):
        changed = f"{kept} threads in the checkpoint, {torch.get_num_threads()} now: last bits may differ"
        said = f"{said}; {changed}" if said else changed
    return said


def _take_the_faster(most: int, work: Callable[[], object], clock: Callable[[], float]) -> str:
    """Take one thread or `most`, whichever does `work` sooner, and say so."""
    seconds = compare_threads((1, most), work, MEASURING, clock)
    best = min(seconds, key=lambda count: seconds[count])
    torch.set_num_threads(best)
    other = most if best == 1 else 1
    share = f"{seconds[best] / seconds[other]:.2f} of the time with {other}"
    return f"threads=auto: {best} of {most}, a forward pass takes {share}"


def compare_threads(
    counts: tuple[int, ...], work: Callable[[], object], seconds: float, clock: Callable[[], float]
) -> dict[int, float]:
    """Seconds per call of `work`, by number of threads.

    They take turns until `seconds` are over, so that other work of the machine slows all of them alike. The
    first turns warm up. They count where they alone take so long.
    """

    def turn(count: int) -> float:
        torch.set_num_threads(count)
        started = clock()
        work()
        return clock() - started

    rounds = [[turn(count) for count in counts]]
    counted = rounds if sum(rounds[0]) >= seconds else []
    while sum(map(sum, counted)) < seconds:
        counted.append([turn(count) for count in counts])
    return {count: sum(spent) / len(counted) for count, *spent in zip(counts, *counted, strict=True)}
