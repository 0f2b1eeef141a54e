"""What a model answered to every view, so that rules and numbers of votes can be studied without the model.

`predictions.npz` holds equally long columns (N,), a row per query, view and rollout (and ACT step, where
recorded):
    query, view, rollout, step   int32
    answer              int32, the number of a distinct answer
    q_halt_logit        float32
    agreement           float32 with the demonstrations (`VoteTable`), NaN where it was not computed
    residual            float32, how far the step has moved the states, NaN where it was not computed
of the A distinct answers, once:
    shapes (A, 2), and their `cells` one after the other
and of the Q queries:
    task, number (Q,)
    truth (Q,)          the number of the right answer, -1 where it is unknown
Rows are sorted, so that processes leave no trace.
"""

import math
from array import array
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from evaluation.metrics import task_means
from evaluation.selection import Selection
from evaluation.voting import AnswerKey, Ranking, VoteTable, key_of
from utils.errors import UserError
from utils.files import read_json

FILE = "predictions.npz"
ABOUT = {  # what results.json has to say for an evaluation to be studied
    "checkpoint",
    "dataset",
    "model",
    "protocol",
    "split",
    "command",
    "device",
    "git_commit",
    "peak_gpu_memory_bytes",
}
_COLUMNS = {
    "query": "i",
    "view": "i",
    "step": "i",
    "answer": "i",
    "q_halt_logit": "f",
    "agreement": "f",
    "rollout": "i",
    "residual": "f",
}
_YOUNGER = {"rollout": 0, "residual": math.nan}  # columns that some files are older than


class Predictions:
    """Answers to views.

    `answers` maps each distinct answer to its number. An empty one is kept, but never votes.
    """

    def __init__(self) -> None:
        self.answers: dict[AnswerKey, int] = {}
        self._columns: dict[str, array[Any]] = {name: array(code) for name, code in _COLUMNS.items()}
        self._sorted: dict[str, np.ndarray] | None = None

    def add(
        self,
        query: int,
        view: int,
        step: int,
        grid: np.ndarray,
        q_halt_logit: float,
        agreement: float = math.nan,
        rollout: int = 0,
        residual: float = math.nan,
    ) -> None:
        """An answer to one view after ACT step `step`, already mapped back."""
        self._sorted = None
        number = self._number(key_of(grid))
        values = (query, view, step, number, q_halt_logit, agreement, rollout, residual)
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def merge(self, others: Iterable["Predictions"]) -> None:
        """Add the rows of others."""
        self._sorted = None
        for other in others:
            numbers = [self._number(answer) for answer in other.answers]
            for name, column in other._columns.items():
                self._columns[name].extend((numbers[i] for i in column) if name == "answer" else column)

    def __len__(self) -> int:
        return len(self._columns["query"])

    def rows(self, step: int | None = None) -> dict[str, np.ndarray]:
        """One row per (query, view, rollout), in this order: its last one, at `step` at the latest."""
        columns = self.columns
        if step is not None:
            early = columns["step"] <= step
            columns = {name: column[early] for name, column in columns.items()}
        last = np.ones(len(columns["query"]), bool)
        last[:-1] = np.any([np.diff(columns[name]) != 0 for name in ("query", "view", "rollout")], axis=0)
        return {name: column[last] for name, column in columns.items()}

    def last(self) -> "Predictions":
        """The last row of each (query, view, rollout) alone."""
        return self.of_columns(self.answers, self.rows())

    def among(self, rollouts: int) -> "Predictions":
        """The first so many attempts at each view alone."""
        kept = self.columns["rollout"] < rollouts
        return self.of_columns(self.answers, {name: column[kept] for name, column in self.columns.items()})

    def vote(
        self,
        ranking: Ranking = "votes",
        step: int | None = None,
        views: Collection[int] | None = None,
        selection: Selection | None = None,
    ) -> VoteTable:
        """The votes of all views, or of some, after their last ACT step, or after `step`.

        selection: which attempts at a view vote; None: all.
        """
        votes = VoteTable(ranking)
        self.vote_into(votes, step, views, selection)
        return votes

    def vote_into(
        self,
        votes: VoteTable,
        step: int | None = None,
        views: Collection[int] | None = None,
        selection: Selection | None = None,
    ) -> None:
        """Add the votes to a table. Among the votes of a query, those of a view are as early as its place."""
        answers, rows = list(self.answers), self.rows(step)
        per_view = int(rows["rollout"].max(initial=0)) + 1
        if selection is not None:
            rows = selection(rows, answers)
        names = ("query", "view", "rollout", "answer", "q_halt_logit", "agreement")
        for query, view, rollout, answer, *values in zip(
            *(rows[name].tolist() for name in names), strict=True
        ):
            if views is None or view in views:
                votes.count(query, view * per_view + rollout, answers[answer], *values)

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """All rows as arrays, sorted by query, view, rollout and step."""
        if self._sorted is None:
            unsorted = {name: np.array(column, column.typecode) for name, column in self._columns.items()}
            order = np.lexsort([unsorted[name] for name in ("step", "rollout", "view", "query")])
            self._sorted = {name: column[order] for name, column in unsorted.items()}
        return dict(self._sorted)

    @classmethod
    def of_columns(cls, answers: Iterable[AnswerKey], columns: dict[str, np.ndarray]) -> "Predictions":
        """The inverse of `answers` and `columns`."""
        made = cls()
        made.answers = {answer: number for number, answer in enumerate(answers)}
        count = len(columns["query"])
        for name, code in _COLUMNS.items():
            column = columns[name] if name in columns else np.full(count, _YOUNGER[name])
            made._columns[name].frombytes(column.astype(code).tobytes())
        return made

    def _number(self, answer: AnswerKey) -> int:
        return self.answers.setdefault(answer, len(self.answers))


