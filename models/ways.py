"""Ways of looking: which cells count as equal, and what the demonstrations say becomes of such cells.

A way shows a colour at each cell of the answer, for example that of its mirror image, and sorts the cells
into kinds. It is worth the cells whose answer is the most frequent one of their kind, less half a cell for
each kind, less the cells that it shows beside the answer.
Shapes: B batch, K demonstrations, L cells, G = K + 1 grids, the query last, W ways, T = `TOKENS`, A answers:
the colours, and `SAME`.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dataset.canvas import ARC, PAD, VOCAB_SIZE
from models.conditions import CONDITIONS, values_of
from models.grids import Grids
from models.relations import RELATIONS, places_of
from utils.transfer import sent

NOWHERE = VOCAB_SIZE  # in the place of a colour: the way looks at no cell
SAME = VOCAB_SIZE  # in the place of an answer: the colour that is shown
TOKENS = VOCAB_SIZE + 1
HIDDEN = TOKENS  # in the place of an answer: the demonstration is not there
KIND = 0.5  # cells that a kind costs, chosen on training tasks of rung (a)
ORDER = 1e-4  # the same for every way before: of equals the first is taken, on every device
# What is left of each colour: all of it; whether it is background, coloured or nothing; nothing. And how many
# kinds that makes.
_WIDTHS = (TOKENS, 3, 1)
_LEFT = torch.stack(
    [
        torch.arange(TOKENS),
        torch.tensor([2 if token in (PAD, NOWHERE) else int(token > ARC.first) for token in range(TOKENS)]),
        torch.zeros(TOKENS, dtype=torch.long),
    ]
)
_LUMPS = torch.cat(
    [F.one_hot(left, width) for left, width in zip(_LEFT, _WIDTHS, strict=True)], dim=1
).float()
_OF_WIDTH = torch.block_diag(*(torch.ones(width, 1) for width in _WIDTHS))


@dataclass(frozen=True)
class Ways:
    """W ways of looking at all grids.

    shown: (B, W, G, L), the colour that is seen: `NOWHERE` for none, below the first colour outside the
        answer.
    colours, values: (B, W, G, L), the kind of each cell: 0..T - 1, and 0..count - 1 of its way.
    counts: (W,) how many values each way has: one where cells are told apart by colours alone.
    """

    shown: Tensor
    colours: Tensor
    values: Tensor
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Way:
    """One way for each task.

    worth: (B,) float64.
    shown: (B, G, L). keys: (B, G, L) int64, the kind of each cell.
    found: (B, A, keys), how often the demonstrations have an answer to a kind.
    """

    worth: Tensor
    shown: Tensor
    keys: Tensor
    found: Tensor

    def answers(self) -> Tensor:
        """The most frequent answer to the kind of each cell, (B, G, L)."""
        return answered(self.shown, self.keys, self.found)

    def refined(self, conditions: Sequence[str]) -> Ways:
        """The ways that tell this one's kinds apart by a condition each. Further kinds than T - 1 are one."""
        used = self.found.amax(1) > 0
        number = torch.where(used, used.cumsum(1) - 1, TOKENS).clamp_max(TOKENS - 1).to(self.shown.dtype)
        kinds = number.gather(1, self.keys.flatten(1)).view_as(self.keys)
        return _by(conditions, self.shown, kinds)


def answered(shown: Tensor, keys: Tensor, found: Tensor) -> Tensor:
    """The answers (B, G, L) of a way: what it shows, the kinds of cells, and what is found (B, A, kinds)."""
    # Of equally frequent answers the first is taken, on every device.
    order = torch.arange(found.shape[1], device=found.device) / (2 * TOKENS)
    most = (found - rearrange(order, "answer -> answer 1")).argmax(1) + ARC.first
    known = found.amax(1) > 0
    # Where most kinds stay as they are, unseen ones do, too.
    stays = ((most == SAME) & known).sum(1) > ((most != SAME) & known).sum(1)
    most = torch.where(known, most, torch.where(stays, SAME, PAD)[:, None])
    answer = most.gather(1, keys.flatten(1)).view_as(keys)
    answer = torch.where(answer == SAME, shown, answer)
    # Nothing is drawn beside what is seen.
    return torch.where((answer == NOWHERE) | (shown < ARC.first), PAD, answer)


def as_grids(shown: Tensor) -> Tensor:
    """What a way shows, as grids."""
    return torch.where(shown == NOWHERE, PAD, shown)


