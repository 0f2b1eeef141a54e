"""Measure a training step in float32 and in bfloat16, on one thread of a CPU and on all.

    python -m benchmarks.precision --record

The four take turns in one process, on the recipe rules_smoke with the options behind (for example
arch.hidden_size=512). Printed are samples per second, and the ratio to float32 on one thread in the same
round. What arch.forward_dtype=auto takes here stands above.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.data import RESULTS, machine, origin, record
from benchmarks.loaders import Rates, alternate, rules_dataset
from config import compose
from config.schema import PretrainConfig
from training.start import Run
from utils.arguments import parser_of, positive
from utils.device import faster_dtype
from utils.distributed import World
from utils.environment import git_commit
from utils.errors import reports_user_errors

SECTION = "Precision and threads"
DTYPES = ("float32", "bfloat16")
CPU = torch.device("cpu")


def contestant(run: Run, threads: int) -> Callable[[float], float]:
    """A function from a number of steps to the samples per second of `run` on so many threads."""

    def measure(steps: float) -> float:
        torch.set_num_threads(threads)
        run.step(run.sampler.sample(run.state.step))  # not counted, since caches are cold
        started = time.perf_counter()
        for step in range(int(steps)):
            # The same batches in every round and for all, since their costs differ.
            run.step(run.sampler.sample(step))
        return int(steps) * run.config.global_batch_size / (time.perf_counter() - started)

    return measure


def compare(dataset: Path, threads: int, rounds: int, steps: int, overrides: list[str]) -> dict[str, Rates]:
    """Samples per second by dtype and threads, after a round that is not counted."""
    common = ["experiment=rules_smoke", f"data.path='{dataset}'", "device=cpu", "compile=false"]
    contestants = {}
    for dtype in DTYPES:
        options = [*common, f"arch.forward_dtype={dtype}", *overrides]
        run = Run(compose.load(PretrainConfig, "pretrain", options), World())
        for count in dict.fromkeys((1, threads)):
            contestants[f"{dtype}, {count} thread{'s' * (count > 1)}"] = contestant(run, count)
    alternate(contestants, 1, 1)
    return alternate(contestants, rounds, steps)


def ratio(rates: Rates, base: Rates) -> str:
    """Median [lowest, highest] of the rounds' ratios."""
    found = np.array(rates.rounds) / np.array(base.rounds)
    return f"{np.median(found):.2f} [{found.min():.2f}, {found.max():.2f}]"


@reports_user_errors
def main() -> None:
    parser = parser_of("benchmarks.precision", __doc__)
    add = parser.add_argument
    add("--rounds", type=positive, default=5, help="in which all take their turn (default: %(default)s)")
    add("--steps", type=positive, default=8, help="of a turn (default: %(default)s)")
    add("--threads", type=positive, default=torch.get_num_threads(), help="beside one (default: all)")
    add("--record", action="store_true", help=f"append the results to benchmarks/{RESULTS.name}")
    add("overrides", nargs="*", metavar="key=value", help="as for pretrain_etrm.py")
    options = parser.parse_intermixed_args()
    dtype, why = faster_dtype(CPU)
    print(f"{machine(CPU)}; {git_commit()}; arch.forward_dtype=auto: {dtype}, {why}", flush=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as work:
        dataset = rules_dataset(Path(work) / "rules")
        found = compare(dataset, options.threads, options.rounds, options.steps, options.overrides)
    base = next(iter(found.values()))
    for name, rates in found.items():
        cells = [name, str(rates), ratio(rates, base)]
        print(f"{cells[0]:<24}{cells[1]:>24} samples/s{cells[2]:>24}")
        if options.record:
            record(RESULTS, [*origin("benchmarks.precision", CPU), *cells], SECTION)


if __name__ == "__main__":
    main()
