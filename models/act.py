"""Adaptive computation time: the carry between ACT steps, and who halts when. The halting rule lives here alone."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from models.context import Context, Noise
from models.trm import RecursiveModel


@dataclass
class Carry:
    """What persists from one ACT step to the next, for B samples of one cell.

    z_H, z_L (B, S, D) detached states; steps (B,) int32 ACT steps taken; halted (B,) bool: the row starts afresh on the
    next batch's sample; data: the samples being worked on (a continuing row keeps its own, labels included);
    context_state: what the context module remembers of them, detached.
    """

    z_H: Tensor
    z_L: Tensor
    steps: Tensor
    halted: Tensor
    data: dict[str, Tensor]
    context_state: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class StepOutput:
    """One ACT step: the new carry, logits (B, L, V), halting logits (B,) and the context they were computed with, all with
    gradient.

    losses: auxiliary terms by name, (B,) each, with gradient.
    target_q_continue (B,): the bootstrapped target of Q-learning, only with no_ACT_continue=false in training.
    """

    carry: Carry
    logits: Tensor
    q_halt_logits: Tensor
    q_continue_logits: Tensor
    context: Context
    losses: dict[str, Tensor]
    target_q_continue: Tensor | None = None


def initial_carry(model: RecursiveModel, data: dict[str, Tensor]) -> Carry:
    """An all-halted carry for batches shaped like `data`; its zero states are never read."""
    batch, cells = data["inputs"].shape
    demos = data["demo_inputs"].shape[1] if "demo_inputs" in data else 0
    shape = (batch, model.context.prefix_length(demos, cells) + cells, model.config.hidden_size)
    device = data["inputs"].device
    return Carry(
        z_H=torch.zeros(shape, dtype=model.config.dtype, device=device),
        z_L=torch.zeros(shape, dtype=model.config.dtype, device=device),
        steps=torch.zeros(batch, dtype=torch.int32, device=device),
        halted=torch.ones(batch, dtype=torch.bool, device=device),
        data=data,
    )


def refresh(carry: Carry, data: dict[str, Tensor], model: RecursiveModel, noise: Noise | None = None) -> Carry:
    """Replace halted rows by the new samples in `data`, with initial states and no steps taken."""
    initial = model.context.initial_state(data, noise)

    def fresh(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(carry.halted.view(-1, *[1] * (old.ndim - 1)), new, old)

    return replace(
        carry,
        z_H=fresh(model.H_init.to(carry.z_H.dtype), carry.z_H),
        z_L=fresh(model.L_init.to(carry.z_L.dtype), carry.z_L),
        steps=fresh(torch.zeros_like(carry.steps), carry.steps),
        data={name: fresh(data[name], old) for name, old in carry.data.items()},
        context_state={name: fresh(new, carry.context_state.get(name, new)) for name, new in initial.items()},
    )


def act_step(
    model: RecursiveModel,
    carry: Carry,
    data: dict[str, Tensor],
    min_halt_steps: Tensor | None = None,
    context: Context | None = None,
    noise: Noise | None = None,
) -> StepOutput:
    """Refresh halted rows, run the model once, decide who halts.

    In training mode a row halts when its halting logit says so, but not before `min_halt_steps` (B,) (see
    `exploration`); in evaluation mode every row runs all `halt_max_steps`, which keeps a batch in step.
    The context is encoded anew, with gradient, unless a precomputed one is given (evaluation). `noise` is what a sample
    that starts now may draw from.
    """
    config = model.config
    carry = refresh(carry, data, model, noise)
    if context is None:
        context = model.context(carry.data, carry.context_state)
    context_state = {name: value.detach() for name, value in {**carry.context_state, **context.state}.items()}
    output = model(carry.z_H, carry.z_L, carry.data["inputs"], context)
    z_H, z_L = output.z_H.detach(), output.z_L.detach()
    with torch.no_grad():
        steps = carry.steps + 1
        last = steps >= config.halt_max_steps
        halted = last
        target = None
        if model.training and config.halt_max_steps > 1:
            threshold = 0 if config.no_ACT_continue else output.q_continue_logits
            halted = last | (output.q_halt_logits > threshold)
            if min_halt_steps is not None:
                halted = halted & (steps >= min_halt_steps)
            if not config.no_ACT_continue:
                next_context = model.context(carry.data, context_state) if model.context.refines else context
                after = model(z_H, z_L, carry.data["inputs"], next_context)
                best = torch.maximum(after.q_halt_logits, after.q_continue_logits)
                target = torch.where(last, after.q_halt_logits, best).sigmoid()
    carry = Carry(z_H, z_L, steps, halted, carry.data, context_state)
    return StepOutput(carry, output.logits, output.q_halt_logits, output.q_continue_logits, context, dict(context.losses), target)


def exploration(rng: np.random.Generator, batch: int, prob: float, max_steps: int) -> np.ndarray:
    """Minimum ACT steps (B,) int32 per row: with probability `prob` uniform in 2..max_steps, else 0."""
    minimum = rng.integers(2, max_steps + 1, batch) if max_steps > 1 else np.zeros(batch, np.int64)
    return np.where(rng.random(batch) < prob, minimum, 0).astype(np.int32)
