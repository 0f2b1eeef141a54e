"""Measure accuracy against depth (ACT steps) and width (rollouts), with the time that they take.

    python -m experiments.depth_width checkpoint=runs/NAME sigma=0.3 --depths 16 32 64 --widths 1 8 32

Any key of evaluate.py applies, except a protocol that adapts the model. Each width is one pass of as many ACT
steps as the largest depth; shorter depths are read off it. Width 1 is the plain model, without noise and
random starts. Every way to choose among rollouts (`select` of evaluate.py) is scored on the same answers. The
command prints a table and writes depth_width.json into output_dir (default: a folder of `experiments` in the
run's folder):

    metric, sigma, random_init, num_tasks, num_queries, git_commit,
    rows: [{depth, width, model_seconds, accuracy: {SELECT or oracle: {value, ci95}}}],
    about: what an evaluation's results.json says of model, data and machine

- metric: ARC/pass@1, or all.exact_accuracy of a game.
- oracle: the share where any rollout is right, an upper bound of every choice.
- ci95: a bootstrap over tasks.
- model_seconds: until the end of that step, over all batches and processes. Decoding and voting are in none.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataset.views import EvaluationSet
from evaluation import statistics
from evaluation.adaptation import as_it_is
from evaluation.depth import ORACLE
from evaluation.inference import Inference
from evaluation.metrics import solved_within, task_means
from evaluation.predictions import Predictions
from evaluation.records import known_output
from evaluation.selection import Select, Selection
from evaluation.session import EvaluateConfig, Session
from evaluation.voting import key_of
from experiments.commands import folder_of, for_model, opened, percent
from utils import distributed
from utils.environment import git_commit
from utils.errors import UserError, reports_user_errors
from utils.files import write_json

ALWAYS: tuple[Select, ...] = ("votes", "halting", "residual")


def measure(session: Session, depths: list[int], widths: list[int]) -> dict[str, Any]:
    """The content of depth_width.json."""
    config, respondent = session.config, session.respondent
    model = respondent.model
    model.config = model.config.model_copy(update={"halt_max_steps": max(depths)})
    rows: list[dict[str, Any]] = []
    for width in widths:
        asked = config.model_copy(update=_attempts(config, width))
        questions = asked.ask.questions(respondent, config.num_views)
        adaptation = as_it_is(respondent, config.batch_size, config.seed)
        inference = Inference(respondent, questions, adaptation, asked)
        predictions = inference.collect(record_steps=True)
        seconds = inference.clock.until()
        # A threshold may have ended all batches earlier.
        reached = {depth: min(depth, len(seconds)) for depth in depths}
        rows += [
            {
                "depth": depth,
                "width": width,
                "model_seconds": round(seconds[reached[depth] - 1], 3),
                "accuracy": accuracies(questions, predictions, depth, config),
            }
            for depth in depths
        ]
    known = _known(questions)
    return {
        "metric": "all.exact_accuracy" if respondent.store.layout.shares_rule else "ARC/pass@1",
        "sigma": config.sigma,
        "random_init": config.random_init,
        "num_tasks": len({questions.queries[number].task for number in known}),
        "num_queries": len(known),
        "git_commit": git_commit(),
        "rows": sorted(rows, key=lambda row: (row["depth"], row["width"])),
        "about": session.about(),
    }


def _attempts(config: EvaluateConfig, width: int) -> dict[str, Any]:
    """The settings of so many rollouts; one alone is the plain model."""
    plain = {"rollouts": 1, "sigma": 0.0, "random_init": False, "select": "votes"}
    return plain if width == 1 else {"rollouts": width}


def accuracies(
    questions: EvaluationSet, predictions: Predictions, depth: int, config: EvaluateConfig
) -> dict[str, dict[str, Any]]:
    """How a rollout is chosen -> the mean over tasks after `depth` ACT steps, with its interval."""
    known = _known(questions)
    names: list[Select] = [*ALWAYS, *(["verifier"] if questions.store.checks else [])]
    ranks: dict[str, list[int | None]] = {}
    for name in names:
        votes = predictions.vote(config.ranking, depth, selection=Selection(name, questions))
        ranks[name] = [votes.rank_of(number, truth) for number, truth in known.items()]
    every = predictions.vote(config.ranking, depth)
    found = [every.rank_of(number, truth) is not None for number, truth in known.items()]
    right = np.stack([*(solved_within(of, 1) for of in ranks.values()), found], axis=1)
    means = task_means([questions.queries[number].task for number in known], right)
    low, high = statistics.bootstrap(means, config.seed)
    return {
        name: {"value": float(means[:, i].mean()), "ci95": [float(low[i]), float(high[i])]}
        for i, name in enumerate([*names, ORACLE])
    }


def _known(questions: EvaluationSet) -> dict[int, Any]:
    """The queries whose answer is known, and its key."""
    outputs = {number: known_output(questions, query) for number, query in enumerate(questions.queries)}
    return {number: key_of(output) for number, output in outputs.items() if output is not None}


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    names = list(result["rows"][0]["accuracy"])
    lines = [f"{'depth':>5}  {'width':>5}  {'model s':>9}  " + "".join(f"{name:<27}" for name in names)]
    for row in result["rows"]:
        cells = "".join(f"{percent(of['value'], *of['ci95']):<27}" for of in row["accuracy"].values())
        lines.append(f"{row['depth']:>5}  {row['width']:>5}  {row['model_seconds']:>9.1f}  {cells}")
    return "\n".join(line.rstrip() for line in lines)


@reports_user_errors
@distributed.reports_lost_peers()
def main() -> None:
    parser = for_model("experiments.depth_width", __doc__)
    add = parser.add_argument
    add("--depths", type=int, nargs="+", default=[16, 32, 64], help="ACT steps (default: %(default)s)")
    add("--widths", type=int, nargs="+", default=[1, 8], help="rollouts (default: %(default)s)")
    options = parser.parse_intermixed_args()
    depths, widths = sorted(set(options.depths)), sorted(set(options.widths))
    if min(*depths, *widths) < 1:
        raise UserError("--depths and --widths must be 1 or more")
    session = opened(options.overrides)
    if max(widths) > 1 and not session.config.draws:
        raise UserError("--widths above 1 need sigma=..., for example 0.3, or random_init=true")
    if not _known(session.questions()):
        raise UserError("nothing to measure: no answer to these tasks is known")
    result = measure(session, depths, widths)
    if session.respondent.world.is_main:
        path = folder_of(session) / "depth_width.json"
        write_json(path, result, indent=1)
        print(table(result))
        print(f"{result['metric']}, {result['num_tasks']} tasks, sigma {result['sigma']}; {path}")
    distributed.close()


if __name__ == "__main__":
    main()
