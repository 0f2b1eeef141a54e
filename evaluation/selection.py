"""Which of the attempts at a view vote.

votes       all of them
halting     the one with the largest halting logit (best-Q of PTRM, arXiv 2605.19943)
residual    the one whose last ACT step has moved the states least (EqR, arXiv 2605.21488)
verifier    the one that the game's own rules accept, then as `halting`
An empty answer gives way to any other. Of equal attempts the earlier one is taken.
Shapes: N rows, each an attempt at a view of a query.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from dataset.views import EvaluationSet
from evaluation.voting import AnswerKey
from utils.errors import UserError

Select = Literal["votes", "halting", "residual", "verifier"]
Rows = dict[str, np.ndarray]  # columns of predictions, sorted by query, view and rollout
# Queries (n,) and an answer to each of them -> (n,) bool, whether the rules accept it.
Verifier = Callable[[np.ndarray, Sequence[AnswerKey]], np.ndarray]


class Selection:
    """Chooses rows of predictions. Raises `UserError` where there is no verifier to ask."""

    def __init__(self, select: Select, questions: EvaluationSet):
        self.select, self.verify = select, None
        if select == "verifier":
            self.verify = verifier_of(questions)

    def __call__(self, rows: Rows, answers: Sequence[AnswerKey]) -> Rows:
        """The rows that vote. One that was chosen among others stands for its view, as rollout 0."""
        if self.select == "votes" or not len(rows["query"]):
            return rows
        query, view = rows["query"], rows["view"]
        empty = np.array([not cells for _, cells in answers], bool)[rows["answer"]]
        # The last key counts most, and equal rows keep their order.
        order = np.lexsort((*self._order(rows, answers), empty, view, query))
        query, view = query[order], view[order]
        first = np.ones(len(order), bool)
        first[1:] = (query[1:] != query[:-1]) | (view[1:] != view[:-1])
        chosen = {name: column[order[first]] for name, column in rows.items()}
        return {**chosen, "rollout": np.zeros_like(chosen["rollout"])}

    def _order(self, rows: Rows, answers: Sequence[AnswerKey]) -> list[np.ndarray]:
        """Sort keys, ascending, the last one first. What is no number comes last."""
        if self.select == "residual":
            return [np.nan_to_num(rows["residual"], nan=np.inf)]
        doubts = [-np.nan_to_num(rows["q_halt_logit"], nan=-np.inf, posinf=np.inf, neginf=-np.inf)]
        return doubts if self.verify is None else [*doubts, ~self._accepted(rows, answers)]

    def _accepted(self, rows: Rows, answers: Sequence[AnswerKey]) -> np.ndarray:
        """(N,) whether the rules accept the answer of each row. Equal answers to a query are checked once."""
        assert self.verify is not None, "only a verifier accepts answers"
        pairs, place = np.unique(
            rows["query"].astype(np.int64) * len(answers) + rows["answer"], return_inverse=True
        )
        query, number = np.divmod(pairs, len(answers))
        return self.verify(query, [answers[i] for i in number.tolist()])[place]


def verifier_of(questions: EvaluationSet) -> Verifier:
    """The rules of the game that is asked. Raises `UserError` for one without rules that check an answer."""
    store = questions.store
    valid, first = store.game.valid if store.checks else None, store.game.vocabulary.first
    if valid is None:
        raise UserError(
            f"select=verifier: {store.metadata.game} has no rules by which an answer could be checked "
            "without knowing the right one; use votes, halting or residual"
        )

    def verify(queries: np.ndarray, answers: Sequence[AnswerKey]) -> np.ndarray:
        inputs = [store.pair(questions.queries[number].pair).input for number in queries.tolist()]
        accepted = np.zeros(len(queries), bool)
        for side in {grid.shape[0] for grid in inputs}:
            chosen = [
                i
                for i, (grid, answer) in enumerate(zip(inputs, answers, strict=True))
                if grid.shape == answer[0] == (side, side)
            ]
            if chosen:
                puzzles = np.stack([inputs[i].reshape(-1) for i in chosen])
                cells = np.stack([np.frombuffer(answers[i][1], np.uint8) for i in chosen])
                accepted[chosen] = valid(puzzles + first, cells + first, side)
        return accepted

    return verify
