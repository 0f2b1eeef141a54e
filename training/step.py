"""One training step: forward, backward, update. A mode is one function here; the loop knows only
`train_step`.

Every mode takes (state, batch, config, world), leaves `state.step` at a multiple of `config.mode.updates`,
and returns a `StepResult`. `accumulate` is the forward and backward pass of one ACT step, `update` what
follows it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, SerializeAsAny, field_validator
from torch import Tensor

from dataset.batch import Batch, BatchData
from dataset.canvas import IGNORE_LABEL_ID
from dataset.samplers import Stream, local_samples, step_rng
from models.act import Carry, StepOutput, act_step, exploration, initial_carry, refresh, remembering
from models.context import Context
from models.core import RecursiveModel, at_depth
from models.latent_search import inner_step
from models.losses import act_loss
from models.noise import WORD, Noise
from training.attempt import Verdict, attempt
from training.diagnostics import gradient_norms, watch_gradient
from training.jacobian import GradientConfig, Jacobian, OneObjective, Rows, objectives_of
from training.objectives import auxiliary_losses
from training.optim import OptimConfig, SparseSignSGD, set_trainable
from training.schedule import cycles_at, learning_rate
from training.state import TrainState
from utils import distributed
from utils.config import Config
from utils.distributed import World
from utils.transfer import Later, lag, sent


class ModeConfig(Config):
    """How samples meet updates. updates: how many one sampled batch gets; `state.step` counts them in every
    mode."""

    name: str
    warning: ClassVar[str | None] = None

    @property
    def updates(self) -> int:
        """Updates per sampled batch, and so per call of `train_step`."""
        return 1


class FixedStepsConfig(ModeConfig):
    """num_act_steps: ACT steps, and updates, of each sampled batch."""

    num_act_steps: PositiveInt

    @property
    def updates(self) -> int:
        return self.num_act_steps


class CachedConfig(ModeConfig):
    """Without keys of its own."""

    warning = (
        "mode=cached starves the encoder of gradient and exists to reproduce just that "
        "(train/context_gradient); train with mode=act"
    )


class StepConfig(OptimConfig, GradientConfig):
    """What a step needs to know of its run.

    depth_schedule: [share of the training, H_cycles, L_cycles] from which on; null: always the
        architecture's own.
    """

    mode: SerializeAsAny[ModeConfig]
    train_steps: NonNegativeInt
    depth_schedule: list[list[NonNegativeInt | NonNegativeFloat]] | None

    @field_validator("mode", mode="before")
    @classmethod
    def _typed_mode(cls, value: Any) -> ModeConfig:
        return value if isinstance(value, ModeConfig) else mode_config(value)

    def cycles_at(self, step: int) -> tuple[int, int] | None:
        """H and L cycles of the batch that is sampled after `step` updates; None: the architecture's own."""
        return None if self.depth_schedule is None else cycles_at(step, self.depth_schedule, self.train_steps)


@dataclass
class StepResult:
    """Metric sums of this process, gradient norms of the last update over all processes before clipping
    (`total` and of each part of the model), and by how much `state.step` advanced.

    verdict: on the last update. There is none after one that was skipped.
    worked_on: the samples of that update, which in the modes with a carry may be those of earlier batches,
    with their ACT steps.
    """

    metrics: dict[str, Tensor]
    grad_norms: dict[str, Tensor]
    verdict: Verdict
    worked_on: dict[str, Tensor]
    steps: int = 1

    @property
    def updated(self) -> bool:
        """Whether every update was made. Whoever asks waits for the device."""
        return self.verdict.made


def train_step(state: TrainState, batch: Batch, config: StepConfig, world: World) -> StepResult:
    """Train on one sampled batch in the configured mode."""
    state.model.train()
    batch = replace(batch, data=state.model.prepared(batch.data))  # once for all its ACT steps
    with at_depth(state.model, config.cycles_at(state.step)):
        result = MODES[config.mode.name][1](state, batch, config, world)
    if state.task_errors:
        state.task_errors.advance(state.step)
    return result


def act_mode(
    state: TrainState,
    batch: Batch,
    config: StepConfig,
    world: World,
    step: Callable[..., StepOutput] = act_step,
) -> StepResult:
    """One ACT step and one update; the carry of the batch's cell holds the samples that have not halted
    yet."""
    carry = state.carries.get(batch.bucket) or initial_carry(state.model, batch.data)
    carry, metrics = accumulate(state, carry, batch, config, world, step=step)
    result = update(state, carry, metrics, config)
    # A state that broke the arithmetic once would break it at every following step. So its samples end here.
    state.carries[batch.bucket] = replace(carry, halted=carry.halted | ~result.verdict.finite)
    return result


def cached_mode(state: TrainState, batch: Batch, config: StepConfig, world: World) -> StepResult:
    """`act_mode` with each sample's first context kept for all its ACT steps, as in an ancestor of this
    framework: only samples that start give the encoder a gradient, which is why its encoders hardly
    learned."""
    return act_mode(state, batch, config, world, step=_cached_act_step)