@dataclass
class StoredPredictions:
    """The predictions of an evaluation's folder, for Q queries.

    tasks, truths: the task and the known answer of each query; None: unknown. about: results.json.
    """

    folder: Path
    predictions: Predictions
    tasks: list[str]
    truths: list[AnswerKey | None]
    about: dict[str, Any]

    @property
    def labelled(self) -> list[int]:
        """The queries whose answer is known."""
        return [query for query, truth in enumerate(self.truths) if truth is not None]

    @property
    def num_views(self) -> int:
        """The most views that a query has."""
        return int(self.predictions.columns["view"].max()) + 1

    def ranks(self, votes: VoteTable) -> list[int | None]:
        """The rank of the known answer of each labelled query."""
        return [votes.rank_of(query, truth) for query, truth in enumerate(self.truths) if truth is not None]

    def task_means(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """(T,) or (T, M) the mean of `values` (one, or M, per labelled query) over each task's queries."""
        return task_means([self.tasks[query] for query in self.labelled], values)


def save(
    path: Path, predictions: Predictions, tasks: list[str], numbers: list[int], truths: list[AnswerKey | None]
) -> None:
    """Write predictions.npz; the module's docstring says what is in it."""
    columns: dict[str, Any] = predictions.columns
    known = list(predictions.answers)
    used = [known[number] for number in columns["answer"].tolist()]
    answers = {answer: i for i, answer in enumerate(dict.fromkeys([*used, *filter(None, truths)]))}
    columns["answer"] = np.array([answers[answer] for answer in used], np.int32)
    np.savez_compressed(
        path,
        **columns,
        shapes=np.array([shape for shape, _ in answers], np.uint8).reshape(-1, 2),
        cells=np.frombuffer(b"".join(cells for _, cells in answers), np.uint8),
        task=np.array(tasks),
        number=np.array(numbers, np.int32),
        truth=np.array([-1 if truth is None else answers[truth] for truth in truths], np.int32),
    )


def load(folder: Path) -> StoredPredictions:
    """What `evaluate.py save_predictions=true` wrote into `folder`.

    Raises `UserError` if it is missing, damaged or empty.
    """
    path = folder / FILE
    try:
        arrays = dict(np.load(path))
        shapes, cells = arrays["shapes"].tolist(), arrays["cells"].tobytes()
        ends = np.cumsum([0] + [rows * columns for rows, columns in shapes]).tolist()
        answers = [
            (tuple(shape), cells[start:end])
            for shape, start, end in zip(shapes, ends, ends[1:], strict=False)
        ]
        predictions = Predictions.of_columns(answers, arrays)
        truths = [None if number < 0 else answers[number] for number in arrays["truth"].tolist()]
        about = read_json(folder / "results.json")
        if not isinstance(about, dict) or not about.keys() >= ABOUT:
            raise UserError(
                f"{folder}/results.json does not say what an evaluation says; "
                "it was not written by this version"
            )
        stored = StoredPredictions(folder, predictions, arrays["task"].tolist(), truths, about)
    except FileNotFoundError:
        raise UserError(
            f"no such file: {path}; python evaluate.py checkpoint=... save_predictions=true writes it"
        ) from None
    except (BadZipFile, KeyError, ValueError, IndexError, OSError) as error:
        raise UserError(f"{path} is damaged or was not written by this version: {error}") from None
    if not len(predictions) or not stored.labelled:
        raise UserError(f"{path} holds no prediction of a query whose answer is known")
    return stored
