"""Tiny models, random episodes and a loss on them."""

import torch

from dataset.batch import Batch, Bucket
from dataset.canvas import IGNORE_LABEL_ID, PAD
from models.act import act_step, initial_carry
from models.losses import ObjectiveConfig, act_loss
from models.trm import DataSizes, RecursiveModel, build_model
from tests.support.runs import load_config

OBJECTIVE = ObjectiveConfig(
    loss_type="softmax_cross_entropy",
    halt_loss_weight=0.5,
    kl_weight=0.0,
    reconstruct_weight=0.0,
    contrastive_weight=0.0,
    contrastive_temperature=0.1,
    differential_weight=0.0,
)
SIDE = 6


def episodes(batch: int = 4, demos: int = 3, seed: int = 0) -> Batch:
    """Random episodes with grids of 4x4 on a 6x6 canvas."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(*shape: int) -> torch.Tensor:
        canvas = torch.full((*shape, SIDE, SIDE), PAD, dtype=torch.uint8)
        canvas[..., :4, :4] = torch.randint(2, 12, (*shape, 4, 4), generator=generator, dtype=torch.uint8)
        return canvas.flatten(-2)

    answer = tokens(batch).long()
    data = {
        "inputs": tokens(batch),
        "labels": answer.masked_fill(answer == PAD, IGNORE_LABEL_ID),
        "puzzle_identifiers": torch.arange(1, batch + 1, dtype=torch.int32),
        "demo_inputs": tokens(batch, demos),
        "demo_labels": tokens(batch, demos),
        "demo_mask": torch.ones(batch, demos, dtype=torch.bool),
    }
    return Batch(Bucket(SIDE, demos), data)


def make_model(store, *overrides: str, seed: int = 0) -> RecursiveModel:
    torch.manual_seed(seed)
    config = load_config(store, *overrides)
    return build_model(
        config.arch, DataSizes(12, store.metadata.num_puzzle_identifiers, SIDE**2), config.encoder
    )


def one_loss(model: RecursiveModel, data: dict) -> torch.Tensor:
    return act_loss(act_step(model, initial_carry(model, data), data), OBJECTIVE)[0]
