"""No step waits for its device: the meta device has no values, so that whoever asks for one is refused.

So is whoever mixes devices, and a copy from the host's memory that the device would have to wait for.
"""

from contextlib import contextmanager

import pytest
import torch
from pydantic import ValidationError
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from config.schema import PretrainConfig
from dataset.batch import Batch, Bucket, materialise
from dataset.samplers import SAMPLERS
from models.act import solve
from models.encoders import ENCODERS
from models.trm import ARCHITECTURES
from tests.support.architectures import SIZES, config_of
from tests.support.encoders import CASES as ENCODER_CASES
from tests.support.models import SIDE
from tests.support.runs import ALONE, load_config
from tools.summary import meta_data, on_meta
from training.ema import EMA
from training.meter import Meter
from training.optim import build_optimizers
from training.state import TrainState
from training.step import MODES, StepResult, train_step
from utils.transfer import Later

META, DEMOS, BATCH = torch.device("meta"), 2, 4
BUCKET = Bucket(SIDE, DEMOS)
BASE = ["arch.halt_max_steps=2", "train_steps=4"]
LAYERS = {
    "trm_hier6": ["arch.H_cycles=2", "arch.L_cycles=1", "arch.num_latents=1", "arch.L_layers=1"],
    "hrm": ["arch.H_layers=1", "arch.L_layers=1", "arch.L_cycles=1"],
    "transformers_baseline": ["arch.H_layers=1"],
}
ONE_LAYER = ["arch.H_cycles=2", "arch.L_cycles=1", "arch.L_layers=1"]


COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
MADE_OF_NUMBERS = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)


