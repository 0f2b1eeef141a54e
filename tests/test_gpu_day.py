"""The command for a few minutes on a GPU, rehearsed: stages at toy size, one that fails, no time left."""

import pytest

from tests.support.stages import logs_of, rehearsed

SCRIPT = "gpu_day.sh"


@pytest.mark.slow
def test_every_stage_works_at_toy_size_on_a_cpu(tmp_path):
    done, stages = rehearsed(SCRIPT, tmp_path)
    assert done.returncode == 0, (done.stdout, logs_of(tmp_path))
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
    done, stages = rehearsed(SCRIPT, tmp_path, PYTHON=str(python))
    assert done.returncode == 1 and "these failed" in done.stdout
    assert stages["golden"][:1] == stages["speed-etrm-compile-false"][:1] == ["failed (3)"]
    assert stages["golden"][2] == stages["data"][2] == "no such module"
    assert stages["tests"] == ["left out", "0", "pytest is not installed"]


def test_without_time_stages_are_left_out_and_nothing_fails(tmp_path):
    done, stages = rehearsed(SCRIPT, tmp_path, LIMIT="0", PYTHON="true")
    assert done.returncode == 0, done.stderr
    assert {status for status, *_ in stages.values()} == {"left out", "ok"}
    assert [name for name, (status, *_) in stages.items() if status == "ok"] == ["data"]
