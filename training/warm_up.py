"""Compiling before the first step, where there are several processes.

Each compiles at its own speed. Within a step, the fast ones would wait for the slow ones in the step's first
collective, until its time is up.
"""

import time

import torch

from models.fused import is_compiled
from training.optim import set_trainable
from training.start import Run
from training.state import TrainState
from training.step import train_step
from utils import distributed
from utils.device import in_a_line, is_out_of_memory
from utils.errors import UserError

MINUTES = 60.0  # at least, for the slowest process


def warm_up(run: Run) -> float | None:
    """Compile what the next step of `run` needs, in every process, and wait until all of them have.

    Returns the seconds that it took, or None where nothing is compiled, or there is a single process. Raises
    `UserError`, the same in every process, where one of them fails.
    """
    if run.world.size == 1 or not run.config.compile:
        return None
    started, problem, compiles = time.monotonic(), "", is_compiled()
    try:
        if compiles:
            rehearse(run)
    except Exception as error:  # PyTorch raises whatever its compiler stumbles over
        remedy = "" if is_out_of_memory(error) else "; compile=false does without"
        problem = in_a_line(error) + remedy
    problems = distributed.meet(problem, max(MINUTES, run.config.timeout_minutes))
    for rank, what in enumerate(problems):
        if what:
            raise UserError(f"rank {rank} cannot compile its first step: {what}")
    return time.monotonic() - started if compiles else None


def rehearse(run: Run) -> None:
    """Make the next step of `run` without other processes, and leave no trace of it."""
    state = run.state
    # Chains are compiled for shapes of any size. So the next batch, whose cell is the same in every process,
    # stands for all other cells. Only sizes of 1, as of a single sample, are compiled apart.
    samples = run.samples()
    # Without optimisers and averages an update changes nothing. So what is trained is settled here.
    set_trainable(state.optimizers, run.config, state.step)
    stand_in = TrainState(state.model, [], None, step=state.step)
    gpus = [run.device] if run.device.type == "cuda" else []
    with distributed.apart(run.world), torch.random.fork_rng(gpus):
        train_step(stand_in, run.batch(samples), run.config, run.world)
    for optimizer in state.optimizers:
        optimizer.zero_grad()
