"""Evaluate a checkpoint on held-out tasks.

    python evaluate.py checkpoint=runs/first num_views=64

Checkpoint -> predictions over augmented views -> votes -> pass@k with intervals and controls -> a table in
the terminal and the files of evaluation/folder.py (docs/evaluation.md). It also runs under torchrun.
"""

import sys
import time
from pathlib import Path

from config.compose import launch
from evaluation.depth import depth_lines
from evaluation.folder import RESULTS, files_of
from evaluation.metrics import Score, in_percent
from evaluation.progress import ProgressBar
from evaluation.protocols import less_memory
from evaluation.run import Evaluation
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
    is_main = session.respondent.world.is_main
    for note in session.notes if is_main else ():
        print(note, file=sys.stderr, flush=True)
    with (
        ProgressBar(session.respondent.world) as progress,
        explains_out_of_memory("the evaluation", less_memory(config.protocol, config.batch_size)),
    ):
        evaluation = session.evaluate(progress=progress)
    if is_main:
        seconds = time.monotonic() - started
        folder = session.folder()
        # Files first: a terminal may be closed. The table is printed whatever becomes of the files.
        try:
            session.write(folder, evaluation, seconds)
        finally:
            print(table(evaluation, config, session.trained_on), flush=True)
        print(f"{folder}: {', '.join(files_of(config.report, config.save_predictions))}")
    distributed.close()


def table(evaluation: Evaluation, config: EvaluateConfig, trained_on: str | None = None) -> str:
    """The scores as text, with protocol, denominator and intervals: a line per control, then by subset."""
    metrics = list(dict.fromkeys(score.metric for score in evaluation.scores))
    last = f"tasks_solved@{config.pass_ks[min(1, len(config.pass_ks) - 1)]}"
    arc = ["ARC/single_view", *(f"ARC/pass@{k}" for k in config.pass_ks[:2]), last]
    columns = arc if arc[0] in metrics else metrics
    counts, views = evaluation.counts, evaluation.num_views
    too_large = len(evaluation.questions.too_large)
    unasked = f", {too_large} of them larger than every canvas" if too_large else ""
    lines = [
        f"protocol {evaluation.described}, split {config.split}: "
        f"{counts['tasks']} tasks, {counts['queries']} queries "
        f"({counts['no_prediction']} without a prediction{unasked}, "
        f"{counts['answer_exceeds_canvas']} whose answer is larger than their canvas, "
        f"{counts['unlabelled']} unlabelled), "
        f"{views} view{'s' * (views > 1)}, 95 % intervals",
        *([f"trained on {trained_on}"] if trained_on else []),
    ]
    if columns:
        lines += ["", *_rows({name: [s for s in evaluation.scores if s.metric == name] for name in columns})]
    if evaluation.by_subset:
        best = columns[-2] if columns is arc else columns[0]
        subsets = {
            name: [s for s in scores if s.metric == best] for name, scores in evaluation.by_subset.items()
        }
        headings = {f"{name} ({scores[0].n})": scores for name, scores in subsets.items()}
        lines += ["", f"{best} by subset (tasks)", "", *_rows(headings)]
    if evaluation.depths:
        lines += ["", *depth_lines(evaluation.depths)]
    return "\n".join(line.rstrip() for line in [*lines, "", *evaluation.notes])


def _rows(columns: dict[str, list[Score]]) -> list[str]:
    """A heading and a line per control; a column is one score of every control."""
    lines = [f"{'':<26}" + "".join(f"{name:<26}" for name in columns)]
    for of_control in zip(*columns.values(), strict=True):
        cells = (in_percent(s.value, s.ci_low, s.ci_high) if s.n else "    -" for s in of_control)
        control = of_control[0].control
        lines.append(
            f"{'model' if control == 'none' else control:<26}" + "".join(f"{cell:<26}" for cell in cells)
        )
    return lines


@reports_user_errors
def main() -> None:
    launch("evaluate", EvaluateConfig, run, __doc__)


if __name__ == "__main__":
    main()
