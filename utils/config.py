"""The base of every typed configuration: unknown keys are errors, values never change after validation."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Fields have no defaults: the YAML files hold the values, the classes hold types and rules."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class NamedConfig(Config):
    """One of several choices, whose `name` is that of its YAML file."""

    name: str


def flatten(values: dict, prefix: str = "") -> dict:
    """Nested keys joined by dots."""
    flat: dict = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
