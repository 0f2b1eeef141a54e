"""What training draws for its rows: dropout and noise on the carry, whatever computes a row, and when."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models import fused
from models.act import act_step, initial_carry, solve
from models.noise import WORD, Draws, mixed
from tests.support.encoders import normal
from tests.support.models import episodes, make_model
from tests.support.runs import ALONE, CPU, Trainer, set_counts
from training.step import accumulate, train_step
from utils.distributed import World

NOISY = ("arch.dropout=0.3", "arch.carry_noise=0.1")
KEYS = torch.arange(6) * 7919


def test_a_draw_drops_its_share_and_keeps_the_mean():
    x = torch.ones(6, 50, 40)
    found = Draws(KEYS).dropped(x, 0.25)
    assert found.unique().tolist() == pytest.approx([0, 4 / 3])
    assert ((found == 0).float().mean((1, 2)) - 0.25).abs().max() < 0.04  # 4 deviations of a row's share
    assert (Draws(KEYS).dropped(x, 0.5) == 0)[found == 0].all()  # a larger share drops more of the same


def test_normal_draws_have_the_moments_and_tails_of_a_normal_distribution():
    found = Draws(KEYS).normal(torch.empty(6, 200, 100, dtype=torch.bfloat16))
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert found.mean().abs() < 0.02 and (found.std() - 1).abs() < 0.02 and found.pow(4).mean() > 2.8
    assert (found.abs() > 2).float().mean() == pytest.approx(0.0455, abs=0.004)


def test_rows_and_draws_and_places_have_numbers_of_their_own():
    draws = Draws(KEYS)
    series = torch.stack([draws.normal(torch.empty(6, 30, 20)) for _ in range(3)]).flatten(2).flatten(0, 1)
    related = torch.corrcoef(series) - torch.eye(len(series))
    assert related.abs().max() < 0.2
    shifted = torch.corrcoef(torch.cat((series[:, 1:], series[:, :-1])))[: len(series), len(series) :]
    assert shifted.abs().max() < 0.2


def test_a_row_draws_the_same_in_every_company():
    whole = Draws(KEYS).normal(torch.empty(6, 5, 3))
    for rows in ([4], [1, 0], [5, 3, 2]):
        assert torch.equal(Draws(KEYS[rows]).normal(torch.empty(len(rows), 5, 3)), whole[rows])


def test_the_hash_gives_no_two_words_the_same():
    words = torch.cat((torch.arange(1 << 18), WORD - torch.arange(1 << 18)))
    found = mixed(words)
    assert len(found.unique()) == len(words) and found.min() >= 0 and found.max() <= WORD
    assert found[9] == mixed(9)
    flipped = found[:4096] ^ mixed(words[:4096] ^ (1 << 13))
    changed = torch.stack([(flipped >> bit & 1).float().mean() for bit in range(32)])
    # One bit of a word moves each bit of its hash half of the time.
    assert (changed - 0.5).abs().max() < 0.05


@pytest.mark.parametrize("options", [(), ("arch.mlp_t=true", "arch.pos_encodings=none", "arch=trm")])
def test_every_branch_of_every_cycle_drops_in_training_alone(options, fewshot, puzzle, monkeypatch):
    store = puzzle if options else fewshot
    cycles = ("arch.H_cycles=3", "arch.L_cycles=2", "arch.L_layers=2")
    trainer = Trainer(store, *options, *cycles, "arch.dropout=0.3")
    rates, dropped = [], Draws.dropped
    monkeypatch.setattr(Draws, "dropped", lambda self, x, rate: rates.append(rate) or dropped(self, x, rate))
    trainer.steps(1)
    assert rates == [0.3] * 3 * (2 + 1) * 2 * 2
    solve(trainer.state.model.eval(), trainer.batch().data)
    assert len(rates) == 36


def test_without_noise_nothing_is_drawn_even_in_training_mode(fewshot):
    """As at test time, where a task trains weights of its own."""
    data = episodes().data
    plain, noisy = (make_model(fewshot, *options).train() for options in ((), NOISY))
    outputs = [act_step(model, initial_carry(model, data), data) for model in (plain, noisy)]
    outputs += [
        act_step(model, one.carry, data) for model, one in zip((plain, noisy), outputs[:2], strict=True)
    ]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[2].logits, outputs[3].logits)


def test_a_target_is_computed_without_dropout(fewshot):
    """It says what one more step is worth, of the state that dropout has led to."""
    data = episodes().data
    model = make_model(fewshot, "arch.dropout=0.3", "arch.no_ACT_continue=false").train()
    output = act_step(model, initial_carry(model, data), data, noise=normal(4))
    going_on = replace(output.carry, halted=torch.zeros_like(output.carry.halted))
    after = act_step(model, going_on, data)
    best = torch.maximum(after.q_halt_logits, after.q_continue_logits).sigmoid()
    assert torch.allclose(output.target_q_continue, best)


def test_noise_moves_the_states_of_rows_that_go_on(fewshot):
    model = make_model(fewshot, "arch.carry_noise=0.1").train()
    data, seen = episodes().data, []
    carry = act_step(model, initial_carry(model, data), data, noise=normal(4)).carry
    carry = replace(carry, halted=torch.tensor([True, False, False, True]))
    hook = model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    act_step(model, carry, data, noise=normal(4))
    hook.remove()
    for state, before, initial in zip(seen[0], carry.states, model.initial_states(), strict=True):
        assert torch.equal(state[[0, 3]], initial.expand_as(state[[0, 3]]))
        moved = (state - before)[[1, 2]]
        assert moved.std().item() == pytest.approx(0.1, rel=0.1) and moved.mean().abs() < 0.02
    first, second = ((state - before)[1] for state, before in zip(seen[0], carry.states, strict=True))
    assert torch.corrcoef(torch.stack((first.flatten(), second.flatten())))[0, 1].abs() < 0.2


def states_of(trainer: Trainer, steps: int) -> list[Tensor]:
    """The answer states of the first batch after each of some ACT steps of one update."""
    batch = trainer.batch()
    carry, found = initial_carry(trainer.state.model, batch.data), []
    for _ in range(steps):
        carry, _ = accumulate(trainer.state, carry, batch, trainer.config, trainer.world)
        found.append(carry.states[0])
        carry = replace(carry, halted=torch.zeros_like(carry.halted))
    return found


def test_portions_and_processes_draw_what_the_whole_batch_draws(fewshot):
    whole = states_of(Trainer(fewshot, *NOISY), 3)
    parts = states_of(Trainer(fewshot, *NOISY, "micro_batch_size=3"), 3)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, parts, strict=True))
    for rank in range(2):
        trainer = Trainer(fewshot, *NOISY)
        trainer.world = World(rank, 2)
        trainer.sampler.local = slice(4 * rank, 4 * rank + 4)
        share = states_of(trainer, 3)
        assert all(
            torch.allclose(a[4 * rank : 4 * rank + 4], b, atol=1e-5)
            for a, b in zip(whole, share, strict=True)
        )


def test_an_update_draws_anew_at_every_act_step_and_every_step(fewshot):
    trainer = Trainer(fewshot, "arch.dropout=0.3")
    batch, noise = trainer.batch(), normal(8)
    steps = torch.zeros(8, dtype=torch.int32)
    x = torch.ones(8, 40)
    first, second = (noise.of_act_step(steps + taken).dropped(x, 0.5) for taken in (0, 1))
    assert not torch.equal(first, second)
    states = states_of(trainer, 1)
    trainer.state.step = 1
    carry = initial_carry(trainer.state.model, batch.data)
    carry, _ = accumulate(trainer.state, carry, batch, trainer.config, trainer.world)
    assert not torch.allclose(states[0], carry.states[0], atol=1e-3)


EVERYTHING = (
    *NOISY,
    "objective.differential_weight=0.5",
    "data.error_weighted=1",
    "data.error_interval=2",
    "arch.halt_exploration_prob=1",
)


@pytest.mark.parametrize("mode", ["act", "supervised", "cached"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(fewshot, tmp_path, mode):
    whole, resumed = (Trainer(fewshot, f"mode={mode}", *EVERYTHING) for _ in range(2))
    set_counts(whole)
    whole.steps(5)
    assert (whole.samples().query != whole.sampler.sample(5).query).any()
    resumed.state.load(whole.state.save(tmp_path, ALONE, {}, keep=1), ALONE, CPU)
    for _ in range(4):
        results = [train_step(run.state, run.batch(), run.config, run.world) for run in (whole, resumed)]
        assert results[0].metrics.keys() == results[1].metrics.keys()
        assert all(torch.equal(value, results[1].metrics[name]) for name, value in results[0].metrics.items())
    weights, theirs = (run.state.model.state_dict() for run in (whole, resumed))
    assert all(torch.equal(value, theirs[name]) for name, value in weights.items())


def test_a_noisy_step_is_one_graph_for_the_compiler_with_the_same_numbers(fewshot):
    model = make_model(fewshot, "arch.dropout=0.3", "arch.H_cycles=1", "arch.L_layers=1").train()
    data = episodes().data
    states = act_step(model, initial_carry(model, data), data).carry.states

    def step(states: tuple[Tensor, ...], keys: Tensor) -> Tensor:
        return model(states, data, model.context(data), Draws(keys)).logits

    compiled = torch.compile(step, fullgraph=True, backend="eager", dynamic=False)
    assert torch.allclose(step(states, KEYS[:4]), compiled(states, KEYS[:4]), atol=1e-5)
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_draws_are_the_same_draws():
    x = torch.randn(6, 33, 17)
    plain = [Draws(KEYS).dropped(x, 0.4), Draws(KEYS).normal(x)]
    try:
        fused.compile_fused(True)
        compiled = [Draws(KEYS).dropped(x, 0.4), Draws(KEYS).normal(x)]
    finally:
        fused.compile_fused(False)
        torch.compiler.reset()
    assert torch.equal(plain[0], compiled[0]) and torch.allclose(plain[1], compiled[1], atol=1e-5)
