"""Relations: the index of a grid, and what blocks read through it."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from dataset.augment import dihedral
from dataset.batch import leave_one_out
from dataset.canvas import ARC, PAD, Vocabulary, encode
from dataset.views import EvaluationSet
from evaluation.in_training import respondent_of
from evaluation.lessons import lessons_of
from evaluation.task_training import TaskTraining
from models import act, core, layers, relations
from models.act import act_step, initial_carry, solve
from models.latent_search import LeaveOneOut
from models.layers import Relate
from models.pretrained import load_checkpoint
from models.relations import NONE, RELATIONS, Index, places_of
from tests.support.models import OBJECTIVE, SIDE, episodes, make_model, one_loss
from tests.support.protocols import outspoken, ttt_config
from tests.support.relations import DRAFTS, FEW, FEW_DRAFTS, NAMES, ON, PREFIX, objects
from tests.support.runs import ROOT, Trainer, load_config
from tests.support.thinking import write_sudokus
from training.objectives import reconstruction_loss

MIXER = ["encoder=standard", "arch.mlp_t=true", "arch.pos_encodings=none"]
SHAPES = [(1, 1), (1, 4), (3, 3), (2, 5), (5, 4), (4, 6)]
rng = np.random.default_rng(0)


def slow_symmetries(grid, numbers, canvas):
    """By moving the numbers of the grid's cells themselves."""
    found = []
    for transform in range(1, 8):
        told = dihedral(numbers, transform)
        found.append(np.full(canvas.shape, NONE))
        found[-1][: told.shape[0], : told.shape[1]] = told[: canvas.shape[0], : canvas.shape[1]]
    return found


def slow_neighbours(grid, numbers, canvas):
    """By moving the numbers on a large empty floor."""
    floor = np.full((3 * canvas.shape[0], 3 * canvas.shape[1]), NONE)
    top, left = canvas.shape
    floor[top : top + grid.shape[0], left : left + grid.shape[1]] = numbers
    steps = [step for step in itertools.product((-1, 0, 1), repeat=2) if step != (0, 0)]
    return [floor[top + r : 2 * top + r, left + c : 2 * left + c] for r, c in steps]


def of_each_cell(look):
    """Places from a function of a grid and a cell of it: the cells that it names, or None."""

    def slow(grid, numbers, canvas):
        cells = {cell: look(grid, *cell) for cell in np.ndindex(grid.shape)}
        found = np.full((len(cells[0, 0]), *canvas.shape), NONE)
        for cell, named in cells.items():
            found[(slice(None), *cell)] = [NONE if at is None else numbers[at] for at in named]
        return list(found)

    return slow


def slow_motions(grid, numbers, canvas):
    """By rolling the numbers of the grid's cells, then turning them."""
    steps = [(0, 0), *(step for step in itertools.product(range(-2, 3), repeat=2) if step != (0, 0))]
    rolled = [np.roll(numbers, (-r, -c), (0, 1)) for r, c in steps]
    turned = [
        slow_symmetries(grid, each, canvas) for each in rolled
    ]  # by step, then by symmetry, none of them the identity
    plain = [np.full(canvas.shape, NONE) for _ in steps]
    for each, own in zip(rolled, plain, strict=True):
        own[: grid.shape[0], : grid.shape[1]] = each
    return [*plain[1:], *(of_step[symmetry] for symmetry in range(7) for of_step in turned)]


def slow_falls(grid, numbers, canvas):
    """By letting the coloured cells of each line fall."""
    found = []
    for turns in range(4):
        cells, places = np.rot90(grid, turns), np.rot90(numbers, turns)
        fallen = [
            [*row_places[row == 0], *row_places[row > 0]]
            for row, row_places in zip(cells, places, strict=True)
        ]
        found.append(np.full(canvas.shape, NONE))
        found[-1][: grid.shape[0], : grid.shape[1]] = np.rot90(np.array(fallen), -turns)
    return found


