"""The command for a few minutes on a GPU, rehearsed: stages at toy size, one that fails, no time left."""

import os
import subprocess
import sys

import pytest

from tests.support.runs import ROOT

SCRIPT = str(ROOT / "experiments" / "gpu_day.sh")


def rehearsed(output, **environment: str) -> tuple[subprocess.CompletedProcess, dict[str, list[str]]]:
    """The finished rehearsal, and the status, seconds and findings of each stage."""
    own = {"REHEARSE": "1", "OUT": str(output), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    nothing = {"WHEELS": str(output / "none"), "ANCESTORS": str(output / "none")}
    done = subprocess.run(
        ["bash", SCRIPT],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **own, **nothing, **environment},
    )
    _, *lines = (output / "stages.tsv").read_text().splitlines()
    return done, {name: rest for name, *rest in (line.split("\t") for line in lines)}


@pytest.mark.slow
def test_every_stage_works_at_toy_size_on_a_cpu(tmp_path):
    done, stages = rehearsed(tmp_path)
    logs = {path.name: path.read_text()[-1000:] for path in tmp_path.glob("*.log")}
    assert done.returncode == 0, (done.stdout, logs)
    speeds = ["speed-trm-compile-false", "speed-etrm-compile-false"]
    worked = ["tests", "processes", "golden", *speeds, "data", "train", "evaluate"]
    assert {name for name, (status, *_) in stages.items() if status == "ok"} == set(worked)
    assert {status for status, *_ in stages.values()} == {"ok", "left out"}
    assert all("samples/s" in stages[name][2] for name in speeds) and "pass@1" in stages["evaluate"][2]
    assert (tmp_path / "evaluation" / "results.json").is_file()
    assert "all that was tried worked" in done.stdout


def test_a_failed_stage_is_written_down_and_the_next_one_begins(tmp_path):
    # An interpreter that knows nothing of the project.
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'no such module' >&2\nexit 3\n")
    python.chmod(0o755)
    done, stages = rehearsed(tmp_path, PYTHON=str(python))
    assert done.returncode == 1 and "these failed" in done.stdout
    assert stages["golden"][:1] == stages["speed-etrm-compile-false"][:1] == ["failed (3)"]
    assert stages["golden"][2] == stages["data"][2] == "no such module"
    assert stages["tests"] == ["left out", "0", "pytest is not installed"]


def test_without_time_stages_are_left_out_and_nothing_fails(tmp_path):
    done, stages = rehearsed(tmp_path, LIMIT="0", PYTHON="true")
    assert done.returncode == 0, done.stderr
    assert {status for status, *_ in stages.values()} == {"left out", "ok"}
    assert [name for name, (status, *_) in stages.items() if status == "ok"] == ["data"]
