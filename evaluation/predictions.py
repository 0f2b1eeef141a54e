"""What a model answered to every view, kept compactly, so that rules and numbers of votes can be studied without the model.

`predictions.npz` holds one row per (query, view), and per ACT step where steps were recorded, as equally long columns
    query, view, step (N,) int32; answer (N,) int32 into the distinct answers; q_halt_logit (N,) float32; agreement (N,)
    float32 with the demonstrations (`VoteTable`), NaN where it was not computed
the distinct answers once, `shapes` (A, 2) and their `cells` one after the other, and of the Q queries `task`, `number` and
`truth` (Q,), the answer that is right or -1 where it is unknown. Rows are sorted, so that processes leave no trace.
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
from evaluation.voting import AnswerKey, Ranking, VoteTable, key_of
from utils.errors import UserError
from utils.files import read_json

FILE = "predictions.npz"
ABOUT = {
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
_COLUMNS = {"query": "i", "view": "i", "step": "i", "answer": "i", "q_halt_logit": "f", "agreement": "f"}


class Predictions:
    """Answers to views. `answers` maps each distinct answer to its number; an empty one is kept, but never votes."""

    def __init__(self) -> None:
        self.answers: dict[AnswerKey, int] = {}
        self._columns = {name: array(code) for name, code in _COLUMNS.items()}

    def add(
        self,
        query: int,
        view: int,
        step: int,
        grid: np.ndarray,
        q_halt_logit: float,
        agreement: float = math.nan,
    ) -> None:
        """One view's answer after ACT step `step`, already mapped back."""
        values = (query, view, step, self._number(key_of(grid)), q_halt_logit, agreement)
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def merge(self, others: Iterable["Predictions"]) -> None:
        """Add the rows of others."""
        for other in others:
            numbers = [self._number(answer) for answer in other.answers]
            for name, column in other._columns.items():
                self._columns[name].extend((numbers[i] for i in column) if name == "answer" else column)

    def __len__(self) -> int:
        return len(self._columns["query"])

    def rows(self, step: int | None = None) -> dict[str, np.ndarray]:
        """One row per (query, view), in this order: its last one, at ACT step `step` at the latest."""
        columns = self.columns
        if step is not None:
            columns = {name: column[columns["step"] <= step] for name, column in columns.items()}
        query, view = columns["query"], columns["view"]
        last = np.ones(len(query), bool)
        last[:-1] = (query[1:] != query[:-1]) | (view[1:] != view[:-1])
        return {name: column[last] for name, column in columns.items()}

    def vote(
        self, ranking: Ranking = "votes", step: int | None = None, views: Collection[int] | None = None
    ) -> VoteTable:
        """The votes of all views, or of some, after their last ACT step, or after `step`."""
        votes = VoteTable(ranking)
        self.vote_into(votes, step, views)
        return votes

    def vote_into(
        self, votes: VoteTable, step: int | None = None, views: Collection[int] | None = None
    ) -> None:
        """Add the votes to a table."""
        answers, rows = list(self.answers), self.rows(step)
        columns = (rows[name].tolist() for name in ("query", "view", "answer", "q_halt_logit", "agreement"))
        for query, view, answer, q_halt_logit, agreement in zip(*columns, strict=True):
            if views is None or view in views:
                votes.count(query, view, answers[answer], q_halt_logit, agreement)

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """All rows as arrays, sorted by query, view and step."""
        unsorted = {name: np.array(column, column.typecode) for name, column in self._columns.items()}
        order = np.lexsort((unsorted["step"], unsorted["view"], unsorted["query"]))
        return {name: column[order] for name, column in unsorted.items()}

    @classmethod
    def of_columns(cls, answers: Iterable[AnswerKey], columns: dict[str, np.ndarray]) -> "Predictions":
        """The inverse of `answers` and `columns`."""
        made = cls()
        made.answers = {answer: number for number, answer in enumerate(answers)}
        for name, code in _COLUMNS.items():
            made._columns[name].frombytes(columns[name].astype(code).tobytes())
        return made

    def _number(self, answer: AnswerKey) -> int:
        return self.answers.setdefault(answer, len(self.answers))


@dataclass
class StoredPredictions:
    """The predictions of an evaluation's folder, for Q queries: the task and the known answer of each (None: unknown), and
    what results.json says of the run."""

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
        return [votes.rank_of(query, self.truths[query]) for query in self.labelled]

    def task_means(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """(T,) or (T, M) the mean of `values` (one, or M, per labelled query) over each task's queries."""
        return task_means([self.tasks[query] for query in self.labelled], values)


def save(
    path: Path, predictions: Predictions, tasks: list[str], numbers: list[int], truths: list[AnswerKey | None]
) -> None:
    """Write predictions.npz; the module's docstring says what is in it."""
    columns, known = predictions.columns, list(predictions.answers)
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
    """What `evaluate.py save_predictions=true` wrote into `folder`. Raises `UserError` if it is missing, damaged or empty."""
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
                f"{folder}/results.json does not say what an evaluation says; it was not written by this version"
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
