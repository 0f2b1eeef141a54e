"""Measure the data layer against the ancestors' own code.

    python -m benchmarks.data --against TinyRecursiveModels --against-etrm etrm

The folders are checkouts of SamsungSAILMontreal/TinyRecursiveModels and bdsaglam/etrm. Their code runs
unchanged, in processes of its own. One run has three parts:

- build: the ARC dataset, theirs and then ours, in seconds, peak memory and size on disk.
- check: our import and export of theirs holds the same examples, and their loader reads ours as it was
  written.
- batches: training examples per second, theirs and ours in turn, on the same tasks.
"""

import argparse
import os
import shlex
import shutil
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.equality import check
from benchmarks.loaders import (
    BATCH,
    EPISODES,
    EPISODES_THEIRS,
    PUZZLES,
    PUZZLES_THEIRS,
    SMALL_EPISODES,
    Rates,
    batches,
)
from benchmarks.processes import (
    ROOT,
    TEST_SUBSET,
    Cost,
    measured,
    our_build,
    require_checkout,
    require_room,
    their_build,
)
from dataset import sources
from utils.arguments import parser_of
from utils.device import choose_device
from utils.distributed import World
from utils.environment import git_commit
from utils.errors import UserError, nearest, reports_user_errors
from utils.files import write_atomically

RESULTS, SECTION = ROOT / "benchmarks" / "RESULTS.md", "Data"
TRM, ETRM = "SamsungSAILMontreal/TinyRecursiveModels", "bdsaglam/etrm"
TRM_FILES = ("dataset/build_arc_dataset.py", "puzzle_dataset.py")
ETRM_FILES = ("dataset/build_arc_dataset_encoder.py", "dataset/fewshot_puzzle_dataset.py")
MB = 1e6
# What the project claims of itself. The claims on the build are for this many augmentations.
CLAIMED_AUGMENTATIONS = 1000
MIN_SPEEDUP = 40  # times
MAX_MEMORY, MAX_DISK = 2e9, 100e6  # bytes
MIN_RATE = 20_000  # examples per second


def build(trm: Path, prefix: str, subsets: list[str], num_aug: int, work: Path) -> tuple[Cost, Cost]:
    """The costs of the original's build and of ours."""
    theirs = measured(their_build(prefix, subsets, num_aug, work / "theirs"), work / "theirs", trm)
    shutil.rmtree(work / "theirs")  # gigabytes, which nothing reads
    return theirs, measured(our_build(prefix, subsets, num_aug, work / "ours"), work / "ours")


def table(theirs: Cost, ours: Cost) -> list[tuple[str, str, str, str]]:
    """The rows (quantity, theirs, ours, theirs / ours), as text."""
    rows = []
    for name, unit in (("seconds", 1.0), ("memory", MB), ("disk", MB)):
        their_value, our_value = (getattr(cost, name) / unit for cost in (theirs, ours))
        title = name if unit == 1 else f"{name}, MB"
        rows.append((title, f"{their_value:,.1f}", f"{our_value:,.1f}", f"{their_value / our_value:,.1f}"))
    return rows


def claims(theirs: Cost, ours: Cost, rates: dict[str, Rates], num_aug: int) -> dict[str, bool]:
    """The project's claims, and whether this run bears them out."""
    stated = {f"{SMALL_EPISODES}: at least {MIN_RATE:,} examples/s": rates[SMALL_EPISODES].median >= MIN_RATE}
    if num_aug >= CLAIMED_AUGMENTATIONS:
        stated |= {
            f"build at least {MIN_SPEEDUP} times faster": theirs.seconds >= MIN_SPEEDUP * ours.seconds,
            f"build in less than {MAX_MEMORY / MB:,.0f} MB of memory": ours.memory < MAX_MEMORY,
            f"dataset smaller than {MAX_DISK / MB:,.0f} MB": ours.disk < MAX_DISK,
        }
    return stated


