"""The floor of a training step: its products and bytes are those that a hand counts."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import roofline, useful
from benchmarks.full import full_batch
from benchmarks.roofline import Need, products_in, table
from benchmarks.useful import useful_flops
from dataset.batch import Bucket
from models.trm import build_model
from tests.support.architectures import SIZES
from tests.support.runs import TINY, called
from utils.errors import UserError

OPTIONS = [*TINY, "arch.H_cycles=1", "arch.halt_max_steps=2", "encoder.num_layers=1"]
CPU = torch.device("cpu")


def test_the_products_of_one_linear_layer_are_those_of_a_hand_count():
    layer, x = nn.Linear(5, 7, bias=False), torch.randn(3, 5, requires_grad=True)
    assert products_in(lambda: layer(x)) == 2 * 3 * 5 * 7
    # Backward: a product for the gradient of the input, and one for that of the weights.
    assert products_in(lambda: layer(x).sum().backward()) == 3 * 2 * 3 * 5 * 7


@pytest.mark.parametrize("encoder", ["memory", "standard"])
def test_the_products_of_a_step_are_the_formula_s(encoder):
    # Heads, which the formula leaves out, are small beside a hidden size of 64.
    config = roofline.configured([*OPTIONS, f"encoder={encoder}", "arch.hidden_size=64", "optimizer=adamw"])
    bucket = Bucket(6, 3)
    data = full_batch(bucket, config.global_batch_size, CPU).data
    assert Need.of(config, bucket).products == pytest.approx(useful_flops(config, data), rel=0.04)


def test_the_bytes_of_a_step_are_those_of_a_hand_count():
    config = roofline.configured([*OPTIONS, "optimizer=adamw"])
    weights = sum(p.nbytes for p in build_model(config.arch, SIZES, config.encoder).parameters())
    small, large = (
        Need.of(config.model_copy(update={"global_batch_size": size}), Bucket(6, 3)).moved for size in (4, 8)
    )
    # Read twice, written and read by the update; the gradient is written and read.
    assert small["parameters and gradients"] == 6 * weights
    assert small["averages"] == 2 * weights
    # Two numbers per parameter, each read and written. Each tensor also has a count of updates.
    assert small["moments of the optimiser"] == pytest.approx(4 * weights, rel=0.01)
    assert {name for name in small if small[name] != large[name]} == {"activations"}
    assert 1.8 * small["activations"] < large["activations"] <= 2 * small["activations"]


def test_the_longer_of_products_and_bytes_is_the_floor():
    seconds = np.array([0.5, 0.4, 0.6])
    lines = table(Need(10**9, {"all": 10**9}), 1e10, 2e10, seconds, 8)
    assert "floor 100.000 ms, reached 20.0%, of products 20.0%" in lines[-1] and "16.0 samples/s" in lines[-1]
    assert "floor 200.000 ms, reached 40.0%" in table(Need(10**9, {"all": 10**9}), 1e10, 5e9, seconds, 8)[-1]


@pytest.mark.parametrize("options", [["arch=etrm"], ["arch=trm", "data=arc1_puzzle"]])
def test_the_command_prints_a_table_for_each_canvas(options, monkeypatch, capsys):
    for name, value in {"PEAK_SECONDS": 0.01, "SIDE": {"cpu": 32}, "COPIED": {"cpu": 4096}}.items():
        monkeypatch.setattr(useful, name, value)
    tiny = [option for option in TINY if not option.startswith("data.buckets")]
    more = ["--canvas", "3", "4", "--steps", "1", "--rounds", "2", "--demonstrations", "2"]
    called(monkeypatch, roofline.main, *options, *tiny, *more)
    printed = capsys.readouterr().out
    assert re.search(r"a product reaches [\d.]+ TFLOP/s in float32, a copy [\d.]+ GB/s", printed)
    assert printed.count("\nproducts ") == printed.count("reached ") == 2
    assert all(
        f"canvas {side}, {2 * (options[0] == 'arch=etrm')} demonstrations" in printed for side in (3, 4)
    )


def test_a_step_whose_cost_depends_on_values_is_refused():
    for option in ("mode=supervised", "experiment=jd_loss_terms"):
        with pytest.raises(UserError, match="objective.split=sum"):
            roofline.configured([option])
