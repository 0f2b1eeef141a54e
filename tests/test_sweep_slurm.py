"""Sweeps through Slurm: the trials of one machine, and no job that is lost, doubled or left behind."""

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from tests.support import slurm
from tests.support.runs import ROOT, called, metrics_of
from tests.support.sweeps import DRIVER, install, write_space
from tools import sweep, sweep_job, sweep_runs, sweep_slurm, sweep_space
from utils.errors import UserError

pytest.importorskip("optuna")
pytest.importorskip("submitit")

SLURM = ("--launcher", "slurm", "--slurm", "time=5", "partition=long", "gpus_per_node=1")
CLUSTERS = ["local", "slurm"]  # submitit's own stand-in, and ours of Slurm's commands


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    """Runs of a sweep are the stand-in's."""
    monkeypatch.setattr(sweep_slurm, "POLL", 0.02)
    return install(tmp_path, monkeypatch)


@pytest.fixture
def queue(tmp_path, monkeypatch) -> Path:
    return slurm.install(tmp_path, monkeypatch)


def run_sweep(monkeypatch, folder: Path, space: Path, *arguments: str) -> list[tuple]:
    """The trials of a sweep in this process, as the command runs it."""
    called(monkeypatch, sweep.main, space, "--output-dir", folder, "--name", "s", *arguments)
    return rows_in(folder / "s")


def rows_in(folder: Path) -> list[tuple]:
    done = sweep.Sweep(folder, sweep_space.read_space(folder / sweep.SPACE))
    return [(trial.number, trial.state.name, trial.params, trial.value) for trial in done.trials()]


def starts_of(folder: Path) -> list[int]:
    """How often the run of each trial was started."""
    files = sorted((folder / "runs").glob("*/starts"))
    return [len(file.read_text().splitlines()) for file in files]


