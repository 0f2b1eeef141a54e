"""Token losses, the ACT loss and the metrics beside it. Shapes: B batch, L cells, V vocabulary.

Source of stablemax: "Grokking at the Edge of Numerical Stability" (arXiv 2501.04697).
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from dataset.canvas import IGNORE_LABEL_ID
from models.act import Answer, StepOutput
from utils.config import Config


class ObjectiveConfig(Config):
    """What is trained on. A weight of 0 leaves its term out.

    Every term is a mean over samples, like the token loss.

    loss_type: the token loss.
    halt_loss_weight: of the halting losses (0.5 in the original).
    kl_weight: of the KL term of variational encoders.
    reconstruct_weight, contrastive_weight: of the terms in training/objectives.py.
    contrastive_temperature: divides the similarities of the contrastive term.
    differential_weight: the share of the token loss that `change_shares` takes the place of.
    """

    loss_type: Literal["stablemax_cross_entropy", "softmax_cross_entropy"]
    halt_loss_weight: NonNegativeFloat
    kl_weight: NonNegativeFloat
    reconstruct_weight: NonNegativeFloat
    contrastive_weight: NonNegativeFloat
    contrastive_temperature: PositiveFloat
    differential_weight: Annotated[float, Field(ge=0, le=1)]

    @classmethod
    def of_run(cls, values: dict[str, Any]) -> "ObjectiveConfig":
        """What a loss is, of a run's whole `objective`, which also says how it was trained.

        No answer but that of a training step remembers the one before, so the change has no share in it.
        """
        of_loss = {name: values[name] for name in cls.model_fields if name in values}
        return cls(**{**of_loss, "differential_weight": 0.0})

    def weight(self, name: str) -> float:
        """The weight of the auxiliary term `name`."""
        return getattr(self, f"{name}_weight")


def stablemax_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The negative logarithm of s(x_label) / sum s(x), (B, L), zero where ignored.

    s stands for softmax's exponential: x + 1 above zero and 1 / (1 - x) below. Narrower logits are widened to
    float32.
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
    # Without supervised cells the sum is zero, whatever it is divided by.
    return TOKEN_LOSSES[objective.loss_type](logits, labels).sum(-1) / cells.clamp_min(1)


def token_shares(logits: Tensor, labels: Tensor, objective: ObjectiveConfig) -> Tensor:
    """What each cell contributes to the token loss of its sample, (B, L)."""
    cells = (labels != IGNORE_LABEL_ID).sum(-1, keepdim=True)
    return TOKEN_LOSSES[objective.loss_type](logits, labels) / cells.clamp_min(1)


def change_shares(output: StepOutput, objective: ObjectiveConfig) -> Tensor:
    """The differential loss by cells, (B, L): the token loss of what an ACT step adds to the logits of the
    step before, which carry no gradient.

    A sample starts from zero logits, so that its first step has the usual loss. At every later one the change
    has to name the label. A step that leaves a right answer as it is pays what a uniform guess pays. Only
    logits that grow from step to step make this loss small.
    Source: `differential_loss` of TinyRecursiveModelsJD, where it takes the place of the whole token loss. A
    sample's first logits are compared there with those that another sample left in its row of the carry.
    """
    assert output.logits_before is not None, "training with this loss remembers the logits before"
    return token_shares(output.logits - output.logits_before, output.carry.data["labels"], objective)


def grade(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The share of each sample's supervised cells that are right, and whether all of them are, (B,) each.

    Without supervised cells the share is zero, and none is wrong.
    """
    supervised = labels != IGNORE_LABEL_ID
    cells = supervised.sum(-1)
    correct = (supervised & (logits.argmax(-1) == labels)).sum(-1)
    return correct / cells.clamp_min(1), correct == cells


