"""An evaluation read back from its folder: what it says of itself, and where the true answers rank."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.folder import RECORDS, RESULTS
from evaluation.metrics import Score, pass_scores, solved_within, task_means
from evaluation.protocols import described
from evaluation.records import REPORTED_CANDIDATES
from utils.errors import UserError
from utils.files import read_json

Query = tuple[int, str, str]  # a query's number in its task, the hashes of its input and its answer
Record = dict[str, Any]  # a line of per_example.jsonl


@dataclass
class Evaluated:
    """One evaluation.

    - about: what results.json says.
    - ranks: task -> labelled query -> the rank of the true answer, None if nobody voted for it.
    """

    folder: Path
    about: dict[str, Any]
    ranks: dict[str, dict[Query, int | None]]

    @property
    def protocol(self) -> str:
        """The label of the scores, and how the model was adapted."""
        return described(self.about["protocol"], (self.about.get("adaptation") or {}).get("name"))

    @property
    def most_answers(self) -> int | None:
        """How many first answers are certain: None for all, fewer where not all votes are known."""
        if self.about.get("pooled"):
            return REPORTED_CANDIDATES
        if not self.about.get("vote_stop"):
            return None
        metrics = [score["metric"] for score in self.about["scores"]]
        # A game has no pass@k: its puzzle is asked once, and there are no votes to stop.
        ks = [int(name.split("@")[1]) for name in metrics if name.startswith("ARC/pass@")]
        return max(ks, default=None)

    @property
    def description(self) -> dict[str, Any]:
        """Where it is, and what was asked how, as JSON values."""
        about = self.about
        return {
            "folder": str(self.folder),
            "checkpoint": about["checkpoint"],
            "protocol": self.protocol,
            **{name: about.get(name) for name in ("adaptation", "split", "num_views", "ranking", "seed")},
        }

    def task_shares(self, tasks: list[str], k: int) -> np.ndarray:
        """(T,) the share of each task's queries solved within k answers."""
        asked = [(task, rank) for task in tasks for rank in self.ranks[task].values()]
        return task_means([task for task, _ in asked], solved_within([rank for _, rank in asked], k))

    def scores(self, ks: Sequence[int]) -> list[Score]:
        """The scores of all its tasks with a labelled query."""
        asked = [(task, rank) for task, queries in self.ranks.items() for rank in queries.values()]
        return pass_scores([task for task, _ in asked], [rank for _, rank in asked], ks)


def in_words(description: Mapping[str, Any]) -> str:
    """An evaluation's `description` for the last column of a table."""
    views = f"{description['num_views']} view{'s' * (description['num_views'] > 1)}"
    return f"{description['folder']} ({description['protocol']}, {views}, ranking {description['ranking']})"


def read(folder: Path) -> Evaluated:
    """The evaluation in a folder. Raises `UserError` if there is none."""
    return read_with_records(folder)[0]


def read_with_records(folder: Path) -> tuple[Evaluated, list[Record]]:
    """`read`, and a record per query."""
    about = read_json(folder / RESULTS)
    with explains_foreign_files(folder):
        lines = (folder / RECORDS).read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        evaluated = Evaluated(folder, about, ranks_of(records))
        # What is read later, read here: a foreign file should fail with its name.
        _ = in_words(evaluated.description), about["scores"]
        return evaluated, records


@contextmanager
def explains_foreign_files(folder: Path) -> Iterator[None]:
    """Raise `UserError` where the files of a folder do not hold what an evaluation writes."""
    try:
        yield
    except (OSError, ValueError, ArithmeticError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is no evaluation of this version: {error}") from None


def ranks_of(records: list[Record]) -> dict[str, dict[Query, int | None]]:
    """Task -> labelled query -> rank of the true answer, from the records of an evaluation."""
    ranks: dict[str, dict[Query, int | None]] = {}
    for record in records:
        # Without a known answer nothing can be right or wrong.
        if record["label_hash"] is not None:
            key = (record["query"], record["input_hash"], record["label_hash"])
            ranks.setdefault(record["task"], {})[key] = record["rank_of_truth"]
    return ranks


def check_known(evaluations: Sequence[Evaluated], ks: Sequence[int]) -> None:
    """Raise `UserError` unless the first max(ks) answers of every evaluation are certain."""
    for evaluated in evaluations:
        known = evaluated.most_answers
        if known is not None and max(ks) > known:
            raise UserError(
                f"{evaluated.folder} is certain of the first {known} answers only; give --k up to {known}"
            )
