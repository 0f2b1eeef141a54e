"""Sudoku: unique solutions, difficulty, symmetries and fingerprints."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from dataset.games import GAMES
from dataset.games.notation import read_puzzles
from dataset.generate import sudoku
from tests.support.grids import puzzle_of

HARD = "4.....8.5.3..........7......2.....6.....8.4......1.......6.3.7.5..2.....1.4......"
HARD_ANSWER = "417369825632158947958724316825437169791586432346912758289643571573291684164875293"


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
    units = [[(r, c) for c in range(size)] for r in range(size)] + [
        [(r, c) for r in range(size)] for c in range(size)
    ]
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
    solutions, guesses, answers = sudoku.solve(puzzle_of(HARD))
    assert solutions[0] == 1 and guesses[0] > 10 and np.array_equal(answers, puzzle_of(HARD_ANSWER))
    assert sudoku.solve(puzzle_of(HARD), max_guesses=int(guesses[0]))[0] == 1
    assert sudoku.solve(puzzle_of(HARD), max_guesses=int(guesses[0]) - 1)[0] == 2
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
    assert (
        (digits[:, 0] == 0).all()
        and (digits[:, size + 1 :] == np.arange(size + 1, 10)).all()
        and digits.dtype == np.uint8
    )
    moved = [sudoku.transform(grids, transpose, digits, rows, columns) for grids in (puzzles, answers)]
    assert sudoku.is_solved(moved[1]).all() and ((moved[0] == 0) | (moved[0] == moved[1])).all()
    assert (sudoku.solve(moved[0])[0] == 1).all()
    assert (moved[1] != answers).any(axis=(1, 2)).mean() > 0.9
    assert np.array_equal(sudoku.fingerprints(*moved), sudoku.fingerprints(puzzles, answers))


def test_every_symmetry_of_size_4_is_drawn_equally_often():
    group = 2 * (2 * 2 * 2) ** 2 * 24  # transposition, bands and lines of both directions, digits
    draws = 40 * group
    drawn = sudoku.symmetries(np.random.default_rng(0).random((draws, sudoku.num_uniforms(4))), 4)
    counts = np.unique(
        np.column_stack([part.reshape(draws, -1) for part in drawn]), axis=0, return_counts=True
    )[1]
    assert len(counts) == group
    assert abs(((counts - 40) ** 2 / 40).sum() / (group - 1) - 1) < 0.15  # chi-square per degree of freedom


def test_sudoku_fingerprints_are_equal_exactly_for_symmetric_puzzles_of_size_4():
    """Against the smallest of all 3072 transformed puzzles."""
    rng = np.random.default_rng(1)
    puzzles, answers, _ = sudoku.generate(4, 40, rng, clues=6)
    lines = [
        order for order in itertools.permutations(range(4)) if {order[0] // 2, order[1] // 2} in ({0}, {1})
    ]
    labels = [(0, *order, *range(5, 10)) for order in itertools.permutations((1, 2, 3, 4))]
    group = list(itertools.product((False, True), labels, lines, lines))
    flips, digits, rows, columns = (np.array(part) for part in zip(*group, strict=True))
    canonical = [
        min(
            map(
                bytes,
                sudoku.transform(
                    np.repeat(puzzle[None], 3072, axis=0), flips, digits.astype(np.uint8), rows, columns
                ),
            )
        )
        for puzzle in puzzles
    ]
    prints = sudoku.fingerprints(puzzles, answers).tolist()
    assert len(set(canonical)) == len(set(prints)) == len(set(zip(canonical, prints, strict=True))) < 40


@pytest.mark.skipif(
    "SUDOKU_LIST" not in os.environ, reason="SUDOKU_LIST names no file of puzzles with one solution"
)
def test_a_list_of_hard_puzzles_is_read_and_solved():
    path, game = os.environ["SUDOKU_LIST"], GAMES["sudoku"]
    puzzles = read_puzzles(Path(path).read_text(encoding="utf-8"), path, game.notation(9), 9)
    questions = np.stack([puzzle.question for puzzle in puzzles])
    solutions, _, answers = sudoku.solve(questions)
    assert (solutions == 1).all() and sudoku.solves(questions, answers).all()
    assert {fact.words for fact in game.facts(questions)} == {"one solution"}
