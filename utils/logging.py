"""Where a run's numbers go: metrics.jsonl always, the console's progress bar, wandb when asked for."""

import json
import math
import sys
from pathlib import Path
from typing import Any, Literal, TextIO

from tqdm import tqdm

from config.base import Config
from utils.distributed import World
from utils.errors import UserError
from utils.files import write_atomically


class LoggingConfig(Config):
    """wandb: disabled, offline (files only, no account) or online. progress: draw a progress bar."""

    wandb: Literal["disabled", "offline", "online"]
    progress: bool


class RunLogger:
    """Rank 0 writes; the other ranks get an object whose methods do nothing."""

    def __init__(self, config: LoggingConfig, folder: Path, project: str, name: str, settings: dict, world: World, total: int, start: int):
        self.active = world.is_main
        self.wandb = None
        if not self.active:
            return
        self.file = _open_from(folder / "metrics.jsonl", start)
        self.bar = tqdm(
            total=total, initial=start, unit="step", dynamic_ncols=True, disable=not config.progress, file=sys.stderr, mininterval=0.5
        )
        if config.wandb != "disabled":
            self.wandb = _start_wandb(config.wandb, folder, project, name, settings)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Record `values` under `step`."""
        if not self.active:
            return
        self.file.write(json.dumps({"step": step, **{name: _finite(value) for name, value in values.items()}}, allow_nan=False) + "\n")
        self.file.flush()
        if self.wandb:
            self.wandb.log(values, step=step)

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

    def close(self) -> None:
        """Flush and close everything."""
        if self.active:
            self.bar.close()
            self.file.close()
            if self.wandb:
                self.wandb.finish()


def _open_from(path: Path, step: int) -> TextIO:
    """The file, open for appending, without lines beyond `step`, which a killed run wrote and a resumed one will write again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if len(kept) < len(lines):
        write_atomically(path, lambda temporary: temporary.write_text("".join(kept), encoding="utf-8"))
    return path.open("a", encoding="utf-8")


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _start_wandb(mode: str, folder: Path, project: str, name: str, settings: dict):
    try:
        import wandb
    except ImportError:
        raise UserError("logging.wandb asks for wandb, which is not installed: pip install wandb, or logging.wandb=disabled") from None
    return wandb.init(mode=mode, dir=str(folder), project=project, name=name, config=settings, id=name, resume="allow")
