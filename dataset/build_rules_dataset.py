"""Generate few-shot tasks with held-out rules: python -m dataset.build_rules_dataset --output-dir data/rules

A rule is one stage or two, each of a family of `dataset.rule_families`. The demonstrations of every task determine its answer: no
rule of one or two stages of the families that take part fits them and answers the query otherwise. No rule of fewer stages
fits a task of two, no other family one of a single stage; no held-out rule of as many stages explains a training task, and
no trained one a task of the last two splits. All grids are new, no pair occurs in both training and evaluation:

  train               rules of the training families
  test_instances      rules that occur in training
  test_rules          new parameters of families that occur in training: a tenth of the rules is held out, except of families
                      and compositions that have fewer than 48 rules in all
  test_compositions   two families that occur in training but never composed, in either order: composed the other way round
                      many give the same rules
  test_families       families that never occur in training, each alone

Rules count as equal if they act alike on a fixed set of grids, whatever their names. `rules.json` in the dataset's folder
says of every task its families, its rule and its split.
"""

import argparse
import hashlib
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np

from dataset import store
from dataset.leaks import find_leaks
from dataset.rule_families import FAMILIES
from dataset.rules import Library, Rule, Stages, apply, describe, draw_inputs, stages_of
from dataset.task import MAX_SIDE, Pair, Task
from utils.errors import UserError, reports_user_errors

