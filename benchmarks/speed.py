"""Measure training and evaluation against an ancestor's.

    python -m benchmarks.speed --what trm --against TinyRecursiveModels

--against is a checkout of SamsungSAILMontreal/TinyRecursiveModels (trm, sudoku) or bdsaglam/etrm (etrm,
eval). It runs unchanged in a process of its own. Theirs and ours take turns on the same tasks, with the same
model sizes, precision and batch. --what chooses the comparison:

- etrm: a training step of the ETRM ancestor; ours on the task's canvas, and on the full canvas with the same
  mathematics.
- trm: a training step of the original TRM; ours on the full canvas, and on the task's.
- sudoku: a training step of the original TRM on Sudokus, with a feed-forward network over the cells instead
  of attention.
- eval: an evaluation of the ETRM from weights to pass@k.
- small: no ancestor, but our own plain step against the compiled one, and against a process per core. The
  model is so small that PyTorch's overhead is most of the step.
- build: the datasets, as `python -m benchmarks.data`.
"""

import argparse
import shlex
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import data
from benchmarks.data import ETRM, RESULTS, TRM, machine, origin, record
from benchmarks.identical import ENCODER
from benchmarks.loaders import data_config, rules_dataset
from benchmarks.matching import ARCH, check_context, our_overrides, their_batches, their_views
from benchmarks.processes import require_checkout, run
from benchmarks.race import Race, Result, spread
from benchmarks.real_tokens import Canvases
from config import compose
from config.schema import PretrainConfig
from dataset.store import Store
from utils.arguments import parser_of
from utils.device import choose_device
from utils.distributed import World
from utils.environment import git_commit
from utils.errors import UserError, reports_user_errors

TRM_FILES = ("pretrain.py", "models/recursive_reasoning/trm.py")
ETRM_FILES = ("pretrain_etrm.py", "models/recursive_reasoning/etrm.py")
SECTION = "Training and evaluation"
SUDOKUS = 1000
BATCHES = 8  # different ones that the ancestor sees
SAME_CONTEXT = 1e-3  # the largest difference between contexts that rounding explains


def on_canvases(options: argparse.Namespace, usual: list[str]) -> list[tuple[str, list[str]]]:
    """Names and overrides of the task canvases that ours computes: `--canvases`, or the usual ones."""
    asked = [(f"canvases {canvases.name}", canvases.overrides) for canvases in options.canvases]
    return asked or [("task canvas", usual)]


def etrm(options: argparse.Namespace, race: Race) -> None:
    """A training step: the ETRM ancestor's, the same mathematics in ours, and our encoders on the task's
    canvas.

    Raises `UserError` if the mathematics is not the same.
    """
    dataset = race.work / "dataset"
    run(["-m", "dataset.build_arc_dataset", "--recipe", "arc1", "--output-dir", str(dataset)])
    full = [*ENCODER, "arch.pos_encodings=rope", "data.canvas=full"]
    overrides = our_overrides(options, dataset, "etrm", "arc1", *full)
    config = compose.load(PretrainConfig, "pretrain", overrides)
    flops = their_batches(config, BATCHES, race.work / "batches.npz")
    difference = check_context(options, config, race.work)
    if difference > SAME_CONTEXT:
        raise UserError(f"the contexts differ by {difference:.2g}")
    same = f"from the same weights the contexts differ by at most {difference:.1g}"
    print(f"same mathematics: {same}", flush=True)
    race.theirs("etrm", flops, data=str(race.work / "batches.npz"), identifiers=1)
    sides = [("full canvas, same mathematics", options.steps, full)]
    for on, canvas in on_canvases(options, []):
        for encoder in ("standard", "memory"):
            more = [f"encoder={encoder}", *canvas]
            sides.append((f"{on}, encoder {encoder}", options.task_steps, more))
    for name, steps, more in sides[bool(options.canvases) :]:
        ours = our_overrides(options, dataset, "etrm", "arc1", *more, *options.override)
        race.ours(name, "train", steps, ours, identical=more is full)


