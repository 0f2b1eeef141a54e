"""Evaluate a checkpoint on held-out tasks: python evaluate.py checkpoint=runs/NAME [key=value ...], also under torchrun.

Checkpoint -> predictions over augmented views -> votes -> pass@k with intervals and controls, results.json,
per_example.jsonl, submission.json, report.html and, if asked for, every view's prediction (docs/evaluation.md).
"""

import sys
import time
from pathlib import Path

from tqdm import tqdm

from config.compose import launch
from evaluation.metrics import Score
from evaluation.predictions import FILE
from evaluation.protocols import less_memory
from evaluation.run import RESULTS, Evaluation
from evaluation.session import EvaluateConfig, Session
from utils import distributed
from utils.device import explains_out_of_memory
from utils.errors import reports_user_errors
from utils.files import check_replaceable


@distributed.reports_lost_peers()
def run(config: EvaluateConfig) -> None:
    """One evaluation, from the checkpoint to its files and the table in the terminal."""
    started = time.monotonic()
    if config.output_dir:
        check_replaceable(Path(config.output_dir), RESULTS)  # before hours of work, not after them
    session = Session.open(config)
    with (
        tqdm(
            unit="view", disable=not session.world.is_main, desc="views", leave=False, file=sys.stderr
        ) as bar,
        explains_out_of_memory("the evaluation", less_memory(config.protocol, config.batch_size)),
    ):
        evaluation = session.evaluate(report=bar.update)
    if session.world.is_main:
        seconds = time.monotonic() - started
        print(table(evaluation, config), flush=True)  # whatever becomes of the files
        folder = session.folder()
        session.write(folder, evaluation, seconds)
        also = [
            name
            for name, wanted in ((FILE, config.save_predictions), ("report.html", config.report))
            if wanted
        ]
        print(f"{folder}: {', '.join([RESULTS, 'per_example.jsonl', 'submission.json', *also])}")
    distributed.close()


def table(evaluation: Evaluation, config: EvaluateConfig) -> str:
    """The scores as text: one line per control, with intervals, denominator and protocol; then those of each subset."""
    metrics = list(dict.fromkeys(score.metric for score in evaluation.scores))
    last = f"tasks_solved@{config.pass_ks[min(1, len(config.pass_ks) - 1)]}"
    arc = ["ARC/single_view", *(f"ARC/pass@{k}" for k in config.pass_ks[:2]), last]
    shown = arc if arc[0] in metrics else metrics
    counts = evaluation.counts
    lines = [
        f"protocol {evaluation.described}, split {config.split}: {counts['tasks']} tasks, {counts['queries']} queries "
        f"({counts['no_prediction']} without a prediction, {counts['answer_exceeds_canvas']} larger than their canvas, "
        f"{counts['unlabelled']} unlabelled), {evaluation.num_views} view{'s' * (evaluation.num_views > 1)}, 95 % intervals",
    ]
    if shown:
        lines += ["", *_rows({name: [s for s in evaluation.scores if s.metric == name] for name in shown})]
    if evaluation.by_subset:
        best = shown[-2] if shown is arc else shown[0]
        columns = {name: [s for s in own if s.metric == best] for name, own in evaluation.by_subset.items()}
        headings = {f"{name} ({own[0].n})": own for name, own in columns.items()}
        lines += ["", f"{best} by subset (tasks)", "", *_rows(headings)]
    return "\n".join(line.rstrip() for line in [*lines, "", *evaluation.notes])


def _rows(columns: dict[str, list[Score]]) -> list[str]:
    """A heading and a line per control; a column is one score of every control."""
    lines = [f"{'':<26}" + "".join(f"{name:<26}" for name in columns)]
    for of_control in zip(*columns.values(), strict=True):
        cells = (
            f"{100 * s.value:5.1f} % [{100 * s.ci_low:.1f}, {100 * s.ci_high:.1f}]" if s.n else "    -"
            for s in of_control
        )
        control = of_control[0].control
        lines.append(
            f"{'model' if control == 'none' else control:<26}" + "".join(f"{cell:<26}" for cell in cells)
        )
    return lines


@reports_user_errors
def main() -> None:
    launch("evaluate", EvaluateConfig, run)


if __name__ == "__main__":
    main()
