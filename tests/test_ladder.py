"""The ladder: its recipes are runs, what is done is not done again, and tables say what the results say."""

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from config import compose
from config.schema import PretrainConfig
from evaluation.session import EvaluateConfig
from experiments import ladder
from experiments.ladder import Ladder, Result, append, read_ladder, read_results
from experiments.tables import fill
from tests.support.runs import TINY
from utils.errors import UserError

RESULT = Result(
    *("r", "a", "test", "etrm", "memory", "inductive", "none", "ARC/pass@1", 0.5, 0.4, 0.6, 100, [0]),
    *("python -m experiments.ladder r", "abc", "CPU", 12.0),
)


@pytest.mark.parametrize("name", list(read_ladder().recipes))
def test_every_recipe_is_a_valid_run(name):
    recipe = read_ladder().recipe(name)
    config = compose.load(PretrainConfig, "pretrain", [*recipe.overrides, "run_name=r"])
    assert recipe.subsets and recipe.rung in "abcd" and config.encoder is not None
    for protocol in recipe.subsets:
        asked = compose.load(
            EvaluateConfig, "evaluate", ["checkpoint=r", *ladder.evaluation_of(recipe, protocol)]
        )
        assert asked.protocol.name == protocol.split()[0]


def test_a_protocol_of_a_recipe_may_have_its_own_number_of_views():
    recipe = read_ladder().recipe("c-arc-small-best")
    overrides = [ladder.evaluation_of(recipe, protocol) for protocol in recipe.subsets]
    configs = [compose.load(EvaluateConfig, "evaluate", ["checkpoint=r", *asked]) for asked in overrides]
    assert [config.num_views for config in configs] == [8, 64, 8, 64]
    assert [config.protocol.steps for config in configs[2:]] == [60, 60]


def test_a_recipe_inherits_what_it_does_not_name():
    own = read_ladder().recipe("a-all-rules-64")
    base = read_ladder().recipe("a-all")
    assert (
        own.overrides == base.overrides
        and own.subsets == base.subsets
        and own.data == "small-64" != base.data
    )
    with pytest.raises(UserError, match="no recipe a-al; did you mean 'a-all'|no recipe a-al.*a-all"):
        read_ladder().recipe("a-al")


@pytest.mark.parametrize(
    "recipe, words",
    [({"title": "t", "dat": "d"}, "recipes.r.dat"), ({"title": "t", "data": "e"}, "recipe r: no dataset e")],
)
def test_a_malformed_recipe_is_one_message(recipe, words, tmp_path):
    OmegaConf.save({"datasets": {"d": "m"}, "recipes": {"r": recipe}}, tmp_path / "ladder.yaml")
    with pytest.raises(UserError, match=words):
        read_ladder(tmp_path / "ladder.yaml")


def test_a_dataset_may_be_made_of_another(tmp_path, monkeypatch):
    built = []

    def build(*arguments):
        built.append(arguments)
        Path(arguments[-1]).mkdir(parents=True)

    monkeypatch.setattr(ladder, "run_python", build)
    recipes = Ladder(datasets={"a": "build a", "b": "build b --dataset x=@a"}, recipes={})
    data = tmp_path / "with space"
    assert ladder.dataset("b", recipes, data) == ladder.dataset("b", recipes, data) == data / "ladder-b"
    a, b = str(data / "ladder-a"), str(data / "ladder-b")
    assert built == [
        ("-m", "build", "a", "--output-dir", a),
        ("-m", "build", "b", "--dataset", f"x={a}", "--output-dir", b),
    ]
    with pytest.raises(
        UserError, match="ladder-a was not built by what ladder.yaml says now, build other; delete it"
    ):
        ladder.dataset(
            "b", recipes.model_copy(update={"datasets": {**recipes.datasets, "a": "build other"}}), data
        )
    OmegaConf.save(
        {"datasets": {"b": "build --dataset x=@a", "a": "m"}, "recipes": {}}, tmp_path / "ladder.yaml"
    )
    with pytest.raises(UserError, match="dataset b: @a is no dataset above it"):
        read_ladder(tmp_path / "ladder.yaml")


