"""Accuracy against the number of augmented views that vote, from one run: python -m experiments.acc_vs_aug FOLDER

The views of stored predictions (evaluate.py ... save_predictions=true) are subsampled: the unaugmented view always votes, the
others in random order, anew in each of --draws draws. Writes acc_vs_aug.csv with a row per number of augmentations:
  augmentations, views (one more), mean_top1, ci95_lo, ci95_hi, num_tasks, num_examples (queries), draws, dataset_path,
  dataset_dir_sha256 (the dataset's content hash), checkpoint_sha256
mean_top1 is the mean over tasks of the share of a task's queries whose first answer is right, averaged over the draws; the
interval is a bootstrap over tasks. Where a query has fewer views, all of them vote. Time and memory of a smaller number
of views are not measured here (experiments/efficiency.py).
"""

import csv
import io
from pathlib import Path

import numpy as np

from evaluation import predictions, statistics
from evaluation.metrics import solved_within
from evaluation.predictions import StoredPredictions
from evaluation.voting import Ranking, VoteTable
from experiments.commands import for_predictions, origin, percent
from utils.errors import UserError, reports_user_errors
from utils.files import write_atomically


def levels_of(num_views: int) -> list[int]:
    """Numbers of views: powers of two, and all of them."""
    return sorted({*(2**i for i in range(num_views.bit_length())), num_views})


def first_right(
    stored: StoredPredictions, levels: list[int], draws: int, ranking: Ranking, seed: int
) -> np.ndarray:
    """(Q, levels) the share of draws in which the first answer to each labelled query is right, views in random order."""
    rows, answers = stored.predictions.rows(), list(stored.predictions.answers)
    borders = np.searchsorted(rows["query"], np.arange(len(stored.truths) + 1)).tolist()
    views, numbers, logits, agreements = (
        rows[name].tolist() for name in ("view", "answer", "q_halt_logit", "agreement")
    )
    shares = np.zeros((len(stored.labelled), len(levels)))
    for draw in range(draws):
        order = {}
        for query in stored.labelled:
            first, end = borders[query], borders[query + 1]
            others = np.random.default_rng([seed, draw, query]).permutation(np.arange(first + 1, end))
            order[query] = [*range(first, min(first + 1, end)), *others.tolist()]
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
    """The lines of acc_vs_aug.csv."""
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
            "elapsed_seconds": None,  # as the next two: all levels come from one prediction run
            "avg_time_per_original_example": None,
            "peak_gpu_memory_bytes": None,
            "dataset_path": about["data_paths"][0],
            "dataset_dir_sha256": about["dataset_sha256"],
            "checkpoint_sha256": about["checkpoint_sha256"],
        }
        for i, views in enumerate(levels)
    ]


def write_csv(path: Path, rows: list[dict]) -> None:
    """`rows`, all with the same keys, as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8"))


@reports_user_errors
def main() -> None:
    parser = for_predictions("experiments.acc_vs_aug", __doc__)
    parser.add_argument("--draws", type=int, default=20, help="random orders of the views")
    parser.add_argument(
        "--views", type=int, nargs="+", help="numbers of views (default: powers of two, and all)"
    )
    options = parser.parse_args()
    stored = predictions.load(options.folder)
    levels = sorted(set(options.views)) if options.views else levels_of(stored.num_views)
    if options.draws < 1 or not 1 <= levels[0] <= levels[-1] <= stored.num_views:
        raise UserError(
            f"--views must lie within 1..{stored.num_views}, the views of {options.folder}, and --draws be 1 or more"
        )
    rows = rows_of(stored, levels, options.draws, options.ranking, options.seed)
    path = (options.output_dir or options.folder) / "acc_vs_aug.csv"
    write_csv(path, rows)
    for row in rows:
        print(f"{row['views']:>5} views  {percent(row['mean_top1'], row['ci95_lo'], row['ci95_hi'])}")
    print(f"{rows[0]['num_tasks']} tasks, {stored.about['protocol']}; {path}")


if __name__ == "__main__":
    main()