def looking(tokens: Tensor, relations: Sequence[str]) -> Ways:
    """The ways of looking from each cell of grids (B, G, L): at itself, and at its places."""
    flat = rearrange(tokens, "b g l -> (b g) l").to(torch.int16)
    places = places_of(relations, flat)
    seen = flat.gather(1, places.clamp_min(0).long().flatten(1)).view(places.shape)
    # A place that is missing in a frame of its own lies outside. Otherwise a cell that moved left nothing.
    missing = torch.cat(
        [
            torch.full(
                (relation.count,), PAD if relation.framed else NOWHERE, dtype=flat.dtype, device=flat.device
            )
            for relation in map(RELATIONS.__getitem__, relations)
        ]
    )
    nothing = torch.where(flat[..., None] < ARC.first, PAD, missing)
    shown = torch.cat((flat[..., None], torch.where(places < 0, nothing, seen)), dim=2)
    shown = rearrange(shown, "(b g) l w -> b w g l", b=len(tokens))
    return Ways(shown, shown, torch.zeros_like(shown), (1,) * shown.shape[1])


def told_apart(shown: Tensor, conditions: Sequence[str]) -> Ways:
    """The ways that see what one way shows (B, G, L), and tell its cells apart by each condition."""
    return _by(conditions, shown, shown)


def _by(conditions: Sequence[str], shown: Tensor, colours: Tensor) -> Ways:
    grids = Grids(rearrange(as_grids(shown), "b g l -> (b g) l").long(), ARC)
    values = torch.cat([values_of(name, grids) for name in conditions], dim=1).to(shown.dtype)
    values = rearrange(values, "(b g) f l -> b f g l", b=len(shown))
    counts = [count for name in conditions for count in CONDITIONS[name].counts]
    shown, colours = (each[:, None].expand(values.shape) for each in (shown, colours))
    return Ways(shown, colours, values, tuple(counts))


def together(ways: Ways, first: Tensor, second: Tensor) -> Ways:
    """The ways that show what some ways (P,) do and tell cells apart by what others (P,) show as well.

    First by its colour, then by whether it is background, coloured or nothing.
    """
    shown, others = ways.shown[:, first].repeat(1, 2, 1, 1), ways.shown[:, second]
    left, _, _ = _lumps(shown.device)
    blind = left[1].to(others.dtype)[others.long()]
    counts = (_WIDTHS[0],) * len(first) + (_WIDTHS[1],) * len(first)
    return Ways(shown, shown, torch.cat((others, blind), dim=1), counts)


class Counts(NamedTuple):
    """What the demonstrations say under W ways; without telling them apart K = 1.

    found: (B, K, A, R, T) float32, how often there is each answer to each kind of the rows R, the values of
        all ways one after the other. An answer that equals what is shown counts as `SAME`.
    beside: (B, K, W) cells that a way shows where there is no answer.
    """

    found: Tensor
    beside: Tensor

    @classmethod
    def of(cls, ways: Ways, answers: Tensor, of_each: bool = False) -> "Counts":
        """answers: (B, K, L), `HIDDEN` where a demonstration is not there."""
        demos = answers.shape[1]
        shown, colours, values = (each[:, :, :demos] for each in (ways.shown, ways.colours, ways.values))
        answer = answers[:, None]
        answer = torch.where(shown < ARC.first, HIDDEN, torch.where(answer == shown, SAME, answer))
        rows, starts = sum(ways.counts), _starts(ways.counts, shown.device)
        row = values + rearrange(starts, "w -> w 1 1")
        index = (answer * rows + row) * TOKENS + colours
        index = rearrange(index, "b w k l -> b k (w l)" if of_each else "b w k l -> b 1 (w k l)").long()
        # Of the same kind as what is added to it, under `vmap` as well.
        table = index.new_zeros(*index.shape[:2], (HIDDEN + 1) * rows * TOKENS, dtype=torch.float32)
        table = table.scatter_add_(2, index, table.new_ones(()).expand(index.shape))
        table = table.unflatten(2, (HIDDEN + 1, rows, TOKENS))
        # What a way shows and no answer does stands in the rows of the tokens that are no colours.
        beside = of_ways(table[:, :, : ARC.first].sum((2, 4)), ways.counts)
        return cls(table[:, :, ARC.first : HIDDEN], beside)

    def of_all(self) -> "Counts":
        """Those of all demonstrations together."""
        return Counts(self.found.sum(1, keepdim=True), self.beside.sum(1, keepdim=True))


def of_ways(of_rows: Tensor, counts: tuple[int, ...]) -> Tensor:
    """The sums (..., W) of what rows (..., R) have, over the rows of each way."""
    if len(counts) == of_rows.shape[-1]:
        return of_rows
    nothing = of_rows.new_zeros(*of_rows.shape[:-1], len(counts))
    return nothing.index_add(-1, _owners(counts, of_rows.device), of_rows)


