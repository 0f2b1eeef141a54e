"""Evaluations side by side, with paired tests: python -m tools.compare A B [C ...] [--k 1 2] [--json FILE]

A, B, ... are folders of evaluate.py. For every k: each one's ARC/pass@k and tasks_solved@k with 95 % Wilson intervals, and
for every two of them the difference of ARC/pass@k (second minus first) with a 95 % paired bootstrap interval and a paired
permutation test, and an exact McNemar test of the tasks solved. The tasks are the units. p-values are not corrected for the
number of comparisons, which is printed. Evaluations of different tasks, or under different protocols, are refused;
--allow-different compares them on the tasks that they share.
"""

import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import statistics
from evaluation.metrics import solved_within, task_means, wilson
from evaluation.protocols import described
from utils.arguments import natural, parser_of, positive
from utils.errors import UserError, reports_user_errors
from utils.files import read_json, write_json

Query = tuple[int, str, str]  # number, hashes of input and answer


@dataclass
class Evaluated:
    """One evaluation: what results.json says, and of every labelled query of each task its rank of the truth."""

    folder: Path
    about: dict[str, Any]
    ranks: dict[str, dict[Query, int | None]]

    @property
    def protocol(self) -> str:
        """What was done with the demonstrations, and whether training had seen tasks."""
        return described(self.about["protocol"], (self.about.get("adaptation") or {}).get("name"))

    def task_shares(self, tasks: list[str], k: int) -> np.ndarray:
        """(T,) the share of each task's queries solved within k answers."""
        asked = [(task, rank) for task in tasks for rank in self.ranks[task].values()]
        return task_means([task for task, _ in asked], solved_within([rank for _, rank in asked], k))


def read(folder: Path) -> Evaluated:
    """An evaluation's folder. Raises `UserError` if it is none."""
    about = read_json(folder / "results.json")
    try:
        lines = (folder / "per_example.jsonl").read_text(encoding="utf-8").splitlines()
        evaluated = Evaluated(folder, about, ranks_of([json.loads(line) for line in lines]))
        _ = evaluated.protocol, about["scores"], about["checkpoint"]
        return evaluated
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is no evaluation of this version: {error}") from None


def ranks_of(records: list[dict[str, Any]]) -> dict[str, dict[Query, int | None]]:
    """Task -> query -> rank of the truth, from the records of an evaluation; unlabelled queries have none."""
    ranks: dict[str, dict[Query, int | None]] = {}
    for record in records:
        if record["label_hash"] is not None:
            key = (record["query"], record["input_hash"], record["label_hash"])
            ranks.setdefault(record["task"], {})[key] = record["rank_of_truth"]
    return ranks


def common_tasks(evaluations: list[Evaluated], allow_different: bool) -> tuple[list[str], list[str]]:
    """The tasks that all have with the same queries, and notes. Raises `UserError` for what must not be compared."""
    first, notes = evaluations[0], []
    shared = [
        task
        for task, asked in first.ranks.items()
        if all(asked.keys() == e.ranks.get(task, {}).keys() for e in evaluations)
    ]
    for other in evaluations:
        if other.protocol != first.protocol:
            notes.append(f"{other.folder} is {other.protocol}, {first.folder} is {first.protocol}")
        if len(other.ranks) != len(shared):
            notes.append(
                f"{other.folder} has {len(other.ranks)} tasks, {len(shared)} of them in common with all others"
            )
    if notes and not allow_different:
        raise UserError("; ".join(notes) + "; --allow-different compares the common tasks nevertheless")
    if not shared:
        raise UserError("the evaluations have no task in common")
    return shared, notes


def paired(first: np.ndarray, second: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """The comparison of two evaluations by their task shares (T,): second minus first, and who solved what."""
    low, high = statistics.bootstrap(second - first, seed)
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
    """Everything that is printed and written."""
    for evaluated in evaluations:
        if evaluated.about.get("vote_stop"):
            asked = [
                int(s["metric"].split("@")[1])
                for s in evaluated.about["scores"]
                if s["metric"].startswith("ARC/pass@")
            ]
            known = max(asked, default=max(ks))  # a game's puzzle is asked once, without votes to stop
            if max(ks) > known:
                raise UserError(
                    f"{evaluated.folder} stopped its votes when the first {known} answers were certain; give --k up to {known}"
                )
    tasks, notes = common_tasks(evaluations, allow_different)
    shares = {k: [evaluated.task_shares(tasks, k) for evaluated in evaluations] for k in ks}

    def scored(values: np.ndarray) -> dict[str, float]:
        low, high = wilson(float(values.mean()), len(tasks))
        return {"value": float(values.mean()), "ci_low": low, "ci_high": high}

    described = []
    for i, evaluated in enumerate(evaluations):
        about = evaluated.about
        scores = {f"ARC/pass@{k}": scored(shares[k][i]) for k in ks} | {
            f"tasks_solved@{k}": scored(shares[k][i] == 1) for k in ks
        }
        settings = {name: about.get(name) for name in ("adaptation", "split", "num_views", "ranking", "seed")}
        who = {
            "folder": str(evaluated.folder),
            "checkpoint": about["checkpoint"],
            "protocol": evaluated.protocol,
        }
        described.append({**who, **settings, "scores": scores})
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
    return {"tasks": len(tasks), "notes": notes, "evaluations": described, "pairs": pairs}


def table(result: dict[str, Any]) -> str:
    """`compare`'s result as text."""
    evaluations, pairs = result["evaluations"], result["pairs"]
    metrics = list(evaluations[0]["scores"])
    names = {e["folder"]: str(i) for i, e in enumerate(evaluations, 1)}
    lines = [
        f"{result['tasks']} tasks, 95 % intervals",
        "",
        f"{'':<4}" + "".join(f"{metric:<26}" for metric in metrics) + "evaluation",
    ]
    for e in evaluations:
        cells = (
            f"{100 * s['value']:5.1f} % [{100 * s['ci_low']:.1f}, {100 * s['ci_high']:.1f}]"
            for s in e["scores"].values()
        )
        settings = (
            f"{e['protocol']}, {e['num_views']} view{'s' * (e['num_views'] > 1)}, ranking {e['ranking']}"
        )
        lines.append(
            f"{names[e['folder']]:<4}"
            + "".join(f"{cell:<26}" for cell in cells)
            + f"{e['folder']} ({settings})"
        )
    lines += [
        "",
        f"{'':<10}{'pass@k difference':<30}{'permutation':<14}{'solved by one only':<22}McNemar    ({len(pairs)} comparisons)",
    ]
    for pair in pairs:
        low, high = pair["ci95"]
        difference = f"{100 * pair['difference']:+6.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]"
        alone = f"{pair['solved_by_first_only']} : {pair['solved_by_second_only']}"
        who = f"{names[pair['first']]}:{names[pair['second']]} @{pair['k']}"
        lines.append(
            f"{who:<10}{difference:<30}p {pair['p_permutation']:<12.4g}{alone:<22}p {pair['p_mcnemar']:.4g}"
        )
    return "\n".join([*lines, *(["", *result["notes"]] if result["notes"] else [])])


@reports_user_errors
def main() -> None:
    parser = parser_of("tools.compare", __doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="two evaluations or more")
    parser.add_argument("--k", type=positive, nargs="+", default=[1, 2], help="answers per query")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument(
        "--allow-different", action="store_true", help="compare common tasks, and across protocols"
    )
    parser.add_argument("--seed", type=natural, default=0, help="of the resampling")
    options = parser.parse_args()
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