def fct_mode(state: TrainState, batch: Batch, config: StepConfig, world: World) -> StepResult:
    """Fixed computation time: a fresh carry, `num_act_steps` ACT steps, an update after each, no halting.

    Metrics other than losses are those of the last ACT step. A skipped update ends the batch.
    """
    count = config.mode.updates
    following = state.step + count
    carry = initial_carry(state.model, batch.data)
    sums: dict[str, Tensor] = {}
    result = None
    for _ in range(count):
        carry, metrics = accumulate(
            state, carry, batch, config, world, step=partial(act_step, num_act_steps=count)
        )
        # Asked only now that the device has more to do.
        if result is not None and not result.updated:
            _forget_gradients(state)
            break
        _add(sums, metrics)
        result = update(state, carry, metrics, config)
    assert result is not None, "a batch has at least one ACT step"
    state.step = following
    return replace(result, metrics=sums, steps=count)


def supervised_mode(state: TrainState, batch: Batch, config: StepConfig, world: World) -> StepResult:
    """Deep supervision with one update: a fresh carry, ACT steps until every sample has halted, gradients
    summed up.

    The loss is the mean over all (sample, ACT step) pairs up to each sample's halting. Each ACT step has its
    own backward pass, so that memory does not grow with their number.
    """
    carry = initial_carry(state.model, batch.data)
    done = torch.zeros_like(carry.halted)
    sums: dict[str, Tensor] = {}
    objectives = objectives_of(state, carry, batch, config, world)
    at_work: list[Later] = []
    late = lag(done.device)
    for _ in range(state.model.config.halt_max_steps):
        carry, metrics = accumulate(state, carry, batch, config, world, divisor=1, objectives=objectives)
        _add(sums, metrics)
        done = done | carry.halted
        # All processes take equally many steps. One too many has no labels left, and adds nothing.
        at_work.append(Later(distributed.sum_tensor((~done).sum())))
        if len(at_work) > late and not at_work[-1 - late].value:
            break
        labels = carry.data["labels"].masked_fill(done[:, None], IGNORE_LABEL_ID)
        carry = replace(carry, halted=torch.zeros_like(done), data={**carry.data, "labels": labels})
    sums |= objectives.finish()
    pairs = distributed.sum_tensor(sums["rows"].clone()).clamp_min(1)
    for parameter in state.model.parameters():
        if parameter.grad is not None:
            parameter.grad /= pairs
    return update(state, carry, sums, config)


MODES: dict[str, tuple[type[ModeConfig], Callable[[TrainState, Batch, StepConfig, World], StepResult]]] = {
    "act": (ModeConfig, act_mode),
    "fct": (FixedStepsConfig, fct_mode),
    "cached": (CachedConfig, cached_mode),
    "supervised": (ModeConfig, supervised_mode),
}


def mode_config(values: dict[str, Any]) -> ModeConfig:
    """The typed configuration of the mode that `values` names. Raises `ValueError` for an unknown one."""
    if values.get("name") not in MODES:
        raise ValueError(f"mode.name={values.get('name')!r} is unknown; there are {', '.join(MODES)}")
    return MODES[values["name"]][0](**values)


def accumulate(
    state: TrainState,
    carry: Carry,
    batch: Batch,
    config: StepConfig,
    world: World,
    step: Callable[..., StepOutput] = act_step,
    divisor: int | None = None,
    objectives: OneObjective | Jacobian | None = None,
) -> tuple[Carry, dict[str, Tensor]]:
    """One ACT step of every row: the new carry and metric sums. The gradients of the objectives, divided by
    `divisor` (None: the global batch size), are added to those of `objectives`; None: they become the
    parameters' gradient at once."""
    set_trainable(state.optimizers, config, state.step)
    min_halt_steps = _min_halt_steps(state, batch, config, world)
    descent = objectives or objectives_of(state, carry, batch, config, world)
    carries: list[Carry] = []
    sums: dict[str, Tensor] = {}
    for rows in descent.portions():
        data = {name: value[rows] for name, value in batch.data.items()}
        noise = _noise(state, batch, config, world, rows)
        latent = _latent_step(state, config)
        with descent.forward():
            output = step(state.model, carry[rows], data, min_halt_steps[rows], noise=noise, **latent)
        if config.objective.differential_weight:
            output = remembering(output, carry[rows])
        if state.task_errors:
            state.task_errors.add(output.carry, output.logits)
        output.losses.update(auxiliary_losses(state.model, output, config.objective, noise, world))
        loss, metrics = act_loss(output, config.objective)
        reached = watch_gradient(output.context)
        metrics |= descent.backward(output, loss, rows, divisor or config.global_batch_size)
        _add(sums, metrics | {"context_gradient": reached.sum()})
        carries.append(output.carry)
    if objectives is None:
        sums |= descent.finish()
    return descent.joined(carries), sums


