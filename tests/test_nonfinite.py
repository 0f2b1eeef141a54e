"""Batches without a finite gradient are written down and can be drawn again."""

import math

import pytest
import torch

from dataset.batch import materialise
from tests.support.runs import ALONE, Trainer, train_briefly
from training import start
from training.nonfinite import dump_batch, load_batch
from training.step import train_step
from utils.distributed import World
from utils.errors import UserError


def test_a_batch_without_a_finite_gradient_is_written_down_and_can_be_drawn_again(
    fewshot, tmp_path, monkeypatch
):
    real = start.train_step
    asked = {}

    def train_step(state, batch, config, world):
        asked[state.step] = batch.data
        hook = (
            state.model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
            if state.step > 1
            else None
        )
        result = real(state, batch, config, world)
        if hook:
            hook.remove()
        return result

    monkeypatch.setattr(start, "train_step", train_step)
    with pytest.raises(
        UserError,
        match=r"step 5: .* not finite 3 times in a row; last checkpoint: step 4; the batches are in",
    ):
        train_briefly(
            fewshot,
            tmp_path,
            "train_steps=9",
            "max_nonfinite_steps=3",
            "checkpoint_interval=2",
            "keep_checkpoints=1",
        )
    folder = tmp_path / "r" / "nonfinite"
    assert sorted(file.name for file in folder.iterdir()) == [f"step_{step}_rank_0.pt" for step in (2, 3, 4)]
    content, samples = load_batch(folder / "step_3_rank_0.pt")
    drawn = materialise(samples, fewshot, fewshot.grid_table).data
    assert content["step"] == 3 and all(torch.equal(drawn[name], asked[3][name]) for name in drawn)
    assert math.isnan(content["grad_norms"]["inner"]) and "lm_loss" in content["metrics"]
    assert all(task in fewshot.task_ids for task in content["tasks"])


def test_what_a_step_worked_on_is_written_down_and_not_only_what_was_sampled(fewshot, tmp_path):
    trainer = Trainer(fewshot, "data.min_demos=2", "data.max_demos=2")
    first = trainer.batch()
    train_step(trainer.state, first, trainer.config, trainer.world)
    trainer.state.model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
    samples = trainer.sampler.sample(1)
    result = train_step(
        trainer.state, materialise(samples, fewshot, fewshot.grid_table), trainer.config, trainer.world
    )
    content, _ = load_batch(dump_batch(tmp_path, 1, samples, result, fewshot, ALONE))
    steps = content["worked_on"].pop("steps")
    assert steps.tolist() == [2] * 8, "no row halts in its first step"
    assert all(torch.equal(value, first.data[name]) for name, value in content["worked_on"].items())


def test_the_newest_dumps_are_kept_and_a_full_disk_is_named(fewshot, tmp_path, monkeypatch):
    trainer = Trainer(fewshot)
    samples = trainer.sampler.sample(0)
    trainer.state.model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
    result = train_step(
        trainer.state, materialise(samples, fewshot, fewshot.grid_table), trainer.config, trainer.world
    )
    monkeypatch.setattr("training.nonfinite.KEPT", 3)
    for step in (8, 9, 10, 11, 100):
        dump_batch(tmp_path, step, samples, result, fewshot, ALONE)
    dump_batch(tmp_path, 1, samples, result, fewshot, World(1, 2))
    names = {file.name for file in (tmp_path / "nonfinite").iterdir()}
    assert names == {"step_10_rank_0.pt", "step_11_rank_0.pt", "step_100_rank_0.pt", "step_1_rank_1.pt"}
    monkeypatch.setattr(
        "utils.checkpoint.os.fsync",
        lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(UserError, match="cannot write .*step_101_rank_0.pt: No space left on device"):
        dump_batch(tmp_path, 101, samples, result, fewshot, ALONE)


def test_a_skipped_batch_of_several_updates_is_named_by_the_step_that_sampled_it(
    fewshot, tmp_path, monkeypatch
):
    monkeypatch.setattr("training.step._all_finite", lambda norm, state: torch.tensor(state.step < 3))
    with pytest.raises(UserError, match="step 4: the gradient was not finite 1 times"):
        train_briefly(
            fewshot,
            tmp_path,
            "mode=fct",
            "mode.num_act_steps=2",
            "arch.halt_max_steps=2",
            "train_steps=8",
            "max_nonfinite_steps=1",
        )
    (file,) = (tmp_path / "r" / "nonfinite").iterdir()
    assert file.name == "step_2_rank_0.pt" and load_batch(file)[0]["step"] == 2
