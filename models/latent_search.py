"""Search for a better context of a task with the task's own demonstrations. No weight changes.

1. Every demonstration is asked in turn, while the encoder reads the others (`leave_one_out`).
2. One shift per sample is added to the tokens of all these contexts.
3. The shift that answers the demonstrations best is added to the query's context. Its answer is never read.

Source: "Searching Latent Program Spaces" (arXiv 2411.08706), which searches one pooled latent. A shift of the
tokens does the same for contexts of any form.
Shapes: B samples, K demonstrations, T tokens of the context, D hidden.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from einops import rearrange, repeat
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from dataset.batch import BatchData, leave_one_out
from models.act import Carry, act_step, initial_carry, solve
from models.core import RecursiveModel
from models.losses import ObjectiveConfig, sample_loss
from utils.config import NamedConfig


class LeaveOneOut:
    """The demonstrations of `data` (B samples) as queries of one another, a row each (B * K).

    state: what the encoder remembers of the samples, by name (B, ...).

    rows: the data of the rows.
    counted: (B, K), the demonstrations that can be asked.
    full: the context of all demonstrations. others: that of each row, without its own.
    """

    def __init__(
        self,
        model: RecursiveModel,
        data: BatchData,
        objective: ObjectiveConfig,
        state: dict[str, Tensor] | None = None,
    ):
        self.model, self.objective = model, objective
        rows, self.counted = leave_one_out(data)
        self.rows = model.prepared(rows)
        row_state = state and {name: self.each(value) for name, value in state.items()}
        # Shifts are added to finished tokens, so that no gradient has to go through the encoder.
        with torch.no_grad():
            self.full, self.others = model.context(data, state), model.context(self.rows, row_state)

    @property
    def unit(self) -> float:
        """The RMS of the tokens that are shifted."""
        return 1.0 if self.full.memory is not None else self.full.prefix.shape[-1] ** -0.5

    def no_shift(self) -> Tensor:
        """Zeros (B, T, D), float32."""
        return torch.zeros_like(self.full.told, dtype=torch.float32)

    def to_mean(self) -> tuple[Tensor, Tensor]:
        """The shifts that move contexts to the mean over their sample's rows.

        They are those of the full context (B, T, D) and of each row's (B * K, T, D).
        """
        batch = len(self.counted)
        told = rearrange(self.others.told.float(), "(b k) t d -> b k t d", b=batch)
        mask = self.others.prefix_mask if self.others.memory is None else self.others.memory_mask
        weight = rearrange(self.counted, "b k -> b k 1 1").float()
        if mask is not None:
            weight = weight * rearrange(mask, "(b k) t -> b k t 1", b=batch)
        mean = (told * weight).sum(1) / weight.sum(1).clamp_min(1)
        return mean - self.full.told.float(), rearrange(mean[:, None] - told, "b k t d -> (b k) t d")

    def each(self, values: Tensor) -> Tensor:
        """What belongs to a sample (B, ...) for each of its rows (B * K, ...)."""
        return repeat(values, "b ... -> (b k) ...", k=self.counted.shape[1])

    def losses(self, logits: Tensor) -> Tensor:
        """The mean token loss (B,) over the demonstrations that count, from the logits of the rows."""
        loss = sample_loss(logits, self.rows["labels"], self.objective).view_as(self.counted)
        return torch.where(self.counted, loss, 0.0).sum(1) / self.counted.sum(1).clamp_min(1)

    def gradient(
        self, delta: Tensor, to_rows: Callable[[Tensor], Tensor], carry: Carry | None
    ) -> tuple[Tensor, Carry]:
        """The gradient of the losses by `delta` (B, T, D) in one ACT step, and the carry after it.

        to_rows: gives the shifts of the rows for a `delta`.
        carry: of the step before; None begins.
        """
        with torch.enable_grad():
            output = act_step(
                self.model,
                carry or initial_carry(self.model, self.rows),
                self.rows,
                context=None if self.model.context.refines else self.others,
                adjust=lambda context, carry: context.shifted(to_rows(delta)),
            )
            (gradient,) = torch.autograd.grad(self.losses(output.logits).sum(), delta)
        return gradient, output.carry

    @torch.no_grad()
    def solved(self, shift: Tensor) -> Tensor:
        """The losses (B,) of the final answers, with contexts shifted by `shift` (B * K, T, D)."""
        return self.losses(solve(self.model, self.rows, shift=shift).logits)


class LatentSearchConfig(NamedConfig):
    """How a context is searched.

    start: from the context of all demonstrations, or from the mean of those that leave one out.
    search: gradient steps, or random shifts of which the best is kept.
    optimizer: of gradient steps. Plain sgd divides a sample's gradient by its RMS.
    steps: how many gradient steps or random shifts.
    lr: of a step, or the deviation of the random shifts, in units of the context's RMS.
    """

    name: Literal["latent_search"]
    start: Literal["encoder", "mean"]
    search: Literal["gradient", "random"]
    optimizer: Literal["adam", "sgd"]
    steps: PositiveInt
    lr: PositiveFloat


@torch.no_grad()
def search(
    model: RecursiveModel,
    data: BatchData,
    objective: ObjectiveConfig,
    config: LatentSearchConfig,
    generator: torch.Generator,
) -> Tensor:
    """The shift (B, T, D) of the context of `data` that answers its demonstrations best.

    The model is in evaluation mode.
    A gradient step is one ACT step of all rows. Its carry goes on to the next, as in training.
    A sample keeps a shift only if its demonstrations are then answered with a smaller loss than without any.
    A sample with fewer than two demonstrations keeps its context.
    Beware: a mean over contexts that leave one out knows each demonstration's answer, through the other rows.

    generator: on the CPU; draws the random shifts.
    """
    left_out = LeaveOneOut(model, data, objective)
    delta = left_out.no_shift()
    if not left_out.counted.any():
        return delta
    if config.start == "mean":
        start, start_rows = left_out.to_mean()
    else:
        start, start_rows = delta, torch.zeros((), device=delta.device)

    def to_rows(delta: Tensor) -> Tensor:
        return start_rows + left_out.each(delta)

    # To be beaten: the encoder's own contexts, whatever the start.
    best, loss = delta, left_out.solved(left_out.each(delta))
    for candidate in _candidates(left_out, to_rows, config, generator):
        found = left_out.solved(to_rows(candidate))
        better = (found < loss) & left_out.counted.any(1)
        best = torch.where(better[:, None, None], start + candidate, best)
        loss = torch.where(better, found, loss)
    return best


def _candidates(
    left_out: LeaveOneOut,
    to_rows: Callable[[Tensor], Tensor],
    config: LatentSearchConfig,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """The shifts (B, T, D) from the start that are to be compared.

    They are random ones, or the one at which the gradient steps end.
    """
    delta = left_out.no_shift()
    if config.start == "mean":  # a candidate itself, since the search compares with the encoder's context
        yield delta.clone()
    if config.search == "random":
        for _ in range(config.steps):
            # One draw for all samples, so that what is found for one does not depend on its batch.
            noise = torch.randn(delta.shape[1:], generator=generator).to(delta.device)
            yield config.lr * left_out.unit * noise.expand_as(delta)
        return
    delta.requires_grad_()
    adam = torch.optim.Adam([delta], lr=config.lr * left_out.unit)
    carry = None
    for _ in range(config.steps):
        gradient, carry = left_out.gradient(delta, to_rows, carry)
        if config.optimizer == "adam":
            delta.grad = gradient
            adam.step()
        else:
            delta += sgd_step(gradient, config.lr * left_out.unit)
    yield delta.detach()


def sgd_step(gradient: Tensor, size: float) -> Tensor:
    """A step (B, T, D) against the gradient, of RMS `size` over a sample's tokens that have a gradient."""
    touched = (gradient != 0).any(-1, keepdim=True)
    count = touched.sum((1, 2), keepdim=True) * gradient.shape[-1]
    square = gradient.square().sum((1, 2), keepdim=True) / count.clamp_min(1)
    return -size * gradient / square.sqrt().clamp_min(torch.finfo(torch.float32).tiny)


def inner_step(
    model: RecursiveModel,
    data: BatchData,
    state: dict[str, Tensor],
    objective: ObjectiveConfig,
    lr: float,
) -> Tensor:
    """The shift (B, T, D) after one `sgd` step from the encoder's context, in one fresh ACT step.

    It has no gradient. Training adds it, so that the recursion meets contexts like those that a search finds.

    state: the carry's `context_state`.
    """
    left_out = LeaveOneOut(model, data, objective, state)
    delta = left_out.no_shift().requires_grad_()
    gradient, _ = left_out.gradient(delta, left_out.each, None)
    return sgd_step(gradient, lr * left_out.unit)
