"""Demonstration encoders by name. To add one: a module with its config and class, a row here, a YAML in config/encoder.

A variant of an existing kind needs the row and the YAML only.
"""

from typing import Any

from models.arch import ArchConfig
from models.context import ContextModule, EncoderConfig
from models.encoders.iterative import IterativeEncoder, IterativeEncoderConfig
from models.encoders.memory import MemoryEncoder, MemoryEncoderConfig
from models.encoders.perceiver import PerceiverEncoder, PerceiverEncoderConfig
from models.encoders.pooled import PooledEncoder, PooledEncoderConfig

ENCODERS: dict[str, tuple[type[EncoderConfig], type[ContextModule]]] = {
    "memory": (MemoryEncoderConfig, MemoryEncoder),
    "perceiver": (PerceiverEncoderConfig, PerceiverEncoder),
    "iterative": (IterativeEncoderConfig, IterativeEncoder),
    "standard": (PooledEncoderConfig, PooledEncoder),
    "variational": (PooledEncoderConfig, PooledEncoder),
    "lpn_standard": (PooledEncoderConfig, PooledEncoder),
    "lpn_variational": (PooledEncoderConfig, PooledEncoder),
    "lpn_variational_v2": (PooledEncoderConfig, PooledEncoder),
    "hybrid_standard": (PooledEncoderConfig, PooledEncoder),
    "hybrid_variational": (PooledEncoderConfig, PooledEncoder),
    "lpn": (PooledEncoderConfig, PooledEncoder),
    "lpn_var": (PooledEncoderConfig, PooledEncoder),
}


def encoder_config(values: dict[str, Any]) -> EncoderConfig:
    """The typed configuration of the encoder that `values` names. Raises `ValueError` for an unknown one."""
    if values.get("name") not in ENCODERS:
        raise ValueError(f"encoder.name={values.get('name')!r} is unknown; there are {', '.join(ENCODERS)}")
    return ENCODERS[values["name"]][0](**values)


def build_encoder(config: EncoderConfig, arch: ArchConfig) -> ContextModule:
    """The encoder that `config` configures, sized to the core it feeds."""
    return ENCODERS[config.name][1](config, arch)
