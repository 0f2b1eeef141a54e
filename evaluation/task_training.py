"""Test-time training: weights of a task's own, trained on its demonstrations.

Each demonstration is in turn the query of the others. The weights of several tasks are stacked and trained
side by side (`torch.func`). No task sees another one's draws or gradients, so the result does not depend on
the company. The model itself is never trained: it holds a task's weights while that task is asked, and its
own before and after.
Source: "The Surprising Effectiveness of Test-Time Training for Few-Shot Learning" (arXiv 2411.07279).
For learned puzzle rows: "Test-time Adaptation of Tiny Recursive Models" (arXiv 2511.02886).
Shapes: G tasks side by side, B episodes, Q queries of the evaluation set.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.func import functional_call, vmap

from dataset.batch import materialise
from dataset.layouts import Layout
from dataset.samplers import Stream, step_rng
from dataset.views import EvaluationSet
from evaluation.adaptation import Adaptation, Batches
from evaluation.lessons import EpisodeSampler, Lesson, lessons_of, rows_of
from evaluation.task_weights import Parameters, TaskWeights, weights_lent
from evaluation.voting import Ranking
from models.act import Carry, act_step, exploration, initial_carry
from models.core import RecursiveModel
from models.losses import ObjectiveConfig, act_loss
from training.optim import AdamATan2
from training.schedule import learning_rate
from utils.config import NamedConfig
from utils.device import clock

BETAS = (0.9, 0.95)
_PERFORMANCE_ONLY = "There is a performance drop because we have not yet implemented the batching rule"


class TaskTrainingConfig(NamedConfig):
    """How a task's own weights are trained.

    parameters: what learns; low_rank adds a product of two matrices of rank `rank` to every linear map.
    steps, seconds: the budget per task, whichever ends first. With seconds, results depend on the machine.
    batch_size: episodes per step.
    row_lr, row_steps: of a model with puzzle rows, the rows' rate and the steps in which nothing else learns.
    as_it_was: the share of views, the first ones, that the model answers with its own weights, rounded up.
    """

    name: Literal["test_time_training"]
    parameters: Parameters
    rank: PositiveInt
    steps: PositiveInt
    seconds: PositiveFloat | None
    batch_size: PositiveInt
    lr: NonNegativeFloat
    lr_min_ratio: Annotated[float, Field(ge=0, le=1)]
    weight_decay: NonNegativeFloat
    grad_clip_norm: PositiveFloat | None
    row_lr: NonNegativeFloat
    row_steps: NonNegativeInt
    tasks_at_once: PositiveInt
    as_it_was: Annotated[float, Field(ge=0, le=1)] = 0.0


class TaskTraining(Adaptation[TaskTrainingConfig]):
    """Trains weights for each task, and lends them to the model while the task is asked."""

    config: TaskTrainingConfig
    learns_rows = True
    leaves_weights = False

    @classmethod
    def refuses(
        cls, config: TaskTrainingConfig, layout: Layout, ranking: Ranking, vote_stop: bool
    ) -> str | None:
        if layout.shares_rule:
            return (
                "protocol=test_time_training learns from a task's demonstrations, "
                "and puzzles that share one rule have none"
            )
        if layout.learns_rows and config.parameters == "encoder":
            return "protocol.parameters=encoder: this model has no encoder; its puzzle rows learn in any case"
        if layout.learns_rows and config.as_it_was:
            return (
                f"protocol.as_it_was={config.as_it_was}: a model with puzzle rows has none yet for the task; "
                "use 0"
            )
        if vote_stop:
            return (
                "vote_stop=true would train every task again for each round of views "
                "with protocol=test_time_training"
            )
        return super().refuses(config, layout, ranking, vote_stop)

    @classmethod
    def less_memory(cls, config: TaskTrainingConfig, batch_size: int) -> str:
        own = f"protocol.tasks_at_once={config.tasks_at_once} or protocol.batch_size={config.batch_size}"
        return f"{super().less_memory(config, batch_size)}, {own}"

    def batches(self, questions: EvaluationSet, views: slice, queries: np.ndarray) -> Batches:
        """This process's share of the views, task by task, the model holding the weights for just these.

        The views that the model answers as it was come first, then the queries without enough demonstrations
        to learn from. For both the model holds its own weights.
        """
        world, model = self.respondent.world, self.respondent.model
        first, end, _ = views.indices(questions.num_views)
        own = max(first, min(end, math.ceil(questions.num_views * self.config.as_it_was)))
        if own > first:
            yield from questions.batches(self.batch_size, world.rank, world.size, slice(first, own), queries)
        if own == end:
            return
        views = slice(own, end)
        lessons, without = lessons_of(questions, queries)
        if world.is_main and without.any():
            yield from questions.batches(self.batch_size, views=views, queries=without)
        for stack in self._stacks(questions, lessons)[world.rank :: world.size]:
            trained = self.train(questions, stack)
            for number, lesson in enumerate(stack):
                asked = np.zeros(len(questions.queries), bool)
                asked[list(lesson.queries)] = True
                rows, _ = rows_of(questions, lesson)
                with weights_lent(model, trained.weights(number), rows, trained.rows(number)):
                    yield from questions.batches(self.batch_size, views=views, queries=asked)

    def _stacks(self, questions: EvaluationSet, lessons: Sequence[Lesson]) -> list[list[Lesson]]:
        """The lessons that are trained side by side: those of equal shapes, `tasks_at_once` at a time."""
        groups: dict[tuple[int, int, int], list[Lesson]] = {}
        for lesson in lessons:
            shape = (lesson.side, len(lesson.pairs), len(rows_of(questions, lesson)[0]))
            groups.setdefault(shape, []).append(lesson)
        size = self.config.tasks_at_once
        return [
            group[start : start + size]
            for _, group in sorted(groups.items())
            for start in range(0, len(group), size)
        ]

    @torch.enable_grad()
    def train(self, questions: EvaluationSet, lessons: Sequence[Lesson]) -> TaskWeights:
        """The weights of `lessons` of equal shapes (`_stacks`)."""
        config, model, device = self.config, self.respondent.model, self.respondent.device
        started = clock(device)
        rows = [rows_of(questions, lesson)[0] for lesson in lessons]
        trained = TaskWeights(model, rows, config.parameters, config.rank)
        samplers = [EpisodeSampler(questions, lesson, self.seed) for lesson in lessons]
        groups = trained.groups(config.lr, config.row_lr)
        optimizer = AdamATan2(groups, lr=config.lr, betas=BETAS, weight_decay=config.weight_decay)
        rates = [group["lr"] for group in optimizer.param_groups]
        carry: dict[str, Any] | None = None
        model.train()
        model.context.eval()  # a variational encoder tells its mean, at test time too
        try:
            for step in range(config.steps):
                # The tasks of a stack share their budgets, as they share every step.
                if config.seconds is not None and clock(device) - started > config.seconds * len(lessons):
                    break
                data = [self._episodes(questions, sampler) for sampler in samplers]
                if carry is None:
                    carry = _stacked([vars(initial_carry(model, batch)) for batch in data])
                loss, carry = self._forward(trained, _stacked(data), carry, self._minimum_steps(step))
                loss.sum().backward()
                broken = ~trained.prepare_gradients(config.grad_clip_norm)
                # A broken state would break every following step, so all its samples start afresh.
                carry["halted"] = carry["halted"] | broken[:, None]
                self._set_rates(optimizer, rates, step, trained.has_rows)
                optimizer.step()
                optimizer.zero_grad()
        finally:
            model.eval()
        return trained

    def _episodes(self, questions: EvaluationSet, sampler: EpisodeSampler) -> dict[str, Tensor]:
        """What one task is trained on in one step."""
        return materialise(sampler.draw(self.config.batch_size), questions.store, self.respondent.table).data

    def _minimum_steps(self, step: int) -> Tensor:
        """(B,) before how many ACT steps no episode halts: drawn as in training, the same for every task."""
        config = self.respondent.model.config
        rng = step_rng(self.seed, step, Stream.HALTING)
        minimum = exploration(
            rng, self.config.batch_size, config.halt_exploration_prob, config.halt_max_steps
        )
        return torch.from_numpy(minimum).to(self.respondent.device)

    def _set_rates(
        self, optimizer: torch.optim.Optimizer, rates: Sequence[float], step: int, has_rows: bool
    ) -> None:
        """Set the learning rates of a step; that of all other weights is 0 while puzzle rows learn alone."""
        config = self.config
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            held = step < config.row_steps and not group["is_rows"] and has_rows
            scheduled = learning_rate(step + 1, rate, 0, config.steps, config.lr_min_ratio)
            group["lr"] = 0.0 if held else scheduled

    def _forward(
        self, trained: TaskWeights, data: dict[str, Tensor], carry: dict[str, Any], minimum: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """The losses (G,) of one ACT step of all tasks, and the carry after it, as a stacked dictionary."""
        step = _Step(self.respondent.model, self.respondent.objective)

        def alone(
            values: dict[str, Tensor], carry: dict[str, Any], data: dict[str, Tensor]
        ) -> tuple[Tensor, dict[str, Any]]:
            weights = {f"model.{name}": value for name, value in trained.effective(values).items()}
            return functional_call(step, weights, (carry, data, minimum))

        with warnings.catch_warnings():
            # Attention runs task by task, all the rest at once.
            warnings.filterwarnings("ignore", message=_PERFORMANCE_ONLY)
            return vmap(alone)(trained.values, carry, data)


class _Step(nn.Module):
    """One ACT step as a function of weights, carry and data, for `functional_call`."""

    def __init__(self, model: RecursiveModel, objective: ObjectiveConfig):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(
        self, carry: dict[str, Any], data: dict[str, Tensor], minimum: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        output = act_step(self.model, Carry(**carry), data, minimum)
        loss, _ = act_loss(output, self.objective)
        return loss / len(minimum), vars(output.carry)


def _stacked(values: Sequence[Any]) -> Any:
    """Nested dictionaries and tuples of tensors, stacked along a new first dimension."""
    first = values[0]
    if isinstance(first, dict):
        return {name: _stacked([value[name] for value in values]) for name in first}
    if isinstance(first, tuple):
        return tuple(_stacked(list(parts)) for parts in zip(*values, strict=True))
    return torch.stack(list(values))
