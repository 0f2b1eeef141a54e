"""What a dataset's grids are: their vocabulary and their symmetries.

A symmetry turns a puzzle into another one with the same rule. A new game needs a row in `GAMES`, a builder
that writes the layout `pairs`, and a config/data/NAME.yaml.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from dataset import augment
from dataset.canvas import ARC, Vocabulary
from dataset.generate import maze, sudoku

TRANSPOSE = 6

Check = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass
class Symmetries:
    """One symmetry per sample.

    transform, colours: (B,) dihedral 0..7 and (B, 10) colour permutation.
    order: (B, 2, side) of rows and columns. None leaves them as they are.
    """

    transform: np.ndarray
    colours: np.ndarray
    order: np.ndarray | None = None


@dataclass(frozen=True)
class Game:
    """A kind of grids.

    meaning: one line for the readers of a dataset's description.
    vocabulary: the tokens of the grids.
    numbers: number of uniform numbers that determine a symmetry of a side x side grid, by side.
    symmetry: the symmetries that uniform numbers (B, numbers(side)) and a side determine.
    checks: what an answer can be checked for without knowing the right one, by the name of its score.
        A check takes inputs and answers as cell values (B, side, side) and gives (B,) bool. The first
        one says whether an answer is valid.
    """

    meaning: str
    vocabulary: Vocabulary
    numbers: Callable[[int], int]
    symmetry: Callable[[np.ndarray, int], Symmetries]
    checks: Mapping[str, Check] = field(default_factory=dict)

    @property
    def valid(self) -> Callable[[np.ndarray, np.ndarray, int], np.ndarray] | None:
        """Whether answers are valid: valid(inputs (B, L) tokens, answers (B, L) tokens, side) -> (B,) bool.

        The right answers are not needed. None for a game whose answers only a known answer can judge.
        """
        return self._valid if self.checks else None

    def _valid(self, inputs: np.ndarray, answers: np.ndarray, side: int) -> np.ndarray:
        first, size = self.vocabulary.first, self.vocabulary.size
        cells: np.ndarray = np.all((answers >= first) & (answers < size), axis=1)
        # Tokens that are no cell become value 0, and the answer counts as invalid whatever the check says.
        grids = (
            np.where(tokens >= first, tokens - first, 0).astype(np.uint8).reshape(-1, side, side)
            for tokens in (inputs, np.where(cells[:, None], answers, first))
        )
        return cells & next(iter(self.checks.values()))(*grids)

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
        found.transform[first], found.colours[first] = 0, augment.IDENTITY_COLOURS
        if found.order is not None:
            found.order[first] = np.arange(side)
        return found


def _arc(uniform: np.ndarray, side: int) -> Symmetries:
    return Symmetries((uniform[:, 0] * 8).astype(np.int64), augment.colours_of(uniform[:, 1:]))


def _maze(uniform: np.ndarray, side: int) -> Symmetries:
    return Symmetries((uniform[:, 0] * 8).astype(np.int64), augment.identity_colours(len(uniform)))


def _sudoku(uniform: np.ndarray, side: int) -> Symmetries:
    transposed, digits, rows, columns = sudoku.symmetries(uniform, side)
    return Symmetries(np.where(transposed, TRANSPOSE, 0), digits, np.stack([rows, columns], axis=1))


GAMES: dict[str, Game] = {
    "arc": Game(
        "coloured grids up to 30x30; ten colours, end-of-grid markers and padding", ARC, lambda side: 10, _arc
    ),
    "sudoku": Game(
        "one rule for all puzzles; digits, 0 is blank",
        Vocabulary(10, eos=False),
        sudoku.num_uniforms,
        _sudoku,
        {"valid": sudoku.solves},
    ),
    "maze": Game(
        "one rule for all puzzles; walls, free cells, start, goal and path",
        Vocabulary(5, eos=False),
        lambda side: 1,
        _maze,
        {"shortest": maze.marks_shortest_path, "path": maze.marks_path},
    ),
}
