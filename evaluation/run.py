"""One evaluation: predictions, votes, and scores with their controls."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from dataset.leaks import tasks_seen
from dataset.views import Control, EvaluationSet, ViewBatch
from evaluation.adaptation import AS_IT_IS, Adaptation
from evaluation.canvas_scores import CanvasScores
from evaluation.depth import ORACLE, Depth, best_of, by_depth
from evaluation.inference import Inference, VoteStop, copy_input
from evaluation.metrics import AnsweredQuery, Score
from evaluation.notes import notes_of
from evaluation.predictions import Predictions
from evaluation.progress import Progress
from evaluation.protocols import ProtocolConfig, adaptation_of, described, label
from evaluation.records import answers_of, counts_of, known_output, puzzles_of, records_of, submission_of
from evaluation.refinement import refinements
from evaluation.respondent import Respondent
from evaluation.scoreboard import Scoreboard, controls_of
from evaluation.thinking import AS_TRAINED, ThinkingConfig
from evaluation.voting import VoteTable, VotingConfig
from models.act import Answer
from utils import distributed

Split = Literal["test", "train", "validation"]


@dataclass(frozen=True)
class Ask:
    """What a respondent is asked, and how.

    seed: of the views and of whatever an adaptation draws.
    subsets, max_tasks: some subsets of the split only, and their first tasks only; None: all.
    protocol: what may be done with a task's demonstrations before it is asked, in the controls, too.
    keep_predictions: whether every view's answer is kept, on every process, or only counts of votes.
    record_steps: whether the predictions keep the answers after every ACT step; votes count the last ones.
    depth_curve: whether the answers after every ACT step are scored, too.
    thinking: how long, and in how many attempts at a view; in the controls, too.
    """

    seed: int
    split: Split = "test"
    subsets: list[str] | None = None
    max_tasks: int | None = None
    protocol: ProtocolConfig = AS_IT_IS
    keep_predictions: bool = True
    record_steps: bool = False
    depth_curve: bool = False
    thinking: ThinkingConfig = AS_TRAINED

    def questions(self, respondent: Respondent, num_views: int, control: Control = "none") -> EvaluationSet:
        """The views of the queries that are asked."""
        store, data = respondent.store, respondent.data
        questions = EvaluationSet(
            store, data, self.split, num_views, self.seed, control, self.max_tasks, self.subsets
        )
        questions.rollouts = self.thinking.rollouts
        return questions


@dataclass
class Evaluation:
    """What an evaluation found.

    protocol: the label.
    adaptation: the protocol's name if it adapts, which the label hides where training has seen tasks.
    predictions: the model's own, None where they were not kept; and the seconds that they took.
    scores, by_subset: of all tasks, and of each subset where there are several.
    means: of single views, or of single attempts at them (`CanvasScores`).
    depths: the scores after every ACT step, where they were asked for.
    counts: tasks, queries by status, and views asked.
    answers: every query with its ranked answers.
    record_steps: whether the predictions hold every ACT step.
    """

    protocol: str
    adaptation: str | None
    questions: EvaluationSet
    predictions: Predictions | None
    prediction_seconds: float
    scores: list[Score]
    by_subset: dict[str, list[Score]]
    means: dict[str, float]
    depths: list[Depth]
    counts: dict[str, int]
    answers: list[AnsweredQuery]
    record_steps: bool
    notes: list[str]

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """One per query, as per_example.jsonl has them."""
        steps = refinements(self.predictions) if self.predictions and self.record_steps else {}
        return records_of(self.questions, self.answers, self.protocol, steps)

    @property
    def submission(self) -> dict[str, list[dict]]:
        """Two attempts for every query of every task, in the ARC Prize format."""
        return submission_of(self.questions, self.answers)

    @property
    def puzzles(self) -> dict[str, dict]:
        """What was asked, in the ARC format."""
        return puzzles_of(self.questions)

    @property
    def num_views(self) -> int:
        """The most views that a query was asked in."""
        return self.questions.num_views

    @property
    def described(self) -> str:
        """The protocol in words."""
        return described(self.protocol, self.adaptation)

    def metrics(self) -> dict[str, float]:
        """Name -> value, controls as `name/control`."""
        return self.means | {one.name: one.value for one in self.scores}


def evaluate(
    respondent: Respondent, config: VotingConfig, ask: Ask, progress: Progress | None = None
) -> Evaluation:
    """Predict, vote and score, with every configured control on the same queries (all processes together).

    The scores are transductive, whatever the dataset says of itself, in two cases: an evaluated task shares a
    pair with `respondent.trained_pairs`, or the model has learned rows of the tasks. Where no answer is
    known, nothing is scored and no control is asked, but the submission is complete. Raises `UserError` for a
    protocol that is not what it is called, or that goes with neither model nor votes.
    """
    progress = progress or Progress()
    questions = ask.questions(respondent, config.num_views)
    seen = tasks_seen(respondent.store, questions.tasks, respondent.trained_pairs)
    protocol = label(ask.protocol, respondent.store, seen)
    adaptation = adaptation_of(
        ask.protocol, respondent, ask.seed, config.batch_size, config.ranking, config.vote_stop
    )

    inference = Inference(respondent, questions, adaptation, ask.thinking)
    selection = inference.selection  # refused before the work, if at all
    canvas_scores = CanvasScores(respondent.store, respondent.table, respondent.objective)
    started = time.monotonic()
    predictions, votes, views = _answers(inference, config, ask, progress, canvas_scores)
    prediction_seconds = time.monotonic() - started

    answers = answers_of(questions, votes)
    adapted = ask.protocol.name if adaptation.adapts else None
    board = Scoreboard(respondent.store, questions.tasks, config)
    left_out: Mapping[str, int] = {}
    depths: list[Depth] = []
    only_for_curve = ask.depth_curve and not ask.record_steps
    labelled = any(known_output(questions, query) is not None for query in questions.queries)
    if labelled:
        board.add(questions, answers)
        if predictions and questions.rollouts > 1:
            every = answers if selection.select == "votes" else answers_of(questions, predictions.vote())
            board.add(questions, best_of(questions, every), ORACLE)
        if predictions is not None and ask.depth_curve:
            depths = by_depth(questions, predictions, config, selection, inference.clock.until())
        left_out = _score_controls(board, respondent, ask, adaptation, questions, progress)
    return Evaluation(
        protocol=protocol,
        adaptation=adapted,
        questions=questions,
        predictions=predictions.last() if predictions and only_for_curve else predictions,
        prediction_seconds=prediction_seconds,
        scores=board.scores,
        by_subset=board.by_subset,
        means=canvas_scores.means(),
        depths=depths,
        counts=counts_of(questions, answers, views),
        answers=answers,
        record_steps=ask.record_steps,
        notes=notes_of(questions, config, adapted, seen, left_out, labelled, views),
    )


def _answers(
    inference: Inference, config: VotingConfig, ask: Ask, progress: Progress, canvas_scores: CanvasScores
) -> tuple[Predictions | None, VoteTable, int]:
    """The model's predictions, if they are kept, the votes, and how many views were asked.

    They are also kept where more is to be known of them than their votes.
    """

    def observe(batch: ViewBatch, answer: Answer) -> None:
        canvas_scores.add(batch, answer)
        progress.scored(canvas_scores)

    rollouts = inference.questions.rollouts
    progress.begins(inference.questions.rows, "none")
    if ask.keep_predictions or ask.depth_curve or rollouts > 1:
        agreement, every_step = config.ranking == "agreement", ask.record_steps or ask.depth_curve
        predictions = inference.collect(_stop(config), every_step, agreement, progress.answered, observe)
        votes = predictions.vote(config.ranking, selection=inference.selection)
        return predictions, votes, len(predictions.rows()["query"]) // rollouts
    before = progress.views
    votes = inference.predict(config.ranking, _stop(config), progress.answered, observe)
    return None, votes, sum(distributed.gather_objects(progress.views - before))


def _stop(config: VotingConfig) -> VoteStop | None:
    """When no further view of a query is asked."""
    return VoteStop(max(config.pass_ks), config.ranking) if config.vote_stop else None


def _score_controls(
    board: Scoreboard,
    respondent: Respondent,
    ask: Ask,
    adaptation: Adaptation,
    questions: EvaluationSet,
    progress: Progress,
) -> dict[str, int]:
    """Ask every control and add its scores; control -> tasks that it could not ask, where there are any."""
    config, left_out = board.config, dict[str, int]()
    for control in controls_of(config, respondent.store.layout):
        if control == "copy_input":
            board.add(questions, answers_of(questions, copy_input(questions)), control)
            continue
        changed = ask.questions(respondent, config.num_views, control)
        asked = Inference(respondent, changed, adaptation, ask.thinking)
        progress.begins(changed.rows, control)
        votes = asked.predict(config.ranking, _stop(config), progress.answered)
        board.add(changed, answers_of(changed, votes), control)
        not_asked = {
            query.task
            for query, was_asked in zip(changed.queries, changed.asked, strict=True)
            if not was_asked
        }
        if not_asked:
            left_out[control] = len(not_asked)
    return left_out
