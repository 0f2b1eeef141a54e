"""How an answer comes about: what a model would have answered after each of its ACT steps.

A recorded step is `{"grid": rows of colours, "q": halting probability, "halted": whether the model stops here}`. The last one
is the answer itself. `evaluation.inference.collect` records them all in one pass.
"""

from typing import Any

import numpy as np

from evaluation.predictions import Predictions
from evaluation.voting import grid_of, sigmoid

Step = dict[str, Any]


def refinements(predictions: Predictions, view: int = 0) -> dict[int, list[Step]]:
    """The steps of every query in one view, by the query's number, from predictions that hold every step.

    A query that was not asked, or has no such view, has no entry.
    """
    answers, columns = list(predictions.answers), predictions.columns
    chosen = columns["view"] == view
    found: dict[int, list[Step]] = {}
    for query, answer, logit in zip(
        *(columns[name][chosen].tolist() for name in ("query", "answer", "q_halt_logit")), strict=True
    ):
        step = {"grid": grid_of(answers[answer]).tolist(), "q": round(sigmoid(logit), 6), "halted": False}
        found.setdefault(query, []).append(step)
    for steps in found.values():
        steps[-1]["halted"] = True
    return found


def agreeing(grid: np.ndarray, other: np.ndarray) -> np.ndarray:
    """For each cell of `grid` whether `other` has the same colour there, bool of the grid's shape; other sizes are allowed."""
    same = np.zeros(grid.shape, bool)
    rows, columns = np.minimum(grid.shape, other.shape)
    same[:rows, :columns] = grid[:rows, :columns] == other[:rows, :columns]
    return same
