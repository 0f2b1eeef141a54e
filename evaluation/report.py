"""Write an evaluation as one self-contained HTML page that a browser opens straight from disk."""

import math
import os
from pathlib import Path
from typing import Any

from utils.files import json_in_page

TEMPLATE = Path(__file__).with_name("report_template.html")
PLACEHOLDER = "__REPORT_DATA__"


def _plain(value: Any) -> Any:
    """Return `value` as plain JSON types: arrays become lists, numbers that are not finite become None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN, and one in the data would keep the browser from reading any of it
    return value


def render_report(results: dict, records: list[dict], puzzles: dict[str, dict]) -> str:
    """Return the report page as HTML text.

    Args:
        results: the run's description, counts and scores.
        records: one dict per query, in the order in which their tasks shall appear.
        puzzles: task id to its "train" and "test" pairs; only tasks with a record are embedded.

    Raises:
        TypeError: a value is neither a JSON type nor something with `tolist()`.
        OSError: the template beside this module cannot be read.
    """
    shown = {record["task"] for record in records}
    data = {
        "results": results,
        "records": records,
        "puzzles": {task: puzzle for task, puzzle in puzzles.items() if task in shown},
    }
    text = json_in_page(_plain(data))
    before, _, after = TEMPLATE.read_text(encoding="utf-8").partition(PLACEHOLDER)
    return before + text + after


def write_report(path: Path, results: dict, records: list[dict], puzzles: dict[str, dict]) -> None:
    """Write the report page to `path`, replacing an older one only once the new one is complete.

    Args:
        path: where the page goes; missing parent folders are made.
        results, records, puzzles: see `render_report`.

    Raises:
        TypeError: the data cannot be written as JSON; a report already at `path` stays as it was.
        OSError: the template cannot be read or the page cannot be written; likewise.
    """
    path = Path(path)
    page = render_report(results, records, puzzles)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
