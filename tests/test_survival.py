"""Going on after restarts, killed writers, full disks and lost processes."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pretrain_etrm
from experiments.workplace import Launched
from tests.support.runs import ALONE, CPU, Trainer, metrics_of, run, steps_of, train_briefly
from training.step import train_step
from utils import checkpoint
from utils.distributed import World
from utils.errors import UserError


def test_checkpoints_by_time(fewshot, tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 10))  # a step looks at the clock three times, and takes half a minute
    monkeypatch.setattr(pretrain_etrm, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    folder = train_briefly(fewshot, tmp_path, "train_steps=9", "checkpoint_minutes=1.6", "keep_checkpoints=9")
    assert steps_of(folder) == ["step_4", "step_8", "step_9"]


def test_resume_after_a_restart_continues_whatever_the_run_began_with(fewshot, tmp_path, monkeypatch):
    start = train_briefly(fewshot, tmp_path / "first", "train_steps=2")
    train_briefly(
        fewshot, tmp_path, "train_steps=4", f"resume={start}", "checkpoint_interval=3", "log_interval=1"
    )
    assert metrics_of(tmp_path / "r")[0]["step"] == 3
    with pytest.raises(UserError, match="resume=never would overwrite"):
        train_briefly(fewshot, tmp_path, "train_steps=6", "resume=never")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for how in ("never", str(start)):
        steps = 6 if how == "never" else 8
        train_briefly(fewshot, tmp_path, f"train_steps={steps}", f"resume={how}", "log_interval=1")
        assert steps_of(tmp_path / "r")[-1] == f"step_{steps}"
    assert [line["step"] for line in metrics_of(tmp_path / "r")] == [3, 4, 5, 6, 7, 8]


def test_remains_of_killed_writers_and_half_deleted_checkpoints_are_no_checkpoints(fewshot, tmp_path):
    trainer = Trainer(fewshot)
    trainer.steps(1)
    path = trainer.state.save(tmp_path, ALONE, {}, keep=2)
    for name in (".step_7.tmp", ".step_5.old", "step_9"):
        shutil.copytree(path, tmp_path / name)
    (tmp_path / "step_9" / "info.json").unlink()
    assert checkpoint.latest(tmp_path) == path
    trainer.steps(1)
    trainer.state.save(tmp_path, ALONE, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_1", "step_2", "step_9"]


def test_too_little_disk_space_is_said_before_anything_is_written(fewshot, tmp_path, monkeypatch):
    trainer = Trainer(fewshot)
    trainer.steps(1)
    path = trainer.state.save(tmp_path, ALONE, {}, keep=1)
    written = sum(file.stat().st_size for file in path.iterdir())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: usage(0, 0, int(0.9 * written)))
    monkeypatch.setattr(checkpoint, "save_file", lambda *arguments: pytest.fail("written"))
    trainer.steps(1)
    words = r"step_2: it needs \d.\d\d MB, and the disk has \d.\d\d MB left; earlier checkpoints are intact"
    with pytest.raises(UserError, match=words):
        trainer.state.save(tmp_path, ALONE, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_pytorchs_writer_says_that_the_disk_is_full():
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_torch({"weights": torch.zeros(10**6)}, Path("/dev/full"))


def test_a_resumed_share_of_the_carries_holds_its_own_rows_only(fewshot, tmp_path):
    trainer = Trainer(fewshot)
    train_step(trainer.state, trainer.batch(), trainer.config, trainer.world)
    path = trainer.state.save(tmp_path, ALONE, {}, keep=1)
    resumed = Trainer(fewshot)
    resumed.state.load(path, World(0, 4), CPU)
    (carry,) = resumed.state.carries.values()
    assert len(carry.steps) == 2 and carry.steps.untyped_storage().nbytes() == carry.steps.nbytes


@pytest.mark.slow
def test_what_the_fault_commands_promise(tmp_path):
    """The short version of `python -m experiments.faults`."""
    results = tmp_path / "faults.jsonl"
    done = run(
        "-m",
        "experiments.faults",
        "killed_while_saving",
        "file_limit",
        "--kills",
        "5",
        "--output",
        str(results),
        timeout=600,
    )
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert done.returncode == 0 and [line["fault"] for line in lines] == [
        "killed_while_saving",
        "file_limit",
    ], done.stdout + done.stderr
    assert (
        lines[0]["kills"] == 5
        and lines[0]["most_steps_lost"] <= 1
        and "File too large" in lines[1]["message"][0]
    )


@pytest.mark.slow
def test_a_killed_rank_restarts_and_the_run_ends_bitwise_as_undisturbed(tmp_path):
    results = tmp_path / "faults.jsonl"
    done = run("-m", "experiments.faults", "rank_killed", "--kills", "2", "--output", str(results))
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (json.loads(line) for line in results.read_text().splitlines())
    assert line["kills"] == 2 and line["bitwise_equal"]


@pytest.mark.parametrize(
    "log, told",
    [
        ("torchrun: x\nerror: the disk is full\n", "error: the disk is full"),
        ("x\nSignal 9 (SIGKILL)\n", "Signal 9"),
    ],
)
def test_a_failed_check_says_what_the_run_left(tmp_path, log, told):
    (tmp_path / "log").write_text(log)
    message = Launched(None, tmp_path / "log").errors()
    assert told in message and ("torchrun" not in message)
