"""Token losses and the ACT loss. Shapes: B batch, L cells, V vocabulary."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from dataset.canvas import IGNORE_LABEL_ID
from models.act import StepOutput
from utils.config import Config


class ObjectiveConfig(Config):
    """loss_type: the token loss. halt_loss_weight: weight of the halting losses beside it (0.5 in the original).

    Weights of auxiliary terms, 0 for none, each a mean over samples like the token loss: kl_weight (variational encoders),
    reconstruct_weight and contrastive_weight (training/objectives.py; contrastive_temperature divides the similarities).
    """

    loss_type: Literal["stablemax_cross_entropy", "softmax_cross_entropy"]
    halt_loss_weight: NonNegativeFloat
    kl_weight: NonNegativeFloat
    reconstruct_weight: NonNegativeFloat
    contrastive_weight: NonNegativeFloat
    contrastive_temperature: PositiveFloat

    def weight(self, name: str) -> float:
        """The weight of the auxiliary term `name`."""
        return getattr(self, f"{name}_weight")


def stablemax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log of s(x_label) / sum s(x) with s(x) = x + 1 above zero and 1 / (1 - x) below; (B, L), zero where ignored.

    Computed in the wider of float32 and the logits' dtype.
    """
    x = logits.float() if logits.dtype != torch.float64 else logits
    # Each branch sees only its own side of zero, so that neither has a pole where the other is selected.
    s = torch.where(x < 0, 1 / (1 - x.clamp(max=0)), x + 1)
    valid = labels != IGNORE_LABEL_ID
    label = torch.where(valid, labels, 0).unsqueeze(-1)
    loss = s.sum(-1).log() - s.gather(-1, label).squeeze(-1).log()
    return torch.where(valid, loss, 0.0)


def softmax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The usual cross-entropy, (B, L), zero where ignored."""
    x = logits.float() if logits.dtype != torch.float64 else logits
    return F.cross_entropy(
        x.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_LABEL_ID, reduction="none"
    ).view_as(labels)


TOKEN_LOSSES = {
    "stablemax_cross_entropy": stablemax_cross_entropy,
    "softmax_cross_entropy": softmax_cross_entropy,
}


def sample_loss(logits: Tensor, labels: Tensor, objective: ObjectiveConfig) -> Tensor:
    """The token loss of each sample, (B,): the mean over its supervised cells, zero without any."""
    cells = (labels != IGNORE_LABEL_ID).sum(-1)
    return TOKEN_LOSSES[objective.loss_type](logits, labels).sum(-1) / cells.clamp_min(1)


def act_loss(output: StepOutput, objective: ObjectiveConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss summed over the batch, and metric sums.

    lm_loss is the mean over a row's supervised cells, summed over rows; the halting target is "every supervised cell is
    right". The auxiliary terms of `output.losses` are summed over rows in the same way. A row without labels counts nowhere.
    Of the metrics, all losses sum over all rows (denominator `rows`), the others over rows that halted at this step
    (denominator `count`), as in the original.
    """
    labels, logits = output.carry.data["labels"], output.logits
    supervised = labels != IGNORE_LABEL_ID
    cells = supervised.sum(-1)  # (B,)
    labelled = cells > 0
    divisor = cells.clamp_min(1)
    lm_loss = sample_loss(logits, labels, objective).sum()
    with torch.no_grad():
        correct = (supervised & (logits.argmax(-1) == labels)).sum(-1)
        exact = correct == cells
        counted = output.carry.halted & labelled
    q_halt = F.binary_cross_entropy_with_logits(output.q_halt_logits, exact.float(), reduction="none")
    q_loss = q_halt_loss = torch.where(labelled, q_halt, 0.0).sum()
    metrics = {
        "rows": labelled.sum(),
        "count": counted.sum(),
        "accuracy": torch.where(counted, correct / divisor, 0.0).sum(),
        "exact_accuracy": (counted & exact).sum(),
        "q_halt_accuracy": (counted & ((output.q_halt_logits >= 0) == exact)).sum(),
        "steps": torch.where(counted, output.carry.steps, 0).sum(),
        "lm_loss": lm_loss.detach(),
        "q_halt_loss": q_halt_loss.detach(),
    }
    if output.target_q_continue is not None:
        q_continue = F.binary_cross_entropy_with_logits(
            output.q_continue_logits, output.target_q_continue, reduction="none"
        )
        q_continue_loss = torch.where(labelled, q_continue, 0.0).sum()
        metrics["q_continue_loss"] = q_continue_loss.detach()
        q_loss = q_loss + q_continue_loss
    loss = lm_loss + objective.halt_loss_weight * q_loss
    for name, terms in output.losses.items():
        term = torch.where(labelled, terms, 0.0).sum()
        metrics[f"{name}_loss"] = term.detach()
        if objective.weight(name):
            loss = loss + objective.weight(name) * term
            metrics[f"{name}_loss_weighted"] = objective.weight(name) * term.detach()
    metrics["loss"] = loss.detach()
    return loss, metrics


def is_per_row(name: str) -> bool:
    """Whether a metric sum is divided by `rows`, as all losses are; every other one is divided by `count`."""
    return name.removesuffix("_weighted").endswith("loss") or name == "context_gradient"
