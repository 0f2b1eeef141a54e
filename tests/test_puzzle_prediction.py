"""Asking a model puzzles from text: what is read, what is said of each, and what is refused."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest

import predict
from dataset.games import GAMES
from dataset.games.drawing import rgb
from dataset.generate import maze, sudoku
from dataset.leaks import UNKNOWN_PAIRS
from dataset.puzzle_writer import pack
from dataset.store import Store
from dataset.task import Pair
from evaluation.puzzle_solver import PuzzleSolver, open_solver
from evaluation.solver import Solver
from evaluation.terminal import block
from evaluation.thinking import AS_TRAINED
from evaluation.voting import Candidate
from tests.support.runs import ROOT, untrained
from tests.support.thinking import thinking, write_sudokus
from utils.errors import UserError

SUDOKU = ("data=sudoku", "data.buckets=[4]")
MAZE = ("data=maze", "data.buckets=[5]", "data.augmentation=none")
FIRST = "1...\n..3.\n.4..\n...2\n"
ROWS = FIRST.split()
LINE = "".join(ROWS)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_sudokus(tmp_path_factory.mktemp("data") / "sudoku")


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    return untrained(store, tmp_path_factory.mktemp("checkpoints"), *SUDOKU)


@pytest.fixture(scope="module")
def solver(trained):
    return open_solver(trained)


def written(folder, text: str, name: str = "puzzles.txt"):
    path = folder / name
    path.write_bytes(text.encode())
    return path


def config_for(trained, task, **others):
    values = AS_TRAINED.model_dump() | {
        "checkpoint": str(trained),
        "task": str(task),
        "task_id": None,
        "weights": "ema",
        "protocol": {"name": "auto"},
        "num_views": 1,
        "seed": 0,
        "device": "cpu",
        "threads": 1,
        "forward_dtype": "checkpoint",
        "batch_size": 64,
        "format": "text",
        "page": None,
    }
    return predict.PredictConfig(**values | others)


def best_of(solution) -> np.ndarray:
    return solution.answers[0][0].grid


@pytest.mark.parametrize(
    "text",
    [
        FIRST.replace(".", "0"),
        FIRST.replace(".", "_").replace("\n", "\r\n"),
        LINE.replace(".", "*"),
        f"# hard\n{FIRST}# end",
        f"q,a\n{LINE},\n",
    ],
    ids=["noughts", "CRLF", "line", "comments", "csv"],
)
def test_a_sudoku_is_the_same_in_every_notation(solver, tmp_path, text):
    (task,) = solver.read(str(written(tmp_path, text)))
    assert "".join(str(value) for value in task.queries[0].input.ravel()) == LINE.replace(".", "0")


def test_puzzles_asked_together_are_answered_as_alone(solver, store, tmp_path):
    grids = [store.task(index).queries[0].input for index in (2, 4, 5)]
    lines = "\n".join("".join(map(str, grid.ravel())) for grid in grids)
    tasks = solver.read(str(written(tmp_path, lines)))
    together = solver.ask_all(tasks, 2, 0, 64)
    for task, solution in zip(tasks, together, strict=True):
        (alone,) = solver.ask_all([task], 2, 0, 64)
        assert np.array_equal(best_of(solution), best_of(alone))
        assert solution.facts.values["solutions"] == 1 and solution.notes == []


def test_what_is_known_of_a_puzzle_is_said(solver, tmp_path):
    text = f"{'.' * 16}\n11{'.' * 14}\n"
    solutions = solver.ask_all(solver.read(str(written(tmp_path, text))), 1, 0, 64)
    assert [one.facts.words for one in solutions] == [
        "more than one solution",
        "no solution: the given digits contradict each other",
    ]
    assert [one.records[0]["puzzle"]["solutions"] for one in solutions] == [2, 0]


def test_a_puzzle_of_the_training_is_said_to_be_remembered_in_any_symmetry(solver, store, tmp_path):
    puzzle = store.task(0).queries[0].input
    swapped = np.array([0, 2, 1, 4, 3])[puzzle.T]
    text = "".join(map(str, swapped.ravel()))
    (solution,) = solver.ask_all(solver.read(str(written(tmp_path, text))), 1, 0, 64)
    assert "was trained on this puzzle" in solution.notes[0] and "may be remembered" in solution.notes[0]


def test_of_a_model_with_unknown_training_no_puzzle_is_said_to_be_trained_on(solver, tmp_path):
    unknown = PuzzleSolver(replace(solver.trained, trained_pairs=UNKNOWN_PAIRS), solver.device)
    (solution,) = unknown.ask_all(unknown.read(str(written(tmp_path, LINE))), 1, 0, 64)
    assert solution.protocol == "transductive"
    assert solution.notes == [
        "nothing is known of what the model was trained on: its answer may be remembered"
    ]


def test_the_verdict_says_what_an_answer_is():
    game = GAMES["sudoku"].of_side(4)
    puzzles, answers, _ = sudoku.generate(4, 1, np.random.default_rng(0))
    (puzzle,), (answer,) = puzzles, answers
    right, broken = Candidate(answer, 1, 0.5, 0), Candidate(np.roll(answer, 1, axis=1), 1, 0.5, 0)
    assert predict.judged(Pair(puzzle, None), right, game) == "valid"
    assert predict.judged(Pair(puzzle, answer), right, game) == "valid, the known answer"
    assert predict.judged(Pair(puzzle, answer), broken, game) == "not valid, not the known answer"


def test_an_answer_smaller_than_the_puzzle_is_shown_in_colours():
    drawing, given = GAMES["sudoku"].drawing(4), np.ones((4, 4), bool)
    for answer in (np.ones((2, 3), np.uint8), np.ones((4, 4), np.uint8)):
        shown = block(["an answer"], answer, drawing, coloured=True, given=given)
        shaded = "48;2;{};{};{}m".format(*rgb(drawing.given))
        assert len(shown) == 2 + len(answer)
        assert sum(line.count(shaded) for line in shown) == (16 if answer.shape == given.shape else 0)


def test_a_terminal_shows_boxes_and_a_verdict_for_every_puzzle(trained, tmp_path, capsys):
    predict.run(config_for(trained, written(tmp_path, f"{FIRST}\n{FIRST}")))
    shown = capsys.readouterr().out
    assert shown.count("attempt 1: ") == 2 and "puzzle 1: " in shown and "puzzle 2: " in shown
    assert "1 . | . ." in shown and "----+----" in shown


def test_standard_input_is_read_and_programs_get_json(trained, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{LINE}\n{LINE}\n"))
    page = tmp_path / "page.html"
    predict.run(config_for(trained, "-", format="json", page=str(page)))
    value = json.loads(capsys.readouterr().out)
    assert list(value["submission"]) == ["1", "2"] and len(value["queries"]) == 2
    assert value["queries"][0]["puzzle"]["solutions"] in (0, 1, 2)
    assert page.read_text(encoding="utf-8").count('"halted":true') == 2


def test_attempts_are_chosen_by_the_rules_of_the_game(solver, tmp_path):
    tasks = solver.read(str(written(tmp_path, LINE)))
    wide = thinking(rollouts=3, sigma=0.5, select="verifier")
    (solution,) = solver.ask_all(tasks, 1, 0, 64, thinking=wide)
    assert "each view was asked in 3 attempts" in solution.notes


def test_the_shipped_model_solves_shipped_puzzles_that_it_has_not_seen():
    shipped = open_solver(ROOT / "pretrained/sudoku-6x6", device="cpu")
    easy, middling, _ = shipped.ask_all(shipped.read(str(ROOT / "pretrained/sudoku.txt")), 1, 0, 64)
    for solution in (easy, middling):
        assert solution.notes == [] and solution.facts.words == "one solution"
        assert sudoku.solves(solution.task.queries[0].input[None], best_of(solution)[None]).all()


@pytest.mark.parametrize(
    "text, error",
    [
        ("1...\n..3.\n", "puzzles.txt, line 1: 2 rows of 4 characters, expected 4"),
        ("\n123\n", r"line 2: 3 characters, expected 16 \(4 x 4\)"),
        (LINE.replace("4", "7"), "'7' at character 10 is no cell: digits 1 to 4"),
        ("# nothing\n", "no puzzle in it"),
    ],
)
def test_text_that_is_no_puzzle_is_refused_with_its_line(solver, tmp_path, text, error):
    with pytest.raises(UserError, match=error):
        solver.read(str(written(tmp_path, text)))


def test_a_puzzle_that_is_not_there_is_refused(solver, trained, tmp_path):
    path = written(tmp_path, LINE)
    with pytest.raises(UserError, match="has no puzzle 2; it has 1, counted from 1"):
        solver.read(str(path), "2")
    with pytest.raises(UserError, match="no such file"):
        solver.read(str(tmp_path / "none"))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        solver.read(str(path))


def test_models_of_tasks_and_of_puzzles_are_told_apart(trained, fewshot, tmp_path):
    with pytest.raises(UserError, match="trained on sudoku puzzles and answers no tasks; predict.py asks"):
        Solver.from_pretrained(trained)
    arc = untrained(fewshot, tmp_path)
    assert type(open_solver(arc)) is Solver
    with pytest.raises(UserError, match="was trained on tasks, not on a game"):
        PuzzleSolver.from_pretrained(arc)


def test_a_maze_is_read_from_its_drawing_with_or_without_its_path(tmp_path):
    mazes = maze.generate(5, 9, 0, 3, np.random.default_rng(0))[:4]
    paths = maze.first_paths(mazes)
    prints = {"train": maze.fingerprints(mazes[:2]), "test": maze.fingerprints(mazes[2:])}
    splits = {"train": (mazes[:2], paths[:2]), "test": (mazes[2:], paths[2:])}
    details = {"labels": "breadth_first"}
    about = {"source": "generated", "seed": 0, "num_aug": 0, "details": details, "fingerprints": prints}
    pack(splits, game="maze", **about).save(tmp_path / "d")
    solver = open_solver(untrained(Store.load(tmp_path / "d"), tmp_path / "c", *MAZE))
    drawn = "\n".join("".join(maze.CHARACTERS[value] for value in row) for row in paths[2])
    (task,) = solver.read(str(written(tmp_path, drawn)))
    assert np.array_equal(task.queries[0].input, mazes[2]) and np.array_equal(
        task.queries[0].output, paths[2]
    )
    (solution,) = solver.ask_all([task], 1, 0, 64)
    assert "moves" in solution.facts.words and solution.records[0]["puzzle"]["shortest_path"] > 0
    with pytest.raises(UserError, match="line 1: a maze needs exactly one G, found 0"):
        solver.read(str(written(tmp_path, drawn.replace("G", " "))))
