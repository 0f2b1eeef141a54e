"""The base of every typed configuration: unknown keys are errors, values never change after validation."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Fields have no defaults: the YAML files hold the values, the classes hold types and rules."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
