"""Drafts: which rules are looked up right, and what they never depend on."""

import sys

import numpy as np
import pytest
import torch

from dataset import build_rules_dataset
from dataset.canvas import ARC, PAD, encode
from dataset.generate.rule_families import FAMILIES
from experiments import look_up
from models import act, core
from models.act import act_step, initial_carry, solve
from models.conditions import CONDITIONS, ConditionName, traits_of, values_of
from models.drafts import DRAFTS, DRAFTS_PER_GRID, DraftSettings, drafts_of, votes_of, with_drafts
from models.grids import Grids
from models.ways import Counts, Ways, taking_turns
from tests.support.models import OBJECTIVE, episodes, make_model, one_loss
from tests.support.relations import DRAFTS as READ
from tests.support.relations import objects
from tests.support.runs import load_config
from training.objectives import reconstruction_loss

ALL = DraftSettings(["motions", "falls", "copies", "crops", "panels"], [*CONDITIONS, "slides"])
SIDE = 9
SHAPE = (5, 6)
# A family, one set of its parameters, and the density and colours of grids that show the rule.
RULES = {
    "turned": ("geometry", [1], 0.7, 10),
    "mirrored": ("geometry", [4], 0.7, 10),
    "shifted": ("shift", [1, -2], 0.7, 10),
    "recoloured": ("recolour", [2, 3], 0.8, 5),
    "permuted": ("colour_permutation", [0, 3, 4, 1, 2, 5, 6, 7, 8, 9], 0.9, 5),
    "fallen": ("gravity", [1], 0.5, 10),
    "moved": ("move", [2, 0, 0], 0.2, 4),
    "one step": ("move", [2, 1, 1], 0.2, 4),
    "rows filled": ("fill", [1, 2], 0.2, 4),
    "stamped": ("pattern", [2, 1, 5, 6, 7, 8, 3, 4, 1, 9], 0.12, 3),
    "large objects": ("large_objects", [1, 5], 0.7, 4),
}


def grids_of(density, colours, count, rng, shape=SHAPE):
    grids = rng.integers(1, colours, (count, *shape))
    return np.where(rng.random(grids.shape) < density, grids, 0).astype(np.uint8)


def apply(family, parameters, grids):
    return FAMILIES[family].apply(np.array([parameters]), grids[None])[0]


def canvases(grids, side=SIDE, offset=(0, 0)):
    return torch.from_numpy(np.stack([encode(grid, side, offset) for grid in grids])).flatten(1).long()


def drawn(grid):
    """The canvas (L,) of a grid."""
    return canvases([grid])[0]


def looked_up(inputs, outputs, settings=ALL, mask=None, side=SIDE, offset=(0, 0)):
    """The drafts (DRAFTS_PER_GRID, G, L); the last of the inputs is the query."""
    mask = torch.ones(1, len(outputs), dtype=torch.bool) if mask is None else mask
    tokens = canvases(inputs, side, offset)[None], canvases(outputs, side, offset)[None]
    return drafts_of(settings, *tokens, mask)[0]


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_answered_without_learning(rule):
    family, parameters, density, colours = RULES[rule]
    right = 0
    for seed in range(20):
        grids = grids_of(density, colours, 5, np.random.default_rng(seed))
        answers = apply(family, parameters, grids)
        draft = looked_up(grids, answers[:-1])[0, -1]
        right += torch.equal(draft, drawn(answers[-1]))
    assert right >= 16, right  # a kind of cells may occur in the query alone


@pytest.mark.parametrize(
    "first, then", [("turned", "recoloured"), ("shifted", "permuted"), ("moved", "rows filled")]
)
def test_two_rules_are_answered_together(first, then):
    right = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        _, _, density, colours = RULES[first if first == "moved" else then]
        grids = grids_of(density, colours, 6, rng)
        answers = apply(*RULES[then][:2], apply(*RULES[first][:2], grids))
        right += torch.equal(looked_up(grids, answers[:-1])[0, -1], drawn(answers[-1]))
    assert right >= 14, right


def test_of_two_rules_that_take_turns_each_has_a_draft():
    rng = np.random.default_rng(0)
    grids = grids_of(0.7, 10, 5, rng)
    rules = [4, 5, 4, 5]
    answers = [apply("geometry", [rule], grid[None])[0] for rule, grid in zip(rules, grids[:-1], strict=True)]
    drafts = looked_up(grids, answers)
    wanted = [drawn(apply("geometry", [rule], grids[-1:])[0]) for rule in (4, 5)]
    pair = [drafts[1, -1], drafts[2, -1]]
    assert all(any(torch.equal(each, one) for one in pair) for each in wanted)
    alone = looked_up(grids[[0, 2, 4]], [answers[0], answers[2]])  # one rule explains all: twice the same
    assert torch.equal(alone[1], alone[2])


