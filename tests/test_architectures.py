"""Every architecture, in every precision and with every kind of context: gradients, configuration."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from torch import Tensor

from config import compose
from config.compose import CONFIG_DIR
from config.schema import PretrainConfig
from dataset.batch import Batch, Bucket
from dataset.canvas import IGNORE_LABEL_ID
from models.act import act_step, initial_carry
from models.core import RecursiveModel
from models.encoders import ENCODERS
from models.losses import act_loss
from models.trm import ARCHITECTURES
from tests.support.architectures import (
    CASES,
    CPU,
    CYCLES,
    config_of,
    data_of,
    every_case,
    model_of,
    train_state,
)
from tests.support.models import SIDE, episodes
from tests.support.reads import unread_settings
from training.step import train_step
from utils.distributed import World


def reached_by_gradients(model: RecursiveModel) -> set[str]:
    """Names of parameters with a finite gradient other than zero since this call; it fills as they come."""
    touched: set[str] = set()

    def note(name: str, gradient: Tensor) -> None:
        if gradient.isfinite().all() and gradient.any():
            touched.add(name)

    for name, parameter in model.named_parameters():
        parameter.register_hook(functools.partial(note, name))
    return touched


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_case
def test_every_architecture_trains_and_its_checkpoint_restores_it(case, dtype, tmp_path):
    config = config_of(*CASES[case], forward_dtype=dtype)
    state = train_state(config)
    batches = [Batch(Bucket(SIDE, 3), data_of(config, seed)) for seed in range(4)]
    touched = reached_by_gradients(state.model)
    before = {name: value.clone() for name, value in state.model.named_parameters()}

    def losses(some: list[Batch]) -> list[float]:
        results = [train_step(state, batch, config, World()) for batch in some]
        assert all(result.updated for result in results)
        return [result.metrics["lm_loss"].item() for result in results]

    assert np.isfinite(losses(batches[:3])).all()
    for name, parameter in state.model.named_parameters():
        assert name in touched and not torch.equal(parameter, before[name]), name
        assert parameter.dtype == torch.float32 and state.ema.shadow[name].dtype == torch.float32, name
    (carry,) = state.carries.values()
    assert {value.dtype for value in carry.states} == {config.arch.dtype}
    path = state.save(tmp_path, World(), {}, keep=1)
    expected = losses(batches[3:])
    state = train_state(config)
    state.load(path, World(), CPU)
    assert losses(batches[3:]) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", CYCLES)
def test_every_architecture_trains_with_every_encoder(arch, dtype):
    small = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "output_tokens": 3, "latent_dim": 4}
    for name in ENCODERS:
        encoder = config_of(*CASES["etrm", "memory"], f"encoder={name}").encoder
        shrunk = {key: value for key, value in small.items() if getattr(encoder, key, None) is not None}
        values = dict(config_of(*CASES[arch, "memory"], forward_dtype=dtype))
        config = PretrainConfig(
            **values | {"encoder": encoder.model_copy(update=shrunk)}
        )  # each is composed once, every pair is checked
        state = train_state(config)
        touched = reached_by_gradients(state.model)
        results = [
            train_step(state, Batch(Bucket(SIDE, 3), data_of(config, seed)), config, World())
            for seed in range(3)
        ]
        assert all(result.updated and result.metrics["lm_loss"].isfinite() for result in results), name
        assert touched == dict(state.model.named_parameters()).keys(), name
        assert {p.dtype for p in state.model.parameters()} | {p.dtype for p in state.ema.shadow.values()} == {
            torch.float32
        }, name


@every_case
def test_q_learning_trains_q_continue_in_every_architecture(case):
    config = config_of(*CASES[case], no_ACT_continue=False)
    model = model_of(config).train()
    data = data_of(config)
    output = act_step(model, initial_carry(model, data), data)
    assert torch.equal(output.carry.halted, output.q_halt_logits > output.q_continue_logits)
    assert ((output.target_q_continue > 0) & (output.target_q_continue < 1)).all()
    loss, metrics = act_loss(output, config.objective)
    loss.backward()
    assert metrics["q_continue_loss"] > 0 and model.q_head.weight.grad[1].any()


SMALLEST = {
    "etrm": ["arch.H_cycles=2", "arch.L_cycles=1", "arch.L_layers=1", "encoder.num_layers=1"],
    "trm_singlez": ["arch.H_cycles=2", "arch.L_cycles=1", "arch.L_layers=1"],
    "trm_hier6": ["arch.H_cycles=1", "arch.L_cycles=2", "arch.L_layers=1", "arch.num_latents=2"],
    "hrm": ["arch.H_cycles=1", "arch.L_cycles=2", "arch.H_layers=1", "arch.L_layers=1"],
    "transformers_baseline": ["arch.H_layers=1"],
}


@pytest.mark.parametrize("arch", SMALLEST)
def test_every_architecture_is_one_graph_for_the_compiler_with_the_same_gradients(arch):
    config = config_of(f"arch={arch}", *SMALLEST[arch])
    model = model_of(config).train()
    data = data_of(config)
    states = act_step(model, initial_carry(model, data), data).carry.states
    rows = (
        None if config.encoder else model.context(data)
    )  # a look-up outside the graph: its rows are leaves of their own

    def step(states, data):
        return model(states, data, rows or model.context(data)).logits

    def run(step) -> list[Tensor]:
        model.zero_grad()
        logits = step(states, data)
        logits.square().mean().backward()
        return [
            logits.detach(),
            *(parameter.grad for parameter in model.parameters() if parameter.grad is not None),
        ]

    plain, compiled = run(step), run(torch.compile(step, fullgraph=True, backend="eager", dynamic=False))
    assert len(plain) == len(compiled) and all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, compiled, strict=True)
    )
    torch.compiler.reset()


@pytest.mark.parametrize("case, with_gradient, calls", [
    (("trm", "puzzle"), 3, 6), (("trm001", "memory"), 6, 6), (("hrm", "puzzle"), 2, 6),
    (("transformers_baseline", "puzzle"), 1, 1),
    (("trm_hier6", "puzzle"), 4, 8), (("trm_singlez", "puzzle"), 3, 6),
])  # fmt: skip
def test_every_update_of_the_supervised_window_receives_a_gradient_and_no_other(case, with_gradient, calls):
    config = config_of(*CASES[case], no_ACT_continue=True)
    model = model_of(config).train()
    made, reached = [], []

    def watch(module, inputs, output) -> None:
        made.append(output.requires_grad)
        if output.requires_grad:
            output.register_hook(lambda gradient: reached.append(bool(gradient.any())))

    for name in model.networks:
        model.get_submodule(name).register_forward_hook(watch)
    data = data_of(config)
    act_loss(act_step(model, initial_carry(model, data), data), config.objective)[0].backward()
    assert made == [False] * (calls - with_gradient) + [True] * with_gradient
    assert reached == [True] * with_gradient


@every_case
def test_the_initial_carry_is_never_read(case):
    config = config_of(*CASES[case])
    model = model_of(config).train()
    data = data_of(config)
    clean = initial_carry(model, data)
    assert not any(state.any() for state in clean.states)
    dirty = dataclasses.replace(
        clean, states=tuple(torch.full_like(state, torch.nan) for state in clean.states)
    )
    outputs = [act_step(model, carry, data) for carry in (clean, dirty)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)


@pytest.mark.parametrize("loss_type", ["softmax", "stablemax"])
@pytest.mark.parametrize("arch", ["trm", "hrm", "transformers_baseline"])
def test_every_token_loss_works_with_every_head(arch, loss_type):
    config = config_of(*CASES[arch, "puzzle"], f"objective={loss_type}")
    model = model_of(config).train()
    data = data_of(config)
    assert act_loss(act_step(model, initial_carry(model, data), data), config.objective)[0].isfinite()


def test_every_latent_is_updated_once_per_cycle():
    model = model_of(config_of(*CASES["trm_hier6", "puzzle"]))
    data = data_of(config_of(*CASES["trm_hier6", "puzzle"]))
    carry = initial_carry(model, data)
    after = act_step(model, carry, data).carry.states
    assert len(after) == 4
    for new, initial in zip(after, model.initial_states(), strict=True):
        assert not torch.allclose(new, initial.expand_as(new), atol=1e-2)


def test_the_puzzle_table_takes_any_batch_size():
    config = config_of(*CASES["trm", "puzzle"])
    model = model_of(config).train()
    for batch in (1, 3, 7):
        data = {name: value for name, value in episodes(batch).data.items() if not name.startswith("demo")}
        assert act_step(model, initial_carry(model, data), data).logits.shape[0] == batch


def test_a_row_of_one_token_feeds_the_q_head_with_that_token():
    model = model_of(config_of(*CASES["trm", "puzzle"], puzzle_emb_len=0))
    assert model.context.prefix_length(0, SIDE**2) == 1


def test_every_architecture_has_a_yaml_of_its_name_and_every_yaml_is_valid():
    files = {file.stem for file in (CONFIG_DIR / "arch").glob("*.yaml")}
    assert set(ARCHITECTURES) <= files
    for name in files:
        config = compose.load(
            PretrainConfig, "pretrain", [f"arch={name}", "data.canvas=full", "data.augmentation=none"]
        )
        assert config.arch.name == name or name not in ARCHITECTURES


def test_every_key_of_every_architecture_is_read_somewhere():
    kinds = {line.__name__ for config, _ in ARCHITECTURES.values() for line in config.__mro__}
    assert not [setting for setting in unread_settings() if setting.split(".")[0] in kinds]


def test_labels_that_are_all_ignored_train_nothing():
    config = config_of(*CASES["hrm", "puzzle"])
    model, data = model_of(config).train(), data_of(config)
    data["labels"] = torch.full_like(data["labels"], IGNORE_LABEL_ID)
    loss, metrics = act_loss(act_step(model, initial_carry(model, data), data), config.objective)
    assert loss == 0 and metrics["rows"] == 0
