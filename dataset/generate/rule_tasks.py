"""Few-shot tasks of rules: which rules and families take part in which split, and grids whose demonstrations determine the answer.

What the splits are and what a task guarantees says `dataset.build_rules_dataset`, the command that writes them.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from dataset.generate.rule_families import FAMILIES
from dataset.generate.rules import Library, Rule, Stages, apply, draw_inputs, stages_of
from dataset.task import Pair
from utils.errors import UserError

HELD_OUT_RULES = 10  # one rule of so many
MIN_RULES = 48
MAX_DRAWS = 1000
DRAWS_PER_RULE = 20
QUERIES = {
    1: 1,
    2: 8,
}  # candidates per draw by --stages: what the demonstrations allow is found once for all of them
CHECKED_AT_ONCE = 16

Job = tuple[str, int, Rule | None]


@dataclass(frozen=True)
class Plan:
    """What is generated. `held_out_compositions` are pairs of families in alphabetical order, which stand for both orders.

    weights: how many times as often as the other families one has its turn among the training tasks of one stage.
    """

    families: tuple[str, ...]
    held_out_families: tuple[str, ...]
    held_out_compositions: tuple[Stages, ...]
    stages: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    demonstrations: int
    seed: int
    weights: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Draw:
    """Grids of a rule, the demonstrations before the queries, which queries are worth asking, and which of its job's draws it is."""

    rule: Rule
    inputs: np.ndarray
    outputs: np.ndarray
    good: np.ndarray
    number: int


@dataclass(frozen=True)
class Made:
    """A task, still without an id, its rule, and how many draws of grids it took."""

    rule: Rule
    demonstrations: tuple[Pair, ...]
    query: Pair
    draws: int


