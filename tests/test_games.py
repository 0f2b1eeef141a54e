"""Games as datasets: canvas, stored copies, and a run from the builder to the scores."""

import json

import numpy as np
import pytest
import torch

from config import compose
from dataset import puzzle_writer
from dataset.canvas import GridTable, render
from dataset.games import GAMES
from dataset.generate import maze, sudoku
from dataset.samplers import PairSampler
from dataset.store import Store
from evaluation.scoreboard import metric_names
from evaluation.session import EvaluateConfig
from tests.support.runs import TINY, load_config, run
from utils.errors import UserError


@pytest.mark.slow
def test_a_game_trains_evaluates_and_is_scored_under_the_ancestors_names(tmp_path):
    done = run(
        "-m",
        "dataset.build_sudoku_dataset",
        *("--size", "4", "--clues", "8", "--train-puzzles", "40", "--test-puzzles", "6"),
        *("--num-aug", "3", "--output-dir", str(tmp_path / "d")),
    )
    assert done.returncode == 0, done.stderr
    options = [
        "arch=trm",
        "data=sudoku",
        *TINY,
        "data.buckets=[4]",
        "data.augmentation=table",
        "arch.puzzle_emb_len=1",
    ]
    done = run(
        "pretrain_etrm.py",
        *options,
        f"data.path={tmp_path / 'd'}",
        f"output_dir={tmp_path}",
        "run_name=r",
        "train_steps=2",
    )
    assert done.returncode == 0, done.stderr
    done = run(
        "evaluate.py",
        f"checkpoint={tmp_path / 'r'}",
        "controls=[query_only,copy_input]",
        f"output_dir={tmp_path / 'e'}",
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    found = {(score["control"], score["metric"]): score for score in results["scores"]}
    assert set(found) == {
        (control, f"all.{name}")
        for control in ("none", "copy_input")
        for name in ("exact_accuracy", "accuracy", "valid")
    }
    trained = Store.load(tmp_path / "d").metadata.subsets["train"]
    assert found["none", "all.valid"]["n"] == 6 and found["copy_input", "all.valid"]["value"] == 0
    assert f"trained on all {trained} puzzles, 4 symmetric copies of each" in done.stdout
    assert results["trained_on"] == f"all {trained} puzzles, 4 symmetric copies of each"
    assert (
        found["copy_input", "all.accuracy"]["value"] == pytest.approx(0.5)
        and results["protocol"] == "inductive"
    )
    assert results["counts"]["queries"] == 6 and "no demonstrations" in results["notes"][0]
    names = metric_names(
        compose.load(EvaluateConfig, "evaluate", ["checkpoint=r", "controls=[query_only,copy_input]"]),
        Store.load(tmp_path / "d"),
    )
    assert {*names} == {
        *results["means"],
        "all.exact_accuracy/copy_input",
        "all.accuracy/copy_input",
        "all.valid",
        "all.valid/copy_input",
    } and "ARC/pass@1" not in names
    mazes = ("-m", "dataset.build_maze_dataset", "--side", "5", "--train-puzzles", "9", "--test-puzzles", "3")
    assert run(*mazes, "--output-dir", str(tmp_path / "m")).returncode == 0
    done = run("evaluate.py", f"checkpoint={tmp_path / 'r'}", f"data_path={tmp_path / 'm'}")
    assert done.returncode == 2 and "was trained on sudoku and cannot answer" in done.stderr


def test_a_puzzle_on_another_canvas_is_refused(tmp_path):
    grids = np.zeros((3, 4, 4), np.uint8)
    prints = {"train": np.arange(3, dtype=np.uint64), "test": np.arange(3, 6, dtype=np.uint64)}
    splits = {"train": (grids, grids), "test": (grids, grids)}
    puzzle_writer.pack(
        splits, game="sudoku", source="x", seed=0, num_aug=0, details={}, fingerprints=prints
    ).save(tmp_path)
    loaded = Store.load(tmp_path)
    config = load_config(loaded).data.model_copy(update={"buckets": [6], "augmentation": "random"})
    with pytest.raises(UserError, match=r"its 4x4 puzzles fill their canvas; set .*data.buckets=\[4\]"):
        PairSampler(loaded, config, 0, 4)


def test_the_stored_copies_of_a_maze_are_its_eight_symmetries():
    views = GAMES["maze"].stored_symmetries(0, np.zeros(8, np.int64), np.arange(8), 7)
    assert views.transform.tolist() == list(range(8)) and (views.colours == np.arange(10)).all()


def test_the_stored_copies_of_a_sudoku_are_a_function_of_the_seed_and_keep_the_rule():
    puzzle, number = np.arange(60) % 6, np.arange(60) % 10
    first, again, other = (GAMES["sudoku"].stored_symmetries(seed, puzzle, number, 4) for seed in (0, 0, 1))
    assert np.array_equal(first.order, again.order) and np.array_equal(first.colours, again.colours)
    assert not np.array_equal(first.colours, other.colours)
    _, solved, _ = sudoku.generate(4, 1, np.random.default_rng(0))
    nought = torch.zeros(60, dtype=torch.int64)
    tokens = render(
        GridTable(torch.from_numpy(solved), torch.tensor([[4, 4]])),
        *(
            nought,
            torch.from_numpy(first.transform),
            torch.from_numpy(first.colours),
            nought[:, None].expand(60, 2),
        ),
        *(4, GAMES["sudoku"].vocabulary, torch.from_numpy(first.order)),
    )
    drawn = tokens.view(60, 4, 4).numpy() - 1
    assert sudoku.is_solved(drawn).all() and len({grid.tobytes() for grid in drawn}) > 20
    assert (drawn[number == 0] == solved).all()


def test_validity_needs_no_known_answer():
    rng = np.random.default_rng(0)

    def tokens(grids):
        return (grids + 1).reshape(len(grids), -1)

    puzzles, answers, _ = sudoku.generate(9, 4, rng)
    valid = GAMES["sudoku"].valid
    assert valid(tokens(puzzles), tokens(answers), 9).all()
    assert not valid(tokens(puzzles), tokens(puzzles), 9).any()
    assert not valid(tokens(puzzles), tokens(np.roll(answers, 1, axis=0)), 9).any()  # other givens
    broken = tokens(answers)
    broken[0, 3], broken[1, 3] = 0, 99  # no cell of the game
    assert valid(tokens(puzzles), broken, 9).tolist() == [False, False, True, True]
    mazes = maze.generate(11, 9, 0.3, 3, rng)
    marked, _, unique = maze.shortest_paths(mazes)
    assert unique.any() and not unique.all()
    # Where several paths are marked, there is a choice.
    assert (GAMES["maze"].valid(tokens(mazes), tokens(marked), 11) == unique).all()
    assert GAMES["arc"].valid is None
