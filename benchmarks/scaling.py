"""What a training step costs as canvas, demonstrations, batch and width grow: python -m benchmarks.scaling [--output docs]

Every axis changes one size of the same ETRM; cells are full, so that all work is useful. Prints a table and draws
`scaling.png` with a panel per axis, measured seconds per sample beside what the FLOPs of the smallest size would make of it.
"""

import argparse
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from benchmarks.useful import useful_flops
from config import compose
from config.schema import PretrainConfig
from dataset.batch import Batch, Bucket, DataSizes
from dataset.canvas import VOCAB_SIZE
from models.layers import compile_fused
from models.trm import build_model
from training.ema import EMA
from training.optim import build_optimizers
from training.state import TrainState
from training.step import train_step
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
    """The ETRM of these sizes, with 3 answer updates of 4 latent updates each, as in the comparison with the ancestors."""
    width = [f"arch.hidden_size={sizes['width']}", f"arch.num_heads={max(1, sizes['width'] // HEAD)}"]
    batch = f"global_batch_size={sizes['batch']}"
    return compose.load(
        PretrainConfig,
        "pretrain",
        ["arch=etrm", "arch.H_cycles=3", "arch.L_cycles=4", *width, batch, *overrides],
    )


def full_batch(sizes: dict[str, int], device: torch.device) -> Batch:
    """Random colours in every cell of every grid."""
    torch.manual_seed(0)
    batch, demos, cells = sizes["batch"], sizes["demonstrations"], sizes["canvas"] ** 2

    def grids(*shape: int) -> torch.Tensor:
        return torch.randint(2, VOCAB_SIZE, (*shape, cells), device=device)

    data = {
        "inputs": grids(batch).byte(),
        "labels": grids(batch),
        "puzzle_identifiers": torch.zeros(batch, dtype=torch.int32, device=device),
    }
    data |= {"demo_inputs": grids(batch, demos).byte(), "demo_labels": grids(batch, demos).byte()}
    data["demo_mask"] = torch.ones(batch, demos, dtype=torch.bool, device=device)
    return Batch(Bucket(sizes["canvas"], demos), data)


def measure(sizes: dict[str, int], overrides: list[str], device: torch.device) -> tuple[float, float]:
    """Seconds and FLOPs of one sample's training step."""
    config = configuration(sizes, overrides)
    torch.manual_seed(0)
    model = build_model(config.arch, DataSizes(VOCAB_SIZE, 1, None), config.encoder).to(device)
    state = TrainState(model, build_optimizers(model, config, device)[0], EMA(model, config.ema_rate))
    batch, best = full_batch(sizes, device), float("inf")
    for _ in range(STEPS + 1):
        started = time.perf_counter()
        train_step(state, batch, config, World())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    data = {name: value.cpu() for name, value in batch.data.items()}
    return best / sizes["batch"], useful_flops(config, data) / sizes["batch"]


def draw(measured: dict[str, list[tuple[float, float]]]) -> Figure:
    """A panel per axis from the seconds and FLOPs of its values."""
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of scaling.png")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("overrides", nargs="*", help="key=value, as for pretrain_etrm.py")
    options = parser.parse_intermixed_args()
    device = choose_device(options.device, World())
    base = configuration(BASE, options.overrides)
    compile_fused(should_compile(base.compile, device, base.train_steps))
    print(f"{describe(device)}; base: {BASE}")
    measured = {}
    for name, values in AXES.items():
        measured[name] = [measure({**BASE, name: value}, options.overrides, device) for value in values]
        for value, (second, flop) in zip(values, measured[name], strict=True):
            print(
                f"{name:<16}{value:>5}{1000 * second:>12.1f} ms/sample{flop / 1e9:>10.1f} GFLOP{flop / second / 1e9:>8.0f} GFLOP/s",
                flush=True,
            )
    write_atomically(
        options.output / "scaling.png",
        lambda temporary: draw(measured).savefig(temporary, format="png", dpi=90),
    )


if __name__ == "__main__":
    main()
