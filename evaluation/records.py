"""What an evaluation says of every query, in the ancestors' and the ARC Prize's formats."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dataset.task import Pair
from dataset.views import EvaluationSet, Query
from evaluation.metrics import AnsweredQuery
from evaluation.refinement import Step
from evaluation.voting import Candidate, PooledAnswer, VoteTable

SUBMISSION_ATTEMPTS = 2
REPORTED_CANDIDATES = 5
CHECKED_AT_ONCE = 1024  # answers, to bound the memory
PLACEHOLDER = [[0]]  # a submission needs an entry for every query, also where nothing was predicted
STATUSES = ("scored", "no_prediction", "unlabelled", "answer_exceeds_canvas")


def known_output(questions: EvaluationSet, query: Query) -> np.ndarray | None:
    """The answer to a query, None where it is unknown."""
    return questions.store.pair(query.pair).output


def answers_of(questions: EvaluationSet, votes: VoteTable) -> list[AnsweredQuery]:
    """Every query with its answers, ranked here and nowhere else."""
    return answers_from(questions, [votes.ranked(number) for number in range(len(questions.queries))])


def answers_from(questions: EvaluationSet, ranked: list[list[Candidate]]) -> list[AnsweredQuery]:
    """Every query with its answers, best first."""
    passed = _passed(questions, ranked)
    return [
        AnsweredQuery(query.task, candidates, known_output(questions, query), checks)
        for query, candidates, checks in zip(questions.queries, ranked, passed, strict=True)
    ]


def _passed(questions: EvaluationSet, ranked: list[list[Candidate]]) -> list[dict[str, bool]]:
    """Which of the game's checks the best answer to each query passes, by name."""
    store = questions.store
    passed = [dict.fromkeys(store.checks, False) for _ in ranked]
    inputs = [store.pair(query.pair).input for query in questions.queries]
    whole = [
        number
        for number, candidates in enumerate(ranked)
        if store.checks and candidates and candidates[0].grid.shape == inputs[number].shape
    ]
    for start in range(0, len(whole), CHECKED_AT_ONCE):
        part = whole[start : start + CHECKED_AT_ONCE]
        answers = np.stack([ranked[number][0].grid for number in part])
        for name, holds in store.game.passed(np.stack([inputs[number] for number in part]), answers).items():
            for number, one in zip(part, holds.tolist(), strict=True):
                passed[number][name] = one
    return passed


def statuses_of(questions: EvaluationSet, answers: list[AnsweredQuery]) -> list[str]:
    """What became of each query, one of `STATUSES`."""
    return [
        _status(questions, query, answered)
        for query, answered in zip(questions.queries, answers, strict=True)
    ]


def _status(questions: EvaluationSet, query: Query, answered: AnsweredQuery) -> str:
    if answered.truth is None:
        return "unlabelled"
    if not answered.candidates:
        return "no_prediction"
    return "scored" if questions.answer_fits(query) else "answer_exceeds_canvas"


def counts_of(questions: EvaluationSet, answers: list[AnsweredQuery], views: int) -> dict[str, int]:
    """The sizes of an evaluation that asked `views` views: tasks, queries, and the queries of each status."""
    statuses = statuses_of(questions, answers)
    by_status = {name: statuses.count(name) for name in STATUSES}
    return {"tasks": len(questions.tasks), "queries": len(statuses), **by_status, "views": views}


def records_of(
    questions: EvaluationSet,
    answers: list[AnsweredQuery],
    protocol: str,
    steps: Mapping[int, list[Step]],
) -> list[dict[str, Any]]:
    """One record per query, as per_example.jsonl has them.

    steps: the refinements of the queries that have any, by their number.
    """
    records = [
        _record(questions, query, answered, status, protocol)
        for query, answered, status in zip(
            questions.queries, answers, statuses_of(questions, answers), strict=True
        )
    ]
    for number, refinement in steps.items():
        records[number]["steps"] = refinement
    return records


def _record(
    questions: EvaluationSet, query: Query, answered: AnsweredQuery, status: str, protocol: str
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
        **({"checks": dict(answered.passed)} if answered.passed else {}),
        "candidates": [_candidate(candidate, truth) for candidate in candidates[:REPORTED_CANDIDATES]],
    }


def _candidate(candidate: Candidate, truth: np.ndarray | None) -> dict[str, Any]:
    agreement = {} if candidate.agreement is None else {"agreement": round(candidate.agreement, 6)}
    return {
        "grid": candidate.grid.tolist(),
        "votes": candidate.votes,
        "q": round(candidate.q, 6),
        **agreement,
        "correct": None if truth is None else bool(np.array_equal(candidate.grid, truth)),
    }


def grid_hash(grid: np.ndarray) -> str:
    """sha256 of shape and cells, as the ancestors' records have it."""
    return hashlib.sha256(bytes(grid.shape) + np.ascontiguousarray(grid, np.uint8).tobytes()).hexdigest()


def submission_of(questions: EvaluationSet, answers: list[AnsweredQuery]) -> dict[str, list[dict]]:
    """The ARC Prize format: task id -> two attempts for every query, in the order of the queries."""
    names = questions.store.task_ids
    submission: dict[str, list[dict]] = {names[task]: [] for task in questions.tasks}
    for query, answered in zip(questions.queries, answers, strict=True):
        submission[names[query.task]].append(attempts(answered.candidates))
    return submission


def attempts(ranked: Sequence[Candidate | PooledAnswer]) -> dict[str, list[list[int]]]:
    """attempt_1 and attempt_2 from the best answers; a single answer is given twice."""
    grids = [candidate.grid.tolist() for candidate in ranked[:SUBMISSION_ATTEMPTS]] or [PLACEHOLDER]
    return {f"attempt_{i + 1}": grids[min(i, len(grids) - 1)] for i in range(SUBMISSION_ATTEMPTS)}


def puzzles_of(questions: EvaluationSet) -> dict[str, dict]:
    """What was asked, in the ARC format.

    With split=train every pair is a query in turn, so the demonstrations are all pairs.
    """
    store = questions.store
    puzzles = {
        store.task_ids[task]: {
            "train": [_pair_json(pair) for pair in store.task(int(task)).demonstrations],
            "test": [],
        }
        for task in questions.tasks
    }
    for query in questions.queries:
        puzzles[store.task_ids[query.task]]["test"].append(_pair_json(store.pair(query.pair)))
    return puzzles


def _pair_json(pair: Pair) -> dict:
    grids = (("input", pair.input), ("output", pair.output))
    return {name: grid.tolist() for name, grid in grids if grid is not None}
