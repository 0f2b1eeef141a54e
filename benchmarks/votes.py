"""Measure how long stored predictions take to load, vote and rank.

    python -m benchmarks.votes --queries 419 --views 100

The predictions are made up from seed 0: every query has 40 different answers, of 5 to 30 cells a side.
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from evaluation import predictions
from evaluation.predictions import Predictions
from evaluation.voting import key_of
from utils.arguments import parser_of, positive
from utils.errors import reports_user_errors
from utils.files import write_json

ANSWERS, SIDES = 40, (5, 31)  # per query; least side, and one more than the most


def write(folder: Path, queries: int, views: int) -> None:
    """Write an evaluation's stored predictions, in which every answer is equally likely."""
    rng = np.random.default_rng(0)
    made, truths = Predictions(), []
    for query in range(queries):
        answers = [rng.integers(0, 10, rng.integers(*SIDES, 2)).astype(np.uint8) for _ in range(ANSWERS)]
        truths.append(key_of(answers[0]))
        for view in range(views):
            made.add(query, view, 16, answers[rng.integers(ANSWERS)], float(rng.normal()))
    tasks = [f"task{query}" for query in range(queries)]
    predictions.save(folder / predictions.FILE, made, tasks, [0] * queries, truths)
    write_json(folder / "results.json", dict.fromkeys(predictions.ABOUT))  # none of it is read here


@reports_user_errors
def main() -> None:
    parser = parser_of("benchmarks.votes", __doc__)
    queries = "default: %(default)s, those of ARC-AGI-1's evaluation tasks"
    parser.add_argument("--queries", type=positive, default=419, help=queries)
    parser.add_argument("--views", type=positive, default=100, help="of each (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.queries, options.views)
        started = time.perf_counter()
        stored = predictions.load(Path(folder))
        loaded = time.perf_counter()
        votes = stored.predictions.vote()
        stored.ranks(votes)
        for query in stored.labelled:
            votes.ranked(query)
        done = time.perf_counter()
    # Linux counts kilobytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = f"load {loaded - started:.2f} s, vote and rank {done - loaded:.2f} s"
    print(f"{options.queries} queries x {options.views} views: {seconds}")
    print(f"peak memory {peak:.0f} MB, the making of the predictions included")


if __name__ == "__main__":
    main()
