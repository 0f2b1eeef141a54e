"""Generate few-shot tasks with held-out rules: python -m dataset.build_rules_dataset --output-dir data/rules

A rule is one stage or two, each of a family of `dataset.generate.rule_families`. Rules count as equal if they
act alike on a fixed set of grids, whatever their names. These things are guaranteed, for the rules of the
families that take part:

  - The demonstrations of every task determine its answer: all rules that fit them give the same answer.
  - No rule of one stage fits a task of two stages. No other family alone fits a task of one stage.
  - No held-out family or composition explains a training task with as many stages as the task has.
  - No trained family or composition explains a task of the last two splits.
  - All grids are new, and no pair occurs in both training and evaluation.

The splits:

  train               rules of the training families
  test_instances      rules that occur in training
  test_rules          new parameters of families that occur in training. A tenth of the rules is held out,
                      except of families and compositions that have fewer than 48 rules in all. On the grids
                      that a task shows, another rule of the same families can act alike. It may be trained.
  test_compositions   two families that occur in training but never composed, in either order. Composed the
                      other way round, many give the same rules.
  test_families       families that never occur in training, each alone

A model that starts from the weights of another one has seen the other's dataset, too. `--exclude` leaves
out the test tasks which that dataset gives away. Such a task shares a pair with its training tasks. Or it
asks a rule of theirs as a new one, or a composition or family of theirs as an unseen one.

`rules.json` in the dataset's folder says of every task its families, its rule, as values and in words, and
its split.
"""

import argparse
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataset import writer
from dataset.augment import fingerprints
from dataset.generate.rule_families import FAMILIES
from dataset.generate.rule_tasks import Generator, Made, Make, Plan, workers
from dataset.generate.rules import Library, Rule, Stages, describe, stages_of
from dataset.leaks import find_leaks
from dataset.store import Metadata, Store
from dataset.task import MAX_SIDE, Task
from utils.arguments import parser_of
from utils.errors import UserError, reports_user_errors
from utils.files import read_json

TEST_SPLITS = ("test_instances", "test_rules", "test_compositions", "test_families")
HELD_OUT_FAMILIES = ("gravity", "count")
HELD_OUT_COMPOSITIONS = ("geometry+recolour", "shift+colour_permutation", "move+fill", "conditional+pattern")
Identified = dict[str, tuple[str, Made]]  # split and task by task id


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("dataset.build_rules_dataset", __doc__)
    parser.add_argument("--output-dir", type=Path, required=True)
    _add_rules(parser)
    _add_tasks(parser)
    return parser.parse_args(arguments)


def _add_rules(parser: argparse.ArgumentParser) -> None:
    """The options that say which rules there are."""
    names = list(FAMILIES)
    parser.add_argument(
        "--families", nargs="+", choices=names, metavar="FAMILY", help=f"default: all, {', '.join(names)}"
    )
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
    parser.add_argument(
        "--stages",
        type=int,
        choices=[1, 2],
        default=2,
        help="1: no compositions, not even to compete with (default 2)",
    )
    parser.add_argument(
        "--rules",
        type=int,
        help="so many different training rules, each with as many tasks; default: one per task",
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        default=[],
        metavar="FAMILY=N",
        help="N times as many training tasks of that family alone as of others, "
        "which models learn sooner (default 1)",
    )


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    """The options that say which tasks are made, and how."""
    parser.add_argument(
        "--test-splits",
        nargs="+",
        choices=TEST_SPLITS,
        metavar="SPLIT",
        help="default: all for which the families have rules",
    )
    parser.add_argument("--train-tasks", type=int, default=40000)
    parser.add_argument("--test-tasks", type=int, default=500, help="of each test split")
    side: dict[str, Any] = {"type": int, "nargs": 2, "default": [5, 6], "metavar": ("MIN", "MAX")}
    parser.add_argument("--rows", **side)
    parser.add_argument("--columns", **side, help="--rows 1 1 gives 1-D tasks")
    parser.add_argument("--demonstrations", type=int, default=3)
    parser.add_argument(
        "--exclude",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="generated datasets; test tasks are new to them",
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="processes; the dataset is the same for any number"
    )
    parser.add_argument("--seed", type=int, default=42)


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
    if options.weights and options.rules:
        raise UserError(
            "--weights says how often a family's rules are drawn; "
            "with --rules the drawn ones take turns alike: leave one out"
        )
    return Plan(
        families=families,
        held_out_families=tuple(dict.fromkeys(held_out)),
        held_out_compositions=tuple(_read_composition(text, training) for text in compositions),
        stages=options.stages,
        rows=tuple(options.rows),
        columns=tuple(options.columns),
        demonstrations=options.demonstrations,
        seed=options.seed,
        weights=tuple(_read_weight(text, training) for text in options.weights),
    )