def _latent_step(state: TrainState, config: StepConfig) -> dict[str, Callable[[Context, Carry], Context]]:
    """What a step's `adjust` is, when a latent step is due."""
    if config.latent_step_from is None or state.step < config.latent_step_from * config.train_steps:
        return {}

    def adjust(context: Context, carry: Carry) -> Context:
        return context.shifted(
            inner_step(state.model, carry.data, carry.context_state, config.objective, config.latent_step_lr)
        )

    return {"adjust": adjust}


def _cached_act_step(
    model: RecursiveModel, carry: Carry, data: BatchData, min_halt_steps: Tensor, noise: Noise
) -> StepOutput:
    """An ACT step that reads the tokens of each row's first context. The output's context is the one encoded
    now, whose gradient is that of the rows that start."""
    fresh, kept = carry.halted, carry.context_state
    carry = replace(refresh(carry, data, model, noise), halted=torch.zeros_like(fresh))
    encoded = model.context(carry.data, carry.context_state)
    tokens = {"cached_prefix": encoded.prefix}
    if encoded.memory is not None:
        tokens["cached_memory"] = encoded.memory
    tokens = {
        name: torch.where(fresh[:, None, None], new, kept.get(name, new)) for name, new in tokens.items()
    }
    context = replace(
        encoded,
        prefix=tokens["cached_prefix"],
        memory=tokens.get("cached_memory"),
        state=encoded.state | tokens,
        losses={name: torch.where(fresh, term, 0.0) for name, term in encoded.losses.items()},
    )
    return replace(
        act_step(model, carry, data, min_halt_steps, context=context, noise=noise), context=encoded
    )


def _add(sums: dict[str, Tensor], metrics: dict[str, Tensor]) -> None:
    for name, value in metrics.items():
        sums[name] = sums[name] + value if name in sums else value


def _min_halt_steps(state: TrainState, batch: Batch, config: StepConfig, world: World) -> Tensor:
    arch = state.model.config
    rng = step_rng(config.seed, state.step, Stream.HALTING)
    minimum = exploration(rng, config.global_batch_size, arch.halt_exploration_prob, arch.halt_max_steps)
    rows = local_samples(config.global_batch_size, world.rank, world.size)
    return sent(torch.from_numpy(minimum[rows]), batch.data["inputs"].device)


def _noise(
    state: TrainState, batch: Batch, config: StepConfig, world: World, portion: Rows = slice(None)
) -> Noise:
    """What a portion of this process's rows draws: their part of numbers for the global batch, a function of
    seed, step and the order of the draws."""
    rng = step_rng(config.seed, state.step, Stream.NOISE)
    rows = local_samples(config.global_batch_size, world.rank, world.size)

    def ours(values: np.ndarray) -> Tensor:
        return sent(torch.from_numpy(values[rows][portion]), batch.data["inputs"].device)

    def normal(*shape: int) -> Tensor:
        return ours(rng.standard_normal((config.global_batch_size, *shape), dtype=np.float32))

    def keys() -> Tensor:
        words = step_rng(config.seed, state.step, Stream.KEYS)
        return ours(words.integers(WORD + 1, size=config.global_batch_size))

    return Noise(normal, keys)


def update(state: TrainState, carry: Carry, metrics: dict[str, Tensor], config: StepConfig) -> StepResult:
    """Sum gradients over processes, clip, update, average. A non-finite gradient leaves the parameters as
    they are."""
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    distributed.sum_gradients(parameters)
    norms = gradient_norms(state.model)
    finite = _all_finite(norms["total"], state)
    state.settle()
    state.step += 1

    def apply() -> None:
        if config.grad_clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.grad_clip_norm, norms["total"])
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    state.step,
                    group["base_lr"],
                    config.lr_warmup_steps,
                    config.train_steps,
                    config.lr_min_ratio,
                )
            optimizer.step(finite) if isinstance(optimizer, SparseSignSGD) else optimizer.step()
        if state.ema:
            state.ema.update()

    averages = state.ema.shadow.values() if state.ema else ()
    state.verdict = attempt(finite, apply, state.optimizers, averages)
    _forget_gradients(state)
    return StepResult(metrics, norms, state.verdict, carry.data | {"steps": carry.steps})


def _forget_gradients(state: TrainState) -> None:
    for optimizer in state.optimizers:
        optimizer.zero_grad()


def _all_finite(norm: Tensor, state: TrainState) -> Tensor:
    """Whether every gradient on every process is finite, () bool; puzzle rows are local, so processes have to
    agree on them."""
    sparse = [
        g
        for optimizer in state.optimizers
        if isinstance(optimizer, SparseSignSGD)
        for g in optimizer.gradients()
    ]
    bad = torch.stack([~torch.isfinite(norm)] + [~torch.isfinite(g).all() for g in sparse]).any()
    return distributed.sum_tensor(bad.float()) == 0
