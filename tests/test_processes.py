"""Several processes: they train like one, and speak with one voice."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.runs import arguments_for, run, train_here, weights_of


def train_both_ways(store, output: Path, steps: int) -> None:
    """A run of two processes in `two` and one of one process in `one`, compared by losses and weights."""
    options = (f"train_steps={steps}", f"checkpoint_interval={steps}")
    done = run(*arguments_for(store, output / "two", *options), world=2)
    assert done.returncode == 0, done.stderr
    train_here(store, output / "one", *options)
    lines = {
        name: (output / name / "r" / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")
    }
    losses = {name: [json.loads(line)["train/lm_loss"] for line in lines[name]] for name in lines}
    assert len(losses["one"]) == steps and losses["one"] == pytest.approx(losses["two"], abs=1e-6)
    assert farthest(output / "one", output / "two", steps) <= 1e-6


def farthest(one: Path, other: Path, step: int) -> float:
    """The largest difference between weights of two runs."""
    ours, theirs = weights_of(one, step), weights_of(other, step)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def test_two_processes_train_puzzle_rows_like_one(puzzle, tmp_path):
    train_both_ways(puzzle, tmp_path, 5)


def test_two_processes_train_like_one_which_resumes_their_run(fewshot, tmp_path, capsys):
    train_both_ways(fewshot, tmp_path, 4)
    capsys.readouterr()
    train_here(fewshot, tmp_path / "two", "train_steps=8")
    assert "resumed at step 4" in capsys.readouterr().err
    train_here(fewshot, tmp_path / "whole", "train_steps=8")
    assert farthest(tmp_path / "whole", tmp_path / "two", 8) <= 1e-5


def test_a_world_size_that_does_not_divide_the_batch_is_one_message(fewshot, tmp_path):
    done = run(*arguments_for(fewshot, tmp_path, "global_batch_size=7"), world=2)
    assert done.returncode == 1
    ours = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert ours == ["error: global_batch_size=7 is not divisible by the world size 2"]
    assert not (tmp_path / "r").exists()


def run_entry_point(tmp_path: Path, *body: str) -> subprocess.CompletedProcess:
    """Two processes under torchrun, each in an entry point with these lines."""
    head = [
        "import os, time",
        "from utils.errors import UserError, reports_user_errors",
        "@reports_user_errors",
        "def main():",
    ]
    script = tmp_path / "job.py"
    script.write_text("\n".join([*head, *(f"    {line}" for line in body), "main()", ""]))
    return run(str(script), world=2)


def test_an_error_that_another_process_meets_alone_is_said(tmp_path):
    """The first process waits for the second, as in a collective."""
    alone = "if os.environ['RANK'] == '1': raise UserError('a disk of its own')"
    done = run_entry_point(tmp_path, alone, "time.sleep(60)")
    assert done.returncode == 1 and done.stderr.count("error (rank 1): a disk of its own") == 1, done.stderr


def test_the_first_process_speaks_even_if_it_is_slower(tmp_path):
    done = run_entry_point(
        tmp_path, "time.sleep(2 * (os.environ['RANK'] == '0'))", "raise UserError('a typo')"
    )
    said = [line for line in done.stderr.splitlines() if "a typo" in line]
    assert done.returncode == 1 and said == ["error: a typo"], done.stderr


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to see the threads")
def test_leaving_the_group_ends_its_threads(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from utils import distributed\n"
        "world = distributed.World.from_environment()\n"
        "distributed.start(world, torch.device('cpu'))\n"
        "torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])\n"  # PyTorch imports much here
        "distributed.any_true(True)\n"
        "tasks = Path('/proc/self/task')\n"
        "threads = lambda: sum('gloo' in (task / 'comm').read_text() for task in tasks.iterdir())\n"
        "before = threads()\n"
        "distributed.close()\n"
        "Path(sys.argv[1], f'rank_{world.rank}').write_text(f'{before > 0} {threads()}')\n"
    )
    done = run(str(script), str(tmp_path), world=2)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank_{rank}").read_text() for rank in range(2)] == ["True 0"] * 2
