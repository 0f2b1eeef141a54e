"""Write an evaluation as one self-contained HTML page that a browser opens straight from disk.

A record may hold `steps`, the refinement of its first view (evaluation/refinement.py). They get a slider.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset.games import GAMES, Game
from utils.files import json_in_page, write_atomically

TEMPLATE = Path(__file__).with_name("report_template.html")
PLACEHOLDER = "__REPORT_DATA__"
# Metrics that the page draws over steps.
CURVES = (
    "train/lm_loss",
    "train/exact_accuracy",
    "ARC/pass@1",
    "all.exact_accuracy",
    "all.valid",
    "all.shortest",
)
CURVE_POINTS = 400  # at most, per curve: more than a screen shows


def training_curves(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Name -> (step, value) of the metrics in `CURVES` that the lines of a metrics.jsonl hold.

    A curve of more than `CURVE_POINTS` points becomes the means of as many stretches of equal length.
    """
    curves = {}
    for name in CURVES:
        points = np.array(
            [(line["step"], line[name]) for line in metrics if line.get(name) is not None], float
        )
        if len(points):
            parts = np.array_split(points, min(len(points), CURVE_POINTS))
            curves[name] = [tuple(part.mean(axis=0).tolist()) for part in parts]
    return curves


def context_map(vectors: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The two principal components of task vectors of equal length.

    Returns `points`, task id -> (x, y), and `explained`, the share of the variance along x and y. A
    component's sign is that of its largest weight, so that the same vectors give the same map.
    """
    centred = np.array(list(vectors.values()), float)
    centred -= centred.mean(axis=0)
    left, scale, right = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(np.take_along_axis(right, np.abs(right).argmax(axis=1)[:, None], axis=1))[:, 0]
    places = np.zeros((len(centred), 2))
    places[:, : len(scale)] = (left * scale * signs)[:, :2]
    variance = np.zeros(2)
    variance[: len(scale)] = (scale**2)[:2] / max((scale**2).sum(), np.finfo(float).tiny)
    return {"points": dict(zip(vectors, places.tolist(), strict=True)), "explained": variance.tolist()}


def render_report(
    results: dict,
    records: list[dict],
    puzzles: dict[str, dict],
    metrics: Sequence[Mapping[str, Any]] = (),
    contexts: Mapping[str, Sequence[float]] | None = None,
    game: Game = GAMES["arc"],
) -> str:
    """Return the report page as HTML text.

    Args:
        results: the run's description, counts and scores.
        records: one dict per query, in the order in which their tasks shall appear. `steps` in one is a list
            of `{"grid", "q", "halted"}` per ACT step.
        puzzles: task id to its "train" and "test" pairs; only tasks with a record are embedded.
        metrics: the lines of the run's metrics.jsonl, for the training curves.
        contexts: task id to the vector that the model computed from its demonstrations, all of one length.
            They make the map of which tasks look alike to the model. Tasks without a record are left out.
        game: what the puzzles are.

    Raises:
        TypeError: a value is neither a JSON type nor something with `tolist()`.
        OSError: the template beside this module cannot be read.
    """
    shown = {record["task"] for record in records}
    asked = {task: puzzle for task, puzzle in puzzles.items() if task in shown}
    side = max((len(pair["input"]) for puzzle in asked.values() for pair in puzzle["test"]), default=1)
    data = {"game": game.to_page(side), "results": results, "records": records, "puzzles": asked}
    if curves := training_curves(metrics):
        data["curves"] = curves
    if vectors := {task: vector for task, vector in (contexts or {}).items() if task in shown}:
        data["map"] = context_map(vectors)
    text = json_in_page(data)
    before, _, after = TEMPLATE.read_text(encoding="utf-8").partition(PLACEHOLDER)
    return before + text + after


def write_report(
    path: Path,
    results: dict,
    records: list[dict],
    puzzles: dict[str, dict],
    metrics: Sequence[Mapping[str, Any]] = (),
    contexts: Mapping[str, Sequence[float]] | None = None,
    game: Game = GAMES["arc"],
) -> None:
    """Write the report page to `path`, replacing an older one only once the new one is complete.

    Args:
        path: where the page goes; missing parent folders are made.
        results, records, puzzles, metrics, contexts, game: see `render_report`.

    Raises:
        TypeError: the data cannot be written as JSON; a report already at `path` stays as it was.
        OSError: the template cannot be read. UserError: the page cannot be written; likewise.
    """
    page = render_report(results, records, puzzles, metrics, contexts, game)
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
