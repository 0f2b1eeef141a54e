"""One evaluation: predictions, votes, scores with their controls, and the files that hold them."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator

from dataset.batch import DataConfig
from dataset.layouts import Layout
from dataset.leaks import tasks_seen
from dataset.store import Store
from dataset.task import Pair
from dataset.views import EvaluationSet, Query
from evaluation import predictions as stored
from evaluation.canvas_scores import NAMES, CanvasScores
from evaluation.inference import VoteStop, collect, copy_input, predict
from evaluation.metrics import Answered, Score, score, score_pairs
from evaluation.predictions import Predictions
from evaluation.protocols import (
    Adaptation,
    AsItIsConfig,
    LatentSearch,
    ProtocolConfig,
    adaptation_of,
    described,
    label,
)
from evaluation.refinement import refinements
from evaluation.report import write_report
from evaluation.task_training import TaskTraining
from evaluation.voting import Candidate, Ranking, VoteTable, key_of
from models.core import RecursiveModel
from models.losses import ObjectiveConfig
from utils.config import Config
from utils.distributed import World
from utils.errors import UserError
from utils.files import as_json, directory_written_whole, write_json

RESULTS = "results.json"  # what marks an evaluation's folder
SUBMISSION_ATTEMPTS = 2
REPORTED_CANDIDATES = 5
AS_IT_IS = AsItIsConfig(name="auto")
PLACEHOLDER = [[0]]  # a submission needs an entry for every query, also where nothing was predicted

CONTROLS = Literal["query_only", "shuffled_demonstrations", "copy_input"]


class VotingConfig(Config):
    """num_views: augmented views per query that vote. controls: what the score is compared with, on the same queries.
    ranking: how votes order the answers (`VoteTable`). vote_stop: leave out the views of a query whose first max(pass_ks)
    answers are certain.
    """

    num_views: PositiveInt
    batch_size: PositiveInt
    pass_ks: Annotated[list[PositiveInt], Field(min_length=1)]
    ranking: Ranking
    vote_stop: bool
    controls: list[CONTROLS]

    @model_validator(mode="after")
    def _check_voting(self) -> "VotingConfig":
        if self.vote_stop and self.ranking == "confidence":
            raise ValueError(
                "vote_stop=true saves nothing with ranking=confidence: any further view could change the first answer"
            )
        return self


@dataclass
class Evaluation:
    """What an evaluation found.

    adaptation: the protocol by which tasks were adapted to, which differs from `protocol` where training has seen tasks.
    num_views: at most so many views per query. predictions: the model's own, and the seconds that they took. by_subset: the scores
    of each subset, where there are several. means: of single views (`CanvasScores`). counts: queries by status, and views asked.
    answered: every query with its ranked answers. with_steps: whether the predictions hold every ACT step.
    """

    protocol: str
    adaptation: str | None
    num_views: int
    questions: EvaluationSet
    predictions: Predictions
    prediction_seconds: float
    scores: list[Score]
    by_subset: dict[str, list[Score]]
    means: dict[str, float]
    counts: dict[str, int]
    answered: list[Answered]
    with_steps: bool
    notes: list[str]

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """One per query, as per_example.jsonl has them."""
        records = records_of(self.questions, self.answered, self.protocol)
        for number, steps in refinements(self.predictions).items() if self.with_steps else ():
            records[number]["steps"] = steps
        return records

    @property
    def submission(self) -> dict[str, list[dict]]:
        """The ARC Prize format: two attempts for every query of every task; the second repeats the first if there is one answer."""
        names = self.questions.store.task_ids
        submission: dict[str, list[dict]] = {names[task]: [] for task in self.questions.tasks}
        for query, found in zip(self.questions.queries, self.answered, strict=True):
            submission[names[query.task]].append(attempts(found.candidates))
        return submission

    @property
    def puzzles(self) -> dict[str, dict]:
        """What was asked, in the ARC format: with split=train every pair is a query in turn, so the demonstrations are all pairs."""
        store = self.questions.store
        puzzles = {
            store.task_ids[task]: {
                "train": [_pair_json(pair) for pair in store.task(int(task)).demonstrations],
                "test": [],
            }
            for task in self.questions.tasks
        }
        for query in self.questions.queries:
            puzzles[store.task_ids[query.task]]["test"].append(_pair_json(store.pair(query.pair)))
        return puzzles

    @property
    def described(self) -> str:
        """The protocol in words."""
        return described(self.protocol, self.adaptation)

    def metrics(self) -> dict[str, float]:
        """Name -> value, controls as `name/control`."""
        return self.means | {one.name: one.value for one in self.scores}


def metric_names(config: VotingConfig, layout: Layout) -> list[str]:
    """What `Evaluation.metrics` has where answers are known and fit their canvas."""
    controls = ("none", *_controls(config, layout))
    scores = [one.name for control in controls for one in _scores([], config, layout, control)]
    return list(dict.fromkeys([*(f"all.{name}" for name in NAMES), *scores]))


def _controls(config: VotingConfig, layout: Layout) -> list[str]:
    """The configured controls, of which games without demonstrations have only `copy_input`."""
    return [control for control in config.controls if control == "copy_input" or not layout.shares_rule]


def _scores(answered: list[Answered], config: VotingConfig, layout: Layout, control: str) -> list[Score]:
    return score_pairs(answered, control) if layout.shares_rule else score(answered, config.pass_ks, control)


def evaluate(
    model: RecursiveModel,
    store: Store,
    data: DataConfig,
    config: VotingConfig,
    objective: ObjectiveConfig,
    device: torch.device,
    world: World,
    *,
    seed: int,
    trained_pairs: np.ndarray,
    protocol: ProtocolConfig = AS_IT_IS,
    split: str = "test",
    subsets: list[str] | None = None,
    max_tasks: int | None = None,
    record_steps: bool = False,
    report: Callable[[int], None] = lambda views: None,
) -> Evaluation:
    """Predict, vote and score a split, with every configured control on the same queries (all processes together).

    `trained_pairs` are the fingerprints of what the weights were trained on, in this run and before: if an evaluated task shares a
    pair with them, or the model has learned rows of the tasks, the scores are transductive, whatever the dataset says of itself.
    `protocol` says what may be done with a task's demonstrations before it is asked, in the controls too.
    `record_steps` keeps the model's answers after every ACT step in the predictions; votes count the last ones.
    Where no answer is known there are no scores, and no controls to compare them with; the submission is complete.
    """

    def question_set(control: str) -> EvaluationSet:
        return EvaluationSet(store, data, split, config.num_views, seed, control, max_tasks, subsets)

    questions = question_set("none")
    labelled = any(pair_known(store, query) for query in questions.queries)
    layout = store.layout
    seen = tasks_seen(store, questions.tasks, trained_pairs)
    found_protocol = label(protocol, store, seen)
    adaptation = adaptation_of(protocol, objective, seed, config.batch_size, layout)
    if config.vote_stop and isinstance(adaptation, TaskTraining):
        raise UserError(
            "vote_stop=true would train every task again for each round of views with protocol=test_time_training"
        )
    if config.ranking == "agreement" and not layout.reads_demonstrations:
        raise UserError("ranking=agreement asks the demonstrations, which only a model with an encoder reads")
    if config.ranking == "agreement" and isinstance(adaptation, LatentSearch) and protocol.start == "mean":
        raise UserError(
            "ranking=agreement would ask contexts that protocol.start=mean has not searched; use protocol.start=encoder"
        )
    stop = VoteStop(max(config.pass_ks), config.ranking) if config.vote_stop else None
    table = store.grid_table.to(device)

    scores: list[Score] = []
    notes: list[str] = []
    subset_of = {task: store.subset_names[store.task_subset[task]] for task in questions.tasks.tolist()}
    names = list(dict.fromkeys(subset_of.values()))
    by_subset: dict[str, list[Score]] = {name: [] for name in names} if labelled and len(names) > 1 else {}

    def add_scores(asked: EvaluationSet, answered: list[Answered], control: str = "none") -> None:
        known = [
            query
            for query, was_asked in zip(answered, asked.asked, strict=True)
            if was_asked and query.truth is not None
        ]
        scores.extend(_scores(known, config, layout, control))
        for name, own in by_subset.items():
            own.extend(
                _scores([query for query in known if subset_of[query.task] == name], config, layout, control)
            )

    canvas_scores = CanvasScores(store, table, objective)
    started = time.monotonic()
    how = {"adaptation": adaptation, "stop": stop}
    predictions = collect(
        *(model, questions, table, config.batch_size, world, report, canvas_scores.add),
        **how,
        every_step=record_steps,
        with_agreement=config.ranking == "agreement",
    )
    prediction_seconds = time.monotonic() - started
    answered = answered_of(questions, predictions.vote(config.ranking))
    if labelled:
        add_scores(questions, answered)
    for control in _controls(config, layout) if labelled else ():
        if control == "copy_input":
            add_scores(questions, answered_of(questions, copy_input(questions)), control)
        else:
            asked = question_set(control)
            votes = predict(
                model, asked, table, config.batch_size, world, report, **how, ranking=config.ranking
            )
            add_scores(asked, answered_of(asked, votes), control)
            lonely = len(
                {
                    query.task
                    for query, was_asked in zip(asked.queries, asked.asked, strict=True)
                    if not was_asked
                }
            )
            if lonely:
                notes.append(
                    f"{control}: {lonely} of {len(asked.tasks)} tasks left out, no other's demonstrations fit on their canvas"
                )
    statuses = [
        _status(questions, query, found) for query, found in zip(questions.queries, answered, strict=True)
    ]
    counts = {"tasks": len(questions.tasks), "queries": len(statuses)}
    counts |= {
        name: statuses.count(name)
        for name in ("scored", "no_prediction", "unlabelled", "answer_exceeds_canvas")
    }
    views = len(predictions.rows()["query"])
    counts["views"] = views
    if not labelled:
        notes.append(
            "no answer to these tasks is known: nothing was scored; the submission holds what the model answers"
        )
    if seen:
        notes.append(seen.why)
    if isinstance(adaptation, Adaptation):
        too_few = sum(
            not questions.can_adapt(query) for query in questions.queries if query not in questions.too_large
        )
        if too_few:
            notes.append(
                f"{too_few} queries have too few demonstrations for {protocol.name} and were answered without"
            )
    if layout.shares_rule:
        notes.append(
            "every puzzle is asked once, without votes; it has no demonstrations, so only copy_input can be a control"
        )
    elif questions.num_views < config.num_views:
        notes.append(f"one view instead of {config.num_views}: the model was trained without turned grids")
    if questions.truncated:
        notes.append(
            f"{len(questions.truncated)} tasks have more than data.max_demos={data.max_demos} demonstrations; the first ones were used"
        )
    if questions.too_large:
        notes.append(
            f"{len(questions.too_large)} queries are larger than the largest canvas ({data.sides[-1]}) and count as wrong"
        )
    if stop:
        asked_in_full = sum(
            questions.views_of(query) for query in questions.queries if query not in questions.too_large
        )
        notes.append(
            f"{views} of {asked_in_full} views were asked: a query's votes stopped once its first {stop.k} answers were certain"
            + (
                ", the second attempt in the submission may differ from the full vote's"
                if stop.k < SUBMISSION_ATTEMPTS
                else ""
            )
        )
    return Evaluation(
        protocol=found_protocol,
        adaptation=protocol.name if adaptation else None,
        num_views=questions.num_views,
        questions=questions,
        predictions=predictions,
        prediction_seconds=prediction_seconds,
        scores=scores,
        by_subset=by_subset,
        means=canvas_scores.means(),
        counts=counts,
        answered=answered,
        with_steps=record_steps,
        notes=notes,
    )


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
    """results.json, per_example.jsonl, submission.json, report.html and predictions.npz in `folder`: all of them or none.

    metrics and contexts are what the report draws beside the answers (`render_report`).
    """
    scores = [s.to_json() for s in evaluation.scores]
    by_subset = {name: [s.to_json() for s in own] for name, own in evaluation.by_subset.items()}
    results = {
        "protocol": evaluation.protocol,
        **about,
        "prediction_seconds": round(evaluation.prediction_seconds, 3),
    }
    results |= {
        "counts": evaluation.counts,
        "notes": evaluation.notes,
        "scores": scores,
        "by_subset": by_subset,
        "means": evaluation.means,
    }
    with directory_written_whole(folder, marker=RESULTS) as temporary:
        write_json(temporary / RESULTS, results, indent=1)
        write_json(temporary / "submission.json", evaluation.submission)
        lines = "".join(json.dumps(as_json(record), allow_nan=False) + "\n" for record in evaluation.records)
        (temporary / "per_example.jsonl").write_text(lines, encoding="utf-8")
        if with_predictions:
            save_predictions(temporary / stored.FILE, evaluation)
        if with_report:
            write_report(
                temporary / "report.html", results, evaluation.records, evaluation.puzzles, metrics, contexts
            )


def pair_known(store: Store, query: Query) -> bool:
    """Whether the answer to `query` is known."""
    return bool(store.pair_output[query.pair] >= 0)


def save_predictions(path: Path, evaluation: Evaluation) -> None:
    """The model's predictions with the queries and their known answers (evaluation/predictions.py)."""
    questions = evaluation.questions
    truths = [_truth(questions, query) for query in questions.queries]
    stored.save(
        path,
        evaluation.predictions,
        [questions.store.task_ids[query.task] for query in questions.queries],
        [query.number for query in questions.queries],
        [None if truth is None else key_of(truth) for truth in truths],
    )


