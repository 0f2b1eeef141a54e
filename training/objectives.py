"""Auxiliary objectives on the context: off unless their weight says otherwise. Shapes: B batch, K
demonstrations, G global batch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import canvas
from dataset.batch import BatchData
from models.act import StepOutput, act_step, initial_carry
from models.core import PLACES, RecursiveModel
from models.drafts import DRAFTS, asking_demonstration
from models.losses import ObjectiveConfig, sample_loss
from models.noise import Noise
from utils import distributed
from utils.distributed import World


def auxiliary_losses(
    model: RecursiveModel, output: StepOutput, objective: ObjectiveConfig, noise: Noise, world: World
) -> dict[str, Tensor]:
    """The terms (B,) of the objectives that are switched on."""
    losses = {}
    if objective.reconstruct_weight:
        losses["reconstruct"] = reconstruction_loss(model, output, objective)
    if objective.contrastive_weight:
        losses["contrastive"] = contrastive_loss(
            model, output.carry.data, objective.contrastive_temperature, noise, world
        )
    return losses


def reconstruction_loss(model: RecursiveModel, output: StepOutput, objective: ObjectiveConfig) -> Tensor:
    """The token loss (B,) of one demonstration's output, given its input and the context of all of them.

    The recursion itself answers, from fresh states and in one ACT step: it is the context's only reader, and
    a head of its own would train the context for somebody else. What this asks for, a context that explains
    the demonstrations, is also all that can be asked for at test time. Leaving the demonstration out of the
    context instead would repeat what leave-one-out queries (data.query_sampling=any) train already. ACT step
    n asks for demonstration n modulo their number.
    """
    data = output.carry.data
    mask = data["demo_mask"]
    count = mask.sum(1)
    turn = (output.carry.steps - 1) % count.clamp_min(1)  # (B,)
    index = ((mask.cumsum(1) == turn[:, None] + 1) & mask).int().argmax(1)
    rows = torch.arange(len(mask), device=mask.device)
    # The places of the query's cells say nothing of another grid.
    asked = {name: value for name, value in data.items() if name != PLACES} | {
        "inputs": data["demo_inputs"][rows, index],
        "labels": canvas.labels_of(data["demo_labels"][rows, index]),
        **asking_demonstration(data, index),
    }
    answer = act_step(model, initial_carry(model, asked), asked, context=output.context)
    return torch.where(count > 0, sample_loss(answer.logits, asked["labels"], objective), 0.0)


def contrastive_loss(
    model: RecursiveModel, data: BatchData, temperature: float, noise: Noise, world: World
) -> Tensor:
    """InfoNCE (B,) between the contexts of two halves of each sample's demonstrations, by cosine similarity.

    The other samples of the global batch are the negatives, but never those with the same puzzle identifier
    (with data.augmentation=table a stored view has its own, and counts as a task). A sample with fewer than
    two demonstrations has no positive and counts zero. Source: arXiv 1807.03748.
    """
    mask = data["demo_mask"]
    odd = mask.cumsum(1) % 2 == 1
    paired = mask.sum(1) > 1

    def encode(half: Tensor) -> Tensor:
        part = {name: value for name, value in data.items() if name != DRAFTS} | {"demo_mask": half}
        return F.normalize(model.context(part, model.context.initial_state(part, noise)).summary(), dim=1)

    first, second = encode(mask & odd), distributed.gather_rows(encode(mask & ~odd))  # (B, X), (G, X)
    identifiers, others = data["puzzle_identifiers"], distributed.gather_rows(data["puzzle_identifiers"])
    rows = torch.arange(len(first), device=first.device)
    own = rows + world.rank * len(first)
    blocked = (identifiers[:, None] == others[None]) | ~distributed.gather_rows(paired)[None]
    blocked[rows, own] = False
    similarity = (first @ second.T / temperature).masked_fill(blocked, torch.finfo(torch.float32).min)
    return torch.where(paired, F.cross_entropy(similarity, own, reduction="none"), 0.0)
