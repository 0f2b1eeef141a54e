"""Sudoku and mazes: unique solutions, shortest paths, symmetries, the ancestors' csv files, splits that share nothing."""

import io
import itertools
import json
import urllib.request
from collections import Counter, deque
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch

from config import compose
from config.schema import EvaluateConfig
from dataset import build_maze_dataset, build_sudoku_dataset, maze, pairs, store, sudoku
from dataset.augment import dihedral
from dataset.canvas import GridTable, render
from dataset.games import GAMES
from dataset.samplers import PairSampler
from evaluation.evaluate import metric_names
from tests.conftest import TINY, load_config, run
from utils.errors import UserError

HARD = "4.....8.5.3..........7......2.....6.....8.4......1.......6.3.7.5..2.....1.4......"
HARD_ANSWER = "417369825632158947958724316825437169791586432346912758289643571573291684164875293"
ONE_WAY = "x,#####|#S  #|### #|#  G#|#####,#####|#Soo#|###o#|#  G#|#####,4".replace("|", "")
TWO_WAYS = "x,#####|#S  #|# # #|#  G#|#####,#####|#Soo#|# #o#|#  G#|#####,4".replace("|", "")
SHORT = "x,#####|#S G#|#####|#####|#####,#####|#SoG#|#####|#####|#####,2".replace("|", "")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What a builder hands to the store."""
    record = SimpleNamespace(calls=[])

    def write_pairs(output, splits, **described):
        record.calls.append(SimpleNamespace(splits=splits, **described))

    monkeypatch.setattr(store, "write_pairs", write_pairs)
    return record


def build(module, written, *arguments: object) -> SimpleNamespace:
    module.build(module.parse_arguments(["--output-dir", "out", *map(str, arguments)]))
    return written.calls[-1]


def grid(text: str) -> np.ndarray:
    side = int(len(text) ** 0.5)
    return np.array([0 if c == "." else int(c) for c in text], np.uint8).reshape(1, side, side)


def options_of(puzzle: np.ndarray, row: int, column: int) -> set[int]:
    size, (rows, columns) = len(puzzle), sudoku.BOXES[len(puzzle)]
    top, left = row - row % rows, column - column % columns
    box = puzzle[top : top + rows, left : left + columns]
    return set(range(1, size + 1)) - set(puzzle[row]) - set(puzzle[:, column]) - set(box.ravel())


def is_legal(puzzle: np.ndarray) -> bool:
    """Does no clue contradict another one?"""
    for cell in map(tuple, np.argwhere(puzzle)):
        others = puzzle.copy()
        others[cell] = 0
        if puzzle[cell] not in options_of(others, *cell):
            return False
    return True


def count_solutions(puzzle: np.ndarray, limit: int = 2) -> int:
    """Plain backtracking, cell by cell."""
    blanks = np.argwhere(puzzle == 0)
    if not len(blanks):
        return 1
    row, column = min(blanks, key=lambda cell: len(options_of(puzzle, *cell)))
    found = 0
    for digit in options_of(puzzle, row, column):
        puzzle[row, column] = digit
        found += count_solutions(puzzle, limit - found)
        puzzle[row, column] = 0
        if found >= limit:
            break
    return found


def solvable_by_singles(puzzle: np.ndarray) -> bool:
    """Fill one single at a time, found with plain sets."""
    puzzle, size, (rows, columns) = puzzle.copy(), len(puzzle), sudoku.BOXES[len(puzzle)]
    units = [[(r, c) for c in range(size)] for r in range(size)] + [[(r, c) for r in range(size)] for c in range(size)]
    units += [
        [(r, c) for r in range(top, top + rows) for c in range(left, left + columns)]
        for top in range(0, size, rows)
        for left in range(0, size, columns)
    ]
    while (puzzle == 0).any():
        open_to = {(r, c): options_of(puzzle, r, c) for r, c in np.argwhere(puzzle == 0)}
        singles = {cell: min(digits) for cell, digits in open_to.items() if len(digits) == 1}
        for unit, digit in itertools.product(units, range(1, size + 1)):
            cells = [cell for cell in unit if digit in open_to.get(cell, ())]
            if len(cells) == 1:
                singles[cells[0]] = digit
        if not singles:
            return False
        for cell, digit in singles.items():
            puzzle[cell] = digit
    return True


@pytest.mark.parametrize("size, clues", [(4, None), (4, 7), (6, None), (6, 16), (9, 36)])
def test_generated_sudokus_have_exactly_one_solution(size, clues):
    puzzles, answers, difficulty = sudoku.generate(size, 12, np.random.default_rng(size), clues=clues)
    assert sudoku.is_solved(answers).all() and ((puzzles == 0) | (puzzles == answers)).all()
    assert [count_solutions(puzzle) for puzzle in puzzles.copy()] == [1] * 12
    assert [solvable_by_singles(puzzle) for puzzle in puzzles] == (difficulty == 0).tolist()
    given = (puzzles > 0).sum(axis=(1, 2))
    if clues is not None:
        assert (given == clues).all()
        return
    for puzzle in puzzles:  # minimal: without any one clue there is another solution
        for cell in np.argwhere(puzzle > 0):
            poorer = puzzle.copy()
            poorer[tuple(cell)] = 0
            assert count_solutions(poorer) == 2


def test_the_solver_tells_none_one_and_several_solutions_apart():
    rng = np.random.default_rng(0)
    random = np.where(rng.random((300, 4, 4)) < 0.3, rng.integers(1, 5, (300, 4, 4)), 0).astype(np.uint8)
    expected = [count_solutions(puzzle.copy()) if is_legal(puzzle) else 0 for puzzle in random]
    assert set(expected) == {0, 1, 2}
    assert sudoku.solve(random)[0].tolist() == expected


def test_a_hard_sudoku_is_solved_and_needs_guesses():
    solutions, guesses, answers = sudoku.solve(grid(HARD))
    assert solutions[0] == 1 and guesses[0] > 10 and np.array_equal(answers, grid(HARD_ANSWER))
    assert sudoku.solve(grid(HARD), max_guesses=int(guesses[0]))[0] == 1
    assert sudoku.solve(grid(HARD), max_guesses=int(guesses[0]) - 1)[0] == 2
    assert sudoku.solve(np.zeros((2, 6, 6), np.uint8))[0].tolist() == [2, 2]


def test_difficulty_is_bounded_on_request_and_clues_never_make_an_easy_puzzle_hard():
    rng = np.random.default_rng(5)
    for most in (0, 1):
        puzzles, answers, difficulty = sudoku.generate(9, 16, rng, max_difficulty=most)
        assert difficulty.max() <= most and np.array_equal(sudoku.solve(puzzles)[1], difficulty)
        if most == 0:
            richer = np.where(rng.random(puzzles.shape) < 0.1, answers, puzzles)
            assert (sudoku.solve(richer)[1] == 0).all()


@pytest.mark.parametrize("size", sudoku.BOXES)
def test_symmetries_keep_sudokus_valid_and_change_them(size):
    rng = np.random.default_rng(size)
    puzzles, answers, _ = sudoku.generate(size, 24, rng, clues=size * size // 2)
    transpose, digits, rows, columns = sudoku.symmetries(rng.random((24, sudoku.num_uniforms(size))), size)
    assert transpose.any() == (size != 6) and not transpose.all()
    assert (digits[:, 0] == 0).all() and (digits[:, size + 1 :] == np.arange(size + 1, 10)).all() and digits.dtype == np.uint8
    moved = [sudoku.transform(grids, transpose, digits, rows, columns) for grids in (puzzles, answers)]
    assert sudoku.is_solved(moved[1]).all() and ((moved[0] == 0) | (moved[0] == moved[1])).all()
    assert (sudoku.solve(moved[0])[0] == 1).all()
    assert (moved[1] != answers).any(axis=(1, 2)).mean() > 0.9
    assert np.array_equal(sudoku.fingerprints(*moved), sudoku.fingerprints(puzzles, answers))


def test_every_symmetry_of_size_4_is_drawn_equally_often():
    group = 2 * (2 * 2 * 2) ** 2 * 24  # transposition, bands and lines of both directions, digits
    draws = 40 * group
    drawn = sudoku.symmetries(np.random.default_rng(0).random((draws, sudoku.num_uniforms(4))), 4)
    counts = np.unique(np.column_stack([part.reshape(draws, -1) for part in drawn]), axis=0, return_counts=True)[1]
    assert len(counts) == group
    assert abs(((counts - 40) ** 2 / 40).sum() / (group - 1) - 1) < 0.15  # chi-square per degree of freedom


def test_sudoku_fingerprints_are_equal_exactly_for_symmetric_puzzles_of_size_4():
    """Against the smallest of all 3072 transformed puzzles."""
    rng = np.random.default_rng(1)
    puzzles, answers, _ = sudoku.generate(4, 40, rng, clues=6)
    lines = [order for order in itertools.permutations(range(4)) if {order[0] // 2, order[1] // 2} in ({0}, {1})]
    labels = [(0, *order, *range(5, 10)) for order in itertools.permutations((1, 2, 3, 4))]
    group = list(itertools.product((False, True), labels, lines, lines))
    flips, digits, rows, columns = (np.array(part) for part in zip(*group, strict=True))
    canonical = [
        min(map(bytes, sudoku.transform(np.repeat(puzzle[None], 3072, axis=0), flips, digits.astype(np.uint8), rows, columns)))
        for puzzle in puzzles
    ]
    prints = sudoku.fingerprints(puzzles, answers).tolist()
    assert len(set(canonical)) == len(set(prints)) == len(set(zip(canonical, prints, strict=True))) < 40


def walk(cells: np.ndarray, origin: tuple[int, int]) -> dict[tuple[int, int], int]:
    """Plain breadth-first search."""
    length, queue = {origin: 0}, deque([origin])
    while queue:
        row, column = queue.popleft()
        for step in ((row, column + 1), (row, column - 1), (row + 1, column), (row - 1, column)):
            if step not in length and min(step) >= 0 and max(step) < len(cells) and cells[step] != maze.WALL:
                length[step] = length[(row, column)] + 1
                queue.append(step)
    return length


@pytest.mark.parametrize("side", [5, 6, 15, 30])
@pytest.mark.parametrize("loops", [0.0, 0.3])
def test_marked_cells_are_exactly_those_on_shortest_paths(side, loops):
    mazes = maze.generate(side, 20, loops, 1, np.random.default_rng(side))
    answers, lengths, unique = maze.shortest_paths(mazes)
    for cells, answer, length, only in zip(mazes, answers, lengths, unique, strict=True):
        (start,), (goal,) = (list(map(tuple, np.argwhere(cells == kind))) for kind in (maze.START, maze.GOAL))
        to, back = walk(cells, start), walk(cells, goal)
        assert len(to) == (cells != maze.WALL).sum() and to[goal] == length >= 1
        on_path = {cell for cell in to if to[cell] + back[cell] == length}
        assert {tuple(cell) for cell in np.argwhere(answer == maze.PATH)} == on_path - {start, goal}
        assert only == (max(Counter(to[cell] for cell in on_path).values()) == 1)
        assert np.array_equal(np.where(answer == maze.PATH, maze.OPEN, answer), cells)
    if not loops:
        rooms = (side - 1) // 2
        assert unique.all() and ((mazes != maze.WALL).sum(axis=(1, 2)) == 2 * rooms**2 - 1).all()  # a spanning tree


def test_a_maze_without_a_way_has_no_path():
    blocked = np.zeros((1, 5, 5), np.uint8)
    blocked[0, 1, 1], blocked[0, 3, 3] = maze.START, maze.GOAL
    answers, length, unique = maze.shortest_paths(blocked)
    assert length[0] == -1 and np.array_equal(answers, blocked) and not unique[0]


def test_maze_fingerprints_are_equal_up_to_rotation_and_reflection_only():
    mazes = maze.generate(9, 200, 0.1, 1, np.random.default_rng(0))
    prints = maze.fingerprints(mazes)
    assert len(set(prints.tolist())) == 200
    assert all(np.array_equal(maze.fingerprints(dihedral(mazes, index)), prints) for index in range(8))


def test_the_mazes_paths_and_lengths_are_as_asked(written):
    sizes = ("--side", 20, "--train-puzzles", 40, "--test-puzzles", 30, "--loops", 0.2, "--min-path-length", 20)
    some = build(build_maze_dataset, written, *sizes)
    every = build(build_maze_dataset, written, *sizes, "--paths", "all", "--aug")
    assert "unique" in some.source and "all" in every.source and some.num_aug == 0 and every.num_aug == 7
    shares = []
    for call in (some, every):
        for mazes, answers in call.splits.values():
            marked, length, unique = maze.shortest_paths(mazes)
            assert length.min() >= 20 and np.array_equal(marked, answers)
            shares.append(unique.mean())
        assert [len(call.splits[split][0]) for split in ("train", "test")] == [40, 30]
    assert shares[:2] == [1, 1] and max(shares[2:]) < 1


def test_the_sudokus_are_as_asked(written):
    call = build(
        build_sudoku_dataset, written, "--size", 6, "--train-puzzles", 30, "--test-puzzles", 9, "--min-difficulty", 1, "--num-aug", 5
    )
    assert call.game == "sudoku" and call.num_aug == 5 and call.source == "generated: sudoku 6x6"
    for puzzles, answers in call.splits.values():
        solutions, guesses, found = sudoku.solve(puzzles)
        assert (solutions == 1).all() and guesses.min() >= 1 and np.array_equal(found, answers)
    assert all(isinstance(value, (str, int, float)) for value in call.details.values())


def test_the_number_of_workers_changes_nothing():
    make = partial(build_maze_dataset.make, side=8, loops=0.1, least=9, paths="unique")
    alone, shared = (pairs.generate(make, 300, (7, 0), workers, "puzzles") for workers in (1, 2))
    other = pairs.generate(make, 300, (8, 0), 1, "puzzles")
    assert len(alone) == 300 and np.array_equal(alone.inputs, shared.inputs) and np.array_equal(alone.answers, shared.answers)
    assert np.array_equal(alone.rating, shared.rating) and not np.array_equal(alone.inputs, other.inputs)
    fewer = pairs.generate(make, 50, (7, 0), 1, "puzzles")
    assert np.array_equal(fewer.inputs, alone.inputs[:50])


def test_the_same_seed_gives_the_same_sudokus(written):
    size = ("--size", 4, "--clues", 8, "--train-puzzles", 50, "--test-puzzles", 20)
    first, again, other = (build(build_sudoku_dataset, written, *size, "--seed", seed) for seed in (1, 1, 2))
    for split in ("train", "test"):
        assert np.array_equal(first.splits[split], again.splits[split])
        assert not np.array_equal(first.splits[split][0][:10], other.splits[split][0][:10])
    assert not np.array_equal(*(first.splits[split][0][:10] for split in ("train", "test")))


def test_no_training_puzzle_is_a_test_puzzle_in_disguise(written):
    """Of size 4 with 6 clues there are few puzzles up to symmetry: many are drawn twice."""
    arguments = ("--size", 4, "--clues", 6, "--train-puzzles", 400, "--test-puzzles", 60)
    call = build(build_sudoku_dataset, written, *arguments)
    dropped = call.details["dropped_train_puzzles"]
    assert dropped > 0 and len(call.splits["train"][0]) == 400 - dropped
    prints = {split: set(sudoku.fingerprints(*pair).tolist()) for split, pair in call.splits.items()}
    assert not prints["train"] & prints["test"] and call.details["distinct_test_puzzles"] == len(prints["test"])
    smaller = build(build_sudoku_dataset, written, *arguments, "--subsample-size", 50)
    rows = {bytes(puzzle) for puzzle in call.splits["train"][0]}
    assert len(smaller.splits["train"][0]) == 50 and {bytes(puzzle) for puzzle in smaller.splits["train"][0]} <= rows
    assert np.array_equal(smaller.splits["test"][0], call.splits["test"][0])
    with pytest.raises(UserError, match="equal a test puzzle up to symmetry"):
        build(build_sudoku_dataset, written, "--size", 4, "--train-puzzles", 5, "--test-puzzles", 600)


def test_what_cannot_be_generated_is_refused(written, monkeypatch):
    monkeypatch.setattr(pairs, "MAX_BARREN_BLOCKS", 2)
    for module, arguments, message in (
        (build_sudoku_dataset, ("--size", 4, "--clues", 2), "only 0 of 1000 test puzzles found"),
        (build_maze_dataset, ("--side", 5, "--min-path-length", 99), "only 0 of 1000 test puzzles found"),
        (build_sudoku_dataset, ("--clues", 81), "--clues must be 1..80"),
        (build_sudoku_dataset, ("--min-difficulty", 3, "--max-difficulty", 2), "--min-difficulty <= --max-difficulty"),
        (build_sudoku_dataset, ("--revision", "x"), "--revision goes with --source hub"),
        (build_maze_dataset, ("--input-dir", "x", "--side", 9), "--side goes with --source generated"),
        (build_maze_dataset, ("--paths", "given"), "goes with csv files"),
        (build_maze_dataset, ("--side", 4), "--side >= 5"),
        (build_maze_dataset, ("--workers", 0), "--workers must be >= 1"),
        (build_maze_dataset, ("--seed", -1), "--seed must be >= 0"),
    ):
        with pytest.raises(UserError, match=message):
            build(module, written, *arguments)
    assert not written.calls


def test_a_built_dataset_is_read_back_from_the_store(tmp_path):
    for module, game, arguments in (
        (build_sudoku_dataset, "sudoku", ("--size", 4, "--clues", 8, "--num-aug", 3)),
        (build_maze_dataset, "maze", ("--side", 8, "--paths", "all", "--aug")),
    ):
        folder = tmp_path / game
        options = ("--output-dir", folder, "--train-puzzles", 30, "--test-puzzles", 10, *arguments)
        splits = module.build(module.parse_arguments(list(map(str, options))))
        loaded = store.load(folder)
        assert loaded.metadata.game == game and loaded.metadata.num_aug == {"sudoku": 3, "maze": 7}[game]
        assert loaded.metadata.details["distinct_test_puzzles"] <= 10
        for split in ("train", "test"):
            found = [loaded.pair(int(loaded.task_pairs[task])) for task in loaded.tasks_of(split)]
            assert np.array_equal([pair.input for pair in found], splits[split].inputs)
            assert np.array_equal([pair.output for pair in found], splits[split].answers)


def write_csv(folder: Path, train: list[str], test: list[str], header: str = "source,q,a,rating") -> Path:
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder


def sudoku_rows(count: int, seed: int) -> list[str]:
    puzzles, answers, _ = sudoku.generate(4, count, np.random.default_rng(seed), clues=8)
    texts = ["".join(map(str, cells.ravel())) for cells in (*puzzles, *answers)]
    return [f"made,{q.replace('0', '.')},{a},{i}" for i, (q, a) in enumerate(zip(texts[:count], texts[count:], strict=True))]


def test_the_ancestors_sudoku_files_are_read_and_filtered(written, tmp_path):
    write_csv(tmp_path, sudoku_rows(20, 0), sudoku_rows(4, 9))
    call = build(build_sudoku_dataset, written, "--input-dir", tmp_path, "--min-difficulty", 2)
    assert call.source == tmp_path.name and len(call.splits["test"][0]) == 2
    assert len(call.splits["train"][0]) == 18 - call.details["dropped_train_puzzles"]
    q, a = sudoku_rows(4, 9)[2].split(",")[1:3]
    assert np.array_equal(call.splits["test"][0][0], grid(q)[0]) and np.array_equal(call.splits["test"][1][0], grid(a)[0])


@pytest.mark.parametrize("paths, marks", [("given", [3, 3]), ("all", [3, 6]), ("unique", [3])])
def test_the_ancestors_maze_files_are_read_and_marked_as_asked(paths, marks, written, tmp_path):
    write_csv(tmp_path, [ONE_WAY, TWO_WAYS], [SHORT])
    call = build(build_maze_dataset, written, "--input-dir", tmp_path, "--paths", paths)
    drawn = [int((answer == maze.PATH).sum()) for answer in call.splits["train"][1]]
    assert drawn == marks and call.details["paths"] == paths
    assert call.details["unique_shortest_paths_train_csv"] == 1 and call.details["unique_shortest_paths_test_csv"] == 1
    with pytest.raises(UserError, match="no puzzle is left in the test split"):
        build(build_maze_dataset, written, "--input-dir", tmp_path, "--paths", paths, "--min-path-length", 3)


EASY = sudoku_rows(1, 0)[0]
Q, A = EASY.split(",")[1:3]


@pytest.mark.parametrize(
    "module, row, message",
    [
        (build_sudoku_dataset, "x,1,2", "line 3: expected 4 columns, found 3"),
        (build_sudoku_dataset, f"x,{Q},{A},many", "line 3: rating 'many' is not a whole number"),
        (build_sudoku_dataset, f"x,{Q},{A[:-1]},1", "line 3: a has 15 characters, expected 16"),
        (build_sudoku_dataset, f"x,{Q[:2]}x{Q[3:]},{A},1", "line 3: q has 'x' at position 3"),
        (build_sudoku_dataset, f"x,{'9' + Q[1:]},{A},1", "line 3: q has a digit beyond 4"),
        (build_sudoku_dataset, f"x,{Q},{A[::-1][:4] + A[4:]},1", "line 3: a is not a solved Sudoku"),
        (build_sudoku_dataset, f"x,{Q},{A.translate(str.maketrans('1234', '2341'))},1", "line 3: a changes a clue of q"),
        (build_maze_dataset, ONE_WAY.replace("G", " "), "line 3: q needs exactly one G"),
        (build_maze_dataset, f"x,{ONE_WAY.split(',')[2]},{ONE_WAY.split(',')[2]},4", "line 3: q already shows a path"),
        (build_maze_dataset, ONE_WAY.replace("Soo#", "So##"), "line 3: a differs from q in more than the path"),
        (build_maze_dataset, ONE_WAY.replace(" ##  G", "###  G").replace("o##  G", "###  G"), "line 3: no path from S to G"),
    ],
)
def test_a_malformed_csv_row_is_named(module, row, message, written, tmp_path):
    good = EASY if module is build_sudoku_dataset else ONE_WAY
    write_csv(tmp_path, [good, row], [good])
    with pytest.raises(UserError, match=f"train.csv, {message}"):
        build(module, written, "--input-dir", tmp_path)
    assert not written.calls


def test_csv_files_that_are_missing_empty_or_of_another_kind_are_named(written, tmp_path):
    with pytest.raises(UserError, match="no such file: .*test.csv"):
        build(build_sudoku_dataset, written, "--input-dir", tmp_path)
    write_csv(tmp_path, [EASY], [EASY], header="question,answer")
    with pytest.raises(UserError, match="test.csv, line 1: expected the columns source,q,a,rating, found question,answer"):
        build(build_sudoku_dataset, written, "--input-dir", tmp_path)
    write_csv(tmp_path, [EASY], [])
    with pytest.raises(UserError, match="test.csv: no puzzle in it passes the filters"):
        build(build_sudoku_dataset, written, "--input-dir", tmp_path)
    five = "1" * 25
    write_csv(tmp_path, [EASY], [f"x,{five},{five},1"])
    with pytest.raises(UserError, match="grids of 5x5 cells"):
        build(build_sudoku_dataset, written, "--input-dir", tmp_path)


def serve(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], cut: int = 0) -> list[str]:
    """Answer downloads from `files`, `cut` bytes short of what is announced. Returns the list of addresses asked for."""
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        content = files[url.rsplit("/", 1)[1]]
        response = io.BytesIO(content[: len(content) - cut])
        response.headers = {"Content-Length": str(len(content))}
        return response

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def test_the_hub_gives_the_same_as_its_files(written, tmp_path, monkeypatch):
    write_csv(tmp_path, [ONE_WAY, TWO_WAYS], [SHORT])
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    asked = serve(monkeypatch, files)
    local = build(build_maze_dataset, written, "--input-dir", tmp_path)
    remote = build(build_maze_dataset, written, "--source", "hub")
    assert asked[-1] == "https://huggingface.co/datasets/sapientinc/maze-30x30-hard-1k/resolve/main/train.csv"
    assert "sapientinc/maze-30x30-hard-1k@main" in remote.source and remote.details == local.details
    assert np.array_equal(remote.splits["train"][1], local.splits["train"][1])
    serve(monkeypatch, files, cut=5)
    with pytest.raises(UserError, match="the connection ended after .* bytes"):
        build(build_maze_dataset, written, "--source", "hub")


def test_without_a_network_the_hub_names_the_file_and_the_alternatives(written, monkeypatch):
    def refuse(url, timeout):
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(UserError, match="(?s)org/name/resolve/v1/test.csv: Temporary failure.*--input-dir.*--source generated"):
        build(build_sudoku_dataset, written, "--source", "hub", "--source-repo", "org/name", "--revision", "v1")


def test_numbers_are_counted_in_ranges_of_powers_of_two():
    assert pairs.histogram(np.array([0, 0, 1, 2, 3, 4, 7, 8, 100])) == "0: 2, 1: 1, 2-3: 2, 4-7: 2, 8-15: 1, 64-127: 1"


@pytest.mark.slow
def test_a_game_trains_evaluates_and_is_scored_under_the_ancestors_names(tmp_path):
    done = run(
        "-m",
        "dataset.build_sudoku_dataset",
        *("--size", "4", "--clues", "8", "--train-puzzles", "40", "--test-puzzles", "6"),
        *("--num-aug", "3", "--output-dir", str(tmp_path / "d")),
    )
    assert done.returncode == 0, done.stderr
    options = ["arch=trm", "data=sudoku", *TINY, "data.buckets=[4]", "data.augmentation=table", "arch.puzzle_emb_len=1"]
    done = run("pretrain_etrm.py", *options, f"data.path={tmp_path / 'd'}", f"output_dir={tmp_path}", "run_name=r", "train_steps=2")
    assert done.returncode == 0, done.stderr
    done = run("evaluate.py", f"checkpoint={tmp_path / 'r'}", "controls=[query_only,copy_input]", f"output_dir={tmp_path / 'e'}")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    found = {(score["control"], score["metric"]): score for score in results["scores"]}
    assert set(found) == {(control, f"all.{name}") for control in ("none", "copy_input") for name in ("exact_accuracy", "accuracy")}
    assert found["copy_input", "all.accuracy"]["value"] == pytest.approx(0.5) and results["protocol"] == "inductive"
    assert results["counts"]["queries"] == 6 and "no demonstrations" in results["notes"][0]
    names = metric_names(compose.load(EvaluateConfig, "evaluate", ["checkpoint=r", "controls=[query_only,copy_input]"]), "pairs")
    assert {*names} == {*results["means"], "all.exact_accuracy/copy_input", "all.accuracy/copy_input"} and "ARC/pass@1" not in names
    mazes = ("-m", "dataset.build_maze_dataset", "--side", "5", "--train-puzzles", "9", "--test-puzzles", "3")
    assert run(*mazes, "--output-dir", str(tmp_path / "m")).returncode == 0
    done = run("evaluate.py", f"checkpoint={tmp_path / 'r'}", f"data_path={tmp_path / 'm'}")
    assert done.returncode == 2 and "was trained on sudoku and cannot answer" in done.stderr


def test_a_puzzle_on_another_canvas_is_refused(tmp_path):
    grids = np.zeros((3, 4, 4), np.uint8)
    prints = {"train": np.arange(3, dtype=np.uint64), "test": np.arange(3, 6, dtype=np.uint64)}
    splits = {"train": (grids, grids), "test": (grids, grids)}
    store.write_pairs(tmp_path, splits, game="sudoku", source="x", seed=0, num_aug=0, details={}, fingerprints=prints)
    loaded = store.load(tmp_path)
    config = load_config(loaded).data.model_copy(update={"buckets": [6], "augmentation": "random"})
    with pytest.raises(UserError, match=r"its 4x4 puzzles fill their canvas; set .*data.buckets=\[4\]"):
        PairSampler(loaded, config, 0, 4)


def test_the_stored_copies_of_a_maze_are_its_eight_symmetries():
    views = GAMES["maze"].stored_views(0, np.zeros(8, np.int64), np.arange(8), 7)
    assert views.transform.tolist() == list(range(8)) and (views.colours == np.arange(10)).all()


def test_the_stored_copies_of_a_sudoku_are_a_function_of_the_seed_and_keep_the_rule():
    puzzle, number = np.arange(60) % 6, np.arange(60) % 10
    first, again, other = (GAMES["sudoku"].stored_views(seed, puzzle, number, 4) for seed in (0, 0, 1))
    assert np.array_equal(first.order, again.order) and np.array_equal(first.colours, again.colours)
    assert not np.array_equal(first.colours, other.colours)
    _, solved, _ = sudoku.generate(4, 1, np.random.default_rng(0))
    nought = torch.zeros(60, dtype=torch.int64)
    tokens = render(
        GridTable(torch.from_numpy(solved), torch.tensor([[4, 4]])),
        *(nought, torch.from_numpy(first.transform), torch.from_numpy(first.colours), nought[:, None].expand(60, 2)),
        *(4, GAMES["sudoku"].vocabulary, torch.from_numpy(first.order)),
    )
    drawn = tokens.view(60, 4, 4).numpy() - 1
    assert sudoku.is_solved(drawn).all() and len({grid.tobytes() for grid in drawn}) > 20
    assert (drawn[number == 0] == solved).all()