def _truth(questions: EvaluationSet, query: Query) -> np.ndarray | None:
    return questions.store.pair(query.pair).output


def answered_of(questions: EvaluationSet, votes: VoteTable) -> list[Answered]:
    """Every query with its answers, ranked here and nowhere else."""
    return [
        Answered(query.task, votes.ranked(i), _truth(questions, query))
        for i, query in enumerate(questions.queries)
    ]


def _status(questions: EvaluationSet, query: Query, answered: Answered) -> str:
    if answered.truth is None:
        return "unlabelled"
    if not answered.candidates:
        return "no_prediction"
    return "scored" if questions.answer_fits(query) else "answer_exceeds_canvas"


def records_of(questions: EvaluationSet, answered: list[Answered], protocol: str) -> list[dict[str, Any]]:
    """One record per query, as per_example.jsonl has them."""
    asked = zip(questions.queries, answered, strict=True)
    return [
        _record(questions, query, found, _status(questions, query, found), protocol) for query, found in asked
    ]


def _record(
    questions: EvaluationSet, query: Query, answered: Answered, status: str, protocol: str
) -> dict[str, Any]:
    candidates, truth, rank = answered.candidates, answered.truth, answered.rank
    return {
        "task": questions.store.task_ids[query.task],
        "puzzle_name": questions.store.task_ids[query.task],  # the ancestors' name for it
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
                **({} if candidate.agreement is None else {"agreement": round(candidate.agreement, 6)}),
                "correct": None if truth is None else bool(np.array_equal(candidate.grid, truth)),
            }
            for candidate in candidates[:REPORTED_CANDIDATES]
        ],
    }


def grid_hash(grid: np.ndarray) -> str:
    """sha256 of shape and cells, as the ancestors' records have it."""
    return hashlib.sha256(bytes(grid.shape) + np.ascontiguousarray(grid, np.uint8).tobytes()).hexdigest()


def attempts(ranked: list[Candidate]) -> dict[str, list[list[int]]]:
    """attempt_1 and attempt_2 from the best answers."""
    grids = [candidate.grid.tolist() for candidate in ranked[:SUBMISSION_ATTEMPTS]] or [PLACEHOLDER]
    return {f"attempt_{i + 1}": grids[min(i, len(grids) - 1)] for i in range(SUBMISSION_ATTEMPTS)}


def _pair_json(pair: Pair) -> dict:
    return {
        name: grid.tolist()
        for name, grid in (("input", pair.input), ("output", pair.output))
        if grid is not None
    }
