"""What makes an ancestor and our own code do the same work: equal sizes, batches, views and contexts."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.identical import as_the_ancestor, load_ancestor
from benchmarks.processes import ROOT, run
from benchmarks.steps import buckets, build_sampler
from benchmarks.useful import useful_flops
from config.schema import PretrainConfig
from dataset import augment
from dataset.batch import DataSizes, materialise
from dataset.store import Store
from dataset.views import EvaluationSet
from models.trm import build_model

STEPS = ROOT / "benchmarks" / "ancestors" / "steps.py"
SLOTS = 10  # demonstrations that the ETRM ancestor encodes, empty ones included
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
# What the original's recipe for Sudoku-Extreme changes.
SUDOKU = {"L_cycles": 6, "mlp_t": True, "pos_encodings": "none"}


def sizes(options: argparse.Namespace) -> dict[str, Any]:
    """The sizes that both models have in common."""
    return {**ARCH, **(SUDOKU if options.what == "sudoku" else {}), **options.arch}


def their_config(options: argparse.Namespace) -> dict[str, Any]:
    """The ancestor's configuration, as its YAML files and `sizes` have it."""
    arch = {
        "pos_encodings": "rope",
        "mlp_t": False,
        **sizes(options),
        "loss": {"name": "losses@ACTLossHead", "loss_type": "stablemax_cross_entropy"},
        "H_layers": 0,
        "puzzle_emb_len": 16,
        "no_ACT_continue": True,
    }
    common = {
        "lr": 1e-4,
        "lr_min_ratio": 1.0,
        "lr_warmup_steps": 2000,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "data_paths": [],
        "global_batch_size": options.batch,
        "epochs": 10**6,
        "ema": True,
        "ema_rate": 0.999,
    }
    if options.what in ("trm", "sudoku"):
        arch["name"] = "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1"
        arch["puzzle_emb_ndim"] = arch["hidden_size"]
        return {**common, "arch": arch, "puzzle_emb_lr": 1e-2, "puzzle_emb_weight_decay": 0.1}
    arch["name"] = "recursive_reasoning.etrm@TRMWithEncoder"
    arch["puzzle_emb_ndim"] = 0
    return {**common, "arch": arch, "grad_clip_norm": 1.0}


def our_overrides(options: argparse.Namespace, dataset: Path, arch: str, data: str, *more: str) -> list[str]:
    """The overrides of our configuration `arch` on `data`, with the same sizes. `more` come last."""
    shared = [f"arch.{name}={value}" for name, value in sizes(options).items()]
    batch = [f"global_batch_size={options.batch}", f"device={options.device}", f"data.path='{dataset}'"]
    theirs = ["data.query_sampling=all", "objective=stablemax"]
    return [f"arch={arch}", f"data={data}", *shared, *batch, *theirs, *more]


def their_batches(config: PretrainConfig, count: int, file: Path) -> float:
    """Write batches of the samples of `config` as the ancestors' loaders give them.

    Returns their useful FLOPs per sample.
    """
    store = Store.load(config.data.path, *config.layouts)
    sampler, drawn, flops = build_sampler(config, store), [], 0.0
    for step, bucket in zip(range(count), buckets(sampler), strict=False):
        batch = materialise(sampler.sample(step, bucket), store, store.grid_table).data
        flops += useful_flops(config, batch) / config.global_batch_size / count
        drawn.append(in_their_layout(batch))
    np.savez(file, **{name: np.stack([batch[name] for batch in drawn]) for name in drawn[0]})
    return flops


def in_their_layout(batch: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A batch as int32 arrays, its demonstrations filled up with empty slots."""
    arrays = {
        name: values.numpy() if name == "demo_mask" else values.to(torch.int32).numpy()
        for name, values in batch.items()
    }
    for name in arrays.keys() & {"demo_inputs", "demo_labels", "demo_mask"}:
        missing = SLOTS - arrays[name].shape[1]
        arrays[name] = np.pad(arrays[name], [(0, 0), (0, missing), *[(0, 0)] * (arrays[name].ndim - 2)])
    return arrays


def their_views(config: PretrainConfig, tasks: int, folder: Path) -> None:
    """Write the evaluation views of the first `tasks` tasks as the ETRM ancestor reads them.

    Writes views.npz, the list of puzzle names and the tasks themselves into `folder`.
    """
    store = Store.load(config.data.path, *config.layouts)
    questions = EvaluationSet(
        store, config.data, "test", config.evaluation.num_views, config.seed, max_tasks=tasks
    )
    names, drawn = ["<blank>"], []
    for batch in questions.batches(config.evaluation.batch_size):
        samples = batch.samples[: batch.valid]
        arrays = in_their_layout(materialise(samples, store, store.grid_table, with_labels=False).data)
        for row, (query, view) in enumerate(zip(batch.query, batch.view, strict=False)):
            if row == batch.valid:  # what follows only fills the batch up
                break
            transform, colours = questions.view(questions.queries[query], view)
            task = store.task_ids[questions.queries[query].task]
            name = augment.names_of(task, np.array([transform]), colours[None])[0] if view else task
            # The ancestor knows a view by its identifier, and votes by its name.
            arrays["puzzle_identifiers"][row] = len(names)
            names.append(name)
        drawn.append(arrays)
    size, batches = config.global_batch_size, {}
    for name in drawn[0]:
        rows = np.concatenate([arrays[name] for arrays in drawn])
        # Filled up like the ancestor's last batch, by rows of the blank identifier.
        filled = np.pad(rows, [(0, -len(rows) % size), *[(0, 0)] * (rows.ndim - 1)])
        batches[name] = filled.reshape(-1, size, *rows.shape[1:])
    np.savez(folder / "views.npz", **batches)
    (folder / "identifiers.json").write_text(json.dumps(names))
    puzzles = {store.task_ids[task]: store.task(int(task)).to_json() for task in questions.tasks}
    (folder / "test_puzzles.json").write_text(json.dumps(puzzles))


def check_context(options: argparse.Namespace, config: PretrainConfig, work: Path) -> float:
    """The largest difference between the ancestor's context and ours from its weights, in float32.

    Contexts have an RMS of 1. `work` holds what `their_batches` wrote.
    """
    theirs = their_config(options)
    theirs["arch"]["forward_dtype"] = "float32"
    asked = {
        "config": theirs,
        "data": str(work / "batches.npz"),
        "output": str(work / "reference.pt"),
        "device": "cpu",
        "threads": options.threads,
    }
    run([str(STEPS), "reference", json.dumps(asked)], options.against)
    reference = torch.load(work / "reference.pt", weights_only=True)
    store = Store.load(config.data.path, *config.layouts)
    arch = config.arch.model_copy(update={"forward_dtype": "float32"})
    model = as_the_ancestor(build_model(arch, DataSizes.of(store, config.data), config.encoder)).eval()
    load_ancestor(model, reference["weights"])
    sampler = build_sampler(config, store)
    # The first of the batches that the ancestor got.
    batch = materialise(sampler.sample(0, next(buckets(sampler))), store, store.grid_table)
    with torch.no_grad():
        return float((model.context(batch.data).prefix - reference["context"]).abs().max())
