"""Does a curriculum of depth learn more in equal time? A study on small Sudokus.

    python -m experiments.curriculum run --sizes 4 6 --seeds 0 1 2
    python -m experiments.curriculum table

`run` trains the recipe of a size with its full depth, and with `depth_schedule`, whose cheaper updates are so
many more that their arithmetic is the same. It appends a line per training to experiments/curriculum.jsonl,
with the processor seconds that it took. What is there is not done again.
"""

import argparse
import json
import resource
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from config import compose
from config.schema import PretrainConfig
from experiments.ladder import run_python
from experiments.studies import complete, read
from utils.arguments import parser_of
from utils.environment import git_commit
from utils.errors import reports_user_errors
from utils.files import read_json
from utils.logging import read_metrics

RESULTS = Path(__file__).with_name("curriculum.jsonl")
SCORE = "all.exact_accuracy"
SCHEDULE = ((0, 1, 1), (0.3, 1, 2), (0.6, 2, 2))  # share of the training, H and L cycles
BUILDS = {
    4: "--size 4 --clues 6 --train-puzzles 3000 --test-puzzles 300",
    6: "--size 6 --train-puzzles 3000 --test-puzzles 500",
}
STEPS = {4: 120, 6: 600}  # of plain training, which does not solve everything by then
SETTINGS = ("plain", "curriculum")


def cost(schedule: tuple[tuple[float, int, int], ...]) -> float:
    """The arithmetic of an update under a schedule, as a share of its last stage's.

    A backward pass through the last H cycle takes twice the arithmetic of a forward pass.
    """
    ends = [*(start for start, _, _ in schedule[1:]), 1.0]
    blocks = [h * (latent + 1) + 2 * (latent + 1) for _, h, latent in schedule]
    shares = [end - start for (start, _, _), end in zip(schedule, ends, strict=True)]
    return sum(share * count for share, count in zip(shares, blocks, strict=True)) / blocks[-1]


def run(size: int, setting: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one model, and return its line. Raises `UserError` where a command fails."""
    data = options.data_dir / f"sudoku-{size}x{size}"
    if not data.is_dir():
        run_python(
            "-m", "dataset.build_sudoku_dataset", *shlex.split(BUILDS[size]), "--output-dir", str(data)
        )
    name = f"curriculum-{size}-{setting}-seed{seed}"
    steps, schedule = STEPS[size], "null"
    if setting == "curriculum":
        steps = round(steps / cost(SCHEDULE))
        schedule = json.dumps(SCHEDULE, separators=(",", ":"))
    keys = [
        f"experiment=sudoku_{size}x{size}",
        f"data.path={data}",
        f"run_name={name}",
        f"output_dir={options.output_dir}",
        f"seed={seed}",
        f"train_steps={steps}",
        f"eval_interval={steps}",
        "logging.progress=false",
        "threads=1",
        f"depth_schedule={schedule}",  # in place of the recipe's own
        "resume=never",  # the seconds of a part would pass for those of the whole
    ]
    compose.load(PretrainConfig, "pretrain", keys)  # a mistake is found before the first training
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run_python("pretrain_etrm.py", *keys)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    folder = options.output_dir / name
    last = [line for line in read_metrics(folder / "metrics.jsonl") if SCORE in line][-1]
    return {
        "size": size,
        "setting": setting,
        "seed": seed,
        "steps": steps,
        SCORE: last[SCORE],
        "processor_seconds": round(after.ru_utime - before.ru_utime, 1),
        "command": f"python -m experiments.curriculum run --sizes {size} --seeds {seed}",
        "commit": git_commit(),
        "machine": read_json(folder / "environment.json")[-1]["device"],
    }


def table(lines: list[dict[str, Any]]) -> Iterator[str]:
    """A Markdown table: the mean over seeds, with the lowest and the highest."""
    yield "| Sudoku | training | seeds | updates | processor seconds | exact answers |"
    yield "|---|---|---|---|---|---|"
    for size in BUILDS:
        for setting in SETTINGS:
            own = [line for line in lines if (line["size"], line["setting"]) == (size, setting)]
            if not own:
                continue
            scores = [line[SCORE] for line in own]
            seconds = sum(line["processor_seconds"] for line in own) / len(own)
            spread = f"{sum(scores) / len(own):.3f} ({min(scores):.3f} to {max(scores):.3f})"
            cells = (f"{size}x{size}", setting, len(own), own[0]["steps"], f"{seconds:.0f}", spread)
            yield f"| {' | '.join(map(str, cells))} |"


@reports_user_errors
def main() -> None:
    parser = parser_of("experiments.curriculum", __doc__)
    add = parser.add_argument
    add("action", choices=("run", "table"))
    add("--sizes", nargs="+", type=int, choices=list(BUILDS), default=list(BUILDS), help="default: all")
    add("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    add("--output-dir", type=Path, default=Path("runs/curriculum"), help="of the runs (default: %(default)s)")
    add("--data-dir", type=Path, default=Path("data"), help="of the datasets (default: %(default)s)")
    add("--results", type=Path, default=RESULTS, help=f"default: experiments/{RESULTS.name}")
    options = parser.parse_args()
    if options.action == "table":
        print("\n".join(table(read(options.results))))
        return
    cases = (
        (size, setting, seed) for size in options.sizes for seed in options.seeds for setting in SETTINGS
    )
    complete(options.results, ("size", "setting", "seed"), cases, partial(run, options=options))


if __name__ == "__main__":
    main()
