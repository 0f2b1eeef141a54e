"""Measure what a training step costs as canvas, demonstrations, batch and width grow.

    python -m benchmarks.scaling --output docs

Each axis changes one size of the same ETRM. All cells are full, so all work is useful. The command prints a
table and draws `scaling.png` with a panel per axis: the measured seconds per sample, and how they would grow
with the FLOPs.
"""

import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.full import full_batch, full_state
from benchmarks.useful import useful_flops
from config import compose
from config.schema import PretrainConfig
from dataset.batch import Bucket
from models.fused import compile_fused
from training.step import train_step
from utils.arguments import parser_of
from utils.device import choose_device, describe, should_compile
from utils.distributed import World
from utils.errors import reports_user_errors
from utils.files import write_atomically

BASE = {"canvas": 10, "demonstrations": 3, "batch": 8, "width": 256}
AXES = {
    "canvas": (5, 10, 15, 20, 30),
    "demonstrations": (1, 2, 4, 8),
    "batch": (1, 4, 16, 64),
    "width": (64, 128, 256, 512),
}
HEAD = 64  # channels of a head, where the width has as many
STEPS = 3  # the fastest counts


def configuration(sizes: dict[str, int], overrides: list[str]) -> PretrainConfig:
    """The ETRM of these sizes, with the cycles of the comparison with the ancestors."""
    # Two heads at least: positions that rotate values do so in half of the heads.
    heads = max(2, sizes["width"] // HEAD)
    width = [f"arch.hidden_size={sizes['width']}", f"arch.num_heads={heads}"]
    batch = f"global_batch_size={sizes['batch']}"
    own = ["arch=etrm", "arch.H_cycles=3", "arch.L_cycles=4", *width, batch]
    return compose.load(PretrainConfig, "pretrain", [*own, *overrides])


def measure(sizes: dict[str, int], overrides: list[str], device: torch.device) -> tuple[float, float]:
    """Seconds and useful FLOPs of a training step, per sample."""
    config = configuration(sizes, overrides)
    state = full_state(config, sizes["canvas"], device)
    bucket = Bucket(sizes["canvas"], sizes["demonstrations"])
    batch, best = full_batch(bucket, sizes["batch"], device), float("inf")
    for _ in range(STEPS + 1):  # the first step is never the fastest
        started = time.perf_counter()
        train_step(state, batch, config, World())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    # Counted on the CPU, off the clock.
    data = {name: value.cpu() for name, value in batch.data.items()}
    return best / sizes["batch"], useful_flops(config, data) / sizes["batch"]


def draw(measured: dict[str, list[tuple[float, float]]]) -> Figure:
    """The figure, a panel per axis, from the seconds and FLOPs of the axis' values."""
    figure = Figure(figsize=(4 * len(AXES), 3), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, len(AXES)), AXES.items(), strict=True):
        seconds, flops = zip(*measured[name], strict=True)
        axes.loglog(values, seconds, marker="o", label="measured")
        axes.loglog(values, [flop * seconds[0] / flops[0] for flop in flops], "--", label="as FLOPs grow")
        axes.set(title=name, ylabel="s / sample")
        axes.set_xticks(values, labels=map(str, values))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.grid(alpha=0.3)
    axes.legend()
    return figure


@reports_user_errors
def main() -> None:
    parser = parser_of("benchmarks.scaling", __doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("docs"), help="folder of scaling.png (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("overrides", nargs="*", metavar="key=value", help="as for pretrain_etrm.py")
    options = parser.parse_intermixed_args()
    device = choose_device(options.device, World())
    base = configuration(BASE, options.overrides)
    compile_fused(should_compile(base.compile, device, base.train_steps))
    print(f"{describe(device)}; base: {BASE}")
    measured = {}
    for name, values in AXES.items():
        measured[name] = [measure({**BASE, name: value}, options.overrides, device) for value in values]
        for value, (seconds, flops) in zip(values, measured[name], strict=True):
            cost = f"{1000 * seconds:>12.1f} ms/sample{flops / 1e9:>10.1f} GFLOP"
            print(f"{name:<16}{value:>5}{cost}{flops / seconds / 1e9:>8.0f} GFLOP/s", flush=True)
    figure = draw(measured)
    write_atomically(
        options.output / "scaling.png", lambda temporary: figure.savefig(temporary, format="png", dpi=90)
    )


if __name__ == "__main__":
    main()
