"""The largest batch that fits: python -m tools.find_batch_size [key=value ... as for pretrain_etrm.py]

Doubles the batch until it no longer fits, then bisects, to within 1/32. Each trial is a process of its own that trains in
every canvas and number of demonstrations the dataset has, the largest first and last, so that optimiser states and all
carries are in memory, in the last stage of the training. On the CPU "fits" means within --memory-limit-gb.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import torch

from config import compose
from config.schema import PretrainConfig
from dataset.batch import Bucket
from training.start import Run
from utils.arguments import parser_of
from utils.device import choose_device, describe, is_out_of_memory
from utils.distributed import World
from utils.errors import UserError, reports_user_errors

FITS, DOES_NOT_FIT = 0, 3
GB = 10**9


def trial(overrides: list[str], batch: int, memory_limit: int | None) -> bool:
    """Whether training steps with `batch` samples per process fit (within `memory_limit` bytes of host memory, where given)."""
    config = compose.load(
        PretrainConfig, "pretrain", [*overrides, f"global_batch_size={batch}", "resume=never"]
    )
    run = Run(config, World())
    _ = run.device, run.sampler
    if memory_limit is not None:
        allow_host_memory(memory_limit)
    try:
        run.state.step = (
            config.train_steps
        )  # the last stage takes the most: what was frozen trains, contexts are moved
        buckets = sorted(run.sampler.buckets, key=positions, reverse=True)
        for bucket in [*buckets, buckets[0]]:
            run.step(run.sampler.sample(run.state.step, bucket))
        if run.device.type == "cuda":
            torch.cuda.synchronize()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def positions(bucket: Bucket) -> int:
    """How many grid buckets a sample has."""
    return bucket.side**2 * (1 + 2 * bucket.demos)


def allow_host_memory(limit: int) -> None:
    """From now on, allocations beyond `limit` bytes of resident memory fail in this process."""
    pages = [int(word) for word in Path("/proc/self/statm").read_text().split()[:2]]
    reserved, resident = (count * resource.getpagesize() for count in pages)
    if resident >= limit:
        raise UserError(f"--memory-limit-gb: the program and the data alone take {resident / GB:.2f} GB")
    bound = reserved - resident + limit  # what libraries merely reserve does not count
    resource.setrlimit(resource.RLIMIT_AS, (bound, resource.getrlimit(resource.RLIMIT_AS)[1]))


def available_memory() -> int:
    """Bytes of host memory that are free to use."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def fits(overrides: list[str], batch: int, memory_limit: int | None) -> bool:
    """`trial` in a process of its own, whose memory nothing earlier has fragmented. Raises `UserError` with what it says otherwise."""
    limit = ["--memory-limit-gb", str(memory_limit / GB)] if memory_limit is not None else []
    command = [sys.executable, "-m", "tools.find_batch_size", *overrides, "--try", str(batch), *limit]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if (
        done.returncode not in (FITS, DOES_NOT_FIT) and done.returncode != -9
    ):  # the kernel kills what takes too much
        raise UserError(
            done.stderr.strip().removeprefix("error: ") or f"a trial ended with status {done.returncode}"
        )
    print(f"global_batch_size={batch}: {'fits' if done.returncode == FITS else 'does not fit'}", flush=True)
    return done.returncode == FITS


def search(overrides: list[str], memory_limit: int | None, largest: int) -> int:
    """The largest batch up to `largest` that fits, to within 1/32; 0 when not even one sample does."""
    low, high = 0, 1
    while fits(overrides, high, memory_limit):
        low = high
        if low == largest:
            return low
        high = min(2 * low, largest)
    while high - low > max(1, low // 32):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(overrides, middle, memory_limit) else (low, middle)
    return low


@reports_user_errors
def main() -> None:
    parser = parser_of("tools.find_batch_size", __doc__)
    parser.add_argument("overrides", nargs="*", help="key=value, as for pretrain_etrm.py")
    parser.add_argument(
        "--memory-limit-gb", type=float, help="on the CPU: memory for the process; default: what is available"
    )
    parser.add_argument("--max", type=int, default=1 << 16, help="do not try more than this")
    parser.add_argument("--try", type=int, dest="batch", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    limit = None if options.memory_limit_gb is None else int(options.memory_limit_gb * GB)
    if options.batch:
        sys.exit(FITS if trial(options.overrides, options.batch, limit) else DOES_NOT_FIT)
    if options.max < 1 or (limit is not None and limit <= 0):
        raise UserError("--max and --memory-limit-gb must be positive")
    config = compose.load(PretrainConfig, "pretrain", options.overrides)
    device = choose_device(config.device, World())
    if device.type == "cpu":
        limit = limit or available_memory()
    found = search(options.overrides, limit, options.max)
    where = describe(device) + (f", {limit / GB:.2f} GB" if limit is not None else "")
    if not found:
        raise UserError(
            f"not even one sample fits ({where}); make the model, data.buckets or data.max_demos smaller"
        )
    bound = f" (the most that was tried, --max {options.max})" if found == options.max else ""
    print(
        f"largest batch of one process on this device: {found}{bound} ({where}); N processes take global_batch_size={found}*N"
    )


if __name__ == "__main__":
    main()
