"""What a game is: vocabulary, symmetries, notation, drawing, and what is valid in it.

Everything that games differ in is a field of `Game`. Cell values are uint8, and their tokens lie
`vocabulary.first` higher. Shapes: B puzzles, L = side * side cells.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dataset import augment
from dataset.canvas import Vocabulary
from dataset.games.drawing import Drawing
from dataset.games.notation import Notation

Valid = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


@dataclass
class Symmetries:
    """One symmetry per sample, which turns a puzzle into another one with the same rule.

    transform, colours: (B,) dihedral 0..7, and (B, values) the value that each cell value becomes.
    order: (B, 2, side) of rows and columns. None leaves them as they are.
    """

    transform: np.ndarray
    colours: np.ndarray
    order: np.ndarray | None = None


@dataclass(frozen=True)
class Check:
    """Something that an answer can be checked for without knowing the right one.

    words: what an answer is that passes this check and no stricter one, such as "valid".
    meaning: what the score counts, as the end of "puzzles whose answer ...".
    holds: for inputs and answers as cell values, both (B, side, side), which answers pass, (B,) bool.
    """

    words: str
    meaning: str
    holds: Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Facts:
    """What is known of one puzzle without a model, in words and as JSON values."""

    words: str
    values: dict[str, Any]


@dataclass(frozen=True)
class TieBreak:
    """The rule that chooses the label among several right answers.

    name: what a dataset's details call it (`labels`). words: the rule.
    answers: the labels (B, side, side) of inputs (B, side, side), as cell values.
    """

    name: str
    words: str
    answers: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Game:
    """A kind of grids.

    title: what people call it. meaning: one line for the readers of a dataset's description.
    vocabulary: the tokens of the grids; `vocabulary_of` gives it by side where it depends on the side.
    numbers: number of uniform numbers that determine a symmetry of a side x side grid, by side.
    symmetry: the symmetries that uniform numbers (B, numbers(side)) and a side determine.
    drawing: how its grids look, by side.
    notation: how puzzles are written as text, by side. None: tasks in the ARC format.
    checks: by the name of their score, strictest first. The first one says whether an answer is valid.
    checkable: whether the checks mean something for a dataset with such details.
    recognise: for puzzles (B, side, side) the fingerprints (B,) uint64 that datasets hold of them, equal for
        puzzles that a symmetry maps to each other. 0 for a puzzle that has none.
    flaw: why a grid (side, side) is no puzzle of the game; None: it is one.
    facts: what is known of puzzles (B, side, side) without a model.
    tie_break: which of several right answers is the label, where that rule does not turn with the grid.
    """

    name: str
    title: str
    meaning: str
    vocabulary: Vocabulary
    numbers: Callable[[int], int]
    symmetry: Callable[[np.ndarray, int], Symmetries]
    drawing: Callable[[int], Drawing]
    vocabulary_of: Callable[[int], Vocabulary] | None = None
    notation: Callable[[int], Notation] | None = None
    recognise: Callable[[np.ndarray], np.ndarray] = lambda inputs: np.zeros(len(inputs), np.uint64)
    checks: Mapping[str, Check] = field(default_factory=dict)
    checkable: Callable[[Mapping[str, Any]], bool] = lambda details: True
    flaw: Callable[[np.ndarray], str | None] = lambda grid: None
    facts: Callable[[np.ndarray], list[Facts]] | None = None
    tie_break: TieBreak | None = None

    def of_side(self, side: int) -> "Game":
        """The game on side x side grids, with the vocabulary that it has there."""
        return self if self.vocabulary_of is None else replace(self, vocabulary=self.vocabulary_of(side))

    def identity_colours(self, count: int) -> np.ndarray:
        """(count, values) uint8: every cell value maps to itself."""
        return augment.identity_colours(count, max(self.vocabulary.symbols, len(augment.IDENTITY_COLOURS)))

    def symmetries(self, rng: np.random.Generator, count: int, side: int) -> Symmetries:
        """`count` random symmetries."""
        return self.symmetry(rng.random((count, self.numbers(side))), side)

    def stored_symmetries(self, seed: int, puzzle: np.ndarray, number: np.ndarray, side: int) -> Symmetries:
        """The `number`-th augmentation (B,) of each `puzzle` (B,), a function of the seed: none is stored.

        Number 0 is the identity. A game with only the eight dihedral symmetries enumerates them.
        """
        # Random draws among eight would repeat some of them and leave others out.
        if self.numbers(side) == 1:
            uniform = (number[:, None] % 8) / 8
        else:
            uniform = augment.hashed_uniform(
                np.stack([np.full_like(puzzle, seed), puzzle, number], axis=1), self.numbers(side)
            )
        found = self.symmetry(uniform, side)
        first = number == 0
        found.transform[first], found.colours[first] = 0, self.identity_colours(1)
        if found.order is not None:
            found.order[first] = np.arange(side)
        return found

    def turned_answers(self, inputs: np.ndarray, index: int) -> np.ndarray:
        """The labels (B, side, side) of inputs under the symmetry `index`, turned back to the inputs."""
        assert self.tie_break is not None, "without ties a turned answer is the answer to the turned input"
        labels = self.tie_break.answers(np.ascontiguousarray(augment.dihedral(inputs, index)))
        return augment.dihedral(labels, augment.DIHEDRAL_INVERSE[index])

    @property
    def valid(self) -> Valid | None:
        """Whether answers are valid: valid(inputs (B, L) tokens, answers (B, L) tokens, side) -> (B,) bool.

        The right answers are not needed. None for a game whose answers only a known answer can judge.
        """
        return self._valid if self.checks else None

    def _valid(self, inputs: np.ndarray, answers: np.ndarray, side: int) -> np.ndarray:
        vocabulary = self.of_side(side).vocabulary

        def grids(tokens: np.ndarray) -> np.ndarray:
            values = np.where(tokens >= vocabulary.first, tokens - vocabulary.first, 0)
            return values.astype(np.uint8).reshape(-1, side, side)

        cells: np.ndarray = np.all((answers >= vocabulary.first) & (answers < vocabulary.size), axis=1)
        # An answer with tokens that are no cells is judged as another grid, and never counts.
        judged = np.where(cells[:, None], answers, vocabulary.first)
        return cells & next(iter(self.checks.values())).holds(grids(inputs), grids(judged))

    def passed(self, inputs: np.ndarray, answers: np.ndarray) -> dict[str, np.ndarray]:
        """The result (B,) bool of every check, by name, for cell values (B, side, side)."""
        return {name: check.holds(inputs, answers) for name, check in self.checks.items()}

    def to_page(self, side: int) -> dict[str, Any]:
        """What a page needs to show the game on side x side grids."""
        return {
            "name": self.name,
            "title": self.title,
            "puzzles": self.notation is not None,
            "verdicts": {name: check.words for name, check in self.checks.items()},
            "meanings": {name: check.meaning for name, check in self.checks.items()},
            "drawing": self.drawing(side).to_json(),
        }

    def verdict(self, passed: Mapping[str, bool]) -> str:
        """What an answer is that passed such checks, in words: the strictest it passed, or `not valid`."""
        return next((self.checks[name].words for name, holds in passed.items() if holds), "not valid")
