"""Tasks as text, and text as tokens: one for every cell, so that a grid's size says how many it takes."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from dataset import augment
from dataset.task import MAX_SIDE
from dataset.views import EvaluationSet
from utils.errors import UserError

CELLS = "0123456789\n"
TASK = "Every input becomes its output by one rule.\n"
NO_GRID = np.zeros((0, 0), np.uint8)  # never votes


@dataclass(frozen=True)
class Example:
    """One view of a query as text.

    query, view: the numbers of both in their evaluation set. demonstrations: a text each.
    question: ends where the answer begins. answer: None where it is unknown.
    side: of the canvas, which every model's answers have to fit.
    """

    query: int
    view: int
    demonstrations: tuple[str, ...]
    question: str
    answer: str | None
    side: int

    def prompt(self, left_out: int = 0) -> str:
        """All but the answer, without the first so many demonstrations."""
        return "".join((TASK, *self.demonstrations[left_out:], self.question))

    @property
    def budget(self) -> int:
        """The tokens of the longest answer: rows with their ends, and the end of the text."""
        return self.side * (self.side + 1) + 1


def examples_of(questions: EvaluationSet) -> Iterator[Example]:
    """The views of the queries that are asked, in order."""
    store = questions.store
    for number, query in enumerate(questions.queries):
        side = questions.side_of(query)
        if side is None or not questions.asked[number]:
            continue
        blind = questions.control == "query_only"
        known = () if blind else questions.demonstrations_and_identifiers(query)[0]
        demonstrations, asked = [store.pair(pair) for pair in known], store.pair(query.pair)
        for view in range(questions.num_views_of(query)):
            seen_as = questions.view(query, view)
            texts = tuple(
                f"\nInput:\n{text_of(pair.input, *seen_as)}Output:\n{text_of(pair.answer, *seen_as)}"
                for pair in demonstrations
            )
            question = f"\nInput:\n{text_of(asked.input, *seen_as)}Output:\n"
            answer = None if asked.output is None else text_of(asked.output, *seen_as)
            yield Example(number, view, texts, question, answer, side)


def text_of(grid: np.ndarray, transform: int, colours: np.ndarray) -> str:
    """A grid (rows, columns) in one of its views: a line of digits for each row."""
    rows = augment.apply(grid, transform, colours).tolist()
    return "".join("".join(map(str, row)) + "\n" for row in rows)


def grid_of(text: str) -> np.ndarray:
    """The inverse of `text_of` in the same view; an empty grid for a text that is no grid."""
    rows = text.removesuffix("\n").split("\n")
    width = len(rows[0])
    if not 1 <= width <= MAX_SIDE or len(rows) > MAX_SIDE or any(len(row) != width for row in rows):
        return NO_GRID
    return np.array([[int(cell) for cell in row] for row in rows], np.uint8)


class Tokens:
    """A tokenizer that gives every cell and every end of a row a token of its own.

    Left to itself it would join neighbouring digits. Raises `UserError` for one that cannot.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.end = tokenizer, tokenizer.eos_token_id
        # The last one: some tokenizers put a space before every text.
        self.cells = {cell: (self._words(cell) or [None])[-1] for cell in CELLS}
        self.permitted = [*self.cells.values(), self.end]
        if None in self.permitted or len(set(self.permitted)) < len(CELLS) + 1:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} has no tokens of their own for digits, "
                "the end of a line and the end of a text"
            )

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without those that begin or end one."""
        parts = re.findall(r"[0-9\n]|[^0-9\n]+", text)
        tokens = ([self.cells[part]] if part in self.cells else self._words(part) for part in parts)
        return list(chain.from_iterable(tokens))

    def fitted(self, example: Example, most: int) -> tuple[list[int], int] | None:
        """The tokens of a prompt, at most so many, and how many of its first demonstrations are left out.

        None where the last demonstration and the question are too long.
        """
        first = self.tokenizer.bos_token_id
        for left_out in range(max(1, len(example.demonstrations))):
            tokens = ([] if first is None else [first]) + self.encode(example.prompt(left_out))
            if len(tokens) <= most:
                return tokens, left_out
        return None

    def decode(self, answer: list[int]) -> str:
        """The text of cells before the end; nothing where the end is missing or anything else is in it."""
        if self.end not in answer:
            return ""
        letters = {token: cell for cell, token in self.cells.items()}
        tokens = answer[: answer.index(self.end)]
        return "".join(map(letters.__getitem__, tokens)) if set(tokens) <= letters.keys() else ""

    def _words(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)
