"""Where a run's numbers and pictures go: metrics.jsonl and the console always, wandb and TensorBoard when
asked for."""

import json
import sys
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO
from uuid import uuid4

import numpy as np
from pydantic import PositiveInt
from tqdm import tqdm

from utils.config import Config
from utils.distributed import World
from utils.errors import UserError
from utils.extras import require
from utils.files import as_json, write_atomically
from utils.images import write_png


class LoggingConfig(Config):
    """wandb: disabled, offline (files only, no account) or online. tensorboard: write event files. progress:
    draw a bar.

    images_interval: steps between pictures of predictions, null for none. images_samples: tasks in each
    picture.
    """

    wandb: Literal["disabled", "offline", "online"]
    tensorboard: bool
    progress: bool
    images_interval: PositiveInt | None
    images_samples: PositiveInt


class Sink(Protocol):
    """One place that numbers and pictures go to. What it cannot show (a word, a None) it leaves out."""

    def log(self, step: int, values: dict[str, Any]) -> None: ...

    def image(self, step: int, name: str, file: Path, pixels: np.ndarray) -> None: ...

    def close(self) -> None: ...


class RunLogger:
    """Rank 0 writes; the other ranks get an object whose methods do nothing."""

    def __init__(
        self,
        config: LoggingConfig,
        folder: Path,
        project: str,
        name: str,
        settings: dict,
        world: World,
        total: int,
        start: int,
    ):
        require_extras(config)
        self.active, self.folder = world.is_main, folder
        self.sinks: list[Sink] = []
        self.noted: set[str] = set()
        if not self.active:
            return
        lines = JsonLines(folder / "metrics.jsonl", start)
        self.sinks.append(lines)
        if config.wandb != "disabled":
            self.sinks.append(Wandb(config.wandb, folder, project, name, settings))
        if config.tensorboard:
            self.sinks.append(TensorBoard(folder / "tensorboard", start))
        self.bar = tqdm(
            total=total,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=not config.progress,
            file=sys.stderr,
            mininterval=0.5,
        )
        if lines.damaged:
            self.say(
                f"metrics.jsonl: {lines.damaged} damaged line(s) left out; the file as it was is "
                "damaged_metrics.jsonl"
            )

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Record `values` under `step`."""
        for sink in self.sinks:
            sink.log(step, values)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Write (H, W, 3) uint8 as `images/<name>_<step>.png` and record it under `name`."""
        if self.active:
            file = self.folder / "images" / f"{name}_{step}.png"
            write_png(file, pixels)
            for sink in self.sinks:
                sink.image(step, name, file, pixels)

    def progress(self, step: int, values: dict[str, str]) -> None:
        """Move the progress bar to `step`, with `values` beside it."""
        if self.active:
            self.bar.n = step
            self.bar.set_postfix(values, refresh=False)
            self.bar.refresh()

    def say(self, message: str) -> None:
        """Print a line without tearing the progress bar."""
        if self.active:
            self.bar.write(message, file=sys.stderr)

    def note(self, message: str) -> None:
        """Print a line, unless it has been printed before."""
        if message not in self.noted:
            self.noted.add(message)
            self.say(message)

    def close(self) -> None:
        """Flush and close everything."""
        if self.active:
            self.bar.close()
        for sink in self.sinks:
            sink.close()


class JsonLines:
    """metrics.jsonl: one object per line. A picture is a file of its own already."""

    def __init__(self, path: Path, start: int):
        self.file, self.damaged = _open_from(path, start)

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.file.write(json.dumps(as_json({"step": step, **values}), allow_nan=False) + "\n")
        self.file.flush()

    def image(self, step: int, name: str, file: Path, pixels: np.ndarray) -> None:
        pass

    def close(self) -> None:
        self.file.close()


class Wandb:
    """A run of Weights & Biases, which a resumed run continues by the id that its folder keeps."""

    def __init__(
        self, mode: Literal["offline", "online"], folder: Path, project: str, name: str, settings: dict
    ):
        import wandb

        self.wandb = wandb
        file = folder / "wandb_id"
        if not file.is_file():
            write_atomically(file, lambda temporary: temporary.write_text(uuid4().hex, encoding="utf-8"))
        known = file.read_text(encoding="utf-8")
        try:
            self.run = wandb.init(
                mode=mode,
                dir=str(folder),
                project=project,
                name=name,
                config=settings,
                id=known,
                resume="allow",
            )
        except (wandb.errors.Error, OSError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(
                f"logging.wandb={mode}: {reason}; log in with `wandb login` or WANDB_API_KEY, or use "
                "logging.wandb=offline"
            ) from None

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.run.log(values, step=step)

    def image(self, step: int, name: str, file: Path, pixels: np.ndarray) -> None:
        self.run.log({name: self.wandb.Image(str(file))}, step=step)

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Event files; what a killed run wrote beyond `start` is hidden from view."""

    def __init__(self, folder: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=start + 1)

    def log(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, file: Path, pixels: np.ndarray) -> None:
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


def require_extras(config: LoggingConfig) -> None:
    """Raise `UserError` where the configuration asks for a package that is not installed."""
    if config.wandb != "disabled":
        require("wandb", f"logging.wandb={config.wandb}", "logging.wandb=disabled")
    if config.tensorboard:
        require("tensorboard", "logging.tensorboard=true", "logging.tensorboard=false")
    if config.images_interval is not None:
        require("PIL", f"logging.images_interval={config.images_interval}", "logging.images_interval=null")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, without lines that are not whole; none when there is no such
    file."""
    return [record for _, record in _records(path) if record is not None]


def _records(path: Path) -> list[tuple[str, dict[str, Any] | None]]:
    """Every line of a metrics.jsonl with its record; None for one that a crash or a power loss has
    damaged."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [(line, _record(line)) for line in lines]


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _open_from(path: Path, step: int) -> tuple[TextIO, int]:
    """The file, open for appending, and how many damaged lines were left out.

    Lines beyond `step` go: a killed run wrote them and a resumed one will write them again. A file with
    damaged lines is kept beside it. The last line of a killed run is often cut short, which is no damage
    worth a word.
    """
    records = _records(path)
    damaged = sum(record is None for line, record in records if line.endswith("\n"))
    if damaged:
        copy = path.with_name(f"damaged_{path.name}")
        write_atomically(copy, lambda temporary: temporary.write_bytes(path.read_bytes()))
    kept = [line for line, record in records if record is not None and record["step"] <= step]
    if len(kept) < len(records):
        write_atomically(path, lambda temporary: temporary.write_text("".join(kept), encoding="utf-8"))
    return path.open("a", encoding="utf-8"), damaged
