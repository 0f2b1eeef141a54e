"""Generate few-shot tasks whose rules are held out: python -m dataset.build_rules_dataset --output-dir data/rules

A family turns a random generator into tasks; the demonstrations of every task determine its rule on its query. The
evaluation tasks' rules never occur in training.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dataset import store
from dataset.leaks import find_leaks
from dataset.task import NUM_COLOURS, Pair, Task
from utils.errors import UserError, reports_user_errors

BACKGROUND_SHARE = 0.5
MAX_DRAWS_PER_TASK = 20


def colour_permutation(rng: np.random.Generator, sides: tuple[int, int], demonstrations: int) -> tuple[bytes, list[Pair]]:
    """Every colour 1..9 becomes another one by a random permutation; 0 stays. Returns the rule's key and the pairs, query last.

    Query colours are drawn from those that the demonstrations show, so that the answer is determined.
    """
    rule = np.concatenate([[0], rng.permutation(np.arange(1, NUM_COLOURS))]).astype(np.uint8)
    shape = rng.integers(sides[0], sides[1] + 1, 2)
    coloured = rng.random((demonstrations + 1, *shape)) >= BACKGROUND_SHARE
    inputs = (rng.integers(1, NUM_COLOURS, coloured.shape) * coloured).astype(np.uint8)
    shown = np.unique(inputs[:-1])  # a query of background alone, where nothing else is shown, is still determined
    inputs[-1] = np.where(coloured[-1], rng.choice(shown[shown > 0], shape) if shown.any() else 0, 0)
    return rule.tobytes(), [Pair(grid, rule[grid]) for grid in inputs]


FAMILIES: dict[str, Callable[[np.random.Generator, tuple[int, int], int], tuple[bytes, list[Pair]]]] = {
    "colour_permutation": colour_permutation,
}


def generate(family: str, split: str, count: int, taken: set[bytes], sides: tuple[int, int], demonstrations: int, seed: int) -> list[Task]:
    """`count` tasks with rules that are not in `taken`, which they are added to."""
    rng = np.random.default_rng([seed, *family.encode(), *split.encode()])
    tasks: list[Task] = []
    for _ in range(MAX_DRAWS_PER_TASK * count):
        if len(tasks) == count:
            break
        rule, pairs = FAMILIES[family](rng, sides, demonstrations)
        if rule not in taken:
            taken.add(rule)
            tasks.append(Task(f"{family}_{split}_{len(tasks):06d}", tuple(pairs[:-1]), tuple(pairs[-1:])))
    if len(tasks) < count:
        raise UserError(f"family {family} has no {count} rules beyond those taken: found {len(tasks)}; ask for fewer tasks")
    return tasks


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dataset.build_rules_dataset", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--family", choices=list(FAMILIES), default="colour_permutation")
    parser.add_argument("--train-tasks", type=int, default=40000)
    parser.add_argument("--test-tasks", type=int, default=500)
    parser.add_argument("--min-side", type=int, default=4)
    parser.add_argument("--max-side", type=int, default=6)
    parser.add_argument("--demonstrations", type=int, default=3)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    sides = (options.min_side, options.max_side)
    if not 1 <= sides[0] <= sides[1] <= 30 or min(options.train_tasks, options.test_tasks, options.demonstrations) < 1:
        raise UserError("need 1 <= --min-side <= --max-side <= 30 and positive counts")
    taken: set[bytes] = set()
    splits = (("test", options.test_tasks), ("train", options.train_tasks))
    tasks = {name: generate(options.family, name, count, taken, sides, options.demonstrations, options.seed) for name, count in splits}
    leaks = find_leaks(tasks["train"], tasks["test"], "fewshot")
    dropped = sorted({leak.train_task for leak in leaks})  # on tiny grids different rules can give the same pair
    tasks["train"] = [task for task in tasks["train"] if task.id not in set(dropped)]
    if not tasks["train"]:
        raise UserError("every training task shares a pair with an evaluation task; use larger grids or fewer evaluation tasks")
    metadata = store.write(
        options.output_dir,
        tasks,
        ["test"],
        layout="fewshot",
        source=f"generated: {options.family}",
        seed=options.seed,
        max_grid_size=sides[1],
        left_out={"leak": dropped},
    )
    counts = f"{metadata.subsets['train']} training and {metadata.subsets['test']} evaluation tasks"
    print(f"{options.output_dir}: {counts}, no rule and no pair in both")


if __name__ == "__main__":
    main()
