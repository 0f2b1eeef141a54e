"""Configurations in which all relations are read, and a slow look at objects."""

import numpy as np

from models.conditions import CONDITIONS
from models.relations import RELATIONS

NAMES = ",".join(RELATIONS)
ON = [
    f"arch.relations=[{NAMES}]",
    f"encoder.relations=[{NAMES}]",
    "encoder=memory",
    "encoder.colour_path=true",
]
PREFIX = [*ON, "encoder.placement=prefix"]
DRAFTS = [
    *ON,
    "encoder.draft_places=[motions,falls,copies,crops,panels]",
    f"encoder.draft_conditions=[{','.join(CONDITIONS)},slides]",
]
# The same kinds of reading, with one relation of each kind.
FEW = [
    "arch.relations=[symmetries,lines]",
    "encoder.relations=[symmetries,lines]",
    "encoder=memory",
    "encoder.colour_path=true",
]
FEW_DRAFTS = [
    "encoder.draft_places=[symmetries,copies,crops,panels]",
    "encoder.draft_conditions=[sizes,ahead,rays]",
]


def objects(grid, row, column):
    """The first cell of those of one colour that are joined with a cell, in a list."""
    member, todo = {(row, column)}, [(row, column)]
    while todo:
        r, c = todo.pop()
        near = {(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)} - member & set(np.ndindex(grid.shape))
        near = {at for at in near if grid[at] == grid[row, column]}
        member |= near
        todo += near
    return [min(member)]