def test_results_are_appended_once_and_the_last_of_equals_counts(tmp_path):
    path = tmp_path / "results.jsonl"
    append([RESULT, replace(RESULT, seeds=[1])], path)
    append([RESULT, replace(RESULT, value=0.6)], path)
    assert len(path.read_text().splitlines()) == 3
    assert [(result.value, result.seeds) for result in read_results(path)] == [(0.6, [0]), (0.5, [1])]
    path.write_text(path.read_text() + '{"recipe": "r"')
    with pytest.raises(UserError, match=r"results.jsonl:4: "):
        read_results(path)


def test_a_table_shows_the_mean_over_seeds_the_widest_interval_and_the_controls():
    recipes = Ladder(
        datasets={"d": "m"},
        recipes={
            name: {"title": name.upper(), "rung": "a", "data": "d", "subsets": {"inductive": ["test"]}}
            for name in ("r", "none")
        },
    )
    results = [RESULT, replace(RESULT, value=0.7, ci_low=0.6, ci_high=0.8, seeds=[1])]
    results += [
        replace(RESULT, control="query_only", value=0.1),
        replace(RESULT, metric="ARC/pass@2", value=0.9),
    ]
    text = "before\n<!-- ladder: r none -->\nold\n<!-- ladder end -->\nafter\n"
    filled = fill(text, recipes, results)
    assert "| `r`: R | inductive | 0.600 [0.400, 0.800], n 100; 0.100, - | 2 | 12 |" in filled
    assert "`none`: NONE" not in filled and "\n\nNot measured: `none`, inductive.\n" in filled
    assert "old" not in filled and filled.startswith("before\n") and filled.endswith("after\n")
    assert fill(filled, recipes, results) == filled


@pytest.mark.slow
def test_a_recipe_is_trained_evaluated_and_then_left_alone(tmp_path, fewshot, monkeypatch, capsys):
    overrides = [*TINY, "train_steps=2", "data.max_demos=2"]
    recipe = {"title": "t", "rung": "a", "data": "d", "subsets": {"inductive": ["b"]}, "overrides": overrides}
    recipe["evaluation"] = ["num_views=1"]
    recipe["expected"] = {"b": {"value": 1.0, "tolerance": 0.1}}
    OmegaConf.save({"datasets": {"d": "no.such.builder"}, "recipes": {"r": recipe}}, tmp_path / "ladder.yaml")
    shutil.copytree(fewshot.path, tmp_path / "data" / "ladder-d")
    (tmp_path / "data" / "ladder-d.txt").write_text("no.such.builder\n")
    monkeypatch.setattr(ladder, "read_ladder", lambda: read_ladder(tmp_path / "ladder.yaml"))
    folders = [
        "--output-dir",
        str(tmp_path / "runs"),
        "--data-dir",
        str(tmp_path / "data"),
        "--results",
        str(tmp_path / "results.jsonl"),
    ]
    monkeypatch.setattr("sys.argv", ["ladder", "r", "--seeds", "3", *folders])
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            ladder.main()
        assert (
            ended.value.code == 1
            and "FAIL r b, inductive, model: ARC/pass@1 0.000" in capsys.readouterr().out
        )
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {(line["control"], line["metric"]) for line in lines} == {
        (control, metric)
        for control in ("none", "query_only", "shuffled_demonstrations")
        for metric in ladder.METRICS
    }
    assert len(lines) == 6 and all(
        line["seeds"] == [3] and line["n"] == 5 and line["wall_seconds"] > 0 for line in lines
    )


def test_a_request_to_stop_reaches_the_training_run_which_saves(tmp_path):
    ready = tmp_path / "ready"
    child = "import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
    child += f"pathlib.Path({str(ready)!r}).touch()"

    def stop() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(UserError, match="status 75; the same command continues"):
        ladder.run_python("-c", f"{child}; time.sleep(60)")


def test_the_command_lists_the_recipes(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ladder", "--list"])
    ladder.main()
    assert "a-ancestor" in capsys.readouterr().out
