"""Layers, contexts, ACT and losses."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataset.canvas import IGNORE_LABEL_ID
from models.act import Answer, act_step, exploration, initial_carry
from models.foreign import load_original
from models.layers import Attention, Embedding, rms_norm, swiglu_width, truncated_normal
from models.losses import act_loss, answer_metrics, softmax_cross_entropy, stablemax_cross_entropy
from models.positions import rotary_line, rotary_square
from models.trm import RecursiveModel
from tests.golden import check as golden
from tests.support.models import OBJECTIVE, episodes, make_model, one_loss
from utils.errors import UserError


def test_the_original_trm_is_matched():
    assert golden.check(Path(__file__).parent / "golden")


def test_the_golden_check_fails_on_other_numbers(tmp_path, capsys):
    source = Path(__file__).parent / "golden"
    for name in ("trm_attention.config.json", "trm_attention.checkpoint.pt"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    arrays = dict(np.load(source / "trm_attention.npz"))
    arrays["eval_loss_0"] = arrays["eval_loss_0"] + 1e-3
    np.savez(tmp_path / "trm_attention.npz", **arrays)
    assert not golden.check(tmp_path)
    assert "FAIL model trm_attention" in capsys.readouterr().out


def test_the_golden_check_sees_a_changed_weight_where_rounding_is_amplified(monkeypatch):
    def changed(model: RecursiveModel) -> RecursiveModel:
        with torch.no_grad():
            model.lm_head.weight[3] *= 1.001
        return model

    case = Path(__file__).parent / "golden" / "trm_mlp_t"
    differences = golden.check_model(case)
    assert all(found <= allowed for found, allowed in differences.values())
    assert differences["eval_logits_2"].allowed > 1e-2 and differences["eval_logits_0"].allowed < 1e-3
    build = golden.build_case
    monkeypatch.setattr(golden, "build_case", lambda case: changed(build(case)))
    differences = golden.check_model(case)
    assert differences["eval_logits_0"].found > differences["eval_logits_0"].allowed


def test_initial_values_have_the_stated_deviation():
    torch.manual_seed(0)
    values = truncated_normal(1000, 1000, std=0.5)
    assert abs(values.std().item() - 0.5) < 2e-3 and abs(values.mean().item()) < 2e-3


def test_swiglu_width_is_the_originals():
    assert [swiglu_width(size, 4) for size in (64, 512, 768)] == [256, 1536, 2048]


def test_rotary_scores_depend_on_the_offset_only():
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    line = rotary_line(8, 16, torch.device("cpu"))
    square = rotary_square(8, 16, torch.device("cpu"))

    def scores(table, places):
        return [
            (table.rows(torch.tensor([a]))(query) * table.rows(torch.tensor([b]))(key)).sum()
            for a, b in places
        ]

    a, b, c = scores(line, [(0, 3), (2, 5), (2, 6)])
    assert torch.allclose(a, b, atol=1e-5) and not torch.allclose(a, c, atol=1e-3)
    a, b, c = scores(square, [(0, 8 * 2 + 1), (8 * 3 + 4, 8 * 5 + 5), (0, 8 * 1 + 2)])
    assert torch.allclose(a, b, atol=1e-5) and not torch.allclose(a, c, atol=1e-3)


def test_turned_values_say_where_they_were_seen_from_the_reader():
    """Uniform attention, so that positions cannot decide what is read.

    The same tokens at other places are read as something else with turned values, as the same without;
    moving all of them together never matters.
    """
    torch.manual_seed(0)
    attention, x = Attention(32, 2), torch.randn(1, 3, 32)
    with torch.no_grad():
        attention.qkv_proj.weight[:64] = 0

    def read(values: bool, *places: int) -> torch.Tensor:
        return attention(x, rotary_square(8, 16, torch.device("cpu"), values).rows(torch.tensor(places)))

    here, moved, apart = (0, 1, 9), (18, 19, 27), (0, 1, 10)
    assert torch.allclose(read(True, *here), read(True, *moved), atol=1e-5)
    assert not torch.allclose(read(True, *here), read(True, *apart), atol=1e-2)
    assert torch.allclose(read(False, *here), read(False, *apart), atol=1e-5)


@pytest.mark.parametrize("values", [False, True])
def test_memory_gives_what_the_same_tokens_in_the_sequence_would_give(values):
    torch.manual_seed(0)
    attention, x, memory = Attention(32, 2), torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    valid = torch.rand(2, 7) < 0.6
    table = dataclasses.replace(rotary_line(12, 16, torch.device("cpu")), values=values)
    mask = torch.cat((torch.ones(2, 5, dtype=torch.bool), valid), 1)[:, None, None]
    whole = attention(torch.cat((x, memory), 1), table, mask)[:, :5]
    read = attention(
        x,
        table.rows(torch.arange(5)),
        mask,
        attention.project_memory(memory, table.rows(torch.arange(5, 12))),
    )
    assert torch.allclose(whole, read, atol=1e-6)


def test_a_continuing_row_keeps_its_own_sample_and_labels(fewshot):
    model = make_model(fewshot)
    model.train()
    first, second = episodes(seed=1).data, episodes(seed=2).data
    carry = initial_carry(model, first)
    carry = act_step(model, carry, first).carry
    carry = dataclasses.replace(carry, halted=torch.tensor([True, False, True, False]))
    carry = act_step(model, carry, second).carry
    for name in first:
        for row, source in enumerate((second, first, second, first)):
            assert torch.equal(carry.data[name][row], source[name][row])
    assert carry.steps.tolist() == [1, 2, 1, 2]


def test_halting_follows_the_logit_the_limit_and_exploration(fewshot):
    model = make_model(fewshot)
    data = episodes().data
    torch.nn.init.constant_(model.q_head.bias, 5.0)
    model.train()
    assert act_step(model, initial_carry(model, data), data).carry.halted.all()
    minimum = torch.tensor([0, 2, 3, 0], dtype=torch.int32)
    carry = act_step(model, initial_carry(model, data), data, minimum).carry
    assert carry.halted.tolist() == [True, False, False, True]
    model.eval()
    carry = initial_carry(model, data)
    for step in range(1, model.config.halt_max_steps + 1):
        carry = act_step(model, carry, data).carry
        assert carry.halted.tolist() == [step == model.config.halt_max_steps] * 4


def test_exploration_draws_minimum_steps_within_limits():
    rng = np.random.default_rng(0)
    minimum = exploration(rng, 10000, 0.25, 16)
    assert set(np.unique(minimum)) == {0, *range(2, 17)}
    assert abs((minimum > 0).mean() - 0.25) < 0.02
    assert (exploration(rng, 100, 1.0, 1) == 0).all()


def test_q_learning_halts_by_comparison_and_trains_q_continue(fewshot):
    model = make_model(fewshot, "arch.no_ACT_continue=false")
    model.train()
    torch.nn.init.normal_(model.q_head.weight)
    data = episodes().data
    output = act_step(model, initial_carry(model, data), data)
    assert torch.equal(output.carry.halted, output.q_halt_logits > output.q_continue_logits)
    assert ((output.target_q_continue > 0) & (output.target_q_continue < 1)).all()
    loss, metrics = act_loss(output, OBJECTIVE)
    loss.backward()
    assert metrics["q_continue_loss"] > 0 and model.q_head.weight.grad[1].abs().sum() > 0


def test_only_the_last_cycle_carries_a_gradient_and_the_carry_none(fewshot):
    model = make_model(fewshot)
    calls = []
    model.L_level.register_forward_hook(lambda module, inputs, output: calls.append(output.requires_grad))
    output = act_step(model, initial_carry(model, episodes().data), episodes().data)
    cycle = model.config.L_cycles + 1
    assert calls == [False] * cycle * (model.config.H_cycles - 1) + [True] * cycle
    assert not any(state.requires_grad for state in output.carry.states)


def test_stablemax_matches_float64_and_has_finite_gradients_at_its_poles():
    torch.manual_seed(0)
    logits = torch.randn(3, 40, 12) * 10
    logits[0, 0] = torch.tensor([1.0, 0.0, -1.0] * 4)
    logits.requires_grad_()
    labels = torch.randint(0, 12, (3, 40))
    labels[0, 5:] = IGNORE_LABEL_ID
    loss = stablemax_cross_entropy(logits, labels)
    loss.sum().backward()
    x = logits.detach().double()
    s = torch.where(x < 0, 1 / (1 - x + 1e-30), x + 1)
    expected = -(s / s.sum(-1, keepdim=True)).log().gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    assert torch.allclose(loss.double(), torch.where(labels == IGNORE_LABEL_ID, 0.0, expected), atol=1e-5)
    assert logits.grad.isfinite().all() and (logits.grad[0, 5:] == 0).all()


def test_softmax_matches_torch():
    logits, labels = torch.randn(2, 5, 12), torch.randint(0, 12, (2, 5))
    assert torch.allclose(
        softmax_cross_entropy(logits, labels).mean(), F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    )


def test_shares_count_rows_that_halted_and_losses_all_with_labels():
    labels = torch.tensor([[2, 3], [2, IGNORE_LABEL_ID], [2, 3], [IGNORE_LABEL_ID, IGNORE_LABEL_ID]])
    answered = torch.tensor([[2, 3], [5, 5], [2, 4], [2, 3]])  # right, wrong, half right, not asked
    answer = Answer(
        20 * F.one_hot(answered, 12).float(), torch.tensor([9.0, 9.0, -9.0, 9.0]), torch.arange(1, 5)
    )
    halted = torch.tensor([True, False, True, True])
    found = answer_metrics(answer, labels, halted, OBJECTIVE)
    expected = {"rows": 3, "count": 2, "accuracy": 1.5, "exact_accuracy": 1, "q_halt_accuracy": 2, "steps": 4}
    assert {name: found[name].item() for name in expected} == expected
    assert found["lm_loss"].item() == pytest.approx(20 + 20 / 2, rel=1e-5)
    assert found["q_halt_loss"].item() == pytest.approx(9, rel=1e-3)


def test_rows_without_labels_count_nowhere(fewshot):
    model = make_model(fewshot)
    data = episodes().data
    whole = one_loss(model, data)
    doubled = {name: torch.cat((value, value)) for name, value in data.items()}
    doubled["labels"] = doubled["labels"].clone()
    doubled["labels"][4:] = IGNORE_LABEL_ID
    output = act_step(model, initial_carry(model, doubled), doubled)
    loss, metrics = act_loss(output, OBJECTIVE)
    assert torch.allclose(loss, whole, rtol=1e-5) and metrics["rows"] == 4


def test_embeddings_have_unit_rms_after_scaling():
    torch.manual_seed(0)
    weight = Embedding(500, 64, torch.float32).weight * 8
    assert abs(weight.square().mean().sqrt().item() - 1) < 0.02
    assert torch.allclose(rms_norm(torch.randn(3, 64) * 7).square().mean(-1), torch.ones(3), atol=1e-4)


@pytest.mark.parametrize(
    "positions, mlp",
    [
        ("rope", False),
        ("rope2d", False),
        ("rope2d_values", False),
        ("learned", False),
        ("none", False),
        ("none", True),
        ("learned", True),
    ],
)
def test_trm_takes_every_position_encoding(positions, mlp, puzzle):
    model = make_model(puzzle, f"arch.pos_encodings={positions}", f"arch.mlp_t={mlp}")
    model.train()
    torch.nn.init.normal_(model.context.weights)
    data = {name: value for name, value in episodes().data.items() if not name.startswith("demo")}
    loss = one_loss(model, data)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters())
    ((ids, rows),) = model.context.gathered
    assert torch.equal(ids, data["puzzle_identifiers"]) and rows.grad.abs().sum() > 0


def test_puzzle_rows_spread_over_as_many_tokens_as_they_need(puzzle):
    model = make_model(puzzle, "arch.puzzle_emb_ndim=80", "arch.puzzle_emb_len=0")
    assert model.context.prefix_length(0, 36) == 3
    torch.nn.init.normal_(model.context.weights)
    prefix = model.context({"puzzle_identifiers": torch.tensor([2])}).prefix
    assert torch.equal(prefix.flatten()[:80], model.context.weights[2]) and (prefix.flatten()[80:] == 0).all()


def test_original_checkpoints_load_with_or_without_compile_prefix(tmp_path):
    source = Path(__file__).parent / "golden" / "trm_attention.checkpoint.pt"
    state = torch.load(source, weights_only=True)
    torch.save(
        {name.removeprefix("_orig_mod."): value for name, value in state.items()}, tmp_path / "plain.pt"
    )
    first, second = load_original(source), load_original(tmp_path / "plain.pt")
    assert first.keys() == second.keys() and "context.weights" in first
    (tmp_path / "cut.pt").write_bytes(source.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged or no PyTorch file"):
        load_original(tmp_path / "cut.pt")