def test_traits_of_grids_choose_between_two_rules():
    """Grids with a coloured first cell are mirrored, others are turned over; other traits tell nothing."""
    grids = grids_of(0.7, 10, 5, np.random.default_rng(1))
    grids[:, 0, 0] = [3, 0, 5, 0, 7]
    rules = [4, 5, 4, 5, 4]
    answers = [apply("geometry", [rule], grid[None])[0] for rule, grid in zip(rules, grids, strict=True)]
    for query in (4, 3):
        shown = [each for each in range(5) if each != query]
        data = {
            "demo_inputs": canvases(grids[shown])[None],
            "demo_labels": canvases([answers[each] for each in shown])[None],
            "demo_mask": torch.ones(1, 4, dtype=torch.bool),
            "inputs": canvases(grids[[query]]),
        }
        data = with_drafts(data, ALL)
        chosen = 1 if votes_of(data)[0, 0] > 0 else 2
        assert torch.equal(data[DRAFTS][0, chosen, -1], drawn(answers[query])), query
    data["demo_mask"][:] = False
    assert not votes_of(data).any()


def test_traits_are_those_of_a_slow_look_at_the_grid():
    for seed, shape in enumerate([(1, 1), (2, 3), (4, 5), (5, 4)]):
        grids = grids_of(0.5, 10, 6, np.random.default_rng(seed), shape)
        found = traits_of(Grids(canvases(grids, SIDE, (2, 1)), ARC))
        for grid, traits in zip(grids > 0, found.tolist(), strict=True):
            rows, columns = shape[0] // 2, shape[1] // 2
            left, right = grid[:, :columns].sum(), grid[:, shape[1] - columns :].sum()
            above, below = grid[:rows].sum(), grid[shape[0] - rows :].sum()
            corners = [grid[0, 0], grid[0, -1], grid[-1, 0], grid[-1, -1]]
            sides = [left > right, right > left, above > below, below > above]
            assert traits == [*map(bool, corners), *map(bool, sides), bool(grid.sum() % 2)]


def test_an_answer_may_have_another_shape_than_its_input():
    grids = grids_of(0.8, 10, 4, np.random.default_rng(1), (3, 5))
    answers = apply("geometry", [6], grids)
    assert answers.shape[1:] == (5, 3)
    assert torch.equal(looked_up(grids, answers[:-1])[0, -1], drawn(answers[-1]))


def both(grid):
    """What the left and the right half both show, in another colour."""
    left, right = np.split(grid, 2, axis=1)
    return np.where((left > 0) & (right > 0), 8, 0).astype(np.uint8)


