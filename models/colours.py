"""A path for colours: what becomes of a cell is looked up by the colour that it shows.

Each cell of the query is handed the mean of the tokens whose demonstration's input shows the same colour.
That is a rule that recolours. It takes neither attention nor weights.

A rule may look elsewhere for its colour, at a place of the cell under a relation (models/relations.py). Which
place explains the demonstrations is counted, not learned: each way of looking is trusted by how many cells it
leaves open.
Shapes: B batch, Q ways of looking (the cell itself, then each place), K demonstrations, L cells, T tokens,
V vocabulary, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dataset.batch import BatchData
from dataset.canvas import ARC, VOCAB_SIZE
from models.relations import chosen, places_of

DOUBT = 3  # cells that count against looking at the cell itself, at most
KEPT = 4  # ways of looking: the most trusted ones; the others change nothing that could be seen
NO_COLOUR = VOCAB_SIZE  # where there is no place to look at, and of tokens that stand for no cell


def seen(tokens: Tensor, places: Tensor | None = None) -> Tensor:
    """What tokens (N, L) show at each cell and at each of its places (N, L, R): (N, Q, L), Q = 1 + R."""
    if places is None:
        return rearrange(tokens, "n l -> n 1 l")
    by_place = rearrange(places, "n l r -> n r l")
    there = tokens[:, None].expand(by_place.shape).gather(2, by_place.clamp_min(0).long())
    return torch.cat((tokens[:, None], torch.where(by_place >= 0, there, NO_COLOUR)), dim=1)


def one_of_each(shown: Tensor, dtype: torch.dtype) -> Tensor:
    """One or zero for each token of the alphabet, (..., L) -> (..., L, V); `NO_COLOUR` is none of them."""
    return (shown[..., None] == torch.arange(VOCAB_SIZE, device=shown.device)).to(dtype)


@torch.no_grad()
def trust(shown: Tensor, answer: Tensor) -> Tensor:
    """How far each way of looking is trusted, (B, Q) float32 of sum 1.

    A colour stands for what most often becomes of it. Each cell of which it says nothing or something else
    divides the trust by e. The cell itself, which comes first, is asked where nothing explains the
    demonstrations: at most `DOUBT` such cells count against it.

    shown: (B, Q, N), what is seen of the demonstrations' cells.
    answer: (B, N), what becomes of them. Only coloured cells count.
    """
    counted = (answer >= ARC.first).float()
    pairs = torch.zeros(*shown.shape[:2], VOCAB_SIZE * (VOCAB_SIZE + 1), device=shown.device)
    pair = shown.long() * VOCAB_SIZE + answer[:, None]  # places without a cell come last
    pairs = pairs.scatter_add(2, pair, counted[:, None].expand(pair.shape))
    pairs = rearrange(pairs, "b q (seen answer) -> b q seen answer", answer=VOCAB_SIZE)
    left_open = counted.sum(1, keepdim=True) - pairs[:, :, :VOCAB_SIZE].amax(-1).sum(-1)
    left_open = torch.cat((left_open[:, :1].clamp_max(DOUBT), left_open[:, 1:]), dim=1)
    return (-left_open).softmax(dim=1)


@dataclass(frozen=True)
class ColourPath:
    """The ways of looking that are kept, and what they show of the demonstrations.

    of_tokens: (B, Q, T), what the demonstration's input shows at the cell of each token.
    kept: (B, Q), the numbers of the ways among all.
    trusted: (B, Q), of sum 1.
    relations: the names of those whose places are looked at.
    """

    of_tokens: Tensor
    kept: Tensor
    trusted: Tensor
    relations: Sequence[str]

    @classmethod
    def read(cls, data: BatchData, relations: Sequence[str]) -> "ColourPath":
        """From demonstrations, the tokens being the cells of all their canvases."""
        inputs, answers, mask = data["demo_inputs"], data["demo_labels"], data["demo_mask"]
        grids = rearrange(inputs, "b k l -> (b k) l")
        of_pairs = seen(grids, places_of(relations, grids) if relations else None)
        shown = rearrange(of_pairs, "(b k) q l -> b q (k l)", b=len(inputs))
        # A hidden demonstration, all PAD here, explains nothing and counts against nothing.
        answer = rearrange(torch.where(mask[..., None], answers, 0), "b k l -> b (k l)")
        trusted, kept = trust(shown, answer).topk(min(KEPT, shown.shape[1]), dim=1)
        return cls(_of(shown, kept), kept, trusted / trusted.sum(1, keepdim=True), relations)

    def map(self, of_tokens: Tensor) -> "ColourPath":
        """The same for other tokens."""
        return replace(self, of_tokens=of_tokens)

    def __getitem__(self, rows: Tensor) -> "ColourPath":
        return replace(self, of_tokens=self.of_tokens[rows], kept=self.kept[rows], trusted=self.trusted[rows])

    def after_registers(self, count: int) -> "ColourPath":
        """With `count` tokens before that stand for no cell."""
        return self.map(F.pad(self.of_tokens, (count, 0), value=NO_COLOUR))

    def means(self, told: Tensor, mask: Tensor, shown: Tensor) -> Tensor:
        """What each cell of a query is handed, (B, L, D).

        It is the mean of the tokens of the same colour, over all ways of looking as far as each is trusted.

        told: (B, T, D) tokens. mask: (B, T), the valid ones.
        shown: (B, Q, L), what the query shows.
        """
        colours = torch.where(mask[:, None], self.of_tokens, NO_COLOUR)
        same = one_of_each(colours, torch.float32)  # (B, Q, T, V)
        weight = same / same.sum(2, keepdim=True).clamp_min(1)
        means = rearrange(weight, "b q t v -> b (q v) t").to(told.dtype) @ told
        wanted = one_of_each(shown, torch.float32) * rearrange(self.trusted, "b q -> b q 1 1")
        return rearrange(wanted, "b q l v -> b l (q v)").to(told.dtype) @ means


def looked_at(inputs: Tensor, places: Tensor | None, names: Sequence[str], path: ColourPath) -> Tensor:
    """What a query (B, L) shows (B, Q, L) to `path`, from its places under the relations `names`."""
    if not path.relations:
        return seen(inputs)
    assert places is not None, "a path with relations looks at the places of the query"
    return _of(seen(inputs, chosen(places, names, path.relations)), path.kept)


def _of(shown: Tensor, ways: Tensor) -> Tensor:
    """What the given ways (B, W) show, out of all (B, Q, N)."""
    return shown.gather(1, ways[..., None].expand(-1, -1, shown.shape[2]))
