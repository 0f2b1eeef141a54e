"""What an evaluation writes: scores, controls, records, pages, whatever the batch, the world, the tasks."""

import json
import math
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from config import compose
from dataset import augment
from dataset.build_arc_dataset import build, parse_arguments
from dataset.store import Store
from dataset.task import Pair, Task
from dataset.views import EvaluationSet
from dataset.writer import write_dataset
from evaluation.session import EvaluateConfig, Session
from tests.support.grids import random_task
from tests.support.runs import evaluate_here, load_config, run, train_here
from tools.publish import MOST_BYTES, publish
from utils import checkpoint, distributed
from utils.errors import UserError
from utils.files import read_json


@pytest.fixture(scope="module")
def trained(fewshot, tmp_path_factory):
    """A run folder with a checkpoint of a barely trained model."""
    return train_here(fewshot, tmp_path_factory.mktemp("runs"), "train_steps=3")


def results_of(folder) -> tuple[dict, list, dict]:
    records = [json.loads(line) for line in (folder / "per_example.jsonl").read_text().splitlines()]
    return (
        json.loads((folder / "results.json").read_text()),
        records,
        json.loads((folder / "submission.json").read_text()),
    )


def test_an_evaluation_writes_scores_records_submission_and_page(trained, fewshot, tmp_path):
    done = run("evaluate.py", f"checkpoint={trained}", "num_views=3", f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    results, records, submission = results_of(tmp_path)
    queries = sum(len(fewshot.task(int(task)).queries) for task in fewshot.tasks_of("test"))
    assert (
        results["protocol"] == "inductive"
        and results["counts"]["tasks"] == 5
        and results["counts"]["queries"] == queries == len(records)
    )
    assert {s["control"] for s in results["scores"]} == {
        "none",
        "query_only",
        "shuffled_demonstrations",
        "copy_input",
    }
    assert all(s["n"] == 5 and s["ci_low"] <= s["value"] <= s["ci_high"] for s in results["scores"])
    assert [len(submission[name]) for name in submission] == [
        len(fewshot.task(int(task)).queries) for task in fewshot.tasks_of("test")
    ]
    assert all(
        set(entry) == {"attempt_1", "attempt_2"} for entries in submission.values() for entry in entries
    )
    assert (
        "inductive" in done.stdout
        and "query_only" in done.stdout
        and (tmp_path / "report.html").stat().st_size > 1000
    )


def test_several_subsets_are_scored_side_by_side(trained, tmp_path, capsys):
    rng = np.random.default_rng(3)
    tasks = {
        name: [random_task(rng, f"{name}{i}", side=3) for i in range(count)]
        for name, count in (("x", 1), ("p", 2), ("q", 3))
    }
    write_dataset(tmp_path / "d", tasks, ["p", "q"], layout="fewshot", source="random", seed=0)
    evaluate_here(
        f"checkpoint={trained}", f"data_path={tmp_path / 'd'}", "num_views=2", f"output_dir={tmp_path / 'e'}"
    )
    results = results_of(tmp_path / "e")[0]
    assert {name: {score["n"] for score in own} for name, own in results["by_subset"].items()} == {
        "p": {2},
        "q": {3},
    }
    for i, whole in enumerate(results["scores"]):
        parts = [own[i] for own in results["by_subset"].values()]
        assert {(part["metric"], part["control"]) for part in parts} == {(whole["metric"], whole["control"])}
        assert sum(part["value"] * part["n"] for part in parts) == pytest.approx(5 * whole["value"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("ARC/pass@2 by subset (tasks)") + 2].split() == ["p", "(2)", "q", "(3)"]


def test_shuffled_demonstrations_come_from_the_same_subset(tmp_path):
    rng = np.random.default_rng(3)
    tasks = {name: [random_task(rng, f"{name}{i}", side=3) for i in range(3)] for name in "xpq"}
    write_dataset(tmp_path / "d", tasks, ["p", "q"], layout="fewshot", source="random", seed=0)
    store = Store.load(tmp_path / "d")
    questions = EvaluationSet(store, load_config(store).data, "test", 1, 0, "shuffled_demonstrations")
    for query in questions.queries:
        others = np.searchsorted(store.task_pairs, questions.told(query)[0], side="right") - 1
        assert query.task not in others and set(store.task_subset[others]) == {store.task_subset[query.task]}


def test_a_shared_model_is_a_run_folder_with_its_scores(trained, fewshot, tmp_path):
    run_folder = shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(UserError, match="no evaluation of step_3 with averaged weights"):
        shutil.rmtree(run_folder / "evaluations", ignore_errors=True)
        publish(run_folder, tmp_path / "model")
    evaluate_here(f"checkpoint={run_folder}", "num_views=1")
    publish(run_folder, tmp_path / "model")
    about = json.loads((tmp_path / "model" / "scores.json").read_text())
    evaluate_here(f"checkpoint={tmp_path / 'model'}", "num_views=1", f"output_dir={tmp_path / 'e'}")
    results = results_of(tmp_path / "e")[0]
    assert results["scores"] == about["evaluations"][0]["scores"] and results["protocol"] == "inductive"
    assert about["data"]["hash"] == fewshot.metadata.content_hash
    assert sum(path.stat().st_size for path in (tmp_path / "model").rglob("*") if path.is_file()) < MOST_BYTES


ANSWERS = ("device=cpu", "num_views=4", "controls=[]", "report=false")


@pytest.fixture(scope="module")
def answers(trained, tmp_path_factory):
    """Scores and records of one process with batches of 64."""
    folder = tmp_path_factory.mktemp("answers")
    evaluate_here(f"checkpoint={trained}", *ANSWERS, "batch_size=64", f"output_dir={folder}")
    return results_of(folder)[:2]


@pytest.mark.parametrize("world, batch", [(1, 5), (2, 64)])
def test_the_answers_do_not_depend_on_batch_or_world_size(trained, answers, world, batch, tmp_path):
    arguments = (f"checkpoint={trained}", *ANSWERS, f"batch_size={batch}", f"output_dir={tmp_path}")
    if world == 1:
        evaluate_here(*arguments)
    else:
        done = run("evaluate.py", *arguments, world=world)
        assert done.returncode == 0, done.stderr
    (first, records), (second, others, _) = answers, results_of(tmp_path)
    assert second["processes"] == world and first["scores"] == second["scores"]
    for one, other in zip(records, others, strict=True):
        assert one["top1_pred_hash"] == other["top1_pred_hash"] and one["num_votes"] == other["num_votes"]


def test_the_protocol_follows_from_what_the_model_has_seen(trained, fewshot, tmp_path):
    """The training tasks as the evaluation set of another dataset, rotated and recoloured, are found out."""
    colours = np.array([0, 2, 3, 4, 5, 6, 7, 8, 9, 1], np.uint8)

    def moved(grid):
        return augment.apply(grid, 1, colours)

    tasks = {}
    for index in fewshot.tasks_of("train")[:2]:
        task = fewshot.task(int(index))
        pairs = [Pair(moved(pair.input), moved(pair.output)) for pair in task.pairs]
        tasks[f"renamed{index}"] = Task("x", tuple(pairs[:1]), tuple(pairs[1:2])).to_json()
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    build(
        parse_arguments(["--input-file", str(tmp_path / "tasks.json"), "--output-dir", str(tmp_path / "d")])
    )
    evaluate_here(
        f"checkpoint={trained}", f"data_path={tmp_path / 'd'}", "num_views=1", f"output_dir={tmp_path / 'e'}"
    )
    results = results_of(tmp_path / "e")[0]
    assert (
        results["protocol"] == "transductive"
        and "2 of the 2 tasks share a pair with the training data" in results["notes"][0]
    )


def test_an_evaluation_replaces_its_own_files_only(trained, tmp_path, monkeypatch):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "notes.txt").write_text("keep me")
    common = (f"checkpoint={trained}", "num_views=1", "controls=[]")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="was not written by this command"):
        patch.setattr(Session, "open", None)  # nothing is asked before the folder is known to be good
        evaluate_here(*common, f"output_dir={tmp_path / 'precious'}")
    assert (tmp_path / "precious" / "notes.txt").read_text() == "keep me"
    for options in ((), ("report=false",)):
        evaluate_here(*common, f"output_dir={tmp_path / 'e'}", *options)
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == [
        "per_example.jsonl",
        "results.json",
        "submission.json",
    ]


