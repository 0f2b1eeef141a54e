"""Measure the data layer against the ancestors' own code: python -m benchmarks.data --against TRM --against-etrm ETRM

TRM and ETRM are checkouts of SamsungSAILMontreal/TinyRecursiveModels and bdsaglam/etrm, which run unchanged, in processes
of their own. Three parts, in one run:

build     the ARC dataset, theirs and then ours: seconds, peak memory, size on disk
check     theirs read and written again holds the same examples, and their loader reads ours as it was written
batches   training examples per second, theirs and ours in turn, on the same tasks
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
# What the project claims of itself; of the build, at this many augmentations.
CLAIMED_AUGMENTATIONS = 1000
MIN_SPEEDUP, MAX_MEMORY, MAX_DISK, MIN_RATE = 40, 2e9, 100e6, 20_000


def build(trm: Path, prefix: str, subsets: list[str], num_aug: int, work: Path) -> tuple[Cost, Cost]:
    """Costs of the original's build and of ours. The original's dataset is deleted again."""
    theirs = measured(their_build(prefix, subsets, num_aug, work / "theirs"), work / "theirs", trm)
    shutil.rmtree(work / "theirs")
    return theirs, measured(our_build(prefix, subsets, num_aug, work / "ours"), work / "ours")


def table(theirs: Cost, ours: Cost) -> list[tuple[str, str, str, str]]:
    """Rows (quantity, theirs, ours, theirs / ours)."""
    quantities = [("seconds", 1.0), ("memory", MB), ("disk", MB)]
    rows = []
    for name, unit in quantities:
        values = [getattr(cost, name) / unit for cost in (theirs, ours)]
        rows.append(
            (
                name if unit == 1 else f"{name}, MB",
                *(f"{value:,.1f}" for value in values),
                f"{values[0] / values[1]:,.1f}",
            )
        )
    return rows


def claims(theirs: Cost, ours: Cost, rates: dict[str, Rates], num_aug: int) -> dict[str, bool]:
    """What the project says of itself, and whether this run bears it out."""
    stated = {f"{SMALL_EPISODES}: at least {MIN_RATE:,} examples/s": rates[SMALL_EPISODES].median >= MIN_RATE}
    if num_aug >= CLAIMED_AUGMENTATIONS:
        stated |= {
            f"build at least {MIN_SPEEDUP} times faster": theirs.seconds >= MIN_SPEEDUP * ours.seconds,
            f"build in less than {MAX_MEMORY / MB:,.0f} MB of memory": ours.memory < MAX_MEMORY,
            f"dataset smaller than {MAX_DISK / MB:,.0f} MB": ours.disk < MAX_DISK,
        }
    return stated


def machine(device: torch.device) -> str:
    """The processor's model, its cores, and the GPU if it is used."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU"
    )
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{model}, {os.cpu_count()} cores{gpu}"


def record(file: Path, cells: list[str], section: str) -> None:
    """Append a row to the markdown table that ends `section` of `file`."""
    before, heading, rest = file.read_text(encoding="utf-8").partition(f"## {section}\n")
    assert heading, f"{file} has no section '{section}'"
    table, following, after = rest.partition("\n## ")
    text = f"{before}{heading}{table.rstrip()}\n| {' | '.join(cells)} |\n{following}{after}"
    write_atomically(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, its paths absolute."""
    parser = parser_of("benchmarks.data", __doc__)
    add = parser.add_argument
    add("--against", type=Path, required=True, metavar="TRM", help=f"a checkout of {TRM}")
    add(
        "--against-etrm",
        type=Path,
        metavar="ETRM",
        help=f"a checkout of {ETRM}; without it our episodes are measured alone",
    )
    add(
        "--num-aug",
        type=int,
        default=CLAIMED_AUGMENTATIONS,
        help="of the build (default: %(default)s, which takes some 17 GB of memory)",
    )
    add(
        "--subsets",
        nargs="+",
        default=["training", "evaluation", "concept"],
        help=f"must hold {TEST_SUBSET}, which is held out",
    )
    add(
        "--input-file-prefix",
        help="Kaggle's files (default: the original's own, kaggle/combined/arc-agi in its checkout)",
    )
    add("--rounds", type=int, default=7, help="of the batches' measurement")
    add("--seconds", type=float, default=3.0, help="per loader and round")
    add("--threads", type=int, default=2, help="of PyTorch, for our batches")
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
    options.input_file_prefix = str(
        Path(options.input_file_prefix or options.against / "kaggle/combined/arc-agi").resolve()
    )
    return options


def count_pairs(prefix: str, subsets: list[str]) -> int:
    """The pairs of all tasks. Raises `UserError` for a subset that is not there."""
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
    """All three parts, printed; whether all comparisons came out equal."""
    device = choose_device(options.device, World())
    torch.set_num_threads(options.threads)
    trm, etrm, prefix, subsets = (
        options.against,
        options.against_etrm,
        options.input_file_prefix,
        options.subsets,
    )
    require_room(count_pairs(prefix, subsets) * (options.num_aug + 1), work)
    print(
        f"{machine(device)}; {git_commit()}\n\nbuild, {options.num_aug} augmentations of {' '.join(subsets)}"
    )
    theirs, ours = build(trm, prefix, subsets, options.num_aug, work)
    costs = table(theirs, ours)
    for row in [("", "original", "ours", "ratio"), *costs]:
        print(f"{row[0]:<14}{row[1]:>12}{row[2]:>12}{row[3]:>10}")
    print("\ncheck")
    equal = check(trm, prefix, subsets, work)
    for what, same in equal.items():
        print(f"{'same' if same else 'DIFFERENT':<10}{what}")
    print(
        f"\nbatches of {BATCH}, {options.threads} threads, examples/s: median [lowest, highest] of {options.rounds} rounds"
    )
    rates = batches(trm, etrm, work, options.rounds, options.seconds, device)
    print(
        "\nclaims"
        if options.num_aug >= CLAIMED_AUGMENTATIONS
        else f"\nclaims; those on the build need --num-aug {CLAIMED_AUGMENTATIONS}"
    )
    for claim, holds in claims(theirs, ours, rates, options.num_aug).items():
        print(f"{'holds' if holds else 'FAILS':<10}{claim}")
    if options.record:
        words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
        command = f"python -m benchmarks.data {shlex.join(words)}"
        builds = [f"{row[1]} / {row[2]} ({row[3]})" for row in costs]
        loaders = [
            str(rates.get(name, "-"))
            for name in (PUZZLES_THEIRS, PUZZLES, EPISODES_THEIRS, EPISODES, SMALL_EPISODES)
        ]
        same = "yes" if all(equal.values()) else "NO"
        record(
            RESULTS,
            [
                date.today().isoformat(),
                git_commit() or "-",
                machine(device),
                f"`{command}`",
                *builds,
                same,
                *loaders,
            ],
            SECTION,
        )
    return all(equal.values())


@reports_user_errors
def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as work:
        if not measure(options, Path(work)):
            raise UserError("the datasets differ")


if __name__ == "__main__":
    main()
