"""The rule families, the check that demonstrations determine the answer, and the splits of a generated dataset."""

import hashlib
import itertools

import numpy as np
import pytest

from dataset import store as datasets
from dataset.build_rules_dataset import build, known_elsewhere, parse_arguments, read_plan
from dataset.leaks import find_leaks
from dataset.rule_families import FAMILIES, may_become
from dataset.rule_tasks import Generator, Made
from dataset.rules import Library, Rule, apply, describe, draw_inputs, stages_of
from dataset.task import Pair
from tests.conftest import run
from utils.errors import UserError
from utils.files import read_json


def grid(text: str) -> np.ndarray:
    """`120/000` as a grid."""
    return np.array([[int(cell) for cell in row] for row in text.split("/")], np.uint8)


def options_for(folder, *arguments: str):
    return parse_arguments(["--output-dir", str(folder), *arguments])


@pytest.mark.parametrize(
    "name, values, before, after",
    [
        ("geometry", (1,), "12/00", "20/10"),
        ("geometry", (6,), "123/000", "10/20/30"),
        ("colour_permutation", (0, 2, 3, 4, 5, 6, 7, 8, 9, 1), "019/120", "021/230"),
        ("recolour", (1, 3), "12/31", "32/33"),
        ("gravity", (1,), "120/003/010", "000/020/113"),
        ("gravity", (0,), "1020/0300", "0012/0003"),
        ("gravity", (3,), "00/01/20", "21/00/00"),
        ("shift", (1, -1), "12/30/00", "00/21/03"),
        ("fill", (0, 4), "1110/1010/1100", "1110/1410/1100"),
        ("fill", (0, 4), "0110/1010/0100", "0110/1410/0100"),
        ("fill", (1, 2), "020/100/002", "222/100/222"),
        ("fill", (2, 2), "020/100/010", "020/120/010"),
        ("move", (1, 0, 0), "1000/1003/2000", "0010/0013/2000"),
        ("move", (1, 0, 1), "1000/1003/2000", "0100/0103/2000"),
        ("move", (1, 1, 0), "11/02/00", "11/02/00"),
        ("move", (1, 3, 0), "30/00/11", "30/11/00"),
        ("count", (0, 0), "1120/3000", "1100/0000"),
        ("count", (1, 0), "1120/3000", "0020/3000"),
        ("count", (2, 0), "1120/3000", "1110/1000"),
        ("count", (3, 0), "1122/3000", "3333/3000"),
        ("count", (4, 1), "011/101/200", "111/100/000"),
        ("pattern", (5, 1, 2, 3, 4, 6, 7, 8, 9, 0), "0000/0050/0000/1000", "0123/0467/0890/1000"),
        ("pattern", (5, 1, 2, 3, 4, 6, 7, 8, 9, 0), "500/000/001", "670/900/001"),
        ("conditional", (0, 1, 2), "12/00", "21/00"),
        ("conditional", (0, 1, 2), "02/00", "00/02"),
        ("conditional", (1, 1, 2), "102/010/010", "010/010/102"),
        ("conditional", (1, 1, 2), "100/110/002", "001/011/200"),
        ("conditional", (2, 0, 1), "12/30", "03/21"),
        ("large_objects", (1, 9), "110/020/003", "990/020/003"),
        ("large_objects", (2, 9), "1102/0102/3000", "9902/0902/3000"),
    ],
)
def test_a_family_does_what_its_name_says(name, values, before, after):
    assert np.array_equal(apply(((name, values),), grid(before)[None])[0], grid(after)), describe(((name, values),))


def test_where_patterns_overlap_the_later_marker_in_reading_order_is_on_top():
    rule = (("pattern", (5, 1, 1, 1, 1, 1, 1, 1, 1, 2)),)
    assert np.array_equal(apply(rule, grid("00000/05050/00000")[None])[0], grid("11111/11111/11112"))


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(list(FAMILIES), 2, (4, 5), (4, 5))


