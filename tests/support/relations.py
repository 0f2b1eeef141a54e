"""Configurations in which all relations are read."""

from models.relations import RELATIONS

NAMES = ",".join(RELATIONS)
ON = [
    f"arch.relations=[{NAMES}]",
    f"encoder.relations=[{NAMES}]",
    "encoder=memory",
    "encoder.colour_path=true",
]
PREFIX = [*ON, "encoder.placement=prefix"]
EVIDENCE = [*ON, "encoder.evidence=[symmetries,shifts]"]
