"""The files of an evaluation, all in one folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation import predictions as stored
from evaluation.records import known_output
from evaluation.report import write_report
from evaluation.run import Evaluation
from evaluation.voting import key_of
from utils.files import as_json, directory_written_whole, write_json

RESULTS = "results.json"  # what marks an evaluation's folder
RECORDS = "per_example.jsonl"
SUBMISSION = "submission.json"
REPORT = "report.html"


def files_of(with_report: bool, with_predictions: bool) -> list[str]:
    """The names of the files that `write_files` makes."""
    optional = ((stored.FILE, with_predictions), (REPORT, with_report))
    return [RESULTS, RECORDS, SUBMISSION, *(name for name, wanted in optional if wanted)]


def write_files(
    folder: Path,
    evaluation: Evaluation,
    about: dict[str, Any],
    *,
    with_report: bool,
    with_predictions: bool,
    metrics: Sequence[Mapping[str, Any]] = (),
    contexts: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Write all files of an evaluation into `folder`, or none of them.

    An earlier evaluation there is replaced.
    about: what results.json says of checkpoint, data and settings.
    metrics, contexts: what the report draws beside the answers (`render_report`).
    """
    results = results_of(evaluation, about)
    with directory_written_whole(folder, marker=RESULTS) as temporary:
        write_json(temporary / RESULTS, results, indent=1)
        write_json(temporary / SUBMISSION, evaluation.submission)
        write_records(temporary / RECORDS, evaluation.records)
        if with_predictions:
            save_predictions(temporary / stored.FILE, evaluation)
        if with_report:
            write_report(
                temporary / REPORT,
                results,
                evaluation.records,
                evaluation.puzzles,
                metrics,
                contexts,
                evaluation.questions.store.game,
            )


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Write per_example.jsonl, a line per query."""
    lines = "".join(json.dumps(as_json(record), allow_nan=False) + "\n" for record in records)
    path.write_text(lines, encoding="utf-8")


def results_of(evaluation: Evaluation, about: dict[str, Any]) -> dict[str, Any]:
    """results.json."""
    return {
        "protocol": evaluation.protocol,
        **about,
        "prediction_seconds": round(evaluation.prediction_seconds, 3),
        "counts": evaluation.counts,
        "notes": evaluation.notes,
        "scores": [score.to_json() for score in evaluation.scores],
        "by_subset": {
            name: [score.to_json() for score in scores] for name, scores in evaluation.by_subset.items()
        },
        "means": evaluation.means,
        "by_depth": [depth.to_json() for depth in evaluation.depths],
    }


def save_predictions(path: Path, evaluation: Evaluation) -> None:
    """The model's predictions with the queries and their known answers (evaluation/predictions.py)."""
    questions = evaluation.questions
    assert evaluation.predictions is not None, "only kept predictions can be stored"
    outputs = [known_output(questions, query) for query in questions.queries]
    stored.save(
        path,
        evaluation.predictions,
        [questions.store.task_ids[query.task] for query in questions.queries],
        [query.number for query in questions.queries],
        [None if output is None else key_of(output) for output in outputs],
    )
