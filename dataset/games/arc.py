"""ARC: coloured grids, known by their demonstrations."""

import numpy as np

from dataset import augment
from dataset.canvas import ARC
from dataset.games.drawing import Drawing
from dataset.games.game import Game, Symmetries

COLOURS = {
    "black": "#000000",
    "blue": "#0074D9",
    "red": "#FF4136",
    "green": "#2ECC40",
    "yellow": "#FFDC00",
    "grey": "#AAAAAA",
    "magenta": "#F012BE",
    "orange": "#FF851B",
    "light blue": "#7FDBFF",
    "maroon": "#870C25",
}
DRAWING = Drawing(list(COLOURS.values()), list(COLOURS), "0123456789")


def _symmetry(uniform: np.ndarray, side: int) -> Symmetries:
    return Symmetries((uniform[:, 0] * 8).astype(np.int64), augment.colours_of(uniform[:, 1:]))


GAME = Game(
    name="arc",
    title="ARC-AGI",
    meaning="coloured grids up to 30x30; ten colours, end-of-grid markers and padding",
    vocabulary=ARC,
    numbers=lambda side: 10,
    symmetry=_symmetry,
    drawing=lambda side: DRAWING,
)
