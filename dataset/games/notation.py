"""How puzzles are written as text: one on a line, as a block of rows, or in csv files with their answers."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from utils.errors import UserError

QUESTION, ANSWER = ("q", "question"), ("a", "answer")  # the columns' names in csv files of the ancestors


@dataclass(frozen=True)
class Notation:
    """How the puzzles of one size are written.

    characters: of the cell values, for writing.
    alphabet: the cell value of each character that may stand in a text, which the text itself may decide.
    described: the alphabet in words.
    comment: what begins a comment, None where there are none.
    question: the puzzle of a grid that may show its answer, too. None: a grid shows a puzzle alone.
    """

    characters: str
    alphabet: Callable[[str], Mapping[str, int]]
    described: str
    comment: str | None = None
    question: Callable[[np.ndarray], np.ndarray] | None = None

    def write(self, grid: np.ndarray) -> str:
        """A grid on one line."""
        return "".join(self.characters[value] for value in grid.ravel())

    def read(self, text: str, side: int, beside: str = "") -> np.ndarray:
        """The grid (side, side) uint8 of so many characters; `beside` is written in the same way.

        Raises `ValueError` that says what is wrong.
        """
        if len(text) != side * side:
            raise ValueError(f"{len(text)} characters, expected {side * side} ({side} x {side})")
        alphabet = self.alphabet(text + beside)
        for place, character in enumerate(text, 1):
            if character not in alphabet:
                raise ValueError(f"'{character}' at character {place} is no cell: {self.described}")
        return np.array([alphabet[character] for character in text], np.uint8).reshape(side, side)


@dataclass(frozen=True)
class Puzzle:
    """A puzzle that was read, its known answer or None, and the line that it began on."""

    question: np.ndarray
    answer: np.ndarray | None
    line: int


def read_puzzles(text: str, name: str, notation: Notation, side: int) -> list[Puzzle]:
    """The puzzles of a file `name` with the content `text`.

    Raises `UserError` with file and line for the first one that is not written as `notation` says.
    """
    lines = [(number, line) for number, line in _lines(text, notation)]
    first = next((line for _, line in lines if line.strip()), None)
    if first is None:
        raise UserError(f"{name}: no puzzle in it")
    columns = [column.strip().lower() for column in first.split(",")]
    if set(columns) & set(QUESTION):
        return list(_of_csv(lines, name, notation, side))
    return list(_of_lines(lines, name, notation, side))


def _lines(text: str, notation: Notation) -> Iterator[tuple[int, str]]:
    """The lines with their numbers, from 1, without comments."""
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        line = line.removesuffix("\r")
        if notation.comment is not None:
            content = line.split(notation.comment)[0].rstrip()
            if not content and line.strip():
                continue
            line = content.strip()
        yield number, line


def _of_lines(lines: Sequence[tuple[int, str]], name: str, notation: Notation, side: int) -> Iterator[Puzzle]:
    rows: list[tuple[int, str]] = []
    for number, line in [*lines, (len(lines) + 1, "")]:
        if len(line) == side:
            rows.append((number, line))
            continue
        if rows:
            yield _block(rows, name, notation, side)
            rows = []
        if line:
            yield _read(line, None, f"{name}, line {number}", number, notation, side)


def _block(rows: list[tuple[int, str]], name: str, notation: Notation, side: int) -> Puzzle:
    first = rows[0][0]
    if len(rows) != side:
        raise UserError(
            f"{name}, line {first}: {len(rows)} rows of {side} characters, expected {side}; "
            "an empty line separates puzzles"
        )
    where = f"{name}, lines {first} to {rows[-1][0]}"
    return _read("".join(row for _, row in rows), None, where, first, notation, side)


def _of_csv(lines: Sequence[tuple[int, str]], name: str, notation: Notation, side: int) -> Iterator[Puzzle]:
    lines = [(number, line) for number, line in lines if line.strip()]
    header, *records = csv.reader([line for _, line in lines])
    columns = [column.strip().lower() for column in header]
    question = next(at for at, column in enumerate(columns) if column in QUESTION)
    answer = next((at for at, column in enumerate(columns) if column in ANSWER), None)
    for (number, _), record in zip(lines[1:], records, strict=True):
        where = f"{name}, line {number}"
        if len(record) != len(header):
            raise UserError(f"{where}: {len(record)} columns, expected {len(header)}")
        known = record[answer] if answer is not None else ""
        yield _read(record[question], known or None, where, number, notation, side)


def _read(text: str, known: str | None, where: str, line: int, notation: Notation, side: int) -> Puzzle:
    try:
        grid = notation.read(text, side, known or "")
        answer = None if known is None else notation.read(known, side, text)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if notation.question is not None:
        question = notation.question(grid)
        if answer is None and (question != grid).any():
            answer = grid
        grid = question
    return Puzzle(grid, answer, line)
