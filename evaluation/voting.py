"""Votes over augmented views. Memory grows with distinct answers, not with views."""

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np

_FIXED_POINT = 1 << 53  # probabilities are summed as integers, so that the order of views and processes cannot matter


@dataclass(frozen=True)
class Candidate:
    """One distinct answer: the grid, its votes, the mean halting probability of those views, the first view that gave it."""

    grid: np.ndarray
    votes: int
    q: float
    first_view: int


class VoteTable:
    """Counts answers per question; a new table is made for every evaluation."""

    def __init__(self) -> None:
        self._votes: dict[Hashable, dict[tuple, list[int]]] = {}

    def add(self, question: Hashable, view: int, grid: np.ndarray, q_halt_logit: float) -> None:
        """Count one view's answer, already mapped back. An empty grid is no answer and never counts."""
        if grid.size == 0:
            return
        key = (grid.shape, grid.astype(np.uint8).tobytes())
        probability = round(_sigmoid(q_halt_logit) * _FIXED_POINT)
        self._add(question, key, 1, probability, view)

    def merge(self, others: Iterable["VoteTable"]) -> None:
        """Add the votes of other processes' tables."""
        for other in others:
            for question, answers in other._votes.items():
                for key, (votes, probability, view) in answers.items():
                    self._add(question, key, votes, probability, view)

    def ranked(self, question: Hashable) -> list[Candidate]:
        """The answers, best first: by votes, then mean halting probability, then the earliest view (the original's rule)."""
        candidates = [
            Candidate(np.frombuffer(data, np.uint8).reshape(shape), votes, probability / _FIXED_POINT / votes, view)
            for (shape, data), (votes, probability, view) in self._votes.get(question, {}).items()
        ]
        return sorted(candidates, key=lambda c: (-c.votes, -c.q, c.first_view))

    def _add(self, question: Hashable, key: tuple, votes: int, probability: int, view: int) -> None:
        entry = self._votes.setdefault(question, {}).setdefault(key, [0, 0, view])
        entry[0] += votes
        entry[1] += probability
        entry[2] = min(entry[2], view)


def _sigmoid(x: float) -> float:
    if math.isnan(x):
        return 0.0  # a diverged model's answer still counts, without confidence
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
