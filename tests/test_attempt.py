"""Updates whose gradient is not finite: what a device does that is asked one step late is what a CPU does."""

import ast
import copy
import math

import pytest
import torch

from tests.support.attempts import CASES, asked, broken_step, trained
from tests.support.nested import same
from tests.support.runs import Trainer, arguments_for, metrics_of, run, steps_of, train_briefly
from training import start
from training.nonfinite import load_batch
from training.step import train_step
from utils import checkpoint, transfer
from utils.errors import UserError


@pytest.fixture
def lagging(monkeypatch):
    """Every device is one whose values the host hears of one step late."""
    monkeypatch.setattr(transfer, "KNOWN_AT_ONCE", ())


def on_device(trainer: Trainer) -> dict:
    """All numbers that an update changes."""
    state = trainer.state
    moments = [
        [value for values in optimizer.state.values() for value in values.values()]
        for optimizer in state.optimizers
        if hasattr(optimizer, "state")
    ]
    return {"model": state.model.state_dict(), "average": state.ema.shadow, "moments": moments}


def everything(trainer: Trainer) -> dict:
    """All numbers of a training state."""
    state = trainer.state
    optimizers = [optimizer.state_dict() for optimizer in state.optimizers]
    carries = {bucket: vars(carry) for bucket, carry in state.carries.items()}
    return {**on_device(trainer), "optimizers": optimizers, "carries": carries, "step": state.step}


@pytest.mark.parametrize("case", CASES)
def test_an_update_taken_back_on_the_device_is_one_that_was_never_made(case, request, monkeypatch):
    layout, options = CASES[case]
    store = request.getfixturevalue(layout)
    exploring = ("arch.halt_exploration_prob=1", *options)
    at_once = trained(Trainer(store, *exploring))
    monkeypatch.setattr(transfer, "KNOWN_AT_ONCE", ())
    assert same(everything(trained(Trainer(store, *exploring))), everything(at_once))


@pytest.mark.parametrize("case", ["adam_atan2", "adamw", "muon", "puzzle rows"])
def test_the_device_keeps_every_bit_before_the_host_has_heard(case, request, lagging):
    layout, options = CASES[case]
    trainer = Trainer(request.getfixturevalue(layout), *options)
    for _ in range(2):
        train_step(*asked(trainer))
    before = copy.deepcopy(on_device(trainer))
    host = copy.deepcopy([optimizer.state_dict() for optimizer in trainer.state.optimizers])
    result = broken_step(trainer)
    counted = case == "adam_atan2"
    after = on_device(trainer)
    for moments in (before["moments"], after["moments"]):  # counts are the host's part
        moments[:] = [
            [value for value in of if isinstance(value, torch.Tensor) and value.dim()] for of in moments
        ]
    assert same(after, before) and trainer.state.step == 3
    assert not counted or not same([o.state_dict() for o in trainer.state.optimizers], host)
    assert not result.updated
    assert same([optimizer.state_dict() for optimizer in trainer.state.optimizers], host)


@pytest.mark.parametrize("case", ["adam_atan2", "fct"])
def test_a_lagging_run_dumps_the_same_batches_and_stops_at_the_same_step(
    case, fewshot, tmp_path, monkeypatch, lagging
):
    real, updates = start.train_step, 2 if case == "fct" else 1

    def sometimes_broken(state, batch, config, world):
        hook = None
        if state.step >= 2 * updates:
            hook = state.model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
        result = real(state, batch, config, world)
        if hook:
            hook.remove()
        return result

    monkeypatch.setattr(start, "train_step", sometimes_broken)
    options = [*CASES[case][1], "max_nonfinite_steps=3", f"checkpoint_interval={updates}", "train_steps=20"]
    words = f"step {5 * updates}: .* not finite 3 times in a row; last checkpoint: step {4 * updates}"
    with pytest.raises(UserError, match=words):
        train_briefly(fewshot, tmp_path, *options)
    files = sorted((tmp_path / "r" / "nonfinite").iterdir())
    assert [file.name for file in files] == [f"step_{n * updates}_rank_0.pt" for n in (2, 3, 4)]
    content, _ = load_batch(files[0])
    assert content["step"] == 2 * updates and math.isnan(content["grad_norms"]["total"])
    assert content["worked_on"]["steps"].tolist() == [1] * 8


def test_a_lagging_run_logs_and_saves_what_an_immediate_one_does(fewshot, tmp_path, monkeypatch):
    options = ["train_steps=5", "checkpoint_interval=2", "log_interval=2", "keep_checkpoints=9"]
    folders = [train_briefly(fewshot, tmp_path / "at once", *options)]
    monkeypatch.setattr(transfer, "KNOWN_AT_ONCE", ())
    folders.append(train_briefly(fewshot, tmp_path / "later", *options))
    lines = [
        [
            {k: v for k, v in line.items() if not k.startswith(("timing/", "time"))}
            for line in metrics_of(folder)
        ]
        for folder in folders
    ]
    assert lines[0] == lines[1] and steps_of(folders[0]) == steps_of(folders[1])
    for name in steps_of(folders[0]):
        one, other = (checkpoint.load_torch(f / "checkpoints" / name / "training.pt") for f in folders)
        assert same(one["optimizers"], other["optimizers"])


RANKS = """
import math, sys, torch
from config import compose
from config.schema import PretrainConfig
from training.start import prepare
from utils import distributed, transfer
from utils.distributed import World

transfer.KNOWN_AT_ONCE = ()
world = World.from_environment()
run = prepare(compose.load(PretrainConfig, "pretrain", sys.argv[1:]), world)
for step in range(3):
    if step == 1 and world.rank == 1:  # puzzle rows are local: nothing of it reaches the summed gradients
        (name, broken) = ("weights", run.model.context)
        broken.register_forward_hook(lambda module, data, context: context.prefix.register_hook(
            lambda gradient: gradient * math.nan) and None)
    result = run.step(run.sampler.sample(run.state.step))
    total = sum(value.double().sum().item() for value in run.model.state_dict().values())
    seen = distributed.gather_objects((result.updated, total))
    if world.is_main:
        print(seen, flush=True)
distributed.close()
"""


def test_processes_take_back_an_update_together(puzzle, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = run(str(script), *arguments_for(puzzle, tmp_path)[1:], world=2)
    assert done.returncode == 0, done.stderr
    (first, second, third) = map(ast.literal_eval, done.stdout.splitlines())
    assert all(one == other for one, other in (first, second, third))
    assert [of[0][0] for of in (first, second, third)] == [True, False, False]
    assert first[0][1] == second[0][1] == third[0][1]