def random_rules(library: Library, name: str, count: int) -> list[Rule]:
    rng = np.random.default_rng([0, *name.encode()])
    return [library.draw(rng, (name,)) for _ in range(count)]


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_closed_under_recolouring_and_keep_what_they_claim(name, library):
    """The check leans on both: a permutation is fitted as last stage only, absent colours stand for one another, images are skipped."""
    rng = np.random.default_rng(1)
    permutation = np.concatenate([[0], rng.permutation(np.arange(1, 10))]).astype(np.uint8)
    family, probes = FAMILIES[name], library.probes[-1]
    for rule in random_rules(library, name, 10):
        values = np.array(rule[0][1])
        colours = slice(None) if family.fit else list(family.colours)
        values[colours] = permutation[values[colours]]
        if name == "colour_permutation":
            values = permutation[np.array(rule[0][1])][np.argsort(permutation)]
        assert np.array_equal(permutation[apply(rule, probes)], apply(((name, tuple(values)),), permutation[probes]))
        images, answers = probes, apply(rule, probes)
        for image, answer in zip(images[::5], answers[::5], strict=True):
            may = may_become(image[None], answer[None])
            assert all(may[kept].all() for kept in family.keeps)


def random_case(rng: np.random.Generator, library: Library, rule: Rule, demonstrations: int, queries: int, shape: tuple[int, int]):
    inputs = draw_inputs(rng, rule, demonstrations, queries, shape)
    return inputs, np.ascontiguousarray(apply(rule, inputs))


def test_the_check_agrees_with_trying_every_rule():
    families = ["geometry", "gravity", "recolour", "conditional"]
    library = Library(families, 2, (3, 3), (3, 3))
    every = {
        1: [rule for name in families for rule in library.rules((name,))],
        2: [rule for pair in itertools.product(families, repeat=2) for rule in library.rules(pair)],
    }
    rng = np.random.default_rng(3)
    verdicts = set()
    for stages in (("geometry",), ("recolour",), ("conditional",), ("recolour", "gravity"), ("gravity", "geometry")):
        inputs, outputs = random_case(rng, library, library.draw(rng, stages), 2, 6, (3, 3))
        for count, rules in every.items():
            fitting = [rule for rule in rules if np.array_equal(apply(rule, inputs[:2]), outputs[:2])]
            alike = np.all([(apply(rule, inputs[2:]) == outputs[2:]).all(axis=(1, 2)) for rule in fitting] or [np.ones(6, bool)], axis=0)
            ((found, determined),) = library.explanations([(inputs, outputs)], 2, count)
            assert found == {stages_of(rule) for rule in fitting} and determined.tolist() == alike.tolist()
            verdicts.update(alike.tolist())
    assert verdicts == {True, False}


def test_the_fit_of_a_colour_permutation_agrees_with_trying_all_of_them():
    every = np.array([[0, *order] for order in itertools.permutations(range(1, 10))], np.uint8)
    library = Library(["gravity", "colour_permutation"], 2, (2, 3), (3, 4))
    rng = np.random.default_rng(5)
    seen = set()
    for _ in range(6):
        inputs, outputs = random_case(rng, library, library.draw(rng, ("gravity", "colour_permutation")), 1, 4, (2, 4))
        inputs[3:] = rng.integers(0, 10, inputs[3:].shape)  # these may show a colour that the demonstration does not
        outputs[3:] = rng.integers(0, 10, outputs[3:].shape)
        fits, alike = False, np.ones(4, bool)
        for stage in library.rules(("gravity",)):
            image = apply(stage, inputs)
            answers = every[(every[:, image[0]] == outputs[0]).all(axis=(1, 2))][:, image[1:]]
            fits |= bool(len(answers))
            alike &= (answers == outputs[1:]).all(axis=(0, 2, 3))
        ((found, determined),) = library.explanations([(inputs, outputs)], 1, 2)
        assert (("gravity", "colour_permutation") in found) == fits
        if not any(stages[-1] == "gravity" for stages in found):
            assert determined.tolist() == alike.tolist()
            seen.update(alike.tolist())
    assert seen == {True, False}


