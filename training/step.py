"""One training step: forward, backward, update. A mode is one function here; the loop knows only `train_step`."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from config.base import Config
from dataset.batch import Batch
from dataset.samplers import local_rows, step_rng
from models.act import act_step, exploration, initial_carry
from models.context import Noise
from models.losses import ObjectiveConfig, act_loss
from training.diagnostics import gradient_norms, watch_gradient
from training.objectives import auxiliary_losses
from training.optim import OptimConfig, SparseSignSGD
from training.schedule import learning_rate
from training.state import TrainState
from utils import distributed
from utils.distributed import World

HALTING_STREAM = 1
NOISE_STREAM = 2


class ModeConfig(Config):
    """act: dynamic halting; the carry persists across batches, one update per ACT step (truncated BPTT)."""

    name: Literal["act"]


@dataclass(frozen=True)
class StepSettings:
    """What a step needs beside state and batch."""

    mode: ModeConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    seed: int
    global_batch_size: int
    train_steps: int
    world: World


@dataclass
class StepResult:
    """Metric sums of this process, gradient norms over all processes before clipping (`total` and of each part of the model),
    and whether the update was made."""

    metrics: dict[str, Tensor]
    grad_norms: dict[str, Tensor]
    updated: bool


def train_step(state: TrainState, batch: Batch, settings: StepSettings) -> StepResult:
    """Advance `state` by one update in the configured mode."""
    return MODES[settings.mode.name](state, batch, settings)


def act_mode(state: TrainState, batch: Batch, settings: StepSettings) -> StepResult:
    """One ACT step of the batch's cell, whose carry holds the samples that have not halted yet."""
    state.model.train()
    carry = state.carries.get(batch.cell) or initial_carry(state.model, batch.data)
    noise = _noise(state, batch, settings)
    output = act_step(state.model, carry, batch.data, _min_halt_steps(state, batch, settings), noise=noise)
    output.losses.update(auxiliary_losses(state.model, output, settings.objective, noise, settings.world))
    loss, metrics = act_loss(output, settings.objective)
    reached = watch_gradient(output.context)
    (loss / settings.global_batch_size).backward()
    metrics["context_gradient"] = reached.sum()
    result = update(state, metrics, settings)
    if result.updated:
        state.carries[batch.cell] = output.carry
    else:  # a state that broke the arithmetic once would break it at every following step
        state.carries.pop(batch.cell, None)
    return result


MODES = {"act": act_mode}


def _min_halt_steps(state: TrainState, batch: Batch, settings: StepSettings) -> Tensor:
    arch = state.model.config
    rng = step_rng(settings.seed, state.step, HALTING_STREAM)
    minimum = exploration(rng, settings.global_batch_size, arch.halt_exploration_prob, arch.halt_max_steps)
    rows = local_rows(settings.global_batch_size, settings.world.rank, settings.world.size)
    return torch.from_numpy(minimum[rows]).to(batch.data["inputs"].device, non_blocking=True)


def _noise(state: TrainState, batch: Batch, settings: StepSettings) -> Noise:
    """This process's rows of standard normal numbers for the global batch, a function of seed, step and the order of the draws."""
    rng = step_rng(settings.seed, state.step, NOISE_STREAM)
    rows = local_rows(settings.global_batch_size, settings.world.rank, settings.world.size)

    def draw(*shape: int) -> Tensor:
        values = rng.standard_normal((settings.global_batch_size, *shape), dtype=np.float32)
        return torch.from_numpy(values[rows]).to(batch.data["inputs"].device, non_blocking=True)

    return draw


def update(state: TrainState, metrics: dict[str, Tensor], settings: StepSettings) -> StepResult:
    """Sum gradients over processes, clip, update, average. A non-finite gradient leaves the parameters as they are."""
    optim = settings.optim
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    distributed.sum_gradients(parameters)
    norms = gradient_norms(state.model)
    norm = norms["total"]
    updated = _all_finite(norm, state)
    state.step += 1
    if updated:
        if optim.grad_clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, optim.grad_clip_norm, norm)
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state.step, group["base_lr"], optim.lr_warmup_steps, settings.train_steps, optim.lr_min_ratio)
            optimizer.step()
        if state.ema:
            state.ema.update()
    for optimizer in state.optimizers:
        optimizer.zero_grad()
    return StepResult(metrics, norms, updated)


def _all_finite(norm: Tensor, state: TrainState) -> bool:
    """Whether every gradient on every process is finite; puzzle rows are local, so processes have to agree on them."""
    sparse = [g for optimizer in state.optimizers if isinstance(optimizer, SparseSignSGD) for g in optimizer.gradients()]
    bad = torch.stack([~torch.isfinite(norm)] + [~torch.isfinite(g).all() for g in sparse]).any()
    return not distributed.sum_tensor(bad.float()).item()
