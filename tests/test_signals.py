"""Signals: the run saves, says so and ends."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.support.runs import ROOT, arguments_for, steps_of, train_briefly, weights_of
from training import start
from utils import checkpoint
from utils.errors import EXIT_INTERRUPTED, EXIT_STOPPED, reports_user_errors
from utils.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_at_the_next_step_and_has_its_own_exit_status(
    number, fewshot, tmp_path, monkeypatch, capsys
):
    real, seen = start.train_step, []

    def train_step(state, batch, config, world):
        seen.append(state.step)
        if len(seen) == 3:
            os.kill(os.getpid(), number)
        return real(state, batch, config, world)

    monkeypatch.setattr(start, "train_step", train_step)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        reports_user_errors(train_briefly)(fewshot, tmp_path, "train_steps=6")
    assert end.value.code == EXIT_STOPPED == 75 and steps_of(tmp_path / "r") == ["step_3"]
    assert f"stopped by {number.name} at step 3: checkpoint" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    train_briefly(fewshot, tmp_path, "train_steps=6")
    train_briefly(fewshot, tmp_path / "whole", "train_steps=6")
    one, other = weights_of(tmp_path, 6), weights_of(tmp_path / "whole", 6)
    assert all(torch.equal(one[name], other[name]) for name in one) and seen[3:6] == [3, 4, 5]


def test_a_second_interrupt_does_not_wait(capsys):
    def main() -> None:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)
            assert stop.signal == "SIGINT"
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
            raise AssertionError("not interrupted")

    with pytest.raises(SystemExit) as end:
        reports_user_errors(main)()
    assert end.value.code == EXIT_INTERRUPTED == 130


def test_preemption_of_one_process_stops_both_and_validation_of_one_task_hangs_none(fewshot, tmp_path):
    """Two processes, one evaluation batch: the idle process waits, and both agree on the signal."""
    options = (
        "train_steps=100000",
        "eval_interval=2",
        "validation=1",
        "evaluation.num_views=1",
        "timeout_minutes=1",
    )
    arguments = arguments_for(fewshot, tmp_path, *options)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launched = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    )
    folder = tmp_path / "r" / "checkpoints"
    deadline = time.monotonic() + 120
    while (
        not (checkpoint.latest(folder) and checkpoint.load_info(checkpoint.latest(folder))["step"] >= 4)
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    launched.send_signal(signal.SIGTERM)
    errors = launched.communicate(timeout=60)[1]
    assert "stopped by SIGTERM at step" in errors and launched.returncode != 0, errors
    info = checkpoint.load_info(checkpoint.latest(folder))
    assert info["world_size"] == 2 and len(info["scores"]) >= 1
