"""The path for colours: what a cell is handed."""

import dataclasses
import itertools

import pytest
import torch

from models import layers
from models.colours import NO_COLOUR
from models.latent_search import search
from tests.support.models import SIDE, episodes, make_model
from tests.support.protocols import SEARCH, outspoken
from tests.support.relations import DRAFTS, ON, PREFIX
from tests.support.runs import Trainer


def test_latent_search_moves_what_is_read_by_colour(fewshot):
    trainer = Trainer(fewshot, *DRAFTS)
    model, data = outspoken(trainer), episodes().data
    context = model.context(data)
    shift = torch.randn_like(context.told)
    before, after = (one.by_colour(data["inputs"]) for one in (context, context.shifted(shift)))
    alone = dataclasses.replace(context, memory=shift).by_colour(data["inputs"])
    assert torch.allclose(after - before, alone, atol=1e-5)
    assert search(model, data, trainer.config.objective, SEARCH, torch.Generator()).isfinite().all()


@pytest.mark.parametrize(
    "overrides", [ON, PREFIX, [*ON, "encoder.pair_tokens=concatenated"]], ids=["memory", "prefix", "cells"]
)
def test_a_cell_is_handed_the_mean_of_the_tokens_of_its_colour(overrides, fewshot, monkeypatch):
    model = make_model(fewshot, *overrides).eval()
    data = episodes().data
    data["demo_mask"][0, 0] = False
    context = model.context(data)
    told, mask, scale = context.told, context.memory_mask, 1.0
    if context.memory is None:
        mask, scale = context.prefix_mask, 32**0.5
        assert (context.colours[:, 0] == NO_COLOUR).all()  # the register
    found = context.by_colour(data["inputs"])
    for sample, cell in itertools.product(range(4), range(SIDE**2)):
        chosen = (context.colours[sample] == data["inputs"][sample, cell]) & mask[sample]
        expected = scale * told[sample][chosen].mean(0) if chosen.any() else torch.zeros(32)
        assert torch.allclose(found[sample, cell], expected, atol=1e-5)
    monkeypatch.setattr(layers, "PACKED_LENGTH", 1)
    monkeypatch.setattr(layers, "PACKED_SHARE", 2.0)
    assert torch.allclose(context.packed().by_colour(data["inputs"]), found, atol=1e-5)
    rows = torch.tensor([2, 0])
    assert torch.allclose(context.select(rows).by_colour(data["inputs"][rows]), found[rows], atol=1e-5)