def test_a_control_that_asked_nothing_shows_no_score(trained, tmp_path, capsys):
    options = (
        f"checkpoint={trained}",
        "num_views=1",
        "max_eval_groups=1",
        "controls=[query_only,shuffled_demonstrations]",
    )
    evaluate_here(*options, "report=false", f"output_dir={tmp_path / 'e'}")
    shown = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert set(shown["shuffled_demonstrations"]) == {"-"} and "%" in shown["query_only"]
    assert (
        "shuffled_demonstrations: 1 of 1 tasks left out, no other's demonstrations fit on their canvas"
        in results_of(tmp_path / "e")[0]["notes"]
    )


def test_an_evaluation_with_other_settings_gets_a_folder_of_its_own(trained, tmp_path):
    run_folder = tmp_path / "run"
    shutil.copytree(trained, run_folder, ignore=shutil.ignore_patterns("evaluations"))
    for options in (("num_views=1",), ("num_views=2",), ("num_views=1", "save_predictions=true")):
        evaluate_here(f"checkpoint={run_folder}", "controls=[]", "report=false", *options)
    views = {
        path.name: read_json(path / "results.json")["num_views"]
        for path in (run_folder / "evaluations").iterdir()
    }
    assert views == {"step_3-ema-test": 1, "step_3-ema-test-2": 2}


