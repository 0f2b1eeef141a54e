"""The protocols by name: what a model may do with a task's demonstrations before it answers.

A score means nothing without its protocol.
inductive           nothing beyond reading them: weights and context are what training and encoder made
latent_search       search for a better context (models/latent_search.py)
test_time_training  train weights of the task's own (evaluation/task_training.py)
transductive        training has seen pairs of the evaluated tasks, or their demonstrations by a learned row
"""

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, SerializeAsAny

from dataset.leaks import Seen
from dataset.store import Store
from evaluation.adaptation import Adaptation, AsItIs, AsItIsConfig, LatentSearch
from evaluation.respondent import Respondent
from evaluation.task_training import TaskTraining, TaskTrainingConfig
from evaluation.voting import Ranking
from models.latent_search import LatentSearchConfig
from utils.config import NamedConfig
from utils.errors import UserError


class Protocol(NamedTuple):
    """config: what can be set, with the protocol's `name`. adaptation: what is done."""

    config: type[NamedConfig]
    adaptation: type[Adaptation]


# A new protocol: a class for each column, a row here, config/protocol/NAME.yaml, and a row in
# docs/evaluation.md.
PROTOCOLS: dict[str, Protocol] = {
    "auto": Protocol(AsItIsConfig, AsItIs),
    "inductive": Protocol(AsItIsConfig, AsItIs),
    "transductive": Protocol(AsItIsConfig, AsItIs),
    "latent_search": Protocol(LatentSearchConfig, LatentSearch),
    "test_time_training": Protocol(TaskTrainingConfig, TaskTraining),
}


def protocol_config(value: Any) -> Any:
    """The typed configuration of the protocol that the mapping `value` names; any other value as it is.

    Raises `ValueError` for an unknown protocol.
    """
    if not isinstance(value, Mapping):
        return value
    if value.get("name") not in PROTOCOLS:
        raise ValueError(f"protocol.name={value.get('name')!r} is unknown; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[value["name"]].config(**value)


# The type of a field: the configuration of any row of the table.
ProtocolConfig = Annotated[SerializeAsAny[NamedConfig], BeforeValidator(protocol_config)]


def adaptation_class(config: ProtocolConfig) -> type[Adaptation]:
    """The class that does what `config` describes."""
    return PROTOCOLS[config.name].adaptation


def adaptation_of(
    config: ProtocolConfig,
    respondent: Respondent,
    seed: int,
    batch_size: int,
    ranking: Ranking = "votes",
    vote_stop: bool = False,
) -> Adaptation:
    """What a protocol does before a task is answered.

    Raises `UserError` for models that have nothing to adapt by, and for votes that cannot be taken after it.
    """
    adaptation = adaptation_class(config)
    problem = adaptation.refuses(config, respondent.store.layout, ranking, vote_stop)
    if problem:
        raise UserError(problem)
    return adaptation(config, respondent, seed, batch_size)


def less_memory(config: ProtocolConfig, batch_size: int) -> str:
    """What to change when an evaluation does not fit into memory."""
    return adaptation_class(config).less_memory(config, batch_size)


def row_learners() -> str:
    """The protocols under which a model learns puzzle rows that it does not have, for an error message."""
    return " or ".join(f"protocol={name}" for name, (_, does) in PROTOCOLS.items() if does.learns_rows)


def described(label: str, name: str | None) -> str:
    """A label in words, with the protocol `name` where something was done that the label does not tell of."""
    as_it_is = name is None or (name in PROTOCOLS and not PROTOCOLS[name].adaptation.adapts)
    return label if as_it_is or name == label else f"{label}, after {name}"


def label(config: ProtocolConfig, store: Store, seen: Seen) -> str:
    """The protocol of an evaluation of tasks of which training may have seen some.

    Raises `UserError` when an explicitly named protocol is not what it would be.
    """
    adaptation = adaptation_class(config)
    has_rows = store.layout.learns_rows and not adaptation.learns_rows
    found = "transductive" if seen or has_rows else "inductive"
    if adaptation.adapts:
        return config.name if found == "inductive" else found
    if config.name not in ("auto", found):
        why = "none of the evaluated tasks shares a pair with the training data"
        if found == "transductive":
            why = seen.why if seen else "it has a learned row per task"
        raise UserError(
            f"protocol={config.name}: the model's answers would be {found}, since {why}; use protocol=auto"
        )
    return found
