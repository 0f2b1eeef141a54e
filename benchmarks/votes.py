"""How long stored predictions take to load, vote and rank: python -m benchmarks.votes [--queries N] [--views V]

Made-up answers, 40 different ones per query of 5 to 30 cells a side, drawn from seed 0.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from evaluation import predictions
from evaluation.predictions import Predictions
from evaluation.voting import key_of
from utils.arguments import positive
from utils.files import write_json

ANSWERS, SIDES = 40, (5, 31)


def write(folder: Path, queries: int, views: int) -> None:
    """An evaluation's stored predictions, every answer equally likely."""
    rng = np.random.default_rng(0)
    made, truths = Predictions(), []
    for query in range(queries):
        answers = [rng.integers(0, 10, rng.integers(*SIDES, 2)).astype(np.uint8) for _ in range(ANSWERS)]
        truths.append(key_of(answers[0]))
        for view in range(views):
            made.add(query, view, 16, answers[rng.integers(ANSWERS)], float(rng.normal()))
    predictions.save(
        folder / predictions.FILE, made, [f"task{query}" for query in range(queries)], [0] * queries, truths
    )
    write_json(folder / "results.json", {})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.votes", description=__doc__)
    parser.add_argument("--queries", type=positive, default=419, help="default: ARC-AGI-1 evaluation's")
    parser.add_argument("--views", type=positive, default=100)
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{options.queries} queries x {options.views} views: load {loaded - started:.2f} s, vote and rank {done - loaded:.2f} s"
    )
    print(f"peak memory {peak:.0f} MB, the making of the predictions included")


if __name__ == "__main__":
    main()
