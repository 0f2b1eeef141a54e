"""A checkpoint is one directory, written under a temporary name and renamed when complete.

    model.safetensors   raw weights
    ema.safetensors     averaged weights (when EMA is on), and what has no average
    training.pt         optimisers
    rank_<r>.pt         carry and random state of each process
    trained_pairs.pt    fingerprints of the pairs that were trained on
    info.json           step, configuration, data, versions, git commit, and a digest of every file
    evaluation.json     metrics of this step's evaluation, added when it is done; `score` chooses the best

Nothing here knows what a model is. Tensors are loaded with `weights_only`; a directory without info.json is
no checkpoint.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from utils import distributed, hub
from utils.distributed import World
from utils.errors import UserError
from utils.files import as_json, read_json, replace_directory, sha256_of, write_json

FORMAT = 1
SHARED_FORMAT = 1  # of a model on the hub
INFO, EVALUATION = "info.json", "evaluation.json"
BEST = "best"  # RUN/best is a name, not a folder: the checkpoint with the best score
WEIGHTS = {"raw": "model.safetensors", "ema": "ema.safetensors"}
_NAME = re.compile(r"step_(\d+)$")


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds. The first process writes `weights` (raw, ema), each value of `shared` as
    `<name>.pt`, and `info`; every process writes its own `rank_state`."""

    weights: dict[str, dict[str, Tensor]]
    shared: dict[str, Any]
    rank_state: dict[str, Any]
    info: dict[str, Any]


@dataclass(frozen=True)
class Keep:
    """How many checkpoints stay: the newest, and the best by their score."""

    newest: int
    best: int = 0


def save(folder: Path, step: int, world: World, content: Content, keep: Keep) -> Path:
    """Write `folder/step_<step>` from all processes together, then delete the checkpoints that `keep` does
    not name.

    Raises `UserError` when it cannot be written (disk full, read-only). Older checkpoints stay untouched:
    nothing is deleted to make room.
    """
    target, temporary = folder / f"step_{step}", folder / f".step_{step}.tmp"
    problem = _attempt(lambda: _make_room(temporary)) if world.is_main else ""
    mine = {**vars(content), "info": {}} if world.is_main else {"rank_state": content.rank_state}
    needed = sum(distributed.gather_objects(_bytes(mine)))
    if world.is_main and not problem and needed > (free := shutil.disk_usage(temporary).free):
        problem = f"it needs {_size(needed)}, and the disk has {_size(free)} left"
    problem = distributed.gather_objects(problem)[0]

    written: dict[str, str] = {}  # digests of this process's files
    if not problem:
        problem = _attempt(lambda: _write(temporary, content, world, written))
    # Every process learns of the first problem, and the first process of all digests.
    found = distributed.gather_objects((problem, written))
    problem = next((text for text, _ in found if text), "")

    if world.is_main:
        if not problem:
            info = {"format": FORMAT, "step": step, "world_size": world.size, **content.info}
            digests = {name: digest for _, files in found for name, digest in files.items()}
            problem = _attempt(lambda: _complete(temporary, target, info, digests))
        if problem:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            kept = {target, *steps(folder)[-keep.newest :], *by_score(folder)[: keep.best]}
            for old in (path for path in steps(folder) if path not in kept):
                _delete(old)
    problem = distributed.gather_objects(problem)[0]
    if problem:
        raise UserError(f"cannot write checkpoint {target}: {problem}; earlier checkpoints are intact")
    return target


def _attempt(action: Callable[[], None]) -> str:
    """Why `action` failed, or nothing: an error on one process has to reach the others as a word."""
    try:
        action()
    except (OSError, RuntimeError, SafetensorError, UserError) as error:
        # PyTorch's own words hide the reason.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        return str(cause).splitlines()[0]
    return ""


def _make_room(temporary: Path) -> None:
    """An empty folder, without what a killed process left while it wrote or deleted."""
    for remains in temporary.parent.glob(".step_*"):
        shutil.rmtree(remains, ignore_errors=True)
    temporary.mkdir(parents=True)


def _write(folder: Path, content: Content, world: World, written: dict[str, str]) -> None:
    """This process's files; their digests go into `written`."""
    files = [folder / f"rank_{world.rank}.pt"]
    save_torch(content.rank_state, files[0])
    if world.is_main:
        for name, tensors in content.weights.items():
            files.append(folder / WEIGHTS[name])
            save_file({key: value.detach().contiguous().cpu() for key, value in tensors.items()}, files[-1])
        for name, value in content.shared.items():
            files.append(folder / f"{name}.pt")
            save_torch(value, files[-1])
    written |= {file.name: sha256_of(file) for file in files}