def trm(options: argparse.Namespace, race: Race) -> None:
    """A training step: the original TRM's, ours on its canvas, and ours on the task's."""
    dataset = race.work / "dataset"
    build = "-m dataset.build_arc_dataset --recipe arc1 --layout puzzle --num-aug 8 --output-dir"
    run([*build.split(), str(dataset)])
    full = ["data.canvas=full"]
    overrides = our_overrides(options, dataset, "trm", "arc1_puzzle", *full)
    config = compose.load(PretrainConfig, "pretrain", overrides)
    flops = their_batches(config, BATCHES, race.work / "batches.npz")
    identifiers = Store.load(dataset).metadata.num_puzzle_identifiers
    race.theirs("trm", flops, data=str(race.work / "batches.npz"), identifiers=identifiers)
    sides = [("full canvas", options.steps, full)]
    usual = ["data.canvas=task", f"data.buckets={data_config('arc1', dataset).buckets}"]
    for on, canvas in on_canvases(options, usual):
        sides.append((on, options.task_steps, ["arch.pos_encodings=rope2d", *canvas]))
    for name, steps, more in sides[bool(options.canvases) :]:
        ours = our_overrides(options, dataset, "trm", "arc1_puzzle", *more, *options.override)
        race.ours(name, "train", steps, ours, identical=False)


def sudoku(options: argparse.Namespace, race: Race) -> None:
    """A training step on generated 9x9 Sudokus, which cost what those of Sudoku-Extreme do."""
    dataset = race.work / "dataset"
    puzzles = f"--train-puzzles {SUDOKUS} --test-puzzles 1"
    run(["-m", "dataset.build_sudoku_dataset", *puzzles.split(), "--output-dir", str(dataset)])
    ours = our_overrides(options, dataset, "trm", "sudoku", *options.override)
    config = compose.load(PretrainConfig, "pretrain", ours)
    flops = their_batches(config, BATCHES, race.work / "batches.npz")
    race.theirs("sudoku", flops, data=str(race.work / "batches.npz"), identifiers=1)
    race.ours("Sudoku 9x9, MLP over cells", "train", options.steps, ours, identical=False)


def evaluation(options: argparse.Namespace, race: Race) -> None:
    """An evaluation of the first tasks up to pass@k. Ours asks `options.views` views of each."""
    dataset = race.work / "dataset"
    run(["-m", "dataset.build_arc_dataset", "--recipe", "arc1", "--output-dir", str(dataset)])
    # One view is enough for the ancestor: there every view costs the same.
    own = ["encoder=standard", "data.canvas=full", "evaluation.num_views=1"]
    full = compose.load(PretrainConfig, "pretrain", our_overrides(options, dataset, "etrm", "arc1", *own))
    their_views(full, options.tasks, race.work)
    race.theirs("eval", None, data=str(race.work / "views.npz"), tasks=str(race.work))
    views = [f"evaluation.num_views={options.views}", f"evaluation.batch_size={options.batch}"]
    for encoder in ("standard", "memory"):
        more = [f"encoder={encoder}", *views, *options.override]
        ours = our_overrides(options, dataset, "etrm", "arc1", *more)
        race.ours(f"task canvas, encoder {encoder}", "eval", 1, ours, tasks=options.tasks)


def small(options: argparse.Namespace, race: Race) -> None:
    """A training step of the recipe rules_smoke: plain, compiled, and with a process per core.

    Its hidden size is 64, its canvases have 4 to 6 cells a side.
    """
    dataset = rules_dataset(race.work / "dataset")
    common = ["experiment=rules_smoke", f"data.path='{dataset}'", f"device={options.device}"]
    variants = [("plain", "false", 1), ("compiled", "true", 1)]
    if options.device == "cpu" and options.threads > 1:
        variants.append((f"compiled, {options.threads} processes", "true", options.threads))
    for name, compiled, processes in variants:
        overrides = [*common, f"compile={compiled}", *options.override]
        race.ours(name, "train", options.task_steps, overrides, processes, identical=False)


