"""Say what became of the demo, once it has trained and been asked.

    python -m experiments.demo runs/demo

A run whose time ended before its steps has not learned the rules yet. Then it says so, and how to go on.
"""

import sys
from pathlib import Path
from typing import Any

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils import checkpoint
from utils.arguments import parser_of
from utils.errors import UserError, reports_user_errors
from utils.files import read_json

METRIC = "ARC/pass@2"
# Subset -> what a reader calls its tasks. The first decides whether the demo has kept its promise.
SUBSETS = {"rules-test_rules": "new colour rules", "evaluation": "held-out ARC tasks"}
ENOUGH = 0.9  # share of the new rules from which they count as learned
EVALUATION = Path("evaluations/held-out")


def verdict(folder: Path) -> tuple[list[str], bool]:
    """What the newest checkpoint of the run in `folder` solves, what to do next, and whether all is well.

    Raises `UserError` without a checkpoint, or without an evaluation of it.
    """
    info = checkpoint.load_info(checkpoint.resolve(folder))
    results = read_json(folder / EVALUATION / "results.json")
    step, goal, asked = info["step"], info["config"]["train_steps"], results["checkpoint"]["step"]
    if asked != step:
        raise UserError(f"{folder / EVALUATION} is of step {asked}, and the newest checkpoint of step {step}")
    lines, shares = [], []
    for subset, name in SUBSETS.items():
        share, count = _score(results, subset)
        lines.append(f"{name}: {share * count:g} of {count} solved with two answers")
        shares.append(share)
    if shares[0] >= ENOUGH:
        return [*lines, f"The rules are learned, after {step} of {goal} steps."], True
    if step < goal:
        why = f"The time was over after {step} of {goal} steps, before the rules were learned."
        return [*lines, why, "The same command (make demo) continues there, and asks again."], True
    return [*lines, f"The rules are not learned, although all {goal} steps are made."], False


def _score(results: dict[str, Any], subset: str) -> tuple[float, int]:
    """The model's share of solved tasks of a subset, and their number."""
    (found,) = (
        score
        for score in results["by_subset"][subset]
        if score["metric"] == METRIC and score["control"] == "none"
    )
    return found["value"], found["n"]


@reports_user_errors
def main() -> None:
    parser = parser_of("experiments.demo", __doc__)
    parser.add_argument("folder", type=Path, help="of the run")
    lines, well = verdict(parser.parse_args().folder)
    print("\n".join(lines))
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
