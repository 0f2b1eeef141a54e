"""Datasets of generated rules: what is held out stays out, and builds repeat to the byte."""

import hashlib
import itertools

import numpy as np
import pytest

from dataset.build_rules_dataset import build, read_plan
from dataset.generate.rule_families import FAMILIES
from dataset.generate.rule_tasks import Generator, Made
from dataset.generate.rules import apply
from dataset.leaks import find_leaks
from dataset.store import Store
from tests.support.rules import options_for
from tests.support.runs import run
from utils.errors import UserError
from utils.files import read_json


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rules") / "d"
    options = options_for(folder, "--train-tasks", "40", "--test-tasks", "4")
    build(options)
    return Store.load(folder), read_json(folder / "rules.json"), read_plan(options)


def test_held_out_families_and_compositions_never_occur_in_training(built):
    store, rules, plan = built
    families = {
        split: [rule["families"] for rule in rules.values() if rule["split"] == split]
        for split in store.metadata.subsets
    }
    assert {split: len(of) for split, of in families.items()} == store.metadata.subsets
    assert list(families) == ["train", "test_instances", "test_rules", "test_compositions", "test_families"]
    for split in ("train", "test_instances", "test_rules"):
        assert not {name for stages in families[split] for name in stages} & set(plan.held_out_families)
        assert not {tuple(sorted(stages)) for stages in families[split]} & set(plan.held_out_compositions)
    assert {name for stages in families["train"] for name in stages} == set(FAMILIES) - set(
        plan.held_out_families
    )
    assert families["test_compositions"] and {
        tuple(sorted(stages)) for stages in families["test_compositions"]
    } <= set(plan.held_out_compositions)
    assert {tuple(stages) for stages in families["test_families"]} == {
        (name,) for name in plan.held_out_families
    }
    for task_id, rule in rules.items():
        assert (
            task_id.endswith("_" + "+".join(rule["families"]))
            and rule["description"].count(" > ") == len(rule["families"]) - 1
        )


def test_only_seen_rules_are_asked_in_test_instances_and_only_new_ones_elsewhere(built):
    store, rules, plan = built
    tasks = {
        split: [
            store.task(int(i))
            for i in store.tasks_of(
                "test" if split in store.metadata.test_subsets else "train", subsets=[split]
            )
        ]
        for split in store.metadata.subsets
    }
    described = {split: {rules[task.id]["description"] for task in tasks[split]} for split in tasks}
    assert described["test_instances"] <= described["train"]
    generator = Generator(plan)
    made = {
        split: [task.rule for task in generator.make([(split, i, None) for i in range(4)])]
        for split in ("train", "test_rules", "test_compositions")
    }
    keys = {split: {generator.library.key(rule) for rule in of} for split, of in made.items()}
    assert all(generator.held_out(rule) for rule in made["test_rules"]) and not any(
        generator.held_out(rule) for rule in made["train"]
    )
    assert not keys["train"] & (keys["test_rules"] | keys["test_compositions"])
    assert not described["train"] & (
        described["test_rules"] | described["test_compositions"] | described["test_families"]
    )
    tested = [task for split in store.metadata.test_subsets for task in tasks[split]]
    assert find_leaks(tasks["train"], tested, "fewshot") == []


def test_no_training_rule_explains_a_task_of_a_held_out_family_or_composition(built):
    store, rules, plan = built
    generator = Generator(plan)
    for index in store.tasks_of("test", subsets=["test_compositions", "test_families"]):
        task = store.task(int(index))
        inputs = np.stack([pair.input for pair in task.pairs])
        outputs = np.stack([pair.output for pair in task.pairs])
        found = set()
        for stages in (1, 2):
            ((explaining, determined),) = generator.library.explanations(
                [(inputs, outputs)], len(task.demonstrations), stages
            )
            assert determined.all()
            found |= explaining
        assert tuple(rules[task.id]["families"]) in found and not found & generator.trained


def test_a_rule_and_its_equal_by_another_name_are_on_the_same_side(tmp_path):
    families = ("geometry", "gravity", "shift")
    generator = Generator(read_plan(options_for(tmp_path, "--families", *families)))
    sides: dict[bytes, set[bool]] = {}
    for pair in itertools.permutations(families, 2):
        for rule in generator.library.rules(pair):
            sides.setdefault(generator.library.key(rule), set()).add(generator.held_out(rule))
    assert len(sides) < sum(
        len(generator.library.rules(pair)) for pair in itertools.permutations(families, 2)
    )
    assert all(len(side) == 1 for side in sides.values()) and {True} in sides.values()


def test_a_build_is_the_same_bytes_for_any_hash_seed_and_number_of_workers(tmp_path):
    digests = set()
    for hash_seed, workers in (("1", "1"), ("2", "3")):
        folder = tmp_path / hash_seed
        arguments = (
            "--families geometry recolour fill --held-out-families fill --train-tasks 9 --test-tasks 3"
        )
        arguments += f" --held-out-compositions recolour+geometry --workers {workers}"
        done = run(
            *("-m", "dataset.build_rules_dataset", "--output-dir", str(folder), *arguments.split()),
            env={"PYTHONHASHSEED": hash_seed},
        )
        assert done.returncode == 0, done.stderr
        digests.add(tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())))
    assert len(digests) == 1