def test_the_fit_of_a_pattern_agrees_with_painting_cell_by_cell():
    library = Library(["pattern"], 1, (4, 4), (5, 5))
    rng = np.random.default_rng(7)
    seen = set()
    for case in range(40):
        inputs, outputs = random_case(rng, library, library.draw(rng, ("pattern",)), 2, 3, (4, 5))
        if case % 4 == 0:
            outputs[rng.integers(5), rng.integers(4), rng.integers(5)] = 1
        fits, alike = False, np.ones(3, bool)
        for marker in range(1, 10):
            cells: dict[tuple[int, int], set[int]] = {}
            right = []
            for number, (before, after) in enumerate(zip(inputs, outputs, strict=True)):
                cover = {}
                for r, c in np.argwhere(before == marker).tolist():
                    cover.update({(r + i, c + j): (i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)})
                right.append(all((r, c) in cover or before[r, c] == after[r, c] for r, c in np.ndindex(before.shape)))
                covered = [(part, int(after[cell])) for cell, part in cover.items() if 0 <= cell[0] < 4 and 0 <= cell[1] < 5]
                if number < 2:
                    for part, colour in covered:
                        cells.setdefault(part, set()).add(colour)
                else:
                    right[-1] &= all(cells.get(part) == {colour} for part, colour in covered)
            if all(right[:2]) and all(len(colours) == 1 for colours in cells.values()):
                fits, alike = True, alike & right[2:]
        ((found, determined),) = library.explanations([(inputs, outputs)], 2, 1)
        assert bool(found) == fits and determined.tolist() == alike.tolist()
        seen.update([*alike.tolist(), "fits" if fits else "does not"])
    assert seen == {True, False, "fits", "does not"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rules") / "d"
    options = options_for(folder, "--train-tasks", "40", "--test-tasks", "4")
    build(options)
    return datasets.load(folder), read_json(folder / "rules.json"), read_plan(options)


def test_held_out_families_and_compositions_never_occur_in_training(built):
    store, rules, plan = built
    families = {split: [rule["families"] for rule in rules.values() if rule["split"] == split] for split in store.metadata.subsets}
    assert {split: len(of) for split, of in families.items()} == store.metadata.subsets
    assert list(families) == ["train", "test_instances", "test_rules", "test_compositions", "test_families"]
    for split in ("train", "test_instances", "test_rules"):
        assert not {name for stages in families[split] for name in stages} & set(plan.held_out_families)
        assert not {tuple(sorted(stages)) for stages in families[split]} & set(plan.held_out_compositions)
    assert {name for stages in families["train"] for name in stages} == set(FAMILIES) - set(plan.held_out_families)
    assert families["test_compositions"] and {tuple(sorted(stages)) for stages in families["test_compositions"]} <= set(
        plan.held_out_compositions
    )
    assert {tuple(stages) for stages in families["test_families"]} == {(name,) for name in plan.held_out_families}
    for task_id, rule in rules.items():
        assert task_id.endswith("_" + "+".join(rule["families"])) and rule["description"].count(" > ") == len(rule["families"]) - 1


def test_only_seen_rules_are_asked_in_test_instances_and_only_new_ones_elsewhere(built):
    store, rules, plan = built
    tasks = {
        split: [store.task(int(i)) for i in store.tasks_of("test" if split in store.metadata.test_subsets else "train", subsets=[split])]
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
    assert all(generator.held_out(rule) for rule in made["test_rules"]) and not any(generator.held_out(rule) for rule in made["train"])
    assert not keys["train"] & (keys["test_rules"] | keys["test_compositions"])
    assert not described["train"] & (described["test_rules"] | described["test_compositions"] | described["test_families"])
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
            ((explaining, determined),) = generator.library.explanations([(inputs, outputs)], len(task.demonstrations), stages)
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
    assert len(sides) < sum(len(generator.library.rules(pair)) for pair in itertools.permutations(families, 2))
    assert all(len(side) == 1 for side in sides.values()) and {True} in sides.values()


def test_a_build_is_the_same_bytes_for_any_hash_seed_and_number_of_workers(tmp_path):
    digests = set()
    for hash_seed, workers in (("1", "1"), ("2", "3")):
        folder = tmp_path / hash_seed
        arguments = (
            "--families",
            "geometry",
            "recolour",
            "fill",
            "--held-out-families",
            "fill",
            "--held-out-compositions",
            "recolour+geometry",
            "--train-tasks",
            "9",
            "--test-tasks",
            "3",
        )
        done = run(
            *("-m", "dataset.build_rules_dataset", "--output-dir", str(folder), "--workers", workers, *arguments),
            env={"PYTHONHASHSEED": hash_seed},
        )
        assert done.returncode == 0, done.stderr
        digests.add(tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())))
    assert len(digests) == 1


