"""Training modes: how samples meet updates, in portions, over processes, and after a resume."""

import copy
import json
import math
import multiprocessing
import re
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from config import compose
from config.schema import PretrainConfig
from dataset.samplers import Stream, step_rng
from dataset.store import Store
from models.act import act_step, exploration, initial_carry
from models.losses import sample_loss
from pretrain_etrm import train
from tests.support.runs import ALONE, CPU, TRAINER, Trainer, arguments_for, load_config
from training.step import MODES, train_step
from utils.distributed import World, sum_gradients, sum_tensor
from utils.errors import UserError

# Two demonstrations at least: attention over one has no gradient but rounding, whose sign AdamATan2 follows.
VARIATIONAL = (
    "encoder=hybrid_variational",
    "encoder.num_layers=1",
    "objective.kl_weight=0.01",
    "objective.reconstruct_weight=0.5",
    "data.min_demos=2",
)
CASES = {
    "act": ("fewshot",),
    "act variational": ("fewshot", *VARIATIONAL),
    "act puzzle": ("puzzle",),
    "fct": ("fewshot", "mode=fct", "mode.num_act_steps=2", "arch.halt_max_steps=2"),
    "fct puzzle": ("puzzle", "mode=fct", "mode.num_act_steps=2", "arch.halt_max_steps=2"),
    "cached": ("fewshot", "mode=cached"),
    "supervised": ("fewshot", "mode=supervised"),
    "supervised puzzle": ("puzzle", "mode=supervised"),
}


@pytest.fixture(scope="module")
def cases(fewshot, puzzle) -> dict:
    """A store and a configuration for each case, of batches that 1, 2 and 3 processes can share."""
    stores = {"fewshot": fewshot, "puzzle": puzzle}
    options = (*TRAINER, "global_batch_size=6", "lr=1e-3")
    return {
        name: (stores[layout], load_config(stores[layout], *options, *rest))
        for name, (layout, *rest) in CASES.items()
    }


def start(case: tuple, world: World = ALONE, **changes) -> Trainer:
    store, config = case
    trainer = Trainer(store, config=config.model_copy(update=changes), world=world)
    # Halting that differs between rows and steps, without which the modes would hardly differ.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        head = trainer.state.model.q_head
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
        head.bias.zero_()
    return trainer


def losses(trainer: Trainer, calls: int) -> list[float]:
    """The losses of some calls, over all processes."""
    values = []
    for _ in range(calls):
        metrics = train_step(trainer.state, trainer.batch(), trainer.config, trainer.world).metrics
        sums = {name: sum_tensor(value.double()).item() for name, value in sorted(metrics.items())}
        values += [
            value / sums["rows"]
            for name, value in sums.items()
            if name.endswith("loss") or name in ("kl", "reconstruct")
        ]
    return values


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["mode=fst"], "there is no such mode (did you mean 'fct'?)"),
        (["mode=fct", "mode.num_act_steps=0"], "mode.num_act_steps=0: input should be greater than 0"),
        (["mode.num_act_steps=4"], "unknown key 'mode.num_act_steps'"),
        (
            ["mode=fct", "arch.halt_max_steps=16"],
            "mode.num_act_steps=4 are trained and arch.halt_max_steps=16 would be evaluated",
        ),
        (
            ["mode=fct", "train_steps=10"],
            "train_steps=10 counts updates and is not divisible by mode.num_act_steps=4",
        ),
        (["mode=cached", "arch=trm"], "found encoder=none"),
        (["mode=cached", "encoder=iterative"], "found encoder=iterative"),
        (["mode=cached", "objective.reconstruct_weight=1"], "would not starve the encoder"),
        (
            ["micro_batch_size=8", "objective.contrastive_weight=1"],
            "which micro_batch_size=8 would take apart",
        ),
        (["freeze_encoder_steps=5", "freeze_decoder_steps=all"], "leave nothing to train"),
        (["freeze_encoder_steps=all", "arch=trm"], "freeze_encoder_steps=all needs an encoder"),
        (["encoder_lr=1", "arch=trm"], "encoder_lr=1.0 needs an encoder"),
        (["optimizer=adam"], "optimizer=adam: input should be"),
    ],
)
def test_a_mode_that_cannot_be_names_the_keys(overrides, words):
    with pytest.raises(UserError, match=re.escape(words)):
        compose.load(PretrainConfig, "pretrain", overrides)


def test_every_mode_has_a_yaml():
    assert all(compose.load(PretrainConfig, "pretrain", [f"mode={name}"]).mode.name == name for name in MODES)


