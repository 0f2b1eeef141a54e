"""Stored predictions, made by hand."""

import numpy as np

from evaluation import predictions
from evaluation.predictions import Predictions
from evaluation.voting import key_of
from utils.files import write_json

A, B, C = (np.array([[value]], np.uint8) for value in (1, 2, 3))
NOTHING = np.zeros((0, 0), np.uint8)


def about(**changes) -> dict:
    """What the experiments read of results.json."""
    return {
        "protocol": "inductive",
        "split": "test",
        "dataset": {"path": "data/x", "sha256": "d"},
        "checkpoint": {"path": "runs/x", "sha256": "c", "weights": "ema", "file": "ema.safetensors"},
        "model": {"arch": "etrm"},
        "num_views": 16,
        "ranking": "votes",
        "seed": 0,
        "record_steps": False,
        "vote_stop": False,
        "scores": [{"metric": f"ARC/pass@{k}"} for k in (1, 2)],
        "prediction_seconds": 8.0,
        "peak_gpu_memory_bytes": None,
        "device": "CPU",
        "git_commit": "g",
        "command": "evaluate.py",
        **changes,
    }


def synthetic(
    tasks: int, views: int, act_steps: int = 1, seed: int = 0
) -> tuple[Predictions, list[str], list]:
    """Two queries for every third task; the chance that a view is right grows with the ACT step."""
    rng = np.random.default_rng(seed)
    kept, names, truths = Predictions(), [], []
    for task in range(tasks):
        for _ in range(1 + (task % 3 == 0)):
            query, truth = len(names), rng.integers(0, 10, rng.integers(1, 6, 2)).astype(np.uint8)
            wrong = [rng.integers(0, 10, (2, 2)).astype(np.uint8) for _ in range(4)]
            chance = rng.random()
            for view in range(views):
                for step in range(1, act_steps + 1):
                    right = rng.random() < chance * step / act_steps
                    kept.add(
                        query,
                        view,
                        step,
                        truth if right else wrong[rng.integers(4)],
                        float(np.float32(rng.normal() + right)),
                    )
            names.append(f"task{task}")
            truths.append(key_of(truth))
    return kept, names, truths


def write(folder, kept, names, truths, **changes) -> predictions.StoredPredictions:
    folder.mkdir(parents=True, exist_ok=True)
    predictions.save(
        folder / predictions.FILE,
        kept,
        names,
        [names[:i].count(name) for i, name in enumerate(names)],
        truths,
    )
    write_json(folder / "results.json", about(**changes))
    return predictions.load(folder)
