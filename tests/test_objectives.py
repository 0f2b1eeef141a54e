"""Objectives and measurements on the context: reconstruction, contrast, gradients, diagnostics."""

import json
import math
from dataclasses import replace

import pytest
import torch

from models.act import act_step, initial_carry, remembering
from models.losses import act_loss, change_shares, loss_terms, sample_loss
from tests.support.encoders import CASES, SMALL, make_case, normal
from tests.support.models import OBJECTIVE, episodes
from tests.support.runs import ALONE, Trainer, arguments_for, run
from training.diagnostics import context_diagnostics, energy_shares
from training.objectives import contrastive_loss, reconstruction_loss
from training.step import train_step
from utils import checkpoint


def test_reconstruction_asks_for_every_demonstration_in_turn(fewshot, monkeypatch):
    model = make_case("standard", fewshot).train()
    data = episodes().data
    data["demo_mask"] = torch.tensor(
        [[True, True, True], [True, False, True], [False, True, False], [False, False, False]]
    )
    asked = []
    hook = model.embed_tokens.register_forward_hook(lambda module, inputs, output: asked.append(inputs[0]))
    carry, losses = initial_carry(model, data), []
    for _ in range(3):
        output = act_step(model, carry, data, min_halt_steps=torch.full((4,), 9))
        losses.append(reconstruction_loss(model, output, OBJECTIVE))
        carry = output.carry
    hook.remove()
    for step, expected in enumerate([(0, 0, 1), (1, 2, 1), (2, 0, 1)]):
        for row, demo in enumerate(expected):
            assert torch.equal(asked[2 * step + 1][row], data["demo_inputs"][row, demo])
    assert all(loss.shape == (4,) and loss[3] == 0 and (loss[:3] > 0).all() for loss in losses)
    losses[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.context.parameters())


def test_contrast_never_pushes_the_same_task_apart_and_needs_two_demonstrations(fewshot):
    model = make_case("standard", fewshot).train()
    data = episodes(batch=3, demos=4).data
    alone = contrastive_loss(model, data, 0.1, normal(3), ALONE)
    assert (alone > 0).all()
    alone.sum().backward()
    assert model.context.aggregate.queries.grad.abs().sum() > 0
    twice = {name: torch.cat((value, value)) for name, value in data.items()}
    twice["puzzle_identifiers"] = torch.arange(6)
    assert (
        contrastive_loss(model, twice, 0.1, normal(6), ALONE)[:3] > alone
    ).all()  # each sample's twin is a negative now
    twice["puzzle_identifiers"] = torch.tensor([0, 1, 2, 0, 1, 2])
    doubled = contrastive_loss(model, twice, 0.1, normal(6), ALONE)[:3]
    assert torch.allclose(doubled.exp() - 1, 2 * (alone.exp() - 1), rtol=1e-3)  # only the others' twins are
    same = data | {"puzzle_identifiers": torch.full((3,), 5, dtype=torch.int32)}
    assert torch.equal(contrastive_loss(model, same, 0.1, normal(3), ALONE), torch.zeros(3))
    data["demo_mask"][0, 1:] = False
    short = contrastive_loss(model, data, 0.1, normal(3), ALONE)
    assert short[0] == 0 and (short[1:] > 0).all() and (short[1:] < alone[1:]).all()  # one negative fewer


def test_the_differential_loss_is_the_token_loss_of_what_a_step_adds(fewshot):
    model, data = make_case("standard", fewshot).train(), episodes().data
    changes = OBJECTIVE.model_copy(update={"differential_weight": 1.0})
    half = OBJECTIVE.model_copy(update={"differential_weight": 0.5})
    start = initial_carry(model, data)
    first = remembering(act_step(model, start, data), start)
    assert torch.equal(first.logits_before, torch.zeros_like(first.logits))
    assert act_loss(first, changes)[0].item() == pytest.approx(act_loss(first, OBJECTIVE)[0].item())
    carry = replace(first.carry, halted=torch.tensor([True, False, False, True]))
    second = remembering(act_step(model, carry, data), carry)
    before = first.logits.detach() * torch.tensor([0, 1, 1, 0])[:, None, None]
    assert torch.equal(second.logits_before, before)
    whole, metrics = act_loss(second, changes)
    change = sample_loss(second.logits - before, data["labels"], OBJECTIVE).sum()
    assert metrics["differential_loss"] == pytest.approx(change.item())
    assert metrics["lm_loss"] == pytest.approx(
        sample_loss(second.logits, data["labels"], OBJECTIVE).sum().item()
    )
    assert (whole - change).item() == pytest.approx(
        OBJECTIVE.halt_loss_weight * metrics["q_halt_loss"].item(), rel=1e-4
    )
    plain = act_loss(second, OBJECTIVE)[0]
    assert act_loss(second, half)[0].item() == pytest.approx(((whole + plain) / 2).item())
    assert (plain - whole).abs() > 1e-3
    parts = loss_terms(second, half)
    assert (parts.tokens.sum() + parts.halting.sum()).item() == pytest.approx(((whole + plain) / 2).item())
    whole.backward()
    assert model.lm_head.weight.grad.norm() > 0