def test_a_model_of_fixed_time_answers_after_the_steps_it_was_trained_for():
    for steps, options in ((4, []), (8, ["mode.num_act_steps=8"])):
        config = compose.load(PretrainConfig, "pretrain", ["mode=fct", *options])
        assert config.arch.halt_max_steps == config.mode.num_act_steps == steps


def test_fixed_time_gives_every_batch_its_steps_and_updates(cases):
    trainer = start(cases["fct"])
    reference = copy.deepcopy(trainer.state)
    batch = trainer.batch()
    result = train_step(trainer.state, batch, trainer.config, trainer.world)
    assert trainer.state.step == result.steps == 2 and not trainer.state.carries
    assert result.metrics["rows"] == result.metrics["context_gradient"] == 12
    assert result.metrics["count"] == 6 and result.metrics["steps"] == 12
    carry = initial_carry(reference.model, batch.data)
    for step in (1, 2):
        output = act_step(reference.model, carry, batch.data, num_act_steps=2)
        assert output.carry.halted.all() == (step == 2)
        target = (output.logits.argmax(-1) == batch.data["labels"]) | (batch.data["labels"] == -100)
        halting = torch.nn.functional.binary_cross_entropy_with_logits(
            output.q_halt_logits, target.all(1).float(), reduction="sum"
        )
        loss = (
            sample_loss(output.logits, batch.data["labels"], trainer.config.objective).sum() + 0.5 * halting
        )
        (loss / 6).backward()
        torch.nn.utils.clip_grad_norm_(reference.model.parameters(), 1.0)
        (optimizer,) = reference.optimizers
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * step / 2  # the schedule counts updates
        optimizer.step()
        optimizer.zero_grad()
        carry = output.carry
    for (name, ours), theirs in zip(
        trainer.state.model.named_parameters(), reference.model.parameters(), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-6), name


def test_a_skipped_update_ends_a_fixed_time_batch(cases):
    trainer = start(cases["fct"])
    weights = copy.deepcopy(trainer.state.model.state_dict())
    hook = trainer.state.model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
    result = train_step(trainer.state, trainer.batch(), trainer.config, trainer.world)
    hook.remove()
    assert not result.updated and trainer.state.step == 2
    assert all(torch.equal(value, weights[name]) for name, value in trainer.state.model.state_dict().items())
    assert train_step(trainer.state, trainer.batch(), trainer.config, trainer.world).updated


