"""Tasks that are made while a model trains: functions of seed and step, new to what is asked."""

import json
import os
import signal

import numpy as np
import pytest
import torch

from config import compose
from config.schema import PretrainConfig
from dataset.build_arc_dataset import build as build_arc
from dataset.build_arc_dataset import parse_arguments as parse_arc
from dataset.build_rules_dataset import build
from dataset.fresh import FreshTasks
from dataset.samplers import EpisodeSampler
from dataset.store import Store
from dataset.writer import write_dataset
from tests.support.rearc import GOOD, build_rearc, write_package
from tests.support.rules import options_for
from tests.support.runs import Trainer, data_config_of, load_config, train_here, weights_of
from utils import checkpoint
from utils.errors import UserError

TASKS, STEPS = 20, 3
RULES = "--families recolour shift --stages 1 --rows 4 5 --columns 4 5 --train-tasks 24 --test-tasks 6"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """ARC tasks beside generated ones."""
    folder = tmp_path_factory.mktemp("mixture")
    build(options_for(folder / "rules", *RULES.split()))
    arguments = f"--recipe arc1-small --max-grid-size 6 --max-tasks 8 --dataset rules={folder / 'rules'}"
    build_arc(parse_arc([*arguments.split(), "--output-dir", str(folder / "d")]))
    return Store.load(folder / "d")


def option(workers: int = 0, subset: str = "rules-train", tasks: int = TASKS) -> str:
    return f"data.fresh={{tasks: {{{subset}: {tasks}}}, steps: {STEPS}, workers: {workers}}}"


def fresh_tasks(store: Store, seed: int = 5, rank: int = 0, world: int = 1, **options) -> FreshTasks:
    return FreshTasks(store, load_config(store, option(**options)).data, seed, 12, rank, world)


def as_json(tasks) -> dict[str, list]:
    return {name: [(task.id, task.to_json()) for task in of_subset] for name, of_subset in tasks.items()}


def trained_tasks(store: Store, subset: str) -> dict[str, dict]:
    tasks = [store.task(int(index)) for index in store.tasks_of("train", subsets=[subset])]
    return {task.id: task.to_json() for task in tasks}


def test_the_tasks_of_a_step_depend_on_seed_and_step_alone(mixture):
    fresh, again = fresh_tasks(mixture), fresh_tasks(mixture)
    order = [7, 0, 4, 1, 7]
    seen = {step: trained_tasks(fresh.at(step).store, "rules-train") for step in order}
    for step in sorted(order):
        assert trained_tasks(again.at(step).store, "rules-train") == seen[step]
    assert fresh.at(6) is fresh.at(8) and seen[0] == seen[1] and len(seen[0]) == TASKS
    shown = [json.dumps(task) for step in (0, 4, 7) for task in seen[step].values()]
    shown += [json.dumps(task) for task in trained_tasks(mixture, "rules-train").values()]
    assert len(set(shown)) > 0.9 * len(shown)
    assert trained_tasks(fresh_tasks(mixture, seed=6).at(0).store, "rules-train") != seen[0]


def test_what_is_not_generated_stays_as_it_is_stored(mixture):
    store = fresh_tasks(mixture.hold_out(4)).at(4).store
    assert trained_tasks(store, "training").items() <= trained_tasks(mixture, "training").items()
    held_out = mixture.hold_out(4)
    for split in ("test", "validation"):
        tasks = held_out.tasks_of(split)
        assert np.array_equal(store.tasks_of(split), tasks) and len(tasks)
        assert all(store.task(i).to_json() == held_out.task(i).to_json() for i in tasks)
    trained = {store.task_ids[i] for i in store.tasks_of("train")}
    assert not trained & {held_out.task_ids[i] for i in held_out.tasks_of("validation")}


def test_processes_share_a_batch_of_the_same_fresh_tasks(mixture):
    whole = fresh_tasks(mixture).at(4).sample(4)
    parts = [fresh_tasks(mixture, rank=rank, world=3).at(4).sample(4) for rank in range(3)]
    assert np.array_equal(np.concatenate([part.query for part in parts]), whole.query)


@pytest.mark.slow
def test_workers_make_the_tasks_that_training_would_make_itself(mixture):
    alone, helped = fresh_tasks(mixture, tasks=200), fresh_tasks(mixture, tasks=200, workers=2)
    for step in (0, 4, 12):
        ours, theirs = alone.at(step).store, helped.at(step).store
        assert trained_tasks(ours, "rules-train") == trained_tasks(theirs, "rules-train")
    for pid in list(helped._workers._processes):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(UserError, match="was ended from outside, .* data.fresh.workers=0 does without"):
        helped.at(30)
    helped.close()


