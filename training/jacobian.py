"""One update of one objective, or of many: the portions in which its samples are computed, and what becomes
of the gradients.

Every objective has a row of the Jacobian, its gradient by all that learns, puzzle rows included. A row is an
ordinary backward pass, added up over portions and ACT steps, so that no operation of a model needs to know of
it. Where the objectives are samples, or groups of them, they are computed one after the other: as many
samples in all as in plain training, and the activations of one objective at a time. The other splits share
one forward pass and have a backward pass each. Shapes: B samples of this process, L cells, m objectives.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from dataset.batch import Batch
from dataset.canvas import IGNORE_LABEL_ID
from dataset.samplers import Stream, step_rng
from models.act import Carry, StepOutput
from models.context import PuzzleEmbedding
from models.core import answers_after_every_cycle
from models.losses import LossTerms, loss_terms
from training.aggregation import statistics, weigh, weighting
from training.splits import DescentConfig, Numbering, Sizes
from training.state import TrainState
from utils import distributed
from utils.config import Config
from utils.device import clock
from utils.distributed import World

COLUMNS = 1 << 18  # of the Jacobian that are multiplied, and sent, at once


Rows = slice | np.ndarray  # of a process's batch


class GradientConfig(Config):
    """What the gradient of an update needs to know of its run.

    global_batch_size: samples of one update, over all processes. micro_batch_size: at most so many samples of
    a process go through a forward and backward pass at once; null: all of them.
    """

    objective: DescentConfig
    seed: NonNegativeInt
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt | None

    @model_validator(mode="after")
    def _check_portions(self) -> "GradientConfig":
        if self.objective.contrastive_weight and self.micro_batch_size is not None:
            raise ValueError(
                f"objective.contrastive_weight={self.objective.contrastive_weight} compares all samples of "
                "a batch,"
                f" which micro_batch_size={self.micro_batch_size} would take apart; set micro_batch_size=null"
            )
        return self

    def micro_batches(self, world: World) -> list[slice]:
        """The rows of a process's batch, in the portions in which they are computed."""
        size = self.global_batch_size // world.size
        portion = self.micro_batch_size or size
        return [slice(start, start + portion) for start in range(0, size, portion)]


class OneObjective:
    """Plain training: the gradient of the summed loss."""

    def __init__(self, config: GradientConfig, world: World):
        self.config, self.world = config, world

    def portions(self) -> Sequence[Rows]:
        """The rows of this process's batch that are computed together, in the order in which they are."""
        return self.config.micro_batches(self.world)

    def forward(self) -> AbstractContextManager:
        """Around the forward pass of a portion."""
        return nullcontext()

    def backward(self, output: StepOutput, loss: Tensor, rows: Rows, divisor: int) -> dict[str, Tensor]:
        """Add the gradients of a portion's summed loss over `divisor`. Returns metric sums."""
        (loss / divisor).backward()
        return {}

    def joined(self, carries: list[Carry]) -> Carry:
        """The carry of the whole batch, from those of the portions; ends the ACT step."""
        return Carry.join(carries)

    def finish(self) -> dict[str, Tensor]:
        """Leave the update's gradient in the parameters. Returns metric sums."""
        return {}


class Row:
    """An objective's gradient: by parameter, and by the rows of the puzzle table as (identifiers (n,),
    gradients (n, X))."""

    def __init__(self) -> None:
        self.of: dict[nn.Parameter, Tensor] = {}
        self.table: list[tuple[Tensor, Tensor]] = []

    @property
    def nbytes(self) -> int:
        """Of its numbers."""
        return sum(gradient.nbytes for gradient in (*self.of.values(), *(rows for _, rows in self.table)))