def slow_slides(grid, numbers, canvas):
    """By moving the cells of a colour step by step."""
    found = []
    for (r, c), most in itertools.product(((0, 1), (1, 0), (0, -1), (-1, 0)), (99, 1)):
        for colour in range(1, 10):
            body = {tuple(cell) for cell in np.argwhere(grid == colour).tolist()}
            steps, free = (
                0,
                set(np.ndindex(grid.shape))
                - {tuple(cell) for cell in np.argwhere((grid > 0) & (grid != colour)).tolist()},
            )
            while (
                body
                and steps < most
                and all((a + (steps + 1) * r, b + (steps + 1) * c) in free for a, b in body)
            ):
                steps += 1
            places = np.full(canvas.shape, NONE)
            places[: grid.shape[0], : grid.shape[1]] = numbers
            for cell in body if steps else ():
                places[cell] = NONE
            for a, b in body:
                places[a + steps * r, b + steps * c] = numbers[a, b]
            found.append(places)
    return found


def on(canvas, answers):
    """Answers of numbers as places of a canvas, which may be too small for them."""
    found = []
    for answer in answers:
        found.append(np.full(canvas.shape, NONE))
        rows, columns = (min(pair) for pair in zip(answer.shape, canvas.shape, strict=True))
        found[-1][:rows, :columns] = answer[:rows, :columns]
    return found


def slow_copies(grid, numbers, canvas):
    """By putting numbers side by side, repeating them, and replacing each by all of them."""

    def image(transform):
        return on(numbers, [dihedral(numbers, transform)])[0]

    def mirrored(*corner):  # the corner that shows the grid as it is
        rows = [
            np.hstack([np.flip(numbers, [axis for axis in (0, 1) if at[axis] != corner[axis]]) for at in row])
            for row in (((0, 0), (0, 1)), ((1, 0), (1, 1)))
        ]
        return np.vstack(rows)

    def of_grids(copied):
        blocks = [
            [
                numbers if (value > 0) == copied else np.full(grid.shape, own)
                for value, own in zip(*row, strict=True)
            ]
            for row in zip(grid, numbers, strict=True)
        ]
        return np.block(blocks)

    answers = [np.tile(numbers, times) for times in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (3, 3))]
    answers += [np.hstack((numbers, numbers[:, ::-1])), np.hstack((numbers[:, ::-1], numbers))]
    answers += [np.vstack((numbers, numbers[::-1])), np.vstack((numbers[::-1], numbers))]
    answers += [mirrored(*corner) for corner in np.ndindex(2, 2)]
    answers += [np.block([[image(0), image(1)], [image(3), image(2)]])]
    answers += [np.block([[image(0), image(3)], [image(1), image(2)]])]
    scales = ((1, 2), (2, 1), (2, 2), (3, 3), (4, 4))
    answers += [numbers.repeat(rows, 0).repeat(columns, 1) for rows, columns in scales]
    return on(canvas, [*answers, of_grids(True), of_grids(False)])


