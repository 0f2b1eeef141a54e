"""What a dataset's grids are: their vocabulary, and the symmetries that turn a puzzle into another one with the same rule."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dataset import augment
from dataset.canvas import ARC, Vocabulary
from dataset.generate import sudoku

TRANSPOSE = 6


@dataclass
class Symmetries:
    """One symmetry per sample: dihedral transform (B,), colours (B, 10), and order (B, 2, side) of rows and columns or None."""

    transform: np.ndarray
    colours: np.ndarray
    order: np.ndarray | None = None


@dataclass(frozen=True)
class Game:
    """meaning: for readers of a dataset's description. vocabulary: tokens of the grids. numbers(side): how many uniform numbers determine a symmetry of a side x side grid.
    symmetry(uniform (B, numbers), side): those symmetries.
    """

    meaning: str
    vocabulary: Vocabulary
    numbers: Callable[[int], int]
    symmetry: Callable[[np.ndarray, int], Symmetries]

    def symmetries(self, rng: np.random.Generator, count: int, side: int) -> Symmetries:
        """`count` random symmetries."""
        return self.symmetry(rng.random((count, self.numbers(side))), side)

    def stored_symmetries(self, seed: int, puzzle: np.ndarray, number: np.ndarray, side: int) -> Symmetries:
        """The `number`-th augmentation (B,) of each `puzzle` (B,): a function of the seed, so that none is stored.

        Number 0 is the identity. A game with only the eight dihedral symmetries enumerates them.
        """
        if self.numbers(side) == 1:
            uniform = (number[:, None] % 8) / 8
        else:
            uniform = augment.hashed_uniform(
                np.stack([np.full_like(puzzle, seed), puzzle, number], axis=1), self.numbers(side)
            )
        views = self.symmetry(uniform, side)
        first = number == 0
        views.transform[first], views.colours[first] = 0, augment.IDENTITY_COLOURS
        if views.order is not None:
            views.order[first] = np.arange(side)
        return views


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
    ),
    "maze": Game(
        "one rule for all puzzles; walls, free cells, start, goal and path",
        Vocabulary(5, eos=False),
        lambda side: 1,
        _maze,
    ),
}
