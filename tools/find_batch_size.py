"""Find the largest batch that one process can train on.

    python -m tools.find_batch_size data=arc1 arch=etrm

Give the keys of the run, as for pretrain_etrm.py. The search doubles the batch until it no longer fits, then
bisects to within 1/32. Each trial is a process of its own and trains as the last stage of the run does. It
takes a step on every canvas and number of demonstrations of the dataset, so that all carries are in memory;
the largest comes first and last. On a CPU a batch fits if the process stays within --memory-limit-gb.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import torch

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from config import compose
from config.schema import PretrainConfig
from dataset.batch import Bucket
from training.start import Run
from utils.arguments import parser_of
from utils.device import choose_device, describe, is_out_of_memory
from utils.distributed import World
from utils.errors import UserError, reports_user_errors

FITS, DOES_NOT_FIT = 0, 3  # exit statuses of a trial
KILLED = -9  # the status of a process that the kernel ended for taking too much memory
GB = 10**9


def trial(overrides: list[str], batch: int, memory_limit: int | None) -> bool:
    """Whether steps with `batch` samples fit into memory; `memory_limit` bounds the host's, in bytes."""
    own = [f"global_batch_size={batch}", "resume=never"]
    config = compose.load(PretrainConfig, "pretrain", [*overrides, *own])
    run = Run(config, World())
    # Made on first use, so made here: the limit below tells where they alone exceed it.
    _ = run.device, run.sampler
    if memory_limit is not None:
        allow_host_memory(memory_limit)
    try:
        # The last stage takes the most memory: frozen parts train by then, and contexts are moved.
        run.state.step = config.train_steps
        buckets = sorted(run.sampler.buckets, key=cells_of, reverse=True)
        # The largest again at the end: only then are all carries and the optimizer's states in memory.
        for bucket in [*buckets, buckets[0]]:
            run.step(run.sampler.sample(run.state.step, bucket))
        if run.device.type == "cuda":
            torch.cuda.synchronize()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def cells_of(bucket: Bucket) -> int:
    """How many cells a sample has: its query's canvas, and an input and an output per demonstration."""
    return bucket.side**2 * (1 + 2 * bucket.demos)


def allow_host_memory(limit: int) -> None:
    """Let allocations beyond `limit` bytes of resident memory fail in this process from now on."""
    pages = [int(word) for word in Path("/proc/self/statm").read_text().split()[:2]]
    reserved, resident = (count * resource.getpagesize() for count in pages)
    if resident >= limit:
        raise UserError(f"--memory-limit-gb: the program and the data alone take {resident / GB:.2f} GB")
    # The system can only bound addresses. Libraries reserve many more than they use, which must not count.
    bound = reserved - resident + limit
    resource.setrlimit(resource.RLIMIT_AS, (bound, resource.getrlimit(resource.RLIMIT_AS)[1]))


def available_memory() -> int:
    """Bytes of host memory that are free to use."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def fits(overrides: list[str], batch: int, memory_limit: int | None) -> bool:
    """The answer of a `trial` in a process of its own. Raises `UserError` where the trial has failed."""
    # A new process, because freed memory is fragmented and a GPU's stays with the process.
    limit = ["--memory-limit-gb", str(memory_limit / GB)] if memory_limit is not None else []
    # By its path, which works from any folder.
    command = [sys.executable, str(Path(__file__).resolve()), *overrides, "--try", str(batch), *limit]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode not in (FITS, DOES_NOT_FIT, KILLED):
        words = done.stderr.strip().removeprefix("error: ")
        raise UserError(words or f"a trial ended with status {done.returncode}")
    print(f"global_batch_size={batch}: {'fits' if done.returncode == FITS else 'does not fit'}", flush=True)
    return done.returncode == FITS


def search(overrides: list[str], memory_limit: int | None, largest: int) -> int:
    """The largest batch up to `largest` that fits, to within 1/32; 0 where not even one sample does."""
    # Throughout, `low` fits and `high` is untried or does not.
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
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="as for pretrain_etrm.py")
    add("--memory-limit-gb", type=float, help="memory of the process on a CPU; default: what is available")
    add("--max", type=int, default=1 << 16, help="try no larger batch (default: %(default)s)")
    add("--try", type=int, dest="batch", help=argparse.SUPPRESS)  # one trial, for `fits`
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
        f"largest batch of one process on this device: {found}{bound} ({where}); "
        f"N processes take global_batch_size={found}*N"
    )


if __name__ == "__main__":
    main()
