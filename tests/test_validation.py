"""Tasks held out of training, the best checkpoint and early stopping."""

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest

import pretrain_etrm
from dataset.samplers import SAMPLERS
from dataset.views import EvaluationSet
from evaluation import in_training
from evaluation.metrics import Score
from evaluation.run import Evaluation
from tests.support.runs import evaluate_here, load_config, metrics_of, steps_of, train_briefly
from training.state import TrainState
from utils import checkpoint
from utils.errors import UserError

VALIDATED = ("validation=2", "eval_interval=2", "evaluation.num_views=1")


def answer_with(monkeypatch, scores: dict[int, float]) -> list[tuple[str, int]]:
    """Let evaluations find these values of best_metric, by step; what was evaluated is collected."""
    real, asked = in_training.log_evaluation, []

    def log_evaluation(run, *arguments):
        state = run.state

        def evaluate(respondent, config, ask, progress):
            asked.append((ask.split, state.step))
            progress.answered(1)
            found = Score("none", "ARC/pass@1", scores[state.step], 0.0, 1.0, 2)
            unread = dict.fromkeys(field.name for field in fields(Evaluation))
            read = {
                "protocol": "inductive",
                "scores": [found],
                "means": {},
                "counts": {"tasks": 2},
                "notes": [],
            }
            return Evaluation(**unread | read)

        monkeypatch.setattr(in_training, "evaluate", evaluate)
        real(run, *arguments)

    monkeypatch.setattr(pretrain_etrm, "log_evaluation", log_evaluation)
    return asked


def test_validation_tasks_are_held_out_by_their_ids_and_asked_like_test_tasks(fewshot):
    held = fewshot.hold_out(2)
    assert held.tasks_of("validation").size == 2 and held.tasks_of("train").size == 4
    assert np.array_equal(held.tasks_of("test"), fewshot.tasks_of("test"))
    assert np.array_equal(held.task_split, fewshot.hold_out(1 / 3).task_split)
    chosen = {held.task_ids[task] for task in held.tasks_of("validation")}
    order = np.arange(len(fewshot.task_ids))[::-1]  # the same tasks in another order
    turned = replace(
        fewshot, task_ids=[fewshot.task_ids[i] for i in order], task_split=fewshot.task_split[order]
    )
    assert {turned.task_ids[task] for task in turned.hold_out(2).tasks_of("validation")} == chosen

    config = load_config(fewshot)
    sampler = SAMPLERS["fewshot"](held, config.data, 0, 8)
    trained = set(np.concatenate([choice.tasks for choice in sampler.chances.choices.values()]).tolist())
    assert trained.isdisjoint(held.tasks_of("validation").tolist())
    questions = EvaluationSet(held, config.data, "validation", 1, 0)
    for query in questions.queries:
        border = held.task_pairs[query.task] + held.task_demonstrations[query.task]
        assert query.pair >= border and all(pair < border for pair in query.demos)
        pairs = range(held.task_pairs[query.task], held.task_pairs[query.task + 1])
        assert not set(held.pair_fingerprint[list(pairs)]) & set(sampler.trained_pairs)


@pytest.mark.parametrize("amount", [6, 0.01, 0.99])
def test_a_hold_out_that_leaves_no_task_on_a_side_is_refused(fewshot, amount):
    with pytest.raises(UserError, match="some must remain on both sides"):
        fewshot.hold_out(amount)


def test_a_model_with_puzzle_rows_cannot_hold_tasks_out(puzzle):
    with pytest.raises(UserError, match="puzzle rows cannot answer tasks held out"):
        puzzle.hold_out(1)


@pytest.mark.parametrize("option", ["patience=2", "keep_best_checkpoints=1"])
def test_choosing_by_test_scores_is_refused(fewshot, option):
    with pytest.raises(UserError, match="needs validation and eval_interval"):
        load_config(fewshot, option, "eval_interval=2")


