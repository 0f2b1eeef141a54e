"""Batches: which grids they hold, and how these become tensors on the device.

Shapes: B samples, K demonstrations, L = side * side cells.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from dataset import canvas
from dataset.canvas import ARC, GridTable, Vocabulary
from dataset.store import TRAIN, Store
from dataset.task import MAX_SIDE
from utils.config import Config
from utils.transfer import sent

MAX_CANVAS = 255  # shapes are stored as bytes
TASKS = "tasks"

QuerySampling = Literal["any", "test", "all"]


class FreshConfig(Config):
    """Training tasks that are made while a model trains, and replaced by others (`dataset.fresh`).

    tasks: how many of them each training subset has at a time, in the place of the stored ones.
    steps: how long they stay. workers: processes that make the next ones; 0: training makes them itself.
    """

    tasks: dict[str, PositiveInt]
    steps: PositiveInt
    workers: NonNegativeInt


class DataConfig(Config):
    """How a dataset becomes batches. A builder makes the dataset itself (tasks, augmentations, layout).

    query_sampling: what is asked (`EpisodeSampler`), the same for all training subsets or one value for each.
    subset_shares: how much of training each training subset gets, relative to the others. Null: every task is
        drawn equally often.
    error_weighted: the share of a task is multiplied by its share of wrong answers to this power; null: it is
        not. error_interval: steps between two such weightings (training/task_errors.py).
    """

    path: str
    canvas: Literal["task", "full"]
    buckets: list[int]
    canvas_margin: NonNegativeInt
    augmentation: Literal["none", "table", "random", "colours", "turns"]
    translate: bool | Literal["each"]
    query_sampling: QuerySampling | dict[str, QuerySampling]
    min_demos: PositiveInt
    max_demos: PositiveInt
    subset_shares: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None
    error_weighted: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    error_interval: PositiveInt
    max_train_groups: NonNegativeInt | None
    max_eval_groups: NonNegativeInt | None
    fresh: FreshConfig | None

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if (
            self.buckets != sorted(set(self.buckets))
            or not self.buckets
            or not 1 <= self.buckets[0] <= self.buckets[-1] <= MAX_CANVAS
        ):
            raise ValueError(
                f"data.buckets must be ascending canvas sides within 1..{MAX_CANVAS}, found {self.buckets}"
            )
        if self.subset_shares is not None and not any(self.subset_shares.values()):
            raise ValueError(f"data.subset_shares={self.subset_shares} leaves nothing to train on")
        if self.fresh and self.error_weighted is not None:
            raise ValueError(
                f"data.fresh makes ever new tasks, and data.error_weighted={self.error_weighted} remembers "
                "how each was answered"
            )
        if self.fresh and self.max_train_groups is not None:
            raise ValueError(
                "data.fresh makes ever new tasks, and data.max_train_groups keeps the first alone"
            )
        if self.min_demos > self.max_demos:
            raise ValueError(
                f"data.min_demos={self.min_demos} is larger than data.max_demos={self.max_demos}"
            )
        return self

    @property
    def sides(self) -> tuple[int, ...]:
        """The canvas sides in use: the buckets, or only 30 for `canvas: full`."""
        return tuple(self.buckets) if self.canvas == "task" else (MAX_SIDE,)

    @property
    def turns(self) -> bool:
        """Whether training shows turned and mirrored grids. Otherwise evaluation does not ask any."""
        return self.augmentation in ("table", "random", "turns")

    @property
    def recolours(self) -> bool:
        """Whether training shows recoloured grids. Otherwise evaluation does not ask any."""
        return self.augmentation in ("table", "random", "colours")


class Bucket(NamedTuple):
    """What all samples of a batch share, so that shapes stay static: canvas side and demonstrations."""

    side: int
    demos: int


# The tensors of a batch of B samples by name, a plain dictionary: rows are chosen from all of them alike.
#   inputs                    (B, L) uint8 tokens
#   labels                    (B, L) int64 tokens, IGNORE_LABEL_ID where nothing is supervised
#   puzzle_identifiers        (B,) int32 number of the learned row, 0 for none
#   tasks                     (B,) int64 index of the task, with `data.error_weighted` alone
# Episodes also hold K demonstrations per sample:
#   demo_inputs, demo_labels  (B, K, L) uint8 tokens, all PAD in an empty slot
#   demo_mask                 (B, K) bool, False for an empty slot
BatchData = dict[str, Tensor]


@dataclass
class Batch:
    """One batch of B samples on the device, all in one bucket."""

    bucket: Bucket
    data: BatchData

    @property
    def size(self) -> int:
        """B."""
        return self.data["inputs"].shape[0]


@dataclass(frozen=True)
class DataSizes:
    """What the data decides of a model's shape.

    seq_len: the cells of the canvas, or None when there are several canvases.
    eos: whether the vocabulary has a token for the end of a grid.
    """

    vocab_size: int
    num_puzzle_identifiers: int
    seq_len: int | None
    eos: bool = ARC.eos

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens of the grids."""
        return Vocabulary(self.vocab_size - 1 - self.eos, self.eos)

    @classmethod
    def of(cls, store: Store, data: DataConfig) -> "DataSizes":
        """The sizes of a dataset on the canvases of `data`."""
        cells = data.sides[0] ** 2 if len(data.sides) == 1 else None
        vocabulary = store.game.vocabulary
        return cls(vocabulary.size, store.metadata.num_puzzle_identifiers, cells, vocabulary.eos)


