"""Sweeps for W&B: the same space, metric and runs as ours, and an ancestor's sweep in both."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from config import compose
from config.schema import PretrainConfig
from tests.support.grids import write_store
from tests.support.runs import ROOT, called
from tools import sweep, sweep_runs, sweep_space, sweep_wandb
from utils.errors import UserError

ANCESTOR = ROOT / "config" / "sweep"


RANGES = [
    ({"low": 1, "high": 4}, {"distribution": "int_uniform", "min": 1, "max": 4}),
    (
        {"low": 1, "high": 64, "log": True},
        {"distribution": "q_log_uniform_values", "min": 1, "max": 64, "q": 1},
    ),
    ({"low": 0.0, "high": 1}, {"distribution": "uniform", "min": 0.0, "max": 1.0}),
    (
        {"low": 1e-4, "high": 1e-2, "log": True},
        {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
    ),
    ({"low": 64, "high": 250, "step": 64}, {"values": [64, 128, 192]}),
    ({"low": 0.1, "high": 0.5, "step": 0.2}, {"values": pytest.approx([0.1, 0.3, 0.5])}),
]


@pytest.fixture
def ancestors_data(tmp_path, monkeypatch):
    """A working directory with the datasets of the ancestor's sweep."""
    monkeypatch.chdir(tmp_path)
    for name in ("200", "400", "800"):
        write_store(tmp_path / "data" / f"arc2eval-aug-{name}", "puzzle")


def test_the_ancestors_sweep_is_one_of_ours(ancestors_data):
    space = sweep_space.read_space(sweep_space.find_space("ancestor"))
    run = space.first_run()
    assert (run.arch.name, run.arch.H_cycles, run.arch.halt_max_steps) == ("trm", 3, 8)
    assert space.wanted == 20 and space.chosen_metric(run) == "all.accuracy"
    assert space.pruner.model_dump(include={"min_resource", "reduction_factor"}) == {
        "min_resource": 3,
        "reduction_factor": 2,
    }


def test_the_same_sweep_for_wandb_is_what_the_command_writes(ancestors_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)  # is not asked for
    called(monkeypatch, sweep.main, "ancestor", "--wandb-yaml", tmp_path / "w.yaml")
    assert (tmp_path / "w.yaml").read_text() == (ANCESTOR / "ancestor_wandb.yaml").read_text()


def test_the_same_sweep_for_wandb_gives_each_run_keys_of_ours_and_a_folder(ancestors_data, monkeypatch):
    theirs = yaml.safe_load((ANCESTOR / "ancestor_wandb.yaml").read_text())
    ours = sweep_space.read_space(ANCESTOR / "ancestor.yaml")
    assert {key: found["values"] for key, found in theirs["parameters"].items()} == {
        key: range_.choices for key, range_ in ours.space.items()
    }
    assert (theirs["method"], theirs["run_cap"]) == ("bayes", 20)
    assert theirs["metric"] == {"name": "all.accuracy", "goal": "maximize"}
    assert theirs["early_terminate"] == {"type": "hyperband", "min_iter": 3, "eta": 2}
    script = theirs["command"].index("${program}")
    assert theirs["command"][2:script] == sweep_runs.command([], ours.processes)[1:-1]
    fixed = theirs["command"][script + 1 : -1]
    assert fixed[: len(ours.overrides)] == ours.overrides
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    drawn = [f"{key}={found['values'][-1]}" for key, found in theirs["parameters"].items()]
    config = compose.load(PretrainConfig, "pretrain", [*fixed, *drawn])
    assert config.run_name == "sweep-abc123" and config.arch.halt_max_steps == 24 and config.lr == 2e-4


@pytest.mark.parametrize(("searched", "parameter"), RANGES)
def test_a_range_is_the_same_one_for_wandb(searched, parameter):
    found = sweep_wandb.wandb_sweep(sweep_space.SweepConfig(space={"lr": searched}, metric="m"))
    assert found["parameters"] == {"lr": parameter} and "early_terminate" not in found
    assert found["command"][:3] == ["${env}", "${interpreter}", "${program}"]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ({"seeds": [0, 1]}, "give one seed"),
        ({"score": "best"}, "score=best is not possible"),
        ({"pruner": {"name": "median"}}, "by hyperband only"),
    ],
)
def test_what_wandb_cannot_do_is_refused(key, words):
    config = sweep_space.SweepConfig(space={"lr": {"choices": [0.1, 0.2]}}, metric="m", **key)
    with pytest.raises(UserError, match=words):
        sweep_wandb.wandb_sweep(config)


def test_wandb_itself_reads_that_file_and_makes_that_command(ancestors_data):
    pytest.importorskip("wandb")
    from wandb.sdk.launch.sweeps import utils

    theirs = utils.load_sweep_config(str(ANCESTOR / "ancestor_wandb.yaml"))
    command = utils.create_sweep_command(theirs["command"])
    drawn = {key: {"value": found["values"][0]} for key, found in theirs["parameters"].items()}
    arguments = utils.create_sweep_command_args({"args": drawn})["args_no_hyphens"]
    assert "run_name=sweep-${oc.env:WANDB_RUN_ID}" in command and command[-1] == "${args_no_hyphens}"
    assert arguments == [f"{key}={found['value']}" for key, found in drawn.items()]


@pytest.fixture
def wandbs_problems():
    """Where a sweep breaks the JSON schema of W&B's package `sweeps`. Its Python asks for NumPy below 2."""
    jsonschema = pytest.importorskip("jsonschema")
    package = find_spec("sweeps")
    if package is None:
        pytest.skip("W&B's package sweeps, which holds the schema, is not installed")
    file = Path(package.submodule_search_locations[0]) / "config" / "schema.json"
    validator = jsonschema.Draft7Validator(json.loads(file.read_text()))
    return lambda sweep: [error.message for error in validator.iter_errors(sweep)]


def test_the_ancestors_sweep_keeps_to_wandbs_schema(wandbs_problems):
    theirs = yaml.safe_load((ANCESTOR / "ancestor_wandb.yaml").read_text())
    assert not wandbs_problems(theirs)
    assert wandbs_problems({**theirs, "early_terminate": {"type": "hyperband", "s": 2, "eta": 2}})
    assert wandbs_problems({**theirs, "run_cap": 0}) and wandbs_problems({**theirs, "seeds": [0]})


@pytest.mark.parametrize("searched", [searched for searched, _ in RANGES])
@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_every_range_and_choice_keeps_to_wandbs_schema(searched, sampler, direction, wandbs_problems):
    space = {"lr": searched, "encoder.name": {"choices": ["memory", None, True, 3, 0.5]}}
    config = sweep_space.SweepConfig(space=space, metric="m", sampler=sampler, direction=direction)
    assert not wandbs_problems(sweep_wandb.wandb_sweep(config))


def test_a_grid_keeps_to_wandbs_schema(wandbs_problems):
    config = sweep_space.SweepConfig(space={"lr": {"choices": [0.1, 0.2]}}, metric="m", sampler="grid")
    assert not wandbs_problems(sweep_wandb.wandb_sweep(config))
