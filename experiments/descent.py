"""Which objectives of Jacobian descent change what is learned? A study against plain training.

    python -m experiments.descent run --tasks sudoku rules --seeds 0 1 2
    python -m experiments.descent table

`run` trains small models that differ in their objectives alone, and asks them held-out puzzles or tasks on
the way. It appends a line per training to experiments/descent.jsonl. What is there is not done again, and an
interrupted training continues. `table` prints the scores after equally many updates and after equal time, and
draws docs/jacobian-descent.png. The time of an update is the fastest interval that was logged in its setting:
other work on the machine shall not count.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from matplotlib.figure import Figure

from experiments.ladder import ROOT, run_python
from experiments.studies import complete, read
from utils.arguments import parser_of
from utils.environment import git_commit
from utils.errors import reports_user_errors
from utils.files import read_json, write_atomically
from utils.logging import read_metrics

RESULTS = Path(__file__).with_name("descent.jsonl")
PICTURE = ROOT / "docs" / "jacobian-descent.png"
SIMILARITY = "jacobian/gd_similarity"


@dataclass(frozen=True)
class Task:
    """What is learned.

    build: a builder and its options, without --output-dir. steps: updates with mode=act, half of which
    mode=supervised makes. act_steps: `arch.halt_max_steps` in these two modes. score: the metric of the
    evaluations on the way.
    """

    build: str
    overrides: tuple[str, ...]
    steps: int
    act_steps: tuple[int, int]
    score: str


SHARED = (
    "device=cpu",
    "compile=false",
    "arch.forward_dtype=float32",
    "arch.H_cycles=2",
    "objective=softmax",
    "optimizer=muon",
    "lr_warmup_steps=50",
    "lr_min_ratio=0.1",
    "weight_decay=0.01",
    "ema_rate=0.98",
    "logging.progress=false",
    "log_interval=10",
    "eval_interval=25",
    "checkpoint_interval=100",
    "keep_checkpoints=1",
)
TASKS = {
    "sudoku": Task(
        "dataset.build_sudoku_dataset --size 4 --clues 6 --train-puzzles 3000 --test-puzzles 300",
        (
            "arch=trm",
            "data=sudoku",
            "data.buckets=[4]",
            "arch.hidden_size=96",
            "arch.num_heads=4",
            "arch.puzzle_emb_len=1",
            "arch.mlp_t=true",
            "arch.pos_encodings=none",
            "arch.L_cycles=2",
            "global_batch_size=32",
            "lr=4e-3",
        ),
        300,
        (4, 4),
        "all.exact_accuracy",
    ),
    "rules": Task(
        "dataset.build_rules_dataset --families colour_permutation conditional gravity shift recolour "
        "--held-out-families recolour --stages 1 --test-splits test_instances --train-tasks 30000 "
        "--test-tasks 300 --rows 4 5 --columns 4 5",
        (
            "arch=etrm",
            "data=rules",
            "encoder=memory",
            "data.buckets=[5]",
            "data.canvas_margin=0",
            "data.translate=false",
            "data.augmentation=colours",
            "encoder.positions=rope2d_values",
            "arch.pos_encodings=rope2d_values",
            "encoder.colour_path=true",
            "encoder.relations=[symmetries,neighbours]",
            "arch.relations=[symmetries,neighbours]",
            "arch.hidden_size=64",
            "arch.num_heads=4",
            "arch.L_layers=2",
            "arch.L_cycles=1",
            "evaluation.num_views=1",
            "global_batch_size=64",
            "lr=8e-3",
        ),
        500,
        (1, 2),
        "ARC/pass@1",
    ),
}
BASELINE = {"act": "sum", "supervised": "supervised sum"}
SETTINGS = {
    "sum": (),
    "sum, gradient through both cycles": ("arch.grad_cycles=2",),
    "loss_terms": ("objective.split=loss_terms",),
    "instance": ("objective.split=instance", "objective.groups=8"),
    "cell": ("objective.split=cell", "objective.groups=8"),
    "instance_cell": ("objective.split=instance_cell", "objective.groups=8"),
    "internal": ("objective.split=internal",),
    "internal_only": ("objective.split=internal_only",),
    "internal_only, mean": ("objective.split=internal_only", "objective.aggregator=mean"),
    "supervised sum": ("mode=supervised",),
    "supervision": ("mode=supervised", "objective.split=supervision"),
    "supervision_instance": (
        "mode=supervised",
        "objective.split=supervision_instance",
        "objective.groups=8",
    ),
}


def run(task: str, setting: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one model, and return its line of descent.jsonl. Raises `UserError` where a command fails."""
    what = TASKS[task]
    data = options.data_dir / f"descent-{task}"
    if not data.is_dir():
        run_python("-m", *shlex.split(what.build), "--output-dir", str(data))
    supervised = "mode=supervised" in SETTINGS[setting]
    name = f"{task}-{re.sub('[, ]+', '-', setting)}-seed{seed}"
    own = (
        f"data.path={data}",
        f"seed={seed}",
        f"run_name={name}",
        f"output_dir={options.output_dir}",
        f"train_steps={what.steps // 2 if supervised else what.steps}",
        f"arch.halt_max_steps={what.act_steps[supervised]}",
    )
    run_python("pretrain_etrm.py", *SHARED, *what.overrides, *SETTINGS[setting], *own)
    folder = options.output_dir / name
    metrics, environment = read_metrics(folder / "metrics.jsonl"), read_json(folder / "environment.json")
    return {
        "task": task,
        "setting": setting,
        "seed": seed,
        "score": what.score,
        "curve": _series(metrics, what.score),
        "similarity": _series(metrics, SIMILARITY),
        "conflicts": _series(metrics, "jacobian/conflicts"),
        "ms_per_step": min(x for _, x in _series(metrics, "timing/train_ms_per_step")),
        "command": f"python -m experiments.descent run --tasks {task} --settings {shlex.quote(setting)} "
        f"--seeds {seed}",
        "commit": git_commit(),
        "machine": environment[-1]["device"],
    }