@dataclass
class Samples:
    """The description of B samples in one bucket, as host arrays. `materialise` draws them.

    query: (B,) pair index.
    demos: (B, K) pair indices.
    demo_mask: (B, K) bool, False for a demonstration that is not shown.
    transform, colours: (B,) dihedral 0..7 and (B, 10) permutation of the colours.
    offset: (B, 2) of all grids, or (B, 1 + K, 2) of the query's and of each demonstration's.
    identifier: (B,) puzzle identifier.
    order: (B, 2, side) of rows and columns, where a game's symmetries rearrange them.
    """

    bucket: Bucket
    query: np.ndarray
    demos: np.ndarray
    demo_mask: np.ndarray
    transform: np.ndarray
    colours: np.ndarray
    offset: np.ndarray
    identifier: np.ndarray
    order: np.ndarray | None = None

    def __getitem__(self, chosen: slice | np.ndarray) -> "Samples":
        return Samples(
            self.bucket,
            self.query[chosen],
            self.demos[chosen],
            self.demo_mask[chosen],
            self.transform[chosen],
            self.colours[chosen],
            self.offset[chosen],
            self.identifier[chosen],
            order=None if self.order is None else self.order[chosen],
        )


def materialise(samples: Samples, store: Store, table: GridTable, with_labels: bool = True) -> Batch:
    """Draw the grids of `samples` on the table's device.

    With `with_labels` False (evaluation) the answers are never read: all labels are IGNORE_LABEL_ID.
    """
    count = samples.demos.shape[1]
    tokens, identifier = _draw(samples, store, table, with_labels)  # (B, grids of a sample, L), (B,)
    first = 2 if with_labels else 1
    data: BatchData = {
        "inputs": tokens[:, 0],
        "labels": canvas.labels_of(tokens[:, 1])
        if with_labels
        else torch.full_like(tokens[:, 0], canvas.IGNORE_LABEL_ID, dtype=torch.int64),
        "puzzle_identifiers": identifier.to(torch.int32),
    }
    if count:
        mask = sent(torch.from_numpy(samples.demo_mask), tokens.device)
        # A hidden demonstration must leave no trace: its slot is drawn like any other, then emptied.
        empty = ~mask[:, :, None]
        data["demo_inputs"] = tokens[:, first : first + count].masked_fill(empty, canvas.PAD)
        data["demo_labels"] = tokens[:, first + count :].masked_fill(empty, canvas.PAD)
        data["demo_mask"] = mask
    return Batch(samples.bucket, data)


