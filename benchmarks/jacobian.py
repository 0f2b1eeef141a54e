"""What Jacobian descent costs beside plain training: python -m benchmarks.jacobian [--hidden 128,512]
[key=value ...]

Every split trains the same TRM on full square canvases with UPGrad, in a process of its own: seconds of an
update, the fastest of a few, and the most memory that the process held above what it held before the model.
Prints a table of both and of their ratios to plain training in the same mode.
"""

import argparse
import json
import subprocess
import sys

import torch

from config import compose
from config.schema import PretrainConfig
from dataset.batch import Batch, Bucket, DataSizes
from dataset.canvas import VOCAB_SIZE
from models.layers import compile_fused
from models.trm import build_model
from training.ema import EMA
from training.optim import build_optimizers
from training.splits import SPLITS
from training.state import TrainState
from training.step import train_step
from utils.device import choose_device, clock, describe, should_compile
from utils.distributed import World
from utils.environment import peak_memory_gb
from utils.errors import reports_user_errors

STEPS = 3  # after the first one; the fastest counts
CELL_GROUPS = 10  # each costs a backward pass
PUZZLES = 1000


def configuration(split: str, hidden: int, options: argparse.Namespace) -> PretrainConfig:
    """The TRM of the recipe for Sudoku, of other sizes, that descends by `split`."""
    groups = CELL_GROUPS if "cell" in SPLITS[split] else options.groups if "sample" in SPLITS[split] else None
    return compose.load(
        PretrainConfig,
        "pretrain",
        [
            "experiment=trm_sudoku",
            f"arch.hidden_size={hidden}",
            f"arch.num_heads={hidden // 64}",
            "data.canvas=task",
            f"data.buckets=[{options.side}]",
            "arch.puzzle_emb_len=1",
            f"mode={mode_of(split, options.mode)}",
            f"objective.split={split}",
            f"objective.groups={groups or 'null'}",
            f"global_batch_size={options.batch}",
            *options.overrides,
        ],
    )


def mode_of(split: str, mode: str) -> str:
    """The mode in which a split is measured: `mode`, or the only one that it has."""
    return "supervised" if "step" in SPLITS[split] else mode


def measure(split: str, hidden: int, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of an update and gigabytes of memory, in this process."""
    config, device = configuration(split, hidden, options), choose_device(options.device, World())
    compile_fused(should_compile(config.compile, device, STEPS))
    before = peak_memory_gb(device)
    torch.manual_seed(0)
    cells = options.side**2
    model = build_model(config.arch, DataSizes(VOCAB_SIZE, PUZZLES, cells), None).to(device)
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
    command = [sys.executable, "-m", "benchmarks.jacobian", *sys.argv[1:], "--only", split, "--mode", mode]
    found = subprocess.run([*command, "--hidden", str(hidden)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jacobian", description=__doc__)
    parser.add_argument("--hidden", default="128,512", help="widths, with commas between them")
    parser.add_argument("--batch", type=int, default=16, help="samples of an update")
    parser.add_argument("--side", type=int, default=9, help="of the canvas")
    parser.add_argument("--groups", type=int, help="of samples; left out: every sample is an objective")
    parser.add_argument("--mode", default="act", help="of the splits that need no other")
    parser.add_argument("--splits", default=",".join(name for name in SPLITS if name != "sum"))
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="key=value, as for pretrain_etrm.py")
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
            if mode not in plain:
                plain[mode] = measured_apart("sum", hidden, mode)
                print(_line(hidden, "sum", mode, plain[mode], plain[mode]), flush=True)
            print(_line(hidden, split, mode, measured_apart(split, hidden, mode), plain[mode]), flush=True)


def _line(hidden: int, split: str, mode: str, found: dict[str, float], plain: dict[str, float]) -> str:
    cells = (f"{found[name]:>8.3f}{found[name] / plain[name]:>7.2f}" for name in ("seconds", "memory"))
    return f"{hidden:>6}  {split:<26}{mode:<12}{''.join(cells)}"


if __name__ == "__main__":
    main()
