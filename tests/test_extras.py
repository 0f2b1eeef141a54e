"""A package that is missing: each command says in one line which extra installs it."""

import re
import sys

import pytest

import evaluate
import predict
import pretrain_etrm
from baselines.llm import __main__ as llm
from tests.support.runs import ROOT, arguments_for, called
from tools import checkpoint, publish, published, sweep, timeline
from utils.extras import EXTRAS, install

HUB = "hub:someone/tiny@v1"
COMMANDS = {
    "baselines.llm": (llm.main, ["action=train"], "transformers"),
    "tools.sweep": (sweep.main, ["ancestor"], "optuna"),
    "tools.sweep --table": (sweep.main, ["ancestor", "--table"], "optuna"),
    "tools.publish": (publish.main, ["runs/x", "hub:someone/tiny"], "huggingface_hub"),
    "tools.published": (published.main, [HUB], "huggingface_hub"),
    "tools.checkpoint": (checkpoint.main, ["average", HUB, HUB, "--output", "x"], "huggingface_hub"),
    "evaluate.py": (evaluate.main, [f"checkpoint={HUB}", "device=cpu"], "huggingface_hub"),
    "predict.py": (predict.main, [f"checkpoint={HUB}", "task=task.json", "device=cpu"], "huggingface_hub"),
    "tools.timeline": (timeline.main, [f"checkpoint={HUB}", "task=task.json"], "huggingface_hub"),
    "pretrain_etrm.py, W&B": (pretrain_etrm.main, ["logging.wandb=offline"], "wandb"),
    "pretrain_etrm.py, TensorBoard": (pretrain_etrm.main, ["logging.tensorboard=true"], "tensorboard"),
    "pretrain_etrm.py, torchjd": (
        pretrain_etrm.main,
        ["objective.split=instance", "objective.aggregator=mgda"],
        "torchjd",
    ),
    "pretrain_etrm.py, hub": (pretrain_etrm.main, [f"load_pretrained_decoder={HUB}"], "huggingface_hub"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_whose_package_is_missing_names_the_extra_in_one_line(
    name, fewshot, tmp_path, monkeypatch, capsys
):
    main, arguments, package = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "task.json").write_text(
        '{"train": [{"input": [[1]], "output": [[2]]}], "test": [{"input": [[1]]}]}'
    )
    # All that was imported of it would be found.
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    if main is pretrain_etrm.main:
        arguments = [*arguments_for(fewshot, tmp_path / "runs", "train_steps=1")[1:], *arguments]
    with pytest.raises(SystemExit) as ended:
        called(monkeypatch, main, *arguments)
    *before, said = capsys.readouterr().err.splitlines()
    assert (
        ended.value.code == 2 and said.startswith("error: ") and package in said and install(package) in said
    )
    assert not before or package == "torchjd"  # a run has begun when it first combines gradients


def test_every_extra_that_is_named_can_be_installed():
    known = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert set(EXTRAS.values()) <= known
