"""The curriculum of depth: a function of the step, valid carries, the same bits after a resume."""

import re

import pytest
import torch

from config import compose
from config.schema import PretrainConfig
from models.act import act_step, initial_carry
from models.core import at_depth
from tests.support.architectures import CASES, config_of, data_of, model_of
from tests.support.models import episodes, make_model
from tests.support.runs import Trainer, metrics_of, train_here, weights_of
from training.schedule import cycles_at
from training.step import train_step
from utils.errors import UserError

STAGES = [[0, 1, 1], [0.5, 2, 1]]  # TINY ends at H_cycles=2 and L_cycles=1
SCHEDULE = "depth_schedule=[[0,1,1],[0.5,2,1]]"


def applications(model) -> list[bool]:
    """A list that grows with every application of the network: whether it carries a gradient."""
    seen: list[bool] = []
    model.L_level.register_forward_hook(lambda *call: seen.append(torch.is_grad_enabled()))
    return seen


def test_the_depth_is_that_of_the_last_stage_that_has_begun():
    stages = [[0, 1, 2], [0.25, 2, 2], [0.5, 3, 6]]
    found = [cycles_at(step, stages, 8) for step in range(10)]
    assert found == [(1, 2)] * 2 + [(2, 2)] * 2 + [(3, 6)] * 6
    assert cycles_at(0, stages, 0) == (3, 6)


def test_a_scheduled_step_is_the_step_of_a_model_with_that_depth(fewshot):
    data = episodes().data
    deep = make_model(fewshot, "arch.H_cycles=3", "arch.L_cycles=2", "arch.grad_cycles=2")
    shallow = make_model(fewshot, "arch.H_cycles=1", "arch.L_cycles=1")
    seen = applications(deep)
    with at_depth(deep, (1, 1)):
        ours = act_step(deep, initial_carry(deep, data), data)
    assert seen == [True] * 2, "of fewer cycles than carry a gradient all do"
    assert torch.equal(ours.logits, act_step(shallow, initial_carry(shallow, data), data).logits)
    seen.clear()
    act_step(deep, ours.carry, data)
    assert seen == [False] * 3 + [True] * 6, "the carry is valid for the architecture's own depth"


def test_training_follows_the_schedule_and_evaluation_the_architecture(fewshot):
    trainer = Trainer(fewshot, "train_steps=4", SCHEDULE)
    seen, counts = applications(trainer.state.model), []
    for _ in range(4):
        seen.clear()
        train_step(trainer.state, trainer.batch(), trainer.config, trainer.world)
        counts.append(len(seen))
    assert counts == [2, 2, 4, 4]
    early = Trainer(fewshot, "train_steps=4", SCHEDULE).state.model.eval()
    seen, data = applications(early), trainer.batch().data
    act_step(early, initial_carry(early, data), data)
    assert len(seen) == 4


def test_a_run_says_its_depth_and_a_resume_across_a_change_gives_the_same_bits(fewshot, tmp_path, capsys):
    options = ("train_steps=6", SCHEDULE, "checkpoint_interval=2", "keep_checkpoints=9")
    whole = train_here(fewshot, tmp_path / "whole", *options)
    said = capsys.readouterr().err
    assert re.findall(r"step (\d+): depth \(H, L\) = (.*)", said) == [("0", "(1, 1)"), ("3", "(2, 1)")]
    depths = [(line["train/H_cycles"], line["train/L_cycles"]) for line in metrics_of(whole)]
    assert depths == [(1, 1)] * 3 + [(2, 1)] * 3
    train_here(fewshot, tmp_path / "resumed", *options, f"resume={whole}/checkpoints/step_2")
    assert "step 2: depth (H, L) = (1, 1)" in capsys.readouterr().err
    for which in ("raw", "ema"):
        ours, theirs = (weights_of(tmp_path / name, 6, which) for name in ("resumed", "whole"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    # The schedule belongs to what is trained, so that a resumed run may not change it.
    with pytest.raises(UserError, match="depth_schedule"):
        train_here(fewshot, tmp_path / "whole", "train_steps=8")


def test_a_run_without_a_schedule_is_what_it_was(fewshot):
    plain, one_stage = Trainer(fewshot), Trainer(fewshot, "depth_schedule=[[0,2,1]]")
    assert plain.config.cycles_at(0) is None and one_stage.config.cycles_at(0) == (2, 1)
    assert plain.steps(3) == one_stage.steps(3)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["arch=transformers_baseline"], "arch=transformers_baseline has no H_cycles and L_cycles"),
        (["depth_schedule=[[0,1,1]]"], "must end with the depth that is evaluated, arch.H_cycles=3"),
        (["depth_schedule=[[0.1,3,4]]"], "ascending shares below 1, the first one 0"),
        (["depth_schedule=[[0,1,1],[0,3,4]]"], "ascending shares below 1, the first one 0"),
        (["depth_schedule=[[0,1,1],[1,3,4]]"], "ascending shares below 1, the first one 0"),
        (["depth_schedule=[]"], "ascending shares below 1, the first one 0"),
        (["depth_schedule=[[0,1],[0.5,3,4]]"], "must hold [share of the training, H_cycles, L_cycles]"),
        (["depth_schedule=[[0,1.5,1],[0.5,3,4]]"], "must hold [share of the training, H_cycles, L_cycles]"),
        (["depth_schedule=[[0,0,1],[0.5,3,4]]"], "must hold [share of the training, H_cycles, L_cycles]"),
        (["objective.split=internal"], "which objective.split=internal compares"),
        (["arch=trm_hier6", "depth_schedule=[[0,1,1],[0.5,3,6]]"], "arch.num_latents=6 needs L_cycles"),
    ],
)
def test_a_schedule_that_cannot_be_names_what_is_wrong(overrides, words):
    given = ["arch=trm", "depth_schedule=[[0,1,1],[0.5,3,4]]"]
    keys = {override.split("=")[0] for override in overrides}
    kept = [override for override in given if override.split("=")[0] not in keys]
    with pytest.raises(UserError, match=re.escape(words)):
        compose.load(PretrainConfig, "pretrain", [*kept, *overrides])


@pytest.mark.parametrize("arch", ["trm", "trm_singlez", "trm_hier6", "hrm"])
def test_every_recursion_can_be_shallow_and_then_deep_with_one_carry(arch):
    config = config_of(*CASES[arch, "puzzle"])
    model, data = model_of(config).train(), data_of(config)
    own, carry = model.updates, initial_carry(model, data)
    for cycles in ((1, 3), None):
        with at_depth(model, cycles):
            assert model.updates[:2] == (own[:2] if cycles is None else (3, 1))
            output = act_step(model, carry, data)
        output.logits.sum().backward()
        carry = output.carry
    assert model.updates == own
    assert all(p.grad is not None for name, p in model.named_parameters() if "_level" in name)