TEST_SPLITS = ("test_instances", "test_rules", "test_compositions", "test_families")
HELD_OUT_FAMILIES = ("gravity", "count")
HELD_OUT_COMPOSITIONS = ("geometry+recolour", "shift+colour_permutation", "move+fill", "conditional+pattern")
HELD_OUT_RULES = 10  # one rule of so many
MIN_RULES = 48
MAX_DRAWS = 1000
DRAWS_PER_RULE = 20
QUERIES = {1: 1, 2: 8}  # candidates per draw by --stages: what the demonstrations allow is found once for all of them
AT_ONCE = 512
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
        pairs = [(a, b) for a in training for b in training if plan.stages == 2 and a != b and self._composes(a, b)]
        held_out = [pair for pair in pairs if tuple(sorted(pair)) in plan.held_out_compositions]
        trained: list[list[Stages]] = [[(name,) for name in training], [pair for pair in pairs if pair not in held_out]]
        self.trained = {stages for group in trained for stages in group}
        self._kept_from_training = set(plan.held_out_families), set(plan.held_out_compositions)
        self._more = [(name,) for name, weight in plan.weights for _ in range(weight - 1)]
        self.stages: dict[str, list[list[Stages]]] = {
            "train": [trained[0] + self._more, trained[1]],
            "test_instances": trained,
            "test_rules": [[stages for stages in group if library.size(stages) >= MIN_RULES] for group in trained],
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
                    *demonstrations, asked = [Pair(draw.inputs[n], draw.outputs[n]) for n in (*range(self.plan.demonstrations), query)]
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
        changes = (inputs != outputs).any(axis=(1, 2)) if inputs.shape == outputs.shape else np.ones(len(inputs), bool)
        shown = {grid.tobytes() for grid in inputs[:count]}
        good = (shows & changes)[count:] & [grid.tobytes() not in shown for grid in inputs[count:]]
        return Draw(rule, inputs, outputs, good & (shows[:count].all() and changes[:count].any() and len(shown) == count), number)

    def _determined(self, drawn: list[tuple[str, Draw]]) -> list[int | None]:
        """Of each draw for a split the first good query that its demonstrations determine, counted from them on, or None."""
        count = self.plan.demonstrations
        good = [draw.good for _, draw in drawn]
        for stages in range(1, self.library.stages + 1):
            asked = [i for i, queries in enumerate(good) if queries.any()]
            cases = [(drawn[i][1].inputs, drawn[i][1].outputs) for i in asked]
            for i, (found, determined) in zip(asked, self.library.explanations(cases, count, stages), strict=True):
                good[i] = good[i] & determined & self._admits(*drawn[i], found, stages)
        return [count + int(queries.argmax()) if queries.any() else None for queries in good]

    def _admits(self, split: str, draw: Draw, found: set[Stages], stages: int) -> bool:
        """Whether a draw's rule may be explained by all `found` of so many stages."""
        own = stages_of(draw.rule)
        if stages == 1:
            return found == ({own} if len(own) == 1 else set())
        return not any(self._wrong_side(split, explanation) for explanation in found if len(own) == 2 or split == "test_families")


def _span(sides: tuple[int, int]) -> str:
    return "..".join(map(str, sorted(set(sides))))


_generator: Generator | None = None


def _start(plan: Plan) -> None:
    global _generator
    _generator = Generator(plan)


def _make(jobs: list[Job]) -> list[Made]:
    return _generator.make(jobs)


@contextmanager
def workers(generator: Generator, count: int) -> Iterator[Callable[[list[Job]], list[Made]]]:
    """A function that makes the tasks of jobs, in their order, in `count` processes."""

    def parts(jobs: list[Job]) -> list[list[Job]]:
        size = min(AT_ONCE, -(-len(jobs) // count))
        return [jobs[start : start + size] for start in range(0, len(jobs), size)]

    if count == 1:
        yield lambda jobs: list(chain.from_iterable(map(generator.make, parts(jobs))))
        return
    with multiprocessing.Pool(count, _start, (generator.plan,)) as pool:
        yield lambda jobs: list(chain.from_iterable(pool.imap(_make, parts(jobs))))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset.build_rules_dataset", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(FAMILIES)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--families", nargs="+", choices=names, metavar="FAMILY", help=f"default: all, {', '.join(names)}")
    parser.add_argument(
        "--held-out-families",
        nargs="*",
        choices=names,
        metavar="FAMILY",
        help=f"default: {', '.join(HELD_OUT_FAMILIES)}; with --families none",
    )
    parser.add_argument(
        "--held-out-compositions",
        nargs="*",
        metavar="FAMILY+FAMILY",
        help=f"default: {', '.join(HELD_OUT_COMPOSITIONS)}; with --families or --stages 1 none",
    )
    parser.add_argument("--stages", type=int, choices=[1, 2], default=2, help="1: no compositions, not even to compete with (default 2)")
    parser.add_argument(
        "--test-splits", nargs="+", choices=TEST_SPLITS, metavar="SPLIT", help="default: all for which the families have rules"
    )
    parser.add_argument("--rules", type=int, help="so many different training rules, each with as many tasks; default: one per task")
    parser.add_argument(
        "--weights",
        nargs="+",
        default=[],
        metavar="FAMILY=N",
        help="N times as many training tasks of that family alone as of others, which models learn sooner (default 1)",
    )
    parser.add_argument("--train-tasks", type=int, default=40000)
    parser.add_argument("--test-tasks", type=int, default=500, help="of each test split")
    parser.add_argument("--rows", type=int, nargs=2, default=[5, 6], metavar=("MIN", "MAX"))
    parser.add_argument("--columns", type=int, nargs=2, default=[5, 6], metavar=("MIN", "MAX"), help="--rows 1 1 gives 1-D tasks")
    parser.add_argument("--demonstrations", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="processes; the dataset is the same for any number")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args(arguments)


def read_plan(options: argparse.Namespace) -> Plan:
    """The checked plan of a command line. Raises `UserError`."""
    for name, (low, high) in (("--rows", options.rows), ("--columns", options.columns)):
        if not 1 <= low <= high <= MAX_SIDE:
            raise UserError(f"{name} needs 1 <= MIN <= MAX <= {MAX_SIDE}, found {low} {high}")
    for name in ("train_tasks", "test_tasks", "demonstrations", "workers", "rules"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, found {getattr(options, name)}")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed must be >= 0 and below 2^63, found {options.seed}")
    families = tuple(dict.fromkeys(options.families or FAMILIES))
    held_out, compositions = options.held_out_families, options.held_out_compositions
    if held_out is None:
        held_out = [] if options.families else HELD_OUT_FAMILIES
    training = [name for name in families if name not in held_out]
    for name in held_out:
        if name not in families:
            raise UserError(f"--held-out-families: {name} is not among --families")
    if not training:
        raise UserError("--held-out-families leaves no family for training")
    if compositions is None:
        compositions = [] if options.families or options.stages == 1 else HELD_OUT_COMPOSITIONS
    elif compositions and options.stages == 1:
        raise UserError("--held-out-compositions needs --stages 2")
    weights = []
    for text in options.weights:
        name, _, number = text.partition("=")
        if name not in training or not number.isdecimal() or int(number) < 1:
            raise UserError(f"--weights: '{text}' is not FAMILY=N with a training family ({', '.join(training)}) and a whole number from 1")
        weights.append((name, int(number)))
    pairs = []
    for text in compositions:
        pair = tuple(sorted(text.split("+")))
        if len(set(pair)) != 2 or len(pair) != 2 or not set(pair) <= set(training):
            raise UserError(f"--held-out-compositions: '{text}' is not FAMILY+FAMILY of two training families ({', '.join(training)})")
        pairs.append(pair)
    return Plan(
        families=families,
        held_out_families=tuple(dict.fromkeys(held_out)),
        held_out_compositions=tuple(pairs),
        stages=options.stages,
        rows=tuple(options.rows),
        columns=tuple(options.columns),
        demonstrations=options.demonstrations,
        seed=options.seed,
        weights=tuple(weights),
    )


def training_rules(make: Callable[[list[Job]], list[Made]], generator: Generator, count: int) -> list[Rule]:
    """`count` rules of the training families that act differently. Raises `UserError` if there are not so many."""
    rules: dict[bytes, Rule] = {}
    for start in range(0, 8 * count, count):
        for made in make([("train", number, None) for number in range(start, start + count)]):
            rules.setdefault(generator.library.key(made.rule), made.rule)
        if len(rules) >= count:
            return list(rules.values())[:count]
    raise UserError(f"--rules {count}: found only {len(rules)} different rules of the training families; ask for fewer")


def build(options: argparse.Namespace) -> tuple[store.Metadata, dict[str, float]]:
    """Generate and write; also returns how many draws a task of each family or composition took on average.

    Raises `UserError`; nothing is written unless all of it is.
    """
    plan = read_plan(options)
    generator = Generator(plan)
    chosen = options.test_splits or [split for split in TEST_SPLITS if generator.has(split)]
    for split in chosen:
        if not generator.has(split):
            raise UserError(f"--test-splits {split}: the chosen families have no rules for it")
    with workers(generator, options.workers) as make:
        rules = training_rules(make, generator, options.rules) if options.rules else [None]
        made = {"train": make([("train", i, rules[i % len(rules)]) for i in range(options.train_tasks)])}
        asked = [i for i in range(options.train_tasks) if not generator.weighted(i)]
        for split in chosen:
            pick = np.random.default_rng([plan.seed, *split.encode()]).choice(asked, size=options.test_tasks)
            seen = [made["train"][i].rule if split == "test_instances" else None for i in pick]
            made[split] = make([(split, i, rule) for i, rule in enumerate(seen)])
    numbered = enumerate((split, task) for split in made for task in made[split])
    identified = {f"{i:06d}_{'+'.join(stages_of(task.rule))}": (split, task) for i, (split, task) in numbered}
    tasks: dict[str, list[Task]] = {split: [] for split in made}
    for task_id, (split, task) in identified.items():
        tasks[split].append(Task(task_id, task.demonstrations, (task.query,)))
    leaks = find_leaks(tasks["train"], [task for split in chosen for task in tasks[split]], "fewshot")
    dropped = {leak.train_task for leak in leaks}
    tasks["train"] = [task for task in tasks["train"] if task.id not in dropped]
    if not tasks["train"]:
        raise UserError("every training task shares a pair with an evaluation task; use larger grids or fewer evaluation tasks")
    if "test_instances" in chosen:
        trained = {identified[task.id][1].rule for task in tasks["train"]}
        tasks["test_instances"] = [task for task in tasks["test_instances"] if identified[task.id][1].rule in trained]
    kept = {task.id for subset in tasks.values() for task in subset}
    metadata = store.write(
        options.output_dir,
        tasks,
        list(chosen),
        layout="fewshot",
        source=f"generated: {plan}",
        seed=plan.seed,
        max_grid_size=max(plan.rows[1], plan.columns[1]),
        left_out={"leak": sorted(dropped)} if dropped else {},
        extra_files={
            "rules.json": {
                task_id: {"families": list(stages_of(task.rule)), "description": describe(task.rule), "split": split}
                for task_id, (split, task) in identified.items()
                if task_id in kept
            }
        },
    )
    draws, counts = Counter(), Counter()
    for _, task in identified.values():
        draws["+".join(stages_of(task.rule))] += task.draws
        counts["+".join(stages_of(task.rule))] += 1
    return metadata, {name: draws[name] / counts[name] for name in sorted(counts)}


@reports_user_errors
def main() -> None:
    options = parse_arguments()
    metadata, draws = build(options)
    print(f"{options.output_dir}: " + ", ".join(f"{count} {name}" for name, count in metadata.subsets.items()) + " tasks, no pair in both")
    print("redraws per task: " + ", ".join(f"{name} {mean - 1:.1f}" for name, mean in draws.items()))
    if leaking := metadata.left_out.get("leak"):
        print(f"left out {len(leaking)} training tasks that share a pair with an evaluation task")


if __name__ == "__main__":
    main()
