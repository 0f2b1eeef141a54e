"""Our training step or evaluation as a contestant of `benchmarks.speed`, which starts it.

    python -m benchmarks.steps train '{"overrides": ["arch=etrm"], "threads": 2, "identical": false}'

Each line of its input is a number of steps to take; `serve` answers with what they cost. Under torchrun the
first process answers for all.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.ancestors.turns import answer_channel, serve
from benchmarks.identical import as_the_ancestor
from benchmarks.useful import useful_flops
from config import compose
from config.schema import PretrainConfig
from dataset.batch import Bucket
from dataset.samplers import SAMPLERS, Sampler
from dataset.store import Store
from evaluation.progress import Progress
from evaluation.respondent import Respondent
from evaluation.run import Ask, evaluate
from training.start import Run
from training.step import train_step
from utils import distributed
from utils.arguments import parser_of
from utils.distributed import World

GOLDEN_RATIO = 0.5 * (5**0.5 - 1)


def build_sampler(config: PretrainConfig, store: Store) -> Sampler:
    """The sampler of a run of one process."""
    return SAMPLERS[store.metadata.layout](store, config.data, config.seed, config.global_batch_size)


def buckets(sampler: Sampler) -> Iterator[Bucket]:
    """The sampler's buckets in their shares, evenly spread: a few steps meet them as often as many would."""
    number = 0
    while True:
        number += 1
        # Multiples of the golden ratio spread evenly over [0, 1), however many there are.
        share = number * GOLDEN_RATIO % 1
        yield sampler.buckets[int(np.searchsorted(sampler.chances.bucket_cumulative, share, side="right"))]


def training(run: Run, identical: bool) -> Callable[[], dict[str, float]]:
    """A step as the training loop makes it, sampling included. Its counts are those of all processes.

    identical: with the ETRM ancestor's mathematics.
    """
    if identical:
        run.model = as_the_ancestor(run.model).to(run.device)
    order = buckets(run.sampler)

    def step() -> dict[str, float]:
        batch = run.batch(run.sampler.sample(run.state.step, next(order)))
        train_step(run.state, batch, run.config, run.world)
        count = run.world.size
        return {"samples": count * batch.size, "flops": count * useful_flops(run.config, batch.data)}

    return step


def evaluation(run: Run, tasks: int) -> Callable[[], dict[str, float]]:
    """An evaluation of the first `tasks` tasks of the test split, from weights to pass@k."""
    config, model = run.config, run.model
    nothing_trained = np.zeros(0, np.uint64)
    respondent = Respondent(
        model, run.store, run.table, config.data, config.objective, nothing_trained, run.world
    )
    ask = Ask(config.seed, max_tasks=tasks, keep_predictions=False)
    # `model.config` is what the evaluation reads the number of ACT steps from.
    trained = model.config
    model.config = trained.model_copy(update={"halt_max_steps": 1})  # the first call only warms up

    def step() -> dict[str, float]:
        progress = Progress()
        evaluate(respondent, config.evaluation, ask, progress=progress)
        model.config = trained
        return {"samples": progress.views}

    return step


def questions(world: World) -> Iterator[int]:
    """The numbers of steps that the first process reads, in every process."""
    # The others have no input; 0 ends all of them.
    lines = iter(sys.stdin) if world.is_main else None
    while steps := int(distributed.sum_tensor(torch.tensor(0 if lines is None else int(next(lines, 0))))):
        yield steps


CONTESTANTS = {"train": training, "eval": evaluation}


def measure(what: str, overrides: list[str], threads: int, **options: Any) -> None:
    """Answer until the input ends."""
    answers, world = answer_channel(), World.from_environment()
    run = Run(compose.load(PretrainConfig, "pretrain", [*overrides, f"threads={threads}"]), world)
    _ = run.threads
    step = CONTESTANTS[what](run, **options)
    serve(step, run.device, answers if world.is_main else sys.stderr, questions(world))
    distributed.close()


def main() -> None:
    parser = parser_of("benchmarks.steps", __doc__)
    parser.add_argument("what", choices=CONTESTANTS)
    parser.add_argument("options", type=json.loads, help="JSON: overrides, threads, and identical or tasks")
    arguments = parser.parse_args()
    measure(arguments.what, **arguments.options)


if __name__ == "__main__":
    main()
