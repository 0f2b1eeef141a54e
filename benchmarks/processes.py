"""Commands in processes of their own: the ancestors' code, and ours as a user runs it; what they cost."""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dataset.task import MAX_SIDE
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
DRIVE = ROOT / "benchmarks" / "ancestors" / "drive.py"
MEASURE = ROOT / "benchmarks" / "measure.py"
TEST_SUBSET = "evaluation"
# What the original's builder takes: measured at 10 and 60 augmentations of ARC-AGI-1 and ConceptARC.
MEMORY_PER_EXAMPLE = 4_000
DISK_PER_EXAMPLE = 2 * MAX_SIDE**2


@dataclass(frozen=True)
class Cost:
    """What one build took: wall-clock seconds, peak resident bytes, bytes on disk."""

    seconds: float
    memory: int
    disk: int


def require_checkout(folder: Path, files: tuple[str, ...], name: str) -> None:
    """Raise `UserError` unless `folder` is a checkout of the repository `name`, which has `files`."""
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"{folder} is no checkout of {name}: it has no {missing[0]}; get one with git clone https://github.com/{name}"
        )


def require_room(examples: int, work: Path) -> None:
    """Raise `UserError` where the original's builder would run out of memory or disk on this many examples."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        raise UserError(
            f"this benchmark needs Linux: it reads {meminfo} before it starts a build of many gigabytes"
        )
    lines = meminfo.read_text().splitlines()
    wanted = examples * MEMORY_PER_EXAMPLE
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    advice = "measure fewer augmentations with --num-aug"
    if available < wanted:
        raise UserError(
            f"the original's build needs about {wanted / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free; {advice}"
        )
    free, needed = shutil.disk_usage(work).free, examples * DISK_PER_EXAMPLE
    if free < needed:
        raise UserError(
            f"the original's build needs about {needed / 1e9:.1f} GB of disk, {work} has {free / 1e9:.1f} GB; "
            f"{advice}, or name another place with the environment variable TMPDIR"
        )


def environment(pythonpath: Path) -> dict[str, str]:
    """The environment of a Python command that sees the packages of `pythonpath`."""
    return {
        **os.environ,
        "PYTHONPATH": str(pythonpath),
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def run(command: list[str], pythonpath: Path = ROOT) -> str:
    """Standard output of a Python command that sees the packages of `pythonpath`. Raises `UserError` when it fails."""
    done = subprocess.run(
        [sys.executable, *command], env=environment(pythonpath), cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{shlex.join(command)} failed with exit status {done.returncode}: {last}")
    return done.stdout


class Contestant:
    """A Python command that measures when it is asked to (benchmarks/ancestors/turns.py), and rests while others measure."""

    def __init__(self, command: list[str], pythonpath: Path, log: Path):
        self.command, self.log = command, log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                env=environment(pythonpath),
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def __call__(self, steps: int) -> dict[str, float]:
        """What `steps` steps took. Raises `UserError` when the process has failed."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):  # its log says why
            print(steps, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            self.process.wait()
            last = (self.log.read_text().strip().splitlines() or ["no message"])[-1]
            raise UserError(
                f"{shlex.join(self.command[:2])} ... failed with exit status {self.process.returncode}: {last}"
            )
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def measured(command: list[str], output: Path, pythonpath: Path = ROOT) -> Cost:
    """What a Python command costs that writes the folder `output`."""
    cost = json.loads(run([str(MEASURE), sys.executable, *command], pythonpath))
    return Cost(**cost, disk=sum(file.stat().st_size for file in output.rglob("*") if file.is_file()))


def their_build(
    prefix: str, subsets: list[str], num_aug: int, output: Path, module: str = "dataset.build_arc_dataset"
) -> list[str]:
    """The command of an ancestor's builder."""
    config = {
        "module": module,
        "input_file_prefix": prefix,
        "output_dir": str(output),
        "subsets": subsets,
        "test_set_name": TEST_SUBSET,
        "num_aug": num_aug,
    }
    return [str(DRIVE), "build", json.dumps(config)]


def our_build(prefix: str, subsets: list[str], num_aug: int, output: Path) -> list[str]:
    """The command of our builder."""
    command = f"-m dataset.build_arc_dataset --layout puzzle --drop-leaks --num-aug {num_aug} --test-set-name {TEST_SUBSET}".split()
    return [*command, "--input-file-prefix", prefix, "--subsets", *subsets, "--output-dir", str(output)]