def _complete(temporary: Path, target: Path, info: dict[str, Any], digests: dict[str, str]) -> None:
    """Write info.json and give the folder its name. Some file systems notice only here that they are full."""
    info = json.loads(json.dumps(as_json(info)))  # as it will be read: with words for numbers among the keys
    write_json(temporary / INFO, {**info, "sha256": {**digests, INFO: _digest_of(info)}}, indent=1)
    _reach_the_disk(temporary)
    replace_directory(temporary, target)


def _digest_of(info: dict[str, Any]) -> str:
    """The digest of a checkpoint's info, without the digests that it holds."""
    rest = {key: value for key, value in info.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


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
    """Note in the checkpoint `path` what its evaluation found, and the `score` to be chosen by, if it may be
    chosen by it."""
    write_json(path / EVALUATION, {"score": score, "metrics": metrics}, indent=1)


def load_score(path: Path) -> float | None:
    """The score of the checkpoint's evaluation; None without one."""
    return read_json(path / EVALUATION)["score"] if (path / EVALUATION).is_file() else None


def lacks_evaluation(path: Path) -> bool:
    """Whether `path` is a checkpoint whose evaluation was not finished."""
    return (path / INFO).is_file() and not (path / EVALUATION).is_file()


def by_score(folder: Path) -> list[Path]:
    """The checkpoints in `folder` that have a score, the best first; of equal ones the earliest."""
    scores = {path: score for path in steps(folder) if (score := load_score(path)) is not None}
    return sorted(scores, key=lambda path: -scores[path])


def latest(folder: Path) -> Path | None:
    """The checkpoint with the highest step in `folder`, or None."""
    found = steps(folder)
    return found[-1] if found else None


def steps(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    named = {path: found for path in folder.iterdir() if (found := _NAME.match(path.name))}
    complete = [path for path in named if (path / INFO).is_file()]
    return sorted(complete, key=lambda path: int(named[path][1]))


def resolve(path: Path | str) -> Path:
    """A checkpoint directory from its own path, the newest one of a run folder, `<run folder>/best`, the one
    with the best score, or a model of the hub (utils/hub.py). Raises `UserError` otherwise."""
    if hub.is_reference(path):
        folder, kept = hub.fetch(str(path))
        return resolve(kept if folder is None else unpacked(folder, kept))
    path = Path(path)
    if (path / INFO).is_file():
        return path
    if path.name == BEST and not path.exists():
        best = by_score(path.parent / "checkpoints")
        if not best:
            raise UserError(
                f"{path.parent} has no checkpoint with a score; a run with validation=N and "
                "eval_interval=N makes them"
            )
        return best[0]
    found = latest(path) or latest(path / "checkpoints")
    if found is None:
        if (path / hub.CONFIG).is_file() and (path / hub.WEIGHTS).is_file():
            raise UserError(f"{path} is a model in the layout of the hub; ask for it as {hub.PREFIX}{path}")
        what = "is not a checkpoint directory of this framework" if path.exists() else "does not exist"
        raise UserError(
            f"checkpoint {path} {what}; expected a folder with info.json, or a run folder with "
            "checkpoints/step_N"
        )
    return found


def unpacked(source: Path, kept: Path) -> Path:
    """The run folder `kept` with a model of the hub, whose files are in `source`, as its only checkpoint.

    A folder that is no commit of the hub has a place in `kept` by its description. Raises `UserError` where a
    file is missing, or is not the one that the model was published with.
    """
    about = read_json(source / hub.CONFIG)
    if not isinstance(about, dict) or about.get("etrm_format") != SHARED_FORMAT:
        raise UserError(f"{source / hub.CONFIG} is not of a model that this framework has published")
    digests = {name: about["sha256"][name] for name in (hub.WEIGHTS, hub.PAIRS)}
    for name, digest in digests.items():
        if not (source / name).is_file() or sha256_of(source / name) != digest:
            raise UserError(f"{source / name} is missing or not the published one: its SHA-256 differs")
    if kept.name == hub.FOLDERS:
        kept = kept / sha256_of(source / hub.CONFIG)[:40]
    if kept.is_dir():
        return kept
    temporary = kept.with_name(f".{kept.name}.{os.getpid()}.tmp")
    try:
        target = temporary / "checkpoints" / f"step_{int(about['info']['step'])}"
        target.parent.mkdir(parents=True)
        pairs = temporary / "trained_pairs.pt"
        save_torch(load_file(source / hub.PAIRS)["trained_pairs"], pairs)
        assemble(target, {WEIGHTS["ema"]: source / hub.WEIGHTS, pairs.name: pairs}, about["info"])
        pairs.unlink()
        with suppress(OSError):  # another process was faster
            os.rename(temporary, kept)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot unpack {source} to {kept}: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return kept


def assemble(target: Path, files: dict[str, Path], info: dict[str, Any]) -> Path:
    """A checkpoint `target` of files that exist already, by the names that they get. Raises `OSError`."""
    temporary = target.with_name(f".{target.name}.tmp")
    _make_room(temporary)
    for name, file in files.items():
        try:
            os.link(file.resolve(), temporary / name)
        except OSError:  # another disk, or one without links
            shutil.copyfile(file, temporary / name)
    rest = {key: value for key, value in info.items() if key != "sha256"}
    _complete(temporary, target, rest, {name: sha256_of(temporary / name) for name in files})
    return target


def damage(path: Path) -> str:
    """What is wrong with the files of the checkpoint `path`: the first that is missing or not as it was
    written, or nothing.

    A checkpoint from before there were digests is taken as it is.
    """
    try:
        info = load_info(path)
        for name in info.get("sha256", {}):
            if name != INFO:
                _undamaged(path / name)
    except UserError as error:
        return str(error)
    return ""


def newest_whole(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest undamaged checkpoint in `folder`, and the damaged ones that are newer, each with its
    damage."""
    damaged: dict[Path, str] = {}
    for path in reversed(steps(folder)):
        if not (found := damage(path)):
            return path, damaged
        damaged[path] = found
    return None, damaged


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing takes it for one and nothing is lost; its new place."""
    aside = path.with_name(f"damaged_{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    return aside


def _undamaged(file: Path) -> Path:
    """`file` itself, once it is known to be what its checkpoint wrote. Raises `UserError`."""
    info = file.with_name(INFO)
    digests = read_json(info).get("sha256", {}) if info.is_file() else {}
    if file.name in digests:
        if not file.is_file():
            raise UserError(f"{file} is missing; the checkpoint is not whole")
        if sha256_of(file) != digests[file.name]:
            raise UserError(f"{file} is damaged: its SHA-256 is not the one in {INFO}")
    return file


def load_info(path: Path) -> dict[str, Any]:
    """The checkpoint's info.json. Raises `UserError` where it is missing, foreign or damaged."""
    info = read_json(path / INFO)
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise UserError(
            f"{path}/info.json is not of checkpoint format {FORMAT}; this checkpoint was written by "
            "something else"
        )
    if _digest_of(info) != info.get("sha256", {}).get(INFO, _digest_of(info)):
        raise UserError(f"{path}/{INFO} is damaged: its SHA-256 is not the one that it holds")
    return info


def load_weights(path: Path, which: str) -> dict[str, Tensor]:
    """The `raw` or `ema` weights, whole: beside averages the raw file holds only what has one."""
    file, averages = path / WEIGHTS[which], path / WEIGHTS["ema"]
    if not file.is_file():
        others = [name for name, other in WEIGHTS.items() if (path / other).is_file()]
        raise UserError(f"checkpoint {path} has no '{which}' weights; it has {', '.join(others) or 'none'}")
    try:
        weights = load_file(_undamaged(file))
        if which == "raw" and averages.is_file():
            file = _undamaged(averages)
            with safe_open(averages, "pt") as averaged:
                weights |= {
                    name: averaged.get_tensor(name) for name in sorted(set(averaged.keys()) - weights.keys())
                }
        return weights
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is damaged or no safetensors file: {error}") from None


def best_kind(path: Path) -> str:
    """The kind of weights that an evaluation of the checkpoint `path` would use: averaged ones, if it has
    them."""
    return "ema" if (path / WEIGHTS["ema"]).is_file() else "raw"


def load_torch(file: Path) -> Any:
    """A file written by `torch.save`, whole and undamaged. Raises `UserError`."""
    try:
        return torch.load(_undamaged(file), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no such file: {file}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{file} is damaged or no PyTorch file: {str(error).splitlines()[0]}") from None


def load_trained_pairs(path: Path) -> np.ndarray:
    """The fingerprints (N,) uint64 of the pairs that a checkpoint was trained on."""
    return load_torch(path / "trained_pairs.pt").numpy().view("uint64")
