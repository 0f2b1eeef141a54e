"""The score of tasks of which some were adapted to.

    python -m experiments.partly_adapted outputs/rung_d/ask outputs/rung_d/adapt

Test-time training of all tasks may take longer than there is. Both folders are evaluate.py's, of the same
checkpoint. The second one asks some tasks of the first one, adapted. A task that it has not reached counts as
the first one answers it.
"""

import sys
from pathlib import Path

import numpy as np

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from evaluation.evaluated import Evaluated, read
from evaluation.metrics import wilson
from utils.arguments import parser_of
from utils.errors import UserError, reports_user_errors

KS = (1, 2)


def together(asked: Evaluated, adapted: Evaluated) -> dict[str, np.ndarray]:
    """The share of each task (T,) in the order of `asked`, by metric.

    Raises `UserError` unless `adapted` asks tasks of `asked`, and the same checkpoint.
    """
    if asked.about["checkpoint"] != adapted.about["checkpoint"]:
        raise UserError(f"{adapted.folder} and {asked.folder} ask different checkpoints")
    for task, queries in adapted.ranks.items():
        if queries.keys() != asked.ranks.get(task, {}).keys():
            raise UserError(f"{adapted.folder} asks {task}, and {asked.folder} does not ask the same of it")
    shares = {}
    for k in KS:
        of_task = dict(zip(asked.ranks, asked.task_shares(list(asked.ranks), k), strict=True))
        of_task |= dict(zip(adapted.ranks, adapted.task_shares(list(adapted.ranks), k), strict=True))
        shares[f"pass@{k}"] = np.array(list(of_task.values()))
        shares[f"tasks_solved@{k}"] = shares[f"pass@{k}"] == 1
    return shares


def told(asked: Evaluated, adapted: Evaluated) -> list[str]:
    """What was asked how, and a line for each score with its 95 % interval."""
    shares = together(asked, adapted)
    reached, all_tasks = len(adapted.ranks), len(asked.ranks)
    lines = [
        f"{all_tasks} tasks: {reached} asked by {adapted.protocol} in {adapted.about['num_views']} views, "
        f"{all_tasks - reached} not reached, which count as {asked.protocol} in "
        f"{asked.about['num_views']} views"
    ]
    for name, of_task in shares.items():
        low, high = wilson(float(of_task.mean()), len(of_task))
        lines.append(f"{name:<16}{of_task.mean():.3f} [{low:.3f}, {high:.3f}]")
    return lines


@reports_user_errors
def main() -> None:
    parser = parser_of("experiments.partly_adapted", __doc__)
    parser.add_argument("asked", type=Path, help="the evaluation of all tasks")
    parser.add_argument("adapted", type=Path, help="the evaluation of those that were adapted to")
    options = parser.parse_args()
    print(*told(read(options.asked), read(options.adapted)), sep="\n")


if __name__ == "__main__":
    main()
