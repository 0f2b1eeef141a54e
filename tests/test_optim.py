"""Which parameters change when, and by what: staging, parameter groups, optimisers."""

import copy

import pytest
import torch

from models.context import PuzzleEmbedding
from models.layers import Embedding, Linear
from tests.support.runs import ALONE, CPU, Trainer, load_config
from training import optim
from training.ema import EMA
from training.optim import AdamATan2, SparseSignSGD, build_optimizers, load_optimizer
from training.schedule import learning_rate
from training.step import train_step
from utils.errors import UserError


def snapshot(trainer: Trainer) -> dict[str, dict]:
    """Copies of weights, averages and moments by parameter name."""
    names = {id(parameter): name for name, parameter in trainer.state.model.named_parameters()}
    moments = {}
    for optimizer in trainer.state.optimizers:
        for parameter, state in getattr(optimizer, "state", {}).items():
            moments[names[id(parameter)]] = copy.deepcopy(state)
    return {
        "weights": copy.deepcopy(trainer.state.model.state_dict()),
        "ema": copy.deepcopy(trainer.state.ema.shadow),
        "moments": moments,
    }


def changed(trainer: Trainer, steps: int = 1) -> dict[str, set[str]]:
    """What differs after some steps."""
    before = snapshot(trainer)
    trainer.steps(steps)
    after = snapshot(trainer)

    def differs(one, other) -> bool:
        if isinstance(other, dict):
            return one is None or any(differs(one[key], value) for key, value in other.items())
        return not torch.equal(one, other) if isinstance(other, torch.Tensor) else one != other

    return {
        what: {name for name, value in values.items() if differs(before[what].get(name), value)}
        for what, values in after.items()
    }


def parts_of(trainer: Trainer) -> tuple[set[str], set[str]]:
    """The names of the parameters of decoder and encoder."""
    names = {name for name, _ in trainer.state.model.named_parameters()}
    encoder = {name for name in names if name.startswith("context.")}
    return names - encoder, encoder


def alike(names: set[str]) -> dict[str, set[str]]:
    return {"weights": names, "ema": names, "moments": names}


@pytest.mark.parametrize("optimizer", ["adam_atan2", "adamw", "muon"])
@pytest.mark.parametrize("frozen", ["decoder", "encoder"])
def test_a_frozen_part_keeps_weights_averages_and_moments_until_its_step(
    frozen, optimizer, fewshot, tmp_path
):
    options = (f"freeze_{frozen}_steps=2", f"optimizer={optimizer}", "lr_warmup_steps=0")
    trainer = Trainer(fewshot, *options)
    decoder, encoder = parts_of(trainer)
    moving = encoder if frozen == "decoder" else decoder
    for _ in range(2):
        assert changed(trainer) == alike(moving)
        path = trainer.state.save(tmp_path, ALONE, {}, keep=1)
        trainer = Trainer(fewshot, *options)  # the stage is the step's, whatever process comes there
        trainer.state.load(path, ALONE, CPU)
    assert changed(trainer) == alike(decoder | encoder)


def test_a_frozen_part_has_no_norm_and_the_rest_its_own(fewshot):
    trainer, free = Trainer(fewshot, "freeze_decoder_steps=all"), Trainer(fewshot)
    ours, theirs = (train_step(t.state, t.batch(), t.config, t.world) for t in (trainer, free))
    assert ours.grad_norms.keys() == {"encoder", "total"} and ours.metrics["context_gradient"] == 8
    assert torch.allclose(ours.grad_norms["total"], theirs.grad_norms["encoder"], rtol=1e-5)
    frozen = Trainer(fewshot, "freeze_encoder_steps=all")
    result = train_step(frozen.state, frozen.batch(), frozen.config, frozen.world)
    assert result.grad_norms.keys() == {"inner", "total"} and result.metrics["context_gradient"] == 0


@pytest.mark.parametrize("mode", ["act", "supervised"])
def test_a_frozen_trunk_trains_the_rows_of_seen_puzzles_only(mode, puzzle):
    trainer = Trainer(puzzle, "freeze_decoder_steps=all", f"mode={mode}", "lr_warmup_steps=0")
    before = trainer.state.model.context.weights.clone()
    identifiers = trainer.batch().data["puzzle_identifiers"].unique()
    assert changed(trainer) == {"weights": {"context.weights"}, "ema": set(), "moments": set()}
    moved = (trainer.state.model.context.weights != before).any(1).nonzero().flatten()
    assert set(moved.tolist()) == set(identifiers.tolist())


