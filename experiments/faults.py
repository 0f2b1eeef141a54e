"""Check what a run survives.

    python -m experiments.faults rank_killed --kills 5

Trains a tiny model while something goes wrong, and checks what is left. Without names all faults run, which
takes minutes. One line per fault is appended to the output, with the command, the commit and the machine. The
exit status is 1 when a check failed.
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
from pathlib import Path
from typing import Any

import torch

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments.workplace import (
    ROOT,
    Workplace,
    load_all,
    logged_step,
    newest_step,
    run_to_end,
    same_tensors,
    wait_for,
    worker,
)
from utils import checkpoint
from utils.arguments import parser_of
from utils.device import describe
from utils.environment import git_commit
from utils.errors import EXIT_USER_ERROR, UserError, reports_user_errors

OUTPUT = Path(__file__).with_name("faults.jsonl")
NO_MOUNT = 99  # the status of a shell script that could not mount its file system


def rank_killed(place: Workplace, kills: int) -> dict[str, Any]:
    """kill -9 of either of two processes at random steps, again and again, under torchrun with restarts."""
    every = 10  # steps between two kills
    spare = 5  # restarts beyond the kills, to see in the result whether any was needed
    options = (f"train_steps={every * (kills + 1)}", "checkpoint_interval=4", "lr=1e-3")
    whole, killed = place.folder / "whole", place.folder / "killed"
    undisturbed = place.distributed(whole, 0, *options)
    if undisturbed.wait() != 0:
        raise UserError(f"the undisturbed run failed: {undisturbed.errors()}")
    run = place.distributed(killed, kills + spare, *options)
    steps: list[int] = []  # at which a process is killed

    def ready() -> bool:
        """Whether the run has come back from the last kill and reached the next step."""
        resumed = run.text().count("resumed at step") >= len(steps) - 1
        return resumed and logged_step(killed / "r") >= steps[-1]

    for number in range(kills):
        steps.append(int(number * every + place.rng.integers(5, every + 3)))
        wait_for(ready, run)
        time.sleep(place.rng.random() * 0.05)  # any moment of a step
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
    # A wide model on one sample spends most of its time writing.
    options = ("train_steps=100000", "checkpoint_interval=1", "arch.hidden_size=128", "global_batch_size=1")
    half_written = lost = 0
    for _ in range(kills):
        before = newest_step(folder)
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
    """One of two processes stops answering (SIGSTOP). The other gives up, and torchrun restarts both."""
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
    """Files can no longer grow as large as a checkpoint's (RLIMIT_FSIZE). A full quota looks the same."""
    output = place.folder / "limit"
    run_to_end(place.forked(output, "train_steps=4"))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # bytes

    status = run_to_end(place.forked(output, "train_steps=8", "checkpoint_interval=2", prepare=limit))
    return after_failure(output, status, place)


def full_disk(place: Workplace, kills: int) -> dict[str, Any]:
    """A small file system that checkpoints fill until the next one does not fit."""
    script = "{run} train_steps=1000 checkpoint_interval=1 keep_checkpoints=1000"
    return in_small_file_system(place, "disk", script)


def read_only(place: Workplace, kills: int) -> dict[str, Any]:
    """The run's file system becomes read-only between two starts of the command."""
    script = '{run} train_steps=4 && mount -o remount,ro "$DISK" && {run} train_steps=8'
    return in_small_file_system(place, "readonly", script)


def in_small_file_system(place: Workplace, name: str, script: str) -> dict[str, Any]:
    """Run a shell script, in which `{run}` is a run in a small tmpfs, and look at what it has left.

    Raises `UserError` where a user may not mount a tmpfs.
    """
    output, disk = place.folder / name, place.folder / f"{name}.disk"
    disk.mkdir()
    run = shlex.join([sys.executable, str(ROOT / "pretrain_etrm.py"), *place.options(disk)])
    # Nobody else sees the mount, and it goes with the script: what is in it has to be copied out.
    body = (
        f'mount -t tmpfs -o size=6m tmpfs "$DISK" || exit {NO_MOUNT}\n'
        f'{script.format(run=run)}\nstatus=$?\ncp -r "$DISK" "$COPY"; exit $status'
    )
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c", body]
    environment = {**os.environ, "DISK": str(disk), "COPY": str(output), "OMP_NUM_THREADS": "1"}
    with open(f"{output}.log", "w") as log:
        done = subprocess.run(namespace, env=environment, stdout=log, stderr=log)
    if done.returncode == NO_MOUNT:
        raise UserError(
            "this machine lets nobody mount a tmpfs in a namespace of his own; "
            "leave out full_disk and read_only"
        )
    return after_failure(output, done.returncode, place)


FAULTS = {
    f.__name__: f for f in (rank_killed, killed_while_saving, rank_frozen, file_limit, full_disk, read_only)
}


def after_failure(output: Path, status: int, place: Workplace) -> dict[str, Any]:
    """Whether a run failed as it should, and what it has left.

    It should leave one message, the exit status of a mistake that the user can mend, and checkpoints that can
    all be loaded. The same command should then continue.
    """
    text = Path(f"{output}.log").read_text()
    errors = [line.replace(str(place.folder), "") for line in text.splitlines() if line.startswith("error: ")]
    folder = output / "r" / "checkpoints"
    saved = sorted(folder.glob("step_*"))
    for path in saved:
        load_all(path)
    newest = newest_step(folder)
    continued = run_to_end(place.forked(output, f"train_steps={newest + 1}"))
    told = status == EXIT_USER_ERROR and len(errors) == 1 and "Traceback" not in text
    ok = told and bool(saved) and continued == 0
    return {
        "ok": ok,
        "exit_status": status,
        "message": errors,
        "checkpoints_intact": len(saved),
        "continued_with_status": continued,
    }


@reports_user_errors
def main() -> None:
    parser = parser_of("experiments.faults", __doc__)
    add = parser.add_argument
    add("faults", nargs="*", metavar="FAULT", help=f"default: all of {', '.join(FAULTS)}")
    add("--kills", type=int, help="how often a process is killed; default: 20 ranks, 50 while saving")
    add("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    add("--output", type=Path, default=OUTPUT, help=f"default: experiments/{OUTPUT.name}")
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
