"""Dtype and threads of a CPU: chosen where the device is, said, kept in the checkpoint, kept by a resume."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from config import compose
from config.schema import PretrainConfig
from dataset.store import Store
from evaluation.session import EvaluateConfig, Session
from evaluation.solver import Solver
from models.fused import Fused
from models.trial import trial
from tests.support.runs import ALONE, CPU, Trainer, arguments_for, train_here, weights_of
from training import start
from training.start import Run
from utils import checkpoint, device, processor
from utils.processor import choose_threads

AUTO = "arch.forward_dtype=auto"
AMX, AVX, PLAIN = {"amx_bf16", "avx512_bf16", "avx2"}, {"avx512_bf16", "avx2"}, {"avx2", "avx512f"}


@pytest.fixture(autouse=True)
def threads_as_before(monkeypatch: pytest.MonkeyPatch):
    """No limit from outside, two cores whatever the machine has, and one thread again afterwards."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processor, "all_threads", lambda: 2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that says nothing of threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def cpu_with(monkeypatch: pytest.MonkeyPatch, flags: set[str]) -> None:
    monkeypatch.setattr(processor, "cpu_flags", lambda: frozenset(flags))


def machine(seconds: dict[int, float]) -> tuple[Callable[[], None], Callable[[], float]]:
    """Work that takes so many seconds by number of threads, and the clock that says so."""
    now = [0.0]

    def work() -> None:
        now[0] += seconds[torch.get_num_threads()]

    return work, lambda: now[0]


def measured(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]) -> list[int]:
    """Let a comparison of threads find these seconds; the list grows with each."""
    asked: list[int] = []
    monkeypatch.setattr(processor, "compare_threads", lambda *_: asked.append(1) or seconds)
    return asked


# The dtype


@pytest.mark.parametrize(
    ("flags", "limits", "unit"),
    [
        (AMX, {}, "amx_bf16"),
        (AVX, {}, "avx512_bf16"),
        (PLAIN, {}, None),
        (set(), {}, None),
        (AMX, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "avx512_bf16"),
        (AMX, {"ONEDNN_MAX_CPU_ISA": "avx512_core_amx"}, "amx_bf16"),
        (AMX, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, None),
        (AVX, {"DNNL_MAX_CPU_ISA": "AVX2"}, None),
        (AMX, {"ATEN_CPU_CAPABILITY": "avx2"}, None),
        (AMX, {"ATEN_CPU_CAPABILITY": "avx512"}, "amx_bf16"),
    ],
)
def test_bfloat16_is_for_cpus_that_multiply_it_within_the_limits_set(flags, limits, unit, monkeypatch):
    cpu_with(monkeypatch, flags)
    for name, value in limits.items():
        monkeypatch.setenv(name, value)
    assert processor.bfloat16_unit() == unit
    dtype, why = device.faster_dtype(CPU)
    assert dtype == ("bfloat16" if unit else "float32") and (unit or "does not multiply") in why


def test_flags_are_read_from_the_system_and_none_without_it(tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    for text, flags in (("flags\t\t: fpu amx_bf16\n", {"fpu", "amx_bf16"}), ("Features : bf16\n", set())):
        file.write_text("processor : 0\n" + text)
        monkeypatch.setattr(processor, "_CPUINFO", file)
        assert processor.cpu_flags.__wrapped__() == flags
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "missing")
    assert processor.cpu_flags.__wrapped__() == set()


def test_every_recipe_leaves_the_dtype_to_the_device_unless_it_learns_by_heart():
    folder = Path(compose.CONFIG_DIR) / "experiment"
    for file in folder.glob("*.yaml"):
        config = compose.load(PretrainConfig, "pretrain", [f"experiment={file.stem}"])
        assert config.arch.forward_dtype == ("float32" if "overfit" in file.stem else "auto"), file.stem


def test_auto_is_settled_with_the_device_said_and_stored_as_it_was(fewshot, tmp_path, monkeypatch, capsys):
    cpu_with(monkeypatch, PLAIN)
    folder = train_here(fewshot, tmp_path, AUTO, "train_steps=1")
    info = checkpoint.load_info(checkpoint.resolve(folder))
    assert info["config"]["arch"]["forward_dtype"] == "float32"
    assert "forward_dtype: float32" in (folder / "config.yaml").read_text()
    assert f"{AUTO}: float32, this CPU does not multiply bfloat16" in capsys.readouterr().err


