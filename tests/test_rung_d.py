"""Rung (d) in one command, rehearsed: end to end at toy size, with re-arc, without time."""

from pathlib import Path

import pytest

from config import compose
from config.schema import PretrainConfig
from evaluation.evaluated import Evaluated
from experiments.partly_adapted import together, told
from tests.support.stages import logs_of, rehearsed
from utils.errors import UserError
from utils.files import read_json

SCRIPT = "rung_d.sh"

# An interpreter that has every package, writes down its arguments and only pretends to make datasets.
PRETENDS = """#!/bin/sh
for each in "$@"; do printf '%s\\t' "$each"; done | tr '\\n' ' ' >> "$OUT/calls"
echo >> "$OUT/calls"
case "$*" in
  *build_rearc_dataset*) mkdir -p "$OUT/rearc" && touch "$OUT/rearc/dataset.json" ;;
  *build_arc_dataset*) mkdir -p "$OUT/data" && echo '"rearc-train"' > "$OUT/data/dataset.json" ;;
  *'.overrides'*) printf '%s\\n' encoder=memory 'data.subset_shares={training: 4}' \\
    'data.query_sampling={training: any}' ;;
  *find_batch_size*) echo 4 ;;
esac
"""


@pytest.mark.slow
def test_every_task_is_asked_at_toy_size_on_a_cpu(tmp_path):
    done, stages = rehearsed(SCRIPT, tmp_path, TTT="1")
    assert done.returncode == 0, (done.stdout, logs_of(tmp_path))
    worked = ["data", "train", "ask-one-view", "ask", "adapt-first", "adapt", "partly-adapted"]
    assert [name for name, (status, *_) in stages.items() if status == "ok"] == worked
    assert "portions of 4 samples" in stages["train"][2]
    asked = read_json(tmp_path / "ask" / "results.json")
    tasks, adapted = asked["counts"]["tasks"], read_json(tmp_path / "adapt" / "results.json")
    assert asked["protocol"] == "inductive" and asked["num_views"] == 2 and tasks > 2
    controls = {score["control"] for score in asked["scores"]}
    assert controls == {"none", "query_only", "shuffled_demonstrations"}
    assert adapted["adaptation"]["name"] == "test_time_training" and adapted["counts"]["tasks"] == 2
    assert f"{tasks} tasks: 2 asked by test_time_training in 2 views" in stages["partly-adapted"][2]


def test_without_time_stages_are_left_out_and_nothing_fails(tmp_path):
    done, stages = rehearsed(SCRIPT, tmp_path, LIMIT="0", PYTHON="true")
    assert done.returncode == 0, done.stderr
    assert {status for status, *_ in stages.values()} == {"left out"}
    assert stages["train"][2] == f"there is no {tmp_path}/data/dataset.json"


def test_re_arc_is_trained_on_where_it_is_installed(tmp_path):
    python = tmp_path / "python"
    python.write_text(PRETENDS)
    python.chmod(0o755)
    done, stages = rehearsed(SCRIPT, tmp_path, PYTHON=str(python))
    assert done.returncode == 0, (done.stdout, logs_of(tmp_path))
    assert stages["train"][0] == stages["re-arc"][0] == "ok"
    calls = [line.rstrip("\t").split("\t") for line in (tmp_path / "calls").read_text().splitlines()]
    building = next(call for call in calls if "dataset.build_arc_dataset" in call)
    assert f"rearc={tmp_path}/rearc" in building and "rearc-train" in building
    _, *overrides = next(call for call in calls if "run_name=trained" in call)
    data = compose.load(PretrainConfig, "pretrain", overrides).data
    assert data.subset_shares is not None and data.subset_shares["rearc-train"] == 2
    assert data.query_sampling == {**dict.fromkeys(data.subset_shares, "any"), "rules-train": "all"}


def evaluated(protocol: str, ranks: dict[str, list[int | None]], **about) -> Evaluated:
    """An evaluation with the rank of the truth of each query, by task."""
    queries = {
        task: {(number, "i", "l"): rank for number, rank in enumerate(of_task)}
        for task, of_task in ranks.items()
    }
    found = {"protocol": protocol, "checkpoint": {"step": 1}, "num_views": 8, **about}
    return Evaluated(Path(protocol), found, queries)


def test_a_task_that_is_not_reached_counts_as_it_was_answered_without_adapting():
    asked = evaluated("inductive", {"a": [1], "b": [None], "c": [2, None], "d": [1]})
    adapted = evaluated("test_time_training", {"a": [None], "b": [1]})
    shares = together(asked, adapted)
    assert shares["pass@1"].tolist() == [0, 1, 0, 1] and shares["pass@2"].tolist() == [0, 1, 0.5, 1]
    assert shares["tasks_solved@2"].tolist() == [0, 1, 0, 1]
    first, *scores = told(asked, adapted)
    assert "4 tasks: 2 asked by test_time_training" in first and "2 not reached" in first
    assert any(line.startswith("pass@2") and "0.625" in line for line in scores)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (evaluated("t", {"z": [1]}), "asks z"),
        (evaluated("t", {"a": [1, 1]}), "asks a"),
        (evaluated("t", {"a": [1]}, checkpoint={"step": 2}), "different checkpoints"),
    ],
)
def test_evaluations_that_do_not_belong_together_are_refused(other, words):
    with pytest.raises(UserError, match=words):
        together(evaluated("inductive", {"a": [1], "b": [1]}), other)