# --what -> the comparison, and the ancestor with the files that its checkout must have.
CASES = {
    "etrm": (etrm, ETRM, ETRM_FILES),
    "trm": (trm, TRM, TRM_FILES),
    "sudoku": (sudoku, TRM, TRM_FILES),
    "eval": (evaluation, ETRM, ETRM_FILES),
    "small": (small, None, ()),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The checked command line, its paths absolute. Raises `UserError`."""
    parser = parser_of("benchmarks.speed", __doc__)
    add = parser.add_argument
    steps = "of a round, for what computes full canvases (default: %(default)s)"
    task_steps = "of a round, on task canvases, whose costs differ (default: %(default)s)"
    add("--what", choices=[*CASES, "build"], required=True, help="the comparison")
    add("--against", type=Path, metavar="PATH", help="the ancestor's checkout")
    add("--batch", type=int, default=4, help="samples per step, for both (default: %(default)s)")
    add("--rounds", type=int, default=3, help="in which all take their turn (default: %(default)s)")
    add("--steps", type=int, default=1, help=steps)
    add("--task-steps", type=int, default=16, help=task_steps)
    add("--views", type=int, default=8, help="of ours in an evaluation (default: %(default)s)")
    add("--tasks", type=int, default=4, help="of an evaluation, for both (default: %(default)s)")
    add("--threads", type=int, default=2, help="of PyTorch, for both (default: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    add("--arch", nargs="+", default=[], metavar="KEY=VALUE", help=f"sizes of both models (default: {ARCH})")
    add("--override", nargs="+", default=[], metavar="KEY=VALUE", help="of our configuration alone")
    canvases = "of ours in etrm and trm, in place of the usual ones, as for benchmarks.real_tokens"
    add("--canvases", type=Canvases.read, nargs="+", default=[], metavar="SIDES:MARGIN", help=canvases)
    add("--record", action="store_true", help=f"append the results to benchmarks/{RESULTS.name}")
    # `build` has more options, which benchmarks.data reads.
    options, options.rest = parser.parse_known_args(arguments)
    if options.rest and options.what != "build":
        parser.error(f"unknown: {shlex.join(options.rest)}")
    options.arch = dict(word.split("=", 1) for word in options.arch)
    unknown = options.arch.keys() - ARCH.keys()
    if unknown:
        raise UserError(f"--arch: {', '.join(sorted(unknown))} is not one of {', '.join(ARCH)}")
    options.arch = {name: type(ARCH[name])(value) for name, value in options.arch.items()}
    if options.what in CASES and CASES[options.what][1]:
        _, name, files = CASES[options.what]
        if options.against is None:
            raise UserError(f"--what {options.what} needs --against, a checkout of {name}")
        options.against = options.against.resolve()
        require_checkout(options.against, files, name)
    return options


def report(results: list[Result], linear: float, options: argparse.Namespace) -> None:
    """Print the results, and record them if that is asked. `linear` is the rate of `F.linear`."""
    theirs = results[0]

    def useful(result: Result) -> str:
        return f"{result.useful_rate / linear:.1%}" if result.useful_rate else "-"

    device = choose_device(options.device, World())
    print(f"{machine(device)}; {git_commit()}; F.linear reaches {linear / 1e9:,.0f} GFLOP/s")
    print(f"{'':<32}{'samples/s':>28}{'ratio':>26}{'peak MB':>10}{'useful':>9}")
    for result in results:
        name, rate, memory = result.side.name, spread(result.rates, 3), f"{result.memory / data.MB:,.0f}"
        # By round, since both were measured under the same load of the machine there.
        ratio = spread(result.rates / theirs.rates, 2)
        print(f"{name:<32}{rate:>28}{ratio:>26}{memory:>10}{useful(result):>9}")
        if options.record and result is not theirs:
            row = [*origin("benchmarks.speed", device), name]
            row += [spread(theirs.rates, 3), rate, ratio, f"{theirs.memory / data.MB:,.0f} / {memory}"]
            record(RESULTS, [*row, f"{useful(theirs)} / {useful(result)}"], SECTION)


@reports_user_errors
def main() -> None:
    options = parse_arguments()
    if options.what == "build":
        against = ["--against", str(options.against)] if options.against else []
        sys.argv[1:] = [*against, *(["--record"] if options.record else []), *options.rest]
        return data.main()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as work, ExitStack() as exits:
        race = Race(options, Path(work), exits)
        compare, _, _ = CASES[options.what]
        compare(options, race)
        results, linear = race.run()
    report(results, linear, options)
    return None


if __name__ == "__main__":
    main()
