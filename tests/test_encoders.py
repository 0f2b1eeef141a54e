"""Every demonstration encoder by the same table, its state between ACT steps, and the objectives and measurements on its context."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from pydantic import ValidationError

from config import compose
from config.schema import PretrainConfig
from dataset.canvas import PAD
from dataset.views import EvaluationSet
from evaluation.inference import predict
from models import encoders
from models.act import act_step, initial_carry
from models.context import Context, ContextModule, EncoderConfig
from models.encoders import ENCODERS, build_encoder
from models.encoders.pooled import gaussian_kl
from models.layers import Embedding, rms_norm
from models.losses import act_loss
from models.trm import DataSizes, RecursiveModel, build_model
from tests.conftest import ROOT, load_config, run
from tests.test_models import OBJECTIVE, SIDE, episodes, make_model
from tests.test_training import ALONE, CPU, TRAINER, Trainer, arguments_for
from training.diagnostics import context_diagnostics, energy_shares
from training.objectives import contrastive_loss, reconstruction_loss
from training.step import _noise, train_step
from utils import checkpoint
from utils.distributed import World

SMALL = ["encoder.num_layers=1", "data.min_demos=2", "arch.halt_exploration_prob=1", "global_batch_size=4"]
RELATED = ["arch.relations=[symmetries,neighbours]", "encoder.relations=[symmetries,neighbours]"]
CASES = {name: [f"encoder={name}", *SMALL] for name in ENCODERS} | {
    "memory as prefix": ["encoder=memory", "encoder.placement=prefix", *SMALL],
    "memory with relations": ["encoder=memory", "encoder.colour_path=true", *RELATED, *SMALL],
    "prefix with relations": ["encoder=memory", "encoder.placement=prefix", "encoder.colour_path=true", *RELATED, *SMALL],
    "standard with relations": ["encoder=standard", *RELATED, *SMALL],
    "memory of single cells": ["encoder=memory", "encoder.pair_tokens=concatenated", "encoder.positions=rope", *SMALL],
    "standard attention": ["encoder=standard", "encoder.pooling_method=attention", *SMALL],
    "standard weighted": ["encoder=standard", "encoder.pooling_method=weighted", *SMALL],
    "every option": [
        *("encoder=hybrid_standard", "encoder.shared_colours=true", "encoder.qk_norm=true", "encoder.layer_scale=0.1"),
        *("encoder.norm=layer", "encoder.bottleneck=demonstration", "encoder.latent_dim=32"),
        *("encoder.hidden_size=24", "encoder.num_heads=3", *SMALL),
    ],
    "iterative recursive": [
        *("encoder=iterative", "encoder.update=recursive", "encoder.H_cycles=3", "encoder.L_cycles=1", "encoder.smoothing=0.9", *SMALL),
    ],
}
VARIATIONAL = ["variational", "lpn_variational", "lpn_variational_v2", "hybrid_variational", "lpn_var"]


def normal(batch: int, seed: int = 0):
    """A source of noise for tests."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(batch, *shape, generator=generator)


def make_case(case: str, store, dtype: str = "float32", *overrides: str) -> RecursiveModel:
    """The model of one case, from the configuration that its `Trainer` has, too."""
    config = load_config(store, *TRAINER, *CASES[case], *overrides)
    torch.manual_seed(0)
    arch = config.arch.model_copy(update={"forward_dtype": dtype})
    return build_model(arch, DataSizes(12, store.metadata.num_puzzle_identifiers, SIDE**2), config.encoder)


def logits(model: RecursiveModel, data: dict) -> torch.Tensor:
    with torch.no_grad():
        return act_step(model, initial_carry(model, data), data).logits


def trained_loss(model: RecursiveModel, data: dict) -> torch.Tensor:
    """The loss of one ACT step in training."""
    model.train()
    return act_loss(act_step(model, initial_carry(model, data), data, noise=normal(len(data["inputs"]))), OBJECTIVE)[0]