def test_the_best_and_the_newest_checkpoints_stay_and_patience_ends_the_run(
    fewshot, tmp_path, monkeypatch, capsys
):
    asked = answer_with(monkeypatch, {2: 0.5, 4: 0.75, 6: 0.5, 8: 0.75, 10: 0.5, 12: 1.0})
    options = (
        *VALIDATED,
        "train_steps=20",
        "patience=3",
        "keep_best_checkpoints=1",
        "keep_checkpoints=2",
        "checkpoint_interval=100",
    )
    folder = train_briefly(fewshot, tmp_path, *options)
    assert asked == [("validation", step) for step in (2, 4, 6, 8, 10)]
    assert steps_of(folder) == ["step_10", "step_4", "step_8"]
    assert (
        "best ARC/pass@1 on the validation tasks: 0.750 at step 4 (no better one" in capsys.readouterr().out
    )
    assert (
        checkpoint.resolve(folder / "best").name == "step_4" and checkpoint.resolve(folder).name == "step_10"
    )
    evaluated = [line for line in metrics_of(folder) if "protocol" in line]
    assert [line["validation/ARC/pass@1"] for line in evaluated] == [0.5, 0.75, 0.5, 0.75, 0.5]
    train_briefly(fewshot, tmp_path, *options)
    assert len(asked) == 5, "a run out of patience stays ended"
    train_briefly(
        fewshot, tmp_path, *options[:-1], "patience=null", "train_steps=12", "checkpoint_interval=50"
    )
    assert asked[5:] == [("validation", 12)] and checkpoint.resolve(folder / "best").name == "step_12"


@pytest.mark.parametrize(
    "scores, ended",
    [([0, 0, 0, 0], False), ([0, 0, 0, 0.5, 0], False), ([0, 0, 0.5, 0, 0], True), ([1, 0, 0], True)],
)
def test_patience_begins_when_the_score_first_moves(scores, ended):
    state = TrainState(None, [], None, scores=dict(enumerate(scores)))
    assert state.out_of_patience(2) == ended and not state.out_of_patience(None)


@pytest.mark.parametrize("min_delta, ended", [(0.0, False), (0.05, False), (0.1, True), (0.3, True)])
def test_a_score_that_is_hardly_better_does_not_extend_the_patience(min_delta, ended):
    state = TrainState(None, [], None, scores=dict(enumerate([0.0, 0.5, 0.56, 0.56])))
    assert state.out_of_patience(2, min_delta) == ended


def test_a_run_killed_during_an_evaluation_makes_up_for_it(fewshot, tmp_path, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrain_etrm, "log_evaluation", killed)
        with pytest.raises(KeyboardInterrupt):
            train_briefly(fewshot, tmp_path, *VALIDATED, "train_steps=4")
    assert steps_of(tmp_path / "r") == ["step_2"], "the checkpoint comes before the evaluation"
    asked = answer_with(monkeypatch, {2: 0.5, 4: 0.25})
    train_briefly(fewshot, tmp_path, *VALIDATED, "train_steps=4")
    assert asked == [("validation", 2), ("validation", 4)]


def test_a_metric_that_is_no_number_does_not_end_the_run_and_is_no_score(fewshot, tmp_path, monkeypatch):
    answer_with(monkeypatch, {2: math.nan, 4: 0.5})
    folder = train_briefly(fewshot, tmp_path, *VALIDATED, "train_steps=4", "patience=1")
    assert [line["validation/ARC/pass@1"] for line in metrics_of(folder) if "protocol" in line] == [None, 0.5]
    assert not checkpoint.lacks_evaluation(folder / "checkpoints" / "step_2")
    assert (
        checkpoint.load_score(folder / "checkpoints" / "step_2") is None
        and checkpoint.resolve(folder / "best").name == "step_4"
    )


def test_a_metric_that_is_not_evaluated_is_named(fewshot, tmp_path):
    with pytest.raises(UserError, match=r"best_metric=ARC/pass@3 \(did you mean"):
        train_briefly(fewshot, tmp_path, *VALIDATED, "train_steps=2", "best_metric=ARC/pass@3")
    assert not (tmp_path / "r").exists(), "it is said before the training"


def test_the_evaluate_command_knows_the_validation_tasks_and_the_best_checkpoint(fewshot, tmp_path, capsys):
    folder = train_briefly(fewshot, tmp_path, *VALIDATED, "train_steps=2")
    evaluate_here(
        f"checkpoint={folder}/best", "split=validation", "num_views=1", "controls=[]", "report=false"
    )
    assert "split validation: 2 tasks" in capsys.readouterr().out
    (results,) = (folder / "evaluations").glob("*/results.json")
    scores = {s["metric"]: s["value"] for s in json.loads(results.read_text())["scores"]}
    assert scores["ARC/pass@1"] == checkpoint.load_score(folder / "checkpoints" / "step_2")
