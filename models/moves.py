"""Where cells come from when coloured cells move through the background of their grid.

A place is the cell where a cell's content was before. What was left behind looks nowhere.
Shapes: N grids, C the canvas side, L = C * C cells, R places per cell.
"""

import torch
from einops import rearrange
from torch import Tensor

from models.grids import NONE, STEPS, Grids, following


def falls(grids: Grids) -> Tensor:
    """All coloured cells fall to one side: right, down, left, up. R = 4."""
    number = torch.arange(grids.side**2, device=grids.canvas.device).view(1, grids.side, grids.side)
    number = number.expand(grids.canvas.shape)
    places = []
    for turns in range(len(STEPS)):  # quarter turns that make the side the right one
        canvas, cells, inside = (
            torch.rot90(each, turns, (1, 2)) for each in (grids.canvas, number, grids.inside)
        )
        # In a stable order the padding before the grid comes first, then its background, its colours, and the
        # padding behind.
        behind = inside.cumsum(2) > 0
        rank = torch.where(inside, 1 + (canvas > grids.vocabulary.first).int(), 3 * behind)
        order = cells.gather(2, rank.argsort(dim=2, stable=True))
        places.append(torch.rot90(torch.where(inside, order, NONE), -turns, (1, 2)))
    return rearrange(torch.stack(places, dim=-1), "n r c places -> n (r c) places")


def slides(grids: Grids) -> Tensor:
    """The cells of one colour move to one side, until one of them is stopped, or one step. R = 72.

    A border, or another colour, stops all of them.
    """
    side, device = grids.side, grids.canvas.device
    inside, body = grids.inside[:, None], grids.of_colours()  # (N, 9, C, C)
    stops = ~inside | (grids.coloured[:, None] & ~body)
    number = torch.arange(side**2, device=device).view(side, side)
    row, column = number // side, number % side
    places = []
    for turns, (down, right) in enumerate(STEPS):
        free = torch.where(body, _free(stops, turns), side).amin((2, 3))  # (N, 9)
        free = torch.where(free == side, 0, free)
        for steps in (free, free.clamp_max(1)):
            steps = rearrange(steps, "n c -> n c 1 1")
            there = (row - steps * down, column - steps * right)
            on_canvas = torch.stack([(line >= 0) & (line < side) for line in there]).all(0)
            source = torch.where(on_canvas, there[0] * side + there[1], 0)
            came = on_canvas & body.flatten(2).gather(2, source.flatten(2)).view_as(body)
            place = torch.where(came, source, torch.where(body & (steps > 0), NONE, number))
            places.append(torch.where(inside, place, NONE).flatten(2))
    return rearrange(torch.cat(places, dim=1), "n places l -> n l places")


def _free(stops: Tensor, turns: int) -> Tensor:
    """How many cells ahead of each cell (..., C, C) are free, up to the next one that stops."""
    line = torch.arange(stops.shape[-1], device=stops.device)
    return torch.rot90(following(torch.rot90(stops, turns, (-2, -1))) - line - 1, -turns, (-2, -1))