@pytest.mark.slow
def test_a_run_with_workers_ends_with_the_same_weights(mixture, tmp_path):
    train_here(mixture, tmp_path / "workers", "train_steps=5", option(workers=1))
    train_here(mixture, tmp_path / "alone", "train_steps=5", option())
    ours, theirs = weights_of(tmp_path / "workers", 5), weights_of(tmp_path / "alone", 5)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_run_continues_with_the_same_tasks_to_the_bit(mixture, tmp_path):
    train_here(mixture, tmp_path / "whole", "train_steps=8", option())
    for steps in (4, 8):
        train_here(mixture, tmp_path / "parts", f"train_steps={steps}", option())
    whole, parts = weights_of(tmp_path / "whole", 8), weights_of(tmp_path / "parts", 8)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    folders = [tmp_path / name / "r" / "checkpoints" / "step_8" for name in ("whole", "parts")]
    first, second = map(checkpoint.load_trained_pairs, folders)
    assert np.array_equal(first, second)
    fresh = fresh_tasks(mixture, seed=load_config(mixture).seed)
    shown = [fresh.at(step).trained_pairs for step in (0, 3, 6)]
    assert np.array_equal(np.unique(np.concatenate(shown)), first)


def test_batches_hold_the_grids_of_the_fresh_tasks(mixture):
    trainer = Trainer(mixture, option(), "data.subset_shares={training: 0, rules-train: 1}")
    for step in (0, 4):
        trainer.state.step = step
        samples = trainer.samples()
        store = trainer.sampled_store
        inputs = Trainer.__mro__[1].batch(trainer, samples).data["inputs"]
        cells = [np.prod(store.shapes[store.pair_input[query]]) for query in samples.query]
        assert (inputs > 1).sum(1).tolist() == cells
        first = np.searchsorted(store.task_pairs, samples.query, side="right") - 1
        assert min(first) >= len(mixture.task_ids)


def test_a_fresh_task_that_shares_a_pair_with_an_asked_one_is_left_out(mixture, tmp_path):
    fresh = fresh_tasks(mixture)
    tasks = fresh.tasks(1)["rules-train"]
    about = {"layout": "fewshot", "source": "test", "seed": 0, "details": mixture.metadata.details}
    subsets = {"rules-train": fresh.tasks(0)["rules-train"], "asked": tasks[:3]}
    write_dataset(tmp_path / "d", subsets, ["asked"], max_grid_size=6, **about)
    kept = fresh_tasks(Store.load(tmp_path / "d")).tasks(1)["rules-train"]
    assert [task.id for task in kept] == [task.id for task in tasks[3:]]


def test_tasks_of_re_arc_are_made_within_the_limits_of_their_dataset(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(write_package(tmp_path / "site")))
    arguments = "--difficulty 0 0.25 --max-side 10 --tasks-per-generator 2 --held-out-generators flip"
    build_rearc(tmp_path / "rearc", *arguments.split(), "--generators", *GOOD)
    arguments = f"--recipe rearc --max-grid-size 8 --max-tasks 8 --dataset rearc={tmp_path / 'rearc'}"
    build_arc(parse_arc([*arguments.split(), "--output-dir", str(tmp_path / "d")]))
    fresh = fresh_tasks(Store.load(tmp_path / "d"), subset="rearc-train", tasks=40)
    first, second = (fresh.tasks(number)["rearc-train"] for number in (0, 1))
    assert {task.id.split("_")[0] for task in first} == {*GOOD} - {"flip"}
    assert 5 < len(first) < 40 and max(task.max_side for task in first) <= 8
    assert not {str(task.to_json()) for task in first} & {str(task.to_json()) for task in second}


def test_what_cannot_be_made_is_told_in_one_line(mixture, tmp_path):
    with pytest.raises(UserError, match="no generator makes tasks of subset 'training' .*: rules-train$"):
        fresh_tasks(mixture, subset="training")
    limited = option(), "data.max_train_groups=4"
    with pytest.raises(UserError, match="data.max_train_groups keeps the first alone"):
        compose.load(PretrainConfig, "pretrain", [f"data.path={mixture.path}", *limited])
    about = {"layout": "fewshot", "source": "test", "seed": 0}
    about["details"] = {"made_by": {"rules-train": {"generator": "other", "plan": {}}}}
    subsets = {"rules-train": fresh_tasks(mixture).tasks(0)["rules-train"], "asked": []}
    write_dataset(tmp_path / "d", subsets, ["asked"], **about)
    with pytest.raises(UserError, match="was made by a generator that this version has not; build it anew"):
        fresh_tasks(Store.load(tmp_path / "d"))


def test_without_fresh_tasks_a_run_samples_its_dataset(mixture):
    trainer = Trainer(mixture)
    assert trainer.fresh is None and trainer.sampled_store is mixture
    samples = EpisodeSampler(mixture, data_config_of(mixture), trainer.config.seed, 8).sample(0)
    assert np.array_equal(trainer.samples().query, samples.query)