def test_a_limited_number_of_rules_is_shared_evenly(tmp_path):
    arguments = ("--families", "recolour", "shift", "--stages", "1", "--rules", "8", "--train-tasks", "40", "--test-tasks", "6")
    metadata, _ = build(options_for(tmp_path / "d", *arguments))
    assert metadata.test_subsets == ["test_instances", "test_rules"]
    rules = read_json(tmp_path / "d" / "rules.json").values()
    counts = {}
    for rule in rules:
        counts.setdefault(rule["split"], []).append(rule["description"])
    assert len(set(counts["train"])) == 8 and set(counts["test_instances"]) <= set(counts["train"])
    assert max(map(counts["train"].count, counts["train"])) == 5 and not set(counts["test_rules"]) & set(counts["train"])


def test_a_weighted_family_trains_more_often_and_is_asked_no_more(tmp_path):
    arguments = ("--families", "geometry", "recolour", "shift", "--train-tasks", "120", "--test-tasks", "60")
    for name, more in (("plain", ()), ("weighted", ("--weights", "geometry=4"))):
        build(options_for(tmp_path / name, *arguments, *more))
    plain, weighted = ([*read_json(tmp_path / name / "rules.json").values()] for name in ("plain", "weighted"))

    def share(rules, split, wanted=("geometry",)):
        families = [tuple(rule["families"]) for rule in rules if rule["split"] == split]
        return sum(names == wanted for names in families if len(names) == 1) / sum(len(names) == 1 for names in families)

    assert 0.3 < share(plain, "train") < 0.37 and 0.63 < share(weighted, "train") < 0.7
    assert share(weighted, "test_instances") < 0.5
    assert [rule for rule in plain if rule["split"] == "test_rules"] == [rule for rule in weighted if rule["split"] == "test_rules"]
    for wrong in ("geometry", "count=2", "shift=0"):
        with pytest.raises(UserError, match=f"--weights: '{wrong}' is not FAMILY=N"):
            build(options_for(tmp_path / "d", *arguments, "--weights", wrong))
    with pytest.raises(UserError, match="--weights .* with --rules .*: leave one out"):
        read_plan(options_for(tmp_path / "x", *arguments, "--weights", "geometry=4", "--rules", "8"))


@pytest.mark.parametrize(
    "families, stages", [([name for name in FAMILIES if name != "fill"], "1"), (["geometry", "gravity", "recolour"], "2")]
)
def test_one_dimensional_tasks(families, stages, tmp_path):
    size = ("--rows", "1", "1", "--columns", "8", "12", "--stages", stages)
    build(options_for(tmp_path / "d", "--families", *families, *size, "--train-tasks", "20", "--test-tasks", "2"))
    store = datasets.load(tmp_path / "d")
    assert set(store.shapes[:, 0]) == {1} and 8 <= store.shapes[:, 1].min() < store.shapes[:, 1].max() <= 12
    made = [rule["families"] for rule in read_json(tmp_path / "d" / "rules.json").values()]
    assert {name for names in made for name in names} == set(families) and max(map(len, made)) == int(stages)


