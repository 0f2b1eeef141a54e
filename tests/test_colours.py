"""The path for colours: which way of looking is trusted, and what a cell is handed."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from dataset.augment import dihedral
from dataset.canvas import encode
from models import layers
from models.colours import NO_COLOUR, ColourPath, looked_at
from models.latent_search import search
from tests.support.models import SIDE, episodes, make_model
from tests.support.protocols import SEARCH, outspoken
from tests.support.relations import EVIDENCE, ON, PREFIX
from tests.support.runs import Trainer

rng = np.random.default_rng(0)


def by_colour(model, context, inputs):
    places = model.placed({"inputs": inputs}).get("places")
    return context.by_colour(looked_at(inputs, places, model.place_names, context.colours))


def test_latent_search_moves_what_is_read_by_colour(fewshot):
    trainer = Trainer(fewshot, *EVIDENCE)
    model, data = outspoken(trainer), episodes().data
    context = model.context(data)
    shift = torch.randn_like(context.told)
    before, after = (by_colour(model, one, data["inputs"]) for one in (context, context.shifted(shift)))
    alone = by_colour(model, dataclasses.replace(context, memory=shift), data["inputs"])
    assert torch.allclose(after - before, alone, atol=1e-5)
    assert search(model, data, trainer.config.objective, SEARCH, torch.Generator()).isfinite().all()


@pytest.mark.parametrize(
    "overrides",
    [ON, PREFIX, [*ON, "encoder.pair_tokens=concatenated"], EVIDENCE],
    ids=["memory", "prefix", "cells", "evidence"],
)
def test_a_cell_is_handed_the_mean_of_the_tokens_of_its_colour(overrides, fewshot, monkeypatch):
    model = make_model(fewshot, *overrides).eval()
    data = episodes().data
    data["demo_mask"][0, 0] = False
    context = model.context(data)
    told, mask, scale = context.told, context.memory_mask, 1.0
    if context.memory is None:
        mask, scale = context.prefix_mask, 32**0.5
        assert (context.colours.of_tokens[:, 0, 0] == NO_COLOUR).all()  # the register
    found = by_colour(model, context, data["inputs"])
    shown = looked_at(data["inputs"], model.placed(data)["places"], model.place_names, context.colours)
    assert shown.shape[1] == context.colours.trusted.shape[1]
    for sample, cell in itertools.product(range(4), range(SIDE**2)):
        expected = torch.zeros(32)
        for way, trusted in enumerate(context.colours.trusted[sample]):
            chosen = (context.colours.of_tokens[sample, way] == shown[sample, way, cell]) & mask[sample]
            if shown[sample, way, cell] != NO_COLOUR and chosen.any():
                expected += scale * trusted * told[sample][chosen].mean(0)
        assert torch.allclose(found[sample, cell], expected, atol=1e-5)
    monkeypatch.setattr(layers, "PACKED_LENGTH", 1)
    monkeypatch.setattr(layers, "PACKED_SHARE", 2.0)
    assert torch.allclose(by_colour(model, context.packed(), data["inputs"]), found, atol=1e-5)
    rows = torch.tensor([2, 0])
    assert torch.allclose(
        by_colour(model, context.select(rows), data["inputs"][rows]), found[rows], atol=1e-5
    )


@pytest.mark.parametrize("colours", [False, True])
@pytest.mark.parametrize("rule", [0, 1, 4, 6, "shift"])
def test_the_way_of_looking_that_explains_the_demonstrations_is_trusted(rule, colours):
    names = ["symmetries", "shifts"]
    permutation = np.array([0, *rng.permutation(range(1, 10))]) if colours else np.arange(10)
    inputs = [rng.integers(0, 10, (4, 5)) for _ in range(3)]
    outputs = [
        permutation[np.roll(grid, (1, -2), (0, 1)) if rule == "shift" else dihedral(grid, rule)]
        for grid in inputs
    ]
    data = {
        name: torch.from_numpy(np.stack([encode(grid, SIDE) for grid in grids]))[None]
        for name, grids in (("demo_inputs", inputs), ("demo_labels", outputs))
    }
    data["demo_mask"] = torch.ones(1, 3, dtype=torch.bool)
    path = ColourPath.read(data, names)
    right = 1 + 7 + [*range(12), *range(13, 25)].index(5 * (2 - 1) + 2 + 2) if rule == "shift" else rule
    assert path.kept[0, 0] == right and path.trusted[0, 0] > 0.95 and path.trusted.sum() == pytest.approx(1)
    data["demo_labels"][:, 2] = torch.from_numpy(encode(rng.integers(0, 10, (5, 5)), SIDE))  # not shown
    data["demo_mask"][:, 2] = False
    path = ColourPath.read(data, names)
    assert path.kept[0, 0] == right and path.trusted[0, 0] > 0.95
    data["demo_labels"][:, 0] = torch.from_numpy(encode(rng.integers(0, 10, (5, 5)), SIDE))
    path = ColourPath.read(data, names)
    assert path.kept[0, 0] == 0 and path.trusted[0, 0] > 0.5  # nothing explains both: the cell itself
