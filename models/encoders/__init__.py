"""Demonstration encoders by name. To add one: a module with its config and class, a row here, a YAML in config/encoder."""

from typing import TYPE_CHECKING

from models.context import ContextModule, EncoderConfig
from models.encoders.memory import MemoryEncoder, MemoryEncoderConfig
from models.encoders.standard import StandardEncoder, StandardEncoderConfig

if TYPE_CHECKING:
    from models.trm import ArchConfig

ENCODERS: dict[str, tuple[type[EncoderConfig], type[ContextModule]]] = {
    "memory": (MemoryEncoderConfig, MemoryEncoder),
    "standard": (StandardEncoderConfig, StandardEncoder),
}


def build_encoder(config: EncoderConfig, arch: "ArchConfig") -> ContextModule:
    """The encoder that `config` configures, sized to the core it feeds."""
    return ENCODERS[config.name][1](config, arch)
