"""One evaluation: predictions, votes, scores with their controls, and the files that hold them."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt

from config.base import Config
from dataset.batch import DataConfig
from dataset.leaks import tasks_seen
from dataset.store import Store
from dataset.task import Pair
from dataset.views import EvaluationSet, Query
from evaluation.canvas_scores import CanvasScores
from evaluation.inference import copy_input, predict
from evaluation.metrics import Answered, Score, score, score_pairs
from evaluation.report import write_report
from evaluation.voting import Candidate, VoteTable
from models.core import RecursiveModel
from models.losses import ObjectiveConfig
from utils.distributed import World
from utils.errors import UserError
from utils.files import directory_written_whole, write_json

SUBMISSION_ATTEMPTS = 2
REPORTED_CANDIDATES = 5
PLACEHOLDER = [[0]]  # a submission needs an entry for every query, also where nothing was predicted

CONTROLS = Literal["query_only", "shuffled_demonstrations", "copy_input"]


class EvaluationConfig(Config):
    """num_views: augmented views per query that vote. controls: what the score is compared with, on the same queries."""

    num_views: PositiveInt
    batch_size: PositiveInt
    pass_ks: Annotated[list[PositiveInt], Field(min_length=1)]
    controls: list[CONTROLS]


@dataclass
class Evaluation:
    """What an evaluation found.

    num_views: at most so many views per query. means: of single views (`CanvasScores`). counts: queries by status.
    records: one per query. puzzles: the tasks in the ARC format.
    """

    protocol: str
    num_views: int
    scores: list[Score]
    means: dict[str, float]
    counts: dict[str, int]
    records: list[dict[str, Any]]
    submission: dict[str, list[dict]]
    puzzles: dict[str, dict]
    notes: list[str]

    def metrics(self) -> dict[str, float]:
        """Name -> value, controls as `name/control`."""
        return self.means | {s.metric if s.control == "none" else f"{s.metric}/{s.control}": s.value for s in self.scores}


def evaluate(
    model: RecursiveModel,
    store: Store,
    data: DataConfig,
    config: EvaluationConfig,
    objective: ObjectiveConfig,
    device: torch.device,
    world: World,
    *,
    seed: int,
    trained_pairs: np.ndarray,
    split: str = "test",
    subsets: list[str] | None = None,
    max_tasks: int | None = None,
    report: Callable[[int], None] = lambda views: None,
) -> Evaluation:
    """Predict, vote and score a split, with every configured control on the same queries (all processes together).

    `trained_pairs` are the fingerprints of what the model was trained on: if an evaluated task shares a pair with them,
    or the model has learned rows of the tasks, the scores are transductive, whatever the dataset says of itself.
    """

    def question_set(control: str) -> EvaluationSet:
        return EvaluationSet(store, data, split, config.num_views, seed, control, max_tasks, subsets)

    questions = question_set("none")
    if not any(pair_known(store, query) for query in questions.queries):
        raise UserError(f"{store.path}: none of the {len(questions.tasks)} chosen tasks of split {split} has a query with a known answer")
    pairs = store.metadata.layout == "pairs"

    def scored(asked: EvaluationSet, votes: VoteTable, control: str = "none") -> list[Score]:
        answered = _answered(asked, votes)
        return score_pairs(answered, control) if pairs else score(answered, config.pass_ks, control)

    table = store.grid_table.to(device)
    canvas_scores = CanvasScores(store, table, objective)
    votes = predict(model, questions, table, config.batch_size, world, report, canvas_scores.add)
    scores = scored(questions, votes)
    for control in config.controls:
        if control == "copy_input":
            scores += scored(questions, copy_input(questions), control)
        elif not pairs:
            asked = question_set(control)
            scores += scored(asked, predict(model, asked, table, config.batch_size, world, report), control)
    seen = tasks_seen(store, questions.tasks, trained_pairs)
    protocol = "transductive" if len(seen) or store.metadata.layout == "puzzle" else "inductive"
    records = [_record(questions, votes, i, query, protocol) for i, query in enumerate(questions.queries)]
    statuses = [record["status"] for record in records]
    counts = {"tasks": len(questions.tasks), "queries": len(records)}
    counts |= {name: statuses.count(name) for name in ("scored", "no_prediction", "unlabelled", "answer_exceeds_canvas")}
    notes = []
    if len(seen):
        notes.append(f"{len(seen)} of the {len(questions.tasks)} tasks share a pair with the training data, up to symmetry and colours")
    if pairs:
        notes.append("every puzzle is asked once, without votes; it has no demonstrations, so only copy_input can be a control")
    elif questions.num_views < config.num_views:
        notes.append(f"one view instead of {config.num_views}: the model was trained without turned grids")
    if questions.truncated:
        notes.append(
            f"{len(questions.truncated)} tasks have more than data.max_demos={data.max_demos} demonstrations; the first ones were used"
        )
    if questions.too_large:
        notes.append(f"{len(questions.too_large)} queries are larger than the largest canvas ({data.sides[-1]}) and count as wrong")
    return Evaluation(
        protocol=protocol,
        num_views=questions.num_views,
        scores=scores,
        means=canvas_scores.means(),
        counts=counts,
        records=records,
        submission=_submission(questions, votes),
        puzzles={store.task_ids[task]: _puzzle(questions, int(task)) for task in questions.tasks},
        notes=notes,
    )


def write_files(folder: Path, evaluation: Evaluation, about: dict[str, Any], with_report: bool) -> None:
    """results.json, per_example.jsonl, submission.json and report.html in `folder`: all of them or none."""
    scores = [s.to_json() for s in evaluation.scores]
    results = {"protocol": evaluation.protocol, **about, "counts": evaluation.counts, "notes": evaluation.notes, "scores": scores}
    results["means"] = evaluation.means
    with directory_written_whole(folder, marker="results.json") as temporary:
        write_json(temporary / "results.json", results, indent=1)
        write_json(temporary / "submission.json", evaluation.submission)
        lines = "".join(json.dumps(record) + "\n" for record in evaluation.records)
        (temporary / "per_example.jsonl").write_text(lines, encoding="utf-8")
        if with_report:
            write_report(temporary / "report.html", results, evaluation.records, evaluation.puzzles)


def pair_known(store: Store, query: Query) -> bool:
    """Whether the answer to `query` is known."""
    return bool(store.pair_output[query.pair] >= 0)


def _truth(questions: EvaluationSet, query: Query) -> np.ndarray | None:
    return questions.store.pair(query.pair).output


def _answered(questions: EvaluationSet, votes: VoteTable) -> list[Answered]:
    labelled = ((i, query, _truth(questions, query)) for i, query in enumerate(questions.queries) if questions.asked[i])
    return [Answered(query.task, votes.ranked(i), truth) for i, query, truth in labelled if truth is not None]


def _record(questions: EvaluationSet, votes: VoteTable, number: int, query: Query, protocol: str) -> dict[str, Any]:
    candidates, truth = votes.ranked(number), _truth(questions, query)
    answered = None if truth is None else Answered(query.task, candidates, truth)
    if answered is None:
        status = "unlabelled"
    elif not candidates:
        status = "no_prediction"
    else:
        status = "scored" if questions.answer_fits(query) else "answer_exceeds_canvas"
    rank = answered.rank if answered else None
    return {
        "task": questions.store.task_ids[query.task],
        "query": query.number,
        "protocol": protocol,
        "status": status,
        "num_votes": sum(candidate.votes for candidate in candidates),
        "input_hash": grid_hash(questions.store.pair(query.pair).input),
        "label_hash": None if truth is None else grid_hash(truth),
        "top1_pred_hash": grid_hash(candidates[0].grid) if candidates else None,
        "top1_correct": None if truth is None else rank == 1,
        "rank_of_truth": rank,
        "candidates": [
            {
                "grid": candidate.grid.tolist(),
                "votes": candidate.votes,
                "q": round(candidate.q, 6),
                "correct": None if truth is None else bool(np.array_equal(candidate.grid, truth)),
            }
            for candidate in candidates[:REPORTED_CANDIDATES]
        ],
    }


def grid_hash(grid: np.ndarray) -> str:
    """sha256 of shape and cells, as the ancestors' records have it."""
    return hashlib.sha256(bytes(grid.shape) + np.ascontiguousarray(grid, np.uint8).tobytes()).hexdigest()