class Jacobian:
    """Many objectives: their gradients, kept apart until their aggregate is known.

    Processes share objectives as they share the batch: the Gramian is that of the global rows, so that the
    update is the one of a single process. It costs a message of all rows.
    """

    def __init__(self, state: TrainState, carry: Carry, batch: Batch, config: GradientConfig, world: World):
        # Several backward passes through one graph, which compiled functions otherwise refuse.
        torch._functorch.config.donated_buffer = False
        self.objective, self.model = config.objective, state.model
        self.micro_batch_size = config.micro_batch_size
        self.method = weighting(self.objective.aggregator)
        labels = batch.data["labels"]
        count, cells = labels.shape
        self.samples = np.arange(count) + world.rank * count
        self.sizes = Sizes(self.model.config.halt_max_steps, config.global_batch_size, cells)
        real, rng = None, None
        if self.objective.groups is not None:
            worked_on = torch.where(carry.halted[:, None], labels, carry.data["labels"]) != IGNORE_LABEL_ID
            real = distributed.gather_rows(worked_on.to(torch.uint8)).bool().cpu().numpy()
            rng = step_rng(config.seed, state.step, Stream.GROUPS)
        self.numbering = Numbering(self.objective, self.sizes, real, rng)
        self.seed = int(step_rng(config.seed, state.step, Stream.AGGREGATION).integers(2**63))
        self.rows: dict[int, Row] = {}
        self.identifiers: list[Tensor] = []  # of the puzzle rows that were read
        self.step = 0

    def portions(self) -> Sequence[Rows]:
        """The rows of this process's batch that are computed together, in the order in which they are: where
        objectives are samples, or groups of them, those of one objective."""
        together = [np.arange(len(self.samples))]
        if "sample" in self.objective.axes and "cell" not in self.objective.axes:
            numbers = self.numbering.of_cells(self.step, self.samples)[:, 0]
            together = [np.flatnonzero(numbers == number) for number in np.unique(numbers)]
        size = self.micro_batch_size or len(self.samples)
        return [rows[start : start + size] for rows in together for start in range(0, len(rows), size)]

    def forward(self) -> AbstractContextManager:
        """Around the forward pass of a portion."""
        return answers_after_every_cycle(self.model, "cycle" in self.objective.axes)

    def backward(self, output: StepOutput, loss: Tensor, rows: Rows, divisor: int) -> dict[str, Tensor]:
        """Add the gradients of a portion's objectives over `divisor` to their rows. Returns metric sums."""
        terms = loss_terms(output, self.objective)
        objectives = self.objectives(terms, output.carry.data["labels"] != IGNORE_LABEL_ID, rows)
        for left, (number, objective) in zip(reversed(range(len(objectives))), objectives, strict=True):
            (objective / divisor).backward(retain_graph=left > 0)
            self._collect(self.rows.setdefault(number, Row()))
        self.identifiers += [identifiers for identifiers, _ in self._gathered()]
        self._gathered().clear()
        return {f"cycle_{place}_lm_loss": one.detach().sum() for place, one in enumerate(terms.earlier, 1)}

    def objectives(self, terms: LossTerms, real: Tensor, rows: Rows) -> list[tuple[int, Tensor]]:
        """The objectives that the samples `rows` of this process have a part in: number and that part, with
        gradient, of the terms of their loss; real (B, L) has a label."""
        axes, numbering, samples = self.objective.axes, self.numbering, self.samples[rows]
        labelled = real.any(1)
        apart = self.objective.halting == "apart" or "term" in axes
        inside = [] if apart else [terms.halting]
        inside += [] if "term" in axes else list(terms.auxiliary.values())
        spread = real / real.sum(1, keepdim=True).clamp_min(1)  # what belongs to a sample, over its cells
        tokens = terms.tokens + sum(inside, torch.zeros_like(terms.halting))[:, None] * spread
        found = _by_number(tokens, real, numbering.of_cells(self.step, samples))
        if apart:
            found += _by_number(terms.halting, labelled, numbering.of_halting(self.step, samples))
        weight = self.objective.internal_weight if "final" in axes else 1.0
        single = [weight * one.sum() for one in terms.earlier]
        single += [one.sum() for one in terms.auxiliary.values()] if "term" in axes else []
        return found + [(numbering.total + place, one) for place, one in enumerate(single) if found]

    def joined(self, carries: list[Carry]) -> Carry:
        """The carry of the whole batch, from those of the portions; ends the ACT step."""
        order = np.concatenate([self.samples[rows] for rows in self.portions()])
        self.step += 1
        return Carry.join(carries)[np.argsort(order)]

    @torch.no_grad()
    def finish(self) -> dict[str, Tensor]:
        """Aggregate the rows, and leave the update's gradient in the parameters. Returns metric sums."""
        device = self.model.lm_head.weight.device
        started = clock(device)
        memory = sum(row.nbytes for row in self.rows.values())
        numbers, parameters = self._agreed()
        identifiers = (
            distributed.gather_rows(torch.cat(self.identifiers)).unique() if self.identifiers else None
        )
        rows = [self.rows.get(number, Row()) for number in numbers]
        tables = None if identifiers is None else _tables(rows, identifiers, self._puzzle_rows())
        gramian = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device)
        for block in self._blocks(rows, parameters, tables):
            distributed.sum_tensor(block)
            gramian += block @ block.T
        weights, failed = weigh(self.objective.aggregator, self.method, gramian, self.seed)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
            for weight, row in zip(weights.tolist(), rows, strict=True):
                if parameter in row.of:
                    parameter.grad.add_(row.of.pop(parameter), alpha=weight)
        if identifiers is not None and tables is not None:
            leaf = self._puzzle_rows()[identifiers]
            leaf.grad = (weights.to(tables) @ tables.flatten(1)).view_as(leaf)
            self._gathered().append((identifiers, leaf))
        values = statistics(gramian, weights) if rows else {}
        values |= {
            "updates": 1.0,
            "fallbacks": float(failed),
            "memory_gb": memory / 1e9,
            "ms": 1000 * (clock(device) - started),
        }
        return {f"jacobian/{name}": torch.tensor(value, device=device) for name, value in values.items()}

    def _agreed(self) -> tuple[list[int], list[nn.Parameter]]:
        """The objectives, and the parameters, of which some process has a gradient."""
        learns = [
            any(parameter in row.of for row in self.rows.values()) for parameter in self.model.parameters()
        ]
        found = distributed.gather_objects((sorted(self.rows), learns))
        numbers = sorted(set().union(*(theirs for theirs, _ in found)))
        anywhere = np.any([theirs for _, theirs in found], axis=0)
        return numbers, [
            parameter for parameter, here in zip(self.model.parameters(), anywhere, strict=True) if here
        ]

    def _blocks(
        self, rows: list[Row], parameters: list[nn.Parameter], tables: Tensor | None
    ) -> Iterator[Tensor]:
        """The columns of the Jacobian (m, n), in portions."""
        for parameter in parameters:
            nothing = torch.zeros_like(parameter).flatten()
            flat = [row.of[parameter].flatten() if parameter in row.of else nothing for row in rows]
            for start in range(0, len(nothing), COLUMNS):
                yield torch.stack([part[start : start + COLUMNS] for part in flat])
        if tables is not None:
            yield tables.flatten(1).clone()

    def _collect(self, row: Row) -> None:
        """Move what a backward pass left behind to `row`."""
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                row.of[parameter] = (
                    row.of[parameter].add_(parameter.grad) if parameter in row.of else parameter.grad
                )
                parameter.grad = None
        for identifiers, leaf in self._gathered():
            if leaf.grad is not None:
                row.table.append((identifiers, leaf.grad))
                leaf.grad = None

    def _puzzle_rows(self) -> Tensor:
        """The whole table (N, X)."""
        return self.model.context.get_buffer("weights")

    def _gathered(self) -> list[tuple[Tensor, Tensor]]:
        return self.model.context.gathered if isinstance(self.model.context, PuzzleEmbedding) else []


