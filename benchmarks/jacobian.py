"""Measure what Jacobian descent costs beside plain training.

    python -m benchmarks.jacobian --hidden 128,512

Every split trains the same TRM on full square canvases with UPGrad, in a process of its own. Measured are the
seconds of an update, the fastest of a few, and the memory: the most that the process held above what it held
before the model. The command prints both, and their ratios to plain training in the same mode.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from config import compose
from config.schema import PretrainConfig
from dataset.batch import Batch, Bucket, DataSizes
from dataset.canvas import VOCAB_SIZE
from models.fused import compile_fused
from models.trm import build_model
from training.ema import EMA
from training.optim import build_optimizers
from training.splits import SPLITS
from training.state import TrainState
from training.step import train_step
from utils.arguments import parser_of
from utils.device import choose_device, clock, describe, should_compile
from utils.distributed import World
from utils.environment import peak_memory_gb
from utils.errors import reports_user_errors

STEPS = 3  # after the first one; the fastest counts
CELL_GROUPS = 10  # each costs a backward pass
STEP_GROUPS = 64  # of samples at every ACT step, the most that UPGrad takes
PUZZLES = 1000
HEAD = 64  # channels of a head


def configuration(split: str, hidden: int, options: argparse.Namespace) -> PretrainConfig:
    """The TRM of the recipe for Sudoku, of other sizes, that descends by `split`."""
    groups = None
    if "cell" in SPLITS[split]:
        groups = CELL_GROUPS
    elif "sample" in SPLITS[split]:
        groups = options.groups or (STEP_GROUPS if "step" in SPLITS[split] else None)
    own = [
        "experiment=trm_sudoku",
        f"arch.hidden_size={hidden}",
        f"arch.num_heads={hidden // HEAD}",
        "data.canvas=task",
        f"data.buckets=[{options.side}]",
        "arch.puzzle_emb_len=1",
        f"mode={mode_of(split, options.mode)}",
        f"objective.split={split}",
        f"objective.groups={groups or 'null'}",
        f"global_batch_size={options.batch}",
    ]
    return compose.load(PretrainConfig, "pretrain", [*own, *options.overrides])


def mode_of(split: str, mode: str) -> str:
    """The mode in which a split is measured: `mode`, or the only one that has its objectives."""
    return "supervised" if "step" in SPLITS[split] else mode


def measure(split: str, hidden: int, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of an update and gigabytes of memory, in this process."""
    config, device = configuration(split, hidden, options), choose_device(options.device, World())
    compile_fused(should_compile(config.compile, device, STEPS))
    before = peak_memory_gb(device)  # a peak cannot go down, so libraries have to be subtracted
    torch.manual_seed(0)
    cells = options.side**2
    model = build_model(config.arch.on(device), DataSizes(VOCAB_SIZE, PUZZLES, cells), None).to(device)
    state = TrainState(model, build_optimizers(model, config, device)[0], EMA(model, config.ema_rate))
    data = {
        "inputs": torch.randint(2, VOCAB_SIZE, (options.batch, cells), device=device).byte(),
        "labels": torch.randint(2, VOCAB_SIZE, (options.batch, cells), device=device),
        "puzzle_identifiers": torch.randint(1, PUZZLES, (options.batch,), dtype=torch.int32, device=device),
    }
    seconds = []
    for _ in range(STEPS + 1):
        started = clock(device)
        train_step(state, Batch(Bucket(options.side, 0), data), config, World())
        seconds.append(clock(device) - started)
    return {"seconds": min(seconds[1:]), "memory": peak_memory_gb(device) - before}


def measured_apart(split: str, hidden: int, mode: str) -> dict[str, float]:
    """`measure` in a process of its own, with the options of this one."""
    # By its path, which works from any folder. Of an option that is given twice the last counts.
    own = ["--only", split, "--mode", mode, "--hidden", str(hidden)]
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], *own]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


@reports_user_errors
def main() -> None:
    parser = parser_of("benchmarks.jacobian", __doc__)
    add = parser.add_argument
    splits = ",".join(name for name in SPLITS if name != "sum")
    add("--hidden", default="128,512", help="widths, with commas between them (default: %(default)s)")
    add("--batch", type=int, default=16, help="samples of an update (default: %(default)s)")
    add("--side", type=int, default=9, help="of the canvas (default: %(default)s)")
    add("--groups", type=int, help="of samples; left out: every sample is one, 64 groups over ACT steps")
    add("--mode", default="act", help="of the splits that need no other (default: %(default)s)")
    add("--splits", default=splits, help="with commas between them (default: all)")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--only", help=argparse.SUPPRESS)  # one split, for `measured_apart`
    add("overrides", nargs="*", metavar="key=value", help="as for pretrain_etrm.py")
    options = parser.parse_intermixed_args()
    if options.only:
        print(json.dumps(measure(options.only, int(options.hidden), options)))
        return
    print(f"{describe(choose_device(options.device, World()))}; batch {options.batch}, side {options.side}")
    print(f"{'hidden':>6}  {'split':<26}{'mode':<12}{'s':>8}{'ratio':>7}{'GB':>8}{'ratio':>7}")
    for hidden in map(int, options.hidden.split(",")):
        plain: dict[str, dict[str, float]] = {}
        for split in options.splits.split(","):
            mode = mode_of(split, options.mode)
            # An update of another mode takes other steps, and compares with its own plain training.
            if mode not in plain:
                plain[mode] = measured_apart("sum", hidden, mode)
                print(_line(hidden, "sum", mode, plain[mode], plain[mode]), flush=True)
            print(_line(hidden, split, mode, measured_apart(split, hidden, mode), plain[mode]), flush=True)


def _line(hidden: int, split: str, mode: str, found: dict[str, float], plain: dict[str, float]) -> str:
    """A line of the table: what was found, and its ratios to plain training."""
    cells = (f"{found[name]:>8.3f}{found[name] / plain[name]:>7.2f}" for name in ("seconds", "memory"))
    return f"{hidden:>6}  {split:<26}{mode:<12}{''.join(cells)}"


if __name__ == "__main__":
    main()
