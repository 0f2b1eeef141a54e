"""Measure accuracy against the number of augmented views that vote, from one evaluation.

    python -m experiments.acc_vs_aug runs/NAME/evaluations/NAME --draws 20

The folder is that of an evaluation with save_predictions=true. Its views are subsampled in each of --draws
draws: the unaugmented view always votes, the others vote in a random order. Where a query has fewer views,
all of them vote. The command writes acc_vs_aug.csv with a row per number of augmentations:

    augmentations, views (one more), mean_top1, ci95_lo, ci95_hi, num_tasks, num_examples (queries), draws,
    elapsed_seconds, avg_time_per_original_example, peak_gpu_memory_bytes (of the evaluation: all views
    alone), dataset_path, dataset_dir_sha256 (the dataset's content hash), checkpoint_sha256

A task's value is the share of its queries whose first answer is right. mean_top1 is the mean over tasks,
averaged over the draws. The interval is a bootstrap over tasks. Time and memory of fewer views are not
measured here; experiments/efficiency.py measures them.
"""

import csv
import io
import sys
from pathlib import Path

import numpy as np

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from evaluation import predictions, statistics
from evaluation.metrics import solved_within
from evaluation.predictions import StoredPredictions
from evaluation.voting import Ranking, VoteTable
from experiments.commands import for_predictions, origin, percent
from utils.errors import UserError, reports_user_errors
from utils.files import write_atomically


def levels_of(num_views: int) -> list[int]:
    """The numbers of views to measure: powers of two, and all of them."""
    return sorted({*(2**i for i in range(num_views.bit_length())), num_views})


def first_right(
    stored: StoredPredictions, levels: list[int], draws: int, ranking: Ranking, seed: int
) -> np.ndarray:
    """(Q, levels) the share of draws in which the first answer to each labelled query is right.

    levels: ascending numbers of views.
    """
    rows, answers = stored.predictions.rows(), list(stored.predictions.answers)
    # The rows of query i are borders[i] to borders[i + 1], its unaugmented view first.
    borders = np.searchsorted(rows["query"], np.arange(len(stored.truths) + 1)).tolist()
    views, numbers, logits, agreements = (
        rows[name].tolist() for name in ("view", "answer", "q_halt_logit", "agreement")
    )
    shares = np.zeros((len(stored.labelled), len(levels)))
    for draw in range(draws):
        order = {}
        for query in stored.labelled:
            first, end = borders[query], borders[query + 1]
            # Seeded by query, so that one query's order does not depend on which others are labelled.
            others = np.random.default_rng([seed, draw, query]).permutation(np.arange(first + 1, end))
            order[query] = [*range(first, min(first + 1, end)), *others.tolist()]
        # One table for all levels: each adds the votes that the one before it lacks.
        votes = VoteTable(ranking)
        for column, (start, stop) in enumerate(zip([0, *levels], levels, strict=False)):
            for query, positions in order.items():
                for i in positions[start:stop]:
                    votes.count(query, views[i], answers[numbers[i]], logits[i], agreements[i])
            shares[:, column] += solved_within(stored.ranks(votes), 1)
    return shares / draws


def rows_of(
    stored: StoredPredictions, levels: list[int], draws: int, ranking: Ranking, seed: int
) -> list[dict]:
    """The rows of acc_vs_aug.csv."""
    means = stored.task_means(first_right(stored, levels, draws, ranking, seed))
    low, high = statistics.bootstrap(means, seed)
    about = origin(stored, ranking)
    return [
        {
            "augmentations": views - 1,
            "views": views,
            "mean_top1": float(means[:, i].mean()),
            "ci95_lo": float(low[i]),
            "ci95_hi": float(high[i]),
            "num_tasks": about["num_tasks"],
            "num_examples": about["num_queries"],
            "draws": draws,
            **_cost(stored, about["num_queries"], views),
            "dataset_path": about["data_paths"][0],
            "dataset_dir_sha256": about["dataset_sha256"],
            "checkpoint_sha256": about["checkpoint_sha256"],
        }
        for i, views in enumerate(levels)
    ]


def _cost(stored: StoredPredictions, queries: int, views: int) -> dict:
    """The ancestor's columns of time and memory, None where they were not measured."""
    # One evaluation asked all views; what fewer of them would have taken is not known.
    measured = views == stored.num_views
    seconds = stored.about.get("prediction_seconds") if measured else None
    return {
        "elapsed_seconds": seconds,
        "avg_time_per_original_example": seconds / queries if seconds is not None and queries else None,
        "peak_gpu_memory_bytes": stored.about["peak_gpu_memory_bytes"] if measured else None,
    }


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write `rows`, which all have the same keys, as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8"))


@reports_user_errors
def main() -> None:
    parser = for_predictions("experiments.acc_vs_aug", __doc__)
    add = parser.add_argument
    add("--draws", type=int, default=20, help="random orders of the views (default: %(default)s)")
    add("--views", type=int, nargs="+", help="numbers of views (default: powers of two, and all)")
    options = parser.parse_args()
    stored = predictions.load(options.folder)
    if stored.predictions.columns["rollout"].any():
        raise UserError(f"{options.folder} holds several attempts at each view; evaluate with rollouts=1")
    levels = sorted(set(options.views)) if options.views else levels_of(stored.num_views)
    if options.draws < 1 or not 1 <= levels[0] <= levels[-1] <= stored.num_views:
        raise UserError(
            f"--views must lie within 1..{stored.num_views}, the views of {options.folder}, "
            "and --draws be 1 or more"
        )
    rows = rows_of(stored, levels, options.draws, options.ranking, options.seed)
    path = (options.output_dir or options.folder) / "acc_vs_aug.csv"
    write_csv(path, rows)
    for row in rows:
        print(f"{row['views']:>5} views  {percent(row['mean_top1'], row['ci95_lo'], row['ci95_hi'])}")
    print(f"{rows[0]['num_tasks']} tasks, {stored.about['protocol']}; {path}")


if __name__ == "__main__":
    main()
