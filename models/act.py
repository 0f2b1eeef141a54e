"""Adaptive computation time: the carry between ACT steps, and who halts when. The halting rule lives here alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from models.context import Context, Noise
from models.core import RecursiveModel, States


@dataclass
class Carry:
    """What persists from one ACT step to the next, for B samples of one cell.

    states (B, S, D) each, detached, the answer first; steps (B,) int32 ACT steps taken; halted (B,) bool: the row starts
    afresh on the next batch's sample; data: the samples being worked on (a continuing row keeps its own, labels included);
    context_state: what the context module remembers of them, detached.
    """

    states: States
    steps: Tensor
    halted: Tensor
    data: dict[str, Tensor]
    context_state: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, rows: slice | Tensor) -> "Carry":
        return self.map(lambda value: value[rows])

    def map(self, function: Callable[[Tensor], Tensor]) -> "Carry":
        """Apply `function` to every tensor."""
        return Carry(
            states=tuple(map(function, self.states)),
            steps=function(self.steps),
            halted=function(self.halted),
            data={name: function(value) for name, value in self.data.items()},
            context_state={name: function(value) for name, value in self.context_state.items()},
        )

    @staticmethod
    def join(parts: list["Carry"]) -> "Carry":
        """The rows of all `parts`, in order."""
        if len(parts) == 1:
            return parts[0]
        return Carry(
            states=tuple(map(torch.cat, zip(*(part.states for part in parts), strict=True))),
            steps=torch.cat([part.steps for part in parts]),
            halted=torch.cat([part.halted for part in parts]),
            data={name: torch.cat([part.data[name] for part in parts]) for name in parts[0].data},
            context_state={name: torch.cat([part.context_state[name] for part in parts]) for name in parts[0].context_state},
        )


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
    device, data = data["inputs"].device, model.placed(data)
    return Carry(
        states=tuple(torch.zeros(shape, dtype=model.config.dtype, device=device) for _ in model.state_names),
        steps=torch.zeros(batch, dtype=torch.int32, device=device),
        halted=torch.ones(batch, dtype=torch.bool, device=device),
        data=data,
    )


def refresh(carry: Carry, data: dict[str, Tensor], model: RecursiveModel, noise: Noise | None = None) -> Carry:
    """Replace halted rows by the new samples in `data`, with initial states and no steps taken."""
    initial, data = model.context.initial_state(data, noise), model.placed(data)

    def fresh(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(carry.halted.view(-1, *[1] * (old.ndim - 1)), new, old)

    return replace(
        carry,
        states=tuple(fresh(new.to(old.dtype), old) for new, old in zip(model.initial_states(), carry.states, strict=True)),
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
    num_act_steps: int | None = None,
    adjust: Callable[[Context, Carry], Context] | None = None,
) -> StepOutput:
    """Refresh halted rows, run the model once, decide who halts.

    In training mode a row halts when its halting logit says so, but not before `min_halt_steps` (B,) (see
    `exploration`); in evaluation mode when its confidence reaches `halt_threshold`, if there is one. After
    `halt_max_steps` it halts in any case. `act_steps` is the loop over evaluation steps.
    With `num_act_steps` every row halts after exactly that many instead.
    The context is encoded anew, with gradient, unless a precomputed one is given (evaluation), and read as `adjust` returns
    it. `noise` is what a sample that starts now may draw from.
    """
    config = model.config
    carry = refresh(carry, data, model, noise)
    if context is None:
        context = model.context(carry.data, carry.context_state)
    context_state = {name: value.detach() for name, value in {**carry.context_state, **context.state}.items()}
    if adjust is not None:
        context = adjust(context, carry)
    output = model(carry.states, carry.data["inputs"], context, carry.data.get("places"))
    states = tuple(state.detach() for state in output.states)
    with torch.no_grad():
        steps = carry.steps + 1
        last = steps >= (num_act_steps or config.halt_max_steps)
        halted = last
        target = None
        against = output.q_continue_logits if config.act_enabled and not config.no_ACT_continue else 0  # otherwise it is not trained
        if model.training and config.act_enabled and config.halt_max_steps > 1:
            if num_act_steps is None:
                halted = last | (output.q_halt_logits > against)
                if min_halt_steps is not None:
                    halted = halted & (steps >= min_halt_steps)
            if not config.no_ACT_continue:
                next_context = model.context(carry.data, context_state) if model.context.refines else context
                after = model(states, carry.data["inputs"], next_context, carry.data.get("places"))
                best = torch.maximum(after.q_halt_logits, after.q_continue_logits)
                target = torch.where(last, after.q_halt_logits, best).sigmoid()
        elif not model.training and config.halt_threshold is not None:
            halted = last | ((output.q_halt_logits - against).sigmoid() >= config.halt_threshold)
    carry = Carry(states, steps, halted, carry.data, context_state)
    return StepOutput(carry, output.logits, output.q_halt_logits, output.q_continue_logits, context, dict(context.losses), target)


@dataclass
class Answer:
    """Logits (B, L, V) and halting logits (B,) of each row at the step at which it halted, and that step (B,)."""

    logits: Tensor
    q_halt_logits: Tensor
    steps: Tensor


@torch.no_grad()
def act_steps(model: RecursiveModel, data: dict[str, Tensor], shift: Tensor | None = None) -> Iterator[tuple[Tensor, StepOutput]]:
    """The ACT steps of a batch in evaluation mode: at each step the rows (n,) still at work, and its output for them alone.

    A row that halts leaves the batch, so that it costs nothing more and no answer depends on the others. The context is
    encoded once, or at every step if it is refined, and moved by `shift` (`Context.shifted`). Without `halt_threshold` all
    rows stay for `halt_max_steps`.
    """

    def adjust(context: Context, carry: Carry) -> Context:
        return context if shift is None else context.shifted(shift[rows])

    data = model.placed(data)
    context = None if model.context.refines else model.context(data)
    carry = initial_carry(model, data)
    rows = torch.arange(len(carry.halted), device=carry.halted.device)
    for _ in range(model.config.halt_max_steps):
        output = act_step(model, carry, data, context=context, adjust=adjust)
        yield rows, output
        carry = output.carry
        if model.config.halt_threshold is not None and carry.halted.any():
            at_work = (~carry.halted).nonzero().squeeze(1)
            if not len(at_work):
                return
            rows, carry, context = rows[at_work], carry[at_work], context and context.select(at_work)
        data = carry.data
        carry = replace(carry, halted=torch.zeros_like(carry.halted))


@torch.no_grad()
def solve(
    model: RecursiveModel,
    data: dict[str, Tensor],
    watch: Callable[[Tensor, StepOutput], None] = lambda rows, output: None,
    shift: Tensor | None = None,
) -> Answer:
    """Each row's answer, in evaluation mode: the one of its last ACT step. `watch` sees every step of `act_steps`."""
    answer = None
    for rows, output in act_steps(model, data, shift):
        watch(rows, output)
        if answer is None or len(rows) == len(answer.steps):
            answer = Answer(output.logits, output.q_halt_logits, output.carry.steps)
        else:
            answer.logits[rows] = output.logits
            answer.q_halt_logits[rows] = output.q_halt_logits
            answer.steps[rows] = output.carry.steps
    return answer


def exploration(rng: np.random.Generator, batch: int, prob: float, max_steps: int) -> np.ndarray:
    """Minimum ACT steps (B,) int32 per row: with probability `prob` uniform in 2..max_steps, else 0."""
    minimum = rng.integers(2, max_steps + 1, batch) if max_steps > 1 else np.zeros(batch, np.int64)
    return np.where(rng.random(batch) < prob, minimum, 0).astype(np.int32)
