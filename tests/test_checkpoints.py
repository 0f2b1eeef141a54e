"""Checkpoints: all is restored, a failing write keeps the last one, a resumed run ends like a whole one."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.runs import (
    ALONE,
    CPU,
    ROOT,
    Trainer,
    arguments_for,
    run,
    train_here,
    weights_of,
    without_digests,
)
from utils import checkpoint
from utils.errors import UserError, reports_user_errors


@pytest.mark.parametrize("layout", ["fewshot", "puzzle"])
def test_a_checkpoint_restores_everything(layout, fewshot, puzzle, tmp_path):
    store = {"fewshot": fewshot, "puzzle": puzzle}[layout]
    whole = Trainer(store)
    whole.steps(4)
    path = whole.state.save(tmp_path, ALONE, {}, keep=2)
    expected = whole.steps(4)
    resumed = Trainer(store, "seed=0")
    resumed.state.load(path, ALONE, CPU)
    assert resumed.steps(4) == expected
    for name, value in whole.state.model.state_dict().items():
        assert torch.equal(value, resumed.state.model.state_dict()[name]), name
    assert all(
        torch.equal(whole.state.ema.shadow[name], value) for name, value in resumed.state.ema.shadow.items()
    )


def test_what_has_no_average_is_written_once_and_checkpoints_that_repeat_it_load(puzzle, tmp_path):
    trainer = Trainer(puzzle)
    trainer.steps(2)
    path = trainer.state.save(tmp_path, ALONE, {}, keep=2)
    whole = trainer.state.model.state_dict()
    raw, averaged = (load_file(path / checkpoint.WEIGHTS[which]) for which in ("raw", "ema"))
    assert (
        averaged.keys() == whole.keys()
        and raw.keys() == trainer.state.ema.shadow.keys()
        and "context.weights" not in raw
    )
    for _ in range(2):
        loaded = checkpoint.load_weights(path, "raw")
        assert loaded.keys() == whole.keys() and all(
            torch.equal(loaded[name], value) for name, value in whole.items()
        )
        save_file(whole, path / checkpoint.WEIGHTS["raw"])  # as before, when there were no digests either
        without_digests(path)
    trainer.state.ema = None
    path = trainer.state.save(tmp_path / "raw", ALONE, {}, keep=2)
    assert checkpoint.load_weights(path, "raw").keys() == whole.keys()


def test_old_checkpoints_are_deleted_and_a_failing_write_keeps_the_last(fewshot, tmp_path, monkeypatch):
    trainer = Trainer(fewshot)
    for _ in range(3):
        trainer.steps(1)
        trainer.state.save(tmp_path, ALONE, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2", "step_3"]
    trainer.steps(1)

    def full_disk(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(UserError, match="No space left on device; earlier checkpoints are intact"):
        trainer.state.save(tmp_path, ALONE, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2", "step_3"]
    assert checkpoint.latest(tmp_path).name == "step_3"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_disk_that_is_full_only_at_the_last_moment_keeps_the_last_checkpoint(
    fewshot, tmp_path, monkeypatch, failing
):
    trainer = Trainer(fewshot)
    trainer.steps(1)
    trainer.state.save(tmp_path, ALONE, {}, keep=2)
    trainer.steps(1)
    real = getattr(os, failing)

    def full_disk(target, *rest):
        name = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
        if name.endswith(".step_2.tmp"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(target, *rest)

    monkeypatch.setattr(os, failing, full_disk)
    with pytest.raises(UserError, match="step_2: .*No space left on device; earlier checkpoints are intact"):
        trainer.state.save(tmp_path, ALONE, {}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


@pytest.mark.parametrize("layout", ["fewshot", pytest.param("puzzle", marks=pytest.mark.slow)])
def test_a_killed_and_resumed_run_ends_bitwise_like_an_undisturbed_one(layout, fewshot, puzzle, tmp_path):
    store = {"fewshot": fewshot, "puzzle": puzzle}[layout]
    options = ("train_steps=60", "checkpoint_interval=5", "lr=1e-3")
    train_here(store, tmp_path / "whole", *options)
    command = [sys.executable, *arguments_for(store, tmp_path / "killed", *options)]
    killed = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    folder = tmp_path / "killed" / "r" / "checkpoints"
    deadline = time.monotonic() + 120
    while checkpoint.latest(folder) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    reached = checkpoint.load_info(checkpoint.latest(folder))["step"]
    assert 0 < reached < 60
    done = run(*command[1:])
    assert done.returncode == 0 and f"resumed at step {reached}" in done.stderr, done.stderr
    for which in ("raw", "ema"):
        whole, resumed = weights_of(tmp_path / "whole", 60, which), weights_of(tmp_path / "killed", 60, which)
        assert whole.keys() == resumed.keys() and all(
            torch.equal(whole[name], resumed[name]) for name in whole
        )


def test_resume_refuses_another_configuration_and_never_overwrites(fewshot, tmp_path):
    train_here(fewshot, tmp_path, "train_steps=2")
    before = weights_of(tmp_path, 2)
    with pytest.raises(UserError, match="lr: 0.0001 then, 0.5 now"):
        train_here(fewshot, tmp_path, "train_steps=4", "lr=0.5")
    with pytest.raises(UserError, match="resume=never would overwrite"):
        train_here(fewshot, tmp_path, "train_steps=4", "resume=never")
    assert all(torch.equal(before[name], value) for name, value in weights_of(tmp_path, 2).items())


def test_a_read_only_or_full_output_is_one_message(fewshot, tmp_path, capsys):
    (tmp_path / "blocked").write_text("a file where the folder should be")
    with pytest.raises(SystemExit) as ended:
        reports_user_errors(train_here)(fewshot, tmp_path / "blocked")
    assert ended.value.code == 2 and "cannot write" in capsys.readouterr().err
