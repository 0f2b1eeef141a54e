"""The scores of an evaluation and of its controls, which are asked the same queries."""

import numpy as np

from dataset.layouts import Layout
from dataset.store import Store
from dataset.views import EvaluationSet
from evaluation.canvas_scores import NAMES
from evaluation.metrics import AnsweredQuery, Score, score, score_pairs
from evaluation.voting import Controls, VotingConfig

HEADLINES = ("ARC/pass@1", "ARC/pass@2", "all.exact_accuracy", "all.accuracy")  # where there is room for few


def metric_names(config: VotingConfig, store: Store) -> list[str]:
    """What `Evaluation.metrics` has where answers are known and fit their canvas."""
    controls = ("none", *controls_of(config, store.layout))
    scores = [one.name for control in controls for one in scores_of([], config, store, control)]
    return list(dict.fromkeys([*(f"all.{name}" for name in NAMES), *scores]))


def controls_of(config: VotingConfig, layout: Layout) -> list[Controls]:
    """The configured controls, of which games without demonstrations have only `copy_input`."""
    return [control for control in config.controls if control == "copy_input" or not layout.shares_rule]


def scores_of(answers: list[AnsweredQuery], config: VotingConfig, store: Store, control: str) -> list[Score]:
    """The scores of queries whose answers are known, by the rules of the dataset's layout and game."""
    if store.layout.shares_rule:
        return score_pairs(answers, control, store.checks)
    return score(answers, config.pass_ks, control)


def known_answers(questions: EvaluationSet, answers: list[AnsweredQuery]) -> list[AnsweredQuery]:
    """The queries that were asked and have a known answer."""
    return [
        answered
        for answered, was_asked in zip(answers, questions.asked, strict=True)
        if was_asked and answered.truth is not None
    ]


class Scoreboard:
    """The scores of all tasks, and those of each subset where there are several."""

    def __init__(self, store: Store, tasks: np.ndarray, config: VotingConfig):
        self.config, self.store = config, store
        self.subset_of = {task: store.subset_names[store.task_subset[task]] for task in tasks.tolist()}
        self.scores: list[Score] = []
        self.by_subset: dict[str, list[Score]] = {}

    def add(self, questions: EvaluationSet, answers: list[AnsweredQuery], control: str = "none") -> None:
        """Score the queries that were asked and have a known answer."""
        known = known_answers(questions, answers)
        self.scores.extend(scores_of(known, self.config, self.store, control))
        names = dict.fromkeys(self.subset_of.values())
        if len(names) > 1:
            for name in names:
                of_subset = [answered for answered in known if self.subset_of[answered.task] == name]
                found = scores_of(of_subset, self.config, self.store, control)
                self.by_subset.setdefault(name, []).extend(found)
