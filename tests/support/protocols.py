"""Short configurations of the protocols, and the models that they adapt."""

import torch

from config import compose
from dataset.batch import materialise
from evaluation.protocols import protocol_config
from evaluation.session import EvaluateConfig

SEARCH = protocol_config(
    compose.compose("evaluate", ["checkpoint=x", "protocol=latent_search", "protocol.steps=5"])[0]["protocol"]
)


def ttt_config(*overrides: str):
    chosen = ["protocol=test_time_training", "protocol.steps=4", "protocol.batch_size=4", "protocol.lr=1e-3"]
    return compose.load(
        EvaluateConfig, "evaluate", ["checkpoint=x", *chosen, *(f"protocol.{o}" for o in overrides)]
    ).protocol


def outspoken(trainer):
    """The model of a trainer, with a head that gives answers which differ."""
    torch.manual_seed(0)
    torch.nn.init.normal_(trainer.state.model.lm_head.weight)
    return trainer.state.model.eval()


def drawn_episodes(trainer, demos: int, with_labels: bool = False):
    cell = next(cell for cell in trainer.sampler.buckets if cell.demos == demos)
    return materialise(
        trainer.sampler.sample(0, cell), trainer.store, trainer.store.grid_table, with_labels
    ).data


def copied_weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
