"""Variational encoders: their noise, their mean and their divergence."""

import dataclasses

import pytest
import torch

from models.act import act_step, initial_carry
from models.encoders.pooled import gaussian_kl
from models.losses import act_loss
from tests.support.encoders import CASES, make_case, normal
from tests.support.models import OBJECTIVE, episodes
from tests.support.runs import Trainer
from training.step import _noise
from utils.distributed import World

VARIATIONAL = ["variational", "lpn_variational", "lpn_variational_v2", "hybrid_variational", "lpn_var"]


@pytest.mark.parametrize("name", VARIATIONAL)
def test_a_sample_keeps_its_noise_until_it_halts(name, fewshot):
    model = make_case(name, fewshot).train()
    data, noise = episodes().data, normal(4)
    first = act_step(model, initial_carry(model, data), data, noise=noise).carry
    first = dataclasses.replace(first, halted=torch.tensor([True, False, True, False]))
    second = act_step(model, first, data, noise=noise).carry
    before, after = first.context_state["noise"], second.context_state["noise"]
    assert [torch.equal(*rows) for rows in zip(before, after, strict=True)] == [False, True, False, True]


@pytest.mark.parametrize("name", VARIATIONAL)
def test_training_draws_the_latent_and_evaluation_takes_its_mean(name, fewshot):
    model = make_case(name, fewshot)
    torch.nn.init.zeros_(model.context.bottleneck.log_variance.bias)
    data = episodes().data

    def prefix(seed: int) -> torch.Tensor:
        return model.context(data, model.context.initial_state(data, normal(4, seed))).prefix

    model.train()
    assert torch.equal(prefix(0), prefix(0)) and not torch.allclose(prefix(0), prefix(1), atol=1e-2)
    drawn = prefix(0)
    with pytest.raises(AssertionError, match="needs the noise"):
        model.context(data)
    model.eval()
    assert torch.equal(prefix(0), prefix(1)) and torch.equal(prefix(0), model.context(data).prefix)
    assert not torch.allclose(prefix(0), drawn, atol=1e-2)


def test_the_latent_starts_nearly_deterministic(fewshot):
    model = make_case("variational", fewshot).train()
    data = episodes().data
    drawn = model.context(data, model.context.initial_state(data, normal(4))).prefix
    assert torch.allclose(model.context.bottleneck.log_variance.bias.exp().sqrt(), torch.tensor(0.03))
    assert (drawn - model.eval().context(data).prefix).norm() < 0.1 * drawn.norm()


def test_a_huge_log_variance_is_clamped_in_float32(fewshot):
    model = make_case("lpn_var", fewshot, "bfloat16").train()
    torch.nn.init.constant_(model.context.bottleneck.log_variance.bias, 1e4)
    data = episodes().data
    context = model.context(data, model.context.initial_state(data, normal(4)))
    assert (
        context.prefix.isfinite().all()
        and context.losses["kl"].isfinite().all()
        and context.losses["kl"].dtype == torch.float32
    )


def test_the_kl_is_the_closed_form_per_sample_and_ignores_empty_slots(fewshot):
    mean, log_variance = torch.randn(5, 7), torch.randn(5, 7)
    ours, unit = (
        torch.distributions.Normal(mean, (0.5 * log_variance).exp()),
        torch.distributions.Normal(0.0, 1.0),
    )
    assert torch.allclose(
        gaussian_kl(mean, log_variance), torch.distributions.kl_divergence(ours, unit).sum(-1), atol=1e-5
    )

    model = make_case("lpn_var", fewshot).eval()
    data = episodes().data
    kl = model.context(data).losses["kl"]
    halved = data | {"demo_mask": torch.tensor([[True, False, False]] * 4)}
    each = [
        model.context(data | {"demo_mask": torch.eye(3, dtype=torch.bool)[[k] * 4]}).losses["kl"]
        for k in range(3)
    ]
    assert kl.shape == (4,) and torch.allclose(kl, torch.stack(each).mean(0), rtol=1e-5)
    assert torch.allclose(model.context(halved).losses["kl"], each[0], rtol=1e-5)


def test_kl_is_weighed_once_and_logged_per_sample(fewshot):
    model = make_case("lpn_var", fewshot).train()
    data = episodes().data
    output = act_step(model, initial_carry(model, data), data, noise=normal(4))
    plain, metrics = act_loss(output, OBJECTIVE)
    weighed, _ = act_loss(output, OBJECTIVE.model_copy(update={"kl_weight": 0.5}))
    assert torch.allclose(weighed - plain, 0.5 * output.losses["kl"].sum(), rtol=1e-3)
    assert torch.equal(metrics["kl_loss"], output.losses["kl"].sum().detach()) and metrics["rows"] == 4


@pytest.mark.parametrize("rank", [0, 1])
def test_noise_is_the_same_whatever_the_number_of_processes(rank, fewshot):
    trainer = Trainer(fewshot, *CASES["variational"])
    batch = trainer.batch()
    whole = _noise(trainer.state, batch, trainer.config, trainer.world).normal(2, 3)
    part = _noise(trainer.state, batch, trainer.config, World(rank, 2)).normal(2, 3)
    assert torch.equal(part, whole[2 * rank : 2 * rank + 2]) and whole.std() > 0.5
    trainer.state.step += 1
    assert not torch.equal(_noise(trainer.state, batch, trainer.config, trainer.world).normal(2, 3), whole)
