"""A path for colours: what becomes of a cell is looked up by the colour that it shows.

Each cell of the query is handed the mean of the tokens whose demonstration's input shows the same colour.
That is a rule that recolours. It takes neither attention nor weights.
Shapes: B batch, L cells, T tokens, V vocabulary, D hidden.
"""

import torch
from einops import rearrange
from torch import Tensor

from dataset.canvas import VOCAB_SIZE

NO_COLOUR = VOCAB_SIZE  # of tokens that stand for no cell


def means(told: Tensor, mask: Tensor, colours: Tensor, inputs: Tensor) -> Tensor:
    """The mean of the tokens of its colour for each cell of a query, (B, L, D); zero where there is none.

    told: (B, T, D) tokens. mask: (B, T), the valid ones. colours: (B, T), what stands at their cells.
    inputs: (B, L), what the query shows.
    """
    same = _one_of_each(torch.where(mask, colours, NO_COLOUR))  # (B, T, V)
    weight = same / same.sum(1, keepdim=True).clamp_min(1)
    of_colour = rearrange(weight, "b t v -> b v t").to(told.dtype) @ told
    return _one_of_each(inputs).to(told.dtype) @ of_colour


def _one_of_each(shown: Tensor) -> Tensor:
    """One or zero for each token of the alphabet, (..., L) -> (..., L, V); `NO_COLOUR` is none of them."""
    return (shown[..., None] == torch.arange(VOCAB_SIZE, device=shown.device)).float()
