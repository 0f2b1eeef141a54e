"""Measure how near a training step comes to what this machine could do at best.

    python -m benchmarks.roofline arch=etrm arch.hidden_size=512 --canvas 10 30

Give the keys of a training run. Its matrix products are counted, and the bytes that it has to move. A product
and a copy of this machine say how long each takes at least. The longer one is the floor. What is counted:
docs/performance.md.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.full import full_batch, full_state
from benchmarks.useful import copy_rate, product_rate
from config import compose
from config.schema import PretrainConfig
from dataset.batch import Batch, Bucket
from models.fused import compile_fused
from tools.summary import activation_bytes, meta_data
from training.optim import SparseSignSGD
from training.state import TrainState
from training.step import train_step
from utils.arguments import natural, parser_of, positive
from utils.device import choose_device, clock, describe, explains_out_of_memory, should_compile
from utils.distributed import World
from utils.environment import git_commit, peak_memory_gb
from utils.errors import UserError, reports_user_errors

ALONE = World()
META = torch.device("meta")
WARM_UP = 3  # steps, the first of which makes moments and compiles


def products_in(work: Callable[[], object]) -> int:
    """FLOPs of the matrix products in `work`, 2 per multiply-add, its backward passes included."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Need:
    """What a training step needs at least.

    products: FLOPs. moved: bytes to and from memory, by what they are.
    """

    products: int
    moved: dict[str, int]

    @classmethod
    def of(cls, config: PretrainConfig, bucket: Bucket) -> "Need":
        """Of a step of `config` on a batch of `bucket`. All is counted on the meta device, nothing computed.

        - parameters: read by the forward and by the backward pass, and read and written by the update.
        - gradients: written and read. averages, moments: read and written.
        - activations: what autograd keeps is written and read.
        """
        state, batch = full_state(config, bucket.side, META), config.global_batch_size
        data = meta_data(bucket, bucket.demos > 0, batch)
        products = products_in(lambda: train_step(state, Batch(bucket, data), config, ALONE))
        weights = sum(p.nbytes for p in state.model.parameters() if p.requires_grad)
        averages = sum(value.nbytes for value in state.ema.shadow.values()) if state.ema else 0
        moved = {
            "parameters and gradients": 6 * weights,
            "averages": 2 * averages,
            "moments of the optimiser": 2 * _moments(state),
            "activations": 2 * activation_bytes(state.model, config, bucket, batch),
        }
        return cls(products, moved)


def _moments(state: TrainState) -> int:
    """Bytes that the optimisers remember, once they have made an update."""
    dense = [optimizer for optimizer in state.optimizers if not isinstance(optimizer, SparseSignSGD)]
    values = [value for optimizer in dense for of in optimizer.state.values() for value in of.values()]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def step_seconds(
    state: TrainState, batch: Batch, config: PretrainConfig, rounds: int, steps: int
) -> np.ndarray:
    """Seconds of a step, (rounds,), each the mean of so many steps that follow each other without a pause."""
    device, taken = batch.data["inputs"].device, []
    for _ in range(WARM_UP):
        train_step(state, batch, config, ALONE)
    for _ in range(rounds):
        started = clock(device)
        for _ in range(steps):
            train_step(state, batch, config, ALONE)
        taken.append((clock(device) - started) / steps)
    return np.array(taken)


def table(need: Need, products: float, copies: float, seconds: np.ndarray, batch: int) -> list[str]:
    """The lines of one canvas. products: FLOP/s, copies: bytes/s. seconds: of a step, by round."""
    in_products, in_copies = need.products / products, sum(need.moved.values()) / copies
    floor, step = max(in_products, in_copies), float(np.median(seconds))

    def line(name: str, amount: str, least: float) -> str:
        return f"{name:<28}{amount:>18}{1000 * least:>12.3f} ms{least / step:>9.1%}"

    return [
        f"{'':<28}{'amount':>18}{'at least':>15}{'of step':>9}",
        line("products", f"{need.products / 1e9:,.3f} GFLOP", in_products),
        *(line(name, f"{size / 1e6:,.3f} MB", size / copies) for name, size in need.moved.items()),
        line("all bytes", f"{sum(need.moved.values()) / 1e6:,.3f} MB", in_copies),
        f"step {1000 * step:.3f} ms [{1000 * seconds.min():.3f}, {1000 * seconds.max():.3f}], "
        f"{batch / step:,.1f} samples/s, floor {1000 * floor:.3f} ms, reached {floor / step:.1%}, "
        f"of products {in_products / step:.1%}",
    ]


def configured(overrides: list[str]) -> PretrainConfig:
    """The checked configuration. Raises `UserError` for a step that cannot be counted beforehand."""
    config = compose.load(PretrainConfig, "pretrain", overrides)
    if config.mode.name != "act" or config.objective.axes:
        raise UserError("what a step costs is known beforehand with mode=act and objective.split=sum only")
    return config


@reports_user_errors
def main() -> None:
    parser = parser_of("benchmarks.roofline", __doc__)
    add = parser.add_argument
    add("--canvas", type=positive, nargs="+", default=[10], help="sides, a table each (default: 10)")
    add("--demonstrations", type=natural, default=3, help="of an encoder (default: %(default)s)")
    add("--rounds", type=positive, default=3, help="of which the median counts (default: %(default)s)")
    add("--steps", type=positive, default=5, help="of a round (default: %(default)s)")
    add("overrides", nargs="*", metavar="key=value", help="as for pretrain_etrm.py")
    options = parser.parse_intermixed_args()
    config = configured(options.overrides)
    device = choose_device(config.device, ALONE)
    if config.threads != "auto":
        torch.set_num_threads(config.threads)
    dtype = config.arch.on(device).dtype
    products, copies = product_rate(device, dtype), copy_rate(device)
    compiled = should_compile(config.compile, device, config.train_steps)
    reached = f"{products / 1e12:.3f} TFLOP/s in {str(dtype).removeprefix('torch.')}"
    print(f"{describe(device)}; {git_commit()}; compile={str(compiled).lower()}")
    print(f"a product reaches {reached}, a copy {copies / 1e9:.2f} GB/s", flush=True)
    for side in options.canvas:
        bucket = Bucket(side, options.demonstrations if config.encoder else 0)
        compile_fused(False)
        need = Need.of(config, bucket)
        compile_fused(compiled)
        state = full_state(config, side, device)
        batch = full_batch(bucket, config.global_batch_size, device)
        with explains_out_of_memory(f"a step on canvas {side}", "lower global_batch_size"):
            seconds = step_seconds(state, batch, config, options.rounds, options.steps)
        print(f"\ncanvas {side}, {bucket.demos} demonstrations, batch {config.global_batch_size}")
        print(*table(need, products, copies, seconds, config.global_batch_size), sep="\n")
        print(f"canvas {side}: peak memory so far {peak_memory_gb(device):.2f} GB", flush=True)


if __name__ == "__main__":
    main()