def test_a_start_that_is_not_learned_stays_so(fewshot):
    trainer = Trainer(
        fewshot,
        "encoder=iterative",
        "encoder.learned_start=false",
        "encoder.num_layers=1",
        "freeze_encoder_steps=1",
    )
    starts = {name for name, _ in trainer.state.model.named_parameters() if ".start." in name}
    trainer.steps(1)
    assert starts and not changed(trainer)["weights"] & starts


def test_the_encoder_has_its_own_rate_and_decay(fewshot):
    trainer = Trainer(fewshot, "encoder_lr=0", "lr_warmup_steps=0")
    decoder, _ = parts_of(trainer)
    assert changed(trainer)["weights"] == decoder
    plain, decayed = (
        Trainer(fewshot, "lr=1e-2", "lr_warmup_steps=0"),
        Trainer(fewshot, "lr=1e-2", "lr_warmup_steps=0", "encoder_weight_decay=0.6"),
    )
    start = copy.deepcopy(plain.state.model.state_dict())
    for trainer in (plain, decayed):
        trainer.steps(1)
    for (name, ours), theirs in zip(
        plain.state.model.state_dict().items(), decayed.state.model.state_dict().values(), strict=True
    ):
        extra = 1e-2 * (0.6 - 0.1) * start[name] if name.startswith("context.") else torch.zeros(())
        assert torch.allclose(ours - theirs, extra, atol=1e-7), name


def test_muon_takes_hidden_matrices_and_the_adam_like_one_the_rest(fewshot, puzzle):
    for store in (fewshot, puzzle):
        model = Trainer(store).state.model
        optimizers, name = build_optimizers(model, Trainer(store, "optimizer=muon").config, CPU)
        assert name.startswith("Muon + AdamATan2")
        owners = {
            id(p): type(o).__name__
            for o in optimizers[:2]
            for group in o.param_groups
            for p in group["params"]
        }
        assert len(owners) == len(list(model.parameters()))
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                assert owners[id(module.weight)] == (
                    "AdamATan2" if name in ("lm_head", "q_head") else "Muon"
                ), name
                assert module.bias is None or owners[id(module.bias)] == "AdamATan2"
            if isinstance(module, Embedding):
                assert owners[id(module.weight)] == "AdamATan2"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_other_optimisers_train_everything_and_resume(optimizer, fewshot, tmp_path):
    options = (f"optimizer={optimizer}", "lr_warmup_steps=0", "lr=3e-3")
    trainer = Trainer(fewshot, *options)
    decoder, encoder = parts_of(trainer)
    assert changed(trainer)["weights"] == decoder | encoder
    path = trainer.state.save(tmp_path, ALONE, {}, keep=1)
    resumed = Trainer(fewshot, *options)
    resumed.state.load(path, ALONE, CPU)
    assert resumed.steps(2) == trainer.steps(2)


