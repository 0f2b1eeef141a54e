"""Drafts: what the demonstrations say of each cell, looked up and not learned.

A way of looking says which cells count as equal: those that show the same colour, or the same colour at their
mirror image, or a colour and a condition (models/conditions.py). The demonstrations then say what becomes of
such a cell. A way is worth the more, the fewer of their cells it leaves open and the fewer kinds of cells it
tells apart. The best way answers every grid of the task. Encoder and recursion read these answers beside the
inputs, so that what is left to them is where and why the draft is wrong.
Shapes: B batch, K demonstrations, L cells, G = K + 1 grids, the query last, W ways, V vocabulary, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from dataset.batch import BatchData
from dataset.canvas import ARC, PAD, VOCAB_SIZE
from models.conditions import CONDITIONS, TRAITS, VALUES, ConditionName, traits_of, values_of
from models.grids import Grids
from models.layers import Embedding, Linear
from models.relations import RELATIONS, RelationName, places_of

DRAFTS = "drafts"  # beside a sample's data: (B, DRAFTS_PER_GRID, G, L) tokens
DRAFTS_PER_GRID = 3
NOWHERE = VOCAB_SIZE  # in the place of a colour: the way looks at no cell
SAME = VOCAB_SIZE  # in the place of an answer: the colour that is looked at
TOKENS = VOCAB_SIZE + 1
KIND = 0.5  # cells that a further kind of cells costs, chosen on training tasks of rung (a)
FIRST_DRAFT = 5.0  # its logit at the start of training, where a few units make an answer sure
MOST_DOUBT = 7  # wrong cells, from which on a draft is as bad as any
ORDER = 1e-4  # the same for every way before: of equals the first is taken, on every device


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
    answers = data["demo_labels"][:, None]
    counted = (answers >= ARC.first) & data["demo_mask"][:, None, :, None]
    return (counted & (data[DRAFTS][:, :, :-1] != answers)).sum(3)


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


@dataclass(frozen=True)
class _Ways:
    """W ways of looking from every cell.

    shown: (B, W, G, L), the colour that is seen, or `NOWHERE`.
    keys: (B, W, G, L), the kind that the cell belongs to, 0..kinds - 1.
    """

    shown: Tensor
    keys: Tensor
    kinds: int

    def __getitem__(self, ways: Tensor) -> "_Ways":
        """One way of each task, (B,)."""
        rows = torch.arange(len(ways), device=ways.device)
        return _Ways(self.shown[rows, ways][:, None], self.keys[rows, ways][:, None], self.kinds)

    def grids(self) -> Tensor:
        """What one way sees (W = 1), as grids (B, G, L)."""
        return torch.where(self.shown == NOWHERE, PAD, self.shown)[:, 0]


@torch.no_grad()
def drafts_of(settings: DraftSettings, inputs: Tensor, answers: Tensor, mask: Tensor) -> Tensor:
    """The drafts (B, DRAFTS_PER_GRID, G, L) of all grids of each task, PAD where nothing is known.

    inputs: (B, G, L). answers: (B, K, L) of the demonstrations, of which only coloured cells count.
    mask: (B, K), the demonstrations that are there.
    """
    answers = torch.where(mask[..., None], answers, PAD).long()
    ways = _looking(inputs.long(), settings.places)
    found = _found(ways, answers, of_each=True)
    pair = _pair(found, ways)
    # What a task's grids may look like before they are told apart: as the best way sees them, and as the best
    # way of looking on from there does.
    seen = [ways[_worth(found.sum(1, dtype=torch.int16)).argmax(1)]]
    for name in settings.conditions:
        if name in RELATIONS:
            ways = _looking(seen[0].grids(), [name])
            seen.append(ways[_worth(_found(ways, answers)[:, 0]).argmax(1)])
    conditions = [name for name in settings.conditions if name in CONDITIONS]
    options = [each for way in seen for each in _told_apart(way, conditions)]
    return torch.stack((_best(options, [_found(each, answers)[:, 0] for each in options]), *pair), dim=1)


def _looking(tokens: Tensor, relations: Sequence[str]) -> _Ways:
    """The ways of looking from each cell of grids (B, G, L): at itself, and at its places."""
    flat = rearrange(tokens, "b g l -> (b g) l")
    places = places_of(relations, flat).long()
    seen = flat.gather(1, places.clamp_min(0).flatten(1)).view(places.shape)
    # What moves leaves its cell behind, which then looks nowhere. Outside the grid there is nothing at all.
    nothing = torch.where(flat < ARC.first, PAD, NOWHERE)[..., None]
    shown = torch.cat((flat[..., None], torch.where(places < 0, nothing, seen)), dim=2)
    shown = rearrange(shown, "(b g) l w -> b w g l", b=len(tokens))
    return _Ways(shown, shown, TOKENS)


def _told_apart(way: _Ways, conditions: Sequence[str]) -> list[_Ways]:
    """The ways that see what one way does (W = 1): itself, without colours, and by each condition."""
    options = [way, _Ways(way.shown, _blind(way.shown), TOKENS)]
    grids = Grids(rearrange(way.grids(), "b g l -> (b g) l"), ARC)
    for name in conditions:
        values = rearrange(values_of(name, grids), "(b g) f l -> b f g l", b=len(way.shown))
        shown = way.shown.expand(values.shape)
        # With the colour, with what is left of it without colours, and alone.
        keys = torch.cat([values * TOKENS + each for each in (shown, _blind(shown), 0)], dim=1)
        options.append(_Ways(torch.cat((shown, shown, shown), dim=1), keys, VALUES * TOKENS))
    return options


def _blind(shown: Tensor) -> Tensor:
    """The kind of a cell without its colour: background, coloured or neither."""
    return (shown > ARC.first).long() + 2 * ((shown == ARC.first) | (shown == NOWHERE))


def _found(ways: _Ways, answers: Tensor, of_each: bool = False) -> Tensor:
    """How often the demonstrations have an answer to a kind, (B, K, W, TOKENS, kinds) int16.

    An answer that equals what is looked at is counted as `SAME`. Without `of_each` all demonstrations count
    together, K = 1.
    """
    demos = answers.shape[1]
    shown, keys = ways.shown[:, :, :demos], ways.keys[:, :, :demos]
    answer = torch.where(answers[:, None] == shown, SAME, answers[:, None])
    order = "b w k l -> b k w l" if of_each else "b w k l -> b 1 w (k l)"
    pair = rearrange(answer * ways.kinds + keys, order)
    counted = rearrange((answers >= ARC.first).short()[:, None].expand(answer.shape), order)
    found = torch.zeros(*pair.shape[:3], TOKENS * ways.kinds, dtype=torch.int16, device=keys.device)
    return rearrange(
        found.scatter_add(3, pair, counted), "b k w (answer kind) -> b k w answer kind", answer=TOKENS
    )


def _pair(found: Tensor, ways: _Ways) -> list[Tensor]:
    """The drafts (B, G, L) of two ways of which one or the other explains each demonstration.

    It may be one way twice. Which of the two a query asks for is not looked up.
    """
    explained = found.amax(-2).sum(-1)  # cells (B, K, W)
    count = explained.shape[2]
    together = explained.new_full((len(explained), count, count), -1)
    together.diagonal(dim1=1, dim2=2).zero_()  # two ways must explain more than one
    for of_way in explained.unbind(1):
        together += of_way[:, :, None].maximum(of_way[:, None])
    number = torch.arange(count * count, device=together.device)
    both = (together.flatten(1) * len(number) - number).argmax(1)  # of equal pairs the first
    first, second = both // count, both % count
    rows = torch.arange(len(first), device=first.device)
    share = explained[rows, :, first] - explained[rows, :, second]  # (B, K)
    drafts = []
    for way, told in ((first, share >= 0), (second, share <= 0)):
        told = told | ~told.any(1, keepdim=True)
        of_way = (found[rows, :, way] * rearrange(told, "b k -> b k 1 1")).sum(1)
        drafts.append(_answered(of_way, ways[way]))
    return drafts


def _order(worth: Tensor) -> Tensor:
    return ORDER * torch.arange(worth.shape[-1], device=worth.device, dtype=worth.dtype)


def _worth(found: Tensor) -> Tensor:
    """What each way is worth, (B, W) from found (B, W, TOKENS, kinds).

    It is the number of cells whose answer is the most frequent one of their kind, less the price of kinds.
    """
    most = found.amax(-2)
    worth = most.sum(-1).double() - KIND * (most > 0).sum(-1)
    return worth - _order(worth)


def _best(options: list[_Ways], found: list[Tensor]) -> Tensor:
    """The answers (B, G, L) by the way that is worth most, among all options."""
    worths, answers = [], []
    for ways, counts in zip(options, found, strict=True):
        worth, best = _worth(counts).max(1)
        rows = torch.arange(len(best), device=best.device)
        worths.append(worth)
        answers.append(_answered(counts[rows, best], ways[best]))
    worth = torch.stack(worths, dim=1)
    chosen = (worth - _order(worth)).argmax(1)
    return torch.stack(answers, dim=1)[torch.arange(len(chosen), device=chosen.device), chosen]


def _answered(found: Tensor, way: _Ways) -> Tensor:
    """The most frequent answer to the kind of each cell, (B, G, L) from found (B, TOKENS, kinds)."""
    keys, shown = way.keys[:, 0], way.shown[:, 0]
    # Of equally frequent answers the first is taken, on every device.
    order = rearrange(torch.arange(TOKENS, device=found.device) / (2 * TOKENS), "answer -> answer 1")
    most, known = (found - order).argmax(1), found.amax(1) > 0
    # Where most kinds stay as they are, unseen ones do, too.
    stays = ((most == SAME) & known).sum(1) > ((most != SAME) & known).sum(1)
    most = torch.where(known, most, torch.where(stays, SAME, PAD)[:, None])
    answer = most.gather(1, keys.flatten(1)).view_as(keys)
    answer = torch.where(answer == SAME, shown, answer)
    # Nothing is drawn beside what is seen.
    return torch.where((answer < ARC.first) | (answer == NOWHERE) | (shown < ARC.first), PAD, answer)
