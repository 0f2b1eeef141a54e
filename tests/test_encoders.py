"""Every demonstration encoder by the same table, and its state between ACT steps."""

import shutil

import pytest
import torch

from config import compose
from dataset.canvas import PAD
from dataset.views import EvaluationSet
from models import encoders
from models.act import act_step, initial_carry
from models.context import Context, ContextModule, EncoderConfig
from models.encoders import ENCODERS, build_encoder
from models.layers import Embedding, rms_norm
from models.losses import act_loss
from models.trm import RecursiveModel
from tests.support.encoders import CASES, make_case, normal
from tests.support.models import OBJECTIVE, SIDE, episodes, make_model
from tests.support.reads import unread_settings
from tests.support.respondents import inference
from tests.support.runs import ALONE, CPU, Trainer, load_config
from training.step import train_step


def logits(model: RecursiveModel, data: dict) -> torch.Tensor:
    with torch.no_grad():
        return act_step(model, initial_carry(model, data), data).logits


def trained_loss(model: RecursiveModel, data: dict) -> torch.Tensor:
    """The loss of one ACT step in training."""
    model.train()
    return act_loss(
        act_step(model, initial_carry(model, data), data, noise=normal(len(data["inputs"]))), OBJECTIVE
    )[0]


@pytest.mark.parametrize("case", CASES)
def test_three_steps_reach_every_parameter_and_resume_bitwise(case, fewshot, tmp_path):
    trainer = Trainer(fewshot, *CASES[case])
    result = train_step(trainer.state, trainer.batch(), trainer.config, trainer.world)
    assert result.updated and result.metrics["lm_loss"].isfinite()
    assert result.metrics["context_gradient"] == result.metrics["rows"] == 4  # every sample
    path = trainer.state.save(tmp_path, ALONE, {}, keep=1)
    expected = trainer.steps(2)
    moments = trainer.state.optimizers[0].state
    for name, parameter in trainer.state.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert moments[parameter]["exp_avg"].abs().sum() > 0, name
    weights = [parameter.detach().clone() for parameter in trainer.state.model.parameters()]
    trainer.state.load(path, ALONE, CPU)
    assert trainer.steps(2) == expected
    assert all(torch.equal(a, b) for a, b in zip(trainer.state.model.parameters(), weights, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_order_and_empty_slots_change_nothing_and_other_demonstrations_do(case, fewshot):
    model = make_case(case, fewshot).eval()
    for demos in (1, 3, 10):
        data = episodes(demos=demos).data
        reference = logits(model, data)
        order = torch.randperm(demos, generator=torch.Generator().manual_seed(1))
        shuffled = {
            name: value[:, order] if name.startswith("demo") else value for name, value in data.items()
        }
        assert reference.isfinite().all() and torch.allclose(logits(model, shuffled), reference, atol=1e-4)
        garbage = torch.full((4, 2, SIDE**2), 7, dtype=torch.uint8)
        padded = data | {
            "demo_inputs": torch.cat((data["demo_inputs"], garbage), 1),
            "demo_labels": torch.cat((data["demo_labels"], garbage), 1),
            "demo_mask": torch.cat((data["demo_mask"], torch.zeros(4, 2, dtype=torch.bool)), 1),
        }
        assert torch.allclose(logits(model, padded), reference, atol=1e-4)
        other = {name: value.roll(1, 0) if name.startswith("demo") else value for name, value in data.items()}
        assert not torch.allclose(logits(model, other), reference, atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_without_any_demonstration_loss_and_gradients_are_finite(case, fewshot):
    model = make_case(case, fewshot)
    data = episodes().data
    data["demo_mask"] = torch.zeros_like(data["demo_mask"])
    loss = trained_loss(model, data)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_reaches_context_and_core_and_leaves_parameters_alone(case, fewshot):
    model = make_case(case, fewshot, "bfloat16").train()
    data = episodes().data
    output = act_step(model, initial_carry(model, data), data, noise=normal(4))
    act_loss(output, OBJECTIVE)[0].backward()
    assert {output.context.told.dtype, output.context.prefix.dtype, output.logits.dtype} == {torch.bfloat16}
    assert all(
        value.dtype == torch.bfloat16 for name, value in output.carry.context_state.items() if name != "noise"
    )
    assert all(
        p.dtype == torch.float32 and (p.grad is None or p.grad.isfinite().all()) for p in model.parameters()
    )


@pytest.mark.parametrize("case", CASES)
def test_the_context_has_the_scale_of_what_it_joins(case, fewshot):
    model = make_case(case, fewshot).eval()
    data = episodes().data
    context = model.context(data)

    def rms(x: torch.Tensor) -> float:
        return x.square().mean().sqrt().item()

    assert 0.5 < rms(context.prefix) / rms(model.embed_tokens(data["inputs"])) < 2
    assert context.prefix.shape == (4, model.context.prefix_length(3, SIDE**2), 32)
    if context.memory is not None:
        assert 0.5 < rms(context.memory) < 2


@pytest.mark.parametrize("case", CASES)
def test_padding_is_never_read(case, fewshot):
    """The same grids on a canvas with more padding give the same context: rotary positions are relative."""
    model = make_case(case, fewshot).eval()
    if model.context.config.positions == "rope":
        pytest.skip("positions along the sequence depend on the canvas")
    small, wide = episodes().data, {}
    for name, value in small.items():
        if name in ("inputs", "demo_inputs", "demo_labels"):
            value = torch.nn.functional.pad(
                value.unflatten(-1, (SIDE, SIDE)), (0, 3, 0, 3), value=PAD
            ).flatten(-2)
        wide[name] = value
    one, other = model.context(small), model.context(wide)
    valid = [
        context.prefix_mask if context.memory is None else context.memory_mask for context in (one, other)
    ]
    tokens = [
        context.told.flatten(0, 1) if mask is None else context.told[mask]
        for context, mask in zip((one, other), valid, strict=True)
    ]
    assert torch.allclose(*tokens, atol=1e-5)


def test_a_memory_has_one_token_per_cell_that_is_not_padding(fewshot):
    context = make_case("memory", fewshot).context(episodes().data)
    assert context.memory_mask.sum(1).tolist() == [3 * 16] * 4
    everywhere = make_case("memory", fewshot, "float32", "encoder.attend_padding=true").context(
        episodes().data
    )
    assert everywhere.memory_mask.sum(1).tolist() == [3 * SIDE**2] * 4


@pytest.mark.parametrize("case", ["iterative", "iterative recursive"])
def test_an_iterative_context_changes_over_act_steps_and_has_gradient_at_each(case, fewshot):
    model = make_case(case, fewshot).train()
    data = episodes().data
    carry = initial_carry(model, data)
    contexts = []
    for _ in range(3):
        model.zero_grad()
        output = act_step(model, carry, data, min_halt_steps=torch.full((4,), 9))
        act_loss(output, OBJECTIVE)[0].backward()
        carry = output.carry
        contexts.append(output.context.prefix)
        assert not any(value.requires_grad for value in carry.context_state.values())
        started = carry.steps[0] == 1
        for name, parameter in model.context.named_parameters():
            if started or not name.startswith("start."):
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert not torch.allclose(contexts[0], contexts[1], atol=1e-3) and not torch.allclose(
        contexts[1], contexts[2], atol=1e-3
    )


def test_evaluation_encodes_once_but_refines_at_every_act_step(fewshot):
    questions = EvaluationSet(fewshot, load_config(fewshot).data, "test", 1, 0, "none", 2, None)
    batches = len(list(questions.batches(64, 0, 1)))
    for case, calls_per_batch in (("memory", 1), ("iterative", 3)):
        model, calls = make_case(case, fewshot), []
        model.context.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        inference(Trainer(fewshot), questions, 64, model=model).predict()
        assert len(calls) == batches * calls_per_batch


def test_q_learning_looks_ahead_with_the_refined_context(fewshot):
    model, calls = make_model(fewshot, *CASES["iterative"], "arch.no_ACT_continue=false").train(), []
    model.context.register_forward_hook(lambda *_: calls.append(1))
    data = episodes().data
    assert act_step(model, initial_carry(model, data), data).target_q_continue is not None and len(calls) == 2


def test_the_latent_width_reaches_the_model(fewshot):
    bottlenecks = [
        make_model(fewshot, "encoder=lpn_var", *options).context.bottleneck
        for options in ([], ["encoder.latent_dim=512"])
    ]
    assert [bottleneck.mean.weight.shape for bottleneck in bottlenecks] == [(32, 128), (512, 128)]


def test_the_lpn_encoder_is_as_small_as_the_papers(fewshot):
    """673K parameters with sixteen output tokens for a core of width 512."""
    config = load_config(fewshot, "encoder=lpn_var")
    encoder = build_encoder(config.encoder, config.arch.model_copy(update={"hidden_size": 512}))
    assert round(sum(parameter.numel() for parameter in encoder.parameters()), -3) == 673_000


def test_every_key_of_every_encoder_is_read():
    kinds = {line.__name__ for config, _ in ENCODERS.values() for line in config.__mro__}
    assert not [setting for setting in unread_settings() if setting.split(".")[0] in kinds]


def test_an_encoder_is_a_module_a_row_and_a_yaml(fewshot, tmp_path, monkeypatch):
    """All that a new encoder needs: no other file knows of it."""

    class ToyConfig(EncoderConfig):
        tokens: int

    class Toy(ContextModule):
        def __init__(self, config, arch):
            super().__init__()
            self.tokens, self.embed = (
                config.tokens,
                Embedding(12, arch.hidden_size * config.tokens, arch.dtype),
            )

        def prefix_length(self, demos, cells):
            return self.tokens

        def forward(self, data, state=None):
            shown = self.embed(data["demo_labels"]) * data["demo_mask"][:, :, None, None]
            return Context(
                prefix=self.as_prefix(rms_norm(shown.sum((1, 2)).unflatten(-1, (self.tokens, -1))))
            )

    monkeypatch.setitem(encoders.ENCODERS, "toy", (ToyConfig, Toy))
    shutil.copytree(
        compose.CONFIG_DIR, tmp_path / "config", ignore=shutil.ignore_patterns("*.py", "__pycache__")
    )
    (tmp_path / "config" / "encoder" / "toy.yaml").write_text("name: toy\ntokens: 3\n")
    monkeypatch.setattr(compose, "CONFIG_DIR", tmp_path / "config")
    trainer = Trainer(fewshot, "encoder=toy")
    assert all(loss > 0 for loss in trainer.steps(3)) and trainer.state.model.context.tokens == 3
    assert (
        trainer.state.optimizers[0].state[trainer.state.model.context.embed.weight]["exp_avg"].abs().sum() > 0
    )
