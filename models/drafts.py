"""Drafts: what the demonstrations say of each cell, looked up and not learned.

A way of looking (models/ways.py) says which cells count as equal: those that show the same colour, or the
same colour at their mirror image, or a colour and a condition (models/conditions.py). The demonstrations then
say what becomes of such a cell. The way that explains them best answers every grid of the task. Encoder and
recursion read these answers beside the inputs. What is left to them is where and why a draft is wrong.
Shapes: B batch, K demonstrations, L cells, G = K + 1 grids, the query last, V vocabulary, D hidden.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dataset.batch import BatchData
from dataset.canvas import ARC, EOS, PAD, VOCAB_SIZE
from models.conditions import CONDITIONS, TRAITS, ConditionName, traits_of
from models.frames import pairs_of_panels
from models.grids import Grids
from models.layers import Embedding, Linear
from models.relations import RELATIONS, RelationName, count_of
from models.ways import (
    HIDDEN,
    Counts,
    Way,
    Ways,
    as_grids,
    best,
    first_best,
    looking,
    taking_turns,
    together,
    told_apart,
)
from utils.transfer import sent

DRAFTS = "drafts"  # beside a sample's data: (B, DRAFTS_PER_GRID, G, L) tokens
DRAFTS_PER_GRID = 3
OVERLAID = "panels"  # the relation whose places are seen in pairs, too
FIRST_DRAFT = 5.0  # its logit at the start of training, where a few units make an answer sure
MOST_DOUBT = 7  # wrong cells, from which on a draft is as bad as any


class DraftSettings(NamedTuple):
    """What may count as equal.

    places: the relations (models/relations.py) at whose places cells may show the same colour.
    conditions: what they may share besides, there: a condition (models/conditions.py), or the colour at a
        place under a further relation.
    """

    places: list[RelationName]
    conditions: list[ConditionName | RelationName]


def with_drafts(data: BatchData, settings: DraftSettings) -> BatchData:
    """`data` with the drafts of its demonstrations and its query, unless they are there."""
    if DRAFTS in data:
        return data
    inputs = torch.cat((data["demo_inputs"], data["inputs"][:, None]), dim=1)
    drafts = drafts_of(settings, inputs, data["demo_labels"], data["demo_mask"])
    return {**data, DRAFTS: drafts.to(data["inputs"].dtype)}


class DraftReader(nn.Module):
    """What a recursion makes of its query's drafts: they are added to the cells, and may be handed on.

    The first token of the answer state says how much each draft adds to the logits of its colours. It begins
    with the first one, so that training begins at what is looked up. One number for all cells chooses a
    draft: a choice by every cell for itself would mix two answers, each of which may be right.
    Between the last two, traits of the grids vote (`votes_of`). How much each counts is learned.
    """

    def __init__(self, hidden: int, dtype: torch.dtype):
        super().__init__()
        self.table = draft_embedding(hidden, dtype)
        self.doubts = Embedding(2 * (MOST_DOUBT + 1), hidden, dtype)
        self.trait_weights = nn.Parameter(torch.ones(TRAITS))
        self.copy_head = Linear(hidden, DRAFTS_PER_GRID, bias=True)
        self.copy_head.start_at(torch.tensor([FIRST_DRAFT, *[0.0] * (DRAFTS_PER_GRID - 1)]))

    def forward(self, data: BatchData) -> tuple[Tensor, Tensor]:
        """What is added to the embedded cells (B, L, D), and to all tokens (B, 1, D)."""
        wrong = _wrong(data)
        doubts = torch.stack((wrong[:, 0].sum(1), wrong[:, 1:].amin(1).sum(1)), dim=1).clamp_max(MOST_DOUBT)
        kind = torch.arange(2, device=doubts.device)  # of the first draft; of the others together
        of_all = self.doubts(doubts + (MOST_DOUBT + 1) * kind).sum(1, keepdim=True)
        return embedded(self.table, data[DRAFTS][:, :, -1]), of_all

    def handed_on(self, logits: Tensor, state: Tensor, data: BatchData) -> Tensor:
        """Logits (B, L, V) with those of the drafts, as the answer state of one token (B, D) says."""
        of_cells = rearrange(data[DRAFTS][:, :, -1], "b drafts l -> b l drafts").long()
        vote = (votes_of(data) @ self.trait_weights).to(logits.dtype)
        added = self.copy_head(state) + torch.stack((torch.zeros_like(vote), vote, -vote), dim=1)
        added = rearrange(added, "b drafts -> b 1 drafts")
        return logits.scatter_add(2, of_cells, torch.where(of_cells == PAD, 0, added))


def _wrong(data: BatchData) -> Tensor:
    """How many cells of each demonstration each draft has wrong, (B, DRAFTS_PER_GRID, K)."""
    counted = data["demo_mask"][:, None, :, None]
    drafted, answers = (
        torch.where(tokens < ARC.first, PAD, tokens)
        for tokens in (data[DRAFTS][:, :, :-1], data["demo_labels"][:, None])
    )
    return (counted & (drafted != answers)).sum(3)


@torch.no_grad()
def votes_of(data: BatchData) -> Tensor:
    """For which of the last two drafts each trait of the query speaks, (B, TRAITS): 1, -1, or 0 for neither.

    A trait speaks if the demonstrations that one draft answers better are just those that have it, or just
    those that do not.
    """
    wrong = _wrong(data)
    better = (wrong[:, 2] - wrong[:, 1]).sign()  # (B, K)
    grids = torch.cat((data["demo_inputs"], data["inputs"][:, None]), dim=1)
    has = traits_of(Grids(rearrange(grids, "b g l -> (b g) l"), ARC)).float()
    has = 2 * rearrange(has, "(b g) traits -> b g traits", b=len(better)) - 1
    agreed = (better[..., None] * has[:, :-1]).sum(1)  # (B, TRAITS)
    known = better.abs().sum(1, keepdim=True)
    return torch.where((agreed.abs() == known) & (known > 0), agreed.sign() * has[:, -1], 0.0)


def draft_embedding(width: int, dtype: torch.dtype) -> Embedding:
    """A table with rows of its own for each draft of a grid."""
    return Embedding(DRAFTS_PER_GRID * VOCAB_SIZE, width, dtype)


def embedded(table: Embedding, drafts: Tensor) -> Tensor:
    """The sum (B, ..., L, W) of the embeddings of all drafts (B, DRAFTS_PER_GRID, ..., L)."""
    number = torch.arange(DRAFTS_PER_GRID, device=drafts.device).view(-1, *[1] * (drafts.ndim - 2))
    return table(drafts + VOCAB_SIZE * number).sum(1)


def asking_demonstration(data: BatchData, index: Tensor) -> BatchData:
    """The drafts alone, with those of one demonstration of each sample (B,) in the place of the query's."""
    if DRAFTS not in data:
        return {}
    drafts = data[DRAFTS]
    asked = drafts[torch.arange(len(index), device=index.device), :, index]
    return {DRAFTS: torch.cat((drafts[:, :, :-1], asked[:, :, None]), dim=2)}


