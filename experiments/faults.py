"""What a run survives: python -m experiments.faults [FAULT ...] [--kills N] [--output experiments/faults.jsonl]

Trains a tiny model while something goes wrong, and checks what is left. Without names all faults run (minutes). One line
per fault is appended to the output, with the command, the commit and the machine. Exit status 1 when a check failed.
"""

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # the first optimiser would load it, in every fork again

from config import compose
from config.schema import PretrainConfig
from dataset import build_arc_dataset
from pretrain_etrm import train
from utils import checkpoint
from utils.arguments import parser_of
from utils.device import describe
from utils.environment import git_commit
from utils.errors import UserError, reports_user_errors

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    *(
        "arch.hidden_size=32",
        "arch.num_heads=2",
        "arch.H_cycles=1",
        "arch.L_cycles=1",
        "arch.halt_max_steps=2",
        "device=cpu",
    ),
    *(
        "arch.forward_dtype=float32",
        "global_batch_size=8",
        "log_interval=1",
        "logging.progress=false",
        "run_name=r",
    ),
]
PATIENCE = 300.0  # seconds without progress after which a run counts as hung


@dataclass
class Launched:
    """torchrun, and the file of its messages."""

    process: subprocess.Popen
    log: Path

    def text(self) -> str:
        """All of its messages so far."""
        return self.log.read_text()

    def errors(self) -> str:
        """The messages of this program; if it left none, as when a signal ended it, the last lines of torchrun's."""
        lines = self.text().splitlines()
        return "; ".join(line for line in lines if line.startswith("error")) or "\n".join(
            ["without a message", *lines[-60:]]
        )

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
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            f"--max-restarts={restarts}",
        ]
        command = [
            sys.executable,
            *launcher,
            str(ROOT / "pretrain_etrm.py"),
            *self.options(output, *overrides),
        ]
        with open(f"{output}.log", "w") as log:
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONFAULTHANDLER": "1",
            }  # a crash says where
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.launched.append(Launched(process, Path(f"{output}.log")))
        return self.launched[-1]

    def close(self) -> None:
        """End what a failed check has left running."""
        for run in self.launched:
            run.process.terminate()
            run.process.wait()

    def forked(self, output: Path, *overrides: str, prepare: Callable[[], None] = lambda: None) -> int:
        """Start a run in a copy of this process, which saves loading the libraries again; returns its process id."""
        pid = os.fork()
        if pid:
            return pid
        with open(f"{output}.log", "a") as log:  # only the child is here
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        torch.set_num_threads(1)
        prepare()
        try:
            reports_user_errors(train)(
                compose.load(PretrainConfig, "pretrain", self.options(output, *overrides))
            )
            os._exit(0)
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(end.code)
        except BaseException as error:
            print(f"unexpected: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)


def rank_killed(place: Workplace, kills: int) -> dict[str, Any]:
    """kill -9 of a random one of two processes at a random step, again and again, under torchrun with restarts."""
    every, spare = 10, 5  # restarts beyond the kills, to see in the result whether any was needed
    options = (f"train_steps={every * (kills + 1)}", "checkpoint_interval=4", "lr=1e-3")
    whole, killed = place.folder / "whole", place.folder / "killed"
    undisturbed = place.distributed(whole, 0, *options)
    if undisturbed.wait() != 0:
        raise UserError(f"the undisturbed run failed: {undisturbed.errors()}")
    run = place.distributed(killed, kills + spare, *options)
    steps: list[int] = []

    def ready() -> bool:
        return (
            run.text().count("resumed at step") >= len(steps) - 1 and logged_step(killed / "r") >= steps[-1]
        )

    for number in range(kills):
        steps.append(int(number * every + place.rng.integers(5, every + 3)))
        wait_for(ready, run)
        time.sleep(place.rng.random() * 0.05)
        os.kill(worker(run.process.pid, int(place.rng.integers(2))), signal.SIGKILL)
    status = run.wait()
    starts = run.text().count(" process(es)")
    last = [folder / "r" / "checkpoints" / f"step_{every * (kills + 1)}" for folder in (whole, killed)]
    equal = all(
        same_tensors(*(checkpoint.load_weights(path, which) for path in last)) for which in ("raw", "ema")
    )
    return {
        "ok": status == 0 and equal,
        "kills": kills,
        "at_steps": steps,
        "starts": starts,
        "exit_status": status,
        "bitwise_equal": equal,
    }


def killed_while_saving(place: Workplace, kills: int) -> dict[str, Any]:
    """kill -9 at random moments of a run that writes a checkpoint after every step."""
    output = place.folder / "saving"
    folder = output / "r" / "checkpoints"
    half_written = lost = 0
    for _ in range(kills):
        before = newest_step(folder)
        options = (
            "train_steps=100000",
            "checkpoint_interval=1",
            "arch.hidden_size=128",
            "global_batch_size=1",
        )
        pid = place.forked(output, *options)
        wait_for(lambda before=before: newest_step(folder) > before, pid)
        started = time.monotonic()
        wait_for(lambda before=before: newest_step(folder) > before + 1, pid)
        time.sleep(place.rng.random() * (time.monotonic() - started))  # any moment of the next step
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        half_written += any(folder.glob(".step_*.tmp"))
        load_all(checkpoint.latest(folder))
        lost = max(lost, logged_step(output / "r") - newest_step(folder))
    return {
        "ok": lost <= 1,
        "kills": kills,
        "killed_during_a_write": half_written,
        "most_steps_lost": lost,
        "checkpoint_interval": 1,
    }


def rank_frozen(place: Workplace, kills: int) -> dict[str, Any]:
    """One of two processes stops answering (SIGSTOP): the other gives up after timeout_minutes, torchrun restarts both."""
    output = place.folder / "frozen"
    run = place.distributed(output, 1, "train_steps=60", "checkpoint_interval=5", "timeout_minutes=0.5")
    wait_for(lambda: logged_step(output / "r") >= 7, run)
    started = time.monotonic()
    os.kill(worker(run.process.pid, 1), signal.SIGSTOP)
    wait_for(lambda: "resumed at step" in run.text(), run)
    seconds = time.monotonic() - started
    status = run.wait()
    message = "stopped answering" in run.text()
    return {
        "ok": status == 0 and message,
        "exit_status": status,
        "message": message,
        "seconds_until_resumed": round(seconds, 1),
    }


def file_limit(place: Workplace, kills: int) -> dict[str, Any]:
    """Files can no longer grow as large as a checkpoint's (RLIMIT_FSIZE, which also a full quota looks like)."""
    output = place.folder / "limit"
    run_to_end(place.forked(output, "train_steps=4"))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    return after_failure(
        output,
        run_to_end(place.forked(output, "train_steps=8", "checkpoint_interval=2", prepare=limit)),
        place,
    )


def full_disk(place: Workplace, kills: int) -> dict[str, Any]:
    """A small file system that checkpoints fill until the next one does not fit."""
    return in_small_file_system(
        place, "disk", "{run} train_steps=1000 checkpoint_interval=1 keep_checkpoints=1000"
    )


def read_only(place: Workplace, kills: int) -> dict[str, Any]:
    """The run's file system becomes read-only between two starts of the command."""
    return in_small_file_system(
        place, "readonly", '{run} train_steps=4 && mount -o remount,ro "$DISK" && {run} train_steps=8'
    )


def in_small_file_system(place: Workplace, name: str, script: str) -> dict[str, Any]:
    """Run `script` with a tmpfs of its own, which only this script sees, and copy out what it left."""
    output, disk = place.folder / name, place.folder / f"{name}.disk"
    disk.mkdir()
    run = shlex.join([sys.executable, str(ROOT / "pretrain_etrm.py"), *place.options(disk)])
    body = f'mount -t tmpfs -o size=6m tmpfs "$DISK" || exit 99\n{script.format(run=run)}\nstatus=$?\ncp -r "$DISK" "$COPY"; exit $status'
    with open(f"{output}.log", "w") as log:
        environment = {**os.environ, "DISK": str(disk), "COPY": str(output), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", body],
            env=environment,
            stdout=log,
            stderr=log,
        )
    if done.returncode == 99:
        raise UserError(
            "this machine lets nobody mount a tmpfs in a namespace of his own; leave out full_disk and read_only"
        )
    return after_failure(output, done.returncode, place)


FAULTS = {
    f.__name__: f for f in (rank_killed, killed_while_saving, rank_frozen, file_limit, full_disk, read_only)
}


def after_failure(output: Path, status: int, place: Workplace) -> dict[str, Any]:
    """One message, the exit status of an error that the user can mend, and every checkpoint loadable and continued from."""
    text = Path(f"{output}.log").read_text()
    errors = [line.replace(str(place.folder), "") for line in text.splitlines() if line.startswith("error: ")]
    folder = output / "r" / "checkpoints"
    saved = sorted(folder.glob("step_*"))
    for path in saved:
        load_all(path)
    newest = newest_step(folder)
    continued = run_to_end(place.forked(output, f"train_steps={newest + 1}"))
    ok = status == 2 and len(errors) == 1 and "Traceback" not in text and bool(saved) and continued == 0
    return {
        "ok": ok,
        "exit_status": status,
        "message": errors,
        "checkpoints_intact": len(saved),
        "continued_with_status": continued,
    }


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
    """Bitwise."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    newest = checkpoint.latest(folder)
    return int(newest.name.removeprefix("step_")) if newest else 0


def logged_step(run: Path) -> int:
    """The last step in metrics.jsonl, which is written before that step's checkpoint."""
    file = run / "metrics.jsonl"
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
    """Until the condition holds. Raises `UserError` when the process ends first, or after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        ended = (
            run.process.poll() is not None
            if isinstance(run, Launched)
            else os.waitpid(run, os.WNOHANG)[0] != 0
        )
        if ended or time.monotonic() > deadline:
            words = f": {run.errors()}" if isinstance(run, Launched) else ""
            raise UserError(
                (
                    "the run ended before the fault could happen"
                    if ended
                    else f"no progress for {PATIENCE:.0f} s"
                )
                + words
            )
        time.sleep(0.005)


def run_to_end(pid: int) -> int:
    """The exit status of a forked run."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@reports_user_errors
def main() -> None:
    parser = parser_of("experiments.faults", __doc__)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"default: all of {', '.join(FAULTS)}")
    parser.add_argument(
        "--kills", type=int, help="how often a process is killed; default: 20 ranks, 50 while saving"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "experiments" / "faults.jsonl")
    options = parser.parse_args()
    for name in options.faults:
        if name not in FAULTS:
            raise UserError(f"there is no fault '{name}'; there are {', '.join(FAULTS)}")
    passed = True
    for name in options.faults or FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            kills = options.kills or (20 if name == "rank_killed" else 50)
            place = Workplace(Path(folder), options.seed)
            try:
                result = FAULTS[name](place, kills)
            finally:
                place.close()
        line = {
            "fault": name,
            **result,
            "seconds": round(time.monotonic() - started, 1),
            "command": shlex.join(["python", "-m", "experiments.faults", *sys.argv[1:]]),
            "git_commit": git_commit(),
            "machine": f"{describe(torch.device('cpu'))}, {os.cpu_count()} cores, torch {torch.__version__}",
        }
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        passed &= result["ok"]
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
