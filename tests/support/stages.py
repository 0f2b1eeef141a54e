"""Scripts of stages (experiments/stages.sh), rehearsed at toy size on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.runs import ROOT


def rehearsed(
    script: str, output: Path, **environment: str
) -> tuple[subprocess.CompletedProcess, dict[str, list[str]]]:
    """A script of experiments/, rehearsed to its end, and the status, seconds and findings of each stage."""
    own = {"REHEARSE": "1", "OUT": str(output), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    nothing = {"WHEELS": str(output / "none"), "ANCESTORS": str(output / "none")}
    done = subprocess.run(
        ["bash", str(ROOT / "experiments" / script)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **own, **nothing, **environment},
    )
    _, *lines = (output / "stages.tsv").read_text().splitlines()
    return done, {name: rest for name, *rest in (line.split("\t") for line in lines)}


def logs_of(output: Path) -> dict[str, str]:
    """The end of each stage's log, to be shown by a test that fails."""
    return {path.name: path.read_text()[-1000:] for path in output.glob("*.log")}