def _series(metrics: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """The logged values of a metric, by step; the last one counts where a run logged a step twice."""
    return sorted({line["step"]: line[name] for line in metrics if name in line}.items())


def table(lines: list[dict[str, Any]]) -> Iterator[str]:
    """A Markdown table per task: the means over seeds, with the lowest and the highest seed."""
    for task in dict.fromkeys(line["task"] for line in lines):
        own = [line for line in lines if line["task"] == task]
        cost = {s: min(x["ms_per_step"] for x in own if x["setting"] == s) for s in _settings(own)}
        columns = "half the updates | all updates | at equal time | time of an update | cosine | conflicts"
        yield f"| {task} | seeds | {columns} |"
        yield "|---|---|---|---|---|---|---|---|"
        for setting in cost:
            runs = [line for line in own if line["setting"] == setting]
            baseline = BASELINE["supervised" if "mode=supervised" in SETTINGS[setting] else "act"]
            if baseline not in cost:
                continue
            ratio = cost[setting] / cost[baseline]
            steps = runs[0]["curve"][-1][0]
            cells = [
                _spread([_at(line["curve"], share * steps) for line in runs]) for share in (0.5, 1, 1 / ratio)
            ]
            cells += [f"{ratio:.2f}", *(_mean(runs, key) for key in ("similarity", "conflicts"))]
            yield f"| {setting} | {len(runs)} | {' | '.join(cells)} |"
        yield ""


def _settings(lines: list[dict[str, Any]]) -> list[str]:
    return [setting for setting in SETTINGS if any(line["setting"] == setting for line in lines)]


def _at(curve: list[list[float]], step: float) -> float:
    """The score after so many updates, on the line between the evaluations before and after it."""
    steps, scores = zip(*curve, strict=True)
    return float(np.interp(step, (0, *steps), (0.0, *scores)))


def _mean(runs: list[dict[str, Any]], key: str) -> str:
    """Of all that was logged; a dash without objectives to compare."""
    values = [value for run in runs for _, value in run[key]]
    return f"{sum(values) / len(values):.3f}" if values else "-"


def _spread(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """The score over the updates, and the similarity to gradient descent, with a row of panels per task."""
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    figure = Figure(figsize=(11, 3.6 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), 2, squeeze=False)
    for row, task in zip(panels, tasks, strict=True):
        own = [line for line in lines if line["task"] == task]
        for number, setting in enumerate(_settings(own)):
            runs = [line for line in own if line["setting"] == setting]
            for panel, key in zip(row, ("curve", "similarity"), strict=True):
                curves = [dict(map(tuple, line[key])) for line in runs if line[key]]
                steps = sorted(set.intersection(*map(set, curves))) if curves else []
                means = [sum(curve[step] for curve in curves) / len(curves) for step in steps]
                style = "--" if "mode=supervised" in SETTINGS[setting] else "-"
                if means:
                    panel.plot(steps, means, style, color=f"C{number}", label=setting, linewidth=1.4)
        row[0].set_title(f"{task}: {own[0]['score']} on held-out data")
        row[1].set_title(f"{task}: cosine with gradient descent")
        for panel in row:
            panel.set_xlabel("updates")
            panel.grid(alpha=0.3)
        row[0].legend(fontsize=7, loc="lower right")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=80))


@reports_user_errors
def main() -> None:
    parser = parser_of("experiments.descent", __doc__)
    add = parser.add_argument
    add("action", choices=("run", "table"))
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    add("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    add("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    add("--output-dir", type=Path, default=Path("runs/descent"), help="of the runs (default: %(default)s)")
    add("--data-dir", type=Path, default=Path("data"), help="of the datasets (default: %(default)s)")
    add("--results", type=Path, default=RESULTS, help=f"default: experiments/{RESULTS.name}")
    add("--picture", type=Path, default=PICTURE, help="of `table` (default: docs/jacobian-descent.png)")
    options = parser.parse_args()
    if options.action == "table":
        lines = read(options.results)
        print("\n".join(table(lines)))
        draw(lines, options.picture)
        return
    cases = product(options.seeds, options.tasks, options.settings)
    in_order = ((task, setting, seed) for seed, task, setting in cases)
    complete(options.results, ("task", "setting", "seed"), in_order, partial(run, options=options))


if __name__ == "__main__":
    main()
