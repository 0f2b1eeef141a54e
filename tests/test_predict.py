"""Asking a trained model one task: the answers are an evaluation's, unusual tasks are answered or refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import predict
from dataset.batch import materialise
from dataset.games import GAMES
from dataset.task import Pair, Task
from dataset.views import EvaluationSet
from evaluation.adaptation import as_it_is
from evaluation.drawing import CHANGED, RIGHT, WRONG
from evaluation.inference import Inference
from evaluation.report import PLACEHOLDER
from evaluation.solver import Solver, read_task
from evaluation.terminal import _visible
from evaluation.thinking import AS_TRAINED
from evaluation.voting import Candidate
from models.act import act_steps, solve
from models.losses import sample_loss
from models.trm import ETRM
from tests.support.grids import random_task
from tests.support.images import read_gif
from tests.support.runs import ROOT, run, untrained
from tools import timeline
from tools.publish import MOST_BYTES
from utils.errors import UserError
from utils.files import sha256_of

COLOURED = "\033[48;2;"


@pytest.fixture(scope="module")
def trained(fewshot, tmp_path_factory):
    return untrained(fewshot, tmp_path_factory.mktemp("checkpoints"), "data.max_demos=3")


@pytest.fixture(scope="module")
def solver(trained):
    return Solver.from_pretrained(trained)


def a_task(demonstrations: int = 2, queries: int = 1, seed: int = 3, side: int = 5) -> Task:
    return random_task(np.random.default_rng(seed), "mine", demonstrations, queries, side)


def config_for(trained, task, *overrides: str):
    values = {
        "checkpoint": str(trained),
        "task": str(task),
        "task_id": None,
        "weights": "ema",
        "num_views": 4,
        "batch_size": 64,
    }
    values |= {"seed": 0, "device": "cpu", "format": "text", "page": None, "protocol": {"name": "auto"}}
    values |= AS_TRAINED.model_dump() | {"threads": 1, "forward_dtype": "checkpoint"}
    return predict.PredictConfig(**values | dict(override.split("=", 1) for override in overrides))


def written(folder, task: Task, name: str = "mine"):
    path = folder / f"{name}.json"
    path.write_text(json.dumps(task.to_json()))
    return path


def test_three_lines_of_python_answer_a_task(trained, tmp_path):
    model = Solver.from_pretrained(str(trained))
    task = a_task(queries=2)
    answers = model.solve(written(tmp_path, task), num_views=4)
    assert isinstance(model.model, ETRM) and len(answers) == 2
    for candidates in answers:
        assert sum(answer["votes"] for answer in candidates) == 4
        assert all(
            set(answer) == {"grid", "votes", "probability"} and 0 <= answer["probability"] <= 1
            for answer in candidates
        )
        assert all(isinstance(cell, int) for answer in candidates for row in answer["grid"] for cell in row)
    assert model.solve(task, num_views=4) == answers
    named_differently = model.solve(task.to_json(), num_views=1)
    assert named_differently == model.solve(task, num_views=1)


def test_answers_are_those_of_an_evaluation(solver, fewshot):
    questions = EvaluationSet(fewshot, solver.data, "test", 4, 0, max_tasks=2)
    respondent = replace(solver.respondent(a_task()), store=fewshot, table=fewshot.grid_table)
    votes = Inference(respondent, questions, as_it_is(respondent, 64)).predict()
    ours = [
        candidates
        for index in fewshot.tasks_of("test", 2)
        for candidates in solver.ask(fewshot.task(int(index)), 4, 0, 64).answers
    ]
    for number, candidates in enumerate(ours):
        for candidate, other in zip(candidates, votes.ranked(number), strict=True):
            assert np.array_equal(candidate.grid, other.grid) and candidate.votes == other.votes
            assert candidate.q == pytest.approx(other.q, abs=1e-4)
    assert len(ours) == len(questions.queries) > 2


def test_known_answers_are_never_read(solver):
    task = a_task(queries=2)
    hidden = Task(task.id, task.demonstrations, tuple(Pair(query.input, None) for query in task.queries))
    assert solver.solve(task, num_views=4) == solver.solve(hidden, num_views=4)


def test_the_recorded_steps_end_in_the_answer(solver, monkeypatch):
    records = solver.ask(a_task(queries=2), 1, 0, 64, record_steps=True).records
    for record in records:
        steps = record["steps"]
        assert len(steps) == solver.model.config.halt_max_steps == 3
        assert [step["halted"] for step in steps] == [False, False, True]
        assert [steps[-1]["grid"]] == [candidate["grid"] for candidate in record["candidates"]]
        assert steps[-1]["q"] == record["candidates"][0]["q"]
    shorter = solver.model.config.model_copy(update={"halt_threshold": 1e-6})
    monkeypatch.setattr(solver.model, "config", shorter)
    steps = solver.refine(a_task(queries=2), 1)
    assert len(steps) == 1
    assert {name: steps[0][name] for name in ("grid", "q", "halted")} == {
        **records[1]["steps"][0],
        "halted": True,
    }


def test_steps_have_an_accuracy_and_a_loss_where_the_answer_is_known(solver):
    task = a_task()
    steps, truth = solver.refine(task, 0), task.queries[0].output
    respondent = solver.respondent(task)
    questions = solver.questions(respondent, 1, 0)
    (batch,) = questions.batches(1)
    data = materialise(batch.samples, respondent.store, respondent.table).data
    losses = [
        sample_loss(output.logits, data["labels"], respondent.objective).item()
        for _, output in act_steps(solver.model, data)
    ]
    assert [step["loss"] for step in steps] == losses
    for step in steps:
        grid = np.array(step["grid"] or [[]])
        right = sum(
            grid[row, column] == truth[row, column]
            for row, column in np.ndindex(truth.shape)
            if row < grid.shape[0] and column < grid.shape[1]
        )
        assert step["accuracy"] == right / max(grid.size, truth.size)
    (query,) = task.queries
    unknown = Task(task.id, task.demonstrations, (Pair(query.input, None),))
    assert "loss" not in solver.refine(unknown, 0)[0]


def test_a_view_is_refined_in_its_own_frame_and_mapped_back(solver):
    task = a_task()
    seen = [solver.refine(task, 0, view, 4)[-1]["grid"] for view in range(4)]
    counted = {json.dumps(answer["grid"]): answer["votes"] for answer in solver.solve(task, num_views=4)[0]}
    assert counted == {json.dumps(grid): seen.count(grid) for grid in seen if grid}
    with pytest.raises(UserError, match="no query 1; it has 1"):
        solver.refine(task, 1)
    regular = Task(
        "regular", *((Pair(np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8)),) for _ in range(2))
    )
    with pytest.raises(UserError, match="no view 1 among num_views=4"):
        solver.refine(regular, 0, 1, 4)


@pytest.mark.parametrize(
    "demonstrations, max_demos, note", [(1, 3, ""), (5, 3, "5 demonstrations, more than data.max_demos=3")]
)
def test_few_and_many_demonstrations_are_answered(solver, demonstrations, max_demos, note):
    solution = solver.ask(a_task(demonstrations), 2, 0, 64)
    assert solver.data.max_demos == max_demos and len(solution.answers[0]) >= 1
    assert (note in " ".join(solution.notes)) and bool(note) == bool(solution.notes)


def test_fewer_demonstrations_than_in_training_are_said(solver, monkeypatch):
    monkeypatch.setattr(solver, "data", solver.data.model_copy(update={"min_demos": 2}))
    assert "trained with at least 2 (data.min_demos)" in solver.ask(a_task(1), 1, 0, 64).notes[0]


def test_unusual_queries_are_answered_and_said(solver, tmp_path):
    task = a_task()
    large = Pair(np.ones((2, 2), np.uint8), np.ones((9, 9), np.uint8))
    task = Task(task.id, task.demonstrations, (*task.queries, large, Pair(large.input, None)))
    solution = solver.ask(task, 2, 0, 64)
    assert [record["status"] for record in solution.records] == [
        "scored",
        "answer_exceeds_canvas",
        "unlabelled",
    ]
    assert "query 1: the known answer is 9x9, larger than the 6x6 canvas" in solution.notes[0]
    text = predict.text(solution, GAMES["arc"], coloured=False, width=200)
    assert text.count("task mine, query") == 3 and "answer unknown" in text and solution.notes[0] in text


def test_a_task_that_fits_no_canvas_is_refused(solver):
    with pytest.raises(UserError, match="side of 8, but the model's largest canvas is 6x6"):
        solver.solve({"train": [{"input": [[1] * 8], "output": [[1]]}], "test": [{"input": [[1]]}]})


def test_a_task_seen_in_training_is_said(solver, fewshot):
    solution = solver.ask(fewshot.task(int(fewshot.tasks_of("train")[0])), 1, 0, 64)
    assert solution.protocol == "transductive" and "may be remembered" in solution.notes[0]


def test_a_model_with_puzzle_rows_cannot_be_asked(puzzle, tmp_path):
    with pytest.raises(
        UserError, match="knows each task by a row that was learned for it, and an unknown task has none"
    ):
        Solver.from_pretrained(untrained(puzzle, tmp_path))


def test_one_of_several_tasks_is_named(tmp_path):
    path = tmp_path / "many.json"
    path.write_text(json.dumps({name: a_task().to_json() for name in ("00576224", "b")}))
    assert read_task(path, "b").id == "b"
    with pytest.raises(
        UserError, match="holds 2 tasks; say which one with task_id=ID, for example task_id=00576224"
    ):
        read_task(path)
    with pytest.raises(UserError, match="has no task 00576225 .did you mean '00576224'"):
        read_task(path, "00576225")


def test_the_terminal_shows_colours_or_digits(trained, tmp_path, monkeypatch, capsys):
    config = config_for(trained, written(tmp_path, a_task()))
    predict.run(config)
    plain = capsys.readouterr().out
    assert COLOURED not in plain and "attempt 1: " in plain and "votes, halting 0." in plain
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    predict.run(config)
    assert COLOURED in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    predict.run(config)
    assert capsys.readouterr().out == plain


def test_at_most_two_attempts_stand_beside_each_other_as_far_as_the_terminal_goes():
    candidates = [
        Candidate(np.full((2, 3), colour, np.uint8), 4 - colour, 0.25, colour) for colour in range(3)
    ]
    task = Task(
        "t",
        (Pair(*[np.zeros((1, 1), np.uint8)] * 2),),
        (Pair(np.full((3, 2), 7, np.uint8), candidates[1].grid),),
    )
    solution = predict.Solution(task, "inductive", 9, [candidates], [], [])
    wide = predict.text(solution, GAMES["arc"], coloured=False, width=200).splitlines()
    assert wide[0] == "task t, query 0: 3 different answers in 9 views, inductive"
    assert " ".join(wide[2].split()) == "input attempt 1: wrong attempt 2: right known answer"
    assert "4 of 9 votes, halting 0.250" in wide[3] and wide[4].split("    ")[0] == "7 7"
    narrow = predict.text(solution, GAMES["arc"], coloured=True, width=30).splitlines()
    assert max(map(_visible, narrow[2:])) <= 30 and sum("attempt" in line for line in narrow) == 2


def test_programs_read_json_alone_and_the_page_holds_the_steps(trained, tmp_path):
    task, page = written(tmp_path, a_task(queries=2)), tmp_path / "deep" / "page.html"
    done = run(
        "predict.py",
        f"checkpoint={trained}",
        f"task={task}",
        "num_views=2",
        "format=json",
        f"page={page}",
        "device=cpu",
    )
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert (
        value["task"] == "mine"
        and value["num_views"] == 2
        and [len(query["steps"]) for query in value["queries"]] == [3, 3]
    )
    assert all(set(entry) == {"attempt_1", "attempt_2"} for entry in value["submission"]["mine"])
    text = page.read_text(encoding="utf-8")
    assert PLACEHOLDER not in text and text.count('"halted":true') == 2


def test_errors_are_one_line(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["predict.py", f"checkpoint={trained}", f"task={tmp_path / 'none.json'}"])
    with pytest.raises(SystemExit, match="2"):
        predict.main()
    assert capsys.readouterr().err == f"error: no such file: {tmp_path / 'none.json'}\n"


def test_a_timeline_frames_cells_and_plays_every_step(solver, trained, tmp_path, capsys):
    task = a_task()
    values = {
        "checkpoint": str(trained),
        "task": str(written(tmp_path, task)),
        "task_id": None,
        "weights": "ema",
        "num_views": 1,
        "seed": 0,
        "device": "cpu",
        "threads": "auto",
        "forward_dtype": "checkpoint",
        "protocol": {"name": "auto"},
    }
    values |= {
        "pair_index": 0,
        "view": 0,
        "demonstrations": False,
        "target": True,
        "curves": True,
        "diff": True,
        "dpi": 60,
        "columns": 2,
        "output": str(tmp_path / "t.png"),
    }
    timeline.run(timeline.TimelineConfig(**values))
    picture = np.array(Image.open(tmp_path / "t.png"))
    frames, times = read_gif(tmp_path / "t.gif")
    assert len(frames) == 3 and times == [600, 600, 2500] and "3 ACT steps" in capsys.readouterr().out
    assert (picture == WRONG).all(axis=-1).any()
    assert Image.open(tmp_path / "t_curves.png").size[0] > 1000, "a panel each for accuracy, loss and halting"
    timeline.run(timeline.TimelineConfig(**values | {"demonstrations": True, "curves": False}))
    with_pairs = np.array(Image.open(tmp_path / "t.png"))
    assert len(with_pairs) > len(picture) and "t_curves" not in capsys.readouterr().out
    timeline.run(timeline.TimelineConfig(**values | {"diff": False, "target": False}))
    plain = np.array(Image.open(tmp_path / "t.png"))
    assert not any((plain == colour).all(axis=-1).any() for colour in (RIGHT, WRONG, CHANGED))
    with pytest.raises(UserError, match="should end in .png"):
        timeline.run(timeline.TimelineConfig(**values | {"output": "t.jpg"}))


def test_solve_gives_what_the_recorded_steps_end_in(solver):
    """The model itself, asked without views or votes."""
    asked = solver.respondent(a_task())
    (batch,) = solver.questions(asked, 1, 0).batches(1)
    answer = solve(solver.model, materialise(batch.samples, asked.store, asked.table, with_labels=False).data)
    assert solver.refine(a_task(), 0)[-1]["q"] == pytest.approx(
        answer.q_halt_logits.sigmoid().item(), abs=1e-5
    )


def size_of(folder):
    files = (path for path in folder.rglob("*") if "evaluations" not in path.parts)
    return sum(path.stat().st_size for path in files if path.is_file())


def test_the_models_that_come_with_the_repository_are_those_of_their_scores_and_solve_the_examples():
    solves = {"rules": ["example"], "arc-drafts": ["example", "mirrored"], "arc-small": [], "sudoku-6x6": []}
    models = [path.parent for path in (ROOT / "pretrained").glob("*/scores.json")]
    assert {model.name for model in models} == set(solves)
    assert size_of(ROOT / "pretrained") < 2 * MOST_BYTES  # in every clone
    for model in models:
        assert size_of(model) < MOST_BYTES
        about = json.loads((model / "scores.json").read_text())
        (checkpoint,) = (model / "checkpoints").iterdir()
        assert {name: sha256_of(checkpoint / name) for name in about["sha256"]} == about["sha256"]
        for name in solves[model.name]:
            task = json.loads((ROOT / "pretrained" / f"{name}.json").read_text())
            (answer,) = Solver.from_pretrained(model, device="cpu").solve(task)
            assert answer[0]["grid"] == task["test"][0]["output"]
