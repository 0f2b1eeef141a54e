"""A path for colours: what becomes of a cell is looked up by the colour that it shows, without attention and without weights.

Each cell of the query is handed the mean of the tokens whose demonstration's input shows the same colour. That is a rule that
recolours. A rule may look elsewhere for its colour, at a place of the cell under a relation (models/relations.py); which of
them explains the demonstrations is counted, not learned: each way of looking is trusted by how many cells it leaves open.
Shapes: B batch, Q ways of looking (the cell itself, then each place), K demonstrations, L cells, T tokens, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.canvas import ARC, VOCAB_SIZE
from models.relations import chosen, places_of

DOUBT = 3
KEPT = 4  # ways of looking: the most trusted ones; the others change nothing that could be seen
NO_COLOUR = VOCAB_SIZE  # where there is no place to look at, and of tokens that stand for no cell


def seen(tokens: Tensor, places: Tensor | None = None) -> Tensor:
    """What (N, Q, L) tokens (N, L) show at each cell, and at each of its places (N, L, R); Q = 1 + R."""
    if places is None:
        return tokens[:, None]
    there = tokens.gather(1, places.clamp_min(0).flatten(1).long()).view(places.shape)
    return torch.cat((tokens[..., None], torch.where(places >= 0, there, NO_COLOUR)), dim=-1).movedim(-1, 1)


def one_of_each(shown: Tensor, dtype: torch.dtype) -> Tensor:
    """One or zero for each token of the alphabet, (..., L) -> (..., L, V); `NO_COLOUR` is none of them."""
    return (shown[..., None] == torch.arange(VOCAB_SIZE, device=shown.device)).to(dtype)


@torch.no_grad()
def trust(shown: Tensor, answer: Tensor) -> Tensor:
    """How far each way of looking is trusted, (B, Q) float32 of sum 1, from what it shows (B, Q, N) of the demonstrations'
    cells and what becomes of these, `answer` (B, N), where only coloured cells count.

    A colour stands for what most often becomes of it; each cell of which it says nothing or something else divides the trust
    by e. The cell itself, which comes first, is asked where nothing explains the demonstrations: `DOUBT` such cells at most
    count against it.
    """
    counted = (answer >= ARC.first).float()
    pairs = torch.zeros(*shown.shape[:2], VOCAB_SIZE * (VOCAB_SIZE + 1), device=shown.device)
    pair = shown.long() * VOCAB_SIZE + answer[:, None]  # places without a cell come last
    pairs = pairs.scatter_add(2, pair, counted[:, None].expand(pair.shape)).unflatten(2, (-1, VOCAB_SIZE))
    left_open = counted.sum(1, keepdim=True) - pairs[:, :, :VOCAB_SIZE].amax(-1).sum(-1)
    left_open = torch.cat((left_open[:, :1].clamp_max(DOUBT), left_open[:, 1:]), dim=1)
    return (-left_open).softmax(dim=1)


@dataclass(frozen=True)
class ColourPath:
    """of_tokens (B, Q, T): what the demonstration's input shows at the cell of each token in the ways of looking that are kept,
    their numbers kept (B, Q), trusted (B, Q). relations: the names of those whose places are looked at."""

    of_tokens: Tensor
    kept: Tensor
    trusted: Tensor
    relations: Sequence[str]

    @classmethod
    def read(cls, data: dict[str, Tensor], relations: Sequence[str]) -> "ColourPath":
        """From demonstrations, the tokens being the cells of all their canvases."""
        inputs, answers, mask = data["demo_inputs"], data["demo_labels"], data["demo_mask"]
        places = places_of(relations, inputs.flatten(0, 1)) if relations else None
        of_pairs = seen(inputs.flatten(0, 1), places).unflatten(0, inputs.shape[:2])  # (B, K, Q, L)
        shown = of_pairs.transpose(1, 2).flatten(2)
        trusted = trust(shown, torch.where(mask[..., None], answers, 0).flatten(1))
        trusted, kept = trusted.topk(min(KEPT, shown.shape[1]), dim=1)
        trusted = trusted / trusted.sum(1, keepdim=True)
        return cls(_of(shown, kept), kept, trusted, relations)

    def map(self, of_tokens: Tensor) -> "ColourPath":
        """The same for other tokens."""
        return replace(self, of_tokens=of_tokens)

    def __getitem__(self, rows: Tensor) -> "ColourPath":
        return replace(self, of_tokens=self.of_tokens[rows], kept=self.kept[rows], trusted=self.trusted[rows])

    def after_registers(self, count: int) -> "ColourPath":
        """With `count` tokens before that stand for no cell."""
        return self.map(F.pad(self.of_tokens, (count, 0), value=NO_COLOUR))

    def means(self, told: Tensor, mask: Tensor, shown: Tensor) -> Tensor:
        """What each cell of a query is handed (B, L, D), from the tokens `told` (B, T, D), those of `mask` (B, T), and what the
        query shows (B, Q, L): the mean of the tokens of the same colour, over all ways of looking as far as each is trusted."""
        colours = torch.where(mask[:, None], self.of_tokens, NO_COLOUR)
        same = one_of_each(colours, torch.float32)  # (B, Q, T, V)
        weight = same / same.sum(2, keepdim=True).clamp_min(1)
        means = weight.transpose(2, 3).flatten(1, 2).to(told.dtype) @ told  # (B, Q * V, D)
        wanted = one_of_each(shown, torch.float32) * self.trusted[:, :, None, None]  # (B, Q, L, V)
        return wanted.transpose(1, 2).flatten(2).to(told.dtype) @ means


def looked_at(inputs: Tensor, places: Tensor | None, names: Sequence[str], path: ColourPath) -> Tensor:
    """What a query (B, L) shows (B, Q, L) to `path`, from its places under the relations `names`."""
    if not path.relations:
        return seen(inputs)
    return _of(seen(inputs, chosen(places, names, path.relations)), path.kept)


def _of(shown: Tensor, ways: Tensor) -> Tensor:
    """Of what is shown (B, Q, N) that of the given ways (B, W)."""
    return shown.gather(1, ways[..., None].expand(-1, -1, shown.shape[2]))