@pytest.mark.parametrize("loss", ["stablemax_cross_entropy", "softmax_cross_entropy"])
def test_a_step_that_changes_nothing_pays_what_a_uniform_guess_pays(loss, fewshot):
    model, data = make_case("standard", fewshot).train(), episodes().data
    output = act_step(model, initial_carry(model, data), data)
    objective = OBJECTIVE.model_copy(update={"loss_type": loss})
    shares = change_shares(replace(output, logits_before=output.logits.detach()), objective).sum(1)
    assert torch.allclose(shares, torch.full_like(shares, math.log(output.logits.shape[-1])))


def test_two_processes_share_noise_negatives_and_gradients(fewshot, tmp_path):
    options = [
        "encoder=hybrid_variational",
        *SMALL,
        "objective.kl_weight=0.01",
        "objective.contrastive_weight=0.5",
    ]
    options += ["objective.reconstruct_weight=0.5", "train_steps=3"]
    done = run(*arguments_for(fewshot, tmp_path, *options), world=2)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    trainer = Trainer(fewshot, *options, "lr_warmup_steps=200")
    for line in lines:
        result = train_step(trainer.state, trainer.batch(), trainer.config, trainer.world)
        for name in ("lm_loss", "kl_loss", "reconstruct_loss", "contrastive_loss"):
            assert line[f"train/{name}"] == pytest.approx(
                (result.metrics[name] / result.metrics["rows"]).item(), rel=1e-5
            ), name
        for part in ("encoder", "inner", "total"):
            assert line[f"grad/{part}_norm"] == pytest.approx(result.grad_norms[part].item(), rel=1e-4)
        assert line["train/context_gradient"] == 1 and 0 < line["context/between_task_share"] < 1
    weights = checkpoint.load_weights(tmp_path / "r" / "checkpoints" / "step_3", "raw")
    assert (
        max(
            (weights[name] - value).abs().max().item()
            for name, value in trainer.state.model.state_dict().items()
        )
        <= 1e-6
    )


def test_gradient_norms_are_those_before_clipping_and_add_up(fewshot):
    loose, tight = (Trainer(fewshot, f"grad_clip_norm={limit}") for limit in ("null", "0.001"))
    norms, clipped = (train_step(t.state, t.batch(), t.config, t.world).grad_norms for t in (loose, tight))
    assert norms == clipped and norms["encoder"] > 0.001
    assert torch.allclose(norms["total"].square(), norms["inner"].square() + norms["encoder"].square())


def test_a_context_without_gradient_is_reported(fewshot):
    trainer = Trainer(fewshot)
    forward = trainer.state.model.context.forward
    trainer.state.model.context.forward = lambda *arguments: replace(
        (context := forward(*arguments)), prefix=context.prefix.detach(), memory=context.memory.detach()
    )
    assert (
        train_step(trainer.state, trainer.batch(), trainer.config, trainer.world).metrics["context_gradient"]
        == 0
    )


def test_energy_shares_have_their_closed_form():
    groups = torch.tensor([7, 7, 2, 2])
    between = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])
    within = torch.tensor([[0.0, 2], [0, -2], [0, 2], [0, -2]])
    assert [value.item() for value in energy_shares(between, groups)] == [1, 0]
    assert [value.item() for value in energy_shares(within, groups)] == [0, 1]
    for factor in (1.0, 50.0):
        shares = energy_shares(factor * (between + within + torch.tensor([3.0, 0])), groups)
        assert [value.item() for value in shares] == pytest.approx([1 / 14, 4 / 14])


def test_diagnostics_see_a_context_that_ignores_its_task(fewshot):
    trainer = Trainer(fewshot, *CASES["standard"])
    model, samples = trainer.state.model, trainer.sampler.sample(0)

    def measure() -> dict[str, float]:
        return context_diagnostics(model, samples, fewshot, fewshot.grid_table, 0, 0, ALONE)

    values = measure()
    assert values["context/between_task_share"] > 1e-3 and values["context/within_task_share"] > 1e-3
    assert 0.5 < values["context/prefix_rms_ratio"] < 2 and values == measure()
    torch.nn.init.zeros_(model.context.aggregate.layers[0].read.branch.o_proj.weight)
    assert measure()["context/between_task_share"] < 1e-6 and measure()["context/within_task_share"] < 1e-6
