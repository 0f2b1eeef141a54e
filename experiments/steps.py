"""Accuracy against ACT steps, from one pass: python -m experiments.steps FOLDER

The predictions hold the answer after every ACT step (evaluate.py ... save_predictions=true record_steps=true, and
halt_max_steps=N for more steps than in training). After t steps a view votes with its answer at step t, or at the step at
which it halted. Writes steps.json and prints a line of JSON per step:
  checkpoint, data_paths, steps, pass_at_1_per_step; per_step: [{step, ARC/pass@1, ci95, ARC/pass@2, tasks_solved@2,
  ARC/single_view, changed, at_work, mean_q}]
ci95 is a bootstrap over tasks, changed the share of views whose answer differs from the one a step before (null at step 1),
at_work the share that had not halted before the step, mean_q the mean halting probability.
"""

import json
from typing import Any

import numpy as np

from evaluation import predictions, statistics
from evaluation.metrics import solved_within
from evaluation.predictions import StoredPredictions
from evaluation.voting import Ranking, sigmoid
from experiments.commands import for_predictions, origin
from utils.errors import UserError, reports_user_errors
from utils.files import write_json


def per_step(stored: StoredPredictions, ranking: Ranking, seed: int) -> list[dict[str, Any]]:
    """What was right after each step."""
    lines: list[dict[str, Any]] = []
    before = None
    for step in range(1, int(stored.predictions.columns["step"].max()) + 1):
        ranks = stored.ranks(stored.predictions.vote(ranking, step))
        first, within_two = (stored.task_means(solved_within(ranks, k)) for k in (1, 2))
        alone = stored.ranks(stored.predictions.vote(ranking, step, views={0}))
        low, high = statistics.bootstrap(first, seed)
        rows = stored.predictions.rows(step)
        lines.append(
            {
                "step": step,
                "ARC/pass@1": float(first.mean()),
                "ci95": [float(low), float(high)],
                "ARC/pass@2": float(within_two.mean()),
                "tasks_solved@2": float((within_two == 1).mean()),
                "ARC/single_view": float(stored.task_means(solved_within(alone, 1)).mean()),
                "changed": None if before is None else float((rows["answer"] != before).mean()),
                "at_work": float((rows["step"] == step).mean()),
                "mean_q": float(np.mean([sigmoid(logit) for logit in rows["q_halt_logit"].tolist()])),
            }
        )
        before = rows["answer"]
    return lines


@reports_user_errors
def main() -> None:
    options = for_predictions("experiments.steps", __doc__).parse_args()
    stored = predictions.load(options.folder)
    if not stored.about["record_steps"]:
        raise UserError(
            f"{options.folder} holds the last answers only; run evaluate.py with save_predictions=true record_steps=true"
        )
    lines = per_step(stored, options.ranking, options.seed)
    for line in lines:
        print(json.dumps(line))
    path = (options.output_dir or options.folder) / "steps.json"
    summary = {
        "steps": len(lines),
        "pass_at_1_per_step": [line["ARC/pass@1"] for line in lines],
        "per_step": lines,
    }
    write_json(path, {**origin(stored, options.ranking), **summary}, indent=1)
    print(f"{len(lines)} steps, {stored.about['protocol']}; {path}")


if __name__ == "__main__":
    main()
