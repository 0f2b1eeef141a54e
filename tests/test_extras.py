"""A package that is missing: each command says in one line which extra installs it."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch

import evaluate
import predict
import pretrain_etrm
from baselines.llm import __main__ as llm
from baselines.llm import tuning
from baselines.llm.settings import LlmConfig
from config import compose
from tests.support.runs import ROOT, arguments_for, called
from tools import checkpoint, modal_app, publish, published, sweep, timeline
from utils.errors import UserError
from utils.extras import EXTRAS, install

HUB = "hub:someone/tiny@v1"
COMMANDS = {
    "baselines.llm": (llm.main, ["action=train"], "transformers"),
    "tools.sweep": (sweep.main, ["ancestor"], "optuna"),
    "tools.sweep --table": (sweep.main, ["ancestor", "--table"], "optuna"),
    "tools.sweep --launcher slurm": (sweep.main, ["ancestor", "--launcher", "slurm"], "submitit"),
    "tools.modal_app": (modal_app.main, ["train"], "modal"),
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


@pytest.mark.parametrize("package", ["transformers", "peft"])
def test_a_language_model_asks_for_each_of_its_packages(package, monkeypatch):
    monkeypatch.setattr("utils.extras.find_spec", lambda name: None if name == package else object())
    with pytest.raises(UserError, match=f"needs {package}, which is not installed: .*\\[llm\\]"):
        tuning.check_installed()


def test_weights_of_4_bits_ask_for_their_package(monkeypatch):
    classes = ("AutoModelForCausalLM", "AutoTokenizer", "BitsAndBytesConfig", "GenerationConfig")
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(**dict.fromkeys(classes)))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(tuning, "choose_device", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(tuning, "faster_dtype", lambda _: ("float32", ""))
    config = compose.load(LlmConfig, "llm", ["action=train", "data=arc1", "output_dir=x", "quantize=4bit"])
    with pytest.raises(UserError, match=r"needs bitsandbytes, .*\[qlora\]', or quantize=none"):
        tuning.load(config)


NOT_IMPORTED = {"dev", "docs"}  # their programs are run by make and by hooks
NOT_MISSED = {"fused"}  # without it AdamATan2 runs in plain PyTorch


def test_every_extra_is_named_to_whom_lacks_it_and_each_of_its_packages_is_tested():
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    assert extras == set(EXTRAS.values()) | NOT_IMPORTED | NOT_MISSED
    assert set(EXTRAS) == {package for _, _, package in COMMANDS.values()} | {"peft", "bitsandbytes"}
