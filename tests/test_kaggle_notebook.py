"""The notebook for Kaggle: it runs from its first cell to its last without a network, and submits."""

import json

import pytest

from tests.support.runs import ROOT, called, run
from tools import kaggle_notebook, publish
from utils.errors import UserError
from utils.files import read_json, write_json

UNREACHABLE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


@pytest.fixture
def challenges(tmp_path):
    """Tasks without answers: one with two queries, and one that fits no canvas of the model."""
    task = read_json(ROOT / "pretrained" / "example.json")
    queries = [{"input": pair["input"]} for pair in task["test"]]
    large = {"train": [{"input": [[1] * 30] * 30, "output": [[2]]}], "test": [{"input": [[1] * 30] * 30}]}
    path = tmp_path / "arc-agi_test_challenges.json"
    write_json(path, {"small": {**task, "test": [*queries, *queries][:2]}, "large": large})
    return path


@pytest.mark.parametrize("layout", ["run", "hub"])
def test_the_notebook_runs_without_a_network_and_answers_every_query(
    layout, challenges, tmp_path, monkeypatch
):
    inputs, work, output = tmp_path / "input", tmp_path / "work", tmp_path / "submission.ipynb"
    (inputs / "wheels").mkdir(parents=True)
    (inputs / "wheels" / "requirements.txt").write_text("numpy\n")  # is there already
    (inputs / "project").symlink_to(ROOT)
    trained = ROOT / "pretrained" / "arc-small"
    called(monkeypatch, publish.main, trained, inputs / "checkpoint", "--layout", layout)
    places = ["--input", inputs, "--challenges", challenges, "--work", work]
    called(monkeypatch, kaggle_notebook.main, output, "num_views=2", *places, "device=cpu")
    cells = [cell for cell in json.loads(output.read_text())["cells"] if cell["cell_type"] == "code"]
    work.mkdir()
    environment = {**UNREACHABLE, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = run("-c", "\n".join("".join(cell["source"]) for cell in cells), cwd=work, env=environment)
    assert done.returncode == 0, done.stderr
    submission = read_json(work / "submission.json")
    assert {name: len(answers) for name, answers in submission.items()} == {"small": 2, "large": 1}
    assert all(answer.keys() == {"attempt_1", "attempt_2"} for one in submission.values() for answer in one)
    assert submission["small"][0]["attempt_1"] != [[0]] and "2 tasks, 3 queries" in done.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [("num_vews=2", "num_vews"), ("data_path=x", "data_path is the notebook's own")],
)
def test_a_setting_that_evaluate_does_not_take_is_refused(override, message):
    with pytest.raises(UserError, match=message):
        kaggle_notebook.notebook("i", "c", "w", [override])