def _tables(rows: list[Row], identifiers: Tensor, table: Tensor) -> Tensor:
    """(m, U, X) the objectives' gradients by the rows `identifiers` (U,) of the puzzle table (N, X)."""
    tables = table.new_zeros(len(rows), len(identifiers), table.shape[1])
    for gradient, row in zip(tables, rows, strict=True):
        for theirs, gradients in row.table:
            gradient.index_add_(0, torch.searchsorted(identifiers, theirs), gradients)
    return tables


def _by_number(values: Tensor, counted: Tensor, numbers: np.ndarray) -> list[tuple[int, Tensor]]:
    """The sums of the values that count, by their numbers, which are all of one shape; below zero, there is
    none."""
    places = torch.from_numpy(np.array(numbers)).to(counted.device)
    counted = counted & (places >= 0)
    present, inverse = places[counted].unique(return_inverse=True)
    sums = values.new_zeros(len(present)).index_add(0, inverse, values[counted])
    return list(zip(present.tolist(), sums, strict=True))


def objectives_of(
    state: TrainState, carry: Carry, batch: Batch, config: GradientConfig, world: World
) -> OneObjective | Jacobian:
    """What an update that begins with this carry and batch descends."""
    several = config.objective.axes
    return Jacobian(state, carry, batch, config, world) if several else OneObjective(config, world)