def slow_crops(grid, numbers, canvas):
    """By slicing at the first and last row and column of some cells."""
    counts = {colour: (grid == colour).sum() for colour in range(1, 10)}
    present = {colour: count for colour, count in counts.items() if count} or {1: 0}
    most, least = max(counts, key=counts.get), min(present, key=present.get)
    masks = [grid > 0, *(grid == colour for colour in (*counts, most, least)), np.zeros(grid.shape, bool)]
    of_size = {}
    for cell in map(tuple, np.argwhere(grid > 0)):
        of_size.setdefault(objects(grid, *cell)[0], []).append(cell)
    if of_size:
        masks[-1][tuple(zip(*max(of_size.values(), key=len), strict=True))] = True
    answers = {0: [], 1: []}
    for mask in masks:
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        box = numbers[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else numbers[:0]
        answers[0].append(box)
        answers[1].append(box[1:-1, 1:-1])
    return on(canvas, [*answers[0], *answers[1]])


def slow_panels(grid, numbers, canvas):
    """By splitting the numbers; one line between panels is left out."""

    def split(length, parts):
        lined = parts > 1 and (length + 1) % parts == 0
        part = (length + 1) // parts - 1 if lined else length // parts
        even = part > 0 and (lined or length % parts == 0)
        return [
            slice(at, at + part if even else at) for at in range(0, parts * (part + lined), part + lined or 1)
        ][:parts]

    answers = []
    for down, across in ((1, 2), (1, 3), (2, 1), (3, 1), (2, 2)):
        places = list(itertools.product(split(grid.shape[0], down), split(grid.shape[1], across)))
        places += [(slice(0, 0), slice(0, 0))] * (down * across - len(places))
        coloured = [int((grid[place] > 0).sum()) for place in places]
        places += [places[coloured.index(count)] for count in (max(coloured), min(coloured))]
        answers += [numbers[place] for place in places]
    return on(canvas, answers)


def over_the_border(reach):
    steps = [step for step in itertools.product(range(-reach, reach + 1), repeat=2) if step != (0, 0)]
    return lambda grid, row, column: [
        ((row + r) % grid.shape[0], (column + c) % grid.shape[1]) for r, c in steps
    ]


def rays(grid, row, column):
    found = []
    for r, c in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        at = row + r, column + c
        while at in np.ndindex(grid.shape) and not grid[at]:
            at = at[0] + r, at[1] + c
        found.append(at if at in np.ndindex(grid.shape) else None)
    return found


SLOW = {
    "symmetries": slow_symmetries,
    "neighbours": slow_neighbours,
    "around": of_each_cell(over_the_border(1)),
    "shifts": of_each_cell(over_the_border(2)),
    "motions": slow_motions,
    "falls": slow_falls,
    "slides": slow_slides,
    "copies": slow_copies,
    "crops": slow_crops,
    "panels": slow_panels,
    "rays": of_each_cell(rays),
    "lines": of_each_cell(lambda grid, row, column: [(row, 0), (0, column), (0, 0)]),
    "objects": of_each_cell(objects),
    "colours": of_each_cell(
        lambda grid, *cell: [next(at for at in np.ndindex(grid.shape) if grid[at] == grid[cell])]
    ),
}


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colours", [2, 10])
def test_places_are_those_of_a_slow_look_at_the_grid(name, shape, colours):
    side, offset = 8, (2, 1)
    grid = rng.integers(0, colours, shape)
    found = places_of([name], torch.from_numpy(encode(grid, side, offset))[None])[0].numpy()
    assert found.shape == (side * side, RELATIONS[name].count)
    numbers = np.arange(side * side).reshape(side, side)
    rows, columns = (slice(first, first + length) for first, length in zip(offset, shape, strict=True))
    below = numbers[offset[0] :, offset[1] :]  # what is above or left of a grid is looked at elsewhere
    slow = np.stack(SLOW[name](grid, numbers[rows, columns], below), axis=-1)
    assert np.array_equal(found.reshape(side, side, -1)[offset[0] :, offset[1] :], slow)


@pytest.mark.parametrize("turns", range(4))
def test_one_long_object_is_one_object(turns):
    """The way through a spiral is as long as half of its canvas."""
    spiral = np.zeros((30, 30), np.int64)
    row = column = 0
    spiral[0, 0], step = 1, (0, 1)
    for length in [29, *itertools.chain.from_iterable((side, side) for side in range(29, 0, -2))]:
        for _ in range(length):
            row, column = row + step[0], column + step[1]
            spiral[row, column] = 1
        step = step[1], -step[0]
    grid = np.rot90(spiral, turns)
    found = places_of(["objects"], torch.from_numpy(encode(grid, 30))[None])[0, :, 0].numpy()
    way = np.flatnonzero(grid)
    assert len(way) > 400 and (found[way] == way[0]).all() and (found[grid.ravel() == 0] != way[0]).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_places_move_with_the_grid_and_know_nothing_of_the_canvas(shape):
    grid, names = rng.integers(0, 10, shape), list(RELATIONS)
    one, other = (
        places_of(names, torch.from_numpy(encode(grid, side, offset))[None])[0].unflatten(0, (side, side))
        for side, offset in ((6, (0, 0)), (9, (3, 2)))
    )
    row, column = (torch.where(one >= 0, at, 0) for at in (one // 6, one % 6))
    moved = torch.where(one >= 0, (row + 3) * 9 + column + 2, NONE)
    assert torch.equal(other[3:9, 2:8], moved)


def test_a_canvas_without_a_grid_has_no_places():
    tokens = torch.full((2, 36), PAD, dtype=torch.uint8)
    tokens[1] = 1  # EOS everywhere
    assert (places_of(list(RELATIONS), tokens) == NONE).all()


def test_the_frame_of_an_answer_that_a_turn_makes_taller_is_told_of_the_grid():
    grid = rng.integers(0, 10, (2, 3))
    canvas = torch.from_numpy(encode(grid, 4)).long()
    turned = places_of(["symmetries"], canvas[None])[0][:, 0].view(4, 4)  # dihedral index 1
    assert np.array_equal(canvas[turned[:3, :2]].numpy() - 2, dihedral(grid, 1))
    assert (turned[3] == NONE).all() and (turned[:, 2:] == NONE).all()


def test_a_branch_reads_exactly_what_stands_at_its_places():
    names = list(RELATIONS)
    places = places_of(names, episodes().data["inputs"])
    x = torch.randn(4, SIDE**2, 8)
    columns = [(relation, name) for relation, name in enumerate(names) for _ in range(RELATIONS[name].count)]
    for column, (relation, name) in enumerate(columns):  # one place alone, its channels copied there and back
        branch = Relate(8, names)
        with torch.no_grad():
            branch.down_proj.weight.zero_()[8 * relation : 8 * relation + 8] = torch.eye(8)
            branch.up_proj.weight.zero_()[:, 8 * column : 8 * column + 8] = torch.eye(8)
        read = branch(x, Index.of(places, names))
        for sample, cell in itertools.product(range(4), range(SIDE**2)):
            place, expected = places[sample, cell, column], torch.zeros(8)
            if place != NONE and RELATIONS[name].shared:
                group = x[sample, places[sample, :, column] == place]
                expected = torch.cat((group.mean(0)[:-1], torch.tensor([(1 + len(group))]).log2() / 4))
            elif place != NONE:
                expected = x[sample, place]
            assert torch.allclose(read[sample, cell], expected, atol=1e-5)


@pytest.mark.parametrize(
    "overrides", [ON, PREFIX, [*ON, "encoder.pair_tokens=concatenated"]], ids=["memory", "prefix", "cells"]
)
def test_every_weight_of_a_branch_and_of_the_path_gets_a_gradient(overrides, fewshot):
    model = make_model(fewshot, *overrides).train()
    one_loss(model, episodes().data).backward()
    parts = {
        name: p.grad for name, p in model.named_parameters() if "relate" in name or "colour_proj" in name
    }
    assert len(parts) == 2 * len(model.L_level.layers) + 2 * len(model.context.pairs.layers) + 1
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in parts.values())


def test_without_relations_there_is_no_weight_and_old_checkpoints_fit(fewshot):
    plain = make_model(fewshot, "encoder=memory")
    assert not [name for name in plain.state_dict() if "relate" in name or "colour" in name.split(".")[0]]
    data = episodes().data
    assert (
        plain.prepared(data) is data
        and plain.context(data).colours is plain.context(data).prefix_places is None
    )
    for name in ("rules", "arc-small", "sudoku-6x6"):
        (folder,) = (ROOT / "pretrained" / name / "checkpoints").iterdir()
        model, _ = load_checkpoint(folder, "ema")
        assert model.config.relations == []
        encoder = getattr(model.context, "config", None)  # a model of puzzles has none
        assert encoder is None or encoder.relations == []


@pytest.mark.parametrize("branch", ["arch.relations", "encoder.relations", "encoder.colour_path"])
def test_a_branch_that_adds_nothing_leaves_every_bit(branch, fewshot):
    value = "true" if branch.endswith("path") else f"[{NAMES}]"
    plain, model = (make_model(fewshot, "encoder=memory", *own).eval() for own in ([], [f"{branch}={value}"]))
    model.load_state_dict(plain.state_dict(), strict=False)
    for name, parameter in model.named_parameters():
        if name.endswith("relate.up_proj.weight") or "colour_proj" in name:
            parameter.data.zero_()
    data = episodes().data
    answers = [act_step(each, initial_carry(each, data), data).logits for each in (plain, model)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("positions", ["rope2d", "rope2d_values"])
@pytest.mark.parametrize("overrides", [ON, PREFIX, DRAFTS], ids=["memory", "prefix", "drafts"])
def test_packing_changes_no_gradient(overrides, positions, fewshot, monkeypatch):
    model = make_model(
        fewshot, *overrides, f"encoder.positions={positions}", f"arch.pos_encodings={positions}"
    ).train()
    data = episodes().data
    data["demo_mask"][0, 0] = False
    data["demo_inputs"][:, -1] = torch.from_numpy(encode(rng.integers(0, 10, (3, 2)), SIDE))
    results = []
    for length in (10**6, 1):
        monkeypatch.setattr(layers, "PACKED_LENGTH", length)
        monkeypatch.setattr(layers, "PACKED_SHARE", 2.0)
        model.zero_grad()
        loss = one_loss(model, data)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("overrides", [ON, PREFIX, DRAFTS], ids=["memory", "prefix", "drafts"])
def test_hidden_demonstrations_and_what_lies_behind_them_are_never_read(overrides, fewshot):
    model = make_model(fewshot, *overrides).eval()
    data = episodes().data
    data["demo_mask"][:, -1] = False
    answers = []
    for filled in (PAD, 7):
        data["demo_inputs"][:, -1], data["demo_labels"][:, -1] = filled, filled
        answers.append(act_step(model, initial_carry(model, data), data).logits)
    assert torch.allclose(*answers, atol=1e-5)


@pytest.mark.parametrize("overrides", [[], PREFIX[-1:], FEW_DRAFTS], ids=["memory", "prefix", "drafts"])
def test_a_compiled_step_is_one_graph_with_the_same_gradients(overrides, fewshot):
    model = make_model(fewshot, *FEW, *overrides).train()  # a graph takes long to trace
    data = episodes().data
    states = act_step(model, initial_carry(model, data), data).carry.states

    def run(step) -> list[torch.Tensor]:
        model.zero_grad()
        logits = step(states, data)
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    def step(states, data):
        return model(states, data, model.context(data)).logits

    plain, compiled = run(step), run(torch.compile(step, fullgraph=True, backend="eager", dynamic=False))
    assert len(plain) == len(compiled)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, compiled, strict=True))
    torch.compiler.reset()


def test_places_are_computed_once_per_batch_in_evaluation_and_stay_with_a_row(fewshot, monkeypatch):
    model = make_model(fewshot, *ON).train()
    data, other = episodes().data, episodes(seed=1).data
    other["inputs"][:] = torch.from_numpy(encode(rng.integers(0, 10, (5, 2)), SIDE))
    carry = act_step(model, initial_carry(model, data), data).carry
    carry = dataclasses.replace(carry, halted=torch.tensor([True, False, True, False]))
    kept = act_step(model, carry, other).carry.data
    expected = places_of(list(RELATIONS), kept["inputs"])
    assert torch.equal(kept["places"], expected) and not torch.equal(expected[0], expected[1])

    seen = []
    monkeypatch.setattr(
        core, "places_of", lambda names, tokens, _: seen.append(len(tokens)) or places_of(names, tokens)
    )
    solve(model.eval(), data)
    assert seen == [4] and model.config.halt_max_steps > 1


def test_the_places_of_a_query_are_not_those_of_another_one(fewshot, monkeypatch):
    """Where demonstrations become queries, in a search and in the reconstruction."""
    model = make_model(fewshot, *ON).train()
    data = model.prepared(episodes().data)
    data["demo_inputs"][:, 0] = torch.from_numpy(encode(rng.integers(0, 10, (2, 3)), SIDE))
    rows, _ = leave_one_out(data)
    assert "places" not in rows
    left_out = LeaveOneOut(model, data, OBJECTIVE)
    assert torch.equal(left_out.rows["places"], places_of(list(RELATIONS), left_out.rows["inputs"]))
    output, asked = act_step(model, initial_carry(model, data), data), []
    monkeypatch.setattr(act, "refresh", lambda carry, data, *_: asked.append(data) or carry)
    reconstruction_loss(model, output, OBJECTIVE)
    assert torch.equal(asked[0]["inputs"], data["demo_inputs"][:, 0]) and "places" not in asked[0]


def test_tasks_trained_side_by_side_are_trained_as_one_by_one(fewshot):
    trainer = Trainer(fewshot, *DRAFTS)
    model, questions = outspoken(trainer), EvaluationSet(fewshot, trainer.config.data, "test", 2, 0)
    lessons, _ = lessons_of(questions, questions.asked)
    alike = [
        one for one in lessons if (one.side, len(one.pairs)) == (lessons[0].side, len(lessons[0].pairs))
    ][:2]
    training = TaskTraining(ttt_config(), respondent_of(trainer), seed=0, batch_size=8)
    both, first, second = (training.train(questions, stack) for stack in (alike, alike[:1], alike[1:]))
    for number, alone in enumerate((first, second)):
        for name, value in alone.weights(0).items():
            torch.testing.assert_close(both.weights(number)[name], value, rtol=1e-4, atol=1e-5)
    moved = first.weights(0)
    assert all(not torch.equal(moved[name], p) for name, p in model.named_parameters() if "relate" in name)


def test_tokens_of_a_pair_and_of_a_prefix_have_the_places_of_their_input(fewshot):
    data = episodes().data
    of_demos = places_of(list(RELATIONS), data["demo_inputs"].flatten(0, 1)).unflatten(0, (4, 3))
    for tokens in ("summed", "concatenated"):
        context = make_model(fewshot, *PREFIX, f"encoder.pair_tokens={tokens}").context(data)
        length = (context.prefix.shape[1] - 1) // 3
        assert (context.prefix_places[:, 0] == NONE).all()
        for demo, cell in itertools.product(range(3), range(length)):
            expected = of_demos[:, demo, cell % SIDE**2]
            start = 1 + demo * length
            assert torch.equal(
                context.prefix_places[:, start + cell], torch.where(expected >= 0, expected + start, NONE)
            )


@pytest.mark.parametrize("overrides, words", [
    (["arch.relations=[symmetry]"], "symmetries"),
    (["arch.relations=[neighbours,neighbours]"], "twice"),
    ([*MIXER, "arch.relations=[symmetries]"], "beside attention"),
    (["encoder.relations=[symmetries]", "encoder.num_layers=0"], "num_layers"),
    (["encoder=standard", "encoder.colour_path=true"], "colour_path"),
])  # fmt: skip
def test_what_relations_cannot_be_is_said(overrides, words, fewshot):
    with pytest.raises(Exception, match=words):
        load_config(fewshot, *overrides)


def test_the_grids_of_a_game_have_the_relations_of_the_same_arc_grids(tmp_path):
    values = np.random.default_rng(0).integers(0, 5, (3, 16), np.uint8)
    game, names = Vocabulary(5, eos=False), list(RELATIONS)
    found = places_of(names, torch.from_numpy(values + game.first), game)
    assert torch.equal(found, places_of(names, torch.from_numpy(values + ARC.first)))
    store = write_sudokus(tmp_path / "sudoku")
    trainer = Trainer(store, "data=sudoku", "data.buckets=[4]", "arch.relations=[neighbours]")
    inputs = trainer.batch().data["inputs"]
    assert torch.equal(
        trainer.state.model.prepared({"inputs": inputs})["places"],
        places_of(["neighbours"], inputs, store.game.vocabulary),
    )


def test_the_names_that_a_configuration_takes_are_the_table():
    assert relations.RelationName.__args__ == tuple(RELATIONS)
