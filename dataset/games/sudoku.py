"""Sudoku of 4, 6, 9 and 16 a side."""

import numpy as np

from dataset.canvas import Vocabulary
from dataset.games.drawing import Drawing
from dataset.games.game import Check, Facts, Game, Symmetries
from dataset.games.notation import Notation
from dataset.generate import sudoku

TRANSPOSE = 6
DIGITS = "123456789ABCDEFG"
BLANKS = ".0_*"
PAPER, GIVEN = "#ffffff", "#e3e1da"
SMALL = Vocabulary(10, eos=False)  # of every side up to 9
SOLUTIONS = (
    "no solution: the given digits contradict each other",
    "one solution",
    "more than one solution",
)


def _vocabulary(side: int) -> Vocabulary:
    return SMALL if side < SMALL.symbols else Vocabulary(side + 1, eos=False)


def _symmetry(uniform: np.ndarray, side: int) -> Symmetries:
    transposed, digits, rows, columns = sudoku.symmetries(uniform, side)
    return Symmetries(np.where(transposed, TRANSPOSE, 0), digits, np.stack([rows, columns], axis=1))


def alphabet(side: int, text: str) -> dict[str, int]:
    """Cell value of each character that may stand in a puzzle, which the characters of `text` decide.

    Up to side 9 these are digits. A 16x16 puzzle is written in one of three ways: 1 to 9 and A to G; 0 to 9
    and A to F, with another blank than 0; A to P.
    """
    digits, used = DIGITS[:side], set(text.upper())
    if side > 9:
        if used & set("HIJKLMNOP"):
            digits = "ABCDEFGHIJKLMNOP"
        elif "0" in used and "G" not in used and used & set(BLANKS.replace("0", "")):
            digits = "0123456789ABCDEF"
    values = dict.fromkeys(BLANKS, 0) | {digit: value for value, digit in enumerate(digits, 1)}
    return values | {letter.lower(): value for letter, value in values.items()}


def _notation(side: int) -> Notation:
    return Notation(
        characters="." + DIGITS[:side],
        alphabet=lambda text: alphabet(side, text),
        comment="#",
        described=f"digits 1 to {DIGITS[side - 1]}, blanks {' '.join(BLANKS)}",
    )


def _drawing(side: int) -> Drawing:
    # A model of small puzzles can answer every digit of the vocabulary, and wrong answers are drawn, too.
    digits = DIGITS[: _vocabulary(side).symbols - 1]
    return Drawing(
        colours=[PAPER] * (len(digits) + 1),
        names=["blank", *digits],
        characters="." + digits,
        written=" " + digits,
        given=GIVEN,
        box=sudoku.BOXES.get(side),
        cell=18,
    )


def _flaw(grid: np.ndarray) -> str | None:
    side = len(grid)
    sides = ", ".join(map(str, sudoku.BOXES))
    return None if side in sudoku.BOXES else f"a Sudoku of {side} a side; there are {sides}"


def _facts(puzzles: np.ndarray) -> list[Facts]:
    solutions, guesses, _ = sudoku.solve(puzzles)
    return [
        Facts(SOLUTIONS[number], {"solutions": number, "guesses": guess if number == 1 else None})
        for number, guess in zip(solutions.tolist(), guesses.tolist(), strict=True)
    ]


def _recognise(puzzles: np.ndarray) -> np.ndarray:
    solutions, _, answers = sudoku.solve(puzzles)
    # A fingerprint takes in the only answer. A puzzle with several, or none, has no such number.
    return np.where(solutions == 1, sudoku.fingerprints(puzzles, answers) | np.uint64(1), np.uint64(0))


GAME = Game(
    name="sudoku",
    title="Sudoku",
    meaning="one rule for all puzzles; digits, 0 is blank",
    vocabulary=SMALL,
    vocabulary_of=_vocabulary,
    numbers=sudoku.num_uniforms,
    symmetry=_symmetry,
    drawing=_drawing,
    notation=_notation,
    checks={"valid": Check("valid", "obeys the rules and keeps the given digits", sudoku.solves)},
    recognise=_recognise,
    flaw=_flaw,
    facts=_facts,
)
