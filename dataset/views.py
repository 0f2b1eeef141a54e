"""The evaluation set: every query in every augmented view, each exactly once.

That holds for any batch size and any number of processes.
"""

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
    """One thing to predict: the answer of pair `pair`, the `number`-th query of task `task`.

    demos: the pairs that are its demonstrations.
    """

    task: int
    number: int
    pair: int
    demos: tuple[int, ...]


@dataclass
class ViewBatch:
    """B views for one forward pass.

    samples: what is drawn. query: (B,) index into `EvaluationSet.queries`. view: (B,) number of the view,
        where 0 is the unaugmented one. rollout: (B,) number of the attempt at it.
    valid: how many are real. The rest repeat the last one, so that shapes stay static.
    """

    samples: Samples
    query: np.ndarray
    view: np.ndarray
    rollout: np.ndarray
    valid: int


class EvaluationSet:
    """The views of a split's queries.

    split:
      - test: the evaluation tasks' queries.
      - validation: the queries of the tasks held out of training (`Store.hold_out`).
      - train: every labelled pair of the training tasks, with the task's other pairs as demonstrations.

    control:
      - query_only: no demonstrations, and the blank identifier for a puzzle dataset.
      - shuffled_demonstrations: the demonstrations of another task, as many as fit the canvas. A query for
        which no other task fits is not asked.

    queries: all queries. asked: (Q,) bool, which of them are asked. too_large: queries that fit no canvas.
    rollouts: how often each view is asked, a row each time.
    truncated: ids of tasks with more demonstrations than data.max_demos; the first ones are used.
    """

    rollouts = 1

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
        # A model trained without turned grids has no puzzle rows for other views, and never saw one. A game's
        # puzzle is asked once: its score is the model's own, as in the ancestors.
        self.num_views = num_views if config.turns and not store.layout.shares_rule else 1
        self.store, self.config, self.control = store, config, control
        self.truncated: set[str] = set()
        self.tasks = store.tasks_of(split, max_tasks, subsets)
        self.sides = task_sides(store, config)
        self.queries = [query for task in self.tasks for query in self._queries(int(task), split)]
        self.too_large = {
            q for q in self.queries if smallest_bucket(self.sides[q.task], config.sides) is None
        }
        self._views = {int(task): self._draw_views(int(task), seed) for task in self.tasks}
        shuffled = control == "shuffled_demonstrations"
        self._donors = self._choose_donors() if shuffled else {}
        # A query that no canvas holds counts as wrong under every control, so that the scores can be
        # compared.
        self.asked = np.array(
            [not shuffled or query.task in self._donors or query in self.too_large for query in self.queries],
            bool,
        )

    def answer_fits(self, query: Query) -> bool:
        """Whether the known answer fits the canvas, which was chosen without it. If not, it is a miss."""
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
        """This rank's share, bucket by bucket in a fixed order.

        `views` restricts every query to a range of its views, `queries` (Q,) bool the set to some queries. No
        collective happens inside, so the shares may differ in length.
        """
        by_bucket = self._by_bucket(views, self.asked if queries is None else queries & self.asked)
        number = 0
        for bucket in sorted(by_bucket):
            samples, query, view = by_bucket[bucket]
            rows = len(query) * self.rollouts
            for start in range(0, rows, batch_size):
                if number % world == rank:
                    valid = min(batch_size, rows - start)
                    # A smaller last batch would be another shape, for which compiled kernels are built anew.
                    row = np.minimum(np.arange(start, start + batch_size), start + valid - 1)
                    index, rollout = np.divmod(row, self.rollouts)
                    yield ViewBatch(samples[index], query[index], view[index], rollout, valid)
                number += 1

    def rollout_keys(self, batch: ViewBatch, seed: int) -> np.ndarray:
        """(B,) a word of 32 bits for each row: a function of seed, task, query, view and rollout alone."""
        queries = [self.queries[number] for number in batch.query.tolist()]
        tasks = [augment.task_key(self.store.task_ids[query.task]) for query in queries]
        numbers = [query.number for query in queries]
        columns = (np.full(len(tasks), seed), numbers, batch.view, batch.rollout)
        keys = np.stack([np.array(tasks, np.uint64), *(np.asarray(c).astype(np.uint64) for c in columns)], 1)
        return (augment.hashed(keys) >> np.uint64(32)).astype(np.int64)

    def view(self, query: Query, number: int) -> tuple[int, np.ndarray]:
        """(dihedral, colours) of a query's view, to undo it in a prediction."""
        transform, colours, _ = self._views[query.task]
        return int(transform[number]), colours[number]

    def demonstrations_and_identifiers(self, query: Query) -> tuple[tuple[int, ...], np.ndarray]:
        """What the model gets to know of a query's task.

        Returns the pairs in its demonstration slots, and the puzzle identifier of each view (V,).
        """
        demos, identifier = query.demos, self._views[query.task][2]
        if query.task in self._donors:
            donor, demos = self._donors[query.task]
            # The donor may have fewer views: they are used again from the first.
            of_donor = self._views[donor][2]
            identifier = of_donor[np.arange(len(identifier)) % len(of_donor)]
        return demos, np.full_like(identifier, BLANK_ID) if self.control == "query_only" else identifier

    def adaptation_pairs(self, query: Query) -> tuple[int, ...]:
        """The pairs that a model may learn the query's task from, never the query itself.

        They are its demonstrations, or for a puzzle's row the task's demonstrations that fit the query's
        canvas. For the control `query_only` there are none.
        """
        if self.control == "query_only":
            return ()
        if self.store.layout.reads_demonstrations:
            return self.demonstrations_and_identifiers(query)[0]
        task = self._donors[query.task][0] if query.task in self._donors else query.task
        first = int(self.store.task_pairs[task])
        pairs = range(first, first + int(self.store.task_demonstrations[task]))
        side = self.side_of(query) or 0
        return tuple(
            pair for pair in pairs if pair != query.pair and self.store.pair_side[pair].max() <= side
        )

    def can_adapt(self, query: Query) -> bool:
        """Whether these pairs are enough to learn from.

        A puzzle's row needs one. An episode needs one to ask and one to show.
        """
        return len(self.adaptation_pairs(query)) >= (2 if self.store.layout.reads_demonstrations else 1)

    def side_of(self, query: Query) -> int | None:
        """The side of the canvas on which a query is asked, None if it fits none."""
        return smallest_bucket(self.sides[query.task], self.config.sides)

    def num_views_of(self, query: Query) -> int:
        """How many views `query` has: num_views, or fewer if the task has fewer different augmentations."""
        return len(self._views[query.task][0])

    @property
    def rows(self) -> int:
        """How many rows all batches of all processes hold together."""
        pairs = zip(self.queries, self.asked, strict=True)
        asked = [query for query, asked in pairs if asked and query not in self.too_large]
        return self.rollouts * sum(map(self.num_views_of, asked))

    def _queries(self, task: int, split: str) -> list[Query]:
        first, end = int(self.store.task_pairs[task]), int(self.store.task_pairs[task + 1])
        border = first + int(self.store.task_demonstrations[task])
        if split != "train":
            return [
                Query(task, i, pair, self._limit(task, range(first, border)))
                for i, pair in enumerate(range(border, end))
            ]
        # Training tasks are asked leave-one-out, like `data.query_sampling=any` trains on them.
        labelled = [pair for pair in range(first, end) if self.store.pair_output[pair] >= 0]
        others = {pair: [other for other in labelled if other != pair] for pair in labelled}
        askable = [pair for pair in labelled if others[pair] or not self.store.layout.reads_demonstrations]
        return [Query(task, i, pair, self._limit(task, others[pair])) for i, pair in enumerate(askable)]

    def _limit(self, task: int, demos: Sequence[int]) -> tuple[int, ...]:
        """The demonstrations that a model is shown: the first data.max_demos, or none if it reads none."""
        if not self.store.layout.reads_demonstrations:
            return ()
        if len(demos) > self.config.max_demos:
            self.truncated.add(self.store.task_ids[task])
        return tuple(demos)[: self.config.max_demos]

    def _draw_views(self, task: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """transform (V,), colours (V, 10), puzzle identifier (V,) of a task's views, the identity first."""
        rows = np.arange(self.store.task_rows[task], self.store.task_rows[task + 1])[: self.num_views]
        # A learned row exists for the stored augmentations only.
        if not self.store.layout.reads_demonstrations:
            return self.store.dihedral[rows], self.store.colours[rows], self.store.identifiers_of(rows)
        # Which views differ from each other must not depend on the answers.
        known = self.store.task(task)
        queries = tuple(Pair(query.input, None) for query in known.queries)
        question = Task(known.id, known.demonstrations, queries)
        if self.config.recolours:
            rng = augment.task_rng(seed, question.id)
            transform, colours = augment.draw(question, self.num_views - 1, rng)
        else:
            transform, colours = augment.turns(question, self.num_views - 1)
        return transform, colours, np.full(len(transform), self.store.identifiers_of(rows[:1])[0])

    def _choose_donors(self) -> dict[int, tuple[int, tuple[int, ...]]]:
        """For each task another one, and those of its demonstrations that fit on the task's canvas.

        A task of the same subset comes first, among these the next larger one: its demonstrations resemble
        the right ones most.
        """
        order = [int(task) for task in self.tasks[np.argsort(self.sides[self.tasks], kind="stable")]]
        subset = self.store.task_subset.tolist()
        alike: dict[int, list[int]] = {}
        for task in order:
            alike.setdefault(subset[task], []).append(task)

        def after(task: int, group: list[int]) -> list[int]:
            at = group.index(task)
            return group[at + 1 :] + group[:at]

        donors = {}
        for task in order:
            side = smallest_bucket(self.sides[task], self.config.sides) or 0
            for other in chain(after(task, alike[subset[task]]), after(task, order)):
                first = int(self.store.task_pairs[other])
                demos = range(first, first + int(self.store.task_demonstrations[other]))
                fitting = [pair for pair in demos if self.store.pair_side[pair].max() <= side]
                if fitting:
                    donors[task] = (other, self._limit(other, fitting))
                    break
        return donors

    def _by_bucket(
        self, chosen: slice, asked: np.ndarray
    ) -> dict[Bucket, tuple[Samples, np.ndarray, np.ndarray]]:
        """The chosen views of the asked queries, with the numbers of query and view (n,), by bucket.

        The arrays of a bucket are in the order of queries, then views.
        """
        blocks: dict[Bucket, list[tuple]] = {}
        for number, query in enumerate(self.queries):
            side = self.side_of(query)
            if side is None or not asked[number]:
                continue
            transform, colours, _ = self._views[query.task]
            demos, identifier = self.demonstrations_and_identifiers(query)
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
            *fields, numbers, view = (np.concatenate(column) for column in zip(*parts, strict=True))
            merged[bucket] = (Samples(bucket, *fields), numbers, view)
        return merged
