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
    "encoder.draft_places=[motions,falls]",
    f"encoder.draft_conditions=[{','.join(CONDITIONS)},slides]",
]