@pytest.mark.parametrize("case", CASES)
def test_three_steps_reach_every_parameter_and_resume_bitwise(case, fewshot, tmp_path):
    trainer = Trainer(fewshot, *CASES[case])
    result = train_step(trainer.state, trainer.batch(), trainer.settings)
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
        shuffled = {name: value[:, order] if name.startswith("demo") else value for name, value in data.items()}
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
    assert all(value.dtype == torch.bfloat16 for name, value in output.carry.context_state.items() if name != "noise")
    assert all(p.dtype == torch.float32 and (p.grad is None or p.grad.isfinite().all()) for p in model.parameters())


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
        if name in ("demo_inputs", "demo_labels"):
            value = torch.nn.functional.pad(value.unflatten(-1, (SIDE, SIDE)), (0, 3, 0, 3), value=PAD).flatten(-2)
        wide[name] = value
    one, other = model.context(small), model.context(wide)
    valid = [context.prefix_mask if context.memory is None else context.memory_mask for context in (one, other)]
    tokens = [context.told.flatten(0, 1) if mask is None else context.told[mask] for context, mask in zip((one, other), valid, strict=True)]
    assert torch.allclose(*tokens, atol=1e-5)


def test_a_memory_has_one_token_per_cell_that_is_not_padding(fewshot):
    context = make_case("memory", fewshot).context(episodes().data)
    assert context.memory_mask.sum(1).tolist() == [3 * 16] * 4
    everywhere = make_case("memory", fewshot, "float32", "encoder.attend_padding=true").context(episodes().data)
    assert everywhere.memory_mask.sum(1).tolist() == [3 * SIDE**2] * 4


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
    assert context.prefix.isfinite().all() and context.losses["kl"].isfinite().all() and context.losses["kl"].dtype == torch.float32


def test_the_kl_is_the_closed_form_per_sample_and_ignores_empty_slots(fewshot):
    mean, log_variance = torch.randn(5, 7), torch.randn(5, 7)
    ours, unit = torch.distributions.Normal(mean, (0.5 * log_variance).exp()), torch.distributions.Normal(0.0, 1.0)
    assert torch.allclose(gaussian_kl(mean, log_variance), torch.distributions.kl_divergence(ours, unit).sum(-1), atol=1e-5)

    model = make_case("lpn_var", fewshot).eval()
    data = episodes().data
    kl = model.context(data).losses["kl"]
    halved = data | {"demo_mask": torch.tensor([[True, False, False]] * 4)}
    each = [model.context(data | {"demo_mask": torch.eye(3, dtype=torch.bool)[[k] * 4]}).losses["kl"] for k in range(3)]
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
    whole = _noise(trainer.state, batch, trainer.settings)(2, 3)
    part = _noise(trainer.state, batch, dataclasses.replace(trainer.settings, world=World(rank, 2)))(2, 3)
    assert torch.equal(part, whole[2 * rank : 2 * rank + 2]) and whole.std() > 0.5
    trainer.state.step += 1
    assert not torch.equal(_noise(trainer.state, batch, trainer.settings)(2, 3), whole)


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
    assert not torch.allclose(contexts[0], contexts[1], atol=1e-3) and not torch.allclose(contexts[1], contexts[2], atol=1e-3)


def test_evaluation_encodes_once_but_refines_at_every_act_step(fewshot):
    questions = EvaluationSet(fewshot, load_config(fewshot).data, "test", 1, 0, "none", 2, None)
    batches = len(list(questions.batches(64, 0, 1)))
    for case, calls_per_batch in (("memory", 1), ("iterative", 3)):
        model, calls = make_case(case, fewshot), []
        model.context.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        predict(model, questions, fewshot.grid_table, 64, ALONE)
        assert len(calls) == batches * calls_per_batch


def test_q_learning_looks_ahead_with_the_refined_context(fewshot):
    model, calls = make_model(fewshot, *CASES["iterative"], "arch.no_ACT_continue=false").train(), []
    model.context.register_forward_hook(lambda *_: calls.append(1))
    data = episodes().data
    assert act_step(model, initial_carry(model, data), data).target_q_continue is not None and len(calls) == 2


