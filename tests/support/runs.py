"""Tiny runs: in this process, as a user would start them, and what they leave."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import evaluate
import pretrain_etrm
from config import compose
from config.schema import PretrainConfig
from dataset.batch import DataConfig, DataSizes
from dataset.store import Store
from evaluation.session import EvaluateConfig
from models.trm import count_parameters
from training.start import Run
from training.step import train_step
from utils import checkpoint
from utils.distributed import World
from utils.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "arch.hidden_size=32",
    "arch.num_heads=2",
    "arch.H_cycles=2",
    "arch.L_cycles=1",
    "arch.halt_max_steps=3",
    "arch.forward_dtype=float32",
    "data.buckets=[6]",
    "data.canvas_margin=0",
    "global_batch_size=8",
    "log_interval=1",
    "logging.progress=false",
    "compile=false",
    "device=cpu",
]
ALONE = World()
CPU = torch.device("cpu")
TRAINER = ("lr_warmup_steps=2", "train_steps=20")


def load_config(store: Store, *overrides: str) -> PretrainConfig:
    """A tiny configuration for a dataset."""
    return _composed(store.metadata.layout, f"data.path={store.path}", *overrides)


@functools.cache
def _composed(layout: str, *overrides: str) -> PretrainConfig:
    return compose.load(PretrainConfig, "pretrain", [*_layout_keys(layout), *TINY, *overrides])


def _layout_keys(layout: str) -> list[str]:
    return [] if layout == "fewshot" else ["arch=trm", "data.augmentation=table", "arch.puzzle_emb_len=2"]


def data_config_of(store, **changes) -> DataConfig:
    """The data part of a tiny configuration, with changes."""
    return load_config(store).data.model_copy(update=changes)


def run(
    *arguments: str, world: int = 1, cwd: Path = ROOT, timeout: float = 300, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run a script or module of the project as a user would, under torchrun for `world` > 1."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(
        [sys.executable, *launcher, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=timeout,
        env=environment,
    )


def evaluate_here(*overrides: str) -> None:
    """An evaluation in this process, as the command runs it."""
    evaluate.run(compose.load(EvaluateConfig, "evaluate", ["device=cpu", *overrides]))


class Trainer(Run):
    """A tiny run in this process: of `config`, or of the usual one with `overrides`."""

    device = CPU

    def __init__(self, store, *overrides: str, config: PretrainConfig | None = None, world: World = ALONE):
        config = config or load_config(store, *TRAINER, *overrides)
        super().__init__(config.model_copy(update={"ema": True, "ema_rate": 0.9}), world)
        self.store = store
        _ = self.state  # made now, so that what cannot be made is refused here

    def batch(self, samples=None):
        return super().batch(self.samples() if samples is None else samples)

    def steps(self, count: int) -> list[float]:
        results = [train_step(self.state, self.batch(), self.config, self.world) for _ in range(count)]
        return [(result.metrics["lm_loss"] / result.metrics["rows"]).item() for result in results]


def set_counts(trainer: Trainer) -> None:
    """Let tasks have been answered differently well, which tiny models never do."""
    errors = trainer.state.task_errors
    if errors and trainer.world.is_main:
        errors.pending[0], errors.pending[1] = 9, torch.arange(errors.pending.shape[1]) % 10


def arguments_for(store, output: Path, *overrides: str) -> list[str]:
    """The command line of a tiny run."""
    folders = [f"data.path={store.path}", f"output_dir={output}", "run_name=r"]
    return ["pretrain_etrm.py", *_layout_keys(store.metadata.layout), *TINY, *folders, *overrides]


def train_here(store, output: Path, *overrides: str) -> Path:
    """A run in this process, as the command runs it; its folder."""
    pretrain_etrm.train(
        compose.load(PretrainConfig, "pretrain", arguments_for(store, output, *overrides)[1:])
    )
    return output / "r"


def weights_of(output: Path, step: int, which: str = "raw") -> dict[str, torch.Tensor]:
    """The weights of a checkpoint of the run in `output`."""
    return checkpoint.load_weights(output / "r" / "checkpoints" / f"step_{step}", which)


def without_digests(path: Path) -> None:
    """Make a checkpoint one from before there were digests."""
    info = read_json(path / checkpoint.INFO)
    info.pop("sha256", None)
    write_json(path / checkpoint.INFO, info)


def untrained(store, folder, *overrides: str):
    """A checkpoint of a model that has taken no step."""
    trainer = Trainer(store, *overrides)
    torch.manual_seed(1)
    with torch.no_grad():
        parameter = trainer.state.model.lm_head.weight
        torch.nn.init.normal_(parameter)[:2] = 0  # every view has an answer, and they differ
    trainer.state.ema.load(dict(trainer.state.model.named_parameters()))
    info = {
        "config": trainer.config.model_dump(),
        "sizes": vars(DataSizes.of(store, trainer.config.data)),
        "data": {
            "path": str(store.path),
            "layout": store.metadata.layout,
            "game": store.metadata.game,
            "hash": store.metadata.content_hash,
        },
        "parameters": count_parameters(trainer.state.model),
        "git_commit": None,
    }
    return trainer.state.save(folder, ALONE, info, keep=1)


def called(monkeypatch, main, *arguments) -> None:
    """Call an entry point with these arguments on its command line."""
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
    main()


def train_briefly(store, output: Path, *overrides: str) -> Path:
    """A quick run in this process; its folder."""
    return train_here(
        store, output, "arch.H_cycles=1", "arch.halt_max_steps=2", "log_interval=50", *overrides
    )


def metrics_of(folder: Path) -> list[dict]:
    """The lines that a run has logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder: Path) -> list[str]:
    """The names of a run's checkpoints."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())