class Generator:
    """Makes task `number` of a split from the plan's seed alone."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.library = library = Library(list(plan.families), plan.stages, plan.rows, plan.columns)
        training = [name for name in plan.families if name not in plan.held_out_families]
        pairs = [
            (a, b) for a in training for b in training if plan.stages == 2 and a != b and self._composes(a, b)
        ]
        held_out = [pair for pair in pairs if tuple(sorted(pair)) in plan.held_out_compositions]
        trained: list[list[Stages]] = [
            [(name,) for name in training],
            [pair for pair in pairs if pair not in held_out],
        ]
        self.trained = {stages for group in trained for stages in group}
        self._kept_from_training = set(plan.held_out_families), set(plan.held_out_compositions)
        self._more = [(name,) for name, weight in plan.weights for _ in range(weight - 1)]
        self.stages: dict[str, list[list[Stages]]] = {
            "train": [trained[0] + self._more, trained[1]],
            "test_instances": trained,
            "test_rules": [
                [stages for stages in group if library.size(stages) >= MIN_RULES] for group in trained
            ],
            "test_compositions": [held_out],
            "test_families": [[(name,) for name in plan.held_out_families]],
        }
        few = [stages for stages in sorted(self.trained) if library.size(stages) < MIN_RULES]
        self._always_trained = {library.key(rule) for stages in few for rule in library.rules(stages)}

    def _composes(self, first: str, last: str) -> bool:
        """Whether the two stages, in this order, can do what one stage cannot. A fitted family stands only last."""
        if FAMILIES[first].fit is not None:
            return False
        rng = np.random.default_rng(0)
        drawn = (self.library.draw(rng, (first, last)) for _ in range(MIN_RULES))
        return any(self.library.key(rule) not in self.library.single_keys for rule in drawn)

    def has(self, split: str) -> bool:
        """Whether the plan has rules for a split."""
        return any(self.stages[split])

    def held_out(self, rule: Rule) -> bool:
        """Whether a rule of training families is kept for `test_rules`."""
        return self._holds_out(self.library.key(rule))

    def _holds_out(self, key: bytes) -> bool:
        digest = hashlib.sha256(self.plan.seed.to_bytes(8, "little") + key).digest()
        return key not in self._always_trained and int.from_bytes(digest[:8], "little") % HELD_OUT_RULES == 0

    def _wrong_side(self, split: str, explanation: Stages) -> bool:
        """Whether these families must not explain a task of the split."""
        if split in ("test_compositions", "test_families"):
            return explanation in self.trained
        families, compositions = self._kept_from_training
        return bool(families & set(explanation)) or tuple(sorted(explanation)) in compositions

    def make(self, jobs: list[Job]) -> list[Made]:
        """The tasks of jobs. A job is a split, the task's number there, and its rule, if it is given one; no other job matters.

        One stage and two stages take turns, and so do the families, some with several turns (`Plan.weights`). Raises
        `UserError` if no draw is determined.
        """
        draws = [self._draws(job) for job in jobs]
        made: list[Made | None] = [None] * len(jobs)
        while waiting := [i for i, task in enumerate(made) if task is None]:
            # A check of many draws costs hardly more than one of a few; and what cannot be made fails in its first task, soon.
            share = {i: -(-CHECKED_AT_ONCE // len(waiting)) for i in waiting} | {waiting[0]: CHECKED_AT_ONCE}
            drawn = [(i, draw) for i in waiting for draw in islice(draws[i], share[i])]
            for i in sorted(set(waiting) - {i for i, _ in drawn}):
                raise UserError(
                    f"{'+'.join(self._stages_of(jobs[i]))} on {_span(self.plan.rows)} x {_span(self.plan.columns)} grids: "
                    f"{self.plan.demonstrations} demonstrations did not determine the answer in {MAX_DRAWS} draws; use larger grids, "
                    "more demonstrations or other --families"
                )
            queries = self._determined([(jobs[i][0], draw) for i, draw in drawn])
            for (i, draw), query in zip(drawn, queries, strict=True):
                if made[i] is None and query is not None:
                    *demonstrations, asked = [
                        Pair(draw.inputs[n], draw.outputs[n])
                        for n in (*range(self.plan.demonstrations), query)
                    ]
                    made[i] = Made(draw.rule, tuple(demonstrations), asked, draw.number)
        return made

    def _stages_of(self, job: Job) -> Stages:
        split, number, given = job
        group, turn = self._turn(split, number)
        return group[turn] if given is None else stages_of(given)

    def _turn(self, split: str, number: int) -> tuple[list[Stages], int]:
        groups = [group for group in self.stages[split] if group]
        group = groups[number % len(groups)]
        return group, number // len(groups) % len(group)

    def weighted(self, number: int) -> bool:
        """Whether training task `number` is one that its family has more than others."""
        group, turn = self._turn("train", number)
        return group is self.stages["train"][0] and turn >= len(group) - len(self._more)

    def _draws(self, job: Job) -> Iterator[Draw]:
        split, number, given = job
        rng = np.random.default_rng([self.plan.seed, *split.encode(), number, given is not None])
        for draw in range(MAX_DRAWS):
            if draw % DRAWS_PER_RULE == 0:
                rule = given or self._draw_rule(rng, split, self._stages_of(job))
            yield self._draw(rng, rule, draw + 1)

    def _draw_rule(self, rng: np.random.Generator, split: str, stages: Stages) -> Rule:
        for _ in range(MAX_DRAWS):
            rule = self.library.draw(rng, stages)
            key = self.library.key(rule)
            if len(rule) == 2 and key in self.library.single_keys:
                continue
            if split not in ("train", "test_rules") or self._holds_out(key) == (split == "test_rules"):
                return rule
        raise UserError(f"{'+'.join(stages)}: found no rule for {split} in {MAX_DRAWS} draws")

    def _draw(self, rng: np.random.Generator, rule: Rule, number: int) -> Draw:
        """New grids, with no good query if the demonstrations show nothing, change nothing or are not all different."""
        count = self.plan.demonstrations
        shape = tuple(rng.integers(low, high + 1) for low, high in (self.plan.rows, self.plan.columns))
        inputs = draw_inputs(rng, rule, count, QUERIES[self.plan.stages], shape)
        outputs = np.ascontiguousarray(apply(rule, inputs))
        shows = inputs.any(axis=(1, 2)) & outputs.any(axis=(1, 2))
        changes = (
            (inputs != outputs).any(axis=(1, 2))
            if inputs.shape == outputs.shape
            else np.ones(len(inputs), bool)
        )
        shown = {grid.tobytes() for grid in inputs[:count]}
        good = (shows & changes)[count:] & [grid.tobytes() not in shown for grid in inputs[count:]]
        return Draw(
            rule,
            inputs,
            outputs,
            good & (shows[:count].all() and changes[:count].any() and len(shown) == count),
            number,
        )

    def _determined(self, drawn: list[tuple[str, Draw]]) -> list[int | None]:
        """Of each draw for a split the first good query that its demonstrations determine, counted from them on, or None."""
        count = self.plan.demonstrations
        good = [draw.good for _, draw in drawn]
        for stages in range(1, self.library.stages + 1):
            asked = [i for i, queries in enumerate(good) if queries.any()]
            cases = [(drawn[i][1].inputs, drawn[i][1].outputs) for i in asked]
            for i, (found, determined) in zip(
                asked, self.library.explanations(cases, count, stages), strict=True
            ):
                good[i] = good[i] & determined & self._admits(*drawn[i], found, stages)
        return [count + int(queries.argmax()) if queries.any() else None for queries in good]

    def _admits(self, split: str, draw: Draw, found: set[Stages], stages: int) -> bool:
        """Whether a draw's rule may be explained by all `found` of so many stages."""
        own = stages_of(draw.rule)
        if stages == 1:
            return found == ({own} if len(own) == 1 else set())
        return not any(
            self._wrong_side(split, explanation)
            for explanation in found
            if len(own) == 2 or split == "test_families"
        )


def _span(sides: tuple[int, int]) -> str:
    return "..".join(map(str, sorted(set(sides))))