def test_a_limited_number_of_rules_is_shared_evenly(tmp_path):
    arguments = (
        "--families",
        "recolour",
        "shift",
        "--stages",
        "1",
        "--rules",
        "8",
        "--train-tasks",
        "40",
        "--test-tasks",
        "6",
    )
    metadata, _ = build(options_for(tmp_path / "d", *arguments))
    assert metadata.test_subsets == ["test_instances", "test_rules"]
    rules = read_json(tmp_path / "d" / "rules.json").values()
    counts = {}
    for rule in rules:
        counts.setdefault(rule["split"], []).append(rule["description"])
    assert len(set(counts["train"])) == 8 and set(counts["test_instances"]) <= set(counts["train"])
    assert max(map(counts["train"].count, counts["train"])) == 5 and not set(counts["test_rules"]) & set(
        counts["train"]
    )


def test_a_weighted_family_trains_more_often_and_is_asked_no_more(tmp_path):
    arguments = ("--families", "geometry", "recolour", "shift", "--train-tasks", "120", "--test-tasks", "60")
    for name, more in (("plain", ()), ("weighted", ("--weights", "geometry=4"))):
        build(options_for(tmp_path / name, *arguments, *more))
    plain, weighted = (
        [*read_json(tmp_path / name / "rules.json").values()] for name in ("plain", "weighted")
    )

    def share(rules, split, wanted=("geometry",)):
        families = [tuple(rule["families"]) for rule in rules if rule["split"] == split]
        return sum(names == wanted for names in families if len(names) == 1) / sum(
            len(names) == 1 for names in families
        )

    assert 0.3 < share(plain, "train") < 0.37 and 0.63 < share(weighted, "train") < 0.7
    assert share(weighted, "test_instances") < 0.5
    assert [rule for rule in plain if rule["split"] == "test_rules"] == [
        rule for rule in weighted if rule["split"] == "test_rules"
    ]
    for wrong in ("geometry", "count=2", "shift=0"):
        with pytest.raises(UserError, match=f"--weights: '{wrong}' is not FAMILY=N"):
            build(options_for(tmp_path / "d", *arguments, "--weights", wrong))
    with pytest.raises(UserError, match="--weights .* with --rules .*: leave one out"):
        read_plan(options_for(tmp_path / "x", *arguments, "--weights", "geometry=4", "--rules", "8"))


@pytest.mark.parametrize(
    "families, stages",
    [([name for name in FAMILIES if name != "fill"], "1"), (["geometry", "gravity", "recolour"], "2")],
)
def test_one_dimensional_tasks(families, stages, tmp_path):
    size = ("--rows", "1", "1", "--columns", "8", "12", "--stages", stages)
    build(
        options_for(
            tmp_path / "d", "--families", *families, *size, "--train-tasks", "20", "--test-tasks", "2"
        )
    )
    store = Store.load(tmp_path / "d")
    assert set(store.shapes[:, 0]) == {1} and 8 <= store.shapes[:, 1].min() < store.shapes[:, 1].max() <= 12
    made = [rule["families"] for rule in read_json(tmp_path / "d" / "rules.json").values()]
    assert {name for names in made for name in names} == set(families) and max(map(len, made)) == int(stages)


def test_generated_permutations_are_determined_new_and_bounded(tmp_path):
    arguments = (
        "--families",
        "colour_permutation",
        "--stages",
        "1",
        "--test-splits",
        "test_rules",
        "--demonstrations",
        "1",
    )
    size = ("--rows", "1", "2", "--columns", "2", "3", "--train-tasks", "300", "--test-tasks", "20")
    metadata, _ = build(options_for(tmp_path / "d", *arguments, *size))
    assert metadata.test_subsets == ["test_rules"]
    store = Store.load(tmp_path / "d")
    train, test = ([store.task(int(t)) for t in store.tasks_of(split)] for split in ("train", "test"))
    assert find_leaks(train, test, "fewshot") == [] and len(test) == 20 and 0 < len(train) < 300
    for task in train + test:
        shown = {0} | {int(c) for pair in task.demonstrations for c in np.unique(pair.input)}
        assert set(np.unique(task.queries[0].input).tolist()) <= shown


def test_a_folder_that_is_not_a_dataset_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("keep me")
    monkeypatch.setattr("dataset.build_rules_dataset.Generator", None)
    with pytest.raises(UserError, match="was not written by this command"):
        build(options_for(tmp_path, "--families", "shift"))


