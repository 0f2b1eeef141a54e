"""What only a GPU can show: no step waits for it, updates are taken back there as on a CPU, and the golden
numbers hold."""

from pathlib import Path

import pytest
import torch

from tests.golden import check as golden
from tests.support.attempts import CASES, trained
from tests.support.runs import Trainer, arguments_for, run, train_here, weights_of
from training.step import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GOLDEN = Path(__file__).parent / "golden"
WITHOUT_WAITING = [
    case for case in CASES if case != "several objectives"
]  # there the host solves for weights


class TrainerOnGPU(Trainer):
    device = torch.device("cuda")


@pytest.mark.parametrize("case", WITHOUT_WAITING)
def test_no_step_waits_for_a_gpu(case, request):
    layout, options = CASES[case]
    trainer = TrainerOnGPU(request.getfixturevalue(layout), *options)
    trainer.steps(3)  # tables and moments are made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            train_step(trainer.state, trainer.batch(), trainer.config, trainer.world)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", ["adam_atan2", "adamw", "muon", "puzzle rows", "fct"])
def test_a_gpu_takes_back_what_a_cpu_does_not_do(case, request):
    layout, options = CASES[case]
    store = request.getfixturevalue(layout)
    gpu, cpu = (trained(of(store, *options)).state for of in (TrainerOnGPU, Trainer))
    assert gpu.step == cpu.step
    for name, ours in gpu.model.state_dict().items():
        assert torch.allclose(ours.cpu(), cpu.model.state_dict()[name], atol=1e-3), name


@pytest.mark.parametrize("case", ["trm_attention", "trm_mlp_t", "hrm"])
def test_a_gpu_computes_the_golden_numbers(case):
    differences = golden.check_model(GOLDEN / case, torch.device("cuda"))
    assert {name: one for name, one in differences.items() if one.found > one.allowed} == {}


def farthest_from_one_process(store, output: Path, *launched: str) -> float:
    """The largest difference between the weights of two processes and those of one, after four steps."""
    options = ("device=cuda", "train_steps=4", "checkpoint_interval=4")
    _, *arguments = arguments_for(store, output / "two", *options)
    done = run(*launched, *arguments, world=2)
    assert done.returncode == 0, done.stderr
    train_here(store, output / "one", *options)
    one, two = (weights_of(output / name, 4) for name in ("one", "two"))
    return max((one[name] - two[name]).abs().max().item() for name in one)


SHARED = """
import torch
from torch import distributed
import pretrain_etrm
from training import start

begin = distributed.init_process_group
distributed.init_process_group = lambda backend, device_id=None, **rest: begin("gloo", **rest)
start.choose_device = lambda name, world: torch.device("cuda", 0)
pretrain_etrm.main()
"""


def test_two_processes_that_share_a_gpu_train_like_one(fewshot, tmp_path):
    # NCCL refuses two processes on one GPU; gloo takes tensors of a GPU, too.
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    assert farthest_from_one_process(fewshot, tmp_path, str(script)) <= 1e-4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_processes_with_a_gpu_each_train_like_one(fewshot, tmp_path):
    assert farthest_from_one_process(fewshot, tmp_path, "pretrain_etrm.py") <= 1e-4
