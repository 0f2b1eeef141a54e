"""Sweeps: what is drawn and judged, nothing lost when killed, nothing shared by chance, tables and pages."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import pretrain_etrm
from config import compose
from config.schema import PretrainConfig
from tests.support.runs import ROOT, TINY, called, metrics_of, weights_of
from tests.support.sweeps import DRIVER, install, score, write_space
from tools import sweep, sweep_runs, sweep_space
from utils import checkpoint
from utils.errors import UserError
from utils.files import exclusive

pytest.importorskip("optuna")


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    """Runs of a sweep are the stand-in's."""
    return install(tmp_path, monkeypatch)


def run_sweep(monkeypatch, tmp_path: Path, space: Path, *arguments: str) -> sweep.Sweep:
    """A sweep in this process, as the command runs it."""
    called(monkeypatch, sweep.main, space, "--output-dir", tmp_path, "--name", "s", *arguments)
    return opened(tmp_path / "s")


def opened(folder: Path) -> sweep.Sweep:
    return sweep.Sweep(folder, sweep_space.read_space(folder / sweep.SPACE))


def rows_of(done: sweep.Sweep) -> list[tuple]:
    return [(trial.number, trial.state.name, trial.params, trial.value) for trial in done.trials()]


def test_a_score_is_the_mean_over_the_seeds_and_parallel_trials_share_no_folder(
    stand_in, tmp_path, monkeypatch, capsys
):
    space = write_space(tmp_path, seeds="3, 5")
    done = run_sweep(monkeypatch, tmp_path, space, "--jobs", "2")
    assert len(done.trials("COMPLETE")) == 3
    for trial in done.trials():
        scores = [score(trial.params, seed) for seed in (3, 5)]
        assert trial.value == pytest.approx(sum(scores) / 2)
        assert [trial.user_attrs[f"seed {seed}"] for seed in (3, 5)] == pytest.approx(scores)
        for seed in (3, 5):
            folder = tmp_path / "s" / "runs" / sweep.run_name(trial.number, seed)
            (start,) = (folder / "starts").read_text().splitlines()
            assert {f"seed={seed}", f"run_name={folder.name}", f"lr={trial.params['lr']!r}"} < set(
                start.split()
            )
            assert len(metrics_of(folder)) == 4
    assert len({trial.params["lr"] for trial in done.trials()}) == 3
    best = max(done.trials(), key=lambda trial: trial.value)
    said = capsys.readouterr().out
    assert f"best: trial {best.number}, {best.value:.4g} (mean over 2 seeds)" in said
    assert f"lr={best.params['lr']!r}" in said.splitlines()[-1]
    again = run_sweep(monkeypatch, tmp_path, space)
    assert rows_of(again) == rows_of(done)  # what is done is not done again


