"""The runs of a sweep as jobs of Slurm, by submitit.

A job that ends because its time is over, or because it is preempted, is submitted again and goes on from its
checkpoint. A sweep that was killed finds its jobs again, whether they wait, train or have ended meanwhile.
"""

import pickle
import shlex
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from tools.sweep_job import train
from tools.sweep_runs import Process, Slot, is_free
from utils import checkpoint
from utils.errors import EXIT_FAILURE, EXIT_STOPPED, UserError
from utils.files import write_atomically

CLUSTER = "slurm"  # of submitit
ROOT = Path(__file__).resolve().parents[1]
OWN = ("additional_parameters", "array_parallelism", "nodes", "ntasks_per_node", "tasks_per_node")
# Ended without a word, but not by a mistake of the run. The last two are what submitit says without Slurm.
LOST = ("TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "INTERRUPTED", "NO PROCESS AND NO RESULT")
MOST_BARREN = 3  # jobs one after the other that end without a new checkpoint
POLL = 0.5  # seconds


class Slurm:
    """The launcher of runs that are jobs of Slurm.

    places: how many at a time. Options are those of sbatch, with underscores, as submitit takes them.
    """

    def __init__(self, folder: Path, processes: int, options: Namespace):
        import submitit

        given = dict(_read_option(text) for text in options.slurm)
        if "time" not in given:
            raise UserError("--slurm needs time=MINUTES, the time limit of a job; a longer run takes several")
        self.places = [Slot(number, {}) for number in range(options.jobs or 1)]
        # Jobs find this project, whatever folder the sweep is started from.
        python = shlex.join(["env", f"PYTHONPATH={ROOT}", sys.executable])
        own = {"job_name": folder.name, "additional_parameters": {"no-requeue": True}}
        try:
            self.executor = submitit.AutoExecutor(
                folder / "logs" / "jobs", cluster=CLUSTER, slurm_python=python, local_python=python
            )
            self.executor.update_parameters(
                **{f"slurm_{key}": value for key, value in {**own, **given}.items()}
            )
        except (RuntimeError, NameError, ValueError) as error:
            raise UserError(f"--launcher slurm: {str(error).splitlines()[0]}") from None

    def start(self, words: list[str], slot: Slot, folder: Path, log: Path) -> "Submitted":
        """Train the run in `folder`."""
        return Submitted(self, words, slot, folder, log)

    def submit(self, *arguments: Any) -> Any:
        """The job that calls `sweep_job.train`. Raises `UserError` for what Slurm refuses."""

        try:
            return self.executor.submit(train, *arguments)
        except (RuntimeError, OSError) as error:
            said = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise UserError(f"sbatch: {said[-1]}") from None


def _read_option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    key = key.lstrip("-").replace("-", "_")
    if not equals or not value:
        raise UserError(f"--slurm takes KEY=VALUE, found {text!r}")
    if key in OWN:
        raise UserError(f"--slurm {key}: a run has one node, and the sweep decides")
    return key, int(value) if value.isdecimal() else {"true": True}.get(value, value)


class Submitted(Process):
    """One run as a job, or as several one after the other."""

    def __init__(self, launcher: Slurm, words: list[str], slot: Slot, folder: Path, log: Path):
        self.launcher, self.note, self.stop_file = launcher, log.with_suffix(".job"), log.with_suffix(".stop")
        self.stop_file.unlink(missing_ok=True)
        self.asked, self.barren = False, 0
        self.reached: Path | None = None
        self.job = pickle.loads(self.note.read_bytes()) if self.note.is_file() else None
        super().__init__(words, slot, folder, log)

    def poll(self) -> int | None:
        """The exit status, None while it waits or goes on."""
        if self.job is None:
            if self.asked:
                return EXIT_STOPPED
            if is_free(self.folder):
                self._submit()
            return None
        status = self._status()
        if status != EXIT_STOPPED or self.asked:
            return status
        self.barren = self.barren + 1 if self._newest() == self.reached else 0
        if self.barren == MOST_BARREN:
            self._say(f"{MOST_BARREN} jobs have ended without a new checkpoint: give them more time")
            return EXIT_FAILURE
        self.job = None
        return None

    def _submit(self) -> None:
        self.reached = self._newest()
        self.job = self.launcher.submit(self.words, self.log.resolve(), self.stop_file.resolve())
        write_atomically(self.note, lambda path: path.write_bytes(pickle.dumps(self.job)))

    def _newest(self) -> Path | None:
        return checkpoint.latest(self.folder / "checkpoints")

    def _status(self) -> int | None:
        """That of the job: what its command ended with, `EXIT_STOPPED` where Slurm ended it, None before."""
        from submitit.core.utils import UncompletedJobError

        if not self.job.paths.result_pickle.exists():
            state = self.job.state
            if state in LOST:
                return EXIT_STOPPED
            if not self.job.done():
                return None
            if self.asked:
                return EXIT_STOPPED
        try:
            return self.job.result()
        except UncompletedJobError as error:
            said = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
            self._say(f"job {self.job.job_id} of Slurm ({self.job.state}): {said[-1]}")
            return EXIT_FAILURE

    def _say(self, line: str) -> None:
        with self.log.open("a", encoding="utf-8") as out:
            out.write(line + "\n")

    def stop(self) -> None:
        """Ask it to save and stop; a job that only waits leaves the queue."""
        self.asked = True
        if self.job is None:
            return
        self.stop_file.parent.mkdir(parents=True, exist_ok=True)
        self.stop_file.touch()
        self.job.get_info(mode="force")
        if self.job.state == "PENDING":
            self.job.cancel(check=False)
            self.note.unlink(missing_ok=True)
            self.job = None

    def wait(self) -> None:
        """Wait for its end."""
        while self.job is not None and self.poll() is None:
            time.sleep(POLL)

    @property
    def started(self) -> bool:
        """Whether there is a job at all, or was one."""
        return self.job is not None or self.note.is_file()
