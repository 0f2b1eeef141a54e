"""Training samplers: pure functions of (seed, step, rank, world size), and of the factors by which tasks are
weighted, if they are. No state is saved, so resume is exact.

A step's batch lies in one bucket (canvas side, number of demonstrations). So shapes are static, and no
demonstration slot is ever empty. A bucket's probability is that of a random task with a random number of its
demonstrations to fall into it. So every task is equally likely, or as likely as `data.subset_shares` says.
"""

from collections.abc import Sequence
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np

from dataset import augment
from dataset.batch import Bucket, DataConfig, Samples, task_sides
from dataset.canvas import TRANSPOSES, smallest_bucket
from dataset.chances import Chances
from dataset.games.game import Symmetries
from dataset.store import TEST, Store
from utils.errors import UserError

_TRANSPOSES = TRANSPOSES.numpy()


class Stream(IntEnum):
    """The independent streams of random numbers that a training step draws from."""

    SAMPLES = 0
    HALTING = 1  # exploration of later halting
    NOISE = 2  # latents of variational encoders
    PROBE = 3  # views for the context's diagnostics
    GROUPS = 4  # pieces of the loss dealt into objectives
    AGGREGATION = 5  # of the objectives' gradients, by methods that draw
    KEYS = 6  # a word per row, for what is drawn on the device


def step_rng(seed: int, step: int, stream: Stream = Stream.SAMPLES) -> np.random.Generator:
    """The random numbers of one training step, a function of these three alone."""
    # Philox jumps to any counter at once: no earlier step has to be drawn to reach this one.
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, step]))


def local_samples(global_batch_size: int, rank: int, world: int) -> slice:
    """The samples of the global batch that belong to `rank`. Raises `UserError` if they cannot be shared."""
    if global_batch_size % world:
        raise UserError(f"global_batch_size={global_batch_size} is not divisible by the world size {world}")
    local = global_batch_size // world
    return slice(rank * local, (rank + 1) * local)


def draw_offsets(
    store: Store,
    config: DataConfig,
    rng: np.random.Generator,
    bucket: Bucket,
    pairs: np.ndarray,
    transform: np.ndarray,
) -> np.ndarray:
    """Translations of samples with pairs (B, n), as `data.translate` says.

    Returns (B, 2) for all grids of a sample, or (B, n, 2) for each of its pairs.
    """
    if not config.translate:
        return np.zeros((len(pairs), 2), np.int64)
    if config.translate == "each":
        return np.stack(
            [_random_offsets(store, rng, bucket, pairs[:, [i]], transform) for i in range(pairs.shape[1])],
            axis=1,
        )
    return _random_offsets(store, rng, bucket, pairs, transform)


def _random_offsets(
    store: Store, rng: np.random.Generator, bucket: Bucket, pairs: np.ndarray, transform: np.ndarray
) -> np.ndarray:
    """(B, 2) one translation per sample, such that all grids of its pairs (B, n) stay on the canvas."""
    grids = np.concatenate([store.pair_input[pairs], store.pair_output[pairs]], axis=1)
    extent = store.shapes[grids].max(axis=1)  # (B, 2)
    extent = np.where(_TRANSPOSES[transform][:, None], extent[:, ::-1], extent)
    return (rng.random((len(pairs), 2)) * (bucket.side - extent.astype(np.int64) + 1)).astype(np.int64)