def test_processes_wait_for_each_other_as_long_as_configured(trained, monkeypatch):
    waits = []
    monkeypatch.setattr(
        distributed, "start", lambda world, device, timeout_minutes=None: waits.append(timeout_minutes)
    )
    Session.open(
        compose.load(
            EvaluateConfig, "evaluate", [f"checkpoint={trained}", "device=cpu", "timeout_minutes=90"]
        )
    )
    assert waits == [90]


def test_training_tasks_are_scored_as_transductive(trained, tmp_path):
    evaluate_here(
        f"checkpoint={trained}", "split=train", "num_views=1", "controls=[]", f"output_dir={tmp_path}"
    )
    results, records, _ = results_of(tmp_path)
    assert (
        results["protocol"] == "transductive"
        and len(records) == results["counts"]["queries"] > results["counts"]["tasks"]
    )


def test_a_query_without_an_answer_is_predicted_but_not_scored(trained, tmp_path):
    task = {
        "train": [{"input": [[1]], "output": [[2]]}],
        "test": [{"input": [[1]]}, {"input": [[2, 1]], "output": [[3]]}],
    }
    huge = {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[1]], "output": [[0] * 9]}]}
    (tmp_path / "tasks.json").write_text(json.dumps({"open": task, "large": huge}))
    build(
        parse_arguments(["--input-file", str(tmp_path / "tasks.json"), "--output-dir", str(tmp_path / "d")])
    )
    evaluate_here(
        f"checkpoint={trained}", f"data_path={tmp_path / 'd'}", "num_views=2", f"output_dir={tmp_path / 'e'}"
    )
    results, records, submission = results_of(tmp_path / "e")
    status = {(record["task"], record["query"]): record["status"] for record in records}
    assert status == {("large", 0): "answer_exceeds_canvas", ("open", 0): "unlabelled", ("open", 1): "scored"}
    assert results["scores"][0]["n"] == 2 and len(submission["open"]) == 2
    assert next(r for r in records if r["status"] == "unlabelled")["top1_correct"] is None


def test_tasks_without_answers_get_a_submission_and_no_scores(trained, tmp_path, capsys):
    task = {"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[1]]}, {"input": [[2, 1]]}]}
    (tmp_path / "tasks.json").write_text(json.dumps({"open": task, "other": task}))
    build(
        parse_arguments(["--input-file", str(tmp_path / "tasks.json"), "--output-dir", str(tmp_path / "d")])
    )
    evaluate_here(
        f"checkpoint={trained}",
        f"data_path={tmp_path / 'd'}",
        "num_views=2",
        f"output_dir={tmp_path / 'e'}",
        "report=true",
    )
    results, records, submission = results_of(tmp_path / "e")
    assert (
        results["scores"] == []
        and results["counts"]["unlabelled"] == 4
        and "nothing was scored" in results["notes"][0]
    )
    assert {name: len(answers) for name, answers in submission.items()} == {"open": 2, "other": 2}
    assert all(record["num_votes"] for record in records) and (tmp_path / "e" / "report.html").is_file()
    shown = capsys.readouterr().out
    assert "4 unlabelled" in shown and "nothing was scored" in shown and "copy_input" not in shown


def test_a_trm_is_evaluated_with_the_rows_it_was_trained_on_only(puzzle, fewshot, tmp_path):
    folder = train_here(puzzle, tmp_path, "train_steps=2")
    evaluate_here(f"checkpoint={folder}", "num_views=4", f"output_dir={tmp_path / 'e'}")
    assert results_of(tmp_path / "e")[0]["protocol"] == "transductive"
    with pytest.raises(UserError, match="layout 'fewshot' but this model needs 'puzzle'"):
        evaluate_here(f"checkpoint={folder}", f"data_path={fewshot.path}")


def test_a_model_whose_numbers_are_no_numbers_is_evaluated_to_the_end(trained, tmp_path):
    copied = shutil.copytree(checkpoint.resolve(trained), tmp_path / "checkpoints" / "step_1")
    weights = load_file(copied / "ema.safetensors")
    broken = {name: value * math.nan for name, value in weights.items() if name.startswith("q_head")}
    save_file(weights | broken, copied / "ema.safetensors")
    evaluate_here(
        f"checkpoint={copied}", "num_views=1", "controls=[]", "report=false", f"output_dir={tmp_path / 'out'}"
    )
    results, records, _ = results_of(tmp_path / "out")
    assert results["means"]["all.q_halt_loss"] is None and results["means"]["all.lm_loss"] > 0
    assert (
        "NaN" not in (tmp_path / "out" / "per_example.jsonl").read_text()
        and len(records) == results["counts"]["queries"]
    )
