"""What one task teaches at test time: its demonstrations, each in turn the query of the others.

Shapes: Q queries of the evaluation set, V views, R puzzle rows, B episodes, K demonstrations.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataset import augment
from dataset.batch import Bucket, Samples
from dataset.samplers import draw_offsets
from dataset.views import EvaluationSet


@dataclass(frozen=True)
class Lesson:
    """What one set of weights is trained on and asked.

    task: the task that is asked. pairs: the demonstrations. side: of the canvas.
    queries: the numbers of the queries that they explain.
    """

    task: int
    pairs: tuple[int, ...]
    queries: tuple[int, ...]
    side: int


def lessons_of(questions: EvaluationSet, asked: np.ndarray) -> tuple[list[Lesson], np.ndarray]:
    """The lessons of the queries `asked` (Q,) bool, and (Q,) bool which have too few demonstrations."""
    # Queries of a task that are told the same demonstrations share their weights.
    queries_of: dict[tuple[int, tuple[int, ...], int], list[int]] = {}
    without = np.zeros(len(questions.queries), bool)
    for number in np.flatnonzero(asked & questions.asked).tolist():
        query = questions.queries[number]
        side = questions.side_of(query)
        if side is None:
            continue
        if questions.can_adapt(query):
            queries_of.setdefault((query.task, questions.adaptation_pairs(query), side), []).append(number)
        else:
            without[number] = True
    lessons = [
        Lesson(task, pairs, tuple(numbers), side) for (task, pairs, side), numbers in queries_of.items()
    ]
    return lessons, without


def rows_of(questions: EvaluationSet, lesson: Lesson) -> tuple[Tensor, np.ndarray]:
    """The different puzzle rows (R,) of a lesson's queries, and each view's place (V,) among them."""
    _, identifiers = questions.demonstrations_and_identifiers(questions.queries[lesson.queries[0]])
    rows, place = np.unique(identifiers.astype(np.int64), return_inverse=True)
    return torch.from_numpy(rows), place


class EpisodeSampler:
    """Draws what one task is trained on, a function of seed and task alone."""

    def __init__(self, questions: EvaluationSet, lesson: Lesson, seed: int):
        self.questions, self.lesson = questions, lesson
        store = questions.store
        # With shuffled demonstrations another task owns the pairs, and the draws depend on both.
        owner = int(np.searchsorted(store.task_pairs, lesson.pairs[0], side="right")) - 1
        numbers = " ".join(str(pair - int(store.task_pairs[owner])) for pair in lesson.pairs)
        self.rng = augment.task_rng(seed, f"{store.task_ids[lesson.task]} {store.task_ids[owner]} {numbers}")
        self.query = questions.queries[lesson.queries[0]]
        _, self.places = rows_of(questions, lesson)

    def draw(self, count: int) -> Samples:
        """`count` episodes in one bucket, augmented and placed as in training."""
        questions, rng = self.questions, self.rng
        if questions.store.layout.reads_demonstrations:
            query, demos, transform, colours, identifier = self._episodes(count)
        else:
            query, demos, transform, colours, identifier = self._single_pairs(count)
        bucket = Bucket(self.lesson.side, demos.shape[1])
        pairs = np.concatenate([query[:, None], demos], axis=1)
        offset = draw_offsets(questions.store, questions.config, rng, bucket, pairs, transform)
        shown = np.ones(demos.shape, bool)
        return Samples(bucket, query, demos, shown, transform, colours, offset, identifier)

    def _episodes(self, count: int) -> tuple[np.ndarray, ...]:
        """Query (B,), the other demonstrations (B, K), transform (B,), colours (B, 10), identifier (B,)."""
        questions, rng, pairs = self.questions, self.rng, np.array(self.lesson.pairs)
        order = pairs[rng.random((count, len(pairs))).argsort(axis=1)]
        transform, colours = np.zeros(count, np.int64), augment.identity_colours(count)
        if questions.config.turns:
            transform = rng.integers(0, 8, count)
        if questions.config.recolours:
            colours = augment.random_colours(rng, count)
        _, identifiers = questions.demonstrations_and_identifiers(self.query)
        return order[:, 0], order[:, 1:], transform, colours, np.full(count, identifiers[0])

    def _single_pairs(self, count: int) -> tuple[np.ndarray, ...]:
        """As `_episodes` without demonstrations (K = 0), in the stored views, whose rows learn.

        A row is named by its place among the lesson's rows.
        """
        questions, rng = self.questions, self.rng
        query = rng.choice(np.array(self.lesson.pairs), count)
        chosen = rng.integers(0, questions.num_views_of(self.query), count)
        views = [questions.view(self.query, int(view)) for view in chosen]
        transform, colours = np.array([view[0] for view in views]), np.stack([view[1] for view in views])
        return query, np.zeros((count, 0), np.int64), transform, colours, self.places[chosen]