def test_what_another_dataset_trains_is_not_asked_as_new(tmp_path):
    size = ("--stages", "1", "--rows", "4", "4", "--columns", "4", "4", "--test-tasks", "12")
    build(options_for(tmp_path / "easy", "--families", "gravity", "shift", *size, "--train-tasks", "60"))
    hard = (
        "--families",
        "gravity",
        "count",
        "shift",
        "recolour",
        "--held-out-families",
        "gravity",
        "count",
        *size,
        "--train-tasks",
        "40",
    )
    without, _ = build(options_for(tmp_path / "without", *hard))
    metadata, _ = build(options_for(tmp_path / "hard", *hard, "--exclude", str(tmp_path / "easy")))
    before, easy, store = (Store.load(tmp_path / name) for name in ("without", "easy", "hard"))
    rules = read_json(tmp_path / "hard" / "rules.json")
    assert {
        rules[store.task_ids[i]]["families"][0] for i in store.tasks_of("test", subsets=["test_families"])
    } == {"count"}
    assert "gravity" in {name.split("_", 1)[1] for name in metadata.left_out["known_elsewhere"]}
    trained = {
        rule["description"]
        for rule in read_json(tmp_path / "easy" / "rules.json").values()
        if rule["split"] == "train"
    }
    for split in {"test_rules", "test_families"} & set(metadata.test_subsets):
        assert not trained & {
            rules[store.task_ids[i]]["description"] for i in store.tasks_of("test", subsets=[split])
        }
    easy_pairs, asked = (
        {
            pair
            for i in data.tasks_of(split)
            for pair in data.pair_fingerprint[data.task_pairs[i] : data.task_pairs[i + 1]].tolist()
        }
        for data, split in ((easy, "train"), (store, "test"))
    )
    assert not easy_pairs & asked
    assert [store.task_ids[i] for i in store.tasks_of("train")] == [
        before.task_ids[i] for i in before.tasks_of("train")
    ]
    assert (
        metadata.subsets["train"] == without.subsets["train"]
        and metadata.subsets["test_families"] < without.subsets["test_families"]
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--rows", "0", "5"), "--rows needs 1 <= MIN <= MAX <= 30, found 0 5"),
        (("--columns", "7", "5"), "--columns needs 1 <= MIN <= MAX <= 30, found 7 5"),
        (("--demonstrations", "0"), "--demonstrations must be at least 1"),
        (("--rules", "0"), "--rules must be at least 1"),
        (("--seed", "-1"), "--seed must be >= 0"),
        (("--families", "gravity", "--held-out-families", "gravity"), "leaves no family for training"),
        (("--families", "gravity", "--held-out-families", "count"), "count is not among --families"),
        (
            ("--held-out-compositions", "gravity+recolour"),
            "'gravity\\+recolour' is not FAMILY\\+FAMILY of two training families",
        ),
        (("--held-out-compositions", "recolour"), "'recolour' is not FAMILY"),
        (("--stages", "1", "--held-out-compositions", "recolour+shift"), "needs --stages 2"),
        (
            ("--families", "gravity", "--stages", "1", "--test-splits", "test_families"),
            "--test-splits test_families: .* no rules for it",
        ),
        (
            ("--families", "geometry", "--stages", "1", "--rules", "9", "--train-tasks", "9"),
            "--rules 9: found only 7 different rules",
        ),
        (
            ("--rows", "1", "1", "--columns", "1", "1", "--families", "gravity"),
            "family gravity has no rule of its own on 1..1 x 1..1 grids",
        ),
        (
            ("--rows", "1", "1", "--columns", "1", "1", "--families", "colour_permutation", "--stages", "1"),
            "colour_permutation on 1 x 1 grids: 3 demonstrations did not determine the answer in 1000 draws",
        ),
    ],
)
def test_what_cannot_be_generated_is_one_message(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        build(options_for(tmp_path / "d", *arguments))
    assert not any(tmp_path.iterdir())


def test_a_task_is_the_same_whichever_tasks_are_made_beside_it(tmp_path):
    generator = Generator(read_plan(options_for(tmp_path)))
    jobs = [
        (split, number, None) for split in ("train", "test_rules", "test_families") for number in range(5)
    ]
    together = generator.make(jobs)
    for job, task in list(zip(jobs, together, strict=True))[::3]:
        (alone,) = generator.make([job])
        assert (alone.rule, alone.draws) == (task.rule, task.draws)
        for pair, other in zip(
            (*alone.demonstrations, alone.query), (*task.demonstrations, task.query), strict=True
        ):
            assert np.array_equal(pair.input, other.input) and np.array_equal(pair.output, other.output)


def test_a_generated_task_needs_all_its_stages(tmp_path):
    generator = Generator(read_plan(options_for(tmp_path)))
    made: list[Made] = generator.make([("train", number, None) for number in range(1, 8, 2)])
    for task in made:
        assert len(task.rule) == 2
        inputs = np.stack([pair.input for pair in (*task.demonstrations, task.query)])
        outputs = np.stack([pair.output for pair in (*task.demonstrations, task.query)])
        assert generator.library.explanations([(inputs, outputs)], 3, 1)[0][0] == set()
        assert np.array_equal(apply(task.rule, inputs), outputs) and not np.array_equal(
            inputs[-1], outputs[-1]
        )
