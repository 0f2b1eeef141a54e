"""Several evaluations pooled."""

import json
import re
from fractions import Fraction

import numpy as np
import pytest

from evaluation.folder import write_records
from evaluation.records import grid_hash
from evaluation.voting import Ballot, key_of, pooled
from tests.support.predictions import about
from tests.support.runs import called, evaluate_here, untrained
from tools import compare, pool
from utils.errors import UserError
from utils.files import read_json, write_json


def grid(value: int) -> np.ndarray:
    return np.array([[value]], np.uint8)


def votes(*answers: tuple[int, int, float], num_votes: int | None = None) -> Ballot:
    """Answers by their only cell, with votes and mean halting probability."""
    known = [(key_of(grid(value)), count, q) for value, count, q in answers]
    return Ballot(known, sum(count for _, count, _ in answers) if num_votes is None else num_votes)


def ranking(*ballots: Ballot) -> list[int]:
    return [int(one.grid[0, 0]) for one in pooled(ballots)]


def folder_of(path, ballots: list[Ballot], truths: list[int | None], status: str = "scored", **changes):
    """A folder as evaluate.py writes it, two queries per task."""
    path.mkdir()
    write_json(path / "results.json", about(**changes))
    records = []
    for i, (ballot, truth) in enumerate(zip(ballots, truths, strict=True)):
        grids = [np.frombuffer(cells, np.uint8).reshape(shape) for (shape, cells), *_ in ballot.answers]
        values = [int(one[0, 0]) for one in grids]
        records.append(
            {
                "task": f"t{i // 2}",
                "query": i % 2,
                "status": "unlabelled" if truth is None else status if grids else "no_prediction",
                "num_votes": ballot.num_votes,
                "input_hash": f"i{i}",
                "label_hash": None if truth is None else grid_hash(grid(truth)),
                "top1_pred_hash": grid_hash(grids[0]) if grids else None,
                "rank_of_truth": values.index(truth) + 1 if truth in values else None,
                "candidates": [
                    {"grid": one.tolist(), "votes": count, "q": q}
                    for one, (_, count, q) in zip(grids, ballot.answers, strict=True)
                ],
            }
        )
    write_records(path / "per_example.jsonl", records)
    return path


def shares_of(results: dict) -> dict[str, float]:
    return {score["metric"]: score["value"] for score in results["scores"]}


def test_the_votes_of_an_evaluation_count_by_their_share():
    few, many = votes((1, 5, 0.5), (2, 3, 0.5)), votes((2, 40, 0.1), (3, 24, 0.9))
    assert ranking(few, many) == ranking(many, few) == [2, 1, 3]
    assert [one.share for one in pooled([few, many])] == [Fraction(1), Fraction(5, 8), Fraction(3, 8)]
    # Votes for answers that are not listed make the share of the others smaller.
    assert ranking(votes((1, 6, 0.9), num_votes=16), votes((2, 4, 0.1), (3, 4, 0.1))) == [2, 3, 1]
    assert ranking(votes(), votes((4, 1, 0.5))) == [4] and ranking(votes(), votes()) == []


def test_equal_shares_are_ordered_by_confidence_then_by_evaluation_then_by_rank():
    assert ranking(votes((1, 8, 0.25)), votes((2, 64, 0.5))) == [2, 1]
    assert ranking(votes((1, 8, 0.5)), votes((2, 64, 0.5))) == [1, 2]
    assert ranking(votes((2, 64, 0.5)), votes((1, 8, 0.5))) == [2, 1]
    assert ranking(votes((3, 4, 0.5), (1, 4, 0.5)), votes((2, 4, 0.5), (1, 4, 0.5))) == [1, 3, 2]
    thirds = [votes((1, 1, 0.5), (2, 2, 0.5)), votes((1, 2, 0.5), (3, 1, 0.5)), votes((4, 5, 0.5))]
    assert ranking(*thirds) == [1, 4, 2, 3]  # 1/3 + 2/3 is 1


def test_two_unanimous_evaluations_solve_what_either_solves(tmp_path, monkeypatch, capsys):
    truths = [1, 1, 1, 1, 1, None]
    one = folder_of(
        tmp_path / "one", [votes((value, 8, 0.5)) for value in (1, 1, 2, 1, 2, 1)], truths, num_views=8
    )
    two = folder_of(
        tmp_path / "two",
        [votes((value, 64, 0.25)) for value in (1, 3, 1, 3, 3, 1)],
        truths,
        num_views=64,
        protocol="test_time_training",
        adaptation={"name": "test_time_training"},
    )
    out = tmp_path / "out"
    called(monkeypatch, pool.main, one, two, "--output-dir", out)
    results, submission = read_json(out / "results.json"), read_json(out / "submission.json")
    assert [shares_of(part)["ARC/pass@1"] for part in results["pooled"]] == pytest.approx([0.5, 1 / 3])
    # At k=2 every labelled query but the fifth, which neither solves; the sixth does not count.
    assert shares_of(results) == pytest.approx(
        {
            "ARC/pass@1": 0.5,
            "tasks_solved@1": 1 / 3,
            "ARC/pass@2": 2 / 3,
            "tasks_solved@2": 2 / 3,
        }
    )
    assert {score["n"] for score in results["scores"]} == {3}
    assert results["same_first_answer"] == pytest.approx(2 / 6) and results["counts"]["unlabelled"] == 1
    assert results["protocol"] == "inductive + test_time_training" and results["num_views"] == 72
    assert submission["t0"] == [
        {"attempt_1": [[1]], "attempt_2": [[1]]},
        {"attempt_1": [[1]], "attempt_2": [[3]]},
    ]
    said = capsys.readouterr().out
    assert "agree in 33.3 %" in said and "the protocols differ" in said and "pool" in said

    # The pool's folder can be set beside its evaluations, as far as its answers are known.
    called(monkeypatch, compare.main, one, out, "--allow-different")
    assert "ranking pooled" in capsys.readouterr().out
    with pytest.raises(UserError, match="--k up to 5"):
        compare.compare([compare.read(one), compare.read(out)], [6], True, 0)
    with pytest.raises(UserError, match="is a pool"):
        pool.read(out)


