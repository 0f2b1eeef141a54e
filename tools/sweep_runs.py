"""The runs of a sweep as processes: where each of them may compute, how it starts, and how it is stopped."""

import os
import shlex
import signal
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch

from tools.sweep_job import dies_with_parent
from utils.errors import UserError
from utils.files import exclusive

SCRIPT = Path(__file__).resolve().parents[1] / "pretrain_etrm.py"


@dataclass(frozen=True)
class Slot:
    """A place for one run at a time, with what it adds to the environment."""

    number: int
    environment: dict[str, str]


def slots(jobs: int | None, processes: int) -> list[Slot]:
    """Places for `jobs` runs of `processes` processes each; None: one for every group of GPUs, or one.

    Where there are GPUs a place sees its own alone. Places share them in turn where there are more places.
    """
    gpus = visible_gpus()
    groups = [gpus[start : start + processes] for start in range(0, len(gpus) - processes + 1, processes)]
    if gpus and not groups:
        raise UserError(f"processes={processes} need as many GPUs, and {len(gpus)} are visible")
    count = jobs or max(1, len(groups))
    if groups:
        visible = [",".join(groups[number % len(groups)]) for number in range(count)]
        return [Slot(number, {"CUDA_VISIBLE_DEVICES": names}) for number, names in enumerate(visible)]
    # Otherwise each run would start a thread for every core.
    threads = str(max(1, (os.cpu_count() or 1) // (count * processes)))
    return [
        Slot(number, {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": threads})
        for number in range(count)
    ]


def visible_gpus() -> list[str]:
    """The names of the GPUs that CUDA_VISIBLE_DEVICES leaves, or of all."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


def command(overrides: list[str], processes: int) -> list[str]:
    """The command of one run."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), *overrides]


class Local:
    """The launcher of runs that are processes of this machine.

    places: how many at a time, and where each of them computes.
    """

    def __init__(self, folder: Path, processes: int, options: Namespace):
        if options.slurm:
            raise UserError("--slurm goes with --launcher slurm")
        self.places = slots(options.jobs, processes)

    def start(self, words: list[str], slot: Slot, folder: Path, log: Path) -> "Process":
        """Train the run in `folder`."""
        return Process(words, slot, folder, log)


class Process:
    """One run that trains, or waits for its folder.

    folder: of the run. log: where it says what it does.
    """

    def __init__(self, words: list[str], slot: Slot, folder: Path, log: Path):
        self.words, self.slot, self.folder, self.log = words, slot, folder, log
        self.process: subprocess.Popen | None = None
        self.poll()

    def poll(self) -> int | None:
        """The exit status, None while it goes on."""
        if self.process is None and is_free(self.folder):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as out:
                out.write(f"$ {shlex.join(self.words)}\n")
                out.flush()
                self.process = subprocess.Popen(
                    self.words,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **self.slot.environment},
                    start_new_session=True,  # a Ctrl-C at the terminal reaches it once: from the sweep
                    preexec_fn=dies_with_parent(),
                )
        return None if self.process is None else self.process.poll()

    def stop(self) -> None:
        """Ask it to save and stop."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        """Wait for its end."""
        if self.process is not None:
            self.process.wait()

    @property
    def started(self) -> bool:
        """Whether there is a process at all."""
        return self.process is not None

    def last_words(self) -> str:
        """The last line that it has said."""
        lines = (
            self.log.read_text(encoding="utf-8", errors="replace").split("\n") if self.log.is_file() else []
        )
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def is_free(folder: Path) -> bool:
    """Whether no process trains in the folder: one may still save that a killed sweep has started."""
    try:
        with exclusive(folder, "trains in this folder"):
            return True
    except UserError:
        return False
