"""Search for a better context of a task among its own demonstrations: what is told to the recursion changes, no weight does.

Every demonstration is asked in turn, the encoder reading the others (`leave_one_out`); one shift per sample is added to the
tokens of all these contexts, and then to the context of the query, whose answer is never read.
Source: "Searching Latent Program Spaces" (arXiv 2411.08706), which searches one pooled latent; a shift of the tokens is the
same for contexts of any form.
Shapes: B samples, K demonstrations, T tokens of the context, D hidden.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from config.base import Config
from dataset.batch import leave_one_out
from models.act import Carry, act_step, initial_carry, solve
from models.core import RecursiveModel
from models.losses import ObjectiveConfig, sample_loss


class LeaveOneOut:
    """The demonstrations of `data` (B samples) as queries of one another.

    counted (B, K): the demonstrations that can be asked. full: the context of all of them, `others`: each row's own. state:
    what the encoder remembers of the samples, by name (B, ...).
    """

    def __init__(self, model: RecursiveModel, data: dict[str, Tensor], objective: ObjectiveConfig, state: dict[str, Tensor] | None = None):
        self.model, self.objective = model, objective
        rows, self.counted = leave_one_out(data)
        self.rows = model.placed(rows)
        of_rows = state and {name: self.each(value) for name, value in state.items()}
        with torch.no_grad():
            self.full, self.others = model.context(data, state), model.context(self.rows, of_rows)

    @property
    def unit(self) -> float:
        """The RMS of the tokens that are shifted."""
        return 1.0 if self.full.memory is not None else self.full.prefix.shape[-1] ** -0.5

    def no_shift(self) -> Tensor:
        """(B, T, D) float32 zeros."""
        return torch.zeros_like(self.full.told, dtype=torch.float32)

    def to_mean(self) -> tuple[Tensor, Tensor]:
        """The shifts that take the full context (B, T, D), and each row's (B * K, T, D), to the mean over the sample's rows."""
        batch, count = self.counted.shape
        told = self.others.told.float().unflatten(0, (batch, count))
        mask = self.others.prefix_mask if self.others.memory is None else self.others.memory_mask
        weight = self.counted[:, :, None, None].float()
        if mask is not None:
            weight = weight * mask.unflatten(0, (batch, count))[..., None]
        mean = (told * weight).sum(1) / weight.sum(1).clamp_min(1)
        return mean - self.full.told.float(), (mean[:, None] - told).flatten(0, 1)

    def each(self, values: Tensor) -> Tensor:
        """What belongs to a sample (B, ...) for each of its rows (B * K, ...)."""
        return values.repeat_interleave(self.counted.shape[1], dim=0)

    def losses(self, logits: Tensor) -> Tensor:
        """(B,) mean token loss over the demonstrations that count, from the logits of the rows."""
        loss = sample_loss(logits, self.rows["labels"], self.objective).view_as(self.counted)
        return torch.where(self.counted, loss, 0.0).sum(1) / self.counted.sum(1).clamp_min(1)

    def gradient(self, delta: Tensor, of_rows: Callable[[Tensor], Tensor], carry: Carry | None) -> tuple[Tensor, Carry]:
        """The gradient of the losses by `delta` (B, T, D) in one ACT step with the rows shifted by `of_rows(delta)`, and the
        carry after it; None begins one."""
        with torch.enable_grad():
            output = act_step(
                self.model,
                carry or initial_carry(self.model, self.rows),
                self.rows,
                context=None if self.model.context.refines else self.others,
                adjust=lambda context, carry: context.shifted(of_rows(delta)),
            )
            (gradient,) = torch.autograd.grad(self.losses(output.logits).sum(), delta)
        return gradient, output.carry

    @torch.no_grad()
    def solved(self, shift: Tensor) -> Tensor:
        """(B,) the losses of the answers, after all ACT steps, with the rows' contexts shifted by `shift` (B * K, T, D)."""
        return self.losses(solve(self.model, self.rows, shift=shift).logits)