class Sampler:
    """What all samplers share: which tasks train, on which canvas, and how a step draws its samples.

    buckets: the buckets in use. chances: those of buckets and tasks. skipped_tasks: ids of tasks that fit no
    canvas or have too few demonstrations.
    """

    def __init__(
        self,
        store: Store,
        config: DataConfig,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        world: int = 1,
    ):
        self.store, self.config, self.seed = store, config, seed
        self.global_batch_size = global_batch_size
        self.local = local_samples(global_batch_size, rank, world)
        if config.augmentation == "table" and not store.metadata.num_aug:
            raise UserError(
                f"{store.path} stores no augmentations; "
                "build it with --num-aug N (mazes: --aug), or say data.augmentation=none or random"
            )
        self.skipped_tasks: list[str] = []
        buckets = self._buckets_of_tasks()
        # A task's share is divided over its buckets. A bucket's share is then the sum over its tasks.
        weights: dict[Bucket, list[tuple[int, float]]] = {}
        for task, share in self._shares(list(buckets)).items():
            for bucket in buckets[task]:
                weights.setdefault(bucket, []).append((task, share / len(buckets[task])))
        if not weights:
            raise UserError(
                f"{store.path}: none of its {len(buckets) + len(self.skipped_tasks)} training tasks can be "
                f"trained on with data.buckets={config.buckets}, data.min_demos={config.min_demos} "
                f"and data.query_sampling={config.query_sampling}"
            )
        columns = {bucket: zip(*of, strict=True) for bucket, of in weights.items()}
        self.chances = Chances({b: (np.array(tasks), np.array(of)) for b, (tasks, of) in columns.items()})
        self.buckets = self.chances.buckets
        self._weighed = (np.ones(0), self.chances)  # the last factors, and the chances by them

    def _buckets_of_tasks(self) -> dict[int, list[Bucket]]:
        """The buckets that each training task falls into. Tasks without one are added to `skipped_tasks`."""
        sides = task_sides(self.store, self.config)
        buckets: dict[int, list[Bucket]] = {}
        for task in self._training_tasks():
            side = smallest_bucket(sides[task], self.config.sides)
            counts = self._demo_counts(task)
            if side is None or not counts:
                self.skipped_tasks.append(self.store.task_ids[task])
            else:
                buckets[int(task)] = [Bucket(side, demos) for demos in counts]
        return buckets

    def _shares(self, tasks: list[int]) -> dict[int, float]:
        """How often each task is drawn, relative to the others. Tasks without a share are left out."""
        wanted, subsets = self.config.subset_shares, self.store.task_subset[tasks]
        if wanted is None:
            return dict.fromkeys(tasks, 1.0)
        present = self._require_subsets("subset_shares", wanted, tasks)
        # A subset's share is divided over its tasks.
        share = {
            present[name]: value / int((subsets == present[name]).sum()) for name, value in wanted.items()
        }
        return {
            task: share[subset] for task, subset in zip(tasks, subsets.tolist(), strict=True) if share[subset]
        }

    def _require_subsets(
        self, key: str, values: dict[str, Any], tasks: Sequence[int] | np.ndarray
    ) -> dict[str, int]:
        """The subsets of `tasks`, number by name.

        Raises `UserError` unless `values` has a value for each of them and for no other.
        """
        present = {
            self.store.subset_names[subset]: int(subset)
            for subset in np.unique(self.store.task_subset[tasks])
        }
        if values.keys() != present.keys():
            raise UserError(
                f"data.{key} names {', '.join(values)}; "
                f"{self.store.path} trains on {', '.join(present)}: each needs a value"
            )
        return present

    @cached_property
    def trained_pairs(self) -> np.ndarray:
        """Fingerprints of every pair that training can show. They tell later what a model has seen."""
        tasks = np.unique(np.concatenate([choice.tasks for choice in self.chances.choices.values()]))
        pairs = np.concatenate([self._shown_pairs(int(task)) for task in tasks])
        return np.unique(self.store.pair_fingerprint[pairs])

    def sample(self, step: int, bucket: Bucket | None = None, factors: np.ndarray | None = None) -> Samples:
        """This rank's part of the batch of `step`, in the bucket that the step draws or in the given one.

        factors: (T,) above zero, by which the share of each task is multiplied; None: 1 for all.
        """
        chances = self.chances if factors is None else self._weighed_by(factors)
        rng = step_rng(self.seed, step)
        drawn = chances.bucket(rng)
        bucket = bucket or drawn
        # Every rank draws the whole batch and takes its part: the samples do not depend on the world size.
        return self._draw(rng, bucket, chances.choices[bucket].draw(rng, self.global_batch_size))[self.local]

    def _weighed_by(self, factors: np.ndarray) -> Chances:
        if self._weighed[0] is not factors:  # they stay the same for many steps
            self._weighed = (factors, self.chances.times(factors))
        return self._weighed[1]

    def _training_tasks(self) -> np.ndarray:
        """Indices of the tasks to train on. A sampler prepares its tables of pairs here."""
        raise NotImplementedError

    def _demo_counts(self, task: int) -> list[int]:
        """The numbers of demonstrations that samples of a task may have, none if it cannot be asked."""
        raise NotImplementedError

    def _shown_pairs(self, task: int) -> np.ndarray:
        """Every pair of a task that training can show, as query or demonstration."""
        raise NotImplementedError

    def _draw(self, rng: np.random.Generator, bucket: Bucket, tasks: np.ndarray) -> Samples:
        """One sample of each task (B,)."""
        raise NotImplementedError

    def _views(self, rng: np.random.Generator, tasks: np.ndarray, side: int) -> tuple[Symmetries, np.ndarray]:
        """One view of each task, and its puzzle identifier (B,)."""
        view_rows = self.store.task_rows[tasks]
        if self.config.augmentation == "table":
            stored = self.store.task_rows[tasks + 1] - view_rows
            view_rows = view_rows + (rng.random(len(tasks)) * stored).astype(np.int64)
            views = Symmetries(self.store.dihedral[view_rows], self.store.colours[view_rows])
        elif self.config.augmentation in ("random", "turns"):
            views = self.store.game.symmetries(rng, len(tasks), side)
            if not self.config.recolours:
                views.colours = self.store.game.identity_colours(len(tasks))
        else:
            if self.config.augmentation == "colours":
                colours = augment.random_colours(rng, len(tasks))
            else:
                colours = self.store.game.identity_colours(len(tasks))
            views = Symmetries(np.zeros(len(tasks), np.int64), colours)
        return views, self.store.identifiers_of(view_rows)


