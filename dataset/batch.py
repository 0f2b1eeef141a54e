"""Batches: which grids they hold, and how they become tensors on the device.

Shapes: B samples, K demonstrations, L = side * side cells.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from config.base import Config
from dataset import canvas
from dataset.canvas import GridTable
from dataset.store import TRAIN, Store
from dataset.task import MAX_SIDE

MAX_CANVAS = 255  # shapes are stored as bytes
OF_THE_QUERY = ("places",)  # what a model adds to a sample's data that holds for its `inputs` alone


QuerySampling = Literal["any", "test", "all"]


class DataConfig(Config):
    """How a dataset becomes batches. The dataset itself (tasks, augmentations, layout) is made by a builder.

    query_sampling: what is asked (`EpisodeSampler`), of all training subsets or of each. subset_shares: how much of training each
    training subset gets, in relation to the others; null: every task alike.
    """

    path: str
    canvas: Literal["task", "full"]
    buckets: list[int]
    canvas_margin: NonNegativeInt
    augmentation: Literal["none", "table", "random", "colours"]
    translate: bool | Literal["each"]
    query_sampling: QuerySampling | dict[str, QuerySampling]
    min_demos: PositiveInt
    max_demos: PositiveInt
    subset_shares: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None
    max_train_groups: NonNegativeInt | None
    max_eval_groups: NonNegativeInt | None

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.buckets != sorted(set(self.buckets)) or not self.buckets or not 1 <= self.buckets[0] <= self.buckets[-1] <= MAX_CANVAS:
            raise ValueError(f"data.buckets must be ascending canvas sides within 1..{MAX_CANVAS}, found {self.buckets}")
        if self.subset_shares is not None and not any(self.subset_shares.values()):
            raise ValueError(f"data.subset_shares={self.subset_shares} leaves nothing to train on")
        if self.min_demos > self.max_demos:
            raise ValueError(f"data.min_demos={self.min_demos} is larger than data.max_demos={self.max_demos}")
        return self

    @property
    def sides(self) -> tuple[int, ...]:
        """The canvas sides in use: the buckets, or only 30 for `canvas: full`."""
        return tuple(self.buckets) if self.canvas == "task" else (MAX_SIDE,)

    @property
    def turns(self) -> bool:
        """Whether training shows grids turned and mirrored; a model that never saw one is not asked one."""
        return self.augmentation in ("table", "random")


class Cell(NamedTuple):
    """What all samples of a batch have in common, so that shapes stay static: canvas side and number of demonstrations."""

    side: int
    demos: int


@dataclass
class Batch:
    """One batch on the device. `data` holds, for B samples in one cell:

    inputs (B, L) uint8 tokens, labels (B, L) int64 with -100 where ignored, puzzle_identifiers (B,) int32,
    and for episodes demo_inputs, demo_labels (B, K, L) uint8 and demo_mask (B, K) bool.
    """

    cell: Cell
    data: dict[str, Tensor]

    @property
    def size(self) -> int:
        """B."""
        return self.data["inputs"].shape[0]


@dataclass
class Samples:
    """The description of B samples in one cell, as host arrays; `materialise` draws them.

    query (B,) pair index, demos (B, K) pair indices, demo_mask (B, K), transform (B,), colours (B, 10), offset (B, 2) of
    all grids or (B, 1 + K, 2) of the query's and of each demonstration's,
    identifier (B,) puzzle identifier, order (B, 2, side) of rows and columns where a game's symmetries rearrange them.
    """

    cell: Cell
    query: np.ndarray
    demos: np.ndarray
    demo_mask: np.ndarray
    transform: np.ndarray
    colours: np.ndarray
    offset: np.ndarray
    identifier: np.ndarray
    order: np.ndarray | None = None

    def __getitem__(self, rows: slice | np.ndarray) -> "Samples":
        arrays = (self.query, self.demos, self.demo_mask, self.transform, self.colours, self.offset, self.identifier)
        return Samples(self.cell, *(array[rows] for array in arrays), order=None if self.order is None else self.order[rows])


def materialise(samples: Samples, store: Store, table: GridTable, with_labels: bool = True) -> Batch:
    """Draw the grids of `samples` on the table's device.

    With `with_labels` False (evaluation) the answers are never read: all labels are IGNORE_LABEL_ID.
    """
    device = table.pixels.device
    size, count = samples.demos.shape
    grids = [store.pair_input[samples.query][:, None], store.pair_input[samples.demos], store.pair_output[samples.demos]]
    if with_labels:
        grids.insert(1, store.pair_output[samples.query][:, None])
    grid = np.concatenate(grids, axis=1)
    each = grid.shape[1]
    pair = [0] * (each - 2 * count) + [*range(1, 1 + count)] * 2  # of each grid: the query's, or a demonstration's
    offset = np.broadcast_to(samples.offset.reshape(size, -1, 2), (size, 1 + count, 2))[:, pair].reshape(size, -1)
    # One copy to the device for everything that describes the batch.
    description = np.concatenate([grid, offset, samples.transform[:, None], samples.identifier[:, None], samples.colours], axis=1)
    rows = torch.from_numpy(description.astype(np.int64)).to(device, non_blocking=True)
    grid_rows, offsets, transform, identifier, colours = rows.split([each, 2 * each, 1, 1, samples.colours.shape[1]], dim=1)
    tokens = canvas.render(
        table,
        grid_rows.flatten(),
        transform.flatten().repeat_interleave(each),
        colours.repeat_interleave(each, dim=0),
        offsets.reshape(-1, 2),
        samples.cell.side,
        store.game.vocabulary,
        None if samples.order is None else torch.from_numpy(samples.order).to(device).repeat_interleave(each, dim=0),
    ).view(size, each, -1)  # (B, each, L)
    first = 2 if with_labels else 1
    data = {
        "inputs": tokens[:, 0],
        "labels": canvas.labels_of(tokens[:, 1])
        if with_labels
        else torch.full_like(tokens[:, 0], canvas.IGNORE_LABEL_ID, dtype=torch.int64),
        "puzzle_identifiers": identifier.flatten().to(torch.int32),
    }
    if count:
        mask = torch.from_numpy(samples.demo_mask).to(device, non_blocking=True)
        empty = ~mask[:, :, None]
        data["demo_inputs"] = tokens[:, first : first + count].masked_fill(empty, canvas.PAD)
        data["demo_labels"] = tokens[:, first + count :].masked_fill(empty, canvas.PAD)
        data["demo_mask"] = mask
    return Batch(samples.cell, data)


def leave_one_out(data: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Each demonstration of each sample as the query of the others: rows (B * K, ...) in the order of samples, and which of
    them count (B, K), those with a demonstration to ask and another one to show. The queries of `data` are not read."""
    mask = data["demo_mask"]
    batch, count = mask.shape
    apart = ~torch.eye(count, dtype=torch.bool, device=mask.device)
    others = (mask[:, None] & apart).flatten(0, 1)  # (B * K, K)
    rows = {name: value.repeat_interleave(count, dim=0) for name, value in data.items() if name not in OF_THE_QUERY}
    rows |= {
        "inputs": data["demo_inputs"].flatten(0, 1),
        "labels": canvas.labels_of(data["demo_labels"].flatten(0, 1)),
        "demo_inputs": rows["demo_inputs"].masked_fill(~others[:, :, None], canvas.PAD),
        "demo_labels": rows["demo_labels"].masked_fill(~others[:, :, None], canvas.PAD),
        "demo_mask": others,
    }
    return rows, mask & (others.view(batch, count, count).any(-1))


def task_sides(store: Store, config: DataConfig) -> np.ndarray:
    """(T,) the canvas side each task needs.

    The longest grid among demonstrations and query inputs, plus `canvas_margin` as far as the largest canvas goes. The
    rule is the same for all tasks and does not look at the queries' answers; only a training task whose answer would
    not fit gets a larger canvas.
    """
    inputs, outputs = store.pair_side[:, 0], store.pair_side[:, 1]
    pair_task = np.repeat(np.arange(len(store.task_ids)), np.diff(store.task_pairs))
    in_task = np.arange(len(inputs)) - store.task_pairs[pair_task]
    shown = np.where(in_task < store.task_demonstrations[pair_task], outputs, 0)
    side = np.maximum.reduceat(np.maximum(inputs, shown), store.task_pairs[:-1])
    side = np.maximum(side, np.minimum(side + config.canvas_margin, config.sides[-1]))
    longest = np.maximum.reduceat(np.maximum(inputs, outputs), store.task_pairs[:-1])
    return np.where(store.task_split == TRAIN, np.maximum(side, longest), side)
