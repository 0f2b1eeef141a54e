"""Few-shot tasks of rules, whose demonstrations determine the answer, and which rules each split has.

The command that writes them, `dataset.build_rules_dataset`, says what the splits are and what a task
guarantees.
"""

import hashlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from dataset.generate.rule_families import FAMILIES
from dataset.generate.rules import Library, Rule, Stages, apply, draw_inputs, stages_of
from dataset.task import Pair, Task
from utils.errors import UserError

HELD_OUT_RULES = 10  # one rule of so many is kept for test_rules
MIN_RULES = 48  # of families with fewer rules all are trained
MAX_DRAWS = 1000
DRAWS_PER_RULE = 20  # then another rule is tried
# Candidates per draw by --stages. What the demonstrations allow is found once for all of them.
QUERIES = {1: 1, 2: 8}
CHECKED_AT_ONCE = 16  # draws, at least
MADE_AT_ONCE = 512  # tasks, in one process

Job = tuple[str, int, Rule | None]  # a split, the task's number there, and its rule if it is given one


@dataclass(frozen=True)
class Plan:
    """What is generated.

    held_out_compositions: pairs of families in alphabetical order, which stand for both orders.
    rows, columns: smallest and largest side of the grids.
    demonstrations: number of them per task.
    weights: how many turns a family has among the training tasks of one stage, where the others have one.
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
    """Grids of a rule.

    inputs, outputs: (K + Q, rows, columns), the demonstrations before the queries.
    good: (Q,) bool, which queries are worth asking. number: which of its job's draws this is, from 1.
    """

    rule: Rule
    inputs: np.ndarray
    outputs: np.ndarray
    good: np.ndarray
    number: int


@dataclass(frozen=True)
class Made:
    """A task without an id, its rule, and how many draws of grids it took."""

    rule: Rule
    demonstrations: tuple[Pair, ...]
    query: Pair
    draws: int


class Generator:
    """Makes tasks, each from the plan's seed, its split and its number alone.

    stages: of each split the groups of families (and compositions) that take turns. trained: those of
    training.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.library = library = Library(list(plan.families), plan.stages, plan.rows, plan.columns)
        training = [name for name in plan.families if name not in plan.held_out_families]
        candidates: list[Stages] = [(a, b) for a in training for b in training if plan.stages == 2 and a != b]
        pairs = [pair for pair in candidates if self._composes(*pair)]
        held_out = [pair for pair in pairs if tuple(sorted(pair)) in plan.held_out_compositions]
        alone: list[Stages] = [(name,) for name in training]
        trained: list[list[Stages]] = [
            alone,
            [pair for pair in pairs if pair not in held_out],
        ]
        self.trained = {stages for group in trained for stages in group}
        self._kept_from_training = set(plan.held_out_families), set(plan.held_out_compositions)
        self._more: list[Stages] = [(name,) for name, weight in plan.weights for _ in range(weight - 1)]
        self.stages: dict[str, list[list[Stages]]] = {
            "train": [trained[0] + self._more, trained[1]],
            "test_instances": trained,
            "test_rules": [
                [stages for stages in group if library.size(stages) >= MIN_RULES] for group in trained
            ],
            "test_compositions": [held_out],
            "test_families": [[(name,) for name in plan.held_out_families]],
        }
        # A tenth of so few rules would often be none. So all of them are trained.
        few = [stages for stages in sorted(self.trained) if library.size(stages) < MIN_RULES]
        self._always_trained = {library.key(rule) for stages in few for rule in library.rules(stages)}

    def _composes(self, first: str, last: str) -> bool:
        """Whether the two stages, in this order, can do what no single stage can.

        A fitted family stands only last.
        """
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
        # By a hash of what the rule does: all its descriptions fall on the same side.
        digest = hashlib.sha256(self.plan.seed.to_bytes(8, "little") + key).digest()
        return key not in self._always_trained and int.from_bytes(digest[:8], "little") % HELD_OUT_RULES == 0

    def _wrong_side(self, split: str, explanation: Stages) -> bool:
        """Whether these families must not explain a task of the split."""
        if split in ("test_compositions", "test_families"):
            return explanation in self.trained
        families, compositions = self._kept_from_training
        return bool(families & set(explanation)) or tuple(sorted(explanation)) in compositions

    def make(self, jobs: list[Job]) -> list[Made]:
        """The tasks of jobs. Each depends on its own job alone.

        One stage and two stages take turns, and so do the families, some with several turns (`Plan.weights`).
        Raises `UserError` if no draw is determined.
        """
        draws = [self._draws(job) for job in jobs]
        made: list[Made | None] = [None] * len(jobs)
        while waiting := [i for i, task in enumerate(made) if task is None]:
            # A check of many draws costs hardly more than one of a few. The first task gets the most, so
            # that what cannot be made fails soon.
            share = {i: -(-CHECKED_AT_ONCE // len(waiting)) for i in waiting} | {waiting[0]: CHECKED_AT_ONCE}
            drawn = [(i, draw) for i in waiting for draw in islice(draws[i], share[i])]
            for i in sorted(set(waiting) - {i for i, _ in drawn}):
                self._give_up(jobs[i])
            queries = self._determined([(jobs[i][0], draw) for i, draw in drawn])
            for (i, draw), query in zip(drawn, queries, strict=True):
                if made[i] is None and query is not None:
                    *demonstrations, asked = [
                        Pair(draw.inputs[n], draw.outputs[n])
                        for n in (*range(self.plan.demonstrations), query)
                    ]
                    made[i] = Made(draw.rule, tuple(demonstrations), asked, draw.number)
        return [task for task in made if task is not None]

    def training_tasks(self, numbers: Sequence[int]) -> list[Task]:
        """The training tasks of these numbers, each with a rule of its own."""
        made = self.make([("train", number, None) for number in numbers])
        return [
            Task(f"{number:06d}_{'+'.join(stages_of(one.rule))}", one.demonstrations, (one.query,))
            for number, one in zip(numbers, made, strict=True)
        ]

    def _give_up(self, job: Job) -> NoReturn:
        plan, stages = self.plan, "+".join(self._stages_of(job))
        raise UserError(
            f"{stages} on {_span(plan.rows)} x {_span(plan.columns)} grids: {plan.demonstrations} "
            f"demonstrations did not determine the answer in {MAX_DRAWS} draws; "
            "use larger grids, more demonstrations or other --families"
        )

    def _stages_of(self, job: Job) -> Stages:
        split, number, given = job
        group, turn = self._turn(split, number)
        return group[turn] if given is None else stages_of(given)

    def _turn(self, split: str, number: int) -> tuple[list[Stages], int]:
        """The group of families whose turn a task is, and the place in it."""
        groups = [group for group in self.stages[split] if group]
        group = groups[number % len(groups)]
        return group, number // len(groups) % len(group)

    def weighted(self, number: int) -> bool:
        """Whether training task `number` is one of those that its family has more than others."""
        group, turn = self._turn("train", number)
        return group is self.stages["train"][0] and turn >= len(group) - len(self._more)

    def _draws(self, job: Job) -> Iterator[Draw]:
        """The draws of a job, at most MAX_DRAWS."""
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
            if len(rule) == 2 and key in self.library.single_keys:  # one stage would do
                continue
            if split not in ("train", "test_rules") or self._holds_out(key) == (split == "test_rules"):
                return rule
        raise UserError(f"{'+'.join(stages)}: found no rule for {split} in {MAX_DRAWS} draws")

    def _draw(self, rng: np.random.Generator, rule: Rule, number: int) -> Draw:
        """New grids of a rule.

        No query is good if a demonstration is empty, if none changes anything, or if two are equal.
        """
        count = self.plan.demonstrations
        ranges = (self.plan.rows, self.plan.columns)
        rows, columns = (int(rng.integers(low, high + 1)) for low, high in ranges)
        inputs = draw_inputs(rng, rule, count, QUERIES[self.plan.stages], (rows, columns))
        outputs = np.ascontiguousarray(apply(rule, inputs))
        shows = np.asarray(inputs.any(axis=(1, 2)) & outputs.any(axis=(1, 2)))
        changes = np.ones(len(inputs), bool)
        if inputs.shape == outputs.shape:
            changes = np.not_equal(inputs, outputs).any(axis=(1, 2))
        shown = {grid.tobytes() for grid in inputs[:count]}
        new = [grid.tobytes() not in shown for grid in inputs[count:]]
        demonstrated = shows[:count].all() and changes[:count].any() and len(shown) == count
        return Draw(rule, inputs, outputs, (shows & changes)[count:] & new & demonstrated, number)

    def _determined(self, drawn: list[tuple[str, Draw]]) -> list[int | None]:
        """Of each draw for a split the first good query that its demonstrations determine, or None.

        The query is an index into the draw's grids.
        """
        count = self.plan.demonstrations
        good = [draw.good for _, draw in drawn]
        # The check of one stage is quick and rules out most draws before that of two stages.
        for stages in range(1, self.library.stages + 1):
            asked = [i for i, queries in enumerate(good) if queries.any()]
            cases = [(drawn[i][1].inputs, drawn[i][1].outputs) for i in asked]
            explained = self.library.explanations(cases, count, stages)
            for i, (found, determined) in zip(asked, explained, strict=True):
                good[i] = good[i] & determined & self._admits(*drawn[i], found, stages)
        return [count + int(queries.argmax()) if queries.any() else None for queries in good]

    def _admits(self, split: str, draw: Draw, found: set[Stages], stages: int) -> bool:
        """Whether a task of the split may have all the explanations `found` of so many stages."""
        own = stages_of(draw.rule)
        # No single stage may explain a task of two, and only its own family a task of one.
        if stages == 1:
            return found == ({own} if len(own) == 1 else set())
        return not any(
            self._wrong_side(split, explanation)
            for explanation in found
            if len(own) == 2 or split == "test_families"
        )


def _span(sides: tuple[int, int]) -> str:
    """A range of sides in words."""
    return "..".join(map(str, sorted(set(sides))))


# --- Several processes ---

Make = Callable[[list[Job]], list[Made]]

_generator: Generator | None = None  # of a worker process


def _start_worker(plan: Plan) -> None:
    global _generator
    _generator = Generator(plan)


def _make_in_worker(jobs: list[Job]) -> list[Made]:
    assert _generator is not None, "a worker makes its generator when it starts"
    return _generator.make(jobs)


@contextmanager
def workers(generator: Generator, count: int) -> Iterator[Make]:
    """A function that makes the tasks of jobs, in their order, in `count` processes."""

    def parts(jobs: list[Job]) -> list[list[Job]]:
        size = min(MADE_AT_ONCE, -(-len(jobs) // count))
        return [jobs[start : start + size] for start in range(0, len(jobs), size)]

    def told(jobs: list[Job], results: Iterable[list[Made]]) -> list[Made]:
        made: list[Made] = []
        with tqdm(total=len(jobs), desc=jobs[0][0], unit="task", leave=False, disable=None) as progress:
            for result in results:
                made += result
                progress.update(len(result))
        return made

    if count == 1:
        yield lambda jobs: told(jobs, map(generator.make, parts(jobs)))
        return
    # A generator takes long to build, so every process builds its own only once.
    with multiprocessing.Pool(count, _start_worker, (generator.plan,)) as pool:
        yield lambda jobs: told(jobs, pool.imap(_make_in_worker, parts(jobs)))
