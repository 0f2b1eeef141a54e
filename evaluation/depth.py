"""Accuracy by ACT step, from one pass: what an evaluation that ends after each step would have scored."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from dataset.views import EvaluationSet
from evaluation.metrics import AnsweredQuery, Score
from evaluation.predictions import Predictions
from evaluation.records import answers_from, answers_of
from evaluation.scoreboard import HEADLINES, known_answers, scores_of
from evaluation.selection import Selection
from evaluation.voting import VotingConfig
from utils import distributed
from utils.device import clock

ORACLE = "oracle"  # as the control of a score: any of the attempts is right, an upper bound of all selections


@dataclass
class StepClock:
    """Seconds that the model needs for each ACT step, summed over batches, without what is done between."""

    seconds: list[float] = field(default_factory=list)
    _since: float = 0.0
    _step: int = 0

    def start(self, device: torch.device) -> None:
        """A batch begins."""
        self._since, self._step = clock(device), 0

    def step_done(self, device: torch.device) -> None:
        """An ACT step of the batch has ended. The first one includes the context."""
        if self._step == len(self.seconds):
            self.seconds.append(0.0)
        self.seconds[self._step] += clock(device) - self._since
        self._step += 1

    def resume(self) -> None:
        """The next step begins."""
        self._since = time.perf_counter()

    def until(self) -> list[float]:
        """Seconds of all processes until the end of each step."""
        everyones = distributed.gather_objects(self.seconds)
        most = max(map(len, everyones))
        padded = [seconds + [0.0] * (most - len(seconds)) for seconds in everyones]
        return np.cumsum(np.sum(padded, axis=0)).tolist()


@dataclass(frozen=True)
class Depth:
    """The scores of answers after ACT step `step` at the latest.

    seconds: what the model needs for all of them, summed over processes.
    at_work: the share of attempts that had not halted before the step.
    """

    step: int
    seconds: float
    at_work: float
    scores: list[Score]

    def value(self, metric: str) -> float | None:
        """The model's own score, None if there is none of that name."""
        found = (s.value for s in self.scores if (s.metric, s.control) == (metric, "none"))
        return next(found, None)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "step": self.step,
            "model_seconds": round(self.seconds, 3),
            "at_work": round(self.at_work, 6),
            "scores": [score.to_json() for score in self.scores],
        }


def by_depth(
    questions: EvaluationSet,
    predictions: Predictions,
    config: VotingConfig,
    selection: Selection,
    seconds: list[float],
) -> list[Depth]:
    """A `Depth` for every ACT step, from predictions that hold them all.

    seconds: the model's until the end of each step (`StepClock.until`).
    """
    found = []
    for step, until in enumerate(seconds, 1):
        answers = answers_of(questions, predictions.vote(config.ranking, step, selection=selection))
        scores = _scores(questions, answers, config)
        if questions.rollouts > 1:
            every = answers_of(questions, predictions.vote(config.ranking, step))
            scores += _scores(questions, best_of(questions, every), config, ORACLE)
        at_work = float((predictions.rows(step)["step"] == step).mean())
        found.append(Depth(step, until, at_work, scores))
    return found


def best_of(questions: EvaluationSet, answers: list[AnsweredQuery]) -> list[AnsweredQuery]:
    """The same answers, with the one first that has the most cells right: what an oracle would choose."""
    ranked = []
    for query in answers:
        shares = [replace(query, candidates=[one]).share_of_cells for one in query.candidates]
        order = np.argsort(-np.array(shares), kind="stable").tolist()
        ranked.append([query.candidates[i] for i in order])
    return answers_from(questions, ranked)


def _scores(
    questions: EvaluationSet, answers: list[AnsweredQuery], config: VotingConfig, control: str = "none"
) -> list[Score]:
    return scores_of(known_answers(questions, answers), config, questions.store, control)


def depth_lines(depths: list[Depth]) -> Iterator[str]:
    """The curve for a terminal: powers of two and the last step, and the headline scores."""
    if not depths:
        return
    names = [name for name in HEADLINES if depths[0].value(name) is not None]
    yield f"{'ACT steps':<11}" + "".join(f"{name:<22}" for name in names) + "model seconds"
    for depth in depths:
        if depth.step & (depth.step - 1) == 0 or depth.step == len(depths):
            cells = (f"{100 * (depth.value(name) or 0):5.1f} %" for name in names)
            yield f"{depth.step:<11}" + "".join(f"{cell:<22}" for cell in cells) + f"{depth.seconds:.1f}"