def _draw(samples: Samples, store: Store, table: GridTable, with_labels: bool) -> tuple[Tensor, Tensor]:
    """All grids of each sample as tokens (B, each, L), and the puzzle identifiers (B,) on the same device.

    The grids of a sample stand in the order: query input, its answer (`with_labels`), K demonstration inputs,
    their K outputs.
    """
    device = table.pixels.device
    size, count = samples.demos.shape
    grids = [
        store.pair_input[samples.query][:, None],
        store.pair_input[samples.demos],
        store.pair_output[samples.demos],
    ]
    if with_labels:
        grids.insert(1, store.answers_under(samples.query, samples.transform)[:, None])
    grid = np.concatenate(grids, axis=1)
    each = grid.shape[1]
    # Both grids of a pair share one offset. Pair 0 is the query, which has one or two grids here.
    pair_of_grid = [0] * (each - 2 * count) + [*range(1, 1 + count)] * 2
    pair_offset = np.broadcast_to(samples.offset.reshape(size, -1, 2), (size, 1 + count, 2))
    offset = pair_offset[:, pair_of_grid].reshape(size, -1)
    # One copy to the device for everything that describes the batch, instead of one for each array.
    columns = (grid, offset, samples.transform[:, None], samples.identifier[:, None], samples.colours)
    described = sent(torch.from_numpy(np.concatenate(columns, axis=1).astype(np.int64)), device)
    grid_index, offsets, transform, identifier, colours = described.split(
        [each, 2 * each, 1, 1, samples.colours.shape[1]], dim=1
    )
    order = None
    if samples.order is not None:
        order = sent(torch.from_numpy(samples.order), device).repeat_interleave(each, dim=0)
    # `render` knows single grids only: what belongs to a sample is repeated for each of its grids.
    tokens = canvas.render(
        table,
        grid_index.flatten(),
        transform.flatten().repeat_interleave(each),
        colours.repeat_interleave(each, dim=0),
        offsets.reshape(-1, 2),
        samples.bucket.side,
        store.game.vocabulary,
        order,
    )
    return tokens.view(size, each, -1), identifier.flatten()


def leave_one_out(data: BatchData) -> tuple[BatchData, Tensor]:
    """Each demonstration of each sample as the query of the others.

    Returns B * K samples in the order of `data`, each with K demonstration slots, and which of them count,
    (B, K) bool. A sample counts if it has a demonstration to ask and another one to show. The queries of
    `data` are not read.
    """
    mask = data["demo_mask"]
    batch, count = mask.shape
    apart = ~torch.eye(count, dtype=torch.bool, device=mask.device)
    others = (mask[:, None] & apart).flatten(0, 1)  # (B * K, K)
    hidden = ~others[:, :, None]

    def repeated(name: Literal["puzzle_identifiers", "demo_inputs", "demo_labels"]) -> Tensor:
        return data[name].repeat_interleave(count, dim=0)

    asked: BatchData = {
        "inputs": data["demo_inputs"].flatten(0, 1),
        "labels": canvas.labels_of(data["demo_labels"].flatten(0, 1)),
        "puzzle_identifiers": repeated("puzzle_identifiers"),
        "demo_inputs": repeated("demo_inputs").masked_fill(hidden, canvas.PAD),
        "demo_labels": repeated("demo_labels").masked_fill(hidden, canvas.PAD),
        "demo_mask": others,
    }
    return asked, mask & (others.view(batch, count, count).any(-1))


def task_sides(store: Store, config: DataConfig) -> np.ndarray:
    """(T,) the canvas side that each task needs.

    It is the longest grid among demonstrations and query inputs, plus `canvas_margin` as far as the largest
    canvas goes. The rule is the same for all tasks and does not look at the queries' answers. Only a training
    task whose answer would not fit gets a larger canvas.
    """
    inputs, outputs = store.pair_side[:, 0], store.pair_side[:, 1]
    pair_task = np.repeat(np.arange(len(store.task_ids)), np.diff(store.task_pairs))
    in_task = np.arange(len(inputs)) - store.task_pairs[pair_task]
    # A query's answer counts as 0 here: a canvas chosen to fit it would tell its size.
    shown = np.where(in_task < store.task_demonstrations[pair_task], outputs, 0)
    side = np.maximum.reduceat(np.maximum(inputs, shown), store.task_pairs[:-1])
    # The inner minimum keeps the margin within the largest canvas; the outer maximum keeps a task that is
    # larger than every canvas recognisable as such.
    side = np.maximum(side, np.minimum(side + config.canvas_margin, config.sides[-1]))
    longest = np.maximum.reduceat(np.maximum(inputs, outputs), store.task_pairs[:-1])
    return np.where(store.task_split == TRAIN, np.maximum(side, longest), side)