def test_the_count_of_updates_is_what_the_optimiser_in_use_reads(monkeypatch):
    class Fused(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 1.0, "betas": (0.9, 0.95), "weight_decay": 0.0})

    monkeypatch.setattr(optim, "FusedAdamATan2", Fused)
    moments = {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    for count in (7, torch.tensor(7.0)):
        ours = AdamATan2([torch.zeros(2, requires_grad=True)], lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
        fused = Fused([torch.zeros(2, requires_grad=True, device="meta")])
        for optimizer in (ours, fused):
            load_optimizer(optimizer, {**optimizer.state_dict(), "state": {0: {"step": count, **moments}}})
        (mine,), (theirs,) = ours.state.values(), fused.state.values()
        assert mine["step"] == 7 and type(mine["step"]) is int
        assert (
            theirs["step"].device.type == "meta"
            and theirs["step"].dtype == torch.float32
            and theirs["step"].shape == ()
        )


def test_adamw_follows_its_formula(fewshot):
    trainer = Trainer(fewshot, "optimizer=adamw", "lr=1e-2", "lr_warmup_steps=0", "grad_clip_norm=null")
    weight = trainer.state.model.lm_head.weight
    before, gradients = weight.detach().clone(), []
    weight.register_hook(lambda gradient: gradients.append(gradient.clone()))
    trainer.steps(1)
    expected = before * (1 - 1e-2 * 0.1) - 1e-2 * gradients[0] / (gradients[0].abs() + 1e-8)
    assert torch.allclose(weight, expected, atol=1e-6)


def test_muon_is_refused_where_pytorch_lacks_it(fewshot, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match="optimizer=muon needs torch.optim.Muon"):
        Trainer(fewshot, "optimizer=muon")


def test_adam_atan2_follows_its_formula():
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(7))
    optimizer = AdamATan2([parameter], lr=0.1, betas=(0.9, 0.95), weight_decay=0.2)
    x, m, v = parameter.detach().double().clone(), torch.zeros(7).double(), torch.zeros(7).double()
    for t in range(1, 6):
        gradient = torch.randn(7)
        parameter.grad = gradient.clone()
        optimizer.step()
        m = 0.9 * m + 0.1 * gradient.double()
        v = 0.95 * v + 0.05 * gradient.double() ** 2
        x = x * (1 - 0.1 * 0.2) - 0.1 * torch.atan2(m / (1 - 0.9**t), (v / (1 - 0.95**t)).sqrt())
        assert torch.allclose(parameter.detach().double(), x, atol=1e-6)


def test_adam_atan2_accepts_a_zero_rate_and_skips_parameters_without_gradient():
    parameter, idle = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = AdamATan2([parameter, idle], lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert (
        torch.equal(parameter, torch.ones(2))
        and torch.equal(idle, torch.ones(2))
        and not optimizer.state[idle]
    )


def test_the_fused_optimiser_is_used_on_cuda_only_and_named(fewshot, monkeypatch):
    class Fused(AdamATan2):
        pass

    monkeypatch.setattr(optim, "FusedAdamATan2", Fused)
    model = Trainer(fewshot).state.model
    config = load_config(fewshot)
    assert "PyTorch foreach" in build_optimizers(model, config, CPU)[1]
    optimizers, name = build_optimizers(model, config, torch.device("cuda"))
    assert isinstance(optimizers[0], Fused) and "fused" in name


def test_sign_sgd_sums_each_identifier_before_the_sign_and_decays_touched_rows_only():
    embedding = PuzzleEmbedding(5, 4, 1, 4, torch.float32)
    torch.nn.init.normal_(embedding.weights)
    before = embedding.weights.clone()
    optimizer = SparseSignSGD(embedding, lr=0.1, weight_decay=0.5)
    gradients = []
    for ids in (torch.tensor([1, 3, 1]), torch.tensor([3, 4])):  # two micro-batches before one update
        context = embedding({"puzzle_identifiers": ids})
        weight = torch.randn_like(context.prefix)
        (context.prefix * weight).sum().backward()
        gradients += list(zip(ids.tolist(), weight[:, 0], strict=True))
    optimizer.step(torch.tensor(True))
    optimizer.zero_grad()
    for row in range(5):
        total = sum((gradient for index, gradient in gradients if index == row), torch.zeros(4))
        expected = before[row] if row in (0, 2) else before[row] * (1 - 0.1 * 0.5) - 0.1 * total.sign()
        assert torch.allclose(embedding.weights[row], expected)
    assert not embedding.gathered


def test_the_schedule_warms_up_then_falls_to_its_floor():
    rates = [learning_rate(step, 1.0, 10, 110, 0.1) for step in (1, 10, 60, 110, 200)]
    assert rates == pytest.approx([0.1, 1.0, 0.55, 0.1, 0.1])
    assert learning_rate(5000, 0.3, 10, 100, 1.0) == pytest.approx(0.3)


def test_ema_follows_its_formula_and_swaps_without_copies():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    ema = EMA(model, 0.9)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update()
        expected = {name: 0.9 * expected[name] + 0.1 * value for name, value in model.state_dict().items()}
    raw = {name: (value.clone(), value.data_ptr()) for name, value in model.named_parameters()}
    with ema.swapped_in():
        assert all(
            torch.allclose(value, expected[name], atol=1e-6) for name, value in model.named_parameters()
        )
    assert all(
        torch.equal(value, raw[name][0]) and value.data_ptr() == raw[name][1]
        for name, value in model.named_parameters()
    )
