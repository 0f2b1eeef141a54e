"""Generate tasks of re-arc's generators: python -m dataset.build_rearc_dataset --output-dir data/rearc-tasks

re-arc has a generator for each of the 400 training tasks of ARC-AGI-1. With `--one-dimensional` the
generators of one-dimensional tasks take their place. A task is some pairs of one generator, of which the last
one is the query. So a generator is a rule. The package is an extra: `pip install --no-deps
reasoning-gym==0.1.25`.

The splits:

  train             the tasks of the training generators
  test_instances    new tasks of the training generators
  test_generators   tasks of generators that are not trained on (`--held-out-generators`)

These things are guaranteed:

  - No pair occurs in both training and evaluation, and none in an evaluation task of ARC-AGI-1.
  - The inputs of a task's pairs differ, and no output equals its input.
  - No grid is longer than `--max-side`. A generator that cannot make such tasks is left out and named.

`generators.json` in the dataset's folder says of every generator its split, its tasks, how many pairs it
drew, and how many were rejected for which reason.
"""

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataset import writer
from dataset.folders import listed
from dataset.generate.rearc import (
    SHORTEST_ROW,
    RearcPlan,
    Result,
    arc1_evaluation,
    functions,
    installed_version,
    make_all,
)
from dataset.leaks import find_leaks
from dataset.store import Metadata
from dataset.task import MAX_SIDE, Task
from utils.arguments import parser_of, positive
from utils.errors import UserError, nearest, reports_user_errors

TEST_SPLITS = ("test_instances", "test_generators")
HELD_OUT_SHARE = 0.1
FULL_DIFFICULTY = (0.0, 1.0)

Subsets = dict[str, list[Task]]
About = dict[str, dict[str, Any]]  # what is said of each generator


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("dataset.build_rearc_dataset", __doc__)
    add = parser.add_argument
    add("--output-dir", type=Path, required=True)
    add("--generators", nargs="+", metavar="NAME", help="default: all; re-arc's have the ids of their tasks")
    add(
        "--held-out-generators",
        nargs="+",
        default=[str(HELD_OUT_SHARE)],
        metavar="NAME",
        help=f"their names, or a share of all below 1 (default {HELD_OUT_SHARE}; 0: none)",
    )
    add("--one-dimensional", action="store_true", help="the generators of one-dimensional tasks instead")
    add(
        "--difficulty",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="within 0..1, how large and how full the grids are (default 0 1); not for --one-dimensional",
    )
    add("--max-side", type=positive, default=MAX_SIDE, help=f"longest side of a grid (default {MAX_SIDE})")
    add("--pairs", type=positive, default=4, help="of each task, the last one is the query (default 4)")
    add("--tasks-per-generator", type=positive, default=100, help="training tasks (default 100)")
    add("--test-tasks-per-generator", type=positive, default=2, help="of each test split (default 2)")
    add("--workers", type=positive, default=1, help="processes; the dataset is the same for any number")
    add("--seed", type=int, default=42)
    return parser.parse_args(arguments)


def read_plan(options: argparse.Namespace) -> RearcPlan:
    """The checked plan of a command line. Raises `UserError`."""
    low, high = options.difficulty or FULL_DIFFICULTY
    if not 0 <= low <= high <= 1:
        raise UserError(f"--difficulty needs 0 <= LOW <= HIGH <= 1, found {low:g} {high:g}")
    if options.one_dimensional and options.difficulty:
        raise UserError("--difficulty is re-arc's; --one-dimensional has --max-side alone")
    shortest = SHORTEST_ROW if options.one_dimensional else 1
    if not shortest <= options.max_side <= MAX_SIDE:
        raise UserError(f"--max-side must be {shortest}..{MAX_SIDE} here, found {options.max_side}")
    if options.pairs < 2:
        raise UserError("--pairs must be at least 2: a demonstration and a query")
    if options.seed < 0:
        raise UserError(f"--seed must be >= 0, found {options.seed}")
    version, known = installed_version(), list(functions(options.one_dimensional))
    chosen = list(dict.fromkeys(options.generators or known))
    _require_known("--generators", chosen, known)
    held_out = _read_held_out(options.held_out_generators, chosen, options.seed)
    training = [name for name in chosen if name not in held_out]
    if not training:
        raise UserError("--held-out-generators leaves no generator for training")
    return RearcPlan(
        generators=tuple(training),
        held_out=tuple(held_out),
        one_dimensional=options.one_dimensional,
        difficulty=(low, high),
        max_side=options.max_side,
        pairs=options.pairs,
        seed=options.seed,
        version=version,
    )


