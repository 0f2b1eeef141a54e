"""Our training step or evaluation as a contestant: python -m benchmarks.steps {train,eval} OPTIONS (JSON), see `serve`.

Under torchrun the first process answers for all.
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.ancestors.turns import answer_channel, serve
from benchmarks.identical import as_the_ancestor
from benchmarks.useful import useful_flops
from config import compose
from config.schema import PretrainConfig
from dataset.batch import Bucket
from dataset.samplers import SAMPLERS, Sampler
from dataset.store import Store
from evaluation.run import evaluate
from training.start import Run
from training.step import train_step
from utils import distributed
from utils.distributed import World

GOLDEN_RATIO = 0.5 * (5**0.5 - 1)
ALONE = World()


def build_sampler(config: PretrainConfig, store: Store, world: World = ALONE) -> Sampler:
    """The samples of a run that this process draws."""
    return SAMPLERS[store.metadata.layout](
        store, config.data, config.seed, config.global_batch_size, world.rank, world.size
    )


def buckets(sampler: Sampler) -> Iterator[Bucket]:
    """The sampler's buckets in their shares, evenly spread, so that few steps already meet them as often as many would."""
    number = 0
    while True:
        number += 1
        yield sampler.buckets[
            int(np.searchsorted(sampler.bucket_cumulative, number * GOLDEN_RATIO % 1, side="right"))
        ]


def training(run: Run, identical: bool) -> Callable[[], dict[str, float]]:
    """A step as the training loop makes it, sampling included. Its counts are those of all processes."""
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
    """An evaluation of `tasks` tasks of the test split, from checkpoint to pass@k."""
    config, model = run.config, run.model
    ask = partial(
        evaluate, model, run.store, config.data, config.evaluation, config.objective, run.device, run.world
    )
    trained = model.config
    model.config = trained.model_copy(update={"halt_max_steps": 1})  # the first call only warms up

    def step() -> dict[str, float]:
        views: list[int] = []
        ask(seed=config.seed, trained_pairs=np.zeros(0, np.uint64), max_tasks=tasks, report=views.append)
        model.config = trained
        return {"samples": sum(views)}

    return step


def questions(world: World) -> Iterator[int]:
    """The numbers of steps that the first process reads, in every process."""
    lines = iter(sys.stdin) if world.is_main else None
    while steps := int(distributed.sum_tensor(torch.tensor(0 if lines is None else int(next(lines, 0))))):
        yield steps


def main(what: str, overrides: list[str], threads: int, **options: Any) -> None:
    answers, world = answer_channel(), World.from_environment()
    torch.set_num_threads(threads)
    run = Run(compose.load(PretrainConfig, "pretrain", overrides), world)
    step = {"train": training, "eval": evaluation}[what](run, **options)
    serve(step, run.device, answers if world.is_main else sys.stderr, questions(world))
    distributed.close()


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
