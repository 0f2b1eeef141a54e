"""Votes over augmented views, and the rules that rank the answers.

Memory grows with distinct answers, not with views.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from utils.config import Config
from utils.errors import UserError

_ONE = 1 << 53  # probabilities are summed as integers, so that the order of views and processes cannot matter

Ranking = Literal["votes", "confidence", "product", "agreement"]
Controls = Literal["query_only", "shuffled_demonstrations", "copy_input"]
AnswerKey = tuple[tuple[int, int], bytes]  # what makes answers the same: shape and cells

# Sort keys, best first, of (votes, summed halting probability, summed agreement, earliest view). No two
# answers share an earliest view, so every order is total. Of equal votes the larger sum is the larger mean,
# which makes `votes` the original's rule.
_ORDERS = {
    "votes": lambda votes, total, agreed, view: (-votes, -total, view),
    "confidence": lambda votes, total, agreed, view: (-total / votes, -votes, view),
    "product": lambda votes, total, agreed, view: (-total, -votes, view),
    "agreement": lambda votes, total, agreed, view: (-agreed, -votes, -total, view),
}


class VotingConfig(Config):
    """How a split is asked and scored.

    num_views: augmented views per query that vote.
    batch_size: views that are answered together.
    pass_ks: the k of pass@k and tasks_solved@k.
    ranking: how votes order the answers (`VoteTable`).
    vote_stop: leave out the further views of a query whose first max(pass_ks) answers are certain.
    controls: what the score is compared with, on the same queries.
    """

    num_views: PositiveInt
    batch_size: PositiveInt
    pass_ks: Annotated[list[PositiveInt], Field(min_length=1)]
    ranking: Ranking
    vote_stop: bool
    controls: list[Controls]

    @model_validator(mode="after")
    def _check_voting(self) -> "VotingConfig":
        if len(set(self.pass_ks)) < len(self.pass_ks):
            raise ValueError(f"pass_ks={self.pass_ks} names a number more than once")
        if self.vote_stop and self.ranking == "confidence":
            raise ValueError(
                "vote_stop=true saves nothing with ranking=confidence: "
                "any further view could change the first answer"
            )
        return self


@dataclass(frozen=True)
class Candidate:
    """One distinct answer to a query.

    grid: its colours (rows, columns). votes: the views that gave it. first_view: the earliest of them.
    q: their mean halting probability.
    agreement: their mean agreement with the demonstrations, None where it was not computed.
    """

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

    ranking says what orders the answers:
        votes       the count, then the mean halting probability (the original's rule)
        confidence  the mean halting probability, then the count
        product     the sum of the halting probabilities, which is count times mean, then the count
        agreement   the sum of the views' agreement, then the count
    A view's agreement is the share of its demonstrations that the model answers exactly from the others.
    Answers that are still equal are ordered by the earliest view that gave them.
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
        """`add` for an answer given by its key.

        Raises `UserError` when the ranking asks for an agreement that is not known.
        """
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

    def merge(self, others: Iterable["VoteTable"]) -> None:
        """Add the counts of others. They are whole numbers, so that the order of adding does not matter."""
        for other in others:
            self._with_agreement = self._with_agreement and other._with_agreement
            for question, entries in other._votes.items():
                mine = self._votes.setdefault(question, {})
                for answer, (votes, total, agreed, view) in entries.items():
                    entry = mine.setdefault(answer, [0, 0, 0, view])
                    entry[:] = [entry[0] + votes, entry[1] + total, entry[2] + agreed, min(entry[3], view)]

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
        """Whether the first k answers and their order are certain, whatever the `remaining` views answer.

        A view adds at most 1 to an answer's votes, summed probability and summed agreement. So the first k
        are certain as soon as each of them leads the next one by more than `remaining`. The next one may be
        an answer that no view has given yet, which stands at 0.
        With `confidence` nothing is certain before the last view.
        """
        if remaining <= 0 or self.ranking == "confidence":
            return remaining <= 0
        column, one = {"votes": (0, 1), "product": (1, _ONE), "agreement": (2, _ONE)}[self.ranking]
        scores = sorted((entry[column] for entry in self._votes.get(question, {}).values()), reverse=True)
        scores = (scores + [0] * (k + 1))[: k + 1]  # answers that no view has given yet count, too
        return all(
            first - second > remaining * one for first, second in zip(scores, scores[1:], strict=False)
        )


@dataclass(frozen=True)
class Ballot:
    """What an evaluation answers to a query.

    answers: the answers that are known, best first, each with its votes and their mean halting probability.
    num_votes: the votes of all answers, known or not.
    """

    answers: Sequence[tuple[AnswerKey, int, float]]
    num_votes: int

    def __post_init__(self) -> None:
        known = [votes for _, votes, _ in self.answers]
        if min(known, default=1) < 1 or sum(known) > self.num_votes:
            raise ValueError(f"{self.num_votes} votes cannot be those of answers with {known}")

    @property
    def unknown(self) -> Fraction:
        """The share of the votes that went to answers which are not known."""
        known = sum(votes for _, votes, _ in self.answers)
        return Fraction(self.num_votes - known, max(self.num_votes, 1))


@dataclass(frozen=True)
class PooledAnswer:
    """One distinct answer of several evaluations.

    grid: its colours (rows, columns). share: its share of each evaluation's votes, added up.
    q: the halting probabilities of these votes, added up with the same weights.
    """

    grid: np.ndarray
    share: Fraction
    q: Fraction


def pooled(ballots: Iterable[Ballot]) -> list[PooledAnswer]:
    """The answers of several evaluations to a query, best first. Each evaluation has one vote in all.

    Its answers have their shares of it. Equal shares are ordered by q, then by the first evaluation that gave
    the answer and its place there. Shares are exact, so that equal ones are equal.
    """
    found: dict[AnswerKey, tuple[Fraction, Fraction]] = {}
    for ballot in ballots:
        for answer, votes, q in ballot.answers:
            share, total = found.get(answer, (Fraction(0), Fraction(0)))
            more = Fraction(votes, ballot.num_votes)
            found[answer] = share + more, total + more * Fraction(q)
    ranked = sorted(
        found.items(), key=lambda entry: (-entry[1][0], -entry[1][1])
    )  # keeps the order of equals
    return [PooledAnswer(grid_of(answer), share, q) for answer, (share, q) in ranked]


def sigmoid(x: float) -> float:
    """The halting probability of a logit; 0 for a diverged model's, whose answer still counts."""
    if math.isnan(x):
        return 0.0
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