def test_a_sweep_that_is_killed_twice_ends_as_an_undisturbed_one(stand_in, tmp_path, monkeypatch, capsys):
    space = write_space(tmp_path, trials=6)
    monkeypatch.setenv("STAND_IN_PAUSE", "0.05")
    undisturbed = rows_of(run_sweep(monkeypatch, tmp_path / "whole", space))
    folder = tmp_path / "s"
    words = [sys.executable, "-c", DRIVER, stand_in, space, "--output-dir", tmp_path, "--name", "s"]
    for run in ("trial_0001-seed_0", "trial_0004-seed_0"):
        process = subprocess.Popen(list(map(str, words)), cwd=ROOT, stdout=subprocess.DEVNULL)
        wait_for(folder / "runs" / run / "metrics.jsonl", process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert rows_of(opened(folder))[4][1] == "RUNNING"
    finished = rows_of(run_sweep(monkeypatch, tmp_path, space))
    assert finished == undisturbed and [row[1] for row in finished] == ["COMPLETE"] * 6
    for run in ("trial_0001-seed_0", "trial_0004-seed_0"):
        assert len(lines_of(folder / "runs" / run / "starts")) == 2
        assert [line["step"] for line in metrics_of(folder / "runs" / run)] == [1, 2, 3, 4]
    capsys.readouterr()
    called(monkeypatch, sweep.main, folder, "--table", "--page", tmp_path / "page.html")
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["trial", "state", "score", "values", "lr", "global_batch_size"]
    assert [line.split()[1] for line in table[1:7]] == ["complete"] * 6
    assert [float(line.split()[2]) for line in table[1:7]] == sorted(
        (round(row[3], 4) for row in finished), reverse=True
    )
    assert '"number":5' in (tmp_path / "page.html").read_text()


def lines_of(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []


def wait_for(metrics: Path, process: subprocess.Popen) -> None:
    """Until a run has logged twice."""
    deadline = time.monotonic() + 120
    while len(lines_of(metrics)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def test_a_signal_stops_the_sweep_and_its_runs_and_the_same_command_continues(
    stand_in, tmp_path, monkeypatch
):
    space = write_space(tmp_path, trials=2)
    monkeypatch.setenv("STAND_IN_PAUSE", "0.1")
    run = tmp_path / "s" / "runs" / "trial_0000-seed_0" / "metrics.jsonl"
    real = sweep.time.sleep

    def sleep(seconds: float) -> None:
        if lines_of(run):
            signal.raise_signal(signal.SIGTERM)
        real(seconds)

    monkeypatch.setattr(sweep.time, "sleep", sleep)
    with pytest.raises(SystemExit) as ended:
        run_sweep(monkeypatch, tmp_path, space)
    assert ended.value.code == 75 and 1 <= len(lines_of(run)) < 4
    assert [row[1] for row in rows_of(opened(tmp_path / "s"))] == ["RUNNING"]
    monkeypatch.setattr(sweep.time, "sleep", real)
    done = run_sweep(monkeypatch, tmp_path, space)
    assert [row[1] for row in rows_of(done)] == ["COMPLETE"] * 2 and len(lines_of(run)) == 4


def test_trials_without_prospects_are_pruned_by_what_their_runs_have_logged(stand_in, tmp_path, monkeypatch):
    pruner = "pruner: {name: median, startup_trials: 1}"
    space = write_space(tmp_path, seeds="0, 1", trials=6, more=pruner)
    monkeypatch.setenv("STAND_IN_PAUSE", "0.05")
    done = run_sweep(monkeypatch, tmp_path, space)
    pruned, complete = done.trials("PRUNED"), done.trials("COMPLETE")
    assert pruned and len(pruned) + len(complete) == 6
    first = score(complete[0].params) - 1
    for trial in pruned:
        assert trial.intermediate_values[1] < first + 0.25 and "seed 1" not in trial.user_attrs
        assert not (tmp_path / "s" / "runs" / sweep.run_name(trial.number, 1)).exists()
    assert all(len(trial.intermediate_values) == 8 for trial in complete)


def test_a_failing_trial_is_told_and_the_others_go_on(stand_in, tmp_path, monkeypatch, capsys):
    space = write_space(tmp_path, trials=4)
    decay = "[8, 16]}\n  weight_decay: {choices: [0.1, 0.5]}"
    space.write_text(space.read_text().replace("[8, 16]}", decay))
    done = run_sweep(monkeypatch, tmp_path, space)
    failed = done.trials("FAIL")
    assert len(done.trials("COMPLETE")) == 4 and failed
    assert all(trial.params["weight_decay"] == 0.5 for trial in failed)
    assert "this one does not train" in failed[0].user_attrs["failure"]
    assert f"trial {failed[0].number} failed: " in capsys.readouterr().out


def test_a_sweep_whose_first_trials_all_fail_ends(stand_in, tmp_path, monkeypatch, capsys):
    space = write_space(tmp_path, overrides=", weight_decay=0.5")
    with pytest.raises(SystemExit) as ended:
        run_sweep(monkeypatch, tmp_path, space)
    assert ended.value.code == 2
    assert "the first 3 trials failed; the last: " in capsys.readouterr().err


def test_a_grid_tries_every_combination_once(stand_in, tmp_path, monkeypatch):
    (tmp_path / "space.yaml").write_text(
        "overrides: [validation=3, eval_interval=1]\nsampler: grid\nscore: best\n"
        "space: {lr: {choices: [0.25, 0.5]}, global_batch_size: {choices: [8, 16, 24]}}"
    )
    done = run_sweep(monkeypatch, tmp_path, tmp_path / "space.yaml", "--jobs", "3")
    tried = sorted((trial.params["lr"], trial.params["global_batch_size"]) for trial in done.trials())
    assert tried == [(lr, rows) for lr in (0.25, 0.5) for rows in (8, 16, 24)]


def test_another_sweep_is_refused_in_its_folder_but_more_trials_are_not(
    stand_in, tmp_path, monkeypatch, capsys
):
    run_sweep(monkeypatch, tmp_path, write_space(tmp_path, trials=1))
    more = run_sweep(monkeypatch, tmp_path, write_space(tmp_path, trials=2))
    assert len(more.trials()) == 2
    with pytest.raises(SystemExit):
        run_sweep(monkeypatch, tmp_path, write_space(tmp_path, seeds="0, 1"))
    assert "is a sweep with another seeds; give this one another --name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("lr:", "learning_rate:"), "unknown key 'learning_rate'"),
        (("low: 0.1", "low: 1.5"), "space.lr: low=1.5 is not below high=0.9"),
        (("seeds: [0]", "seeds: [0, 0]"), "seeds=[0, 0] names a seed twice"),
        (("validation=3, ", "seed=3, "), "seed is set by the sweep itself, by seeds"),
        (("validation=3, ", "lr=1, "), "lr is both in space and in overrides"),
        (("validation=3, ", ""), "a sweep chooses by validation tasks: give validation=N"),
        (("eval_interval=1, ", ""), "is logged by evaluations, and eval_interval is null"),
        (("[8, 16]", "[8, many]"), "global_batch_size=many"),
        (("trials:", "trails:"), "trails: Extra inputs are not permitted"),
        (("trials: 3", "sampler: grid"), "sampler=grid takes choices only, and no range"),
        (("[8, 16]", "[8, 16"), "is no sweep: "),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_runs(change, words, tmp_path, monkeypatch, capsys):
    space = write_space(tmp_path)
    space.write_text(space.read_text().replace(*change))
    with pytest.raises(SystemExit) as ended:
        run_sweep(monkeypatch, tmp_path, space)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and said.startswith("error: ")
    assert not (tmp_path / "s").exists()


def test_each_run_sees_gpus_of_its_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7,9")
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in sweep_runs.slots(None, 1)] == list("23579")
    pairs = [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in sweep_runs.slots(None, 2)]
    assert pairs == ["2,3", "5,7"]
    shared = [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in sweep_runs.slots(3, 2)]
    assert shared == ["2,3", "5,7", "2,3"]
    with pytest.raises(UserError, match="processes=6 need as many GPUs, and 5 are visible"):
        sweep_runs.slots(None, 6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert [slot.environment for slot in sweep_runs.slots(2, 1)] == [{"OMP_NUM_THREADS": "4"}] * 2


def test_several_processes_of_a_run_go_through_torchrun():
    words = sweep_runs.command(["lr=1"], 2)
    assert words[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert words[-2:] == [str(sweep_runs.SCRIPT), "lr=1"]


def test_values_reach_a_run_exactly():
    values = {"a": 0.1 + 0.2, "b": True, "c": None, "d": 3, "e": "memory", "f": 1e-05}
    assert compose.as_overrides(values) == [
        "a=0.30000000000000004",
        "b=true",
        "c=null",
        "d=3",
        "e=memory",
        "f=1e-05",
    ]


def test_nothing_runs_while_another_process_works_on_the_sweep(stand_in, tmp_path, monkeypatch, capsys):
    with exclusive(tmp_path / "s", "works on this sweep"), pytest.raises(SystemExit):
        run_sweep(monkeypatch, tmp_path, write_space(tmp_path))
    assert "works on this sweep" in capsys.readouterr().err


@pytest.mark.slow
def test_six_real_trials_two_at_a_time_killed_twice_end_as_each_would_alone(
    fewshot, tmp_path, monkeypatch, capsys
):
    settings = [
        "validation=2",
        "eval_interval=3",
        "train_steps=6",
        "checkpoint_interval=1",
        "evaluation.num_views=1",
    ]
    overrides = [f"data.path={fewshot.path}", *TINY, *settings]
    space = tmp_path / "space.yaml"
    lines = "\n".join(f"  - {override}" for override in overrides)
    space.write_text(f"overrides:\n{lines}\nspace: {{lr: {{low: 1e-4, high: 1e-2, log: true}}}}\ntrials: 6\n")
    words = [
        sys.executable,
        "-m",
        "tools.sweep",
        space,
        "--output-dir",
        tmp_path,
        "--name",
        "s",
        "--jobs",
        "2",
    ]
    runs = tmp_path / "s" / "runs"
    for run in ("trial_0001-seed_0", "trial_0003-seed_0"):
        process = subprocess.Popen(list(map(str, words)), cwd=ROOT, stdout=subprocess.DEVNULL)
        wait_for(runs / run / "metrics.jsonl", process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = run_sweep(monkeypatch, tmp_path, space, "--jobs", "2", "--page", tmp_path / "page.html")
    assert not done.trials("COMPLETE", "PRUNED")[6:] and done.trials("RUNNING")
    done = run_sweep(monkeypatch, tmp_path, space, "--jobs", "2")
    assert [row[1] for row in rows_of(done)] == ["COMPLETE"] * 6
    capsys.readouterr()
    called(monkeypatch, sweep.main, tmp_path / "s", "--table", "--page", tmp_path / "page.html")
    assert len(capsys.readouterr().out.splitlines()) == 1 + 6 + 1
    assert (tmp_path / "page.html").read_text().count('"state":"complete"') == 6
    for trial in done.trials():
        alone = tmp_path / "alone" / str(trial.number)
        own = [f"lr={trial.params['lr']!r}", "seed=0", "run_name=r", f"output_dir={alone}"]
        pretrain_etrm.train(compose.load(PretrainConfig, "pretrain", [*overrides, *own]))
        expected = weights_of(alone, 6, "ema")
        run = runs / sweep.run_name(trial.number, 0)
        found = checkpoint.load_weights(run / "checkpoints" / "step_6", "ema")
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        scores = [
            line["validation/ARC/pass@1"] for line in metrics_of(run) if "validation/ARC/pass@1" in line
        ]
        assert len(scores) == 2 and trial.value == scores[-1]