class EpisodeSampler(Sampler):
    """Few-shot episodes: a query and K demonstrations of the same task, in random order.

    The values of `data.query_sampling`:
      - any: any labelled pair is the query, and K of the others are the demonstrations (leave-one-out).
      - test: the task's own queries, and K of its own demonstrations.
      - all: the task's own queries, and as many demonstrations as data.max_demos allows. This is the
        ancestor's way, and that of tasks which only all demonstrations determine.
    """

    def _training_tasks(self) -> np.ndarray:
        tasks = self.store.tasks_of("train", self.config.max_train_groups)
        if not isinstance(self.config.query_sampling, str):
            self._require_subsets("query_sampling", self.config.query_sampling, tasks)
        split = [self._split_pairs(task) for task in tasks]
        self.queries = _PairTable(len(self.store.task_ids), tasks, [queries for queries, _ in split])
        self.demos = _PairTable(len(self.store.task_ids), tasks, [demos for _, demos in split])
        return tasks

    def _shown_pairs(self, task: int) -> np.ndarray:
        return _labelled_pairs(self.store, task)

    def _split_pairs(self, task: int) -> tuple[np.ndarray, np.ndarray]:
        """(pairs that may be the query, pairs that may be demonstrations)."""
        labelled = _labelled_pairs(self.store, task)
        if self._sampling(task) == "any":
            return labelled, labelled
        border = self.store.task_pairs[task] + self.store.task_demonstrations[task]
        return labelled[labelled >= border], labelled[labelled < border]

    def _demo_counts(self, task: int) -> list[int]:
        how = self._sampling(task)
        # With `any` the query itself is one of the task's pairs and cannot be a demonstration.
        most = min(self.config.max_demos, int(self.demos.count[task]) - (how == "any"))
        counts = list(range(self.config.min_demos, most + 1)) if self.queries.count[task] else []
        return counts[-1:] if how == "all" else counts

    def _sampling(self, task: int) -> str:
        how = self.config.query_sampling
        return how if isinstance(how, str) else how[self.store.subset_names[self.store.task_subset[task]]]

    def _draw(self, rng: np.random.Generator, bucket: Bucket, tasks: np.ndarray) -> Samples:
        query = self.queries.draw(rng, tasks)
        candidates = self.demos.pairs[tasks]
        # The K smallest of random keys: K different demonstrations in random order, never padding or the
        # query.
        key = rng.random(candidates.shape)
        key[(candidates < 0) | (candidates == query[:, None])] = np.inf
        demos = np.take_along_axis(candidates, key.argsort(axis=1)[:, : bucket.demos], axis=1)
        views, identifier = self._views(rng, tasks, bucket.side)
        pairs = np.concatenate([query[:, None], demos], axis=1)
        offset = draw_offsets(self.store, self.config, rng, bucket, pairs, views.transform)
        shown = np.ones_like(demos, dtype=bool)
        return Samples(bucket, query, demos, shown, views.transform, views.colours, offset, identifier)