def test_a_pool_with_a_transductive_evaluation_is_transductive(tmp_path):
    one = pool.read(folder_of(tmp_path / "one", [votes((1, 8, 0.5))], [1]))
    two = pool.read(folder_of(tmp_path / "two", [votes((1, 8, 0.5))], [1], protocol="transductive"))
    assert pool.pool([one, two], [1]).results["protocol"] == "transductive (inductive + transductive)"
    assert pool.pool([two, two], [1]).results["protocol"] == "transductive"
    assert pool.pool([one, one], [1]).results["protocol"] == "inductive"


def test_answers_that_nobody_can_give_are_misses_and_cut_votes_are_told(tmp_path):
    one = pool.read(folder_of(tmp_path / "one", [votes(), votes((2, 3, 0.5), num_votes=4)], [1, 1]))
    exceeds = [votes((3, 4, 0.5)), votes((2, 4, 0.5))]
    two = pool.read(folder_of(tmp_path / "two", exceeds, [1, 1], "answer_exceeds_canvas"))
    results = pool.pool([one, two], [1, 2]).results
    assert shares_of(results)["ARC/pass@2"] == 0 and results["scores"][0]["n"] == 1
    assert results["counts"]["answer_exceeds_canvas"] == 1 and results["counts"]["scored"] == 1
    assert any("8.3 % of the votes, in 1 of 2 queries" in note for note in results["notes"])
    unanswered = pool.pool([one, one], [1])
    assert unanswered.results["counts"]["no_prediction"] == 1
    assert unanswered.submission["t0"][0] == {"attempt_1": [[0]], "attempt_2": [[0]]}


def test_evaluations_that_cannot_be_pooled_are_refused(tmp_path, monkeypatch, capsys):
    ballots, truths = [votes((1, 8, 0.5)), votes((1, 8, 0.5))], [1, 1]
    one = folder_of(tmp_path / "one", ballots, truths)
    others = {
        "ask different queries": folder_of(tmp_path / "fewer", ballots[:1], truths[:1]),
        "another label_hash": folder_of(tmp_path / "truth", ballots, [1, 2]),
        "split test, .* split train": folder_of(tmp_path / "split", ballots, truths, split="train"),
        "no such file": tmp_path / "nothing",
        "two different evaluations": one,
        "--k up to 1": folder_of(
            tmp_path / "stopped", ballots, truths, vote_stop=True, scores=[{"metric": "ARC/pass@1"}]
        ),
    }
    broken = folder_of(tmp_path / "broken", ballots, truths)
    (broken / "per_example.jsonl").write_text('{"task": "t0", "label_hash": null}\n')
    others["is no evaluation of this version"] = broken
    impossible = folder_of(tmp_path / "impossible", ballots, truths)
    text = (impossible / "per_example.jsonl").read_text()
    (impossible / "per_example.jsonl").write_text(text.replace('"num_votes": 8', '"num_votes": 7'))
    others["7 votes cannot be"] = impossible
    for message, other in others.items():
        refused(message, monkeypatch, capsys, one, other)
    refused("two different evaluations", monkeypatch, capsys, one)
    same = folder_of(tmp_path / "same", ballots, truths)
    refused("first 5 answers", monkeypatch, capsys, one, same, "--k", 6)
    refused("would be replaced", monkeypatch, capsys, one, same, "--output-dir", same)


def refused(message: str, monkeypatch, capsys, *arguments) -> None:
    with pytest.raises(SystemExit) as ended:
        called(monkeypatch, pool.main, *arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and len(said.splitlines()) == 1 and re.search(message, said), said


def test_real_evaluations_are_pooled_and_one_with_itself_keeps_its_answers(
    fewshot, tmp_path, monkeypatch, capsys
):
    checkpoint = untrained(fewshot, tmp_path / "checkpoints")
    folders = [tmp_path / name for name in "ab"]
    for seed, (folder, views) in enumerate(zip(folders, (3, 8), strict=True)):
        evaluate_here(
            f"checkpoint={checkpoint}",
            f"seed={seed}",
            f"num_views={views}",
            "controls=[]",
            "report=false",
            f"output_dir={folder}",
        )
    for folder in folders:
        alone = pool.pool([pool.read(folder)] * 2, [1, 2])
        found, own = read_json(folder / "results.json"), read_json(folder / "submission.json")
        assert alone.submission == own and alone.results["same_first_answer"] == 1
        scores = {score["metric"]: score for score in found["scores"]}
        assert all(scores[one["metric"]] == one for one in alone.results["scores"])
        assert alone.results["pooled"][0]["scores"] == alone.results["scores"]
        lines = [json.loads(line) for line in (folder / "per_example.jsonl").read_text().splitlines()]
        for line, record in zip(lines, alone.records, strict=True):
            assert [c["grid"] for c in record["candidates"]] == [c["grid"] for c in line["candidates"]]
            assert {name: record[name] for name in ("status", "top1_pred_hash", "label_hash")} == {
                name: line[name] for name in ("status", "top1_pred_hash", "label_hash")
            }
    called(monkeypatch, pool.main, *folders, "--output-dir", tmp_path / "out")
    assert "8 views, ranking votes" in capsys.readouterr().out
    assert (tmp_path / "out" / "submission.json").is_file()