@torch.no_grad()
def drafts_of(settings: DraftSettings, inputs: Tensor, answers: Tensor, mask: Tensor) -> Tensor:
    """The drafts (B, DRAFTS_PER_GRID, G, L) of all grids of each task, PAD where nothing is known.

    inputs: (B, G, L). answers: (B, K, L) of the demonstrations, of which only coloured cells count.
    mask: (B, K), the demonstrations that are there.
    """
    answers = torch.where(mask[..., None], answers.to(torch.int16), HIDDEN)
    ways = looking(inputs, settings.places)
    of_each = Counts.of(ways, answers, of_each=True)
    plain = best(ways, of_each.of_all(), whole=True)
    found = [plain]

    def look(ways: Ways, whole: bool = False) -> Way:
        return best(ways, Counts.of(ways, answers), whole)

    if OVERLAID in settings.places:
        before = settings.places[: settings.places.index(OVERLAID)]
        found.append(look(together(ways, *_overlaid(count_of(before), inputs.device))))
    # What a task's grids may look like before their cells are told apart: as the best way shows them, and as
    # the best way of looking on from there does.
    seen = [plain.shown]
    for name in settings.conditions:
        if name in RELATIONS:
            found.append(look(looking(as_grids(plain.shown), [name]), whole=True))
            seen.append(found[-1].shown)
    if conditions := [name for name in settings.conditions if name in CONDITIONS]:
        found.extend(look(told_apart(shown, conditions)) for shown in seen)
        chosen = first_best(found)
        found = [chosen, look(chosen.refined(conditions), whole=True)]
    drafts = torch.stack((first_best(found).answers(), *taking_turns(ways, of_each)), dim=1)
    return with_rims(drafts)


@functools.cache
def _overlaid(before: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The ways of looking at panels that are seen in pairs, behind so many at other places: first, second."""
    pairs = 1 + before + torch.tensor(pairs_of_panels())  # the first way looks at the cell itself
    return sent(pairs[:, 0], device), sent(pairs[:, 1], device)


def with_rims(drafts: Tensor) -> Tensor:
    """Drafts (..., L) with EOS below and to the right of what they show, as `dataset.canvas` draws grids."""
    side = math.isqrt(drafts.shape[-1])
    canvas = drafts.unflatten(-1, (side, side))
    coloured = canvas >= ARC.first
    rows, behind_rows = _spans(coloured.any(-1))
    columns, behind_columns = _spans(coloured.any(-2))
    rim = (behind_rows[..., None] & columns[..., None, :]) | (rows[..., None] & behind_columns[..., None, :])
    return torch.where(rim, EOS, canvas).flatten(-2)


def _spans(lines: Tensor) -> tuple[Tensor, Tensor]:
    """The lines (..., C) from the first to the last of some, and the one behind them."""
    ended = lines.flip(-1).cumsum(-1).flip(-1) == 0
    return (lines.cumsum(-1) > 0) & ~ended, F.pad(lines, (1, 0))[..., :-1] & ended