def _require_known(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{option}: no generator '{name}' among {len(known)}{nearest(name, known)}")


def _read_held_out(given: list[str], chosen: list[str], seed: int) -> list[str]:
    """The generators that are not trained on, in the order of `chosen`."""
    try:
        share = float(given[0]) if len(given) == 1 and given[0] not in chosen else None
    except ValueError:
        share = None
    if share is None:
        _require_known("--held-out-generators", given, chosen)
        return [name for name in chosen if name in given]
    if not 0 <= share < 1:
        raise UserError(f"--held-out-generators: a share is at least 0 and below 1, found {given[0]}")
    # By a hash of the name: with some generators more or less nearly the same ones are held out.
    ranked = sorted(chosen, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    taken = set(ranked[: round(share * len(chosen))])
    return [name for name in chosen if name in taken]


def build(options: argparse.Namespace) -> tuple[Metadata, About]:
    """Generate and write; also returns what `generators.json` says.

    Raises `UserError`. Nothing is written unless all of it is.
    """
    writer.check_output(options.output_dir)
    plan = read_plan(options)
    made, about = make_tasks(plan, options)
    tasks, left_out = keep_new(made)
    for split in made:
        if not tasks[split]:
            raise UserError(
                f"nothing is left of {split}: {_why_nothing(about, left_out)}; "
                "a larger --max-side or a lower --difficulty lets more tasks in"
            )
    used = [name for name in plan.generators if about[name]["tasks"]]
    # What makes further tasks asks no generator that has made none.
    plan = replace(plan, generators=tuple(used))
    metadata = writer.write_dataset(
        options.output_dir,
        tasks,
        [split for split in tasks if split in TEST_SPLITS],
        layout="fewshot",
        source=f"generated: {_library(plan)} of reasoning-gym {plan.version}",
        seed=plan.seed,
        max_grid_size=plan.max_side,
        left_out=left_out,
        details={"made_by": {"train": {"generator": "rearc", "plan": asdict(plan)}}},
        extra_files={"generators.json": about},
    )
    return metadata, about


def _library(plan: RearcPlan) -> str:
    return "one-dimensional tasks" if plan.one_dimensional else "re-arc"


def _why_nothing(about: About, left_out: dict[str, list[str]]) -> str:
    rejected: Counter[str] = Counter()
    for one in about.values():
        rejected.update(one["rejected"])
    reasons = {**rejected, **{reason: len(ids) for reason, ids in left_out.items()}}
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "no generator was asked"


def make_tasks(plan: RearcPlan, options: argparse.Namespace) -> tuple[Subsets, About]:
    """The tasks by split, and what became of every generator."""
    tests = options.test_tasks_per_generator
    jobs = [(name, "train", options.tasks_per_generator) for name in plan.generators]
    jobs += [(name, "test_instances", tests) for name in plan.generators]
    jobs += [(name, "test_generators", tests) for name in plan.held_out]
    results: list[Result] = make_all(plan, jobs, options.workers)
    tasks: Subsets = {split: [] for _, split, _ in jobs}
    about: About = {}
    for (name, split, count), (made, counts) in zip(jobs, results, strict=True):
        tasks[split] += made
        one = about.setdefault(
            name, {"split": split, "asked": 0, "tasks": 0, "drawn": 0, "rejected": Counter()}
        )
        one["asked"] += count
        one["tasks"] += len(made)
        one["drawn"] += counts.pop("drawn")
        one["rejected"] = dict(sorted((Counter(one["rejected"]) + counts).items()))
    return tasks, about


def keep_new(tasks: Subsets) -> tuple[Subsets, dict[str, list[str]]]:
    """The tasks without those that would leak, and the ids of the others by reason."""
    known, known_input = arc1_evaluation().sharing([task for subset in tasks.values() for task in subset])
    tested = [task for split in TEST_SPLITS for task in tasks.get(split, [])]
    leaks = find_leaks(tasks["train"], tested, "fewshot")
    leaking = {leak.train_task for leak in leaks} - known - known_input
    left_out = {"arc1_evaluation_pair": known, "arc1_evaluation_input": known_input, "leak": leaking}
    gone = known | known_input | leaking
    kept = {split: [task for task in subset if task.id not in gone] for split, subset in tasks.items()}
    return kept, {reason: sorted(ids) for reason, ids in left_out.items() if ids}


def report(options: argparse.Namespace, metadata: Metadata, about: About) -> list[str]:
    """What is printed of a build."""
    counts = ", ".join(f"{count} {name}" for name, count in metadata.subsets.items())
    lines = [f"{options.output_dir}: {counts} tasks of {metadata.source.removeprefix('generated: ')}"]
    none = [name for name, one in about.items() if not one["tasks"]]
    few = sum(0 < one["tasks"] < one["asked"] for one in about.values())
    lines.append(
        f"{len(about) - len(none)} generators; {few} of them made fewer tasks than they were asked for"
    )
    if none:
        side = f"{options.max_side}x{options.max_side}"
        lines.append(f"left out {len(none)} generators that made no task within {side}: {listed(none)}")
    rejected: Counter[str] = Counter()
    for one in about.values():
        rejected.update(one["rejected"])
    drawn = sum(one["drawn"] for one in about.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.most_common())
    lines.append(f"rejected of {drawn} pairs: {reasons or 'none'} (generators.json has them by generator)")
    for reason, why in (
        ("arc1_evaluation_pair", "tasks that share a pair with an ARC-AGI-1 evaluation task"),
        ("arc1_evaluation_input", "tasks that share an input grid with one"),
        ("leak", "training tasks that share a pair with a test task"),
    ):
        if ids := metadata.left_out.get(reason):
            lines.append(f"left out {len(ids)} {why}: {listed(ids)}")
    return lines


@reports_user_errors
def main() -> None:
    options = parse_arguments()
    print("\n".join(report(options, *build(options))))


if __name__ == "__main__":
    main()
