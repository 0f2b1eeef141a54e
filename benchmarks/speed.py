"""Training and evaluation against an ancestor's: python -m benchmarks.speed --against PATH --what {etrm,trm,eval}

PATH is a checkout of SamsungSAILMontreal/TinyRecursiveModels (trm) or bdsaglam/etrm (etrm, eval), which runs unchanged in a
process of its own. Theirs and ours take turns on the same ARC-AGI-1 tasks, with the same model sizes, precision and batch.

etrm    a training step of the seed ETRM: ours on the task's canvas, and on the full canvas with the same mathematics
trm     a training step of the original TRM: ours on the full canvas and on the task's
eval    an evaluation of the ETRM from weights to pass@k
small   no ancestor: our own compiled step against the plain one, in a model so small that PyTorch's overhead is most of it
build   the datasets: `python -m benchmarks.data`
"""

import argparse
import json
import shlex
import sys
import tempfile
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import data
from benchmarks.data import ETRM, RESULTS, TRM, machine, record
from benchmarks.identical import ENCODER, as_the_ancestor, load_ancestor
from benchmarks.processes import ROOT, Contestant, require_checkout, run
from benchmarks.steps import build_sampler, cells
from benchmarks.useful import linear_rate, useful_flops
from config import compose
from config.schema import PretrainConfig
from dataset import augment
from dataset import store as datasets
from dataset.batch import materialise
from dataset.views import EvaluationSet
from models.core import DataSizes
from models.trm import build_model
from utils.checkpoint import git_commit
from utils.device import choose_device
from utils.distributed import World
from utils.errors import UserError, reports_user_errors

STEPS = ROOT / "benchmarks" / "ancestors" / "steps.py"
TRM_FILES, ETRM_FILES = ("pretrain.py", "models/recursive_reasoning/trm.py"), ("pretrain_etrm.py", "models/recursive_reasoning/etrm.py")
SECTION = "Training and evaluation"
SLOTS = 10  # demonstrations that the ETRM ancestor encodes, empty ones included
BATCHES = 8  # different ones that the ancestor sees
SAME_CONTEXT = 1e-3
EVALUATED_TASKS = 4
# What both sides have in common; --arch changes it for both.
ARCH = {
    "hidden_size": 512,
    "num_heads": 8,
    "expansion": 4,
    "L_layers": 2,
    "H_cycles": 3,
    "L_cycles": 4,
    "halt_max_steps": 16,
    "halt_exploration_prob": 0.1,
    "forward_dtype": "bfloat16",
}


@dataclass(frozen=True)
class Side:
    """One contestant: its name, how many steps it makes in a round, its useful FLOPs per sample unless it reports them."""

    name: str
    contestant: Contestant
    steps: int
    flops: float | None = None


@dataclass
class Result:
    """What the rounds of one contestant took."""

    side: Side
    rounds: list[dict[str, float]]

    @property
    def rates(self) -> np.ndarray:
        """Samples per second, by round."""
        return np.array([done["samples"] / done["seconds"] for done in self.rounds])

    @property
    def useful_rate(self) -> float | None:
        """Useful FLOP/s over all rounds; None where nothing is counted."""
        seconds = sum(done["seconds"] for done in self.rounds)
        if self.side.flops is not None:
            return self.side.flops * sum(done["samples"] for done in self.rounds) / seconds
        return sum(done["flops"] for done in self.rounds) / seconds if "flops" in self.rounds[0] else None

    @property
    def memory(self) -> float:
        """Peak, in bytes."""
        return self.rounds[-1]["memory"]


def spread(values: np.ndarray, digits: int) -> str:
    """Median [lowest, highest]."""
    return f"{np.median(values):,.{digits}f} [{values.min():,.{digits}f}, {values.max():,.{digits}f}]"


