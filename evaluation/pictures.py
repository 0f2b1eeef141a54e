"""Predictions as pixels in ARC's colours: a row per query, with its demonstrations, its input, the prediction and the truth."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dataset.batch import DataConfig
from dataset.canvas import GridTable
from dataset.store import Store
from dataset.task import Pair
from dataset.views import EvaluationSet
from evaluation.inference import predict
from models.core import RecursiveModel
from utils.distributed import World

_HEX = ("000000", "0074D9", "FF4136", "2ECC40", "FFDC00", "AAAAAA", "F012BE", "FF851B", "7FDBFF", "870C25")
COLOURS = np.array([tuple(bytes.fromhex(colour)) for colour in _HEX], np.uint8)
PAPER, LINE, RIGHT, WRONG = (
    np.array(colour, np.uint8) for colour in ((247, 247, 245), (85, 85, 85), (24, 121, 78), (194, 47, 36))
)
CELL, GAP, FRAME = 8, 12, 3  # pixels


@dataclass(frozen=True)
class Shown:
    """One query: what the model saw, the best answer (None: it gave none), and the truth (None: unknown)."""

    demonstrations: Sequence[Pair]
    query: np.ndarray
    prediction: np.ndarray | None
    truth: np.ndarray | None


def predictions(
    model: RecursiveModel,
    store: Store,
    data: DataConfig,
    table: GridTable,
    world: World,
    *,
    split: str,
    tasks: int,
    batch_size: int,
) -> list[Shown]:
    """The first query of each of a split's first tasks, answered from its unaugmented view (all processes together)."""
    questions = EvaluationSet(store, data, split, num_views=1, seed=0, max_tasks=tasks)
    votes = predict(model, questions, table, batch_size, world)
    shown = []
    for number, query in enumerate(questions.queries):
        if query.number == 0:
            pair, ranked = store.pair(query.pair), votes.ranked(number)
            demonstrations = [store.pair(demo) for demo in query.demos]
            shown.append(Shown(demonstrations, pair.input, ranked[0].grid if ranked else None, pair.output))
    return shown


def draw(shown: Sequence[Shown]) -> np.ndarray:
    """(H, W, 3) uint8. In a row, from the left: each demonstration, input above output; the query's input; the prediction,
    framed in green when it is right and in red when it is wrong; the truth."""
    return stack([_row(one) for one in shown], axis=0)


def _row(shown: Shown) -> np.ndarray:
    known = shown.truth is not None
    right = known and shown.prediction is not None and np.array_equal(shown.prediction, shown.truth)
    columns = [stack([_grid(pair.input), _grid(pair.output)], axis=0) for pair in shown.demonstrations]
    frame = LINE if not known else RIGHT if right else WRONG
    answers = (_grid(shown.query), _grid(shown.prediction, frame), _grid(shown.truth))
    return stack([*columns, *(stack([grid], axis=0) for grid in answers)], axis=1)


def _grid(grid: np.ndarray | None, frame: np.ndarray = PAPER) -> np.ndarray:
    """Cells with lines between and around them; an empty frame where there is no grid."""
    if grid is None:
        pixels = np.tile(PAPER, (CELL, CELL, 1))
    else:
        height, width = (side * CELL + 1 for side in grid.shape)
        pixels = np.tile(LINE, (height, width, 1))
        coloured = COLOURS[grid].repeat(CELL, axis=0).repeat(CELL, axis=1)
        inside = (np.arange(height - 1) % CELL > 0)[:, None] & (np.arange(width - 1) % CELL > 0)
        pixels[:-1, :-1][inside] = coloured[inside]
    framed = np.tile(frame, (pixels.shape[0] + 2 * FRAME, pixels.shape[1] + 2 * FRAME, 1))
    framed[FRAME:-FRAME, FRAME:-FRAME] = pixels
    return framed


def stack(parts: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """The parts one after the other along `axis`, with gaps before, between and behind, aligned at their start."""
    across = 1 - axis
    shape = [0, 0, 3]
    shape[axis] = sum(part.shape[axis] for part in parts) + GAP * (len(parts) + 1)
    shape[across] = max(part.shape[across] for part in parts) + 2 * GAP
    pixels = np.tile(PAPER, (*shape[:2], 1))
    position = GAP
    for part in parts:
        first = [GAP, GAP]
        first[axis] = position
        pixels[first[0] : first[0] + part.shape[0], first[1] : first[1] + part.shape[1]] = part
        position += part.shape[axis] + GAP
    return pixels
