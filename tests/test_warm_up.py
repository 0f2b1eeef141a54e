"""Processes compile before their first step: without a trace, and without the patience of a collective."""

import copy
import functools
import itertools

import pytest
import torch
from torch._dynamo.utils import counters

from models import fused
from tests.support.grids import write_store
from tests.support.jacobian import NOISY
from tests.support.nested import same
from tests.support.runs import Trainer, arguments_for, run, set_counts, weights_of
from training import warm_up
from training.step import train_step
from utils import checkpoint, distributed
from utils.distributed import World

SECOND = World(rank=1, size=2)
CASES = {
    "act": ("fewshot", *NOISY),
    "encoder frozen": ("fewshot", "freeze_encoder_steps=1"),
    "contrast, latent steps": ("fewshot", "objective.contrastive_weight=0.1", "latent_step_from=0"),
    "cached": ("fewshot", "mode=cached"),
    "fct": ("fewshot", "mode=fct", "mode.num_act_steps=2", "arch.halt_max_steps=2"),
    "supervised": ("fewshot", "mode=supervised"),
    "puzzle rows": ("puzzle", "micro_batch_size=2"),
    "many objectives": ("puzzle", "objective.split=instance"),
}


def snapshot(trainer: Trainer) -> dict:
    """All that the next steps depend on, copied."""
    state = trainer.state
    about = {
        "weights": state.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in state.optimizers],
        "ema": state.ema.shadow,
        "gradients": [parameter.grad for parameter in state.model.parameters()],
        "rows": getattr(state.model.context, "gathered", []),
        "carries": {bucket: vars(carry) for bucket, carry in state.carries.items()},
        "errors": state.task_errors.state_dict() if state.task_errors else None,
        "drawn": (torch.get_rng_state(), state.step),
    }
    return copy.deepcopy(about)


def make_steps(trainer: Trainer) -> None:
    """Two steps of one process of two, without the other."""
    with distributed.apart(trainer.world):
        trainer.steps(2)


def drawing(*arguments):
    """A step that uses up random numbers."""
    torch.rand(1)
    return train_step(*arguments)


@pytest.mark.parametrize("case", CASES)
def test_a_rehearsed_step_leaves_no_trace(case, request, monkeypatch):
    layout, *options = CASES[case]
    store = request.getfixturevalue(layout)
    trainer, other = (Trainer(store, *options, world=SECOND) for _ in range(2))
    for one in (trainer, other):
        set_counts(one)
        make_steps(one)
    torch.manual_seed(3)
    before = snapshot(trainer)
    with monkeypatch.context() as patch:
        patch.setattr(distributed.dist, "is_initialized", lambda: True)  # whoever sends something fails
        patch.setattr(warm_up, "train_step", drawing)
        warm_up.rehearse(trainer)
    after = snapshot(trainer)
    assert [part for part in before if not same(after[part], before[part])] == []
    make_steps(trainer), make_steps(other)
    ours, theirs = trainer.state.model.state_dict(), other.state.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_one_cell_compiles_serves_all_cells(tmp_path, monkeypatch):
    store = write_store(tmp_path / "data", train=12, side=8)
    canvases = ("data.buckets=[11,12]", "data.canvas_margin=4")
    trainer = Trainer(store, *canvases, "freeze_encoder_steps=all", world=SECOND)
    cells = trainer.sampler.buckets
    assert {cell.side for cell in cells} == {11, 12} and len({cell.demos for cell in cells}) > 2
    # The capture decides when to compile anew, and a compiler behind it takes long.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    try:
        fused.compile_fused(True)
        warm_up.rehearse(trainer)
        compiled = counters["stats"]["unique_graphs"]
        for bucket in itertools.chain(cells, reversed(cells)):
            trainer.step(trainer.sampler.sample(trainer.state.step, bucket))
        assert counters["stats"]["unique_graphs"] == compiled > 0
    finally:
        fused.compile_fused(False)
        torch.compiler.reset()


RANKS = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from config import compose
from config.schema import PretrainConfig
from training import warm_up
from training.start import prepare
from utils import distributed
from utils.distributed import World
from utils.errors import PeerLost, UserError, reports_user_errors

@reports_user_errors
def main():
    world = World.from_environment()
    run = prepare(compose.load(PretrainConfig, "pretrain", sys.argv[1:]), world)
    rehearse = warm_up.rehearse
    warm_up.is_compiled = lambda: True

    def slowly(run):
        time.sleep(3 * world.rank)
        rehearse(run)

    def fails(run):
        rehearse(run)
        if world.rank == 1:
            raise RuntimeError("CppCompileError\\n\\nx.h: fatal error: no such file")

    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    warm_up.rehearse = slowly
    seconds = warm_up.warm_up(run)
    print(f"rank {world.rank} waited: {seconds > 2}", flush=True)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=60))
    distributed.barrier()
    warm_up.rehearse = fails
    try:
        warm_up.warm_up(run)
    except UserError as error:
        print(f"rank {world.rank} heard: {error}", flush=True)
        if world.is_main:
            try:
                distributed.meet("", minutes=0.01)
            except PeerLost as lost:
                print(f"rank 0 lost: {lost}", flush=True)
        distributed.barrier()
        raise

main()
"""


def test_a_slow_compiler_uses_up_no_timeout_and_a_failing_one_ends_all_processes(fewshot, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = run(str(script), *arguments_for(fewshot, tmp_path, "compile=auto", "train_steps=9")[1:], world=2)
    heard = "rank 1 cannot compile its first step: x.h: fatal error: no such file; compile=false does without"
    said = [f"rank {rank} {what}" for what in ("waited: True", f"heard: {heard}") for rank in range(2)]
    said.append("rank 0 lost: rank 1 did not get ready within 0.01 minutes")
    assert sorted(done.stdout.splitlines()) == sorted(said), done.stderr
    assert done.returncode == 1 and done.stderr.splitlines().count(f"error: {heard}") == 1


@pytest.mark.slow
def test_a_compiled_run_of_two_processes_is_the_same_with_and_without_the_warm_up(puzzle, tmp_path):
    script = tmp_path / "train.py"
    lazily = "import pretrain_etrm; pretrain_etrm.warm_up = lambda run: None; pretrain_etrm.main()"
    script.write_text(lazily)
    said = {}
    for name, program in (("warm", None), ("lazy", script)):
        own, *options = arguments_for(puzzle, tmp_path / name, "compile=true", "train_steps=3")
        done = run(str(program or own), *options, world=2)
        assert done.returncode == 0, done.stderr
        said[name] = [
            line for line in done.stderr.splitlines() if line.startswith("compiled before step 1 in")
        ]
    assert len(said["warm"]) == 1 and not said["lazy"]
    warm, lazy = (weights_of(tmp_path / name, 3) for name in ("warm", "lazy"))
    assert all(torch.equal(warm[name], lazy[name]) for name in lazy)
    for rank in range(2):
        of = [tmp_path / name / "r" / "checkpoints" / "step_3" / f"rank_{rank}.pt" for name in said]
        assert same(*map(checkpoint.load_torch, of))
