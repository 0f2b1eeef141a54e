"""The commands: they run by module and by path, help shows an example, old names say where they went."""

import ast
import re
import runpy
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from config import compose
from tests.support.runs import ROOT, run
from tests.support.tree import Module, product

ROOMS = ("tools", "experiments", "benchmarks", "dataset")
GUARD = """
if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])
"""
MOVED = {
    "dataset.info": "tools.info",
    "evaluation.compare": "tools.compare",
    "experiments.doctor": "tools.doctor",
    "experiments.exp1": "experiments.votes_against_one_view",
    "experiments.find_batch_size": "tools.find_batch_size",
    "experiments.publish": "tools.publish",
    "experiments.published": "tools.published",
    "experiments.timeline": "tools.timeline",
    "models.summary": "tools.summary",
    "utils.doctor": "tools.doctor",
}


def commands() -> dict[str, Module]:
    """The modules of the commands' folders that run as a program and import something of the project."""
    files = product()
    return {
        name: module
        for name, module in files.items()
        if module.room in ROOMS and is_program(module) and module.imports(set(files))
    }


def is_program(module: Module) -> bool:
    return any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for node in module.tree.body
    )


def path_of(name: str) -> Path:
    return ROOT / f"{name.replace('.', '/')}.py"


@pytest.mark.parametrize("name", commands())
def test_a_command_looks_for_imports_above_its_folder_and_shows_an_example(name):
    module = commands()[name]
    before, guard, _ = module.text.partition(GUARD)
    first = min(line for line, _ in module.imports(set(product())))
    assert guard, "called by its path, this command would not find the project's modules"
    assert before.count("\n") < first, "the guard comes too late"
    assert f"python -m {name} " in ast.get_docstring(module.tree), "its --help would show no example"


def launched() -> dict[str, str]:
    """The commands that Hydra reads the settings of, by how they are called, with their help."""
    found = {
        name: module for name, module in product().items() if re.search(r"^    launch\(", module.text, re.M)
    }
    return {
        f"-m {name.removesuffix('.__main__')}" if "." in name else f"{name}.py": ast.get_docstring(
            module.tree
        )
        for name, module in found.items()
    }


@pytest.mark.parametrize("called", launched())
def test_the_help_of_a_command_with_settings_shows_an_example_whose_settings_exist(called):
    examples = re.findall(rf"^    python {re.escape(called)} (.*)$", launched()[called], re.MULTILINE)
    assert examples
    config_name = {"-m tools.summary": "pretrain", "pretrain_etrm.py": "pretrain", "-m baselines.llm": "llm"}
    name = config_name.get(called, called.removesuffix(".py").rpartition(".")[2])
    for example in examples:
        assert compose.compose(name, [word for word in example.split() if "=" in word])


@pytest.mark.parametrize("name", commands())
def test_everything_that_a_command_imports_exists(name):
    assert import_module(name).main


@pytest.mark.parametrize("name", ["experiments.check", "tools.publish", "dataset.build_maze_dataset"])
def test_a_command_runs_by_its_path_from_any_folder(name, tmp_path):
    shows_an_example(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", commands())
def test_every_command_runs_by_its_path_from_any_folder(name, tmp_path):
    shows_an_example(name, tmp_path)


def shows_an_example(name: str, folder: Path) -> None:
    done = run(str(path_of(name)), "--help", cwd=folder, env={"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    assert re.search(rf"(?<!usage: )python -m {name} ", done.stdout)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_says_where_the_command_went(old, capsys):
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(old, run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: this command has moved; use python -m {MOVED[old]}\n"
    assert find_spec(MOVED[old]) is not None and MOVED[old] in commands()


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_says_so_by_its_path_too(old, tmp_path):
    done = run(str(path_of(old)), cwd=tmp_path, env={"PYTHONPATH": ""})
    assert done.returncode == 2 and done.stderr.startswith("error: this command has moved; use python -m")


def test_no_old_name_is_left_out():
    moved = {name for name, module in product().items() if "this command has moved" in module.text}
    assert moved == MOVED.keys()
