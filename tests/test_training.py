"""A step's update: recorded losses, gradients that are not finite, norms, and what training teaches."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from dataset.store import Store
from tests.support.runs import Trainer, arguments_for, run
from training.step import train_step


def test_five_steps_give_the_recorded_losses(fewshot, puzzle):
    """A golden curve: a change of the arithmetic, the sampling or the initial values shows here."""
    recorded = json.loads((Path(__file__).parent / "losses.json").read_text())
    plain = ["arch.pos_encodings=rope2d", "encoder.positions=rope2d"]
    for name, store, options in (
        ("etrm", fewshot, []),
        ("etrm, plain positions", fewshot, plain),
        ("trm", puzzle, []),
    ):
        assert Trainer(store, *options).steps(5) == pytest.approx(recorded[name], abs=2e-4), name


def test_a_non_finite_gradient_changes_nothing_but_the_step(fewshot):
    trainer = Trainer(fewshot)
    trainer.steps(2)
    weights = copy.deepcopy(trainer.state.model.state_dict())
    moments = copy.deepcopy(trainer.state.optimizers[0].state_dict()["state"])
    hook = trainer.state.model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
    assert not train_step(trainer.state, trainer.batch(), trainer.config, trainer.world).updated
    hook.remove()
    assert all(torch.equal(value, weights[name]) for name, value in trainer.state.model.state_dict().items())
    after = trainer.state.optimizers[0].state_dict()["state"]
    assert all(torch.equal(after[key]["exp_avg"], moments[key]["exp_avg"]) for key in moments)
    assert (
        trainer.state.step == 3
        and train_step(trainer.state, trainer.batch(), trainer.config, trainer.world).updated
    )


def test_the_logged_norm_is_the_one_before_clipping(fewshot):
    loose, tight = Trainer(fewshot, "grad_clip_norm=null"), Trainer(fewshot, "grad_clip_norm=0.001")
    norms = [train_step(t.state, t.batch(), t.config, t.world).grad_norms["total"] for t in (loose, tight)]
    assert torch.equal(*norms) and norms[0] > 0.001


@pytest.mark.slow
def test_shuffled_demonstrations_raise_the_loss_of_a_trained_model(tmp_path):
    """The model must have learned to read its demonstrations: recoloured 3x3 grids, seconds of training."""
    from dataset.build_rules_dataset import build, parse_arguments

    arguments = [
        "--families",
        "colour_permutation",
        "--stages",
        "1",
        "--test-splits",
        "test_rules",
        "--rows",
        "3",
        "3",
    ]
    arguments += [
        "--columns",
        "3",
        "3",
        "--train-tasks",
        "16000",
        "--test-tasks",
        "64",
        "--output-dir",
        str(tmp_path / "d"),
    ]
    build(parse_arguments(arguments))
    store = Store.load(tmp_path / "d")
    options = [
        "arch.H_cycles=1",
        "arch.halt_max_steps=1",
        "arch.hidden_size=64",
        "arch.num_heads=4",
        "global_batch_size=64",
        "encoder.num_layers=1",
        "encoder.positions=rope2d",
        "arch.pos_encodings=rope2d",
    ]
    options += [
        "data.buckets=[3]",
        "data.augmentation=none",
        "data.query_sampling=test",
        "data.min_demos=3",
        "data.max_demos=3",
    ]
    trainer = Trainer(store, *options, "lr=3e-3", "weight_decay=0.01", "train_steps=250")
    trainer.steps(250)
    batch = trainer.batch()
    model = trainer.state.model.eval()
    from models.act import act_step, initial_carry
    from models.losses import act_loss

    def loss(data: dict) -> float:
        with torch.no_grad():
            _, metrics = act_loss(act_step(model, initial_carry(model, data), data), trainer.config.objective)
        return (metrics["lm_loss"] / metrics["rows"]).item()

    shuffled = {
        name: value.roll(1, 0) if name.startswith("demo") else value for name, value in batch.data.items()
    }
    assert loss(shuffled) > 2 * loss(batch.data) + 0.5


def test_wandb_online_without_a_key_is_one_line(fewshot, tmp_path):
    nowhere = {
        "HOME": str(tmp_path),
        "WANDB_API_KEY": "",
        "WANDB_SILENT": "true",
        "NETRC": str(tmp_path / "none"),
    }
    done = run(*arguments_for(fewshot, tmp_path, "train_steps=1", "logging.wandb=online"), env=nowhere)
    (line,) = (line for line in done.stderr.splitlines() if not line.startswith("wandb"))
    assert done.returncode == 2 and line.startswith("error: logging.wandb=online: ")
    assert "logging.wandb=offline" in line


def test_wandb_works_without_an_account(fewshot, tmp_path):
    done = run(
        *arguments_for(fewshot, tmp_path, "train_steps=2", "logging.wandb=offline"),
        env={"WANDB_SILENT": "true"},
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "r" / "wandb").glob("offline-run-*"))
    shutil.rmtree(tmp_path / "r")
