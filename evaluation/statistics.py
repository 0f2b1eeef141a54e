"""Intervals and tests over tasks, all deterministic.

Tasks are the independent units: the queries of a task depend on each other.
"""

import math

import numpy as np

RESAMPLES = 10_000
_AT_ONCE = 1_000  # resamples held in memory together


def bootstrap(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % percentile interval (low, high) of the mean of `values` over T tasks.

    values (T,), or (T, M) for M quantities that are resampled together, so that the interval of a difference,
    given as a column, is a paired one. The bounds are scalars or (M,). Raises `ValueError` without any task.
    """
    values = np.asarray(values, np.float64)
    tasks = len(values)
    if not tasks:
        raise ValueError("no task to resample")
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, _AT_ONCE):
        size = min(_AT_ONCE, resamples - start)
        drawn = rng.integers(tasks, size=(size, tasks)) + tasks * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * tasks).reshape(size, tasks)
        means.append(times @ values / tasks)
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)
    return low, high


def mcnemar(first: np.ndarray, second: np.ndarray) -> tuple[int, int, float]:
    """Exact two-sided McNemar test of solved / unsolved, (T,) bool each.

    Returns the tasks that only the first solved, those that only the second solved, and the p-value. Under
    the null hypothesis each of them goes either way with probability 1/2 (McNemar, 1947).
    """
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, i) for i in range(min(only_first, only_second) + 1))
    return only_first, only_second, min(1.0, 2 * tail / 2**discordant)


def permutation_test(differences: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> float:
    """Two-sided p-value of a mean paired difference (T,), by drawing the signs anew `resamples` times.

    The observed signs count as one more draw, so that no p-value is below 1 / (resamples + 1).
    """
    rng = np.random.default_rng(seed)
    differences = differences[differences != 0]
    signs = rng.integers(0, 2, (resamples, len(differences))) * 2 - 1
    as_large = np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9
    return float((1 + as_large.sum()) / (1 + resamples))