def boxed(grid):
    rows, columns = (np.flatnonzero((grid == 3).any(axis=axis)) for axis in (1, 0))
    return grid[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def fullest(grid):
    return max(np.split(grid, 3, axis=0), key=np.count_nonzero)


def halved(grid):
    return grid[:, : grid.shape[1] // 2]


FRAMES = {
    "left half": ((4, 6), halved),
    "side by side": ((2, 3), lambda grid: np.hstack((grid, grid[:, ::-1]))),
    "enlarged": ((2, 3), lambda grid: grid.repeat(3, 0).repeat(3, 1)),
    "grid of grids": ((3, 3), lambda grid: np.kron(grid > 0, grid).astype(np.uint8)),
    "cut out": ((7, 6), boxed),
    "overlaid": ((4, 6), both),
    "chosen": ((6, 4), fullest),
}


@pytest.mark.parametrize("rule", FRAMES)
def test_rules_whose_answer_has_a_frame_of_its_own_are_answered(rule):
    shape, apply_to = FRAMES[rule]
    right = 0
    for seed in range(20):
        grids = grids_of(0.5, 6, 4, np.random.default_rng(seed), shape)
        grids[:, 1, 1] = 3
        answers = [apply_to(grid) for grid in grids]
        drafts = looked_up(grids, answers[:-1])
        right += torch.equal(drafts[0, -1], drawn(answers[-1]))  # with the EOS around it
    assert right >= 17, right


def test_overlaid_panels_need_the_colours_of_both():
    """What both halves show decides, whichever of the two colours it is."""

    def answer(grid):
        left, right = np.split(grid, 2, axis=1)
        return (left + 2 * right).astype(np.uint8)  # a number of its own for each pair of 1 and 2

    right = 0
    for seed in range(20):
        grids = 1 + (np.random.default_rng(seed).random((5, 4, 6)) < 0.5).astype(np.uint8)
        answers = [answer(grid) for grid in grids]
        draft = looked_up(grids, answers[:-1], DraftSettings(["panels"], []))[0, -1]
        right += torch.equal(draft, drawn(answers[-1]))
    assert right == 20


def test_two_ways_that_explain_a_demonstration_each_are_found_beside_one_that_explains_a_little_of_both():
    """They show so much beside the other demonstration that by themselves they are the worst."""
    explained = [[10.0, 0.0, 9.0], [0.0, 10.0, 9.0]]  # by demonstration and way
    beside = [[0.0, 400.0, 0.0], [400.0, 0.0, 0.0]]
    shown = (ARC.first + torch.arange(3, dtype=torch.int16)).view(1, 3, 1, 1).expand(1, 3, 3, 4)
    found = torch.zeros(1, 2, 11, 3, 13)
    for way in range(3):  # each shows a colour of its own, which stays as it is
        found[0, :, -1, way, ARC.first + way] = torch.tensor(explained)[:, way]
    ways = Ways(shown, shown, torch.zeros_like(shown), (1, 1, 1))
    drafts = taking_turns(ways, Counts(found, torch.tensor([beside])))
    assert [draft.unique().tolist() for draft in drafts] in ([[2], [3]], [[3], [2]])


def test_a_second_condition_refines_the_first():
    """What is 1 becomes 4 if its row shows a 2 and its column a 3."""

    def answer(grid):
        row, column = (grid == 2).any(axis=1, keepdims=True), (grid == 3).any(axis=0, keepdims=True)
        return np.where((grid == 1) & row & column, 4, grid).astype(np.uint8)

    right = {("rows",): 0, ("rows", "columns"): 0}
    for seed in range(20):
        grids = grids_of(0.5, 4, 5, np.random.default_rng(seed), (7, 7))
        answers = [answer(grid) for grid in grids]
        for conditions in right:
            drafts = looked_up(grids, answers[:-1], DraftSettings(["motions"], list(conditions)))
            right[conditions] += torch.equal(drafts[0, -1], drawn(answers[-1]))
    one, two = right.values()
    assert two >= one + 8, right


@pytest.mark.parametrize("rule", RULES)
def test_drafts_move_with_the_grids_and_know_nothing_of_the_canvas(rule):
    family, parameters, density, colours = RULES[rule]
    grids = grids_of(density, colours, 4, np.random.default_rng(3))
    answers = apply(family, parameters, grids)[:-1]
    one = looked_up(grids, answers).unflatten(-1, (SIDE, SIDE))
    other = looked_up(grids, answers, side=SIDE + 4, offset=(3, 2)).unflatten(-1, (SIDE + 4, SIDE + 4))
    assert torch.equal(other[..., 3 : 3 + SIDE, 2 : 2 + SIDE], one)
    assert (other[..., :3, :] == PAD).all() and (other[..., :2] == PAD).all()


def test_hidden_demonstrations_are_never_read_and_without_any_nothing_is_known():
    grids = grids_of(0.8, 10, 4, np.random.default_rng(4))
    answers = apply("geometry", [3], grids)[:-1]
    mask = torch.tensor([[True, True, False]])
    shown = looked_up(grids, answers, mask=mask)
    other = [*answers[:2], grids[0]]
    assert torch.equal(looked_up(grids, other, mask=mask), shown)
    assert (looked_up(grids, answers, mask=torch.zeros(1, 3, dtype=torch.bool)) == PAD).all()


def test_colours_are_names():
    """Drafts of recoloured tasks are the recoloured drafts, as long as no two ways are worth the same."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        grids = grids_of(0.8, 10, 4, rng)
        answers = apply(
            "colour_permutation", [0, *rng.permutation(range(1, 10))], apply("geometry", [2], grids)
        )
        names = np.array([0, *rng.permutation(range(1, 10))], np.uint8)
        table = torch.from_numpy(np.array([0, 1, *(2 + names)]))
        plain = looked_up(grids, answers[:-1])[0]
        assert torch.equal(looked_up(names[grids], names[answers[:-1]])[0], table[plain])


def test_every_condition_says_numbers_of_the_grid_alone():
    grids = grids_of(0.5, 10, 6, np.random.default_rng(5))
    for name, condition in CONDITIONS.items():
        small, large = (
            values_of(name, Grids(canvases(grids, side, offset), ARC)).unflatten(2, (side, side))
            for side, offset in ((SIDE, (0, 0)), (SIDE + 3, (2, 1)))
        )
        assert small.shape[1] == len(condition.counts) and small.min() >= 0
        assert (small.amax((0, 2, 3)) < torch.tensor(condition.counts)).all()
        inside = (slice(None), slice(None), slice(0, SHAPE[0]), slice(0, SHAPE[1]))
        assert torch.equal(large[:, :, 2 : 2 + SHAPE[0], 1 : 1 + SHAPE[1]], small[inside])
        assert len(small[inside].unique()) > 1


def slow_ranks(grid):
    """By counting each object's cells, and ranking the numbers that there are."""
    first = [objects(grid, *cell)[0] for cell in np.ndindex(grid.shape)]
    size = [first.count(each) if grid[each] else 0 for each in first]
    sizes = sorted(set(size) - {0}, reverse=True)
    for each in size:
        place = 1 + sizes.index(each) if each else 0
        yield [1 + (place == 1), 1 + (place == len(sizes)), min(place, 9)] if place else [0, 0, 0]


def slow_crowds(grid):
    for row, column in np.ndindex(grid.shape):
        around = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)]
        seen = {
            (r, c) for r, c in around
            if 0 <= row + r < len(grid) and 0 <= column + c < grid.shape[1] and grid[row + r, column + c]
        }  # fmt: skip
        yield [sum(not r or not c for r, c in seen), len(seen)]


