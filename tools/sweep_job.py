"""What a job of Slurm does for a sweep: it trains one run, and lets it save when it has to end.

Only the standard library is imported, since every job starts here.
"""

import ctypes
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ASKING = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)  # USR2: submitit, before the time is up
LOOK = 1.0  # seconds
_PR_SET_PDEATHSIG = 1


def train(words: list[str], log: Path, stop: Path) -> int:
    """The exit status of the command `words`, whose output goes to `log`.

    A signal, or the file `stop`, lets it save and stop.
    """
    asked: list[int] = []
    for number in ASKING:
        signal.signal(number, lambda number, frame: asked.append(number))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as out:
        out.write(f"$ {shlex.join(words)}\n")
        out.flush()
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_begins_deaf_to_usr2,
        )
    told = False
    while True:
        try:
            return process.wait(LOOK)
        except subprocess.TimeoutExpired:
            if not told and (asked or stop.exists()):
                process.send_signal(signal.SIGTERM)
                told = True


def dies_with_parent() -> Callable[[], object] | None:
    """What a new process does first, so that it is asked to stop when its parent is killed (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _begins_deaf_to_usr2() -> None:
    # Slurm sends it to every process of a job. It would end the run, or its torchrun, without a checkpoint.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if first := dies_with_parent():
        first()