def _read_weight(text: str, training: list[str]) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if name not in training or not number.isdecimal() or int(number) < 1:
        raise UserError(
            f"--weights: '{text}' is not FAMILY=N with a training family ({', '.join(training)}) "
            "and a whole number from 1"
        )
    return name, int(number)


def _read_composition(text: str, training: list[str]) -> Stages:
    pair = tuple(sorted(text.split("+")))
    if len(set(pair)) != 2 or len(pair) != 2 or not set(pair) <= set(training):
        raise UserError(
            f"--held-out-compositions: '{text}' is not FAMILY+FAMILY of two training families "
            f"({', '.join(training)})"
        )
    return pair


def build(options: argparse.Namespace) -> tuple[Metadata, dict[str, float]]:
    """Generate and write; also returns how many draws a task of each family or composition took on average.

    Raises `UserError`. Nothing is written unless all of it is.
    """
    writer.check_output(options.output_dir)
    plan = read_plan(options)
    generator = Generator(plan)
    having_rules = [split for split in TEST_SPLITS if generator.has(split)]
    test_splits = list(dict.fromkeys(options.test_splits or having_rules))
    for split in test_splits:
        if not generator.has(split):
            raise UserError(f"--test-splits {split}: the chosen families have no rules for it")
    identified = make_tasks(generator, test_splits, options)
    tasks, left_out = keep_new(identified, test_splits, generator.library, options.exclude)
    metadata = writer.write_dataset(
        options.output_dir,
        tasks,
        test_splits,
        layout="fewshot",
        source=f"generated: {plan}",
        seed=plan.seed,
        max_grid_size=max(plan.rows[1], plan.columns[1]),
        left_out=left_out,
        # With --rules training has the drawn rules alone, and further tasks would have others.
        details={} if options.rules else {"made_by": {"train": {"generator": "rules", "plan": asdict(plan)}}},
        extra_files={"rules.json": rules_of(tasks, identified)},
    )
    return metadata, mean_draws(identified)


def make_tasks(generator: Generator, test_splits: list[str], options: argparse.Namespace) -> Identified:
    """All tasks, the training tasks first. Raises `UserError` if one cannot be made."""
    seed, numbers = generator.plan.seed, range(options.train_tasks)
    with workers(generator, options.workers) as make:
        rules = training_rules(make, generator, options.rules) if options.rules else [None]
        made = {"train": make([("train", i, rules[i % len(rules)]) for i in numbers])}
        # A family with a weight trains more often but is not asked more often.
        unweighted = [i for i in numbers if not generator.weighted(i)]
        for split in test_splits:
            rng = np.random.default_rng([seed, *split.encode()])
            chosen = rng.choice(unweighted, size=options.test_tasks)
            given = [made["train"][i].rule if split == "test_instances" else None for i in chosen]
            made[split] = make([(split, i, rule) for i, rule in enumerate(given)])
    numbered = enumerate((split, task) for split in made for task in made[split])
    return {f"{i:06d}_{'+'.join(stages_of(task.rule))}": (split, task) for i, (split, task) in numbered}


def training_rules(make: Make, generator: Generator, count: int) -> list[Rule]:
    """`count` rules of the training families that act differently. Raises `UserError` if they are too few."""
    rules: dict[bytes, Rule] = {}
    # Random rules repeat themselves: so many times as many draws as are wanted, before this gives up.
    for start in range(0, 8 * count, count):
        for made in make([("train", number, None) for number in range(start, start + count)]):
            rules.setdefault(generator.library.key(made.rule), made.rule)
        if len(rules) >= count:
            return list(rules.values())[:count]
    raise UserError(
        f"--rules {count}: found only {len(rules)} different rules of the training families; ask for fewer"
    )


