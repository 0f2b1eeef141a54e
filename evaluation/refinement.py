"""How an answer comes about: what a model would have answered after each of its ACT steps.

A recorded step is a dictionary:
    grid     rows of colours
    q        the halting probability
    halted   whether the model stops here
The last one is the answer itself. `evaluation.inference.Inference.collect` records them all in one pass.
"""

from typing import Any

import numpy as np

from evaluation.predictions import Predictions
from evaluation.voting import grid_of, sigmoid

Step = dict[str, Any]


def refinements(predictions: Predictions, view: int = 0) -> dict[int, list[Step]]:
    """The steps of every query in one view, by the query's number, from predictions that hold every step.

    Of several attempts at the view, they are those of the first.
    A query that was not asked, or has no such view, has no entry.
    """
    answers, columns = list(predictions.answers), predictions.columns
    chosen = (columns["view"] == view) & (columns["rollout"] == 0)
    steps_of: dict[int, list[Step]] = {}
    for query, answer, logit in zip(
        *(columns[name][chosen].tolist() for name in ("query", "answer", "q_halt_logit")), strict=True
    ):
        step = {"grid": grid_of(answers[answer]).tolist(), "q": round(sigmoid(logit), 6), "halted": False}
        steps_of.setdefault(query, []).append(step)
    for steps in steps_of.values():
        steps[-1]["halted"] = True
    return steps_of


def agreeing(grid: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether `other`, which may have another size, has the same colour at each cell of `grid`: bool."""
    same = np.zeros(grid.shape, bool)
    rows, columns = np.minimum(grid.shape, other.shape)
    same[:rows, :columns] = grid[:rows, :columns] == other[:rows, :columns]
    return same
