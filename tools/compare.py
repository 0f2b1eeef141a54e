"""Set evaluations side by side, with paired tests.

    python -m tools.compare runs/a/evaluations/NAME runs/b/evaluations/NAME --k 1 2

The folders are those of evaluate.py. For every k it prints each evaluation's ARC/pass@k and tasks_solved@k
with 95 % Wilson intervals. For every two evaluations it prints:

- the difference of ARC/pass@k, second minus first, with a 95 % paired bootstrap interval and a paired
  permutation test;
- an exact McNemar test of the tasks solved.

The tasks are the units. p-values are not corrected for the number of comparisons, which is printed.
Evaluations of different tasks or under different protocols are refused; --allow-different compares them on
the tasks that they share.
"""

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from evaluation import statistics
from evaluation.evaluated import Evaluated, check_known, in_words, read
from evaluation.metrics import in_percent, wilson
from utils.arguments import natural, parser_of, positive
from utils.errors import UserError, reports_user_errors
from utils.files import write_json


def common_tasks(evaluations: list[Evaluated], allow_different: bool) -> tuple[list[str], list[str]]:
    """The tasks that all evaluations asked with the same queries, and notes on how the evaluations differ.

    Raises `UserError` for evaluations that differ, unless `allow_different`, or that share no task.
    """
    first, notes = evaluations[0], []
    shared = [
        task
        for task, queries in first.ranks.items()
        if all(queries.keys() == other.ranks.get(task, {}).keys() for other in evaluations)
    ]
    for other in evaluations:
        if other.protocol != first.protocol:
            notes.append(f"{other.folder} is {other.protocol}, {first.folder} is {first.protocol}")
        if len(other.ranks) != len(shared):
            own = len(other.ranks)
            notes.append(f"{other.folder} has {own} tasks, {len(shared)} of them in common with all others")
    if notes and not allow_different:
        raise UserError("; ".join(notes) + "; --allow-different compares the common tasks nevertheless")
    if not shared:
        raise UserError("the evaluations have no task in common")
    return shared, notes


def paired(first: np.ndarray, second: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Two evaluations compared by their task shares (T,): second minus first, and who solved what."""
    low, high = statistics.bootstrap(second - first, seed)
    # A task is solved if all of its queries are, so that the share is exactly 1.
    only_first, only_second, p = statistics.mcnemar(first == 1, second == 1)
    return {
        "difference": float((second - first).mean()),
        "ci95": [float(low), float(high)],
        "p_permutation": statistics.permutation_test(second - first, seed),
        "solved_by_first_only": only_first,
        "solved_by_second_only": only_second,
        "p_mcnemar": p,
    }


def compare(evaluations: list[Evaluated], ks: list[int], allow_different: bool, seed: int) -> dict[str, Any]:
    """The comparison as JSON values: number of tasks, notes, a part per evaluation, one per pair and k.

    Raises `UserError` for evaluations that cannot be compared.
    """
    check_known(evaluations, ks)
    tasks, notes = common_tasks(evaluations, allow_different)
    # Averaged per task, since the queries of a task are not independent.
    shares = {k: [evaluated.task_shares(tasks, k) for evaluated in evaluations] for k in ks}
    parts = [_part_of(evaluated, {k: shares[k][i] for k in ks}) for i, evaluated in enumerate(evaluations)]
    pairs = [
        {
            "k": k,
            "first": str(evaluations[i].folder),
            "second": str(evaluations[j].folder),
            **paired(shares[k][i], shares[k][j], seed),
        }
        for k in ks
        for i, j in combinations(range(len(evaluations)), 2)
    ]
    return {"tasks": len(tasks), "notes": notes, "evaluations": parts, "pairs": pairs}


def _part_of(evaluated: Evaluated, shares: dict[int, np.ndarray]) -> dict[str, Any]:
    """One evaluation's part of the comparison; `shares` are its task shares (T,) by k."""
    scores = {f"ARC/pass@{k}": _with_interval(values) for k, values in shares.items()}
    scores |= {f"tasks_solved@{k}": _with_interval(values == 1) for k, values in shares.items()}
    return {**evaluated.description, "scores": scores}


def _with_interval(values: np.ndarray) -> dict[str, float]:
    """The mean of values per task (T,), with its Wilson interval."""
    mean = float(values.mean())
    low, high = wilson(mean, len(values))
    return {"value": mean, "ci_low": low, "ci_high": high}


def table(result: dict[str, Any]) -> str:
    """`compare`'s result as text."""
    evaluations, pairs = result["evaluations"], result["pairs"]
    metrics = "".join(f"{metric:<26}" for metric in evaluations[0]["scores"])
    # The second table says 1:2 for the first evaluation and the second.
    numbers = {e["folder"]: str(i) for i, e in enumerate(evaluations, 1)}
    lines = [f"{result['tasks']} tasks, 95 % intervals", "", f"{'':<4}{metrics}evaluation"]
    for e in evaluations:
        scores = (in_percent(s["value"], s["ci_low"], s["ci_high"]) for s in e["scores"].values())
        cells = "".join(f"{score:<26}" for score in scores)
        lines.append(f"{numbers[e['folder']]:<4}{cells}{in_words(e)}")
    columns = f"{'pass@k difference':<30}{'permutation':<14}{'solved by one only':<22}"
    lines += ["", f"{'':<10}{columns}McNemar    ({len(pairs)} comparisons)"]
    for pair in pairs:
        low, high = pair["ci95"]
        difference = f"{100 * pair['difference']:+6.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]"
        alone = f"{pair['solved_by_first_only']} : {pair['solved_by_second_only']}"
        who = f"{numbers[pair['first']]}:{numbers[pair['second']]} @{pair['k']}"
        tests = f"p {pair['p_permutation']:<12.4g}{alone:<22}p {pair['p_mcnemar']:.4g}"
        lines.append(f"{who:<10}{difference:<30}{tests}")
    return "\n".join([*lines, *(["", *result["notes"]] if result["notes"] else [])])


@reports_user_errors
def main() -> None:
    parser = parser_of("tools.compare", __doc__)
    add = parser.add_argument
    add("folders", type=Path, nargs="+", help="two evaluations or more")
    add("--k", type=positive, nargs="+", default=[1, 2], help="answers per query")
    add("--json", type=Path, help="write everything to this file")
    add("--allow-different", action="store_true", help="compare common tasks, and across protocols")
    add("--seed", type=natural, default=0, help="of the resampling (default: %(default)s)")
    options = parser.parse_args()
    # An evaluation against itself would look like a perfect match.
    if len(set(options.folders)) < max(2, len(options.folders)):
        raise UserError("give two different evaluations or more")
    result = compare(
        [read(folder) for folder in options.folders], options.k, options.allow_different, options.seed
    )
    print(table(result))
    if options.json:
        write_json(options.json, result, indent=1)


if __name__ == "__main__":
    main()
