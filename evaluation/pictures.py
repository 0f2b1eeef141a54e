"""Predictions as pixels in their game's look, a row per query, with its demonstrations and its answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dataset.games.drawing import Drawing
from dataset.task import Pair
from evaluation.adaptation import as_it_is
from evaluation.drawing import LINE, PAPER, RIGHT, WRONG, grid_pixels
from evaluation.inference import Inference
from evaluation.respondent import Respondent
from evaluation.run import Ask, Split

GAP, FRAME = 12, 3  # pixels


@dataclass(frozen=True)
class Example:
    """One query: what the model saw, the best answer (None: it gave none), and the truth (None: unknown)."""

    demonstrations: Sequence[Pair]
    query: np.ndarray
    prediction: np.ndarray | None
    truth: np.ndarray | None


def predictions(respondent: Respondent, split: Split, tasks: int, batch_size: int) -> list[Example]:
    """The first query of each of a split's first tasks, answered in one view (all processes together)."""
    store = respondent.store
    questions = Ask(seed=0, split=split, max_tasks=tasks).questions(respondent, num_views=1)
    votes = Inference(respondent, questions, as_it_is(respondent, batch_size)).predict()
    examples = []
    for number, query in enumerate(questions.queries):
        if query.number == 0:
            pair, ranked = store.pair(query.pair), votes.ranked(number)
            demonstrations = [store.pair(demo) for demo in query.demos]
            prediction = ranked[0].grid if ranked else None
            examples.append(Example(demonstrations, pair.input, prediction, pair.output))
    return examples


def draw(examples: Sequence[Example], drawing: Drawing) -> np.ndarray:
    """(H, W, 3) uint8, a row per example.

    From the left: each demonstration, input above output; the query's input; the prediction; the truth. The
    prediction is framed in green when it is right and in red when it is wrong.
    """
    return stack([_row(example, drawing) for example in examples], axis=0)


def _row(example: Example, drawing: Drawing) -> np.ndarray:
    truth, prediction = example.truth, example.prediction
    right = truth is not None and prediction is not None and np.array_equal(prediction, truth)
    columns = [
        stack([_grid(pair.input, drawing), _grid(pair.output, drawing)], axis=0)
        for pair in example.demonstrations
    ]
    frame = LINE if truth is None else RIGHT if right else WRONG
    given = example.query > 0
    answers = (
        _grid(example.query, drawing, given=given),
        _grid(prediction, drawing, frame, given),
        _grid(truth, drawing, given=given),
    )
    return stack([*columns, *(stack([grid], axis=0) for grid in answers)], axis=1)


def _grid(
    grid: np.ndarray | None,
    drawing: Drawing,
    frame: np.ndarray = PAPER,
    given: np.ndarray | None = None,
) -> np.ndarray:
    """A grid within a frame; an empty frame where there is no grid. `given` shades a grid of its shape."""
    if grid is None:
        pixels = np.tile(PAPER, (drawing.cell, drawing.cell, 1))
    else:
        shaded = given if given is not None and given.shape == grid.shape else None
        pixels = grid_pixels(grid, drawing, drawing.cell, shaded)
    framed = np.tile(frame, (pixels.shape[0] + 2 * FRAME, pixels.shape[1] + 2 * FRAME, 1))
    framed[FRAME:-FRAME, FRAME:-FRAME] = pixels
    return framed


def stack(parts: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """The parts one after the other along `axis`, with gaps around them, aligned at their start."""
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
