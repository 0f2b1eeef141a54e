"""Voting over all views against the unaugmented view alone: python -m experiments.votes_against_one_view FOLDER

Both modes come from the same predictions (evaluate.py ... save_predictions=true controls=[]). Writes
  exp1_table.json   paper_mode, single_aug: {mean, ci95, n, votes_histogram {bins, counts}}; delta_paper_minus_single, delta_ci95
  exp1_report.json  the same run in full: modes.{paper, single_aug}.{label, metrics, ...}, seed, commands, environment
The mean is over tasks of the share of a task's queries whose first answer is right, n the number of tasks. Intervals are
95 % bootstrap intervals over tasks; the difference is resampled in pairs.
"""

import platform
from typing import Any

import numpy as np
import torch

from evaluation import predictions, statistics
from evaluation.metrics import solved_within
from evaluation.predictions import StoredPredictions
from evaluation.voting import VoteTable
from experiments.commands import for_predictions, origin, percent
from utils.errors import reports_user_errors
from utils.files import write_json

MODES = {
    "paper": ("paper_mode", None),
    "single_aug": ("single_aug", {0}),
}  # mode: name in the table, views that vote
PASS_KS = (1, 2, 5, 10, 100, 1000)


def table_of(stored: StoredPredictions, votes: dict[str, VoteTable], seed: int) -> dict[str, Any]:
    """exp1_table.json."""
    right = {mode: stored.task_means(solved_within(stored.ranks(votes[mode]), 1)) for mode in MODES}
    columns = np.stack([right["paper"], right["single_aug"], right["paper"] - right["single_aug"]], axis=1)
    low, high = statistics.bootstrap(columns, seed)
    table: dict[str, Any] = {}
    for i, (mode, (name, _)) in enumerate(MODES.items()):
        bins, counts = np.unique(
            [votes[mode].num_votes(query) for query in stored.labelled], return_counts=True
        )
        table[name] = {
            "mean": float(right[mode].mean()),
            "ci95": [float(low[i]), float(high[i])],
            "n": len(columns),
            "votes_histogram": {"bins": bins.tolist(), "counts": counts.tolist()},
        }
    return {
        **table,
        "delta_paper_minus_single": float(columns[:, 2].mean()),
        "delta_ci95": [float(low[2]), float(high[2])],
    }


def mode_of(stored: StoredPredictions, mode: str, votes: VoteTable) -> dict[str, Any]:
    """One mode of exp1_report.json. Times are those of the one prediction run, which asked every view: null for a single view."""
    about, ranks = stored.about, stored.ranks(votes)
    views = MODES[mode][1]
    asked = sum(views is None or view in views for view in stored.predictions.rows()["view"].tolist())
    queries = len(stored.truths)
    seconds = about["prediction_seconds"] if views is None else None
    return {
        "label": mode,
        "data_paths": [about["dataset"]["path"]],
        "data_dir_hash": about["dataset"]["sha256"],
        "total_augmented_examples": asked,
        "original_test_pairs": queries,
        "augmentations_per_original": asked / queries,
        "elapsed_seconds": seconds,
        "avg_latency_seconds_per_augmented_example": seconds and seconds / asked,
        "avg_time_seconds_per_original_example": seconds and seconds / queries,
        "peak_gpu_memory_bytes": about["peak_gpu_memory_bytes"] if views is None else None,
        "metrics": {
            f"ARC/pass@{k}": float(stored.task_means(solved_within(ranks, k)).mean()) for k in PASS_KS
        },
        "checkpoint_dir": about["checkpoint"]["path"],
        "checkpoint_file": about["checkpoint"]["file"],
        "checkpoint_sha256": about["checkpoint"]["sha256"],
    }


@reports_user_errors
def main() -> None:
    options = for_predictions("experiments.votes_against_one_view", __doc__).parse_args()
    stored = predictions.load(options.folder)
    votes = {
        mode: stored.predictions.vote(options.ranking, views=views) for mode, (_, views) in MODES.items()
    }
    table = table_of(stored, votes, options.seed)
    report = {
        "experiment": "exp1_paper_vs_single",
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": stored.about["device"],
        },
        "seed": options.seed,
        "repo": {"commit": stored.about["git_commit"]},
        "config_summary": {**stored.about["model"], **origin(stored, options.ranking)},
        "commands": [stored.about["command"]],
        "modes": {mode: mode_of(stored, mode, votes[mode]) for mode in MODES},
    }
    folder = options.output_dir or options.folder
    write_json(folder / "exp1_table.json", table, indent=1)
    write_json(folder / "exp1_report.json", report, indent=1)
    for name in ("paper_mode", "single_aug"):
        print(f"{name:<26}{percent(table[name]['mean'], *table[name]['ci95'])}")
    print(f"{'difference':<26}{percent(table['delta_paper_minus_single'], *table['delta_ci95'])}")
    print(
        f"{table['paper_mode']['n']} tasks, {stored.about['protocol']}; {folder}: exp1_table.json, exp1_report.json"
    )


if __name__ == "__main__":
    main()
