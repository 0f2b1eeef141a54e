"""A checkpoint is one directory, written under a temporary name and renamed when complete.

    model.safetensors   raw weights            ema.safetensors   averaged weights (when EMA is on)
    training.pt         optimisers             rank_<r>.pt       carry and random state of each process
    trained_pairs.pt    fingerprints of the pairs that were trained on
    info.json           step, configuration, data, versions, git commit

Nothing here knows what a model is. Tensors are loaded with `weights_only`; a directory without info.json is no checkpoint.
"""

import pickle
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from utils import distributed
from utils.distributed import World
from utils.errors import UserError
from utils.files import read_json, replace_directory, write_json

FORMAT = 1
WEIGHTS = {"raw": "model.safetensors", "ema": "ema.safetensors"}
_NAME = re.compile(r"step_(\d+)$")


def save(
    folder: Path,
    step: int,
    world: World,
    *,
    weights: dict[str, dict[str, Tensor]],
    shared: dict[str, Any],
    rank_state: dict[str, Any],
    info: dict[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step_<step>` from all processes together and delete all but the `keep` newest.

    `shared` values are written by the first process, each as `<name>.pt`; `rank_state` by every process.

    Raises `UserError` when it cannot be written (disk full, read-only); older checkpoints stay untouched.
    """
    target = folder / f"step_{step}"
    temporary = folder / f".step_{step}.tmp"
    problem = ""
    if world.is_main:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as error:
            problem = str(error)
    distributed.barrier()
    try:
        torch.save(rank_state, temporary / f"rank_{world.rank}.pt")
        if world.is_main:
            for name, tensors in weights.items():
                save_file({key: value.detach().contiguous().cpu() for key, value in tensors.items()}, temporary / WEIGHTS[name])
            for name, value in shared.items():
                torch.save(value, temporary / f"{name}.pt")
            write_json(temporary / "info.json", {"format": FORMAT, "step": step, "world_size": world.size, **info}, indent=1)
    except (OSError, RuntimeError, SafetensorError, UserError) as error:
        problem = problem or str(error).splitlines()[0]
    problems = [text for text in distributed.gather_objects(problem) if text]
    if not problems and world.is_main:
        replace_directory(temporary, target)
        for old in [path for path in _steps(folder) if path != target][: -(keep - 1) or None]:
            shutil.rmtree(old, ignore_errors=True)
    elif world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    distributed.barrier()
    if problems:
        raise UserError(f"cannot write checkpoint {target}: {problems[0]}; earlier checkpoints are intact")
    return target


def latest(folder: Path) -> Path | None:
    """The checkpoint with the highest step in `folder`, or None."""
    steps = _steps(folder)
    return steps[-1] if steps else None


def _steps(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    complete = [path for path in folder.iterdir() if _NAME.match(path.name) and (path / "info.json").is_file()]
    return sorted(complete, key=lambda path: int(_NAME.match(path.name)[1]))


def resolve(path: Path | str) -> Path:
    """A checkpoint directory from its own path, or the newest one of a run folder. Raises `UserError` otherwise."""
    path = Path(path)
    if (path / "info.json").is_file():
        return path
    found = latest(path) or latest(path / "checkpoints")
    if found is None:
        what = "is not a checkpoint directory of this framework" if path.exists() else "does not exist"
        raise UserError(f"checkpoint {path} {what}; expected a folder with info.json, or a run folder with checkpoints/step_N")
    return found


def load_info(path: Path) -> dict[str, Any]:
    """The checkpoint's info.json."""
    info = read_json(path / "info.json")
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise UserError(f"{path}/info.json is not of checkpoint format {FORMAT}; this checkpoint was written by something else")
    return info


def load_weights(path: Path, which: str) -> dict[str, Tensor]:
    """The `raw` or `ema` weights."""
    file = path / WEIGHTS[which]
    if not file.is_file():
        others = [name for name, other in WEIGHTS.items() if (path / other).is_file()]
        raise UserError(f"checkpoint {path} has no '{which}' weights; it has {', '.join(others) or 'none'}")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is damaged or no safetensors file: {error}") from None


def load_torch(file: Path) -> Any:
    """A file written by `torch.save`."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no such file: {file}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{file} is damaged or no PyTorch file: {str(error).splitlines()[0]}") from None


def git_commit() -> str | None:
    """The commit of the code that runs, `+` appended when files differ from it; None outside a git checkout."""
    try:
        root = Path(__file__).resolve().parent
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