def test_generated_permutations_are_determined_new_and_bounded(tmp_path):
    arguments = ("--families", "colour_permutation", "--stages", "1", "--test-splits", "test_rules", "--demonstrations", "1")
    size = ("--rows", "1", "2", "--columns", "2", "3", "--train-tasks", "300", "--test-tasks", "20")
    metadata, _ = build(options_for(tmp_path / "d", *arguments, *size))
    assert metadata.test_subsets == ["test_rules"]
    store = datasets.load(tmp_path / "d")
    train, test = ([store.task(int(t)) for t in store.tasks_of(split)] for split in ("train", "test"))
    assert find_leaks(train, test, "fewshot") == [] and len(test) == 20 and 0 < len(train) < 300
    for task in train + test:
        shown = {0} | {int(c) for pair in task.demonstrations for c in np.unique(pair.input)}
        assert set(np.unique(task.queries[0].input).tolist()) <= shown


def test_a_rule_is_known_elsewhere_under_any_description_and_a_composition_in_any_order(tmp_path, monkeypatch):
    size = ("--rows", "4", "4", "--columns", "4", "4", "--test-tasks", "12", "--train-tasks", "40")
    build(options_for(tmp_path / "d", "--families", "shift", "recolour", *size))
    rules = read_json(tmp_path / "d" / "rules.json")
    one = next(name for name, rule in rules.items() if rule["split"] == "train" and rule["families"] == ["shift", "recolour"])
    assert tuple(name for name, _ in rules[one]["rule"]) == ("shift", "recolour")
    first, second = ((name, tuple(values)) for name, values in rules[one]["rule"])
    library = Generator(read_plan(options_for(tmp_path, "--families", "shift", "recolour", *size))).library
    turned = (second, first)  # moving cells and changing their colour commute
    assert describe(turned) != rules[one]["description"] and library.key(turned) == library.key((first, second))
    grids = np.zeros((5, 3, 3), np.uint8)
    made = Made(turned, tuple(Pair(grid, grid) for grid in grids[:3]), Pair(grids[3], grids[4]), 1)
    alone = Made(turned[:1], made.demonstrations, made.query, 1)
    monkeypatch.setattr("dataset.build_rules_dataset.read_json", lambda path: {one: rules[one]})
    asked = {"a": ("test_rules", made), "b": ("test_compositions", made), "c": ("test_rules", alone), "d": ("test_instances", made)}
    assert known_elsewhere(tmp_path / "d", asked, library) == {"a", "b"}
    del rules[one]["rule"]
    with pytest.raises(UserError, match="does not hold the rules themselves; build it anew"):
        known_elsewhere(tmp_path / "d", asked, library)


def test_a_folder_that_is_not_a_dataset_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("keep me")
    monkeypatch.setattr("dataset.build_rules_dataset.Generator", None)
    with pytest.raises(UserError, match="was not written by this command"):
        build(options_for(tmp_path, "--families", "shift"))


