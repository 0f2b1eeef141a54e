"""What a newcomer is told: how long a training takes, where it was cut short, and what became of the demo."""

import re
from pathlib import Path

import pytest

from experiments import demo
from tests.support.runs import ROOT, train_here
from training.meter import Pace, duration
from utils.errors import UserError
from utils.files import write_json

RULES, ARC = demo.SUBSETS


def pace_of(seconds: float, steps: int = 1) -> Pace:
    """A pace after warm-up rounds of 99 seconds and timed ones of `seconds`."""
    pace = Pace()
    told = [pace.add(99.0 if number < Pace.SKIPPED else seconds, steps) for number in range(20)]
    assert told.count(True) == 1 and told.index(True) == Pace.SKIPPED + Pace.TIMED - 1
    return pace


def test_a_forecast_counts_the_steps_left_at_the_pace_after_the_warm_up():
    assert pace_of(0.5).forecast(15, 615, None) == "about 5 minutes for the 600 steps left, at 0.5 s a step"
    # A round of several updates is divided among them.
    assert pace_of(2.0, steps=4).forecast(60, 660, None).startswith("about 5 minutes")


def test_a_forecast_says_where_a_limit_of_time_will_end_the_run():
    assert "max_seconds" not in pace_of(0.5).forecast(15, 615, 301.0)
    said = pace_of(0.5).forecast(15, 615, 100.0)
    assert said.endswith("; max_seconds ends it near step 215, and the same command continues")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.01, "1 s"), (70, "70 s"), (120, "2 minutes"), (5400, "90 minutes"), (9000, "2.5 hours")],
)
def test_durations_are_words(seconds, words):
    assert duration(seconds) == words


def test_a_training_says_after_some_steps_how_long_it_will_take(fewshot, tmp_path, capsys):
    train_here(fewshot, tmp_path, "train_steps=17", "arch.H_cycles=1", "log_interval=20")
    said = [line for line in capsys.readouterr().err.splitlines() if "steps left" in line]
    assert len(said) == 1 and re.match(r"about \d+ s for the 2 steps left, at \S+ s a step$", said[0])


def test_a_training_cut_short_says_so_and_its_command_continues(fewshot, tmp_path, capsys):
    options = ("train_steps=3", "arch.H_cycles=1")
    train_here(fewshot, tmp_path, *options, "max_seconds=1e-9")
    printed = capsys.readouterr().out
    assert "max_seconds=1e-09: 2 steps are left, and the same command continues" in printed
    train_here(fewshot, tmp_path, *options)
    printed = capsys.readouterr().out
    assert printed.startswith("step 3: checkpoint") and "steps are left" not in printed
    # At the last step the time may be over, too, but nothing is left to continue.
    train_here(fewshot, tmp_path / "short", "train_steps=1", "max_seconds=1e-9")
    assert "steps are left" not in capsys.readouterr().out


def a_demo(folder: Path, step: int, solved: float, asked: int | None = None) -> Path:
    """A run of 600 steps at step `step` that solves a share of the new rules."""

    def scores(value: float, n: int) -> list[dict]:
        others = [{"metric": demo.METRIC, "control": "query_only", "value": 1.0, "n": n}]
        others += [{"metric": "ARC/pass@1", "control": "none", "value": 0.9, "n": n}]
        return [*others, {"metric": demo.METRIC, "control": "none", "value": value, "n": n}]

    path = folder / "checkpoints" / f"step_{step}"
    path.mkdir(parents=True)
    write_json(path / "info.json", {"format": 1, "step": step, "config": {"train_steps": 600}})
    results = {"checkpoint": {"step": asked or step}}
    results["by_subset"] = {RULES: scores(solved, 100), ARC: scores(0.0, 77)}
    (folder / demo.EVALUATION).mkdir(parents=True)
    write_json(folder / demo.EVALUATION / "results.json", results)
    return folder


def test_the_demo_says_what_is_learned(tmp_path):
    lines, well = demo.verdict(a_demo(tmp_path, 600, 1.0))
    assert well and lines == [
        "new colour rules: 100 of 100 solved with two answers",
        "held-out ARC tasks: 0 of 77 solved with two answers",
        "The rules are learned, after 600 of 600 steps.",
    ]


def test_a_demo_whose_time_was_over_says_how_far_it_came_and_how_it_continues(tmp_path):
    lines, well = demo.verdict(a_demo(tmp_path, 213, 0.0))
    assert well and lines[0] == "new colour rules: 0 of 100 solved with two answers"
    assert "time was over after 213 of 600 steps" in lines[2] and "make demo) continues" in lines[3]


def test_a_demo_that_learns_nothing_in_all_its_steps_has_broken_its_promise(tmp_path):
    lines, well = demo.verdict(a_demo(tmp_path, 600, 0.5))
    assert not well and lines[-1] == "The rules are not learned, although all 600 steps are made."


def test_a_demo_is_judged_by_the_evaluation_of_its_newest_checkpoint(tmp_path):
    with pytest.raises(UserError, match="is of step 213, and the newest checkpoint of step 600"):
        demo.verdict(a_demo(tmp_path, 600, 1.0, asked=213))


def test_the_demo_answers_a_task_before_it_trains_and_judges_at_the_end():
    script = (ROOT / "experiments" / "demo.sh").read_text()
    calls = re.findall(r"^\$PYTHON (\S+(?: \S+)?)", script, re.M)
    assert calls[0] == "predict.py checkpoint=pretrained/rules" and calls[-1] == "-m experiments.demo"
    assert calls.index("pretrain_etrm.py experiment=demo") < len(calls) - 2