def test_reconstruction_asks_for_every_demonstration_in_turn(fewshot, monkeypatch):
    model = make_case("standard", fewshot).train()
    data = episodes().data
    data["demo_mask"] = torch.tensor([[True, True, True], [True, False, True], [False, True, False], [False, False, False]])
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
    assert (contrastive_loss(model, twice, 0.1, normal(6), ALONE)[:3] > alone).all()  # each sample's twin is a negative now
    twice["puzzle_identifiers"] = torch.tensor([0, 1, 2, 0, 1, 2])
    doubled = contrastive_loss(model, twice, 0.1, normal(6), ALONE)[:3]
    assert torch.allclose(doubled.exp() - 1, 2 * (alone.exp() - 1), rtol=1e-3)  # only the others' twins are
    same = data | {"puzzle_identifiers": torch.full((3,), 5, dtype=torch.int32)}
    assert torch.equal(contrastive_loss(model, same, 0.1, normal(3), ALONE), torch.zeros(3))
    data["demo_mask"][0, 1:] = False
    short = contrastive_loss(model, data, 0.1, normal(3), ALONE)
    assert short[0] == 0 and (short[1:] > 0).all() and (short[1:] < alone[1:]).all()  # one negative fewer


def test_two_processes_share_noise_negatives_and_gradients(fewshot, tmp_path):
    options = ["encoder=hybrid_variational", *SMALL, "objective.kl_weight=0.01", "objective.contrastive_weight=0.5"]
    options += ["objective.reconstruct_weight=0.5", "train_steps=3"]
    done = run(*arguments_for(fewshot, tmp_path, *options), world=2)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    trainer = Trainer(fewshot, *options, "lr_warmup_steps=200")
    for line in lines:
        result = train_step(trainer.state, trainer.batch(), trainer.settings)
        for name in ("lm_loss", "kl_loss", "reconstruct_loss", "contrastive_loss"):
            assert line[f"train/{name}"] == pytest.approx((result.metrics[name] / result.metrics["rows"]).item(), rel=1e-5), name
        for part in ("encoder", "inner", "total"):
            assert line[f"grad/{part}_norm"] == pytest.approx(result.grad_norms[part].item(), rel=1e-4)
        assert line["train/context_gradient"] == 1 and 0 < line["context/between_task_share"] < 1
    weights = checkpoint.load_weights(tmp_path / "r" / "checkpoints" / "step_3", "raw")
    assert max((weights[name] - value).abs().max().item() for name, value in trainer.state.model.state_dict().items()) <= 1e-6


def test_gradient_norms_are_those_before_clipping_and_add_up(fewshot):
    loose, tight = (Trainer(fewshot, f"grad_clip_norm={limit}") for limit in ("null", "0.001"))
    norms, clipped = (train_step(t.state, t.batch(), t.settings).grad_norms for t in (loose, tight))
    assert norms == clipped and norms["encoder"] > 0.001
    assert torch.allclose(norms["total"].square(), norms["inner"].square() + norms["encoder"].square())


def test_a_context_without_gradient_is_reported(fewshot):
    trainer = Trainer(fewshot)
    forward = trainer.state.model.context.forward
    trainer.state.model.context.forward = lambda *arguments: dataclasses.replace(
        (context := forward(*arguments)), prefix=context.prefix.detach(), memory=context.memory.detach()
    )
    assert train_step(trainer.state, trainer.batch(), trainer.settings).metrics["context_gradient"] == 0


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


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("standard", {"shared_colours": True, "pair_tokens": "summed"}, "cannot tell input from output"),
        ("memory", {"shared_colours": True}, "cannot tell input from output"),
        ("standard", {"set_layers": 0}, "set_layers=0 does not fit encoder.aggregator=queries"),
        ("standard", {"variational": True, "initial_sigma": 0.03}, "needs a latent"),
        ("lpn", {"latent_dim": None}, "encoder.latent_dim must be given with an encoder.bottleneck"),
        ("lpn_var", {"initial_sigma": None}, "encoder.initial_sigma must be given with encoder.variational"),
        ("iterative recursive", {"H_cycles": None}, "encoder.H_cycles must be given with encoder.update=recursive"),
        ("lpn", {"num_heads": None}, "belong together"),
        ("lpn", {"num_heads": 64}, "divisible by 4 * encoder.num_heads=64"),
        ("perceiver", {"num_layers": 0, "positions": "rope2d"}, "would not see where cells are"),
        ("iterative", {"smoothing": 1.0}, "less than 1"),
        ("lpn", {"latent_dims": 8}, "Extra inputs are not permitted"),
    ],
)
def test_encoder_settings_that_cannot_work_say_so(name, changes, words, fewshot):
    config = load_config(fewshot, *TRAINER, *CASES[name]).encoder
    with pytest.raises(ValidationError, match=re.escape(words)):
        type(config)(**(config.model_dump() | changes))


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("standard", {"latent_dim": 512}, "encoder.latent_dim=512 is read only with an encoder.bottleneck"),
        ("lpn", {"initial_sigma": 0.1}, "encoder.initial_sigma=0.1 is read only with encoder.variational"),
        ("iterative", {"H_cycles": 6}, "encoder.H_cycles=6 is read only with encoder.update=recursive"),
    ],
)
def test_a_run_is_not_given_what_its_encoder_does_not_read(name, changes, words, fewshot):
    config = load_config(fewshot, *TRAINER, *CASES[name])
    encoder = type(config.encoder)(**(config.encoder.model_dump() | changes))  # a checkpoint of an earlier version holds it
    with pytest.raises(ValidationError, match=re.escape(words)):
        PretrainConfig(**(config.model_dump() | {"encoder": encoder}))


