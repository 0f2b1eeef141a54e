"""A game in one file: Latin squares, in whose rows and columns every digit stands once."""

import numpy as np

from dataset.augment import identity_colours
from dataset.canvas import Vocabulary
from dataset.games.drawing import Drawing
from dataset.games.game import Check, Game, Symmetries
from dataset.games.notation import Notation
from dataset.puzzle_writer import pack
from dataset.store import Store

MOST_SIDE = 9
CHARACTERS = ".123456789"
TRANSPOSE = 6  # its dihedral index


def generate(side: int, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Puzzles and answers (count, side, side) uint8, 0 for a blank."""
    line = np.arange(side)
    cyclic = (line[:, None] + line) % side + 1
    answers = np.stack([cyclic[rng.permutation(side)][:, rng.permutation(side)] for _ in range(count)])
    return np.where(rng.random(answers.shape) < 0.3, 0, answers).astype(np.uint8), answers.astype(np.uint8)


def write(folder, train: int, test: int, side: int = 4) -> Store:
    """A dataset of Latin squares."""
    puzzles, answers = generate(side, train + test, np.random.default_rng(0))
    splits = {"train": (puzzles[:train], answers[:train]), "test": (puzzles[train:], answers[train:])}
    numbers = np.arange(train + test, dtype=np.uint64)
    prints = {"train": numbers[:train], "test": numbers[train:]}
    about = {"source": "generated", "seed": 0, "num_aug": 0, "details": {}, "fingerprints": prints}
    pack(splits, game=GAME.name, **about).save(folder)
    return Store.load(folder)


def symmetry(uniform: np.ndarray, side: int) -> Symmetries:
    return Symmetries(np.where(uniform[:, 0] < 0.5, TRANSPOSE, 0), identity_colours(len(uniform)))


def solves(puzzles: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Which answers keep the given digits and have every digit once in each row and column, (B,) bool."""
    digits = np.arange(1, puzzles.shape[-1] + 1)
    once = [(np.sort(answers, axis) == np.expand_dims(digits, 2 - axis)).all((1, 2)) for axis in (1, 2)]
    return once[0] & once[1] & ((puzzles == 0) | (puzzles == answers)).all((1, 2))


GAME = Game(
    name="latin",
    title="Latin square",
    meaning="one rule for all puzzles; digits, 0 is blank",
    vocabulary=Vocabulary(MOST_SIDE + 1, eos=False),
    numbers=lambda side: 1,
    symmetry=symmetry,
    drawing=lambda side: Drawing(
        colours=["#ffffff"] * (MOST_SIDE + 1),
        names=["blank", *"123456789"],
        characters=CHARACTERS,
        written=" 123456789",
        given="#e3e1da",
        cell=18,
    ),
    notation=lambda side: Notation(
        characters=CHARACTERS,
        alphabet=lambda text: {character: value for value, character in enumerate(CHARACTERS[: side + 1])},
        described=f"digits 1 to {side}, blank .",
    ),
    checks={"valid": Check("valid", "has every digit once in each row and column", solves)},
)