class _Copies(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in COPIES and result.device == META and any(one.device.type == "cpu" for one in args[:2]):
            assert (kwargs or {}).get("non_blocking") or True in args[2:], "a copy from the host"
        return result


class _Numbers(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert func not in MADE_OF_NUMBERS or result.device != META, "a tensor made of the host's numbers"
        return result


@contextmanager
def nothing_from_the_host():
    """Refuses copies from the host that stop a GPU: all but those that `sent` makes."""
    with _Copies(), _Numbers():
        yield


def config_with(arch: str, encoder: str | None, mode: str = "act") -> PretrainConfig | None:
    """A small configuration of these three; None where the rules of configurations forbid it."""
    layers = LAYERS.get(arch, ONE_LAYER)
    parts = {
        "arch": [f"arch={arch}", "arch.pos_encodings=rope2d", *layers],
        "encoder": [f"encoder={encoder}", "encoder.num_layers=1"] if encoder else ["arch=trm"],
        "mode": [f"mode={mode}", *(["mode.num_act_steps=2"] if mode == "fct" else [])],
    }
    changes = {name: getattr(config_of(*BASE, *options), name) for name, options in parts.items()}
    try:
        return PretrainConfig.model_validate(config_of(*BASE).model_copy(update=changes).model_dump())
    except ValidationError:
        return None


def state_of(config: PretrainConfig) -> TrainState:
    model = on_meta(config, SIZES)
    return TrainState(model, build_optimizers(model, config, META)[0], EMA(model, 0.9))


def steps_without_waiting(config: PretrainConfig, monkeypatch, updates: int = 1) -> list[StepResult]:
    """Two calls of `train_step`. Of the first one's updates the host hears one step late, as on a GPU."""
    heard: list[Later] = []
    monkeypatch.setattr(Later, "value", property(lambda self: heard.append(self) or 1.0))
    state, data = state_of(config), meta_data(BUCKET, config.encoder is not None, BATCH)
    with nothing_from_the_host():
        results = [train_step(state, Batch(BUCKET, data), config, ALONE) for _ in range(2)]
    assert heard and state.verdict._heard not in heard
    return results


def test_reading_a_number_in_a_step_is_refused_here():
    number = torch.ones(3, device=META)
    for read in (lambda: number.sum().item(), lambda: bool(number.any()), lambda: number[number > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()
    with pytest.raises(RuntimeError, match="meta"):
        number + torch.ones(3)
    for copy in (lambda: torch.ones(3).to(META), lambda: torch.tensor([1.0, 2.0], device=META)):
        with nothing_from_the_host(), pytest.raises(AssertionError):
            copy()


@pytest.mark.parametrize("encoder", [None, "memory"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_architecture_waits_in_a_step(arch, encoder, monkeypatch):
    config = config_with(arch, encoder)
    if config is None:
        assert encoder is None and arch in ("etrm", "trm001"), "these need an encoder"
        return
    for result in steps_without_waiting(config, monkeypatch):
        assert all(value.device == META for value in (*result.metrics.values(), *result.grad_norms.values()))


@pytest.mark.parametrize(
    "case", [*ENCODERS, "memory with relations", "prefix with relations", "memory with drafts"]
)
def test_no_encoder_waits_in_a_step(case, fewshot, monkeypatch):
    steps_without_waiting(load_config(fewshot, *BASE, *ENCODER_CASES[case]), monkeypatch)


@pytest.mark.parametrize("encoder", [None, "memory", "variational"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "act"])
def test_no_mode_waits_in_a_step(mode, encoder, monkeypatch):
    config = config_with("trm", encoder, mode)
    if config is None:
        assert (mode, encoder) == ("cached", None)
        return
    steps_without_waiting(config, monkeypatch)


OPTIONS = {
    "adamw": ["optimizer=adamw"],
    "muon": ["optimizer=muon"],
    "portions": ["micro_batch_size=2"],
    "frozen": ["freeze_encoder_steps=1"],
    "objectives": ["objective.reconstruct_weight=1", "objective.contrastive_weight=1"],
    "latent step": ["latent_step_from=0", "data.min_demos=2"],
    "noise": ["arch.dropout=0.1", "arch.carry_noise=0.1", "objective.differential_weight=1"],
    "depth": ["depth_schedule=[[0,1,1],[0.5,2,1]]"],
    "confidence": ["arch.halt_pooling=mean", "arch.no_ACT_continue=false"],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_option_waits_in_a_step(options, monkeypatch):
    steps_without_waiting(config_of("arch=etrm", *ONE_LAYER, *BASE, *options), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_architecture_with_any_encoder_waits_in_any_mode(arch, monkeypatch):
    found = {(e, m): config_with(arch, e, m) for e in (None, *ENCODERS) for m in MODES}
    forbidden = {of for of, config in found.items() if config is None}
    assert forbidden <= {*((None, mode) for mode in MODES), ("iterative", "cached")}
    for config in found.values():
        if config is not None:
            steps_without_waiting(config, monkeypatch)


@pytest.mark.parametrize("layout", ["fewshot", "puzzle"])
def test_drawing_a_batch_waits_for_nothing(layout, request):
    store = request.getfixturevalue(layout)
    config = load_config(store)
    sampler = SAMPLERS[layout](store, config.data, 0, 8)
    table = store.grid_table.to(META)
    with nothing_from_the_host():
        batch = materialise(sampler.sample(0), store, table)
    assert all(value.device == META for value in batch.data.values()) and batch.size == 8


@pytest.mark.parametrize("encoder", [None, "memory", "iterative"])
def test_answering_a_batch_waits_for_nothing(encoder):
    config = config_with("trm", encoder)
    model = on_meta(config, SIZES).eval()
    with nothing_from_the_host():
        answer = solve(model, meta_data(BUCKET, encoder is not None, BATCH))
    assert answer.logits.device == META and answer.logits.shape == (BATCH, SIDE**2, SIZES.vocab_size)


def test_the_sums_between_two_log_lines_wait_for_nothing(monkeypatch):
    results = steps_without_waiting(config_with("trm", "memory"), monkeypatch)
    meter = Meter()
    with nothing_from_the_host():
        for result in results:
            meter.add(result, BATCH)
    with pytest.raises((RuntimeError, NotImplementedError)):
        meter.read()