def keep_new(
    identified: Identified, test_splits: list[str], library: Library, exclude: list[Path]
) -> tuple[dict[str, list[Task]], dict[str, list[str]]]:
    """The tasks by split, without those that would leak, and the ids of the others by reason.

    Raises `UserError` if nothing is left of a split.
    """
    tasks: dict[str, list[Task]] = {split: [] for split in ("train", *test_splits)}
    for task_id, (split, task) in identified.items():
        tasks[split].append(Task(task_id, task.demonstrations, (task.query,)))
    leaks = find_leaks(tasks["train"], [task for split in test_splits for task in tasks[split]], "fewshot")
    leaking = {leak.train_task for leak in leaks}
    tasks["train"] = [task for task in tasks["train"] if task.id not in leaking]
    if not tasks["train"]:
        raise UserError(
            "every training task shares a pair with an evaluation task; "
            "use larger grids or fewer evaluation tasks"
        )
    # With its training tasks gone, a rule of test_instances may no longer be a trained one.
    trained = {identified[task.id][1].rule for task in tasks["train"]}
    instances = tasks.get("test_instances", [])
    untrained = {task.id for task in instances if identified[task.id][1].rule not in trained}
    excluded = set[str]().union(*(known_elsewhere(folder, identified, library) for folder in exclude))
    for split in test_splits:
        tasks[split] = [task for task in tasks[split] if task.id not in excluded | untrained]
        if not tasks[split]:
            raise UserError(
                f"nothing is left of {split}: {len(excluded)} tasks are known elsewhere, "
                f"of {len(untrained)} no rule is trained"
            )
    left_out = {"leak": leaking, "known_elsewhere": excluded, "untrained_rule": untrained}
    return tasks, {reason: sorted(ids) for reason, ids in left_out.items() if ids}


def known_elsewhere(folder: Path, identified: Identified, library: Library) -> set[str]:
    """The ids of the test tasks of which training on the dataset in `folder` tells something.

    Raises `UserError` for a dataset without rules.
    """
    other = Store.load(folder, "fewshot")
    if not (folder / "rules.json").is_file():
        raise UserError(
            f"--exclude {folder}: it has no rules.json; only datasets of generated rules can be excluded"
        )
    about = [about for about in read_json(folder / "rules.json").values() if about["split"] == "train"]
    if not all("rule" in one for one in about):
        raise UserError(
            f"--exclude {folder}: its rules.json does not hold the rules themselves; build it anew"
        )
    rules = {tuple((name, tuple(values)) for name, values in one["rule"]) for one in about}
    families = {family for rule in rules for family in stages_of(rule)}
    compositions = {frozenset(stages_of(rule)) for rule in rules if len(rule) > 1}
    keys = {library.key(rule) for rule in rules}
    tasks = other.tasks_of("train")
    pairs = np.concatenate(
        [other.pair_fingerprint[other.task_pairs[task] : other.task_pairs[task + 1]] for task in tasks]
    )

    def known(split: str, task: Made) -> bool:
        if split == "train":
            return False
        # What a split claims to be new must be new to the other dataset, too. Rules of test_instances need
        # not be.
        shared = np.isin(fingerprints([*task.demonstrations, task.query]), pairs).any()
        trained_rule = split != "test_instances" and library.key(task.rule) in keys
        composed = split == "test_compositions" and frozenset(stages_of(task.rule)) in compositions
        trained_family = split == "test_families" and not families.isdisjoint(stages_of(task.rule))
        return bool(shared or trained_rule or composed or trained_family)

    return {task_id for task_id, (split, task) in identified.items() if known(split, task)}


def rules_of(tasks: dict[str, list[Task]], identified: Identified) -> dict[str, dict]:
    """What rules.json says of the tasks that are kept, by id."""
    kept = {task.id for subset in tasks.values() for task in subset}
    return {
        task_id: {
            "families": list(stages_of(task.rule)),
            "rule": [[name, list(values)] for name, values in task.rule],
            "description": describe(task.rule),
            "split": split,
        }
        for task_id, (split, task) in identified.items()
        if task_id in kept
    }


def mean_draws(identified: Identified) -> dict[str, float]:
    """How many draws a task of each family or composition took on average."""
    draws: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for _, task in identified.values():
        draws["+".join(stages_of(task.rule))] += task.draws
        counts["+".join(stages_of(task.rule))] += 1
    return {name: draws[name] / counts[name] for name in sorted(counts)}


@reports_user_errors
def main() -> None:
    options = parse_arguments()
    metadata, draws = build(options)
    counts = ", ".join(f"{count} {name}" for name, count in metadata.subsets.items())
    print(f"{options.output_dir}: {counts} tasks, no pair in both")
    print("redraws per task: " + ", ".join(f"{name} {mean - 1:.1f}" for name, mean in draws.items()))
    if leaking := metadata.left_out.get("leak"):
        print(f"left out {len(leaking)} training tasks that share a pair with an evaluation task")
    if known := metadata.left_out.get("known_elsewhere"):
        print(f"left out {len(known)} evaluation tasks that the excluded datasets give away")
    if untrained := metadata.left_out.get("untrained_rule"):
        print(f"left out {len(untrained)} tasks of test_instances whose rule no training task has")


if __name__ == "__main__":
    main()
