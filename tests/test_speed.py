"""What makes steps fast changes no number; and the comparison with the ancestors, on toy sizes."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import data, speed
from benchmarks.ancestors import turns
from benchmarks.identical import ENCODER, as_the_ancestor
from benchmarks.processes import Contestant
from benchmarks.useful import useful_flops
from dataset.batch import Bucket, DataSizes
from dataset.canvas import PAD
from models import fused, layers
from tests.support.grids import write_store
from tests.support.models import SIDE, episodes, make_model, one_loss
from tests.support.runs import load_config, train_here
from tools.summary import cost, on_meta
from utils import device as devices
from utils.device import should_compile
from utils.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("encoder", ["memory", "standard", "perceiver"])
@pytest.mark.parametrize("positions", ["rope2d", "rope2d_values", "embedded"])
def test_packed_demonstrations_give_the_same_gradients(encoder, positions, fewshot, monkeypatch):
    model = make_model(fewshot, f"encoder={encoder}", f"encoder.positions={positions}")
    model.train()
    batch = episodes()
    batch.data["demo_mask"][0, 0] = False
    batch.data["demo_inputs"][:, -1, 5:] = PAD
    results = []
    for length in (10**6, 1):
        monkeypatch.setattr(layers, "PACKED_LENGTH", length)
        monkeypatch.setattr(layers, "PACKED_SHARE", 2.0)
        model.zero_grad()
        loss = one_loss(model, batch.data)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))


def test_a_memory_without_its_padding_is_shorter_and_gives_the_same_answer(fewshot, monkeypatch):
    model = make_model(fewshot, "encoder=memory").eval()
    batch = episodes()
    batch.data["demo_mask"][0, 0] = False
    batch.data["demo_labels"][:, -1, 5:] = batch.data["demo_inputs"][:, -1, 5:] = PAD
    dense = model.context(batch.data)
    monkeypatch.setattr(layers, "PACKED_LENGTH", 10**6)
    assert dense.packed() is dense
    states = [
        state.expand(len(batch.data["inputs"]), dense.prefix.shape[1] + SIDE**2, -1)
        for state in model.initial_states()
    ]
    answer = model(tuple(states), batch.data, dense).logits
    monkeypatch.setattr(layers, "PACKED_LENGTH", 1)
    packed = dense.packed()
    assert packed.memory.shape[1] == int(dense.memory_mask.sum(1).max()) < dense.memory.shape[1]
    assert packed.memory_mask.sum(1).tolist() == dense.memory_mask.sum(1).tolist()
    assert torch.allclose(model(tuple(states), batch.data, dense).logits, answer, atol=1e-5)


@pytest.mark.parametrize("encoder", ["memory", "standard"])
def test_hidden_demonstrations_leave_nothing_to_pack(encoder, fewshot, monkeypatch):
    """The control query_only on a canvas where demonstrations are packed."""
    model = make_model(fewshot, f"encoder={encoder}")
    batch = episodes()
    batch.data["demo_mask"][:] = False
    for name in ("demo_inputs", "demo_labels"):
        batch.data[name][:] = PAD
    plain = one_loss(model, batch.data)
    monkeypatch.setattr(layers, "PACKED_LENGTH", 1)
    assert torch.equal(one_loss(model, batch.data), plain)


def test_weights_are_cast_once_without_gradient_and_forgotten(fewshot):
    model = make_model(fewshot, "arch.forward_dtype=bfloat16")
    linear = model.L_level.layers[0].mlp.down_proj
    x = torch.randn(3, linear.weight.shape[1], dtype=torch.bfloat16)
    with layers.weights_cast_once([model.L_level], torch.bfloat16):
        assert linear.cast.dtype == torch.bfloat16 and not linear(x).requires_grad
        inside = linear(x)
    assert linear.cast is None and torch.equal(inside, linear(x)) and linear(x).requires_grad


@pytest.mark.slow
def test_compiled_chains_give_the_same_numbers(fewshot):
    model = make_model(fewshot, "encoder=memory")
    plain = one_loss(model, episodes().data)
    try:
        fused.compile_fused(True)
        assert torch.allclose(one_loss(model, episodes().data), plain, atol=1e-5)
    finally:
        fused.compile_fused(False)
        torch.compiler.reset()


def test_compiling_without_a_compiler_is_refused_unless_it_was_left_open(monkeypatch):
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        UserError, match=r"compile=true needs a C\+\+ compiler \(g\+\+\), which this machine lacks"
    ):
        should_compile(True, CPU, 1)
    assert [
        should_compile(wanted, device, 10**6) for wanted in ("auto", False) for device in (CPU, CUDA)
    ] == [False] * 4
    monkeypatch.setattr(devices.shutil, "which", lambda name: name)
    assert [should_compile("auto", CPU, steps) for steps in (499, 500)] == [False, True]


def test_a_machine_that_can_almost_compile_says_what_is_missing_in_a_line(monkeypatch):
    def lacks_headers(function):
        def compiled(x):
            text = "CppCompileError: C++ compile error\n\nCommand:\ng++ x.cpp\n\nOutput:\nx.h:5:10: "
            raise RuntimeError(
                f"{text}fatal error: Python.h: No such file or directory\n    5 | #include <Python.h>"
            )

        return compiled

    devices.compile_failure.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lacks_headers)
        said = []
        assert not should_compile("auto", CPU, 500, said.append)
        (line,) = said
        assert "Python.h: No such file" in line and "\n" not in line
        with pytest.raises(UserError, match="compile=true does not work on this machine .*Python.h"):
            should_compile(True, CPU, 1)
    devices.compile_failure.cache_clear()
    assert devices.compile_failure("cpu") is None


def test_attention_over_packed_sequences_stays_within_each():
    query, key, value = (torch.randn(1, 2, 7, 4) for _ in range(3))
    whole = layers.attend(query, key, value, layers.Packed([3, 4]))
    for part in (slice(0, 3), slice(3, 7)):
        alone = layers.attend(query[:, :, part], key[:, :, part], value[:, :, part], None)
        assert torch.allclose(whole[:, :, part], alone, atol=1e-6)


@pytest.mark.parametrize("encoder", ["memory", "standard"])
def test_useful_work_is_all_of_it_where_nothing_is_padding(encoder, fewshot):
    config = load_config(fewshot, f"encoder={encoder}", "arch.hidden_size=64", "arch.forward_dtype=bfloat16")
    data_ = {name: torch.full_like(value, 3) for name, value in episodes().data.items()}
    batch, demos = data_["demo_mask"].shape
    counted = cost(on_meta(config, DataSizes.of(fewshot, config.data)), config, Bucket(6, demos)).train_step
    assert useful_flops(config, data_) / batch == pytest.approx(counted, rel=0.04)
    data_["demo_inputs"][:, 0], data_["demo_labels"][:, 0] = PAD, PAD
    assert useful_flops(config, data_) / batch < 0.95 * counted


def test_a_contestant_answers_with_sums_seconds_and_memory(monkeypatch):
    answers = io.StringIO()
    monkeypatch.setattr(turns.sys, "stdin", ["2\n", "1\n"])
    turns.serve(lambda: {"samples": 4}, CPU, answers)
    two, one = map(json.loads, answers.getvalue().splitlines())
    assert two["samples"] == 8 and one["samples"] == 4 and one["memory"] > 1e6 and one["seconds"] > 0


ANCESTOR = """
import torch
from types import SimpleNamespace

