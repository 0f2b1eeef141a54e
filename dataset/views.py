"""The evaluation set: every query in every augmented view, each exactly once for any batch size and world size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np

from dataset import augment
from dataset.batch import Bucket, DataConfig, Samples, task_sides
from dataset.canvas import smallest_bucket
from dataset.store import Store
from dataset.task import Pair, Task

Control = Literal["none", "query_only", "shuffled_demonstrations"]
BLANK_ID = 0


@dataclass(frozen=True)
class Query:
    """One thing to predict: pair `pair` of task `task` (its `number`-th query), with `demos` as demonstrations."""

    task: int
    number: int
    pair: int
    demos: tuple[int, ...]


@dataclass
class ViewBatch:
    """Up to B views for one forward pass. `valid` rows are real; the rest repeat a row so that shapes stay static.

    query (B,) index into `EvaluationSet.queries`, view (B,) number of the view (0 is the unaugmented one).
    """

    samples: Samples
    query: np.ndarray
    view: np.ndarray
    valid: int


class EvaluationSet:
    """The views of a split's queries.

    `split: test` asks the evaluation tasks' queries, `split: validation` those of the tasks held out of training
    (`Store.hold_out`); `split: train` asks every labelled pair of the training tasks, with
    the task's other pairs as demonstrations. `control: query_only` hides the demonstrations (the blank identifier for a
    puzzle dataset), `shuffled_demonstrations` replaces them by those of another task (as many of them
    as fit the canvas); a query for which no other task fits is not asked.
    """

    def __init__(
        self,
        store: Store,
        config: DataConfig,
        split: str,
        num_views: int,
        seed: int,
        control: Control = "none",
        max_tasks: int | None = None,
        subsets: list[str] | None = None,
    ):
        # A model trained without turned grids has no puzzle rows for other views, and has never seen one. A game's puzzle
        # is asked once: its score is the model's own, as in the ancestors.
        self.num_views = num_views if config.turns and not store.layout.shares_rule else 1
        self.store, self.config, self.control = store, config, control
        self.truncated: set[str] = (
            set()
        )  # tasks with more demonstrations than data.max_demos, which uses the first ones
        self.tasks = store.tasks_of(split, max_tasks, subsets)
        self.sides = task_sides(store, config)
        self.queries = [query for task in self.tasks for query in self._queries(int(task), split)]
        self.too_large = {
            q for q in self.queries if smallest_bucket(self.sides[q.task], config.sides) is None
        }
        self._views = {int(task): self._draw_views(int(task), seed) for task in self.tasks}
        self._donors = self._choose_donors() if control == "shuffled_demonstrations" else {}
        known = control != "shuffled_demonstrations"
        # A query that no canvas holds counts as wrong here, too.
        self.asked = np.array(
            [known or query.task in self._donors or query in self.too_large for query in self.queries], bool
        )

    def answer_fits(self, query: Query) -> bool:
        """Whether the known answer fits the canvas chosen without looking at it; an answer that does not is a miss."""
        side = self.side_of(query)
        return side is not None and int(self.store.pair_side[query.pair, 1]) <= side

    def batches(
        self,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        views: slice = slice(None),
        queries: np.ndarray | None = None,
    ) -> Iterator[ViewBatch]:
        """This rank's share, bucket by bucket in a fixed order. No collective happens inside, so shares may differ in length.

        `views` restricts every query to a range of its views, `queries` (Q,) bool the set to some queries.
        """
        rows = self._rows(views, self.asked if queries is None else queries & self.asked)
        number = 0
        for bucket in sorted(rows):
            samples, query, view = rows[bucket]
            for start in range(0, len(query), batch_size):
                if number % world == rank:
                    valid = min(batch_size, len(query) - start)
                    index = np.minimum(np.arange(start, start + batch_size), start + valid - 1)
                    yield ViewBatch(samples[index], query[index], view[index], valid)
                number += 1

    def view(self, query: Query, number: int) -> tuple[int, np.ndarray]:
        """(dihedral, colours) of a query's view, to undo it in a prediction."""
        transform, colours, _ = self._views[query.task]
        return int(transform[number]), colours[number]

    def told(self, query: Query) -> tuple[tuple[int, ...], np.ndarray]:
        """What the model is told of a query's task: the pairs in its demonstration slots, and each view's identifier (V,)."""
        demos, identifier = query.demos, self._views[query.task][2]
        if query.task in self._donors:
            donor, demos = self._donors[query.task]
            donor_rows = self._views[donor][2]
            identifier = donor_rows[np.arange(len(identifier)) % len(donor_rows)]
        return demos, np.full_like(identifier, BLANK_ID) if self.control == "query_only" else identifier

    def demonstrations(self, query: Query) -> tuple[int, ...]:
        """The pairs that a model may learn the query's task from: those it is told, or for a puzzle's row those of its task that
        fit the query's canvas. Never the query itself, and none for the control `query_only`."""
        if self.control == "query_only":
            return ()
        if self.store.layout.reads_demonstrations:
            return self.told(query)[0]
        task = self._donors[query.task][0] if query.task in self._donors else query.task
        first = int(self.store.task_pairs[task])
        pairs = range(first, first + int(self.store.task_demonstrations[task]))
        side = self.side_of(query) or 0
        return tuple(
            pair for pair in pairs if pair != query.pair and self.store.pair_side[pair].max() <= side
        )

    def can_adapt(self, query: Query) -> bool:
        """Whether those are enough to learn from: a puzzle's row needs one, and an episode one to ask and one to show."""
        return len(self.demonstrations(query)) >= (2 if self.store.layout.reads_demonstrations else 1)

    def side_of(self, query: Query) -> int | None:
        """The canvas on which a query is asked; None when it fits none."""
        return smallest_bucket(self.sides[query.task], self.config.sides)

    def views_of(self, query: Query) -> int:
        """How many views `query` has: num_views, or fewer where a puzzle dataset stores fewer augmentations."""
        return len(self._views[query.task][0])

    def _queries(self, task: int, split: str) -> list[Query]:
        first, end = int(self.store.task_pairs[task]), int(self.store.task_pairs[task + 1])
        border = first + int(self.store.task_demonstrations[task])
        if split != "train":
            return [
                Query(task, i, pair, self._limit(task, range(first, border)))
                for i, pair in enumerate(range(border, end))
            ]
        labelled = [pair for pair in range(first, end) if self.store.pair_output[pair] >= 0]
        others = {pair: [other for other in labelled if other != pair] for pair in labelled}
        askable = [pair for pair in labelled if others[pair] or not self.store.layout.reads_demonstrations]
        return [Query(task, i, pair, self._limit(task, others[pair])) for i, pair in enumerate(askable)]

    def _limit(self, task: int, demos: Sequence[int]) -> tuple[int, ...]:
        if not self.store.layout.reads_demonstrations:
            return ()
        if len(demos) > self.config.max_demos:
            self.truncated.add(self.store.task_ids[task])
        return tuple(demos)[: self.config.max_demos]

    def _draw_views(self, task: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """transform (V,), colours (V, 10), puzzle identifier (V,); the identity first."""
        rows = np.arange(self.store.task_rows[task], self.store.task_rows[task + 1])[: self.num_views]
        if (
            not self.store.layout.reads_demonstrations
        ):  # a learned row exists for the stored augmentations only
            return self.store.dihedral[rows], self.store.colours[rows], self.store.identifiers_of(rows)
        question = self.store.task(task)
        question = Task(
            question.id, question.demonstrations, tuple(Pair(query.input, None) for query in question.queries)
        )
        transform, colours = augment.draw(question, self.num_views - 1, augment.task_rng(seed, question.id))
        return transform, colours, np.full(len(transform), self.store.identifiers_of(rows[:1])[0])

    def _choose_donors(self) -> dict[int, tuple[int, tuple[int, ...]]]:
        """For each task another one, of its own subset if one fits, the next larger first, and those of its demonstrations that
        fit on the task's canvas."""
        order = [int(task) for task in self.tasks[np.argsort(self.sides[self.tasks], kind="stable")]]
        subset = self.store.task_subset.tolist()
        same: dict[int, list[int]] = {}
        for task in order:
            same.setdefault(subset[task], []).append(task)
        donors = {}
        for task in order:
            side = smallest_bucket(self.sides[task], self.config.sides) or 0
            for other in chain(
                *(
                    group[(at := group.index(task)) + 1 :] + group[:at]
                    for group in (same[subset[task]], order)
                )
            ):
                first = int(self.store.task_pairs[other])
                demos = range(first, first + int(self.store.task_demonstrations[other]))
                fitting = [pair for pair in demos if self.store.pair_side[pair].max() <= side]
                if fitting:
                    donors[task] = (other, self._limit(other, fitting))
                    break
        return donors

    def _rows(self, chosen: slice, asked: np.ndarray) -> dict[Bucket, tuple[Samples, np.ndarray, np.ndarray]]:
        """The chosen views of the asked queries by bucket, each bucket's arrays in the order of queries, then views."""
        blocks: dict[Bucket, list[tuple]] = {}
        for number, query in enumerate(self.queries):
            side = self.side_of(query)
            if side is None or not asked[number]:
                continue
            transform, colours, _ = self._views[query.task]
            demos, identifier = self.told(query)
            numbers = np.arange(len(transform))[chosen]
            views = len(numbers)
            blocks.setdefault(Bucket(side, len(demos)), []).append(
                (
                    np.full(views, query.pair),
                    np.tile(np.array(demos, np.int64), (views, 1)),
                    np.full((views, len(demos)), self.control != "query_only"),
                    transform[numbers],
                    colours[numbers],
                    np.zeros((views, 2), np.int64),
                    identifier[numbers],
                    np.full(views, number),
                    numbers,
                )
            )
        merged = {}
        for bucket, parts in blocks.items():
            *fields, query, view = (np.concatenate(column) for column in zip(*parts, strict=True))
            merged[bucket] = (Samples(bucket, *fields), query, view)
        return merged
