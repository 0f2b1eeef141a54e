"""Votes over augmented views, and the rules that rank the answers. Memory grows with distinct answers, not with views."""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from utils.errors import UserError

_ONE = 1 << 53  # probabilities are summed as integers, so that the order of views and processes cannot matter

Ranking = Literal["votes", "confidence", "product", "agreement"]
AnswerKey = tuple[tuple[int, int], bytes]  # what makes answers the same: shape and cells

# Sort keys, best first, of (votes, summed halting probability, summed agreement, earliest view). No two answers share an
# earliest view, so that every order is total.
_ORDERS = {
    "votes": lambda votes, total, agreed, view: (
        -votes,
        -total,
        view,
    ),  # the original's: of equal votes the larger sum is the larger mean
    "confidence": lambda votes, total, agreed, view: (-total / votes, -votes, view),
    "product": lambda votes, total, agreed, view: (-total, -votes, view),
    "agreement": lambda votes, total, agreed, view: (-agreed, -votes, -total, view),
}


@dataclass(frozen=True)
class Candidate:
    """One distinct answer: the grid, its votes, the mean halting probability of those views, the first view that gave it, and
    their mean agreement with the demonstrations, None where it was not computed."""

    grid: np.ndarray
    votes: int
    q: float
    first_view: int
    agreement: float | None = None


def key_of(grid: np.ndarray) -> AnswerKey:
    """The key of an answer (rows, columns)."""
    return grid.shape, grid.astype(np.uint8).tobytes()


def grid_of(key: AnswerKey) -> np.ndarray:
    """The answer of a key, read-only."""
    shape, cells = key
    return np.frombuffer(cells, np.uint8).reshape(shape)


class VoteTable:
    """Counts answers per question; a new table is made for every evaluation.

    ranking: `votes` orders the answers by count, then mean halting probability (the original's rule); `confidence` by mean
    halting probability, then count; `product` by the sum of the halting probabilities, which is count times mean, then
    count; `agreement` by the sum of the views' agreement, the share of the demonstrations that the model answers exactly
    in that view from the others, then count. What is still equal is ordered by the earliest view that gave the answer.
    """

    def __init__(self, ranking: Ranking = "votes") -> None:
        self.ranking = ranking
        self._votes: dict[Hashable, dict[AnswerKey, list[int]]] = {}
        self._with_agreement = True

    def add(
        self,
        question: Hashable,
        view: int,
        grid: np.ndarray,
        q_halt_logit: float,
        agreement: float = math.nan,
    ) -> None:
        """Count one view's answer, already mapped back. An empty grid is no answer and never counts."""
        self.count(question, view, key_of(grid), q_halt_logit, agreement)

    def count(
        self,
        question: Hashable,
        view: int,
        answer: AnswerKey,
        q_halt_logit: float,
        agreement: float = math.nan,
    ) -> None:
        """`add` for an answer given by its key. Raises `UserError` when the ranking asks for an agreement that is not known."""
        if not answer[1]:
            return
        known = not math.isnan(agreement)
        if self.ranking == "agreement" and not known:
            raise UserError(
                "ranking=agreement: the predictions were made without it; evaluate with ranking=agreement"
            )
        entry = self._votes.setdefault(question, {}).setdefault(answer, [0, 0, 0, view])
        entry[0] += 1
        entry[1] += round(sigmoid(q_halt_logit) * _ONE)
        entry[2] += round(agreement * _ONE) if known else 0
        entry[3] = min(entry[3], view)
        self._with_agreement = self._with_agreement and known

    def ranked(self, question: Hashable) -> list[Candidate]:
        """The answers, best first."""
        order = _ORDERS[self.ranking]
        entries = sorted(self._votes.get(question, {}).items(), key=lambda entry: order(*entry[1]))
        return [
            Candidate(
                grid_of(answer),
                votes,
                total / _ONE / votes,
                view,
                agreed / _ONE / votes if self._with_agreement else None,
            )
            for answer, (votes, total, agreed, view) in entries
        ]

    def rank_of(self, question: Hashable, answer: AnswerKey) -> int | None:
        """1-based rank of `answer` in `ranked`, None if no view gave it."""
        entries, order = self._votes.get(question, {}), _ORDERS[self.ranking]
        if answer not in entries:
            return None
        mine = order(*entries[answer])
        return 1 + sum(order(*entry) < mine for entry in entries.values())

    def num_votes(self, question: Hashable) -> int:
        """Views that gave an answer."""
        return sum(entry[0] for entry in self._votes.get(question, {}).values())

    def settled(self, question: Hashable, k: int, remaining: int) -> bool:
        """Whether the first k answers and their order are certain, whatever the `remaining` views will answer.

        A view adds at most 1 to an answer's votes, summed probability and summed agreement. So for all rankings but
        `confidence` the first k are certain as soon as each of them leads the next one by more than `remaining`; the next one may be an
        answer that nobody has given yet, which stands at 0. By mean probability nothing is certain before the last view.
        """
        if remaining <= 0 or self.ranking == "confidence":
            return remaining <= 0
        column, one = {"votes": (0, 1), "product": (1, _ONE), "agreement": (2, _ONE)}[self.ranking]
        scores = sorted((entry[column] for entry in self._votes.get(question, {}).values()), reverse=True)
        scores = (scores + [0] * (k + 1))[: k + 1]
        return all(
            first - second > remaining * one for first, second in zip(scores, scores[1:], strict=False)
        )


def sigmoid(x: float) -> float:
    """The halting probability of a logit; 0 for a diverged model's, whose answer still counts."""
    if math.isnan(x):
        return 0.0
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
