"""Documents do not rot: their commands run small, their options exist, the modules they name are there."""

import functools
import importlib
import itertools
import re
import shutil
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from config.compose import CONFIG_DIR
from tests.support.documents import Block, Command, blocks_of, commands_in, modules_named_in, settings_in
from tests.support.parsing import Parsed, call, stop_when_parsed
from tests.support.runs import ROOT
from tests.support.tree import modules

STORIES = [
    ROOT / "README.md",
    ROOT / "docs" / "tutorial.md",
]  # each is read from top to bottom, and so is run
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STEPS = 2
TRAINED = [
    "device=cpu",
    "compile=false",
    "logging.progress=false",
    f"train_steps={STEPS}",
    "global_batch_size=2",
]
TRAINED += ["arch.hidden_size=32", "arch.num_heads=2", "arch.halt_max_steps=1", "arch.forward_dtype=float32"]
ASKED = ["device=cpu", "num_views=1", "batch_size=8"]
SMALL = {  # by the last part of a program's name: what makes it small, and wins over what the document says
    "pretrain_etrm": TRAINED,
    "doctor": TRAINED,
    "evaluate": [*ASKED, "controls=[]", "max_eval_groups=2"],
    "predict": ASKED,
    "timeline": ASKED,
    "build_arc_dataset": ["--max-tasks", "4", "--max-grid-size", "10"],
    "build_rules_dataset": ["--train-tasks", "8", "--test-tasks", "2", "--workers", "1"],
    "build_sudoku_dataset": ["--train-puzzles", "8", "--test-puzzles", "2", "--workers", "1"],
    "build_maze_dataset": ["--train-puzzles", "8", "--test-puzzles", "2", "--workers", "1"],
}
ADAPTED = ["protocol.steps=1"]


def last_part(program: str) -> str:
    return program.rsplit(".", 1)[-1]


def small(command: Command, extra: tuple[str, ...] = ()) -> list[str]:
    """The arguments of a command with those that make it small instead of the document's own."""
    added = [*SMALL.get(last_part(command.program), []), *extra]
    if any(re.match(r"protocol=(latent_search|test_time_training)$", word) for word in command.arguments):
        added += ADAPTED
    keys = {word.split("=")[0] for word in added if "=" in word}
    kept = [word for word in command.arguments if word.split("=")[0] not in keys]
    return [re.sub(r"\bstep_\d+", f"step_{STEPS}", word) for word in kept] + added


def run_block(block: Block, monkeypatch, capsys) -> None:
    for command in block.commands:
        if command.words[0] == "cat":
            Path(command.words[1]).write_text(command.below)
        elif command.program and command.words[0] == "python":
            try:
                call(command.program, small(command, block.words), monkeypatch)
            except SystemExit as end:
                said = capsys.readouterr()
                pytest.fail(
                    f"{block.where}: {' '.join(command.words)}: exit {end.code}\n{said.out}\n{said.err}"
                )


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.name)
def test_the_commands_of_a_document_run_one_after_the_other(path, tmp_path, monkeypatch, capsys):
    shutil.copytree(
        ROOT / "pretrained", tmp_path / "pretrained", ignore=shutil.ignore_patterns("evaluations")
    )
    shutil.copy(ROOT / "pretrained" / "example.json", tmp_path / "task.json")
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in blocks_of(path) if block.task == "run"]
    assert blocks
    for block in blocks:
        run_block(block, monkeypatch, capsys)


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.name)
def test_every_block_with_commands_says_whether_it_is_run(path):
    unmarked = [block.where for block in blocks_of(path) if block.needs_a_mark and block.task is None]
    assert not unmarked, "put <!-- test: run -->, <!-- test: check --> or <!-- test: skip, REASON --> above"


def alternatives(words: list[str]) -> list[list[str]]:
    """Every way to read `a|b|c` and `{a,b,c}` in a command."""
    choices = []
    for word in words:
        start, brace, inner = (
            word.partition("{") if word.endswith("}") and "$" not in word else (word, "", "")
        )
        key, equals, value = word.rpartition("=")
        if brace:
            choices.append([start + choice for choice in inner[:-1].split(",")])
        else:
            choices.append([key + equals + choice for choice in value.split("|")])
    return [list(chosen) for chosen in itertools.product(*choices)]


@pytest.fixture
def only_parsed(monkeypatch):
    """Programs of the project stop as soon as their options are read."""
    stop_when_parsed(monkeypatch)


def problem_with(command: Command, in_text: bool, monkeypatch, capsys) -> str | None:
    """What is wrong with the options of a command; a command in the text may leave out what it needs."""
    left_out = ("-m", "--multirun", "--cfg", "job", "key=value", "")
    plain = [word for word in command.arguments if word.strip("[].") not in left_out]
    if {"-m", "--multirun"} & set(command.arguments):  # a sweep's values, each as a run of it gets it
        plain = [word.replace(",", "|") for word in plain]
    for arguments in alternatives(plain):
        try:
            call(command.program, arguments, monkeypatch)
        except Parsed:
            continue
        except SystemExit as end:
            said = end.code if isinstance(end.code, str) else capsys.readouterr().err
            error = said.strip().splitlines()[-1]
            if not (in_text and "required" in error):
                return f"{command.where}: {' '.join(arguments)}: {error}"
        else:
            return f"{command.where}: {' '.join(command.words)} was run"
    return None


