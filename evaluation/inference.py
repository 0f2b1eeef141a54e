"""From a model and an evaluation set to votes. Answers are never read here."""

from collections.abc import Callable

import torch

from dataset import augment, canvas
from dataset.batch import materialise
from dataset.canvas import GridTable
from dataset.views import EvaluationSet, ViewBatch
from evaluation.voting import VoteTable
from models.act import Answer, solve
from models.core import RecursiveModel
from utils import distributed
from utils.distributed import World


@torch.no_grad()
def predict(
    model: RecursiveModel,
    questions: EvaluationSet,
    table: GridTable,
    batch_size: int,
    world: World,
    report: Callable[[int], None] = lambda views: None,
    observe: Callable[[ViewBatch, Answer], None] = lambda batch, answer: None,
) -> VoteTable:
    """Votes of all processes over every view of every query, indexed by the query's position in `questions.queries`.

    Each batch runs until every row has halted. `report` hears of finished views, `observe` sees each batch's answer.
    """
    model.eval()
    votes = VoteTable()
    for batch in questions.batches(batch_size, world.rank, world.size):
        data = materialise(batch.samples, questions.store, table, with_labels=False).data
        answer = solve(model, data)
        tokens = answer.logits[: batch.valid].argmax(-1).to(torch.uint8).cpu().numpy()
        q_logits = answer.q_halt_logits[: batch.valid].tolist()
        grids = canvas.decode(tokens, questions.store.game.vocabulary)
        for grid, number, view, q in zip(grids, batch.query[: batch.valid], batch.view[: batch.valid], q_logits, strict=True):
            transform, colours = questions.view(questions.queries[number], view)
            votes.add(int(number), int(view), augment.invert(grid, transform, colours) if grid.size else grid, q)
        observe(batch, answer)
        report(batch.valid)
    merged = VoteTable()
    merged.merge(distributed.gather_objects(votes))
    return merged


def copy_input(questions: EvaluationSet) -> VoteTable:
    """The control that answers every query with its own input."""
    votes = VoteTable()
    for number, query in enumerate(questions.queries):
        votes.add(number, 0, questions.store.pair(query.pair).input, 0.0)
    return votes