def their_config(options: argparse.Namespace) -> dict[str, Any]:
    """The ancestor's configuration, as its YAML files and `ARCH` have it."""
    encoder = options.what != "trm"
    arch = {
        **ARCH,
        **options.arch,
        "loss": {"name": "losses@ACTLossHead", "loss_type": "stablemax_cross_entropy"},
        "H_layers": 0,
        "pos_encodings": "rope",
        "puzzle_emb_len": 16,
        "mlp_t": False,
        "no_ACT_continue": True,
    }
    rates = {"lr": 1e-4, "lr_min_ratio": 1.0, "lr_warmup_steps": 2000, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95}
    common = {**rates, "data_paths": [], "global_batch_size": options.batch, "epochs": 10**6, "ema": True, "ema_rate": 0.999}
    if encoder:
        return {**common, "arch": {**arch, "name": "recursive_reasoning.etrm@TRMWithEncoder", "puzzle_emb_ndim": 0}, "grad_clip_norm": 1.0}
    arch |= {"name": "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1", "puzzle_emb_ndim": arch["hidden_size"]}
    return {**common, "arch": arch, "puzzle_emb_lr": 1e-2, "puzzle_emb_weight_decay": 0.1}


def our_overrides(options: argparse.Namespace, dataset: Path, *more: str) -> list[str]:
    """Our configuration with the same sizes; `more` follows."""
    shared = [f"arch.{name}={value}" for name, value in {**ARCH, **options.arch}.items()]
    batch = [f"global_batch_size={options.batch}", f"device={options.device}", f"data.path='{dataset}'"]
    return [*more[:2], *shared, *batch, "data.query_sampling=test", "objective=stablemax", *more[2:]]


def their_batches(config: PretrainConfig, count: int, file: Path) -> float:
    """Write batches of the samples of `config`, on the full canvas, as the ancestors' loaders give them; useful FLOPs per sample."""
    store = datasets.load(config.data.path, *config.layouts)
    sampler, drawn, flops = build_sampler(config, store), [], 0.0
    for step, cell in zip(range(count), cells(sampler), strict=False):
        batch = materialise(sampler.sample(step, cell), store, store.grid_table).data
        flops += useful_flops(config, batch) / config.global_batch_size / count
        drawn.append(in_their_layout(batch))
    np.savez(file, **{name: np.stack([batch[name] for batch in drawn]) for name in drawn[0]})
    return flops


def in_their_layout(batch: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A batch as int32, its demonstrations filled up with empty slots."""
    arrays = {name: values.numpy() if name == "demo_mask" else values.to(torch.int32).numpy() for name, values in batch.items()}
    for name in arrays.keys() & {"demo_inputs", "demo_labels", "demo_mask"}:
        missing = SLOTS - arrays[name].shape[1]
        arrays[name] = np.pad(arrays[name], [(0, 0), (0, missing), *[(0, 0)] * (arrays[name].ndim - 2)])
    return arrays


def their_views(config: PretrainConfig, folder: Path) -> int:
    """Write the evaluation views of `config` as the ETRM ancestor reads them, with its list of names and its tasks; their number."""
    store = datasets.load(config.data.path, *config.layouts)
    questions = EvaluationSet(store, config.data, "test", config.evaluation.num_views, config.seed, max_tasks=EVALUATED_TASKS)
    names, drawn, number = ["<blank>"], [], 0
    for batch in questions.batches(config.evaluation.batch_size):
        samples = batch.samples[: batch.valid]
        arrays = in_their_layout(materialise(samples, store, store.grid_table, with_labels=False).data)
        for row, (query, view) in enumerate(zip(batch.query, batch.view, strict=False)):
            if row == batch.valid:
                break
            transform, colours = questions.view(questions.queries[query], view)
            task = store.task_ids[questions.queries[query].task]
            name = augment.names_of(task, np.array([transform]), colours[None])[0] if view else task
            arrays["puzzle_identifiers"][row] = len(names)
            names.append(name)
        drawn.append(arrays)
        number += batch.valid
    rows = {name: np.concatenate([arrays[name] for arrays in drawn]) for name in drawn[0]}
    missing = -number % config.global_batch_size  # padded like the ancestor's last batch, by rows of the blank identifier
    rows = {name: np.pad(values, [(0, missing), *[(0, 0)] * (values.ndim - 1)]) for name, values in rows.items()}
    np.savez(folder / "views.npz", **{name: values.reshape(-1, config.global_batch_size, *values.shape[1:]) for name, values in rows.items()})
    (folder / "identifiers.json").write_text(json.dumps(names))
    tasks = {store.task_ids[task]: store.task(int(task)).to_json() for task in questions.tasks}
    (folder / "test_puzzles.json").write_text(json.dumps(tasks))
    return number
