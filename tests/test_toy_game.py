"""A game that the project does not know is one file, and every command plays it."""

import json
from pathlib import Path

import numpy as np
import pytest

import predict
from config import compose
from dataset import games
from tests.support import toy_game
from tests.support.runs import evaluate_here, train_briefly
from utils.files import read_json


@pytest.fixture
def latin(tmp_path):
    """A dataset of the game, which is there for this test alone."""
    games.register(toy_game.GAME)
    yield toy_game.write(tmp_path / "data", 12, 5)
    del games.GAMES[toy_game.GAME.name]


def test_a_game_in_one_file_is_trained_evaluated_and_asked(latin, tmp_path, capsys):
    keys = ("data=sudoku", "data.buckets=[4]", "data.augmentation=random", "train_steps=2")
    folder = train_briefly(latin, tmp_path / "run", *keys)
    evaluate_here(f"checkpoint={folder}", f"output_dir={tmp_path / 'e'}")
    scores = {score["metric"]: score["n"] for score in read_json(tmp_path / "e" / "results.json")["scores"]}
    assert scores["all.exact_accuracy"] == scores["all.valid"] == 5
    assert "every digit once in each row and column" in (tmp_path / "e" / "report.html").read_text()
    puzzle = latin.task(12).queries[0].input
    (tmp_path / "puzzle.txt").write_text("".join(toy_game.CHARACTERS[value] for value in puzzle.ravel()))
    capsys.readouterr()
    asked = (f"checkpoint={folder}", f"task={tmp_path / 'puzzle.txt'}", "format=json", "device=cpu")
    predict.run(compose.load(predict.PredictConfig, "predict", [*asked]))
    answer = np.array(json.loads(capsys.readouterr().out)["submission"]["1"][0]["attempt_1"])
    assert answer.shape == (4, 4)


def test_the_rules_of_the_game_judge_an_answer():
    puzzles, answers = toy_game.generate(5, 3, np.random.default_rng(0))
    assert toy_game.solves(puzzles, answers).all()
    answers[0, 0, 0] = answers[0, 0, 1]
    answers[1] = np.roll(answers[1], 1, axis=0)
    assert toy_game.solves(puzzles, answers).tolist() == [False, False, True]


def test_the_game_is_as_short_as_the_documents_say():
    assert len(Path(toy_game.__file__).read_text().splitlines()) < 100
