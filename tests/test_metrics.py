"""Votes, and scores with their denominators and intervals."""

import math

import numpy as np
import pytest

from evaluation.metrics import Answered, score, wilson
from evaluation.predictions import Predictions
from evaluation.voting import Candidate, VoteTable

A, B, C = (np.array([[value]], np.uint8) for value in (1, 2, 3))


def table(*votes) -> VoteTable:
    made = VoteTable()
    for view, (grid, q) in enumerate(votes):
        made.add("question", view, grid, q)
    return made


def test_votes_order_by_count_then_probability_then_view():
    ranked = table((A, 5.0), (B, -1.0), (C, 2.0), (B, -2.0), (A, 4.0)).ranked("question")
    assert [c.grid.item() for c in ranked] == [1, 2, 3] and [c.votes for c in ranked] == [2, 2, 1]
    ranked = table((C, 1.0), (B, 1.0), (A, 1.0)).ranked("question")
    assert [c.grid.item() for c in ranked] == [3, 2, 1]
    assert ranked[0].q == pytest.approx(1 / (1 + math.exp(-1)))


def test_an_empty_grid_is_never_a_vote_and_shapes_are_told_apart():
    votes = table(
        (np.zeros((0, 0), np.uint8), 9.0),
        (np.array([[1, 2]], np.uint8), 0.0),
        (np.array([[1], [2]], np.uint8), 0.0),
    )
    assert [c.grid.shape for c in votes.ranked("question")] == [(1, 2), (2, 1)]
    assert votes.ranked("never asked") == []


def test_votes_of_processes_add_up_in_any_order():
    rng = np.random.default_rng(0)
    votes = [(view, [A, B, C][rng.integers(3)], float(np.float32(rng.normal()))) for view in range(60)]
    whole, parts = VoteTable(), [Predictions() for _ in range(3)]
    for view, grid, q in votes:
        whole.add(0, view, grid, q)
        parts[view % 3].add(0, view, 1, grid, q)
    for order in ((0, 1, 2), (2, 1, 0)):
        merged = Predictions()
        merged.merge(parts[i] for i in order)
        for ours, theirs in zip(merged.vote().ranked(0), whole.ranked(0), strict=True):
            assert (ours.votes, ours.q, ours.first_view) == (theirs.votes, theirs.q, theirs.first_view)


def candidates(*grids: np.ndarray) -> list[Candidate]:
    return [Candidate(grid, 1, 0.5, view) for view, grid in enumerate(grids)]


def test_scores_have_both_definitions_and_the_whole_denominator():
    answered = [
        Answered(0, candidates(A, B), A),  # task 0: both queries, the second at rank 2
        Answered(0, candidates(A, B), B),
        Answered(1, candidates(C), A),  # task 1: wrong
        Answered(2, [], A),  # task 2: nothing predicted counts as wrong
    ]
    values = {s.metric: (s.value, s.n) for s in score(answered, [1, 2])}
    assert values["ARC/pass@1"] == (pytest.approx(0.5 / 3), 3)
    assert values["tasks_solved@1"] == (0.0, 3)
    assert values["ARC/pass@2"] == (pytest.approx(1 / 3), 3)
    assert values["tasks_solved@2"] == (pytest.approx(1 / 3), 3)
    assert values["ARC/single_view"] == (pytest.approx(0.5 / 3), 3)


def test_wilson_intervals_are_the_published_ones():
    assert wilson(2 / 32, 32) == pytest.approx((0.0173, 0.2015), abs=2e-3)
    assert wilson(0, 32)[0] == 0 and wilson(0, 32)[1] == pytest.approx(0.107, abs=1e-3)
    assert wilson(29 / 400, 400)[0] > 0.05
    assert wilson(0, 0) == (0.0, 1.0)
