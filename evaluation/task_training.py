"""Test-time training: weights of a task's own, trained on its demonstrations, each in turn the query of the others.

The weights of several tasks are stacked and trained side by side (`torch.func`); no task sees another one's draws or
gradients, so that the result does not depend on the company. The model itself is never trained: it holds a task's weights
while that task is asked, and its own ones before and after.
Sources: "The Surprising Effectiveness of Test-Time Training for Few-Shot Learning" (arXiv 2411.07279); for learned puzzle
rows "Test-time Adaptation of Tiny Recursive Models" (arXiv 2511.02886).
Shapes: G tasks side by side, B episodes, V views.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.func import functional_call, vmap

from dataset import augment
from dataset.batch import Bucket, Samples, materialise
from dataset.canvas import GridTable
from dataset.samplers import Stream, draw_offsets, step_rng
from dataset.views import EvaluationSet
from models.act import Carry, act_step, exploration, initial_carry
from models.context import PuzzleEmbedding
from models.core import RecursiveModel
from models.layers import Linear
from models.losses import ObjectiveConfig, act_loss
from training.optim import AdamATan2
from training.schedule import learning_rate
from utils.config import Config
from utils.device import clock
from utils.distributed import World

BETAS = (0.9, 0.95)
ROWS = "context.weights"  # the table of a PuzzleEmbedding
_PERFORMANCE_ONLY = "There is a performance drop because we have not yet implemented the batching rule"


class TaskTrainingConfig(Config):
    """parameters: what learns; low_rank adds a product of two matrices of rank `rank` to every linear map. steps, seconds:
    the budget per task, whichever ends first (with seconds, results depend on the machine). batch_size: episodes per step.
    row_lr, row_steps: of a model with puzzle rows: the rows' rate, and the steps in which nothing else learns.
    """

    __test__ = False  # not a test, whatever its name begins with

    name: Literal["test_time_training"]
    parameters: Literal["all", "encoder", "core", "low_rank"]
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


@dataclass(frozen=True)
class Lesson:
    """What one set of weights is trained on and asked: the demonstrations, and the numbers of the queries that they explain."""

    task: int
    pairs: tuple[int, ...]
    queries: tuple[int, ...]
    side: int


class TaskTraining:
    """Trains a model's weights for the tasks of evaluation sets, and lends them to the model while a task is asked."""

    __test__ = False

    def __init__(self, config: TaskTrainingConfig, objective: ObjectiveConfig, seed: int):
        self.config, self.objective, self.seed = config, objective, seed

    def adapted(
        self,
        model: RecursiveModel,
        questions: EvaluationSet,
        table: GridTable,
        asked: np.ndarray,
        world: World,
    ) -> Iterator[np.ndarray]:
        """Yield this process's share of the queries of `asked` (Q,) bool, a mask (Q,) at a time, the model holding the weights
        for just these. Queries without enough demonstrations to learn from come first, with the model's own weights."""
        lessons, without = lessons_of(questions, asked)
        if world.is_main and without.any():
            yield without
        groups: dict[tuple[int, int, int], list[Lesson]] = {}
        for lesson in lessons:
            groups.setdefault((lesson.side, len(lesson.pairs), len(_rows(questions, lesson)[0])), []).append(
                lesson
            )
        size = self.config.tasks_at_once
        stacks = [
            lessons[start : start + size]
            for _, lessons in sorted(groups.items())
            for start in range(0, len(lessons), size)
        ]
        for stack in stacks[world.rank :: world.size]:
            trained = self.train(model, questions, table, stack)
            for number, lesson in enumerate(stack):
                mask = np.zeros(len(questions.queries), bool)
                mask[list(lesson.queries)] = True
                with holding(
                    model, trained.weights(number), _rows(questions, lesson)[0], trained.rows(number)
                ):
                    yield mask

    @torch.enable_grad()
    def train(
        self, model: RecursiveModel, questions: EvaluationSet, table: GridTable, lessons: Sequence[Lesson]
    ) -> "Trained":
        """The weights of `lessons`, which lie on one canvas and have equally many demonstrations."""
        config, started = self.config, clock(table.pixels.device)
        trained = Trained(model, questions, lessons, config)
        draws = [_Episodes(questions, lesson, self.seed) for lesson in lessons]
        optimizer = AdamATan2(
            trained.groups(config), lr=config.lr, betas=BETAS, weight_decay=config.weight_decay
        )
        rates = [group["lr"] for group in optimizer.param_groups]
        carry: dict[str, Any] | None = None
        model.train()
        model.context.eval()  # a variational encoder tells its mean, at test time too
        try:
            for step in range(config.steps):
                if config.seconds is not None and clock(table.pixels.device) - started > config.seconds * len(
                    lessons
                ):
                    break
                batches = [
                    materialise(draw(config.batch_size), questions.store, table).data for draw in draws
                ]
                data = {name: torch.stack([batch[name] for batch in batches]) for name in batches[0]}
                if carry is None:
                    carry = _stacked([vars(initial_carry(model, batch)) for batch in batches])
                minimum = exploration(
                    step_rng(self.seed, step, Stream.HALTING),
                    config.batch_size,
                    model.config.halt_exploration_prob,
                    model.config.halt_max_steps,
                )
                loss, carry = self._forward(
                    model, trained, data, carry, torch.from_numpy(minimum).to(table.pixels.device)
                )
                loss.sum().backward()
                broken = ~trained.prepare_gradients(config.grad_clip_norm)
                carry["halted"] = (
                    carry["halted"] | broken[:, None]
                )  # a broken state would break every following step
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    held = step < config.row_steps and not group["is_rows"] and trained.has_rows
                    group["lr"] = (
                        0.0 if held else learning_rate(step + 1, rate, 0, config.steps, config.lr_min_ratio)
                    )
                optimizer.step()
                optimizer.zero_grad()
        finally:
            model.eval()
        return trained

    def _forward(
        self,
        model: RecursiveModel,
        trained: "Trained",
        data: dict[str, Tensor],
        carry: dict[str, Any],
        minimum: Tensor,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The losses (G,) of one ACT step of all tasks, and the carry after it, as a stacked dictionary."""
        step = _Step(model, self.objective)

        def alone(
            values: dict[str, Tensor], carry: dict[str, Any], data: dict[str, Tensor]
        ) -> tuple[Tensor, dict[str, Any]]:
            weights = {f"model.{name}": value for name, value in trained.effective(values).items()}
            return functional_call(step, weights, (carry, data, minimum))

        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=_PERFORMANCE_ONLY
            )  # attention runs task by task, all the rest at once
            return vmap(alone)(trained.values, carry, data)


class Trained:
    """The weights that learn, stacked over G tasks: `values` name -> (G, ...). A low-rank product has two, `name` + DOWN, UP."""

    DOWN, UP = "//down", "//up"

    def __init__(
        self,
        model: RecursiveModel,
        questions: EvaluationSet,
        lessons: Sequence[Lesson],
        config: TaskTrainingConfig,
    ):
        count, device = len(lessons), model.lm_head.weight.device
        encoder = {f"context.{name}" for name, _ in model.context.named_parameters()}
        own = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.frozen, self.values = own, {}
        if config.parameters == "low_rank":
            generator = torch.Generator().manual_seed(0)
            for name in sorted(
                f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Linear)
            ):
                rows, columns = own[name].shape
                start = torch.randn(config.rank, columns, generator=generator) * columns**-0.5
                self.values[name + self.DOWN] = start.to(device).repeat(count, 1, 1)
                self.values[name + self.UP] = torch.zeros(count, rows, config.rank, device=device)
        else:
            learns = {
                name for name, parameter in model.named_parameters() if parameter.requires_grad
            }  # encoder.learned_start=false
            wanted = {"all": learns, "encoder": learns & encoder, "core": learns - encoder}[config.parameters]
            self.values = {
                name: value.repeat(count, *[1] * value.ndim) for name, value in own.items() if name in wanted
            }
            self.frozen = {name: value for name, value in own.items() if name not in wanted}
        self.has_rows = isinstance(model.context, PuzzleEmbedding)
        if self.has_rows:
            self.values[ROWS] = torch.stack(
                [model.context.weights[_rows(questions, lesson)[0]] for lesson in lessons]
            )
        for value in self.values.values():
            value.requires_grad_()

    def groups(self, config: TaskTrainingConfig) -> list[dict[str, Any]]:
        """The optimiser's parameter groups."""
        weights = [value for name, value in self.values.items() if name != ROWS]
        groups = [{"params": weights, "lr": config.lr, "is_rows": False}] if weights else []
        rows = (
            [{"params": [self.values[ROWS]], "lr": config.row_lr, "weight_decay": 0.0, "is_rows": True}]
            if self.has_rows
            else []
        )
        return groups + rows

    @torch.no_grad()
    def prepare_gradients(self, clip_norm: float | None) -> Tensor:
        """Clip each task's gradient by its own norm; one that is not finite becomes zero. (G,) bool: which ones are finite."""
        gradients = [value.grad for value in self.values.values() if value.grad is not None]
        norm = (
            torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0).sqrt()
        )  # (G,)
        scale = torch.ones_like(norm) if clip_norm is None else (clip_norm / (norm + 1e-6)).clamp(max=1)
        finite = norm.isfinite()
        for gradient in gradients:
            shape = (-1, *[1] * (gradient.ndim - 1))
            gradient.mul_(scale.view(shape))
            gradient.masked_fill_(~finite.view(shape), 0.0)
        return finite

    def effective(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """All weights of one task, by the model's names, from what its `values` hold."""
        found = dict(self.frozen)
        for name, value in values.items():
            if name.endswith(self.DOWN):
                full = name.removesuffix(self.DOWN)
                found[full] = self.frozen[full] + values[full + self.UP] @ value
            elif not name.endswith(self.UP):
                found[name] = value
        return found

    def weights(self, number: int) -> dict[str, Tensor]:
        """The model's parameters for one of the tasks."""
        found = self.effective({name: value.detach()[number] for name, value in self.values.items()})
        return {name: value for name, value in found.items() if name != ROWS}

    def rows(self, number: int) -> Tensor | None:
        """The puzzle rows (V, ...) of one of the tasks."""
        return self.values[ROWS].detach()[number] if self.has_rows else None


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


class _Episodes:
    """Draws what one task is trained on, a function of seed and task alone."""

    def __init__(self, questions: EvaluationSet, lesson: Lesson, seed: int):
        self.questions, self.lesson = questions, lesson
        store = questions.store
        owner = int(np.searchsorted(store.task_pairs, lesson.pairs[0], side="right")) - 1
        shown = " ".join(str(pair - int(store.task_pairs[owner])) for pair in lesson.pairs)
        self.rng = augment.task_rng(seed, f"{store.task_ids[lesson.task]} {store.task_ids[owner]} {shown}")
        self.query = questions.queries[lesson.queries[0]]
        self.rows = _rows(questions, lesson)[1]

    def __call__(self, count: int) -> Samples:
        """`count` samples in one bucket: augmented as in training; a puzzle row is named by its place among the lesson's rows."""
        questions, rng, pairs = self.questions, self.rng, np.array(self.lesson.pairs)
        config, store = questions.config, questions.store
        if store.layout.reads_demonstrations:
            order = pairs[rng.random((count, len(pairs))).argsort(axis=1)]
            query, demos = order[:, 0], order[:, 1:]
            transform, colours = np.zeros(count, np.int64), augment.identity_colours(count)
            if config.turns:
                transform = rng.integers(0, 8, count)
            if config.augmentation != "none":
                colours = augment.random_colours(rng, count)
            identifier = np.full(count, questions.told(self.query)[1][0])
        else:
            query, demos = rng.choice(pairs, count), np.zeros((count, 0), np.int64)
            chosen = rng.integers(0, questions.views_of(self.query), count)
            identifier = self.rows[chosen]
            views = [questions.view(self.query, int(view)) for view in chosen]
            transform, colours = np.array([view[0] for view in views]), np.stack([view[1] for view in views])
        bucket = Bucket(self.lesson.side, demos.shape[1])
        offset = draw_offsets(
            store, config, rng, bucket, np.concatenate([query[:, None], demos], axis=1), transform
        )
        return Samples(
            bucket, query, demos, np.ones(demos.shape, bool), transform, colours, offset, identifier
        )


def lessons_of(questions: EvaluationSet, asked: np.ndarray) -> tuple[list[Lesson], np.ndarray]:
    """The lessons of the queries of `asked`, and which of these (Q,) have too few demonstrations to learn from."""
    found: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    without = np.zeros(len(questions.queries), bool)
    for number in np.flatnonzero(asked & questions.asked).tolist():
        query = questions.queries[number]
        if questions.side_of(query) is None:
            continue
        if questions.can_adapt(query):
            found.setdefault((query.task, questions.demonstrations(query)), []).append(number)
        else:
            without[number] = True
    lessons = [
        Lesson(task, pairs, tuple(numbers), questions.side_of(questions.queries[numbers[0]]))
        for (task, pairs), numbers in found.items()
    ]
    return lessons, without


@contextmanager
def holding(
    model: RecursiveModel, weights: dict[str, Tensor], identifiers: Tensor, rows: Tensor | None
) -> Iterator[None]:
    """The model with other parameters and puzzle rows; its own ones are back afterwards, to the bit."""
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    own_rows = None if rows is None else model.context.weights[identifiers]

    @torch.no_grad()
    def load(values: dict[str, Tensor], rows: Tensor | None) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
        if rows is not None:
            model.context.weights[identifiers] = rows

    load(weights, rows)
    try:
        yield
    finally:
        load(own, own_rows)


def _rows(questions: EvaluationSet, lesson: Lesson) -> tuple[Tensor, np.ndarray]:
    """The different puzzle identifiers (R,) that a lesson's queries are asked with, and each view's place (V,) among them."""
    told, place = np.unique(
        questions.told(questions.queries[lesson.queries[0]])[1].astype(np.int64), return_inverse=True
    )
    return torch.from_numpy(told), place


def _stacked(values: list[Any]) -> Any:
    """Nested dictionaries and tuples of tensors, stacked along a new first dimension."""
    first = values[0]
    if isinstance(first, dict):
        return {name: _stacked([value[name] for value in values]) for name in first}
    if isinstance(first, tuple):
        return tuple(_stacked(list(parts)) for parts in zip(*values, strict=True))
    return torch.stack(values)
