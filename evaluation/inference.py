"""From a model and an evaluation set to predictions. Answers are never read here.

Shapes: B views, K demonstrations, T tokens of the context, D hidden, L cells of a canvas.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dataset import augment, canvas
from dataset.batch import leave_one_out, materialise
from dataset.views import EvaluationSet, ViewBatch
from evaluation.adaptation import Adaptation
from evaluation.depth import StepClock
from evaluation.predictions import Predictions
from evaluation.respondent import Respondent
from evaluation.selection import Selection
from evaluation.thinking import AS_TRAINED, ThinkingConfig
from evaluation.voting import Ranking, VoteTable
from models.act import Answer, StepOutput, act_steps, solve
from models.core import RecursiveModel
from models.losses import sample_loss
from utils import distributed

VIEWS_PER_ROUND = 8  # with `VoteStop`, views asked before looking again at which queries are settled

Answered = Callable[[int], None]  # is told how many views have just been answered
Observe = Callable[[ViewBatch, Answer], None]  # is given a batch of views with its last answer


@dataclass(frozen=True)
class VoteStop:
    """Ask no further view of a query whose first k answers are certain (`VoteTable.settled`)."""

    k: int
    ranking: Ranking


@dataclass(frozen=True)
class Inference:
    """A respondent that answers the views of an evaluation set.

    adaptation: what it makes of each task's demonstrations before the task is asked.
    thinking: how each attempt at a view differs; `questions.rollouts` is their number.
    clock: the time of each ACT step, where these are recorded.
    """

    respondent: Respondent
    questions: EvaluationSet
    adaptation: Adaptation
    thinking: ThinkingConfig = AS_TRAINED
    clock: StepClock = field(default_factory=StepClock)

    @torch.no_grad()
    def collect(
        self,
        stop: VoteStop | None = None,
        record_steps: bool = False,
        with_agreement: bool = False,
        progress: Answered = lambda views: None,
        observe: Observe = lambda batch, answer: None,
    ) -> Predictions:
        """The answers of all processes to every view of every query, a row per view and rollout.

        A query's number is its place in `questions.queries`.

        stop: leaves out views that cannot matter any more, the same ones for any batch and world size.
        record_steps: keeps the answer after each ACT step instead of the last one's alone.
        with_agreement: also asks each view's demonstrations, and notes the share answered exactly.
        observe: is given each batch with its last answer.
        """
        predictions, votes = Predictions(), VoteTable(stop.ranking if stop else "votes")
        for views, unsettled in self._rounds(stop, votes):
            mine, everyones = Predictions(), Predictions()
            self._ask(views, unsettled, mine, record_steps, with_agreement, progress, observe)
            everyones.merge(distributed.gather_objects(mine))
            predictions.merge([everyones])
            if stop:
                everyones.vote_into(votes, selection=self.selection)
        return predictions

    @cached_property
    def selection(self) -> Selection:
        """Which attempts at a view vote."""
        return Selection(self.thinking.select, self.questions)

    @torch.no_grad()
    def predict(
        self,
        ranking: Ranking = "votes",
        stop: VoteStop | None = None,
        progress: Answered = lambda views: None,
        observe: Observe = lambda batch, answer: None,
    ) -> VoteTable:
        """The votes of all processes, the same as of the predictions that `collect` finds.

        Only counts travel between processes: an entry per distinct answer instead of a row per view. Where
        there are several attempts at a view, no process may hold them all, and the rows travel.
        """
        votes = VoteTable(ranking)
        for views, unsettled in self._rounds(stop, votes):
            mine, everyones = Predictions(), Predictions()
            agreement = ranking == "agreement"
            self._ask(views, unsettled, mine, False, agreement, progress, observe)
            if self.questions.rollouts > 1:
                everyones.merge(distributed.gather_objects(mine))
                everyones.vote_into(votes, selection=self.selection)
            else:
                votes.merge(distributed.gather_objects(mine.vote(ranking)))
        return votes

    @torch.no_grad()
    def losses(self, number: int, view: int) -> list[float]:
        """The token loss after every ACT step of one view of the query `number`, whose answer is known.

        The ancestor's compute_iteration_losses. An answer larger than its canvas counts as far as it fits.
        """
        model, questions = self.respondent.model.eval(), self.questions
        asked = np.arange(len(questions.queries)) == number
        found: list[float] = []
        with closing(self.adaptation.batches(questions, slice(view, view + 1), asked)) as batches:
            for batch in batches:
                data = materialise(batch.samples, questions.store, self.respondent.table).data
                for _, output in act_steps(model, data, self.adaptation.shift(data)):
                    loss = sample_loss(output.logits, data["labels"], self.respondent.objective)
                    found.append(float(loss[0]))
        return found

    def _rounds(self, stop: VoteStop | None, votes: VoteTable) -> Iterator[tuple[slice, np.ndarray]]:
        """The views to ask next, and which queries (Q,) still need them by the `votes` so far.

        Only whole rounds are looked at, so that every process stops at the same views.
        """
        questions = self.questions
        per_round = VIEWS_PER_ROUND if stop else questions.num_views
        unsettled = questions.asked.copy()
        for first in range(0, questions.num_views, per_round):
            end = first + per_round
            yield slice(first, end), unsettled
            if stop is None:
                continue
            votes_of_view = questions.rollouts if self.thinking.select == "votes" else 1
            for number in np.flatnonzero(unsettled).tolist():
                remaining = questions.num_views_of(questions.queries[number]) - end
                unsettled[number] = not votes.settled(number, stop.k, remaining * votes_of_view)

    def _ask(
        self,
        views: slice,
        queries: np.ndarray,
        predictions: Predictions,
        record_steps: bool = False,
        with_agreement: bool = False,
        progress: Answered = lambda views: None,
        observe: Observe = lambda batch, answer: None,
    ) -> None:
        """Add this process's answers to `views` of `queries` (Q,) bool."""
        self.respondent.model.eval()
        # Closed on an error, too: an adaptation then gives the model its own weights back.
        with closing(self.adaptation.batches(self.questions, views, queries)) as batches:
            for batch in batches:
                observe(batch, self._answer(batch, predictions, record_steps, with_agreement))
                progress(batch.valid)

    def _answer(
        self, batch: ViewBatch, predictions: Predictions, record_steps: bool, with_agreement: bool
    ) -> Answer:
        """Add the model's answers to one batch of views, mapped back to the query's own frame."""
        model, questions, device = self.respondent.model, self.questions, self.respondent.device

        def keep(rows: Tensor, answer: Answer) -> None:
            tokens = answer.logits.argmax(-1).to(torch.uint8).cpu().numpy()
            grids = canvas.decode(tokens, questions.store.game.vocabulary)
            moved = [math.nan] * len(rows) if answer.residual is None else answer.residual.tolist()
            columns = (rows.tolist(), grids, answer.steps.tolist(), answer.q_halt_logits.tolist(), moved)
            for row, grid, step, q_halt_logit, residual in zip(*columns, strict=True):
                if row >= batch.valid:  # repeats another row, to fill the batch
                    continue
                number, view, rollout = (int(of[row]) for of in (batch.query, batch.view, batch.rollout))
                transform, colours = questions.view(questions.queries[number], view)
                original = augment.invert(grid, transform, colours) if grid.size else grid
                agreed = agreements[row]
                predictions.add(number, view, step, original, q_halt_logit, agreed, rollout, residual)

        def watch(rows: Tensor, output: StepOutput) -> None:
            if record_steps:
                self.clock.step_done(device)
                keep(rows, Answer.after(output))
                self.clock.resume()

        data = materialise(batch.samples, questions.store, self.respondent.table, with_labels=False).data
        shift = self.adaptation.shift(data)
        unknown = [math.nan] * len(data["inputs"])
        agreements = agreement(model, data, shift).tolist() if with_agreement else unknown
        rollouts = self.thinking.rollouts_of(questions, batch, self.adaptation.seed, device)
        if record_steps:
            self.clock.start(device)
        answer = solve(model, data, watch, shift, rollouts)
        if not record_steps:
            keep(torch.arange(len(answer.steps)), answer)
        return answer


