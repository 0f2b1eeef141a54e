"""From a model and an evaluation set to predictions. Answers are never read here."""

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataset import augment, canvas
from dataset.batch import leave_one_out, materialise
from dataset.canvas import GridTable
from dataset.views import EvaluationSet, ViewBatch
from evaluation.predictions import Predictions
from evaluation.protocols import Adaptation, LatentSearch
from evaluation.task_training import TaskTraining
from evaluation.voting import Ranking, VoteTable
from models.act import Answer, StepOutput, solve
from models.core import RecursiveModel
from utils import distributed
from utils.distributed import World

VIEWS_PER_ROUND = 8  # with `VoteStop`, views asked before looking again at which queries are settled


@dataclass(frozen=True)
class VoteStop:
    """Ask no further view of a query whose first k answers are certain under `ranking` (`VoteTable.settled`)."""

    k: int
    ranking: Ranking


@torch.no_grad()
def collect(
    model: RecursiveModel,
    questions: EvaluationSet,
    table: GridTable,
    batch_size: int,
    world: World,
    report: Callable[[int], None] = lambda views: None,
    observe: Callable[[ViewBatch, Answer], None] = lambda batch, answer: None,
    *,
    adaptation: Adaptation | None = None,
    stop: VoteStop | None = None,
    every_step: bool = False,
    with_agreement: bool = False,
) -> Predictions:
    """The answers of all processes to every view of every query, numbered by its position in `questions.queries`.

    `stop` leaves out views that cannot matter any more, the same ones for any batch and world size. `every_step` keeps the
    answer after each ACT step instead of the last one's alone. `report` hears of finished views, `observe` sees each batch's
    last answer. `adaptation` is made of each task's demonstrations before it is asked. `with_agreement`
    also asks each view's demonstrations, and notes the share answered exactly.
    """
    model.eval()
    predictions, votes = Predictions(), VoteTable(stop.ranking if stop else "votes")
    rounds = range(0, questions.num_views, VIEWS_PER_ROUND if stop else questions.num_views)
    unsettled = questions.asked.copy()
    for first in rounds:
        end = first + rounds.step
        mine = Predictions()
        with closing(
            _batches(model, questions, table, batch_size, world, slice(first, end), unsettled, adaptation)
        ) as batches:
            for batch in batches:
                observe(
                    batch,
                    _answer(model, questions, table, batch, mine, adaptation, every_step, with_agreement),
                )
                report(batch.valid)
        new = Predictions()
        new.merge(distributed.gather_objects(mine))
        predictions.merge([new])
        if stop:
            new.vote_into(votes)
            for number in np.flatnonzero(unsettled).tolist():
                remaining = questions.views_of(questions.queries[number]) - end
                unsettled[number] = not votes.settled(number, stop.k, remaining)
    return predictions


def predict(
    model: RecursiveModel,
    questions: EvaluationSet,
    table: GridTable,
    batch_size: int,
    world: World,
    report: Callable[[int], None] = lambda views: None,
    *,
    adaptation: Adaptation | None = None,
    stop: VoteStop | None = None,
    ranking: Ranking = "votes",
) -> VoteTable:
    """The votes of `collect`'s predictions."""
    with_agreement = ranking == "agreement"
    found = collect(
        model,
        questions,
        table,
        batch_size,
        world,
        report,
        adaptation=adaptation,
        stop=stop,
        with_agreement=with_agreement,
    )
    return found.vote(ranking)


def _batches(
    model: RecursiveModel,
    questions: EvaluationSet,
    table: GridTable,
    batch_size: int,
    world: World,
    views: slice,
    queries: np.ndarray,
    adaptation: Adaptation | None,
) -> Iterator[ViewBatch]:
    """This process's share of the chosen views; the model is as it should be for each of them."""
    if isinstance(adaptation, TaskTraining):
        with closing(adaptation.adapted(model, questions, table, queries, world)) as lessons:
            for chosen in lessons:
                yield from questions.batches(batch_size, views=views, queries=chosen)
    else:
        yield from questions.batches(batch_size, world.rank, world.size, views, queries)


def _answer(
    model: RecursiveModel,
    questions: EvaluationSet,
    table: GridTable,
    batch: ViewBatch,
    predictions: Predictions,
    adaptation: Adaptation | None,
    every_step: bool,
    with_agreement: bool,
) -> Answer:
    """Add the model's answers to one batch of views, mapped back to the query's own frame."""

    def keep(rows: Tensor, answer: Answer) -> None:
        tokens = answer.logits.argmax(-1).to(torch.uint8).cpu().numpy()
        grids = canvas.decode(tokens, questions.store.game.vocabulary)
        columns = (rows.tolist(), grids, answer.steps.tolist(), answer.q_halt_logits.tolist())
        for row, grid, step, q in zip(*columns, strict=True):
            if row < batch.valid:
                number, view = int(batch.query[row]), int(batch.view[row])
                transform, colours = questions.view(questions.queries[number], view)
                answer = augment.invert(grid, transform, colours) if grid.size else grid
                predictions.add(number, view, int(step), answer, q, agreed[row])

    def watch(rows: Tensor, output: StepOutput) -> None:
        if every_step:
            keep(rows, Answer(output.logits, output.q_halt_logits, output.carry.steps))

    data = materialise(batch.samples, questions.store, table, with_labels=False).data
    shift = adaptation.shift(model, data) if isinstance(adaptation, LatentSearch) else None
    agreed = agreement(model, data, shift).tolist() if with_agreement else [math.nan] * len(data["inputs"])
    answer = solve(model, data, watch, shift)
    if not every_step:
        keep(torch.arange(len(answer.steps)), answer)
    return answer


@torch.no_grad()
def task_contexts(
    model: RecursiveModel, questions: EvaluationSet, table: GridTable, batch_size: int
) -> dict[str, list[float]]:
    """Task id -> the summary (`Context.summary`) of what the model is told of the task, in the unaugmented view of its first query."""
    model.eval()
    first = np.array([query.number == 0 for query in questions.queries], bool)
    found = {}
    for batch in questions.batches(batch_size, views=slice(0, 1), queries=first):
        data = materialise(batch.samples, questions.store, table, with_labels=False).data
        summaries = model.context(data).summary()[: batch.valid].tolist()
        for number, summary in zip(batch.query[: batch.valid], summaries, strict=True):
            found[questions.store.task_ids[questions.queries[number].task]] = summary
    return found


def agreement(model: RecursiveModel, data: dict[str, Tensor], shift: Tensor | None = None) -> Tensor:
    """(B,) the share of each view's demonstrations that the model answers exactly from the others, 0 where none can be asked."""
    rows, counted = leave_one_out(data)
    size, right = len(data["inputs"]), []
    for start in range(0, len(rows["inputs"]), size):  # as many rows at once as there are views
        part = {name: value[start : start + size] for name, value in rows.items()}
        moved = (
            None if shift is None else shift.repeat_interleave(counted.shape[1], dim=0)[start : start + size]
        )
        labels = part["labels"]
        answered = solve(model, part, shift=moved).logits.argmax(-1)
        right.append(((answered == labels) | (labels == canvas.IGNORE_LABEL_ID)).all(-1))
    return (torch.cat(right).view_as(counted) & counted).sum(1) / counted.sum(1).clamp_min(1)


def copy_input(questions: EvaluationSet) -> VoteTable:
    """The control that answers every query with its own input."""
    votes = VoteTable()
    for number, query in enumerate(questions.queries):
        votes.add(number, 0, questions.store.pair(query.pair).input, 0.0)
    return votes