@functools.cache
def _starts(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """The first row of each way, int32."""
    return sent(torch.tensor([0, *itertools.accumulate(counts[:-1])], dtype=torch.int32), device)


@functools.cache
def _owners(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """The way of each row."""
    return sent(torch.tensor([way for way, count in enumerate(counts) for _ in range(count)]), device)


def _first(worth: Tensor) -> Tensor:
    """Which number of each row (B, N) float64 is the largest, (B,): of equals the first, on every device."""
    return (worth - ORDER * torch.arange(worth.shape[1], device=worth.device, dtype=worth.dtype)).argmax(1)


def best(ways: Ways, counts: Counts, whole: bool = False) -> Way:
    """The way of each task that is worth most. Unless `whole`, it may leave out the colours of kinds, too.

    counts: of all demonstrations together.
    """
    found, beside = (each[:, 0] for each in counts)  # (B, A, R, T), (B, W)
    left, lumps, of_width = _lumps(found.device)
    worth = _cells(found).sum(2)[..., None] if whole else _cells(found @ lumps) @ of_width  # (B, R, 1 or 3)
    worth = of_ways(worth.mT, ways.counts).double() - beside[:, None]
    worth = rearrange(worth, "b left w -> b (left w)")
    chosen = _first(worth)
    how, which = chosen // len(ways.counts), chosen % len(ways.counts)
    rows = torch.arange(len(chosen), device=chosen.device)
    worth = worth[rows, chosen] - ORDER * chosen
    shown, colours, values = (each[rows, which] for each in (ways.shown, ways.colours, ways.values))
    keys = values.long() * TOKENS + left[how].gather(1, colours.long().flatten(1)).view_as(colours)
    # The rows of the way. Behind the last of them stand those of others.
    row = _starts(ways.counts, rows.device).long()[which][:, None] + torch.arange(TOKENS, device=rows.device)
    row, its = row.clamp_max(found.shape[2] - 1), _owners(ways.counts, rows.device)
    table = found[rows[:, None], :, row] * (its[row] == which[:, None])[..., None, None]  # (B, T, A, T)
    table = table @ F.one_hot(left, TOKENS).float()[how][:, None]
    return Way(worth, shown, keys, rearrange(table, "b value answer colour -> b answer (value colour)"))


def _cells(found: Tensor) -> Tensor:
    """The cells with the most frequent answer to each kind, less the price of the kind; answers are dim 1."""
    most = found.amax(1)
    return most - KIND * (most > 0)


@functools.cache
def _lumps(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What is left of each colour (3, T), and maps from colours to all that may be left (T, U), from there to
    the three cases (U, 3)."""
    return sent(_LEFT, device), sent(_LUMPS, device), sent(_OF_WIDTH, device)


def first_best(ways: Sequence[Way]) -> Way:
    """Of several ways of each task the one that is worth most, the first of equals."""
    worth = torch.stack([way.worth for way in ways], dim=1)
    chosen = _first(worth)
    rows = torch.arange(len(chosen), device=chosen.device)

    def of(name: str) -> Tensor:
        return torch.stack([getattr(way, name) for way in ways], dim=1)[rows, chosen]

    return Way(*map(of, ("worth", "shown", "keys", "found")))


def taking_turns(ways: Ways, counts: Counts) -> list[Tensor]:
    """The answers (B, G, L) of two ways of which one or the other explains each demonstration.

    It may be one way twice. Which of the two a query asks for is not looked up. One of the two is the way
    that explains most of all, or most of one demonstration.
    counts: of each demonstration, and of ways with one value.
    """
    found = counts.found  # (B, K, A, W, T)
    explained = found.amax(2).sum(3) - counts.beside  # (B, K, W)
    total = explained.sum(1, keepdim=True).double()
    width = total.shape[2]
    rank = total - ORDER * torch.arange(width, device=total.device)
    # Of one demonstration first, of all only among equals.
    spread = 1 + total.amax(2, keepdim=True) - total.amin(2, keepdim=True)
    ahead = torch.cat((rank, explained * spread + rank), dim=1).argmax(2)
    rows = torch.arange(len(ahead), device=ahead.device)
    of_ahead = explained.gather(2, ahead[:, None].expand(-1, explained.shape[1], -1))  # (B, K, K + 1)
    pairs = of_ahead[..., None].maximum(explained[:, :, None]).sum(1)  # (B, K + 1, W)
    # Two ways must explain more than one.
    pairs = pairs.scatter_add(2, ahead[..., None], torch.ones_like(pairs[..., :1]))
    # Of equal pairs the first by their ways, whatever the order of the demonstrations.
    other = torch.arange(width, device=ahead.device)
    low, high = ahead[..., None].minimum(other).flatten(1), ahead[..., None].maximum(other).flatten(1)
    both = (pairs.flatten(1).double() * width**2 - (low * width + high)).argmax(1)
    first, second = low[rows, both], high[rows, both]
    share = explained[rows, :, first] - explained[rows, :, second]  # (B, K)
    drafts = []
    for way, told in ((first, share >= 0), (second, share <= 0)):
        told = told | ~told.any(1, keepdim=True)
        of_way = (found[rows, :, :, way] * rearrange(told, "b k -> b k 1 1")).sum(1)
        shown = ways.shown[rows, way]
        drafts.append(answered(shown, shown.long(), of_way))
    return drafts