def _submission(questions: EvaluationSet, votes: VoteTable) -> dict[str, list[dict]]:
    """The ARC Prize format: two attempts for every query of every task; the second repeats the first if there is one answer."""
    submission: dict[str, list[dict]] = {questions.store.task_ids[task]: [] for task in questions.tasks}
    for number, query in enumerate(questions.queries):
        submission[questions.store.task_ids[query.task]].append(attempts(votes.ranked(number)))
    return submission


def attempts(ranked: list[Candidate]) -> dict[str, list[list[int]]]:
    """attempt_1 and attempt_2 from the best answers."""
    grids = [candidate.grid.tolist() for candidate in ranked[:SUBMISSION_ATTEMPTS]] or [PLACEHOLDER]
    return {f"attempt_{i + 1}": grids[min(i, len(grids) - 1)] for i in range(SUBMISSION_ATTEMPTS)}


def _puzzle(questions: EvaluationSet, task: int) -> dict:
    """What was asked of `task`: with split=train every pair is a query in turn, so the demonstrations are all pairs."""
    asked = [query for query in questions.queries if query.task == task]
    pairs = questions.store.task(task).demonstrations

    def pair_json(pair: Pair) -> dict:
        return {name: grid.tolist() for name, grid in (("input", pair.input), ("output", pair.output)) if grid is not None}

    return {"train": [pair_json(pair) for pair in pairs], "test": [pair_json(questions.store.pair(query.pair)) for query in asked]}
