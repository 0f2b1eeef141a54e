"""Evaluations side by side."""

import json
import shutil

import pytest

from evaluation import predictions
from experiments import check, votes_against_one_view
from tests.support.predictions import about
from tests.support.runs import called
from tools import compare
from utils.errors import UserError
from utils.files import write_json


def evaluation_folder(path, ranks: list[int | None], **changes):
    """A folder as evaluate.py writes it, two queries per task."""
    path.mkdir()
    write_json(path / "results.json", about(**changes))
    records = [
        {
            "task": f"t{i // 2}",
            "query": i % 2,
            "input_hash": f"i{i}",
            "label_hash": f"l{i}",
            "rank_of_truth": rank,
        }
        for i, rank in enumerate(ranks)
    ]
    (path / "per_example.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_evaluations_stand_side_by_side_with_paired_tests(tmp_path, monkeypatch, capsys):
    one = evaluation_folder(tmp_path / "one", [1, 1, 1, None, 2, 1, 1, 1] * 3)
    two = evaluation_folder(tmp_path / "two", [1, 1, 1, 1, 1, 1, 3, 1] * 3)
    called(monkeypatch, compare.main, one, two, "--json", tmp_path / "c.json")
    result = json.loads((tmp_path / "c.json").read_text())
    first, second = (e["scores"] for e in result["evaluations"])
    assert (
        result["tasks"] == 12
        and first["ARC/pass@1"]["value"] == 0.75
        and second["ARC/pass@1"]["value"] == 0.875
    )
    assert first["tasks_solved@2"]["value"] == second["tasks_solved@2"]["value"] == 0.75
    at1, at2 = result["pairs"]
    assert at1["difference"] == pytest.approx(0.125) and (
        at1["solved_by_first_only"],
        at1["solved_by_second_only"],
    ) == (3, 6)
    assert (
        at1["p_mcnemar"] == pytest.approx(2 * (1 + 9 + 36 + 84) / 2**9)
        and at1["ci95"][0] < 0.125 < at1["ci95"][1]
    )
    assert at2["solved_by_first_only"] == at2["solved_by_second_only"] == 3 and at2["p_mcnemar"] == 1.0
    out = capsys.readouterr().out
    assert "12 tasks" in out and "+12.5 %" in out and str(two) in out


def test_different_tasks_or_protocols_are_refused_unless_told(tmp_path):
    one = compare.read(evaluation_folder(tmp_path / "one", [1, 1, 1, None]))
    shorter = compare.read(evaluation_folder(tmp_path / "shorter", [1, 1]))
    other = compare.read(evaluation_folder(tmp_path / "other", [1, 1, 1, 1], protocol="transductive"))
    with pytest.raises(UserError, match="has 2 tasks, 1 of them in common"):
        compare.compare([one, shorter], [1], False, 0)
    with pytest.raises(UserError, match="transductive"):
        compare.compare([one, other], [1], False, 0)
    assert compare.compare([one, shorter], [1], True, 0)["tasks"] == 1
    assert "transductive" in compare.compare([one, other], [1], True, 0)["notes"][0]
    with pytest.raises(UserError, match="no such file"):
        compare.read(tmp_path)
    stopped = compare.read(evaluation_folder(tmp_path / "stopped", [1, 1, 1, None], vote_stop=True))
    assert compare.compare([one, stopped], [1, 2], False, 0)["tasks"] == 2
    with pytest.raises(UserError, match="--k up to 2"):
        compare.compare([one, stopped], [3], False, 0)
    game = {"vote_stop": True, "scores": [{"metric": "all.exact_accuracy"}]}
    played = [compare.read(evaluation_folder(tmp_path / name, [1, 1, 1, None], **game)) for name in "ab"]
    assert compare.compare(played, [1], False, 0)["tasks"] == 2


@pytest.mark.parametrize("foreign", [[], {}, {"scores": [1]}])
def test_a_foreign_results_file_is_named(foreign, stored_folder, tmp_path, monkeypatch, capsys):
    shutil.copy(stored_folder / predictions.FILE, tmp_path)
    write_json(tmp_path / "results.json", foreign)
    for main, arguments in ((check.main, ["ARC/pass@1"]), (votes_against_one_view.main, [])):
        with pytest.raises(SystemExit) as ended:
            called(monkeypatch, main, tmp_path, *arguments)
        assert ended.value.code == 2 and "results.json" in capsys.readouterr().err
