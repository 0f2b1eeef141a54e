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
from dataset import store as datasets
from dataset.batch import Cell, materialise
from dataset.samplers import SAMPLERS, Sampler
from dataset.store import Store
from evaluation.evaluate import evaluate
from models.core import DataSizes
from models.layers import compile_fused
from models.trm import build_model
from training.ema import EMA
from training.optim import build_optimizers
from training.state import TrainState
from training.step import StepSettings, train_step
from utils import distributed
from utils.device import choose_device, should_compile
from utils.distributed import World

GOLDEN_RATIO = 0.5 * (5**0.5 - 1)
ALONE = World()


def build_sampler(config: PretrainConfig, store: Store, world: World = ALONE) -> Sampler:
    """The samples of a run that this process draws."""
    return SAMPLERS[store.metadata.layout](store, config.data, config.seed, config.global_batch_size, world.rank, world.size)


def cells(sampler: Sampler) -> Iterator[Cell]:
    """The sampler's cells in their shares, evenly spread, so that few steps already meet them as often as many would."""
    number = 0
    while True:
        number += 1
        yield sampler.cells[int(np.searchsorted(sampler.cell_cumulative, number * GOLDEN_RATIO % 1, side="right"))]


def training(config: PretrainConfig, store: Store, device: torch.device, world: World, identical: bool) -> Callable[[], dict[str, float]]:
    """A step as the training loop makes it, sampling included. Its counts are those of all processes."""
    sampler, table = build_sampler(config, store, world), store.grid_table.to(device)
    torch.manual_seed(config.seed)
    model = build_model(config.arch, DataSizes.of(store, config.data), config.encoder)
    model = (as_the_ancestor(model) if identical else model).to(device)
    state = TrainState(model, build_optimizers(model, config, device)[0], EMA(model, config.ema_rate))
    settings = StepSettings.of(config, world)
    order = cells(sampler)

    def step() -> dict[str, float]:
        batch = materialise(sampler.sample(state.step, next(order)), store, table)
        train_step(state, batch, settings)
        return {"samples": world.size * batch.size, "flops": world.size * useful_flops(config, batch.data)}

    return step


def evaluation(config: PretrainConfig, store: Store, device: torch.device, world: World, tasks: int) -> Callable[[], dict[str, float]]:
    """An evaluation of `tasks` tasks of the test split, from checkpoint to pass@k."""
    torch.manual_seed(config.seed)
    model = build_model(config.arch, DataSizes.of(store, config.data), config.encoder).to(device)
    run = partial(evaluate, model, store, config.data, config.evaluation, config.objective, device, world)
    trained = model.config
    model.config = trained.model_copy(update={"halt_max_steps": 1})  # the first call only warms up

    def step() -> dict[str, float]:
        views: list[int] = []
        run(seed=config.seed, trained_pairs=np.zeros(0, np.uint64), max_tasks=tasks, report=views.append)
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
    config = compose.load(PretrainConfig, "pretrain", overrides)
    device = choose_device(config.device, world)
    distributed.start(world, device)
    compile_fused(should_compile(config.compile, device, config.train_steps))
    store = datasets.load(config.data.path, *config.layouts)
    step = {"train": training, "eval": evaluation}[what](config, store, device, world, **options)
    serve(step, device, answers if world.is_main else sys.stderr, questions(world))
    distributed.close()


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