class PretrainConfig:
    def __init__(self, arch, global_batch_size, ema_rate, **rest):
        self.global_batch_size, self.ema_rate, self.arch = global_batch_size, ema_rate, arch

class EMAHelper:
    def __init__(self, mu): pass
    def register(self, model): pass
    def update(self, model): pass

def init_train_state(config, metadata, rank, world_size):
    print("a model", metadata.num_puzzle_identifiers)
    return SimpleNamespace(model=torch.nn.Linear(900, 2))

def train_batch(config, state, batch, size, rank, world_size):
    batch = {name: value.cuda() for name, value in batch.items()}
    assert batch["inputs"].shape == (size, 900) and batch["inputs"].dtype == torch.int32
    assert config.arch["hidden_size"] == 32
    with torch.device("cuda"):
        state.model(torch.ones(size, 900))
"""


@pytest.mark.slow
def test_the_command_lets_both_take_turns_and_records(tmp_path, monkeypatch, capsys):
    checkout = tmp_path / "checkout"
    (checkout / "models" / "recursive_reasoning").mkdir(parents=True)
    (checkout / "models" / "recursive_reasoning" / "trm.py").touch()
    (checkout / "pretrain.py").write_text(ANCESTOR)
    results = tmp_path / "RESULTS.md"
    results.write_text(data.RESULTS.read_text())
    monkeypatch.setattr(speed, "RESULTS", results)
    monkeypatch.setattr(
        speed, "run", lambda command: write_store(Path(command[-1]), layout="puzzle", num_aug=2)
    )
    sizes = "hidden_size=32 num_heads=2 H_cycles=1 L_cycles=1"
    small = f"--what trm --batch 2 --rounds 2 --task-steps 1 --threads 1 --record --arch {sizes}"
    monkeypatch.setattr(sys, "argv", ["speed.py", "--against", str(checkout), *small.split()])
    before = results.read_text().splitlines()
    speed.main()
    printed = capsys.readouterr().out
    assert (
        "F.linear reaches" in printed
        and "theirs" in printed
        and "full canvas" in printed
        and "task canvas" in printed
    )
    header = next(line for line in before if "samples/s, theirs" in line)
    new = [line for line in results.read_text().splitlines() if line not in before]
    assert len(new) == 2 and all(
        row.count("|") == header.count("|") and str(tmp_path) not in row for row in new
    )
    assert results.read_text().splitlines()[-1] == before[-1]


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(UserError, match="--what trm needs --against, a checkout of SamsungSAILMontreal"):
        speed.parse_arguments(["--what", "trm"])
    with pytest.raises(UserError, match="no checkout of bdsaglam/etrm"):
        speed.parse_arguments(["--what", "eval", "--against", str(tmp_path)])
    with pytest.raises(UserError, match="--arch: depth is not one of hidden_size"):
        speed.parse_arguments(["--what", "small", "--arch", "depth=3"])


def test_an_ancestor_that_fails_is_quoted(tmp_path):
    contestant = Contestant(["-c", "raise ValueError('no luck')"], tmp_path, tmp_path / "log")
    with pytest.raises(UserError, match="exit status 1: ValueError: no luck"):
        contestant(1)


def test_a_deterministic_run_refuses_operations_that_are_not_and_the_next_run_does_not(fewshot, tmp_path):
    try:
        train_here(fewshot, tmp_path / "a", "train_steps=1", "deterministic=true")
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        train_here(fewshot, tmp_path / "a", "train_steps=2", "deterministic=false")
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        devices.only_deterministic(False)


def test_an_encoder_with_the_ancestors_mathematics_still_encodes(fewshot):
    model = as_the_ancestor(make_model(fewshot, *ENCODER)).eval()
    batch = episodes()
    padded = {**batch.data, "demo_inputs": torch.zeros_like(batch.data["demo_inputs"])}
    assert not torch.equal(model.context(batch.data).prefix, model.context(padded).prefix)
