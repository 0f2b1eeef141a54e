"""What a terminal shows of an evaluation and of made tasks: how many of how many, and a partial score."""

import io
import re

import pytest

from config import compose
from dataset import build_arc_dataset
from dataset.generate import rule_tasks
from evaluation.progress import Progress
from evaluation.session import EvaluateConfig, Session
from tests.support.runs import evaluate_here, untrained


class Terminal(io.StringIO):
    """A standard error that is a terminal, or none."""

    def __init__(self, is_one: bool):
        super().__init__()
        self.isatty = lambda: is_one


class Told(Progress):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.begun: list[tuple[str, int, int]] = []

    def begins(self, views, control):
        self.begun.append((control, views, self.views))

    def scored(self, scores):
        self.right = scores.right()


@pytest.fixture(scope="module")
def checkpoint(fewshot, tmp_path_factory):
    return untrained(fewshot, tmp_path_factory.mktemp("progress"))


def test_all_announced_views_are_answered_and_the_last_partial_score_is_the_score(checkpoint):
    words = [
        f"checkpoint={checkpoint}",
        "device=cpu",
        "num_views=3",
        "batch_size=4",
        "rollouts=2",
        "sigma=0.3",
    ]
    session = Session.open(compose.load(EvaluateConfig, "evaluate", words))
    told = Told()
    metrics = session.evaluate(told).metrics()
    assert [control for control, *_ in told.begun] == ["none", "query_only", "shuffled_demonstrations"]
    ends = [before for *_, before in told.begun[1:]] + [told.views]
    assert [views for _, views, _ in told.begun] == [
        end - before for end, (*_, before) in zip(ends, told.begun, strict=True)
    ]
    right, known = told.right
    assert 0 < known <= ends[0] and metrics["all.exact_accuracy"] == pytest.approx(right / known)


@pytest.mark.parametrize("is_one", [True, False], ids=["in a terminal", "elsewhere"])
def test_an_evaluation_shows_rate_rest_and_partial_score_in_a_terminal_only(
    is_one, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr("sys.stderr", terminal := Terminal(is_one))
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    evaluate_here(f"checkpoint={checkpoint}", "num_views=2", f"output_dir={tmp_path}", "report=false")
    shown = terminal.getvalue()
    if is_one:
        assert re.search(r"views: +\d+%.*\d/\d+ \[.*<.*view.*, \d+ of \d+ right\]", shown)
        assert "query_only: " in shown
    else:
        assert "%" not in shown


def test_making_tasks_shows_how_many_are_made_in_a_terminal(monkeypatch):
    class Maker:
        def make(self, jobs):
            return list(jobs)

    monkeypatch.setattr("sys.stderr", terminal := Terminal(True))
    jobs = [("train", number, None) for number in range(5)]
    with rule_tasks.workers(Maker(), 1) as make:
        assert make(jobs) == jobs
    assert "train: " in terminal.getvalue() and "/5 [" in terminal.getvalue()


@pytest.mark.parametrize("is_one", [True, False], ids=["in a terminal", "elsewhere"])
def test_building_an_arc_dataset_shows_what_is_read_and_augmented_in_a_terminal_only(
    is_one, tmp_path, monkeypatch
):
    monkeypatch.setattr("sys.stderr", terminal := Terminal(is_one))
    words = ["--recipe", "arc1", "--layout", "puzzle", "--num-aug", "2", "--max-tasks", "3"]
    options = build_arc_dataset.parse_arguments([*words, "--output-dir", str(tmp_path / "d")])
    build_arc_dataset.build(options)
    shown = terminal.getvalue()
    if is_one:
        assert re.search(r"reading: .*/2 \[.*<.*subset", shown)
        assert re.search(r"augmentations: .*/6 \[.*<.*task", shown)
    else:
        assert shown == ""
