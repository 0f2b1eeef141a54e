"""A training run's stand-in for sweeps: it logs a score, saves after every step, and stops on a signal."""

from pathlib import Path

from tools import sweep, sweep_runs

SCRIPT = """
import json, os, pathlib, signal, sys, time
given = dict(word.split("=", 1) for word in sys.argv[1:])
folder = pathlib.Path(given["output_dir"]) / given["run_name"]
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").write_text("train_steps: 4\\n")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
metrics, starts = folder / "metrics.jsonl", folder / "starts"
starts.open("a").write(" ".join(sys.argv[1:]) + "\\n")
done = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
for step in range(done + 1, 5):
    time.sleep(float(os.environ.get("STAND_IN_PAUSE", "0")))
    lr, rows = float(given["lr"]), int(given["global_batch_size"])
    if given.get("weight_decay") == "0.5":
        sys.exit("this one does not train")
    score = step / 4 - abs(lr - 0.5) + rows / 1000 + int(given["seed"]) / 100
    with metrics.open("a") as out:
        out.write(json.dumps({"step": step, "validation/ARC/pass@1": score}) + "\\n")
"""
SPACE = """
overrides: [validation=3, eval_interval=1, train_steps=4{overrides}]
space:
  lr: {{low: 0.1, high: 0.9}}
  global_batch_size: {{choices: [8, 16]}}
seeds: [{seeds}]
trials: {trials}
{more}
"""
# A sweep whose runs are the stand-in's, as a process of its own: SCRIPT, then the sweep's arguments.
DRIVER = """
import sys
from pathlib import Path
from tools import sweep, sweep_runs
sweep_runs.SCRIPT, sweep.POLL = Path(sys.argv.pop(1)), 0.02
sweep.main()
"""


def install(tmp_path: Path, monkeypatch) -> Path:
    """Make the stand-in the script of a sweep's runs in this process."""
    file = tmp_path / "stand_in.py"
    file.write_text(SCRIPT)
    monkeypatch.setattr(sweep_runs, "SCRIPT", file)
    monkeypatch.setattr(sweep, "POLL", 0.02)
    return file


def write_space(folder: Path, seeds: str = "0", trials: int = 3, more: str = "", overrides: str = "") -> Path:
    """A file that describes a sweep over the stand-in's settings."""
    file = folder / "space.yaml"
    file.write_text(SPACE.format(seeds=seeds, trials=trials, more=more, overrides=overrides))
    return file


def score(params: dict, seed: int = 0) -> float:
    """What the stand-in logs last."""
    return 1 - abs(params["lr"] - 0.5) + params["global_batch_size"] / 1000 + seed / 100