class PuzzleSampler(Sampler):
    """Single pairs with a puzzle identifier (TRM).

    Training shows all pairs of training tasks and the demonstrations of evaluation tasks.
    """

    def __init__(self, store: Store, config: DataConfig, *arguments: int, **named: int):
        if config.augmentation == "colours" and store.metadata.game != "arc":
            raise UserError(
                f"data.augmentation=colours recolours ARC grids; {store.path} holds {store.metadata.game}"
            )
        if config.augmentation in ("random", "colours", "turns") and store.layout.learns_rows:
            raise UserError(
                "one learned row exists per stored augmentation of a puzzle; "
                "set data.augmentation to table or none"
            )
        super().__init__(store, config, *arguments, **named)

    def _training_tasks(self) -> np.ndarray:
        train = self.store.tasks_of("train", self.config.max_train_groups)
        test = self.store.tasks_of("test", self.config.max_eval_groups)
        tasks = np.concatenate([train, test])
        self.queries = _PairTable(
            len(self.store.task_ids), tasks, [self._shown_pairs(task) for task in tasks]
        )
        return tasks

    def _shown_pairs(self, task: int) -> np.ndarray:
        labelled = _labelled_pairs(self.store, task)
        if self.store.task_split[task] == TEST:
            return labelled[labelled < self.store.task_pairs[task] + self.store.task_demonstrations[task]]
        return labelled

    def _demo_counts(self, task: int) -> list[int]:
        return [0] if self.queries.count[task] else []

    def _draw(self, rng: np.random.Generator, bucket: Bucket, tasks: np.ndarray) -> Samples:
        query = self.queries.draw(rng, tasks)
        views, identifier = self._views(rng, tasks, bucket.side)
        offset = draw_offsets(self.store, self.config, rng, bucket, query[:, None], views.transform)
        none = np.zeros((len(tasks), 0), np.int64)
        shown, order = none.astype(bool), views.order
        return Samples(bucket, query, none, shown, views.transform, views.colours, offset, identifier, order)


class PairSampler(PuzzleSampler):
    """Single pairs of a game with one rule (Sudoku, mazes). The evaluation puzzles stay unseen."""

    def __init__(self, store: Store, config: DataConfig, *arguments: int, **named: int):
        super().__init__(store, config, *arguments, **named)
        side = store.metadata.max_grid_size
        if any(bucket.side != side for bucket in self.buckets):
            raise UserError(
                f"{store.path}: its {side}x{side} puzzles fill their canvas; "
                f"set data.canvas=task data.buckets=[{side}]"
            )

    def _training_tasks(self) -> np.ndarray:
        tasks = self.store.tasks_of("train", self.config.max_train_groups)
        self.queries = _PairTable(len(self.store.task_ids), tasks, self.store.task_pairs[tasks][:, None])
        return tasks

    def _views(self, rng: np.random.Generator, tasks: np.ndarray, side: int) -> tuple[Symmetries, np.ndarray]:
        if self.config.augmentation != "table":
            return super()._views(rng, tasks, side)
        number = rng.integers(0, self.store.metadata.num_aug + 1, len(tasks))
        views = self.store.game.stored_symmetries(self.store.metadata.seed, tasks, number, side)
        return views, np.zeros(len(tasks), np.int64)


class _PairTable:
    """pairs: (T, n) pair indices of each task, padded with -1. count: (T,) how many each has."""

    def __init__(self, num_tasks: int, tasks: np.ndarray, pairs: list[np.ndarray]):
        self.count = np.zeros(num_tasks, np.int64)
        self.pairs = np.full((num_tasks, max(map(len, pairs), default=0)), -1, np.int64)
        for task, of_task in zip(tasks, pairs, strict=True):
            self.count[task] = len(of_task)
            self.pairs[task, : len(of_task)] = of_task

    def draw(self, rng: np.random.Generator, tasks: np.ndarray) -> np.ndarray:
        """One pair of each task, uniformly."""
        return self.pairs[tasks, (rng.random(len(tasks)) * self.count[tasks]).astype(np.int64)]


def _labelled_pairs(store: Store, task: int) -> np.ndarray:
    """The pairs of a task whose answer is known."""
    pairs = np.arange(store.task_pairs[task], store.task_pairs[task + 1])
    return pairs[store.pair_output[pairs] >= 0]


SAMPLERS: dict[str, type[Sampler]] = {
    "fewshot": EpisodeSampler,
    "puzzle": PuzzleSampler,
    "pairs": PairSampler,
}
