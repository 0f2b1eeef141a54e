"""A checkpoint is one directory, written under a temporary name and renamed when complete.

    model.safetensors   raw weights            ema.safetensors   averaged weights (when EMA is on), and what has no average
    training.pt         optimisers             rank_<r>.pt       carry and random state of each process
    trained_pairs.pt    fingerprints of the pairs that were trained on
    info.json           step, configuration, data, versions, git commit
    evaluation.json     metrics of the evaluation at this step, added when it is done, and `score`: what the best are chosen by

Nothing here knows what a model is. Tensors are loaded with `weights_only`; a directory without info.json is no checkpoint.
"""

import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from utils import distributed
from utils.distributed import World
from utils.errors import UserError
from utils.files import read_json, replace_directory, write_json

FORMAT = 1
EVALUATION = "evaluation.json"
BEST = "best"  # RUN/best is a name, not a folder: the checkpoint with the best score
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
    keep_best: int = 0,
) -> Path:
    """Write `folder/step_<step>` from all processes together and delete all but the `keep` newest and the `keep_best` best.

    `shared` values are written by the first process, each as `<name>.pt`; `rank_state` by every process.

    Raises `UserError` when it cannot be written (disk full, read-only); older checkpoints stay untouched. Nothing is
    deleted to make room for it.
    """
    target = folder / f"step_{step}"
    temporary = folder / f".step_{step}.tmp"
    problem = ""
    if world.is_main:
        try:
            for remains in folder.glob(".step_*"):  # of a process that was killed while it wrote or deleted
                shutil.rmtree(remains, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as error:
            problem = str(error)
    values = {"weights": weights, "shared": shared} if world.is_main else {}
    needed = sum(distributed.gather_objects(_bytes({**values, "rank_state": rank_state})))
    if world.is_main and not problem and needed > (free := shutil.disk_usage(temporary).free):
        problem = f"it needs {_size(needed)}, and the disk has {_size(free)} left"
    problem = distributed.gather_objects(problem)[0]
    try:
        if problem:
            raise UserError(problem)
        save_torch(rank_state, temporary / f"rank_{world.rank}.pt")
        if world.is_main:
            for name, tensors in weights.items():
                save_file(
                    {key: value.detach().contiguous().cpu() for key, value in tensors.items()},
                    temporary / WEIGHTS[name],
                )
            for name, value in shared.items():
                save_torch(value, temporary / f"{name}.pt")
            write_json(
                temporary / "info.json",
                {"format": FORMAT, "step": step, "world_size": world.size, **info},
                indent=1,
            )
    except (OSError, RuntimeError, SafetensorError, UserError) as error:
        cause = (
            error.__context__ if isinstance(error.__context__, OSError) else error
        )  # PyTorch's own words hide the reason
        problem = str(cause).splitlines()[0]
    problem = next(filter(None, distributed.gather_objects(problem)), "")
    if world.is_main:
        try:
            if not problem:
                _reach_the_disk(temporary)
                replace_directory(temporary, target)
        except OSError as error:  # some file systems notice only here that they are full
            problem = str(error)
        if problem:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            kept = {target, *_steps(folder)[-keep:], *by_score(folder)[:keep_best]}
            for old in (path for path in _steps(folder) if path not in kept):
                _delete(old)
    problem = distributed.gather_objects(problem)[0]
    if problem:
        raise UserError(f"cannot write checkpoint {target}: {problem}; earlier checkpoints are intact")
    return target


def save_torch(value: Any, path: Path) -> None:
    """Write `value` to the disk itself. Raises `OSError`."""
    with path.open("wb") as file:  # PyTorch's own writer would not say why it fails
        try:
            torch.save(value, file)
        except RuntimeError as error:
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        file.flush()
        os.fsync(file.fileno())


def _bytes(value: Any) -> int:
    """The size of all tensors inside."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def _reach_the_disk(folder: Path) -> None:
    """Make sure that the files outlive a loss of power before the folder gets its name."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _delete(path: Path) -> None:
    """Rename, then delete: a half deleted folder must not look like a checkpoint."""
    doomed = path.with_name(f".{path.name}.old")
    with suppress(OSError):  # it may stay for another time
        os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def record_evaluation(path: Path, metrics: dict[str, Any], score: float | None) -> None:
    """Note in the checkpoint `path` what its evaluation found, and the `score` to be chosen by, if it may be chosen by it."""
    write_json(path / EVALUATION, {"score": score, "metrics": metrics}, indent=1)


def load_score(path: Path) -> float | None:
    """The score of the checkpoint's evaluation; None without one."""
    return read_json(path / EVALUATION)["score"] if (path / EVALUATION).is_file() else None


def lacks_evaluation(path: Path) -> bool:
    """Whether `path` is a checkpoint whose evaluation was not finished."""
    return (path / "info.json").is_file() and not (path / EVALUATION).is_file()


def by_score(folder: Path) -> list[Path]:
    """The checkpoints in `folder` that have a score, the best first; of equal ones the earliest."""
    scored = [(path, load_score(path)) for path in _steps(folder)]
    return [path for path, score in sorted((s for s in scored if s[1] is not None), key=lambda s: -s[1])]


def latest(folder: Path) -> Path | None:
    """The checkpoint with the highest step in `folder`, or None."""
    steps = _steps(folder)
    return steps[-1] if steps else None


def _steps(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    complete = [
        path for path in folder.iterdir() if _NAME.match(path.name) and (path / "info.json").is_file()
    ]
    return sorted(complete, key=lambda path: int(_NAME.match(path.name)[1]))


def resolve(path: Path | str) -> Path:
    """A checkpoint directory from its own path, the newest one of a run folder, or `<run folder>/best`, the one with the
    best score. Raises `UserError` otherwise."""
    path = Path(path)
    if (path / "info.json").is_file():
        return path
    if path.name == BEST and not path.exists():
        best = by_score(path.parent / "checkpoints")
        if not best:
            raise UserError(
                f"{path.parent} has no checkpoint with a score; a run with validation=N and eval_interval=N makes them"
            )
        return best[0]
    found = latest(path) or latest(path / "checkpoints")
    if found is None:
        what = "is not a checkpoint directory of this framework" if path.exists() else "does not exist"
        raise UserError(
            f"checkpoint {path} {what}; expected a folder with info.json, or a run folder with checkpoints/step_N"
        )
    return found


def load_info(path: Path) -> dict[str, Any]:
    """The checkpoint's info.json."""
    info = read_json(path / "info.json")
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise UserError(
            f"{path}/info.json is not of checkpoint format {FORMAT}; this checkpoint was written by something else"
        )
    return info


def load_weights(path: Path, which: str) -> dict[str, Tensor]:
    """The `raw` or `ema` weights, whole: beside averages the raw file holds only what has one."""
    file, averages = path / WEIGHTS[which], path / WEIGHTS["ema"]
    if not file.is_file():
        others = [name for name, other in WEIGHTS.items() if (path / other).is_file()]
        raise UserError(f"checkpoint {path} has no '{which}' weights; it has {', '.join(others) or 'none'}")
    try:
        weights = load_file(file)
        if which == "raw" and averages.is_file():
            file = averages
            with safe_open(averages, "pt") as averaged:
                weights |= {
                    name: averaged.get_tensor(name) for name in sorted(set(averaged.keys()) - weights.keys())
                }
        return weights
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


def load_trained_pairs(path: Path) -> np.ndarray:
    """The fingerprints (N,) uint64 of the pairs that a checkpoint was trained on."""
    return load_torch(path / "trained_pairs.pt").numpy().view("uint64")
