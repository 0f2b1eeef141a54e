"""Configurations in which all relations are read."""

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
