"""What a model may do with a task's demonstrations before it answers. A score means nothing without it.

inductive           nothing beyond reading them: weights and context are what training and encoder made
latent_search       search for a better context (models/latent_search.py)
test_time_training  train weights of the task's own (evaluation/task_training.py)
transductive        training has seen pairs of the evaluated tasks, or their demonstrations through a learned row
"""

from typing import Any, Literal

import torch
from torch import Tensor

from dataset.layouts import Layout
from dataset.leaks import Seen
from dataset.store import Store
from evaluation.task_training import TaskTraining, TaskTrainingConfig
from models.core import RecursiveModel
from models.latent_search import LatentSearchConfig, search
from models.losses import ObjectiveConfig
from utils.config import Config
from utils.errors import UserError


class AsItIsConfig(Config):
    """No adaptation. auto: whatever the model and its training data imply; the others are an error where they are not so."""

    name: Literal["auto", "inductive", "transductive"]


ProtocolConfig = AsItIsConfig | LatentSearchConfig | TaskTrainingConfig
_CONFIGS: dict[str, type[Config]] = {
    **dict.fromkeys(("auto", "inductive", "transductive"), AsItIsConfig),
    "latent_search": LatentSearchConfig,
    "test_time_training": TaskTrainingConfig,
}


def protocol_config(values: dict[str, Any]) -> ProtocolConfig:
    """The typed configuration of the protocol that `values` names. Raises `ValueError` for an unknown one."""
    if values.get("name") not in _CONFIGS:
        raise ValueError(f"protocol.name={values.get('name')!r} is unknown; there are {', '.join(_CONFIGS)}")
    return _CONFIGS[values["name"]](**values)


def typed_protocol(value: Any) -> Any:
    """For a field's validator: what a YAML file says of a protocol, typed."""
    return protocol_config(value) if isinstance(value, dict) else value


class LatentSearch:
    """Latent search as an evaluation runs it: views of a batch together, so many that `rows` demonstrations are asked at once."""

    def __init__(self, config: LatentSearchConfig, objective: ObjectiveConfig, seed: int, rows: int):
        self.config, self.objective, self.seed, self.rows = config, objective, seed, rows

    def shift(self, model: RecursiveModel, data: dict[str, Tensor]) -> Tensor | None:
        """The shift (B, T, D) of a batch's contexts."""
        count = data["demo_mask"].shape[1]
        portion = max(1, self.rows // count)
        parts = [
            {name: value[start : start + portion] for name, value in data.items()}
            for start in range(0, len(data["inputs"]), portion)
        ]
        # The same random shifts for every portion: what a view is given must not depend on its place in a batch.
        found = [
            search(model, part, self.objective, self.config, torch.Generator().manual_seed(self.seed))
            for part in parts
        ]
        return torch.cat(found)


Adaptation = LatentSearch | TaskTraining


def adaptation_of(
    config: ProtocolConfig, objective: ObjectiveConfig, seed: int, batch_size: int, layout: Layout
) -> Adaptation | None:
    """What a protocol does before a task is answered. Raises `UserError` for models that have nothing to adapt by."""
    if isinstance(config, LatentSearchConfig):
        if not layout.reads_demonstrations:
            raise UserError(
                "protocol=latent_search searches a context that an encoder computes, and this model has no encoder"
            )
        return LatentSearch(config, objective, seed, batch_size)
    if isinstance(config, TaskTrainingConfig):
        if layout.shares_rule:
            raise UserError(
                "protocol=test_time_training learns from a task's demonstrations, and puzzles that share one rule have none"
            )
        if layout.learns_rows and config.parameters == "encoder":
            raise UserError(
                "protocol.parameters=encoder: this model has no encoder; its puzzle rows learn in any case"
            )
        return TaskTraining(config, objective, seed)
    return None


def adapts(config: ProtocolConfig) -> bool:
    """Whether something is done with a task's demonstrations before it is asked."""
    return not isinstance(config, AsItIsConfig)


def described(label: str, name: str | None) -> str:
    """A label in words, with the adaptation `name` that it does not tell of."""
    as_it_is = name in (None, "auto", "inductive", "transductive")
    return label if as_it_is or name == label else f"{label}, after {name}"


def less_memory(config: ProtocolConfig, batch_size: int) -> str:
    """What to change when an evaluation does not fit."""
    remedy = f"lower batch_size={batch_size}"
    if isinstance(config, TaskTrainingConfig):
        remedy += (
            f", protocol.tasks_at_once={config.tasks_at_once} or protocol.batch_size={config.batch_size}"
        )
    return remedy


def label(config: ProtocolConfig, store: Store, seen: Seen) -> str:
    """The protocol of an evaluation of tasks of which training may have seen some.

    Raises `UserError` when an explicitly named protocol is not what it would be.
    """
    learned_rows = store.layout.learns_rows and not isinstance(config, TaskTrainingConfig)
    found = "transductive" if seen or learned_rows else "inductive"
    if config.name in ("inductive", "transductive") and config.name != found:
        why = "none of the evaluated tasks shares a pair with the training data"
        if found == "transductive":
            why = seen.why if seen else "it has a learned row per task"
        raise UserError(
            f"protocol={config.name}: the model's answers would be {found}, since {why}; use protocol=auto"
        )
    return config.name if found == "inductive" and config.name != "auto" else found