class LatentSearchConfig(Config):
    """start: from the context of all demonstrations, or from the mean of those that leave one out. search: `gradient` steps,
    or the best of so many `random` shifts. lr: of a step, or the deviation of the random shifts, in units of the context's
    RMS. optimizer: adam, or sgd, which divides a sample's gradient by its RMS.
    """

    name: Literal["latent_search"]
    start: Literal["encoder", "mean"]
    search: Literal["gradient", "random"]
    optimizer: Literal["adam", "sgd"]
    steps: PositiveInt
    lr: PositiveFloat


@torch.no_grad()
def search(
    model: RecursiveModel, data: dict[str, Tensor], objective: ObjectiveConfig, config: LatentSearchConfig, generator: torch.Generator
) -> Tensor:
    """The shift (B, T, D) of the context of `data` that answers its demonstrations best, the model in evaluation mode.

    A gradient step is one ACT step of all rows, whose carry goes on to the next one, as in training. In the end a sample
    keeps what was found only if its demonstrations are answered with a smaller loss than with the encoder's contexts; one
    with fewer than two demonstrations keeps its context. The mean knows, through the other rows, each demonstration's answer.
    `generator` (on the CPU) draws the random shifts.
    """
    left_out = LeaveOneOut(model, data, objective)
    delta = left_out.no_shift()
    if not left_out.counted.any():
        return delta
    if config.start == "mean":
        start, start_rows = left_out.to_mean()
    else:
        start, start_rows = delta, torch.zeros((), device=delta.device)

    def of_rows(delta: Tensor) -> Tensor:
        return start_rows + left_out.each(delta)

    best, loss = delta, left_out.solved(left_out.each(delta))
    for candidate in _candidates(left_out, of_rows, config, generator):
        found = left_out.solved(of_rows(candidate))
        better = (found < loss) & left_out.counted.any(1)
        best, loss = torch.where(better[:, None, None], start + candidate, best), torch.where(better, found, loss)
    return best


def _candidates(
    left_out: LeaveOneOut, of_rows: Callable[[Tensor], Tensor], config: LatentSearchConfig, generator: torch.Generator
) -> Iterator[Tensor]:
    """The shifts (B, T, D) from the start to compare: none where it is the mean, random ones, or where the gradient steps end."""
    delta = left_out.no_shift()
    if config.start == "mean":
        yield delta.clone()
    if config.search == "random":
        for _ in range(config.steps):
            noise = torch.randn(delta.shape[1:], generator=generator).to(delta.device)
            yield config.lr * left_out.unit * noise.expand_as(delta)
        return
    delta.requires_grad_()
    adam = torch.optim.Adam([delta], lr=config.lr * left_out.unit)
    carry = None
    for _ in range(config.steps):
        gradient, carry = left_out.gradient(delta, of_rows, carry)
        if config.optimizer == "adam":
            delta.grad = gradient
            adam.step()
        else:
            delta += sgd_step(gradient, config.lr * left_out.unit)
    yield delta.detach()


def sgd_step(gradient: Tensor, size: float) -> Tensor:
    """(B, T, D) a step against the gradient, of RMS `size` over those of a sample's tokens that have a gradient."""
    touched = (gradient != 0).any(-1, keepdim=True)
    square = gradient.square().sum((1, 2), keepdim=True) / (touched.sum((1, 2), keepdim=True) * gradient.shape[-1]).clamp_min(1)
    return -size * gradient / square.sqrt().clamp_min(torch.finfo(torch.float32).tiny)


def inner_step(model: RecursiveModel, data: dict[str, Tensor], state: dict[str, Tensor], objective: ObjectiveConfig, lr: float) -> Tensor:
    """The shift (B, T, D) after one `sgd` step from the encoder's context, in one fresh ACT step, without a gradient of its
    own: what training adds so that the recursion has met contexts that a search finds. state: the carry's `context_state`."""
    left_out = LeaveOneOut(model, data, objective, state)
    delta = left_out.no_shift().requires_grad_()
    gradient, _ = left_out.gradient(delta, left_out.each, None)
    return sgd_step(gradient, lr * left_out.unit)
