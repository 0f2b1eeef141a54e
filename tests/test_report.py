"""The report page: what goes in comes out, nothing breaks out, nothing is loaded, nothing is half written."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dataset.games import GAMES
from evaluation import report
from evaluation.report import write_report
from tests.support.report import DATA, embedded
from utils import files
from utils.errors import UserError

ARC = GAMES["arc"].to_page(1)
HOSTILE = "</script><script>document.title = 'broken'</script><!--<script>"


def results(**changes):
    counts = {
        "tasks": 2,
        "queries": 2,
        "scored": 1,
        "no_prediction": 0,
        "unlabelled": 1,
        "answer_exceeds_canvas": 0,
    }
    values = [
        ("none", "ARC/pass@1", 0.375),
        ("none", "tasks_solved@2", 0.421),
        ("copy_input", "ARC/pass@1", 0.013),
    ]
    return {
        "protocol": "inductive",
        "dataset": {"path": "data/sample", "layout": "etrm", "sha256": "0" * 64},
        "checkpoint": {"path": "runs/sample/step_10.pt", "step": 10, "weights": "ema", "git_commit": "abc"},
        "model": {
            "arch": "etrm",
            "encoder": "standard",
            "parameters": {"core": 7, "context": 3, "puzzle_table": 0},
        },
        "split": "test",
        "num_views": 8,
        "seed": 0,
        "seconds": 12.3,
        "command": "python evaluate.py",
        "counts": counts,
        "scores": [
            {
                "control": control,
                "metric": metric,
                "value": value,
                "ci_low": value / 2,
                "ci_high": value * 2,
                "n": 2,
            }
            for control, metric, value in values
        ],
        **changes,
    }


def record(task="a1b2c3d4", **changes):
    answers = [
        {"grid": [[1, 2], [3, 4]], "votes": 5, "q": 0.83, "correct": True},
        {"grid": [[1, 2], [3, 0]], "votes": 3, "q": 0.4, "correct": False},
    ]
    plain = {"task": task, "query": 0, "protocol": "inductive", "status": "scored", "num_votes": 8}
    return {**plain, "top1_correct": True, "rank_of_truth": 1, "candidates": answers, **changes}


def unscored(task, status):
    return record(task, status=status, num_votes=0, top1_correct=None, rank_of_truth=None, candidates=[])


def puzzle(answer=True):
    query = {"input": [[0, 1]], "output": [[1, 2], [3, 4]]}
    if not answer:
        del query["output"]
    return {"train": [{"input": [[5]], "output": [[6]]}], "test": [query]}


def test_data_round_trip(tmp_path):
    path = tmp_path / "deep" / "report.html"
    records, puzzles = [record(), record("ffff0000")], {"ffff0000": puzzle(), "a1b2c3d4": puzzle()}
    write_report(path, results(), records, puzzles)
    assert embedded(path) == {
        "game": ARC,
        "results": results(),
        "records": records,
        "puzzles": puzzles,
    }
    assert report.PLACEHOLDER not in path.read_text(encoding="utf-8")


def test_only_puzzles_with_a_record_are_embedded(tmp_path):
    path = tmp_path / "report.html"
    write_report(path, results(), [record()], {"a1b2c3d4": puzzle(), "unused": puzzle()})
    assert list(embedded(path)["puzzles"]) == ["a1b2c3d4"]


def test_arrays_and_numbers_json_cannot_hold(tmp_path):
    path = tmp_path / "report.html"
    answer = {
        "grid": np.array([[1, 2]], dtype=np.uint8),
        "votes": np.int64(3),
        "q": np.float32("nan"),
        "correct": np.bool_(False),
    }
    write_report(path, results(seconds=float("inf")), [record(candidates=[answer])], {"a1b2c3d4": puzzle()})
    data = embedded(path)
    assert data["records"][0]["candidates"] == [{"grid": [[1, 2]], "votes": 3, "q": None, "correct": False}]
    assert data["results"]["seconds"] is None


def test_strings_cannot_break_out_of_the_data(tmp_path):
    path = tmp_path / "report.html"
    write_report(path, results(command=HOSTILE), [record(HOSTILE)], {HOSTILE: puzzle()})
    data = embedded(path)
    assert data["records"][0]["task"] == data["results"]["command"] == HOSTILE
    text = path.read_text(encoding="utf-8")
    assert "<" not in DATA.search(text).group(1)
    assert text.lower().count("</script") == report.TEMPLATE.read_text(encoding="utf-8").lower().count(
        "</script"
    )


def test_page_never_writes_markup_from_data():
    template = report.TEMPLATE.read_text(encoding="utf-8")
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert sink not in template


def test_nothing_is_loaded(tmp_path):
    path = tmp_path / "report.html"
    write_report(path, results(), [record()], {"a1b2c3d4": puzzle()})
    text = path.read_text(encoding="utf-8")
    assert not re.search(
        r"https?://|\b(src|href)\s*=|@import|url\(|\bfetch\(|\bimport\(|XMLHttpRequest", text
    )
    assert "default-src 'none'" in text


def test_cases_without_a_score(tmp_path):
    path = tmp_path / "report.html"
    records = [
        unscored(status, status) for status in ("unlabelled", "no_prediction", "answer_exceeds_canvas")
    ]
    write_report(
        path, results(scores=[]), records, {"unlabelled": puzzle(answer=False), "no_prediction": puzzle()}
    )
    data = embedded(path)
    assert [item["top1_correct"] for item in data["records"]] == [None, None, None]
    assert "output" not in data["puzzles"]["unlabelled"]["test"][0]
    write_report(path, {}, [], {})
    assert embedded(path) == {"game": ARC, "results": {}, "records": [], "puzzles": {}}


def test_failing_serialisation_leaves_the_old_report(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_report(path, {"protocol": object()}, [], {})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_failing_write_leaves_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(UserError, match="no space"):
        write_report(path, results(), [], {})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def rendered(path: Path, profile: Path) -> str:
    """Return the page's markup after its script ran in a headless browser."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--window-size=1300,3000",
    ]
    command = [
        chromium,
        *flags,
        f"--user-data-dir={profile}",
        "--virtual-time-budget=2000",
        "--dump-dom",
        path.as_uri(),
    ]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)


def test_browser_draws_the_report(tmp_path):
    path = tmp_path / "report.html"
    late = record("0000ffff", top1_correct=False, rank_of_truth=2)
    records = [
        record(),
        late,
        unscored("unlabelled", "unlabelled"),
        unscored("missing", "no_prediction"),
        record(HOSTILE),
    ]
    records += [record(f"more{i}") for i in range(200)]
    write_report(
        path,
        results(),
        records,
        {"a1b2c3d4": puzzle(), "0000ffff": puzzle(), "unlabelled": puzzle(answer=False)},
    )
    page = rendered(path, tmp_path / "profile")
    for value in ("37.5%", "[18.8, 75.0]", "42.1%", "1.3%"):
        assert value in page
    verdicts = re.findall(r'<article class="card (\w+)"', page)
    assert verdicts == ["right", "wrong", "unscored", "unscored", "right"] + ["right"] * 200
    assert page.count("<canvas") < 200, "cards far below the window are not drawn"
    assert page.index("a1b2c3d4") < page.index("0000ffff")
    assert "right answer ranked 2" in page and "answer unknown" in page and "no prediction" in page
    assert 'aria-label="Query 1 answer 1, right, 2 rows by 2 columns"' in page
    assert "&lt;/script&gt;" in page and "<title>ARC-AGI evaluation, inductive</title>" in page
