"""Paired tests and intervals over tasks."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from evaluation import statistics


def test_mcnemar_is_the_binomial_test_of_the_tasks_that_differ():
    first, second = np.array([1] * 7 + [0] * 1 + [1] * 5, bool), np.array([0] * 7 + [1] * 1 + [1] * 5, bool)
    assert statistics.mcnemar(first, second) == (7, 1, pytest.approx(0.0703125))  # 2 * (1 + 8) / 2^8
    assert statistics.mcnemar(first, first) == (0, 0, 1.0)
    assert statistics.mcnemar(np.ones(400, bool), np.zeros(400, bool))[2] == float(Fraction(2, 2**400))


def test_the_permutation_test_matches_all_sign_patterns():
    differences = np.array([0.5, 1.0, -0.5, 0.0, 1.0, 0.5, 0.25])
    signs = np.array(list(itertools.product((-1, 1), repeat=7)))
    exact = (np.abs(signs @ differences) >= differences.sum() - 1e-9).mean()
    assert statistics.permutation_test(differences) == pytest.approx(exact, abs=0.02)
    assert statistics.permutation_test(np.zeros(5)) == 1.0


def test_the_bootstrap_has_the_width_of_the_standard_error_and_pairs_columns():
    rng = np.random.default_rng(0)
    first = rng.random(300)
    second = first + 0.1
    low, high = statistics.bootstrap(np.stack([first, second, second - first], axis=1))
    error = first.std() / np.sqrt(300)
    assert high[0] - low[0] == pytest.approx(2 * 1.96 * error, rel=0.05) and low[0] < first.mean() < high[0]
    assert low[2] == pytest.approx(0.1) and high[2] == pytest.approx(
        0.1
    )  # a constant difference has no spread
    again = statistics.bootstrap(first)
    assert again[0] == pytest.approx(low[0], rel=1e-12) and statistics.bootstrap(first, seed=1)[0] != again[0]
