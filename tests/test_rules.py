"""The rule families, and the check that demonstrations determine the answer."""

import itertools

import numpy as np
import pytest

from dataset.build_rules_dataset import build, known_elsewhere, read_plan
from dataset.generate.rule_families import FAMILIES, may_become
from dataset.generate.rule_tasks import Generator, Made
from dataset.generate.rules import Library, Rule, apply, describe, draw_inputs, stages_of
from dataset.task import Pair
from tests.support.rules import options_for
from utils.errors import UserError
from utils.files import read_json


def grid(text: str) -> np.ndarray:
    """`120/000` as a grid."""
    return np.array([[int(cell) for cell in row] for row in text.split("/")], np.uint8)


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
    assert np.array_equal(apply(((name, values),), grid(before)[None])[0], grid(after)), describe(
        ((name, values),)
    )


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
    """The check leans on both.

    A permutation is fitted as last stage only, absent colours stand for one another, images are skipped.
    """
    rng = np.random.default_rng(1)
    permutation = np.concatenate([[0], rng.permutation(np.arange(1, 10))]).astype(np.uint8)
    family, probes = FAMILIES[name], library.probes[-1]
    for rule in random_rules(library, name, 10):
        values = np.array(rule[0][1])
        colours = slice(None) if family.fit else list(family.colours)
        values[colours] = permutation[values[colours]]
        if name == "colour_permutation":
            values = permutation[np.array(rule[0][1])][np.argsort(permutation)]
        assert np.array_equal(
            permutation[apply(rule, probes)], apply(((name, tuple(values)),), permutation[probes])
        )
        images, answers = probes, apply(rule, probes)
        for image, answer in zip(images[::5], answers[::5], strict=True):
            may = may_become(image[None], answer[None])
            assert all(may[kept].all() for kept in family.keeps)


def random_case(
    rng: np.random.Generator,
    library: Library,
    rule: Rule,
    demonstrations: int,
    queries: int,
    shape: tuple[int, int],
):
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
    for stages in (
        ("geometry",),
        ("recolour",),
        ("conditional",),
        ("recolour", "gravity"),
        ("gravity", "geometry"),
    ):
        inputs, outputs = random_case(rng, library, library.draw(rng, stages), 2, 6, (3, 3))
        for count, rules in every.items():
            fitting = [rule for rule in rules if np.array_equal(apply(rule, inputs[:2]), outputs[:2])]
            alike = np.all(
                [(apply(rule, inputs[2:]) == outputs[2:]).all(axis=(1, 2)) for rule in fitting]
                or [np.ones(6, bool)],
                axis=0,
            )
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
        inputs, outputs = random_case(
            rng, library, library.draw(rng, ("gravity", "colour_permutation")), 1, 4, (2, 4)
        )
        inputs[3:] = rng.integers(
            0, 10, inputs[3:].shape
        )  # these may show a colour that the demonstration does not
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
                right.append(
                    all((r, c) in cover or before[r, c] == after[r, c] for r, c in np.ndindex(before.shape))
                )
                covered = [
                    (part, int(after[cell]))
                    for cell, part in cover.items()
                    if 0 <= cell[0] < 4 and 0 <= cell[1] < 5
                ]
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


def test_a_rule_is_known_elsewhere_under_any_description_and_a_composition_in_any_order(
    tmp_path, monkeypatch
):
    size = ("--rows", "4", "4", "--columns", "4", "4", "--test-tasks", "12", "--train-tasks", "40")
    build(options_for(tmp_path / "d", "--families", "shift", "recolour", *size))
    rules = read_json(tmp_path / "d" / "rules.json")
    one = next(
        name
        for name, rule in rules.items()
        if rule["split"] == "train" and rule["families"] == ["shift", "recolour"]
    )
    assert tuple(name for name, _ in rules[one]["rule"]) == ("shift", "recolour")
    first, second = ((name, tuple(values)) for name, values in rules[one]["rule"])
    library = Generator(read_plan(options_for(tmp_path, "--families", "shift", "recolour", *size))).library
    turned = (second, first)  # moving cells and changing their colour commute
    assert describe(turned) != rules[one]["description"] and library.key(turned) == library.key(
        (first, second)
    )
    grids = np.zeros((5, 3, 3), np.uint8)
    made = Made(turned, tuple(Pair(grid, grid) for grid in grids[:3]), Pair(grids[3], grids[4]), 1)
    alone = Made(turned[:1], made.demonstrations, made.query, 1)
    monkeypatch.setattr("dataset.build_rules_dataset.read_json", lambda path: {one: rules[one]})
    asked = {
        "a": ("test_rules", made),
        "b": ("test_compositions", made),
        "c": ("test_rules", alone),
        "d": ("test_instances", made),
    }
    assert known_elsewhere(tmp_path / "d", asked, library) == {"a", "b"}
    del rules[one]["rule"]
    with pytest.raises(UserError, match="does not hold the rules themselves; build it anew"):
        known_elsewhere(tmp_path / "d", asked, library)


def test_cases_are_explained_alike_together_and_alone(library):
    """Cases of several shapes and numbers of colours: what stands for absent ones depends on the others."""
    rng = np.random.default_rng(11)
    cases = []
    for number, stages in enumerate(
        [("recolour",), ("pattern",), ("geometry",), ("move",), ("fill", "shift"), ("recolour", "count")] * 2
    ):
        cases.append(random_case(rng, library, library.draw(rng, stages), 2, 3, (4, 4 + number % 2)))
    for stages in (1, 2):
        together = library.explanations(cases, 2, stages)
        for case, (found, determined) in zip(cases, together, strict=True):
            ((alone, determined_alone),) = library.explanations([case], 2, stages)
            assert found == alone and np.array_equal(determined, determined_alone)