def test_a_resumed_run_keeps_the_dtype_that_auto_was_and_says_so(fewshot, tmp_path, monkeypatch, capsys):
    cpu_with(monkeypatch, AMX)
    train_here(fewshot, tmp_path / "whole", AUTO, "train_steps=4")
    folder = train_here(fewshot, tmp_path / "moved", AUTO, "train_steps=2")
    cpu_with(monkeypatch, PLAIN)
    capsys.readouterr()
    train_here(fewshot, tmp_path / "moved", AUTO, "train_steps=4")
    said = capsys.readouterr().err
    assert f"{AUTO}: bfloat16, as in the checkpoint, where this machine would take float32" in said
    assert checkpoint.load_info(checkpoint.resolve(folder))["config"]["arch"]["forward_dtype"] == "bfloat16"
    whole, resumed = (weights_of(tmp_path / name, 4) for name in ("whole", "moved"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_processes_on_unlike_machines_agree_on_float32(fewshot, tmp_path, monkeypatch):
    cpu_with(monkeypatch, AMX)
    asked = compose.load(PretrainConfig, "pretrain", [*arguments_for(fewshot, tmp_path)[1:], AUTO])
    gather = start.distributed.gather_objects

    def gathered(value):
        return [value, "float32"] if value == "bfloat16" else gather(value)

    monkeypatch.setattr(start.distributed, "gather_objects", gathered)
    run = Run(asked, ALONE)
    assert run.config.arch.forward_dtype == "float32" and run.model.config.forward_dtype == "float32"
    assert "another process" in run.notes[-1]


def test_an_evaluation_computes_as_the_training_did_unless_told_otherwise(fewshot, tmp_path, monkeypatch):
    cpu_with(monkeypatch, AMX)
    folder = train_here(fewshot, tmp_path, AUTO, "train_steps=1")
    cpu_with(monkeypatch, PLAIN)

    def opened(*overrides: str) -> Session:
        asked = [f"checkpoint={folder}", "device=cpu", *overrides]
        return Session.open(compose.load(EvaluateConfig, "evaluate", asked))

    as_trained = opened()
    assert as_trained.about()["model"]["forward_dtype"] == "bfloat16"
    (note,) = as_trained.notes
    assert "bfloat16 as in training" in note and "forward_dtype=float32 is faster" in note
    for asked in ("auto", "float32"):
        session = opened(f"forward_dtype={asked}")
        assert session.about()["model"]["forward_dtype"] == "float32" and not session.notes
        assert Solver.from_pretrained(folder, forward_dtype=asked).model.config.forward_dtype == "float32"
    assert Solver.from_pretrained(folder).model.config.forward_dtype == "bfloat16"


# The threads


@pytest.mark.parametrize(("with_two", "best", "share"), [(1.0, 1, 0.1), (0.06, 2, 0.6)])
def test_the_faster_of_one_thread_and_all_is_taken_and_said(free, with_two, best, share):
    said = choose_threads("auto", None, *machine({1: 0.1, 2: with_two}))
    assert torch.get_num_threads() == best
    assert said == (
        f"threads=auto: {best} of 2, a forward pass takes {share:.2f} of the time with {3 - best}"
    )


def test_a_comparison_ends_in_time_and_counts_no_warm_up():
    clock, calls = [0.0], []

    def work() -> None:
        calls.append(torch.get_num_threads())
        clock[0] += 9 if len(calls) <= 2 else 0.1 * calls[-1]

    found = processor.compare_threads((1, 2), work, 20.0, lambda: clock[0])
    assert found[1] == pytest.approx(0.1) and found[2] == pytest.approx(0.2)
    assert calls[:4] == [1, 2, 1, 2] and sum(0.1 * count for count in calls[2:]) < 20.4
    calls.clear()  # work that is slow: each number of threads has one turn
    assert processor.compare_threads((1, 2), work, 1.0, lambda: clock[0]) == {1: 9, 2: 9} and len(calls) == 2


def test_what_is_asked_or_set_by_the_environment_is_measured_by_nobody(monkeypatch):
    def work() -> None:
        raise AssertionError("this was to be measured by nobody")

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert choose_threads("auto", None, work) is None and torch.get_num_threads() == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert choose_threads(2, None, work) is None and torch.get_num_threads() == 2
    said = choose_threads(1, 2, work)
    assert torch.get_num_threads() == 1 and said == "2 threads in the checkpoint, 1 now: last bits may differ"


def test_the_threads_of_a_checkpoint_are_taken_again_where_there_are_so_many(free):
    def work() -> None:
        raise AssertionError("the checkpoint says it")

    assert choose_threads("auto", 2, work) == "threads=auto: 2, as in the checkpoint"
    assert torch.get_num_threads() == 2
    said = choose_threads("auto", 16, *machine({1: 1.0, 2: 0.5}))
    assert torch.get_num_threads() == 2 and said.endswith(
        "; 16 threads in the checkpoint, 2 now: last bits may differ"
    )


def test_a_run_measures_once_and_keeps_its_threads(free, fewshot, tmp_path, monkeypatch, capsys):
    comparisons = measured(monkeypatch, {1: 1.0, 2: 0.5})
    folder = train_here(fewshot, tmp_path, "train_steps=1")
    assert "threads=auto: 2 of 2" in capsys.readouterr().err
    assert checkpoint.load_info(checkpoint.resolve(folder))["threads"] == 2
    torch.set_num_threads(1)
    train_here(fewshot, tmp_path, "train_steps=2")
    assert "threads=auto: 2, as in the checkpoint" in capsys.readouterr().err
    assert len(comparisons) == 1 and torch.get_num_threads() == 2
    starts = json.loads((folder / "environment.json").read_text())
    assert [start["threads"] for start in starts] == [2, 2]
    train_here(fewshot, tmp_path, "train_steps=3", "threads=1")
    assert "2 threads in the checkpoint, 1 now" in capsys.readouterr().err


def test_an_older_checkpoint_goes_on_with_all_threads(free, fewshot, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(start, "all_threads", lambda: 2)
    measured(monkeypatch, {1: 0.5, 2: 1.0})
    folder = train_here(fewshot, tmp_path, "train_steps=1")
    path = checkpoint.resolve(folder) / checkpoint.INFO
    info = json.loads(path.read_text())
    del info["threads"], info["sha256"]
    path.write_text(json.dumps(info))
    train_here(fewshot, tmp_path, "train_steps=2")
    assert "threads=auto: 2, as in the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["fewshot", "puzzle"])
def test_a_trial_is_a_forward_pass_that_leaves_no_trace(layout, request, monkeypatch):
    store: Store = request.getfixturevalue(layout)
    trainer = Trainer(store)
    model, passes = trainer.model.train(), []
    for fused in Fused.known:
        monkeypatch.setattr(fused, "call", lambda *_: pytest.fail("a trial compiles nothing"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    model.lm_head.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    trial(model, trainer.config.data, 4)()
    assert passes == [False] and model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
