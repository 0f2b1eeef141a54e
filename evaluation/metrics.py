"""Scores over a declared task set. A task or query without a prediction counts as wrong, never as absent."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np

from evaluation.voting import Candidate


@dataclass(frozen=True)
class Score:
    """A share of tasks with a 95 % interval. `control` is "none" for the model itself."""

    control: str
    metric: str
    value: float
    ci_low: float
    ci_high: float
    n: int

    @property
    def name(self) -> str:
        """The metric, with its control if it is one's."""
        return self.metric if self.control == "none" else f"{self.metric}/{self.control}"

    def to_json(self) -> dict:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class AnsweredQuery:
    """A query: its task, the ranked answers, and the truth, None where it is unknown.

    passed: which of its game's checks the best answer passes, by name.
    """

    task: int
    candidates: list[Candidate]
    truth: np.ndarray | None
    passed: Mapping[str, bool] = field(default_factory=dict)

    @cached_property
    def rank(self) -> int | None:
        """1-based rank of the truth among the answers."""
        truth = self.truth
        if truth is None:
            return None
        return next((i for i, c in enumerate(self.candidates, 1) if np.array_equal(c.grid, truth)), None)

    @property
    def share_of_cells(self) -> float:
        """The share of the truth's cells that the best answer has right, 0 if it has another shape."""
        if self.truth is None or not self.candidates or self.candidates[0].grid.shape != self.truth.shape:
            return 0.0
        return float((self.candidates[0].grid == self.truth).mean())

    @property
    def first_view_right(self) -> bool:
        """Whether the unaugmented view alone, without votes, gave the truth."""
        return self.rank is not None and self.candidates[self.rank - 1].first_view == 0


def score(answers: list[AnsweredQuery], pass_ks: Sequence[int], control: str = "none") -> list[Score]:
    """The scores of tasks that have demonstrations or rows; n counts tasks with a labelled query.

    `ARC/pass@k` is the mean over tasks of the share of a task's queries solved within k answers, the
    ancestors' number. `tasks_solved@k` is the share of tasks with every query solved, as ARC scores.
    `ARC/single_view` is pass@1 without votes.
    """
    tasks = [query.task for query in answers]
    scores = [
        _score(control, "ARC/single_view", task_means(tasks, [query.first_view_right for query in answers]))
    ]
    return scores + pass_scores(tasks, [query.rank for query in answers], pass_ks, control)


def pass_scores(
    tasks: Sequence[Hashable], ranks: Sequence[int | None], pass_ks: Sequence[int], control: str = "none"
) -> list[Score]:
    """`ARC/pass@k` and `tasks_solved@k` of labelled queries; tasks, ranks (Q,): of each, and of its truth."""
    scores = []
    for k in pass_ks:
        shares = task_means(tasks, solved_within(ranks, k))
        scores.append(_score(control, f"ARC/pass@{k}", shares))
        scores.append(_score(control, f"tasks_solved@{k}", shares == 1))
    return scores


def solved_within(ranks: Sequence[int | None], k: int) -> np.ndarray:
    """(Q,) bool: whether the truth of each query is among the first k answers."""
    return np.array([rank is not None and rank <= k for rank in ranks], bool)


def task_means(tasks: Sequence[Hashable], values: Sequence[float] | np.ndarray) -> np.ndarray:
    """(T,) or (T, M) the mean of `values` (Q,) or (Q, M) over the queries of each task.

    Tasks stand in the order of their first query.
    """
    position = {task: i for i, task in enumerate(dict.fromkeys(tasks))}
    index = np.array([position[task] for task in tasks], np.int64)
    values = np.asarray(values, np.float64)
    sums = np.zeros((len(position), *values.shape[1:]))
    np.add.at(sums, index, values)
    counts = np.bincount(index, minlength=len(position))
    return sums / counts.reshape(-1, *[1] * (values.ndim - 1))


def score_pairs(
    answers: list[AnsweredQuery], control: str = "none", checks: Sequence[str] = ()
) -> list[Score]:
    """The scores of games without demonstrations, under the ancestors' names.

    `all.exact_accuracy` is the share of puzzles solved. `all.accuracy` is the mean share of a puzzle's cells
    that are right; an answer of another shape has none. Of each of the game's `checks` it is the share of
    puzzles whose best answer passes, whether or not it is the known one: `all.valid`, `all.shortest`.
    """
    right = [query.share_of_cells for query in answers]
    return [
        _score(control, "all.exact_accuracy", [float(share == 1) for share in right]),
        _score(control, "all.accuracy", right),
        *(
            _score(control, f"all.{name}", [float(query.passed[name]) for query in answers])
            for name in checks
        ),
    ]


def _score(control: str, metric: str, shares: Sequence[float] | np.ndarray) -> Score:
    value = float(np.mean(shares)) if len(shares) else 0.0
    return Score(control, metric, value, *wilson(value, len(shares)), len(shares))


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share of n independent tasks (Wilson, 1927).

    For a mean of fractional task scores it is conservative: of all distributions on 0..1 with that mean,
    right-or-wrong varies the most.
    """
    if n == 0:
        return 0.0, 1.0
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = min(share, centre - half), max(share, centre + half)
    return max(0.0, low), min(1.0, high)  # rounding must not exclude 0 and 1


def in_percent(share: float, low: float, high: float) -> str:
    """A share with its interval, for a table."""
    return f"{100 * share:5.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