def test_an_objective_without_anything_to_weigh_is_refused(fewshot, puzzle):
    for store, changes, words in (
        (fewshot, {"kl_weight": 0.1}, "weighs nothing: the context is not variational"),
        (puzzle, {"reconstruct_weight": 1.0}, "reconstruct_weight=1.0 needs demonstrations"),
        (puzzle, {"contrastive_weight": 1.0}, "contrastive_weight=1.0 needs demonstrations"),
    ):
        values = load_config(store).model_dump()
        with pytest.raises(ValidationError, match=re.escape(words)):
            PretrainConfig(**(values | {"objective": values["objective"] | changes}))


def test_the_latent_width_reaches_the_model(fewshot):
    bottlenecks = [make_model(fewshot, "encoder=lpn_var", *options).context.bottleneck for options in ([], ["encoder.latent_dim=512"])]
    assert [bottleneck.mean.weight.shape for bottleneck in bottlenecks] == [(32, 128), (512, 128)]


def test_the_lpn_encoder_is_as_small_as_the_papers(fewshot):
    """673K parameters with sixteen output tokens for a core of width 512."""
    config = load_config(fewshot, "encoder=lpn_var")
    encoder = build_encoder(config.encoder, config.arch.model_copy(update={"hidden_size": 512}))
    assert round(sum(parameter.numel() for parameter in encoder.parameters()), -3) == 673_000


def test_every_key_of_every_encoder_is_read():
    source = "\n".join(path.read_text() for path in (ROOT / "models").glob("**/*.py"))
    for config, _ in ENCODERS.values():
        for name in config.model_fields:
            assert re.search(rf"(config|self)\.{name}\b", source), f"{config.__name__}.{name} is never read"


def test_an_encoder_is_a_module_a_row_and_a_yaml(fewshot, tmp_path, monkeypatch):
    """All that a new encoder needs: no other file knows of it."""

    class ToyConfig(EncoderConfig):
        tokens: int

    class Toy(ContextModule):
        def __init__(self, config, arch):
            super().__init__()
            self.tokens, self.embed = config.tokens, Embedding(12, arch.hidden_size * config.tokens, arch.dtype)

        def prefix_length(self, demos, cells):
            return self.tokens

        def forward(self, data, state=None):
            shown = self.embed(data["demo_labels"]) * data["demo_mask"][:, :, None, None]
            return Context(prefix=self.as_prefix(rms_norm(shown.sum((1, 2)).unflatten(-1, (self.tokens, -1)))))

    monkeypatch.setitem(encoders.ENCODERS, "toy", (ToyConfig, Toy))
    shutil.copytree(compose.CONFIG_DIR, tmp_path / "config", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (tmp_path / "config" / "encoder" / "toy.yaml").write_text("name: toy\ntokens: 3\n")
    monkeypatch.setattr(compose, "CONFIG_DIR", tmp_path / "config")
    trainer = Trainer(fewshot, "encoder=toy")
    assert all(loss > 0 for loss in trainer.steps(3)) and trainer.state.model.context.tokens == 3
    assert trainer.state.optimizers[0].state[trainer.state.model.context.embed.weight]["exp_avg"].abs().sum() > 0