def halting_loss(logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    """The loss (B,) of halting logits (B,) against the probabilities `target` (B,), zero without labels."""
    loss = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
    return torch.where((labels != IGNORE_LABEL_ID).any(-1), loss, 0.0)


def halting_losses(output: StepOutput) -> dict[str, Tensor]:
    """The halting losses (B,) by name. q_halt learns whether every supervised cell is right."""
    labels = output.carry.data["labels"]
    _, exact = grade(output.logits, labels)
    losses = {"q_halt": halting_loss(output.q_halt_logits, exact, labels)}
    if output.target_q_continue is not None:
        losses["q_continue"] = halting_loss(output.q_continue_logits, output.target_q_continue, labels)
    return losses


@dataclass(frozen=True)
class LossTerms:
    """What the loss of a batch is the sum of. Every term has its weight, and is zero where it has no labels.

    tokens: (B, L), by cell, with the share of `differential_weight`.
    halting: (B,).
    auxiliary: (B,) each, by name.
    earlier: (B, L) each, like `tokens`, after each H cycle but the last.
    """

    tokens: Tensor
    halting: Tensor
    auxiliary: dict[str, Tensor]
    earlier: tuple[Tensor, ...]


def loss_terms(output: StepOutput, objective: ObjectiveConfig) -> LossTerms:
    """The terms of `act_loss`, apart."""
    labels = output.carry.data["labels"]
    labelled = (labels != IGNORE_LABEL_ID).any(-1)
    weights = {name: objective.weight(name) for name in output.losses}
    tokens = token_shares(output.logits, labels, objective)
    if share := objective.differential_weight:
        tokens = (1 - share) * tokens + share * change_shares(output, objective)
    return LossTerms(
        tokens,
        objective.halt_loss_weight * torch.stack(list(halting_losses(output).values())).sum(0),
        {
            name: weights[name] * torch.where(labelled, terms, 0.0)
            for name, terms in output.losses.items()
            if weights[name]
        },
        tuple(token_shares(logits, labels, objective) for logits in output.earlier_logits),
    )


def answer_metrics(
    answer: Answer, labels: Tensor, halted: Tensor, objective: ObjectiveConfig
) -> dict[str, Tensor]:
    """Sums over the rows of a batch. `lm_loss` and `q_halt_loss` carry a gradient.

    The losses sum over all rows that have labels, whose number is `rows`. The others sum over those of them
    that have halted (B,), whose number is `count`, as in the original.
    """
    share, exact = grade(answer.logits, labels)
    labelled = (labels != IGNORE_LABEL_ID).any(-1)
    counted = halted & labelled
    return {
        "rows": labelled.sum(),
        "count": counted.sum(),
        "accuracy": torch.where(counted, share, 0.0).sum(),
        "exact_accuracy": (counted & exact).sum(),
        "q_halt_accuracy": (counted & ((answer.q_halt_logits >= 0) == exact)).sum(),
        "steps": torch.where(counted, answer.steps, 0).sum(),
        "lm_loss": sample_loss(answer.logits, labels, objective).sum(),
        "q_halt_loss": halting_loss(answer.q_halt_logits, exact, labels).sum(),
    }


def act_loss(output: StepOutput, objective: ObjectiveConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of an ACT step, summed over the batch, and the sums of `answer_metrics` and of each term.

    - lm_loss is a row's mean over its supervised cells. A share of it may be that of `change_shares`.
    - q_halt learns whether every supervised cell is right, q_continue what the step says it should have.
    - The auxiliary terms of `output.losses` are added with their weights.

    A row without labels counts nowhere.
    """
    labels = output.carry.data["labels"]
    labelled = (labels != IGNORE_LABEL_ID).any(-1)
    answer = Answer(output.logits, output.q_halt_logits, output.carry.steps)
    sums = answer_metrics(answer, labels, output.carry.halted, objective)
    metrics = {name: value.detach() for name, value in sums.items()}
    q_loss = sums["q_halt_loss"]
    if output.target_q_continue is not None:
        q_continue_loss = halting_loss(output.q_continue_logits, output.target_q_continue, labels).sum()
        metrics["q_continue_loss"] = q_continue_loss.detach()
        q_loss = q_loss + q_continue_loss
    token_loss = sums["lm_loss"]
    if share := objective.differential_weight:
        change = change_shares(output, objective).sum()
        metrics["differential_loss"] = change.detach()
        token_loss = (1 - share) * token_loss + share * change
    loss = token_loss + objective.halt_loss_weight * q_loss
    for name, terms in output.losses.items():
        term = torch.where(labelled, terms, 0.0).sum()
        metrics[f"{name}_loss"] = term.detach()
        if objective.weight(name):
            loss = loss + objective.weight(name) * term
            metrics[f"{name}_loss_weighted"] = objective.weight(name) * term.detach()
    metrics["loss"] = loss.detach()
    return loss, metrics


def is_per_row(name: str) -> bool:
    """Whether a metric sum is divided by `rows`, as all losses are. Every other one is divided by `count`."""
    return name.removesuffix("_weighted").endswith("loss") or name == "context_gradient"