@torch.no_grad()
def task_contexts(
    respondent: Respondent, questions: EvaluationSet, batch_size: int
) -> dict[str, list[float]]:
    """Task id -> the summary (`Context.summary`) of what the model is told of the task.

    It is that of the unaugmented view of the task's first query.
    """
    model = respondent.model.eval()
    first = np.array([query.number == 0 for query in questions.queries], bool)
    summaries = {}
    for batch in questions.batches(batch_size, views=slice(0, 1), queries=first):
        data = materialise(batch.samples, questions.store, respondent.table, with_labels=False).data
        rows = model.context(data).summary()[: batch.valid].tolist()
        for number, summary in zip(batch.query[: batch.valid], rows, strict=True):
            summaries[questions.store.task_ids[questions.queries[number].task]] = summary
    return summaries


def agreement(model: RecursiveModel, data: dict[str, Tensor], shift: Tensor | None = None) -> Tensor:
    """(B,) the share of each view's demonstrations that the model answers exactly from the others.

    It is 0 where none can be asked. shift (B, T, D): what is added to the contexts.
    """
    rows, counted = leave_one_out(data)  # (B * K, ...), (B, K)
    size, right = len(data["inputs"]), []
    for start in range(0, len(rows["inputs"]), size):  # as many rows at once as there are views
        part = {name: value[start : start + size] for name, value in rows.items()}
        moved = (
            None if shift is None else shift.repeat_interleave(counted.shape[1], dim=0)[start : start + size]
        )
        labels = part["labels"]  # (B, L)
        answered = solve(model, part, shift=moved).logits.argmax(-1)
        right.append(((answered == labels) | (labels == canvas.IGNORE_LABEL_ID)).all(-1))
    return (torch.cat(right).view_as(counted) & counted).sum(1) / counted.sum(1).clamp_min(1)


def copy_input(questions: EvaluationSet) -> VoteTable:
    """The control that answers every query with its own input."""
    votes = VoteTable()
    for number, query in enumerate(questions.queries):
        votes.add(number, 0, questions.store.pair(query.pair).input, 0.0)
    return votes
