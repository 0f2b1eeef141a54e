"""Tiny runs in processes of their own, for `experiments.faults` to disturb, and a look at what they leave."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # here once: else every fork would load it again for its first optimizer

from config import compose
from config.schema import PretrainConfig
from dataset import build_arc_dataset
from pretrain_etrm import train
from utils import checkpoint
from utils.errors import UserError, reports_user_errors

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "arch.hidden_size=32",
    "arch.num_heads=2",
    "arch.H_cycles=1",
    "arch.L_cycles=1",
    "arch.halt_max_steps=2",
    "arch.forward_dtype=float32",
    "device=cpu",
    "threads=1",
    "global_batch_size=8",
    "log_interval=1",
    "logging.progress=false",
    "run_name=r",
]
PATIENCE = 300.0  # seconds without progress after which a run counts as hung


@dataclass
class Launched:
    """A run under torchrun, and the file that its messages go to."""

    process: subprocess.Popen
    log: Path

    def text(self) -> str:
        """All of its messages so far."""
        return self.log.read_text()

    def errors(self) -> str:
        """The program's error messages; if there are none, the last lines of all."""
        lines = self.text().splitlines()
        errors = "; ".join(line for line in lines if line.startswith("error"))
        # A process that a signal ended has left no message of its own, but torchrun has.
        return errors or "\n".join(["without a message", *lines[-60:]])

    def wait(self) -> int:
        """The exit status. Raises `UserError` when the run hangs."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise UserError(f"a run did not end within {PATIENCE:.0f} s: {self.errors()}") from None


class Workplace:
    """A temporary folder with a dataset, and runs on it."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng = folder, np.random.default_rng(seed)
        self.launched: list[Launched] = []
        arguments = ["--max-grid-size", "5", "--max-tasks", "6", "--output-dir", str(folder / "data")]
        build_arc_dataset.build(build_arc_dataset.parse_arguments(arguments))

    def options(self, output: Path, *overrides: str) -> list[str]:
        """The overrides of a tiny run below `output`."""
        return [*TINY, f"data.path={self.folder / 'data'}", f"output_dir={output}", *overrides]

    def distributed(self, output: Path, restarts: int, *overrides: str) -> Launched:
        """Start a run of two processes under torchrun; its messages go to `<output>.log`."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        script = [str(ROOT / "pretrain_etrm.py"), *self.options(output, *overrides)]
        command = [sys.executable, *launcher, f"--max-restarts={restarts}", *script]
        # The fault handler lets a crash say where it happened.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        with open(f"{output}.log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.launched.append(Launched(process, Path(f"{output}.log")))
        return self.launched[-1]

    def close(self) -> None:
        """End what a failed check has left running."""
        for run in self.launched:
            run.process.terminate()
            run.process.wait()

    def forked(self, output: Path, *overrides: str, prepare: Callable[[], None] = lambda: None) -> int:
        """Start a run in a copy of this process, after `prepare` in the copy; returns its process id."""
        # A copy has its libraries loaded, which takes most of the time of so small a run.
        pid = os.fork()
        if pid:
            return pid
        # From here on this is the child, which never returns.
        with open(f"{output}.log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        torch.set_num_threads(1)
        prepare()
        try:
            config = compose.load(PretrainConfig, "pretrain", self.options(output, *overrides))
            reports_user_errors(train)(config)
            os._exit(0)
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(end.code)
        except BaseException as error:
            print(f"unexpected: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)


def load_all(path: Path | None) -> None:
    """Read every file of a checkpoint. Raises `UserError` if there is none, or if one is damaged."""
    if path is None:
        raise UserError("no checkpoint is left")
    for rank in range(checkpoint.load_info(path)["world_size"]):
        checkpoint.load_torch(path / f"rank_{rank}.pt")
    for name in ("training", "trained_pairs"):
        checkpoint.load_torch(path / f"{name}.pt")
    for which in ("raw", "ema"):
        checkpoint.load_weights(path, which)


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether both have the same tensors, bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    newest = checkpoint.latest(folder)
    return int(newest.name.removeprefix("step_")) if newest else 0


def logged_step(run: Path) -> int:
    """The last step in metrics.jsonl, which is written before that step's checkpoint; 0 without one."""
    file = run / "metrics.jsonl"
    # The last line may be half-written at this moment.
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def worker(parent: int, local_rank: int) -> int:
    """The process id of torchrun's process with this local rank."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) == parent:
                environment = (status.parent / "environ").read_bytes().split(b"\0")
                if f"LOCAL_RANK={local_rank}".encode() in environment:
                    return int(status.parent.name)
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    raise UserError(f"torchrun has no process with local rank {local_rank}")


def wait_for(condition: Callable[[], bool], run: Launched | int) -> None:
    """Wait until the condition holds. Raises `UserError` if the run ends first, or after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        words = f": {run.errors()}" if isinstance(run, Launched) else ""
        if _has_ended(run):
            raise UserError(f"the run ended before the fault could happen{words}")
        if time.monotonic() > deadline:
            raise UserError(f"no progress for {PATIENCE:.0f} s{words}")
        time.sleep(0.005)


def _has_ended(run: Launched | int) -> bool:
    """Whether a run under torchrun, or a forked one with this process id, is over."""
    if isinstance(run, Launched):
        return run.process.poll() is not None
    return os.waitpid(run, os.WNOHANG)[0] != 0


def run_to_end(pid: int) -> int:
    """Wait for a forked run, and return its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
