"""Halting in training and evaluation: switched off, by confidence, and what a halted sample keeps."""

import dataclasses

import pytest
import torch
from torch import Tensor

from dataset.canvas import PAD
from models.act import Answer, act_step, initial_carry, solve
from models.core import RecursiveModel
from tests.support.architectures import CASES, config_of, data_of, model_of
from tests.support.models import SIDE


def test_act_can_be_switched_off():
    config = config_of(*CASES["trm", "puzzle"], act_enabled=False)
    model = model_of(config).train()
    torch.nn.init.constant_(model.q_head.bias, 5.0)
    data = data_of(config)
    carry = initial_carry(model, data)
    for step in range(1, 4):
        carry = act_step(model, carry, data).carry
        assert carry.halted.tolist() == [step == 3] * 4
    config = config_of(*CASES["trm", "puzzle"], act_enabled=False, no_ACT_continue=False, halt_threshold=0.9)
    model.config = config.arch
    output = act_step(model.train(), initial_carry(model, data), data)
    assert output.target_q_continue is None  # q_continue learns nothing, and evaluation does not ask it
    assert solve(model.eval(), data).steps.tolist() == [1] * 4


def test_mean_pooling_reads_the_cells_of_the_input_and_no_padding():
    config = config_of(*CASES["trm", "puzzle"], halt_pooling="mean")
    model = model_of(config)
    inputs = data_of(config)["inputs"]
    answer = torch.randn(4, 2 + SIDE**2, 32)
    changed = answer.clone()
    changed[:, 2:][inputs == PAD] = 1e3
    changed[:, :2] = 1e3
    assert torch.allclose(model._summary(answer, inputs), model._summary(changed, inputs))
    expected = answer[:, 2:][inputs != PAD].view(4, 16, 32).mean(1)
    assert torch.allclose(model._summary(answer, inputs), expected, atol=1e-6)


def all_steps(model: RecursiveModel, data: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Logits and halting logits of every ACT step, without any early halt."""
    carry, steps = initial_carry(model, data), []
    with torch.no_grad():
        for _ in range(model.config.halt_max_steps):
            output = act_step(model, carry, data)
            carry = dataclasses.replace(output.carry, halted=torch.zeros_like(output.carry.halted))
            steps.append((output.logits, output.q_halt_logits))
    return steps


def test_without_a_threshold_every_sample_is_evaluated_for_all_steps():
    config = config_of(*CASES["trm", "puzzle"])
    model = model_of(config).eval()
    data = data_of(config)
    answer = solve(model, data)
    assert torch.equal(answer.logits, all_steps(model, data)[-1][0]) and answer.steps.tolist() == [3] * 4


@pytest.mark.parametrize("q_learning", [False, True])
def test_a_confident_sample_keeps_the_answer_at_which_it_halted_whatever_its_batch(q_learning):
    config = config_of(*CASES["trm", "memory"], halt_max_steps=5, no_ACT_continue=not q_learning)
    model = model_of(config).eval()
    torch.nn.init.normal_(model.q_head.weight, std=0.5)
    torch.nn.init.zeros_(model.q_head.bias)
    data = data_of(config)
    steps = all_steps(model, data)
    confidence = torch.stack([q_halt for _, q_halt in steps]).sigmoid()
    threshold = (
        0.5 if q_learning else confidence[0].sort().values[1:3].mean().item()
    )  # between two rows: no rounding decides
    model.config = config.arch.model_copy(update={"halt_threshold": threshold})
    answer = solve(model, data)
    assert len(set(answer.steps.tolist())) > 1
    for row in range(4):
        alone = solve(model, {name: value[row : row + 1] for name, value in data.items()})
        assert alone.steps.item() == answer.steps[row]
        assert torch.allclose(alone.logits[0], answer.logits[row], atol=1e-5)
        assert torch.allclose(answer.logits[row], steps[answer.steps[row] - 1][0][row], atol=1e-5)
        if not q_learning:
            early = (confidence[:, row] >= threshold).nonzero()
            assert answer.steps[row] == (early[0] + 1 if len(early) else 5)


def test_the_loop_ends_when_every_sample_has_halted():
    config = config_of(*CASES["trm", "puzzle"], halt_threshold=0.5, halt_max_steps=16)
    model = model_of(config).eval()
    torch.nn.init.constant_(model.q_head.bias, 5.0)
    calls = []
    model.register_forward_hook(lambda *arguments: calls.append(1))
    answer: Answer = solve(model, data_of(config))
    assert answer.steps.tolist() == [1] * 4 and len(calls) == 1