def test_deep_supervision_is_the_mean_over_samples_and_their_steps(cases):
    trainer = start(cases["supervised"], grad_clip_norm=None)
    model, batch, config = copy.deepcopy(trainer.state.model), trainer.batch(), trainer.config
    least = exploration(step_rng(config.seed, 0, Stream.HALTING), 6, model.config.halt_exploration_prob, 3)
    total, pairs, taken = 0.0, 0, []
    for row in range(6):  # each sample alone, for as long as it takes
        data = {name: value[row : row + 1] for name, value in batch.data.items()}
        carry = initial_carry(model, data)
        while True:
            output = act_step(model, carry, data, torch.from_numpy(least[row : row + 1]))
            valid = data["labels"] != -100
            exact = ((output.logits.argmax(-1) == data["labels"]) | ~valid).all(1).float()
            halting = torch.nn.functional.binary_cross_entropy_with_logits(output.q_halt_logits, exact)
            total = total + sample_loss(output.logits, data["labels"], config.objective).sum() + 0.5 * halting
            pairs, carry = pairs + 1, output.carry
            if carry.halted:
                taken.append(carry.steps.item())
                break
    (total / pairs).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert len(set(taken)) > 1
    result = train_step(trainer.state, batch, config, trainer.world)
    assert (
        result.metrics["rows"] == pairs
        and result.metrics["count"] == 6
        and result.metrics["steps"] == sum(taken)
    )
    assert result.grad_norms["total"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert trainer.state.step == 1 and not trainer.state.carries


def test_only_samples_that_start_reach_the_encoder_of_the_cached_mode(cases):
    cached, act = start(cases["cached"]), start(cases["act"])
    batch = cached.batch()
    first = [train_step(t.state, batch, t.config, t.world) for t in (cached, act)]
    assert first[0].metrics["context_gradient"] == first[1].metrics["context_gradient"] == 6
    before = cached.state.carries[batch.bucket]
    starting = before.halted
    assert 0 < starting.sum() < 6
    second = [train_step(t.state, batch, t.config, t.world) for t in (cached, act)]
    assert (
        second[0].metrics["context_gradient"] == starting.sum() and second[1].metrics["context_gradient"] == 6
    )
    assert second[0].grad_norms["encoder"] != second[1].grad_norms["encoder"]
    after = cached.state.carries[batch.bucket]
    for name in ("cached_prefix", "cached_memory"):
        same = (before.context_state[name] == after.context_state[name]).flatten(1).all(1)
        assert torch.equal(same, ~starting) and not after.context_state[name].requires_grad


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_equal_the_whole_batch(name, cases):
    whole, parts = start(cases[name]), start(cases[name], micro_batch_size=4)  # 4 and 2 samples
    assert [rows.start for rows in parts.config.micro_batches(parts.world)] == [0, 4]
    assert losses(whole, 3) == pytest.approx(losses(parts, 3), rel=1e-6, abs=1e-5)
    for (key, value), other in zip(
        whole.state.model.state_dict().items(), parts.state.model.state_dict().values(), strict=True
    ):
        assert torch.allclose(value, other, atol=2e-5), key


@pytest.mark.parametrize("name", ["fct", "cached", "supervised"])
def test_a_checkpoint_restores_every_mode(name, cases, tmp_path):
    whole, resumed = start(cases[name]), start(cases[name])
    losses(whole, 2)
    path = whole.state.save(tmp_path, ALONE, {}, keep=2)
    resumed.state.load(path, ALONE, CPU)
    assert losses(whole, 3) == losses(resumed, 3)


@pytest.mark.parametrize("mode", MODES)
def test_the_logged_norm_is_the_one_before_clipping_in_every_mode(mode, cases):
    case = cases["fct" if mode == "fct" else mode]
    changes = {"mode": case[1].mode.model_copy(update={"num_act_steps": 1})} if mode == "fct" else {}
    loose, tight = (start(case, grad_clip_norm=limit, **changes) for limit in (None, 1e-3))
    norms = [train_step(t.state, t.batch(), t.config, t.world).grad_norms["total"] for t in (loose, tight)]
    assert torch.equal(*norms) and norms[0] > 1e-3


def worker(rank: int, size: int, folder: Path, cases: dict) -> None:
    """One process's losses in each case; the first one's are written."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=size)
    parameters = [torch.zeros(2), torch.zeros(3, dtype=torch.float64), torch.zeros(1), torch.zeros(4)]
    for parameter in parameters[:2] + parameters[3:]:
        parameter.grad = torch.full_like(parameter, rank + 1)
    sum_gradients(parameters)
    summed = [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters]
    values = {
        name: losses(start((Store.load(path, layout), config), World(rank, size)), 2)
        for name, (path, layout, config) in cases.items()
    }
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps({"summed": summed, "losses": values}))


@pytest.mark.parametrize("size, names", [(2, list(CASES)), (3, ["supervised puzzle"])])
def test_processes_train_like_one_in_every_mode(size, names, cases, tmp_path):
    multiprocessing.set_forkserver_preload(["tests.test_modes"])
    context = multiprocessing.get_context("forkserver")
    places = {name: (cases[name][0].path, cases[name][0].metadata.layout, cases[name][1]) for name in names}
    processes = [context.Process(target=worker, args=(rank, size, tmp_path, places)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * size
    for rank in range(size):
        written = json.loads((tmp_path / f"{rank}.json").read_text())
        total = size * (size + 1) / 2
        assert written["summed"] == [[total] * 2, [total] * 3, None, [total] * 4]
        for name in names:
            assert written["losses"][name] == pytest.approx(
                losses(start(cases[name]), 2), rel=3e-7, abs=1e-6
            ), name


def test_a_run_in_fixed_time_logs_saves_and_resumes_between_batches(fewshot, tmp_path):
    _, *options = arguments_for(
        fewshot,
        tmp_path,
        "mode=fct",
        "mode.num_act_steps=2",
        "arch.halt_max_steps=2",
        "log_interval=3",
        "checkpoint_interval=3",
    )
    for steps in (4, 8):
        train(compose.load(PretrainConfig, "pretrain", [*options, f"train_steps={steps}"]))
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 6, 8]
    assert all(line["train/steps"] == 2 and line["train/skipped_steps"] == 0 for line in lines)
    assert sorted(path.name for path in (tmp_path / "r" / "checkpoints").iterdir()) == ["step_6", "step_8"]


def test_the_cached_mode_warns_once(fewshot, tmp_path, capsys):
    _, *options = arguments_for(fewshot, tmp_path, "mode=cached", "train_steps=3")
    train(compose.load(PretrainConfig, "pretrain", options))
    assert capsys.readouterr().err.count("warning: mode=cached starves the encoder") == 1
