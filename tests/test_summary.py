"""Counting: parameters, FLOPs and activations."""

import pytest
import torch
from torch import Tensor

from config import compose
from config.schema import PretrainConfig
from dataset.batch import Bucket, DataSizes
from models import layers
from models.act import act_step, initial_carry
from models.losses import act_loss
from models.trm import build_model
from tests.support.architectures import CASES, CONTEXTS, SIZES, config_of, data_of, model_of
from tests.support.models import SIDE
from tests.support.runs import TINY, load_config
from tools import summary


@pytest.mark.parametrize("arch", ["trm", "hrm", "transformers_baseline"])
def test_flops_are_those_of_the_formula(arch):
    config = config_of(*CASES[arch, "puzzle"], no_ACT_continue=True)
    model = summary.on_meta(config, SIZES)
    counted = summary.cost(model, config, Bucket(SIDE, 0))
    hidden, state, width = 32, 2 + SIDE**2, 256
    block = 2 * state * (4 * hidden**2 + 3 * hidden * width) + 4 * state**2 * hidden
    layers = {"trm": 12, "hrm": 4 * 2 + 2 * 1, "transformers_baseline": 2}[arch]
    heads = 2 * hidden * (SIDE**2 * 12 + 2)
    assert counted.act_step == layers * block + heads and counted.context == 0
    assert counted.state_tokens == state


@pytest.mark.parametrize("context", CONTEXTS)
def test_activations_are_what_a_real_training_step_keeps(context, monkeypatch):
    monkeypatch.setattr(
        layers, "PACKED_LENGTH", 10**6
    )  # on CPUs a step keeps less than the estimate for every device
    config = config_of(*CASES["trm", context])
    model, data = model_of(config).train(), data_of(config)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        act_loss(act_step(model, initial_carry(model, data), data), config.objective)
    for owned in (*model.state_dict().values(), *data.values()):
        kept.pop(owned.untyped_storage().data_ptr(), None)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    estimate = summary.activation_bytes(summary.on_meta(config, SIZES), config, Bucket(SIDE, 3), 4)
    assert abs(estimate - real) < 0.02 * real


def test_the_summary_splits_parameters_and_weighs_the_cells_of_a_dataset(fewshot):
    config = load_config(fewshot, "data.min_demos=2", "data.max_demos=3")
    text = summary.summarise(config)
    model = build_model(config.arch, DataSizes(12, 1, None), config.encoder)
    trunk = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("context."))
    assert f"{trunk:>16,}" in text and " mean " in text and str(fewshot.path) in text
    sizes, shares, source = summary.training_buckets(config_of("data.path=nowhere"))
    assert list(shares) == [Bucket(SIDE, 10)] and "no dataset at nowhere" in source


@pytest.mark.parametrize("encoder", ["standard", "perceiver"])
def test_costs_are_counted_where_learned_queries_read(encoder):
    config = compose.load(
        PretrainConfig, "pretrain", [f"encoder={encoder}", *TINY, "arch.forward_dtype=float32"]
    )
    counted = summary.cost(summary.on_meta(config, SIZES), config, Bucket(SIDE, 3))
    assert 0 < counted.context < counted.train_step and counted.act_step < counted.train_step