def kill_in_the_middle(words: list, metrics: Path, whole_group: bool) -> None:
    """Start a sweep as a process, and kill it when a run of it has logged twice."""
    process = subprocess.Popen(
        list(map(str, words)), cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_sweep_through_submitit_has_the_trials_of_one_on_this_machine(
    cluster, stand_in, queue, tmp_path, monkeypatch
):
    monkeypatch.setattr(sweep_slurm, "CLUSTER", cluster)
    space = write_space(tmp_path, seeds="3, 5", trials=1)
    here = run_sweep(monkeypatch, tmp_path / "here", space)
    there = run_sweep(monkeypatch, tmp_path / "there", space, *SLURM)
    assert there == here and [row[1] for row in there] == ["COMPLETE"]
    assert starts_of(tmp_path / "there" / "s") == [1] * 2
    asked = [file.read_text() for file in queue.glob("*.sh")]
    assert len(asked) == (2 if cluster == "slurm" else 0)
    for option in ("--partition=long", "--time=5", "--gpus-per-node=1", "--no-requeue", "--job-name=s"):
        assert all(f"#SBATCH {option}\n" in text for text in asked)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_sweep_that_is_killed_continues_and_joins_the_jobs_that_still_run(
    cluster, stand_in, queue, tmp_path, monkeypatch
):
    """Slurm's jobs survive the sweep; submitit's own stand-in is killed with it, as a machine would be."""
    monkeypatch.setattr(sweep_slurm, "CLUSTER", cluster)
    space = write_space(tmp_path, trials=2)
    undisturbed = run_sweep(monkeypatch, tmp_path / "whole", space)
    monkeypatch.setenv("STAND_IN_PAUSE", "0.2")
    folder = tmp_path / "s"
    begin = DRIVER.replace("sweep.main()", f"sweep_slurm.CLUSTER = {cluster!r}; sweep.main()")
    begin = begin.replace("import sweep, sweep_runs", "import sweep, sweep_runs, sweep_slurm")
    words = [sys.executable, "-c", begin, stand_in, space, "--output-dir", tmp_path, "--name", "s", *SLURM]
    run = folder / "runs" / "trial_0001-seed_0"
    kill_in_the_middle(words, run / "metrics.jsonl", whole_group=cluster == "local")
    finished = run_sweep(monkeypatch, tmp_path, space, *SLURM)
    assert finished == undisturbed and [row[1] for row in finished] == ["COMPLETE"] * 2
    assert starts_of(folder) == ([1, 2] if cluster == "local" else [1, 1])
    assert [line["step"] for line in metrics_of(run)] == [1, 2, 3, 4]


def test_a_job_that_slurm_ends_is_submitted_again_and_its_run_goes_on(stand_in, queue, tmp_path, monkeypatch):
    space = write_space(tmp_path, trials=1)
    undisturbed = run_sweep(monkeypatch, tmp_path / "whole", space)
    monkeypatch.setenv("STAND_IN_PAUSE", "0.5")
    (queue / "1001.limit").write_text("1.5")  # its time is over: Slurm sends USR2
    begun = stand_in.read_text()
    dies = "import os\nif os.environ['SLURM_JOB_ID'] == '1002':\n    os.kill(os.getppid(), 9)\n"
    stand_in.write_text(dies + begun)
    (queue / "1002.lost").touch()  # its node fails: no word at all
    assert run_sweep(monkeypatch, tmp_path, space, *SLURM) == undisturbed
    assert (queue / "last").read_text().strip() == "1003"
    run = tmp_path / "s" / "runs" / "trial_0000-seed_0"
    assert [line["step"] for line in metrics_of(run)] == [1, 2, 3, 4]


def test_a_run_whose_jobs_never_reach_a_checkpoint_fails(stand_in, queue, tmp_path, monkeypatch, capsys):
    stand_in.write_text("import sys; sys.exit(75)")
    (row,) = run_sweep(monkeypatch, tmp_path, write_space(tmp_path, trials=1), *SLURM)
    assert row[1] == "FAIL" and (queue / "last").read_text().strip() == "1003"
    assert "3 jobs have ended without a new checkpoint" in capsys.readouterr().out


def test_a_failed_run_is_told_with_its_last_words(stand_in, queue, tmp_path, monkeypatch, capsys):
    space = write_space(tmp_path, trials=1, overrides=", weight_decay=0.5")
    (row,) = run_sweep(monkeypatch, tmp_path, space, *SLURM)
    assert row[1] == "FAIL" and "this one does not train" in capsys.readouterr().out


@pytest.mark.parametrize("waits", [True, False], ids=["jobs that wait", "jobs that train"])
def test_a_signal_leaves_no_job_behind(waits, stand_in, queue, tmp_path, monkeypatch):
    space = write_space(tmp_path, trials=1)
    monkeypatch.setenv("STAND_IN_PAUSE", "0.3")
    metrics = tmp_path / "s" / "runs" / "trial_0000-seed_0" / "metrics.jsonl"
    if waits:
        (queue / "hold").touch()
    real = sweep.time.sleep

    def sleep(seconds: float) -> None:
        if (queue / "1001").is_file() if waits else metrics.is_file():
            signal.raise_signal(signal.SIGTERM)
        real(seconds)

    with monkeypatch.context() as within, pytest.raises(SystemExit) as ended:
        within.setattr(sweep.time, "sleep", sleep)
        run_sweep(within, tmp_path, space, *SLURM)
    assert ended.value.code == 75
    assert (queue / "1001").read_text().startswith("CANCELLED") == waits
    (queue / "hold").unlink(missing_ok=True)
    (row,) = run_sweep(monkeypatch, tmp_path, space, *SLURM)
    assert row[1] == "COMPLETE" and len(metrics_of(metrics.parent)) == 4


def test_a_job_hands_on_signals_and_its_command_is_deaf_to_usr2(tmp_path):
    script = tmp_path / "s.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "os.kill(os.getpid(), signal.SIGUSR2)\n"
        "print('alive', flush=True)\n"
        "time.sleep(60)\n"
    )
    job = (
        "import sys; from pathlib import Path; from tools import sweep_job; sweep_job.LOOK = 0.05\n"
        "script, log, stop = sys.argv[1:]\n"
        "sys.exit(sweep_job.train([sys.executable, script], Path(log), Path(stop)))"
    )
    words = [sys.executable, "-c", job, script, tmp_path / "log", tmp_path / "stop"]
    process = subprocess.Popen(list(map(str, words)), cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (tmp_path / "log").is_file() or "alive" not in (tmp_path / "log").read_text().splitlines():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(30) == 75


def test_a_stop_file_ends_a_job_that_has_just_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_job, "LOOK", 0.05)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    (tmp_path / "stop").touch()
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert sweep_job.train(words, tmp_path / "log", tmp_path / "stop") == -signal.SIGTERM


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["partition=long"], "--slurm needs time=MINUTES"),
        (["time=5", "long"], "--slurm takes KEY=VALUE, found 'long'"),
        (["time=5", "partion=long"], "Unknown argument 'partion'"),
        (["time=5", "nodes=2"], "--slurm nodes: a run has one node"),
    ],
)
def test_a_mistaken_option_is_one_line(given, words, queue, tmp_path):
    with pytest.raises(UserError, match=words) as said:
        sweep_slurm.Slurm(tmp_path, 1, Namespace(slurm=given, jobs=None))
    assert "\n" not in str(said.value)


def test_without_slurm_or_its_launcher_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match='Could not detect "srun"'):
        sweep_slurm.Slurm(tmp_path, 1, Namespace(slurm=["time=5"], jobs=None))
    with pytest.raises(UserError, match="--slurm goes with --launcher slurm"):
        sweep_runs.Local(tmp_path, 1, Namespace(slurm=["time=5"], jobs=None))


def test_what_slurm_refuses_is_one_line(stand_in, queue, tmp_path, monkeypatch, capsys):
    (tmp_path / "slurm" / "sbatch").write_text(
        "#!/bin/sh\necho 'invalid partition specified: long' >&2\nexit 1\n"
    )
    with pytest.raises(SystemExit) as ended:
        run_sweep(monkeypatch, tmp_path, write_space(tmp_path), *SLURM)
    *_, said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and said == "error: sbatch: invalid partition specified: long"
