"""Adaptive computation time (ACT): the carry between steps, one step, and the loop over them in evaluation.

`who_halts` is the halting rule, and the only place that knows it.
Shapes: B batch, L cells, P prefix tokens, S = P + L, D hidden, V vocabulary.
Source: "Hierarchical Reasoning Model" (arXiv 2506.21734). The paper on TRM (arXiv 2510.04871) drops its
Q-learning.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from dataset.batch import BatchData
from models.arch import ArchConfig
from models.context import Context
from models.core import ModelOutput, RecursiveModel, States
from models.noise import Draws, Noise
from models.rollouts import Rollouts, residual

ANSWER = "answer"  # in a carry's state: the logits (B, L, V) of its step, where `remembering` keeps them


@dataclass
class Carry:
    """What persists from one ACT step to the next, for B samples of one bucket.

    states: (B, S, D) each, detached, the answer first.
    steps: (B,) int32, the ACT steps taken.
    halted: (B,) bool. A halted row starts afresh, on the next batch's sample.
    data: the samples being worked on. A row that goes on keeps its own, labels included.
    context_state: what the context module remembers of the samples, detached; and `ANSWER`.
    """

    states: States
    steps: Tensor
    halted: Tensor
    data: BatchData
    context_state: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, rows: slice | Tensor | np.ndarray) -> "Carry":
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
            context_state={
                name: torch.cat([part.context_state[name] for part in parts])
                for name in parts[0].context_state
            },
        )


@dataclass
class StepOutput:
    """What one ACT step gives. All but the carry and the target has a gradient.

    carry: for the next step.
    logits: (B, L, V).
    q_halt_logits, q_continue_logits: (B,).
    context: what the answer was computed from.
    losses: auxiliary terms by name, (B,) each.
    target_q_continue: (B,), the target of Q-learning; in training with `ArchConfig.learns_to_continue` only.
    earlier_logits: (B, L, V) after each H cycle but the last, where the model was asked for them.
    logits_before: (B, L, V), detached, of the ACT step before, where `remembering` was asked for them.
    residual: (B,) how far the step has moved the states, among `Rollouts` only.
    """

    carry: Carry
    logits: Tensor
    q_halt_logits: Tensor
    q_continue_logits: Tensor
    context: Context
    losses: dict[str, Tensor]
    target_q_continue: Tensor | None = None
    earlier_logits: tuple[Tensor, ...] = ()
    logits_before: Tensor | None = None
    residual: Tensor | None = None


def initial_carry(model: RecursiveModel, data: BatchData) -> Carry:
    """A carry for batches shaped like `data`. All rows have halted; its zero states are never read."""
    batch, cells = data["inputs"].shape
    demos = data["demo_inputs"].shape[1] if "demo_inputs" in data else 0
    shape = (batch, model.context.prefix_length(demos, cells) + cells, model.config.hidden_size)
    device, data = data["inputs"].device, model.prepared(data)
    return Carry(
        states=tuple(torch.zeros(shape, dtype=model.config.dtype, device=device) for _ in model.state_names),
        steps=torch.zeros(batch, dtype=torch.int32, device=device),
        halted=torch.ones(batch, dtype=torch.bool, device=device),
        data=data,
    )


def refresh(carry: Carry, data: BatchData, model: RecursiveModel, noise: Noise | None = None) -> Carry:
    """Replace halted rows by the new samples in `data`, with initial states and no steps taken."""
    initial, data = model.context.initial_state(data, noise), model.prepared(data)

    def fresh(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(carry.halted.view(-1, *[1] * (old.ndim - 1)), new, old)

    return replace(
        carry,
        states=tuple(
            fresh(new.to(old.dtype), old)
            for new, old in zip(model.initial_states(), carry.states, strict=True)
        ),
        steps=fresh(torch.zeros_like(carry.steps), carry.steps),
        # A row that goes on is held to the labels of its own sample, not to those of the new batch.
        data={name: fresh(data[name], old) for name, old in carry.data.items()},
        context_state={name: fresh(new, carry.context_state.get(name, new)) for name, new in initial.items()},
    )


def perturbed(carry: Carry, deviation: float, draws: Draws) -> Carry:
    """The carry with normal noise added to the states of all rows but those that start.

    Source: `perturb_carry` of TinyRecursiveModelsJD, which calls it between the ACT steps of one update
    alone. In bfloat16 a state of size 1 keeps nothing of noise much smaller than 2^-9, there as here.
    """
    starts = (carry.steps == 0).view(-1, 1, 1)

    def moved(state: Tensor) -> Tensor:
        return torch.where(starts, state, (state + deviation * draws.normal(state)).to(state.dtype))

    return replace(carry, states=tuple(map(moved, carry.states)))


def who_halts(
    config: ArchConfig,
    output: ModelOutput,
    steps: Tensor,
    training: bool,
    min_halt_steps: Tensor | None = None,
    num_act_steps: int | None = None,
) -> Tensor:
    """The halting rule: which rows (B,) stop after this step. `steps` (B,) counts it.

    - A row stops after `halt_max_steps`.
    - In evaluation it also stops once its halting probability reaches `halt_threshold`, if there is one.
    - In training it also stops once halting is worth more than going on, but not before `min_halt_steps`.
    - In training with `num_act_steps` every row stops after exactly that many steps.

    min_halt_steps: (B,), at most `halt_max_steps` each.
    """
    last = steps >= (num_act_steps or config.halt_max_steps)
    # Without Q-learning nothing trains q_continue, so that going on counts as worth zero.
    margin = output.q_halt_logits
    if config.learns_to_continue:
        margin = margin - output.q_continue_logits
    if not training:
        return last if config.halt_threshold is None else last | (margin.sigmoid() >= config.halt_threshold)
    if num_act_steps is not None or not config.act_enabled or config.halt_max_steps == 1:
        return last
    halted = last | (margin > 0)
    return halted if min_halt_steps is None else halted & (steps >= min_halt_steps)


def act_step(
    model: RecursiveModel,
    carry: Carry,
    data: BatchData,
    min_halt_steps: Tensor | None = None,
    context: Context | None = None,
    noise: Noise | None = None,
    num_act_steps: int | None = None,
    adjust: Callable[[Context, Carry], Context] | None = None,
) -> StepOutput:
    """Let samples of `data` take the place of halted rows, run the model once, and decide who halts.

    min_halt_steps, num_act_steps: of the rule, `who_halts`.
    context: one computed before, for evaluation. Without it the context is encoded anew, with gradient.
    noise: what a sample that starts now, dropout and `carry_noise` draw from. Without it nothing is drawn.
    adjust: changes the context before the model reads it.

    `act_steps` is the loop over evaluation steps.
    """
    config = model.config
    carry = refresh(carry, data, model, noise)
    draws = noise.of_act_step(carry.steps) if noise is not None and config.draws else None
    if draws is not None and config.carry_noise:
        carry = perturbed(carry, config.carry_noise, draws)
    if context is None:
        context = model.context(carry.data, carry.context_state)
    # What the context does not name stays as it was, such as the noise that was drawn for a sample.
    context_state = {name: value.detach() for name, value in {**carry.context_state, **context.state}.items()}
    if adjust is not None:
        context = adjust(context, carry)
    output = model(carry.states, carry.data, context, draws)
    target = None
    with torch.no_grad():
        steps = carry.steps + 1
        halted = who_halts(config, output, steps, model.training, min_halt_steps, num_act_steps)
        # No gradient crosses from one ACT step to the next.
        states = tuple(state.detach() for state in output.states)
        carry = Carry(states, steps, halted, carry.data, context_state)
        if model.training and config.learns_to_continue and config.halt_max_steps > 1:
            target = _value_of_continuing(model, carry, context, num_act_steps)
    return StepOutput(
        carry,
        output.logits,
        output.q_halt_logits,
        output.q_continue_logits,
        context,
        dict(context.losses),
        target,
        output.earlier_logits,
    )


def remembering(output: StepOutput, before: Carry) -> StepOutput:
    """The output with the logits of the step that left the carry `before`, zero for rows that start now; its
    own carry remembers its own."""
    last = before.context_state.get(ANSWER)
    last = torch.zeros_like(output.logits) if last is None else last
    last = torch.where(before.halted.view(-1, 1, 1), 0.0, last)
    state = {**output.carry.context_state, ANSWER: output.logits.detach()}
    return replace(output, carry=replace(output.carry, context_state=state), logits_before=last)


def _value_of_continuing(
    model: RecursiveModel, carry: Carry, context: Context, num_act_steps: int | None
) -> Tensor:
    """What q_continue should have said, (B,): the better of the two probabilities one step later.

    carry: after the step. Where that was the last one, only the probability of halting counts. Nothing is
    drawn: a target is no less certain than it has to be.
    """
    # A context that is refined has changed by the next step.
    if model.context.refines:
        context = model.context(carry.data, carry.context_state)
    after = model(carry.states, carry.data, context)
    best = torch.maximum(after.q_halt_logits, after.q_continue_logits)
    last = carry.steps >= (num_act_steps or model.config.halt_max_steps)
    return torch.where(last, after.q_halt_logits, best).sigmoid()


@dataclass
class Answer:
    """An answer of each row: logits (B, L, V), halting logits (B,), and the ACT step (B,) it comes from.

    residual: (B,) how far that step has moved the states, among `Rollouts` only.
    """

    logits: Tensor
    q_halt_logits: Tensor
    steps: Tensor
    residual: Tensor | None = None

    @classmethod
    def after(cls, output: StepOutput) -> "Answer":
        """What the rows of a step would answer now."""
        return cls(output.logits, output.q_halt_logits, output.carry.steps, output.residual)


@torch.no_grad()
def act_steps(
    model: RecursiveModel, data: BatchData, shift: Tensor | None = None, rollouts: Rollouts | None = None
) -> Iterator[tuple[Tensor, StepOutput]]:
    """The ACT steps of a batch in evaluation mode, each with the rows (n,) still at work and their output.

    A row that halts leaves the batch. It costs nothing more, and no answer depends on the other rows.
    Without `halt_threshold` all rows stay for `halt_max_steps`.
    The context is encoded once, or at every step if it is refined. `shift` moves it (`Context.shifted`).
    rollouts: random starts and noise, a key per row.
    """

    def adjust(context: Context, carry: Carry) -> Context:
        return context if shift is None else context.shifted(shift[rows])

    data = model.prepared(data)  # once for all steps
    context = None if model.context.refines else model.context(data)
    carry = initial_carry(model, data)
    rows = torch.arange(len(carry.halted), device=carry.halted.device)
    if rollouts is not None:
        carry = refresh(carry, data, model)
        carry = replace(carry, states=rollouts.started(carry.states), halted=torch.zeros_like(carry.halted))
    for step in range(model.config.halt_max_steps):
        before = carry.states
        if rollouts is not None:
            carry = replace(carry, states=rollouts.disturbed(before, rows, step))
        output = act_step(model, carry, data, context=context, adjust=adjust)
        if rollouts is not None:
            output.residual = residual(before, output.carry.states)
        yield rows, output
        carry = output.carry
        # Asking whether any row has halted waits for the device, so it is asked only where one may have.
        if model.config.halt_threshold is not None and carry.halted.any():
            at_work = (~carry.halted).nonzero().squeeze(1)
            if not len(at_work):
                return
            rows, carry, context = rows[at_work], carry[at_work], context and context.select(at_work)
        # Whoever is still here goes on, so that `refresh` replaces no row.
        data = carry.data
        carry = replace(carry, halted=torch.zeros_like(carry.halted))


@torch.no_grad()
def solve(
    model: RecursiveModel,
    data: BatchData,
    watch: Callable[[Tensor, StepOutput], None] = lambda rows, output: None,
    shift: Tensor | None = None,
    rollouts: Rollouts | None = None,
) -> Answer:
    """Each row's answer in evaluation mode, which is that of its last ACT step. `watch` sees every step."""
    answer: Answer | None = None
    for rows, output in act_steps(model, data, shift, rollouts):
        watch(rows, output)
        # While no row has left, the step's output is the answer as it is, and nothing has to be copied.
        if answer is None or len(rows) == len(answer.steps):
            answer = Answer.after(output)
        else:
            answer.logits[rows] = output.logits
            answer.q_halt_logits[rows] = output.q_halt_logits
            answer.steps[rows] = output.carry.steps
            if answer.residual is not None and output.residual is not None:
                answer.residual[rows] = output.residual
    assert answer is not None, "a model takes at least one ACT step"
    return answer


def exploration(rng: np.random.Generator, batch: int, prob: float, max_steps: int) -> np.ndarray:
    """The least ACT steps (B,) int32 of each row: with probability `prob` uniform in 2..max_steps, else 0.

    Without it a head that halts too early would never see what more steps bring.
    """
    minimum = rng.integers(2, max_steps + 1, batch) if max_steps > 1 else np.zeros(batch, np.int64)
    return np.where(rng.random(batch) < prob, minimum, 0).astype(np.int32)