def is_ours(command: Command) -> bool:
    """Is a program of the project run, with options? A name alone is no command line."""
    name = command.program
    return bool(name in modules() and command.arguments and not name.startswith("tests."))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_options_of_every_documented_command_exist(path, only_parsed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    in_blocks = {command for block in blocks_of(path) for command in block.commands}
    commands = dict.fromkeys(filter(is_ours, commands_in(path)))
    problems = [problem_with(command, command not in in_blocks, monkeypatch, capsys) for command in commands]
    assert not any(problems), "\n".join(filter(None, problems))


def test_every_module_that_a_document_runs_exists():
    named = [named for path in DOCUMENTS for named in modules_named_in(path)]
    missing = [f"{where}: {name}" for where, name in named if name not in modules() and not installed(name)]
    assert len(named) > 20 and not missing, "\n".join(missing)


@functools.cache
def known_settings() -> set[str]:
    """Every key of every YAML file, alone and behind its group and section."""
    found = {folder.name for folder in CONFIG_DIR.iterdir() if folder.is_dir()}
    for file in CONFIG_DIR.rglob("*.yaml"):
        group = "" if file.parent == CONFIG_DIR else file.relative_to(CONFIG_DIR).parts[0]
        waiting = [(group, OmegaConf.load(file))]
        while waiting:
            above, section = waiting.pop()
            for key, value in section.items_ex(resolve=False):
                name = f"{above}.{key}".lstrip(".")
                found |= {name, str(key)}
                waiting += [(name, value)] if isinstance(value, DictConfig) and not value._is_none() else []
    return found


def test_every_setting_that_a_document_gives_a_value_exists():
    """The migration table names the ancestors' settings, too."""
    given = [setting for path in DOCUMENTS if path.name != "ancestors.md" for setting in settings_in(path)]
    missing = [f"{where}: {key}" for where, key in given if key not in known_settings()]
    assert len(given) > 100 and not missing, "\n".join(missing)


def installed(name: str) -> bool:
    root = name.split(".")[0]
    return (
        all(module.room != root for module in modules().values())
        and importlib.util.find_spec(root) is not None
    )


DOCUMENT = """
<!-- test: skip, needs a GPU -->
```bash
python pretrain_etrm.py arch.hidden_sise=8
```
<!-- test: run num_views=3 -->
```
$ python predict.py checkpoint=x \\
    task=NAME  # why
not a command
$ cat a.json
{}
```
```
some output
```
1. in a list:
   ```
   torchrun --nproc-per-node 4 -m tools.doctor data=arc1
   ```
With `arch.hidden_sise=8 lr=1` or `HOME=/x`,
then `python -m nowhere.at_all x`, `python -m dataset.npy imprt`, `python evaluate.py protocol=auto|latent`.
"""


def test_commands_marks_and_mistakes_are_found_in_a_document(tmp_path, only_parsed, monkeypatch, capsys):
    path = tmp_path / "d.md"
    path.write_text(DOCUMENT)
    blocks = blocks_of(path)
    assert [(block.task, block.words, block.needs_a_mark) for block in blocks] == [
        ("skip", (), True), ("run", ("num_views=3",), True), (None, (), False), (None, (), True),
    ]  # fmt: skip
    predict, shown = blocks[1].commands
    assert predict.program == "predict" and predict.arguments == ["checkpoint=x", "task=NAME"]
    assert small(predict, blocks[1].words) == ["checkpoint=x", "task=NAME", *ASKED, "num_views=3"]
    assert shown.words == ("cat", "a.json") and shown.below == "{}\n"
    assert [(c.program, c.arguments) for c in blocks[3].commands] == [("tools.doctor", ["data=arc1"])]
    problems = [
        problem_with(c, False, monkeypatch, capsys) for c in commands_in(path) if c.program in modules()
    ]
    found = [problem for problem in problems if problem]
    assert len(found) == 3 and "did you mean 'arch.hidden_size'" in found[0]
    assert "invalid choice: 'imprt'" in found[1] and "there is no such protocol" in found[2]
    assert ("d.md:22", "nowhere.at_all") in modules_named_in(path)
    assert settings_in(path) == [("d.md:21", "arch.hidden_sise"), ("d.md:21", "lr")]
    known = known_settings()
    assert {"lr", "arch.hidden_size"} <= known and not {"arch.hidden_sise", "arch.lr"} & known
    path.write_text("<!-- test: skip, -->\n```\nmake demo\n```\n")
    with pytest.raises(AssertionError, match="says why"):
        blocks_of(path)
