"""How many tokens are real, and packing: what is counted, and that layouts compute the same."""

import argparse

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import packing, real_tokens
from benchmarks.packing import FRAMES, LAYOUTS, Episodes, Stack, attention_of, cells_of, framed, packs, padded
from benchmarks.real_tokens import Canvases, Statistics, Tokens
from dataset.batch import materialise
from dataset.samplers import EpisodeSampler
from tests.support.grids import write_store
from tests.support.runs import called, data_config_of, load_config

TINY = [
    "arch.hidden_size=16",
    "arch.num_heads=2",
    "arch.H_cycles=1",
    "arch.L_cycles=1",
    "arch.halt_max_steps=2",
]


def test_canvases_are_read_as_a_list_or_as_steps():
    assert Canvases.read("every10:1").sides == [10, 20, 30]
    assert Canvases.read("every7:0").sides == [2, 9, 16, 23, 30]
    assert Canvases.read("4,9:2").overrides[1:] == ["data.buckets=[4, 9]", "data.canvas_margin=2"]
    for wrong in ("4,9", "every:1", "4-9:1"):
        with pytest.raises(argparse.ArgumentTypeError, match="sides and a margin"):
            Canvases.read(wrong)


def test_real_cells_counted_from_shapes_are_those_that_are_drawn(fewshot):
    config = data_config_of(fewshot, buckets=[9], augmentation="none", translate=False)
    samples = EpisodeSampler(fewshot, config, 0, 32).sample(3)
    drawn = Tokens.of(materialise(samples, fewshot, fewshot.grid_table)).query
    episodes = Episodes(fewshot, samples.query, samples.demos, trains=True)
    assert drawn.tolist() == [episodes.real(np.full((32, 2), 9)).sum(), 32 * 81]


def test_frames_of_training_samples_hold_their_answers(fewshot):
    samples = EpisodeSampler(fewshot, data_config_of(fewshot, buckets=[9]), 0, 32).sample(3)
    episodes = Episodes(fewshot, samples.query, samples.demos, trains=True)
    for rule in FRAMES.values():
        assert (framed(episodes, rule, 0) >= episodes.outputs(episodes.query)).all()
    assert (framed(episodes, FRAMES["all grids shown"], 1) >= episodes.inputs(episodes.demos).max(1)).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_packed_sample_is_computed_as_it_is_alone(name, monkeypatch):
    monkeypatch.setattr(packing, "_flex", flex_attention)  # compiling it takes longer than the test
    torch.manual_seed(0)
    frames, stack = np.array([[2, 3], [4, 4], [1, 2], [3, 1]]), Stack(16, torch.float32)
    (first, *rest) = packs(frames, 24)
    assert [len(part) for part in first] == [17, 7] and sum(map(len, rest[0])) == 24
    pack = rest[0]
    x = torch.randn(1, 24, 16)
    call = LAYOUTS[name](pack)
    with torch.no_grad(), attention_of(call):
        together = stack(call, x)
    lengths = [len(part) for part in pack]
    for part, inside, outside in zip(pack, x.split(lengths, 1), together.split(lengths, 1), strict=True):
        with torch.no_grad():
            alone = stack(packing.Call(1, part), inside)
        assert torch.allclose(alone, outside, atol=1e-5)


def test_square_canvases_are_batched_by_side():
    calls = padded(np.array([[5, 5]] * 5 + [[3, 3]]), batch=2)
    assert [(call.rows, len(call.cells)) for call in calls] == [(1, 10), (2, 26), (2, 26), (1, 26)]
    assert cells_of(np.array([2, 2])).tolist() == [0, 1, 2, 31, 32]


def test_more_canvases_have_more_samples_in_flight(tmp_path):
    store = write_store(tmp_path / "data", train=20, side=9)

    def of(*buckets: int) -> Statistics:
        config = load_config(store, f"data.buckets={list(buckets)}", "train_steps=50", "global_batch_size=4")
        return Statistics.of(config, store, EpisodeSampler(store, config.data, 0, 4))

    one, several = of(9), of(7, 8, 9)
    assert several.buckets > one.buckets and several.in_flight == 4 * several.buckets
    assert several.tasks < one.tasks and several.wait > one.wait and several.unfinished >= one.unfinished


def test_canvases_take_turns_in_training(fewshot, capsys, monkeypatch):
    canvases = ("--canvases", "9:0", "5,7,9:0", "--draws", 3, "--rounds", 2, "--steps", 1, "--batch", 2)
    called(monkeypatch, real_tokens.main, fewshot.path, *canvases, "--overrides", *TINY)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["9:0", "5,7,9:0"]
    assert "1.00 [1.00, 1.00]" in lines[-2] and lines[-1].startswith("5,7,9:0")


def test_layouts_take_turns(fewshot, capsys, monkeypatch):
    monkeypatch.setattr(packing, "_flex", flex_attention)
    sizes = ("--widths", 16, "--samples", 3, "--draws", 3, "--rounds", 1, "--pack", 64)
    called(monkeypatch, packing.main, fewshot.path, "--canvases", "9:0", "5,7,9:0", *sizes)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("packed, ") for line in lines) == 2 * len(LAYOUTS)
    assert all(line.endswith("-") for line in lines if "FlexAttention" in line)