def test_what_another_dataset_trains_is_not_asked_as_new(tmp_path):
    size = ("--stages", "1", "--rows", "4", "4", "--columns", "4", "4", "--test-tasks", "12")
    build(options_for(tmp_path / "easy", "--families", "gravity", "shift", *size, "--train-tasks", "60"))
    hard = ("--families", "gravity", "count", "shift", "recolour", "--held-out-families", "gravity", "count", *size, "--train-tasks", "40")
    without, _ = build(options_for(tmp_path / "without", *hard))
    metadata, _ = build(options_for(tmp_path / "hard", *hard, "--exclude", str(tmp_path / "easy")))
    before, easy, store = (datasets.load(tmp_path / name) for name in ("without", "easy", "hard"))
    rules = read_json(tmp_path / "hard" / "rules.json")
    assert {rules[store.task_ids[i]]["families"][0] for i in store.tasks_of("test", subsets=["test_families"])} == {"count"}
    assert "gravity" in {name.split("_", 1)[1] for name in metadata.left_out["known_elsewhere"]}
    trained = {rule["description"] for rule in read_json(tmp_path / "easy" / "rules.json").values() if rule["split"] == "train"}
    for split in {"test_rules", "test_families"} & set(metadata.test_subsets):
        assert not trained & {rules[store.task_ids[i]]["description"] for i in store.tasks_of("test", subsets=[split])}
    easy_pairs, asked = (
        {pair for i in data.tasks_of(split) for pair in data.pair_fingerprint[data.task_pairs[i] : data.task_pairs[i + 1]].tolist()}
        for data, split in ((easy, "train"), (store, "test"))
    )
    assert not easy_pairs & asked
    assert [store.task_ids[i] for i in store.tasks_of("train")] == [before.task_ids[i] for i in before.tasks_of("train")]
    assert metadata.subsets["train"] == without.subsets["train"] and metadata.subsets["test_families"] < without.subsets["test_families"]


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
        (("--held-out-compositions", "gravity+recolour"), "'gravity\\+recolour' is not FAMILY\\+FAMILY of two training families"),
        (("--held-out-compositions", "recolour"), "'recolour' is not FAMILY"),
        (("--stages", "1", "--held-out-compositions", "recolour+shift"), "needs --stages 2"),
        (("--families", "gravity", "--stages", "1", "--test-splits", "test_families"), "--test-splits test_families: .* no rules for it"),
        (("--families", "geometry", "--stages", "1", "--rules", "9", "--train-tasks", "9"), "--rules 9: found only 7 different rules"),
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
    jobs = [(split, number, None) for split in ("train", "test_rules", "test_families") for number in range(5)]
    together = generator.make(jobs)
    for job, task in list(zip(jobs, together, strict=True))[::3]:
        (alone,) = generator.make([job])
        assert (alone.rule, alone.draws) == (task.rule, task.draws)
        for pair, other in zip((*alone.demonstrations, alone.query), (*task.demonstrations, task.query), strict=True):
            assert np.array_equal(pair.input, other.input) and np.array_equal(pair.output, other.output)


def test_cases_are_explained_alike_together_and_alone(library):
    """Among them cases of several shapes and numbers of colours: the colours that stand for absent ones depend on the others."""
    rng = np.random.default_rng(11)
    cases = []
    for number, stages in enumerate([("recolour",), ("pattern",), ("geometry",), ("move",), ("fill", "shift"), ("recolour", "count")] * 2):
        cases.append(random_case(rng, library, library.draw(rng, stages), 2, 3, (4, 4 + number % 2)))
    for stages in (1, 2):
        together = library.explanations(cases, 2, stages)
        for case, (found, determined) in zip(cases, together, strict=True):
            ((alone, determined_alone),) = library.explanations([case], 2, stages)
            assert found == alone and np.array_equal(determined, determined_alone)


def test_a_generated_task_needs_all_its_stages(tmp_path):
    generator = Generator(read_plan(options_for(tmp_path)))
    made: list[Made] = generator.make([("train", number, None) for number in range(1, 8, 2)])
    for task in made:
        assert len(task.rule) == 2
        inputs = np.stack([pair.input for pair in (*task.demonstrations, task.query)])
        outputs = np.stack([pair.output for pair in (*task.demonstrations, task.query)])
        assert generator.library.explanations([(inputs, outputs)], 3, 1)[0][0] == set()
        assert np.array_equal(apply(task.rule, inputs), outputs) and not np.array_equal(inputs[-1], outputs[-1])