def slow_ahead(grid):
    for row, column in np.ndindex(grid.shape):
        lines = (
            grid[row, column + 1 :],
            grid[row + 1 :, column],
            grid[row, :column][::-1],
            grid[:row, column][::-1],
        )
        right, below, left, above = seen = [next((int(each) for each in line if each), 0) for line in lines]
        across, down = right * (right == left), below * (below == above)
        yield [*seen, across, down, across or down, sum(each > 0 for each in seen)]


@pytest.mark.parametrize(
    "name, slow", [("ranks", slow_ranks), ("crowds", slow_crowds), ("ahead", slow_ahead)]
)
def test_conditions_are_those_of_a_slow_look_at_the_grid(name, slow):
    for seed, shape in enumerate([(1, 1), (1, 5), (4, 3), (5, 6)]):
        for density in (0.0, 0.3, 0.8):
            (grid,) = grids_of(density, 4, 1, np.random.default_rng(seed), shape)
            found = values_of(name, Grids(canvases([grid], SIDE, (2, 1)), ARC))[0].unflatten(1, (SIDE, SIDE))
            found = found[:, 2 : 2 + shape[0], 1 : 1 + shape[1]].flatten(1).T
            assert found.tolist() == [[int(each) for each in cell] for cell in slow(grid)]


def test_the_names_that_a_configuration_takes_are_the_table():
    assert ConditionName.__args__ == tuple(CONDITIONS)


def test_drafts_are_looked_up_once_per_batch_and_stay_with_a_row(fewshot, monkeypatch):
    model = make_model(fewshot, *READ).eval()
    data, calls = episodes().data, []
    monkeypatch.setattr(
        core,
        "with_drafts",
        lambda data, settings: calls.append(DRAFTS in data) or with_drafts(data, settings),
    )
    solve(model, data)
    assert calls[0] is False and all(calls[1:]) and len(calls) > 1


def test_both_encoder_and_recursion_read_the_drafts(fewshot):
    model = make_model(fewshot, *READ).train()
    data = model.prepared(episodes().data)
    assert data[DRAFTS].shape == (4, DRAFTS_PER_GRID, 4, 36)
    one_loss(model, data).backward()
    for table in (model.draft_reader.table, model.context.pairs.drafts):
        assert table.weight.grad is not None and table.weight.grad.abs().sum() > 0


def test_a_demonstration_that_is_asked_is_given_its_own_draft(fewshot, monkeypatch):
    model = make_model(fewshot, *READ).train()
    data = model.prepared(episodes().data)
    output, asked = act_step(model, initial_carry(model, data), data), []
    monkeypatch.setattr(act, "refresh", lambda carry, data, *_: asked.append(data) or carry)
    reconstruction_loss(model, output, OBJECTIVE)
    assert torch.equal(asked[0][DRAFTS][:, :, -1], data[DRAFTS][:, :, 0])


def test_conditions_without_places_are_refused(fewshot):
    with pytest.raises(Exception, match="refine what encoder.draft_places finds"):
        load_config(fewshot, "encoder=memory", "encoder.draft_conditions=[sizes]")


def test_the_drafts_alone_are_asked_by_a_command(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "rules"
    families = ["--families", "shift", "--stages", "1", "--test-splits", "test_instances"]
    sizes = ["--rows", "4", "5", "--columns", "4", "5", "--train-tasks", "40", "--test-tasks", "10"]
    monkeypatch.setattr(sys, "argv", ["build", *families, *sizes, "--output-dir", str(folder)])
    build_rules_dataset.main()
    capsys.readouterr()
    for places, expected in (["motions"], "1.000"), (["rays"], "0."):
        monkeypatch.setattr(sys, "argv", ["look_up", str(folder), "--places", *places])
        look_up.main()
        assert f"test_instances: {expected}" in (out := capsys.readouterr().out), out
    assert "shift: " in out
    monkeypatch.setattr(sys, "argv", ["look_up", str(folder), "--subsets", "test_rules"])
    with pytest.raises(SystemExit):
        look_up.main()
    assert "no subset 'test_rules'" in capsys.readouterr().err
