"""Weights of several tasks' own, stacked to train side by side, and lent to the model one task at a time.

Shapes: G tasks side by side, R puzzle rows, D hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from models.context import PuzzleEmbedding
from models.core import RecursiveModel
from models.layers import Linear

ROWS = "context.weights"  # the table of a PuzzleEmbedding

Parameters = Literal["all", "encoder", "core", "low_rank"]


class TaskWeights:
    """The weights that learn, stacked over G tasks: `values` name -> (G, ...).

    A low-rank product has two, `name` + DOWN and UP. `frozen` holds all weights that do not learn.
    """

    DOWN, UP = "//down", "//up"

    def __init__(self, model: RecursiveModel, rows: list[Tensor], parameters: Parameters, rank: int):
        """rows: the puzzle rows (R,) of each of the G tasks, as many for each. rank: of low-rank products."""
        count = len(rows)
        own = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.frozen, self.values = own, {}
        if parameters == "low_rank":
            self.values = self._products(model, own, count, rank)
        else:
            names = _learning(model, parameters)
            self.values = {
                name: value.repeat(count, *[1] * value.ndim) for name, value in own.items() if name in names
            }
            self.frozen = {name: value for name, value in own.items() if name not in names}
        table = _puzzle_table(model)
        self.has_rows = table is not None
        if table is not None:
            self.values[ROWS] = torch.stack([table[one] for one in rows])  # (G, R, D)
        for value in self.values.values():
            value.requires_grad_()  # the model's own parameters get no gradient

    def _products(
        self, model: RecursiveModel, own: dict[str, Tensor], count: int, rank: int
    ) -> dict[str, Tensor]:
        """Two matrices for every linear map, whose product is zero at first; the same ones for every task."""
        device, generator = model.lm_head.weight.device, torch.Generator().manual_seed(0)
        products = {}
        linear = (path for path, module in model.named_modules() if isinstance(module, Linear))
        for name in sorted(f"{path}.weight" for path in linear):  # the order decides what each one is drawn
            rows, columns = own[name].shape
            start = torch.randn(rank, columns, generator=generator) * columns**-0.5
            products[name + self.DOWN] = start.to(device).repeat(count, 1, 1)
            products[name + self.UP] = torch.zeros(count, rows, rank, device=device)
        return products

    def groups(self, lr: float, row_lr: float) -> list[dict[str, Any]]:
        """The optimiser's parameter groups."""
        weights = [value for name, value in self.values.items() if name != ROWS]
        groups = [{"params": weights, "lr": lr, "is_rows": False}] if weights else []
        if self.has_rows:
            groups.append({"params": [self.values[ROWS]], "lr": row_lr, "weight_decay": 0.0, "is_rows": True})
        return groups

    @torch.no_grad()
    def prepare_gradients(self, clip_norm: float | None) -> Tensor:
        """Clip each task's gradient by its own norm; one that is not finite becomes zero.

        Returns (G,) bool: which ones are finite.
        """
        gradients = [value.grad for value in self.values.values() if value.grad is not None]
        squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients])
        norm = squares.sum(0).sqrt()  # (G,)
        scale = torch.ones_like(norm) if clip_norm is None else (clip_norm / (norm + 1e-6)).clamp(max=1)
        finite = norm.isfinite()
        for gradient in gradients:
            shape = (-1, *[1] * (gradient.ndim - 1))
            gradient.mul_(scale.view(shape))
            gradient.masked_fill_(~finite.view(shape), 0.0)
        return finite

    def effective(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """All weights of one task, by the model's names, from what its `values` hold."""
        weights = dict(self.frozen)
        for name, value in values.items():
            if name.endswith(self.DOWN):
                full = name.removesuffix(self.DOWN)
                weights[full] = self.frozen[full] + values[full + self.UP] @ value
            elif not name.endswith(self.UP):
                weights[name] = value
        return weights

    def weights(self, number: int) -> dict[str, Tensor]:
        """The model's parameters for one of the tasks."""
        weights = self.effective({name: value.detach()[number] for name, value in self.values.items()})
        return {name: value for name, value in weights.items() if name != ROWS}

    def rows(self, number: int) -> Tensor | None:
        """The puzzle rows (R, D) of one of the tasks."""
        return self.values[ROWS].detach()[number] if self.has_rows else None


def _learning(model: RecursiveModel, parameters: Parameters) -> set[str]:
    """The names of the parameters that learn; one that training keeps fixed stays fixed."""
    encoder = {f"context.{name}" for name, _ in model.context.named_parameters()}
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"all": learns, "encoder": learns & encoder, "core": learns - encoder}[parameters]


def _puzzle_table(model: RecursiveModel) -> Tensor | None:
    """The learned rows of all puzzles, of a model that has them."""
    return model.context.weights if isinstance(model.context, PuzzleEmbedding) else None


@contextmanager
def weights_lent(
    model: RecursiveModel, weights: dict[str, Tensor], identifiers: Tensor, rows: Tensor | None
) -> Iterator[None]:
    """The model with other parameters and puzzle rows; its own ones are back afterwards, to the bit.

    identifiers (R,), rows (R, D): which puzzle rows, and what they are; None: none.
    """
    own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    table = _puzzle_table(model)
    own_rows = None if table is None else table[identifiers]

    @torch.no_grad()
    def load(values: dict[str, Tensor], rows: Tensor | None) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
        if table is not None and rows is not None:
            table[identifiers] = rows

    load(weights, rows)
    try:
        yield
    finally:
        load(own, own_rows)