def machine(device: torch.device) -> str:
    """The processor's model, its cores, and the GPU if it is `device`."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU"
    )
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{model}, {os.cpu_count()} cores{gpu}"


def record(file: Path, cells: list[str], section: str) -> None:
    """Append a row to the table that ends a section of a Markdown file."""
    before, heading, rest = file.read_text(encoding="utf-8").partition(f"## {section}\n")
    assert heading, f"{file} has no section '{section}'"
    table, following, after = rest.partition("\n## ")
    # The section may be followed by others; the row goes to the end of its table.
    text = f"{before}{heading}{table.rstrip()}\n| {' | '.join(cells)} |\n{following}{after}"
    write_atomically(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def origin(module: str, device: torch.device) -> list[str]:
    """The first cells of a row that is recorded: date, commit, machine, and the command of this process."""
    # Of absolute paths the last part: where something lies on this machine is nobody's business.
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    command = f"`python -m {module} {shlex.join(words)}`"
    return [date.today().isoformat(), git_commit() or "-", machine(device), command]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The checked command line, its paths absolute. Raises `UserError`."""
    parser = parser_of("benchmarks.data", __doc__)
    add = parser.add_argument
    etrm = f"a checkout of {ETRM}; without it our episodes are measured alone"
    num_aug = "of the build (default: %(default)s, which takes some 17 GB of memory)"
    subsets = ["training", "evaluation", "concept"]
    prefix = "Kaggle's files (default: the original's own, kaggle/combined/arc-agi in its checkout)"
    add("--against", type=Path, required=True, metavar="TRM", help=f"a checkout of {TRM}")
    add("--against-etrm", type=Path, metavar="ETRM", help=etrm)
    add("--num-aug", type=int, default=CLAIMED_AUGMENTATIONS, help=num_aug)
    add("--subsets", nargs="+", default=subsets, help=f"must hold {TEST_SUBSET}, which is held out")
    add("--input-file-prefix", help=prefix)
    add("--rounds", type=int, default=7, help="of the batches' measurement (default: %(default)s)")
    add("--seconds", type=float, default=3.0, help="per loader and round (default: %(default)s)")
    add("--threads", type=int, default=2, help="of PyTorch, for our batches (default: %(default)s)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where batches are drawn")
    add("--record", action="store_true", help=f"append the results to {RESULTS.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    if min(options.num_aug, options.rounds, options.threads) < 1 or options.seconds <= 0:
        raise UserError("--num-aug, --rounds and --threads must be at least 1, --seconds positive")
    options.against = options.against.resolve()
    require_checkout(options.against, TRM_FILES, TRM)
    if options.against_etrm:
        options.against_etrm = options.against_etrm.resolve()
        require_checkout(options.against_etrm, ETRM_FILES, ETRM)
    files = Path(options.input_file_prefix or options.against / "kaggle/combined/arc-agi")
    options.input_file_prefix = str(files.resolve())
    return options


def count_pairs(prefix: str, subsets: list[str]) -> int:
    """The number of pairs of all tasks. Raises `UserError` for a subset that does not exist."""
    available = sources.kaggle_source(prefix)
    for name in subsets:
        if name not in available:
            raise UserError(
                f"{prefix}: no subset '{name}'{nearest(name, available)}; there are {', '.join(available)}"
            )
    if TEST_SUBSET not in subsets:
        raise UserError(f"--subsets must hold '{TEST_SUBSET}'")
    return sum(len(task.pairs) for name in subsets for task in available[name]())


def measure(options: argparse.Namespace, work: Path) -> bool:
    """Measure, print and record all three parts. Returns whether all comparisons came out equal."""
    device = choose_device(options.device, World())
    torch.set_num_threads(options.threads)
    trm, prefix, subsets = options.against, options.input_file_prefix, options.subsets
    # Before, since the original's build takes long and all the memory that it can get.
    require_room(count_pairs(prefix, subsets) * (options.num_aug + 1), work)
    print(f"{machine(device)}; {git_commit()}")
    print(f"\nbuild, {options.num_aug} augmentations of {' '.join(subsets)}")
    theirs, ours = build(trm, prefix, subsets, options.num_aug, work)
    costs = table(theirs, ours)
    for row in [("", "original", "ours", "ratio"), *costs]:
        print(f"{row[0]:<14}{row[1]:>12}{row[2]:>12}{row[3]:>10}")
    print("\ncheck")
    equal = check(trm, prefix, subsets, work)
    for what, same in equal.items():
        print(f"{'same' if same else 'DIFFERENT':<10}{what}")
    print(f"\nbatches of {BATCH}, {options.threads} threads, examples/s: ", end="")
    print(f"median [lowest, highest] of {options.rounds} rounds")
    rates = batches(trm, options.against_etrm, work, options.rounds, options.seconds, device)
    few = options.num_aug < CLAIMED_AUGMENTATIONS
    print("\nclaims" + (f"; those on the build need --num-aug {CLAIMED_AUGMENTATIONS}" if few else ""))
    for claim, holds in claims(theirs, ours, rates, options.num_aug).items():
        print(f"{'holds' if holds else 'FAILS':<10}{claim}")
    same = all(equal.values())
    if options.record:
        loaders = (PUZZLES_THEIRS, PUZZLES, EPISODES_THEIRS, EPISODES, SMALL_EPISODES)
        row = origin("benchmarks.data", device)
        row += [f"{theirs} / {ours} ({ratio})" for _, theirs, ours, ratio in costs]
        row += ["yes" if same else "NO", *(str(rates.get(name, "-")) for name in loaders)]
        record(RESULTS, row, SECTION)
    return same


@reports_user_errors
def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as work:
        if not measure(options, Path(work)):
            raise UserError("the datasets differ")


if __name__ == "__main__":
    main()
