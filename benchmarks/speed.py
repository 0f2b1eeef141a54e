"""Training and evaluation against an ancestor's: python -m benchmarks.speed --against PATH --what {etrm,trm,sudoku,eval}

PATH is a checkout of SamsungSAILMontreal/TinyRecursiveModels (trm, sudoku) or bdsaglam/etrm (etrm, eval), which runs unchanged
in a process of its own. Theirs and ours take turns on the same tasks, with the same model sizes, precision and batch.

etrm    a training step of the seed ETRM: ours on the task's canvas, and on the full canvas with the same mathematics
trm     a training step of the original TRM: ours on the full canvas and on the task's
sudoku  a training step of the original TRM on Sudokus, with its feed-forward network over the cells instead of attention
eval    an evaluation of the ETRM from weights to pass@k
small   no ancestor: our own step against the plain one, compiled and with a process per core, in a model so small that PyTorch's
        overhead is most of it
build   the datasets: `python -m benchmarks.data`
"""

import argparse
import json
import shlex
import sys
import tempfile
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import data
from benchmarks.data import ETRM, RESULTS, TRM, machine, record
from benchmarks.identical import ENCODER, as_the_ancestor, load_ancestor
from benchmarks.processes import ROOT, Contestant, require_checkout, run
from benchmarks.steps import buckets, build_sampler
from benchmarks.useful import linear_rate, useful_flops
from config import compose
from config.schema import PretrainConfig
from dataset import augment
from dataset.batch import DataSizes, materialise
from dataset.store import Store
from dataset.views import EvaluationSet
from models.trm import build_model
from utils.arguments import parser_of
from utils.device import choose_device
from utils.distributed import World
from utils.environment import git_commit
from utils.errors import UserError, reports_user_errors

STEPS = ROOT / "benchmarks" / "ancestors" / "steps.py"
TRM_FILES, ETRM_FILES = (
    ("pretrain.py", "models/recursive_reasoning/trm.py"),
    ("pretrain_etrm.py", "models/recursive_reasoning/etrm.py"),
)
SECTION = "Training and evaluation"
SLOTS = 10  # demonstrations that the ETRM ancestor encodes, empty ones included
SUDOKUS = 1000
BATCHES = 8  # different ones that the ancestor sees
SAME_CONTEXT = 1e-3
# What both sides have in common; --arch changes it for both.
ARCH = {
    "hidden_size": 512,
    "num_heads": 8,
    "expansion": 4,
    "L_layers": 2,
    "H_cycles": 3,
    "L_cycles": 4,
    "halt_max_steps": 16,
    "halt_exploration_prob": 0.1,
    "forward_dtype": "bfloat16",
}
# What the original's recipe for Sudoku-Extreme changes.
SUDOKU = {"L_cycles": 6, "mlp_t": True, "pos_encodings": "none"}


@dataclass(frozen=True)
class Side:
    """One contestant: its name, how many steps it makes in a round, its useful FLOPs per sample unless it reports them."""

    name: str
    contestant: Contestant
    steps: int
    flops: float | None = None
    foreign: bool = False  # an ancestor, which warms up in a step


@dataclass
class Result:
    """What the rounds of one contestant took."""

    side: Side
    rounds: list[dict[str, float]]

    @property
    def rates(self) -> np.ndarray:
        """Samples per second, by round."""
        return np.array([done["samples"] / done["seconds"] for done in self.rounds])

    @property
    def useful_rate(self) -> float | None:
        """Useful FLOP/s over all rounds; None where nothing is counted."""
        seconds = sum(done["seconds"] for done in self.rounds)
        if self.side.flops is not None:
            return self.side.flops * sum(done["samples"] for done in self.rounds) / seconds
        return sum(done["flops"] for done in self.rounds) / seconds if "flops" in self.rounds[0] else None

    @property
    def memory(self) -> float:
        """Peak, in bytes."""
        return self.rounds[-1]["memory"]


def spread(values: np.ndarray, digits: int) -> str:
    """Median [lowest, highest]."""
    return f"{np.median(values):,.{digits}f} [{values.min():,.{digits}f}, {values.max():,.{digits}f}]"


def sizes(options: argparse.Namespace) -> dict[str, Any]:
    """What both models have in common."""
    return {**ARCH, **(SUDOKU if options.what == "sudoku" else {}), **options.arch}


def their_config(options: argparse.Namespace) -> dict[str, Any]:
    """The ancestor's configuration, as its YAML files and `ARCH` have it."""
    encoder = options.what not in ("trm", "sudoku")
    arch = {
        "pos_encodings": "rope",
        "mlp_t": False,
        **sizes(options),
        "loss": {"name": "losses@ACTLossHead", "loss_type": "stablemax_cross_entropy"},
        "H_layers": 0,
        "puzzle_emb_len": 16,
        "no_ACT_continue": True,
    }
    rates = {
        "lr": 1e-4,
        "lr_min_ratio": 1.0,
        "lr_warmup_steps": 2000,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
    }
    common = {
        **rates,
        "data_paths": [],
        "global_batch_size": options.batch,
        "epochs": 10**6,
        "ema": True,
        "ema_rate": 0.999,
    }
    if encoder:
        return {
            **common,
            "arch": {**arch, "name": "recursive_reasoning.etrm@TRMWithEncoder", "puzzle_emb_ndim": 0},
            "grad_clip_norm": 1.0,
        }
    arch |= {
        "name": "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1",
        "puzzle_emb_ndim": arch["hidden_size"],
    }
    return {**common, "arch": arch, "puzzle_emb_lr": 1e-2, "puzzle_emb_weight_decay": 0.1}


def our_overrides(options: argparse.Namespace, dataset: Path, *more: str) -> list[str]:
    """Our configuration with the same sizes; `more` follows."""
    shared = [f"arch.{name}={value}" for name, value in sizes(options).items()]
    batch = [f"global_batch_size={options.batch}", f"device={options.device}", f"data.path='{dataset}'"]
    return [*more[:2], *shared, *batch, "data.query_sampling=all", "objective=stablemax", *more[2:]]


def their_batches(config: PretrainConfig, count: int, file: Path) -> float:
    """Write batches of the samples of `config`, on the full canvas, as the ancestors' loaders give them; useful FLOPs per sample."""
    store = Store.load(config.data.path, *config.layouts)
    sampler, drawn, flops = build_sampler(config, store), [], 0.0
    for step, bucket in zip(range(count), buckets(sampler), strict=False):
        batch = materialise(sampler.sample(step, bucket), store, store.grid_table).data
        flops += useful_flops(config, batch) / config.global_batch_size / count
        drawn.append(in_their_layout(batch))
    np.savez(file, **{name: np.stack([batch[name] for batch in drawn]) for name in drawn[0]})
    return flops


def in_their_layout(batch: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A batch as int32, its demonstrations filled up with empty slots."""
    arrays = {
        name: values.numpy() if name == "demo_mask" else values.to(torch.int32).numpy()
        for name, values in batch.items()
    }
    for name in arrays.keys() & {"demo_inputs", "demo_labels", "demo_mask"}:
        missing = SLOTS - arrays[name].shape[1]
        arrays[name] = np.pad(arrays[name], [(0, 0), (0, missing), *[(0, 0)] * (arrays[name].ndim - 2)])
    return arrays


def their_views(config: PretrainConfig, tasks: int, folder: Path) -> None:
    """Write the evaluation views of the first tasks as the ETRM ancestor reads them, with its list of names and its tasks."""
    store = Store.load(config.data.path, *config.layouts)
    questions = EvaluationSet(
        store, config.data, "test", config.evaluation.num_views, config.seed, max_tasks=tasks
    )
    names, drawn = ["<blank>"], []
    for batch in questions.batches(config.evaluation.batch_size):
        samples = batch.samples[: batch.valid]
        arrays = in_their_layout(materialise(samples, store, store.grid_table, with_labels=False).data)
        for row, (query, view) in enumerate(zip(batch.query, batch.view, strict=False)):
            if row == batch.valid:
                break
            transform, colours = questions.view(questions.queries[query], view)
            task = store.task_ids[questions.queries[query].task]
            name = augment.names_of(task, np.array([transform]), colours[None])[0] if view else task
            arrays["puzzle_identifiers"][row] = len(names)
            names.append(name)
        drawn.append(arrays)
    rows = {name: np.concatenate([arrays[name] for arrays in drawn]) for name in drawn[0]}
    missing = (
        -len(rows["inputs"]) % config.global_batch_size
    )  # padded like the ancestor's last batch, by rows of the blank identifier
    rows = {
        name: np.pad(values, [(0, missing), *[(0, 0)] * (values.ndim - 1)]) for name, values in rows.items()
    }
    np.savez(
        folder / "views.npz",
        **{
            name: values.reshape(-1, config.global_batch_size, *values.shape[1:])
            for name, values in rows.items()
        },
    )
    (folder / "identifiers.json").write_text(json.dumps(names))
    puzzles = {store.task_ids[task]: store.task(int(task)).to_json() for task in questions.tasks}
    (folder / "test_puzzles.json").write_text(json.dumps(puzzles))


def check_context(options: argparse.Namespace, config: PretrainConfig, work: Path) -> float:
    """The largest difference between the ancestor's context and ours from its weights, in float32, relative to their RMS of 1."""
    theirs = their_config(options)
    theirs["arch"]["forward_dtype"] = "float32"
    asked = {"config": theirs, "data": str(work / "batches.npz"), "output": str(work / "reference.pt")}
    run(
        [str(STEPS), "reference", json.dumps({**asked, "device": "cpu", "threads": options.threads})],
        options.against,
    )
    reference = torch.load(work / "reference.pt", weights_only=True)
    store = Store.load(config.data.path, *config.layouts)
    arch = config.arch.model_copy(update={"forward_dtype": "float32"})
    model = as_the_ancestor(build_model(arch, DataSizes.of(store, config.data), config.encoder)).eval()
    load_ancestor(model, reference["weights"])
    sampler = build_sampler(config, store)
    data_ = materialise(sampler.sample(0, next(buckets(sampler))), store, store.grid_table).data
    with torch.no_grad():
        return float((model.context(data_).prefix - reference["context"]).abs().max())


class Race:
    """The contestants of one run, each in a process of its own."""

    def __init__(self, options: argparse.Namespace, work: Path, exits: ExitStack):
        self.options, self.work, self.exits = options, work, exits
        self.sides: list[Side] = []

    def theirs(self, what: str, flops: float | None, **options: Any) -> None:
        """Enter the ancestor."""
        options |= {
            "config": their_config(self.options),
            "device": self.options.device,
            "threads": self.options.threads,
        }
        self._enter(
            "theirs",
            [str(STEPS), what, json.dumps(options)],
            self.options.against,
            self.options.steps,
            flops,
            foreign=True,
        )

    def ours(
        self, name: str, what: str, steps: int, overrides: list[str], processes: int = 1, **options: Any
    ) -> None:
        """Enter a configuration of ours. Several processes share the threads."""
        options |= {"overrides": overrides, "threads": self.options.threads // processes}
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            if processes > 1
            else []
        )
        self._enter(name, [*launcher, "-m", "benchmarks.steps", what, json.dumps(options)], ROOT, steps)

    def _enter(
        self,
        name: str,
        command: list[str],
        pythonpath: Path,
        steps: int,
        flops: float | None = None,
        foreign: bool = False,
    ) -> None:
        contestant = Contestant(command, pythonpath, self.work / f"{len(self.sides)}.log")
        self.exits.enter_context(closing(contestant))
        self.sides.append(Side(name, contestant, steps, flops, foreign))

    def run(self) -> tuple[list[Result], float]:
        """All rounds, and the rate of `F.linear` in the middle of them."""
        dtype = getattr(torch, sizes(self.options)["forward_dtype"])
        device = choose_device(self.options.device, World())
        results, rates = [Result(side, []) for side in self.sides], []
        for side in self.sides:
            side.contestant(1 if side.foreign else side.steps)  # not counted
        for _ in range(self.options.rounds):
            rates.append(linear_rate(device, dtype))
            for result in results:
                result.rounds.append(result.side.contestant(result.side.steps))
        return results, float(np.median(rates))


def etrm(options: argparse.Namespace, race: Race) -> None:
    """A training step: the seed ETRM, our pooled encoder and our memory on the task's canvas, and the same mathematics."""
    dataset = race.work / "dataset"
    run(["-m", "dataset.build_arc_dataset", "--recipe", "arc1", "--output-dir", str(dataset)])
    full = [*ENCODER, "arch.pos_encodings=rope", "data.canvas=full"]
    config = compose.load(
        PretrainConfig, "pretrain", our_overrides(options, dataset, "arch=etrm", "data=arc1", *full)
    )
    flops = their_batches(config, BATCHES, race.work / "batches.npz")
    difference = check_context(options, config, race.work)
    if difference > SAME_CONTEXT:
        raise UserError(f"the contexts differ by {difference:.2g}")
    print(
        f"same mathematics: from the same weights the contexts differ by at most {difference:.1g}", flush=True
    )
    race.theirs("etrm", flops, data=str(race.work / "batches.npz"), identifiers=1)
    for name, steps, more in (
        ("full canvas, same mathematics", options.steps, full),
        ("task canvas, encoder standard", options.task_steps, ["encoder=standard"]),
        ("task canvas, encoder memory", options.task_steps, ["encoder=memory"]),
    ):
        ours = our_overrides(options, dataset, "arch=etrm", "data=arc1", *more, *options.override)
        race.ours(name, "train", steps, ours, identical=more is full)


def trm(options: argparse.Namespace, race: Race) -> None:
    """A training step: the original TRM, ours on its canvas, and on the task's."""
    dataset = race.work / "dataset"
    build = "-m dataset.build_arc_dataset --recipe arc1 --layout puzzle --num-aug 8 --output-dir"
    run([*build.split(), str(dataset)])
    full = ["data.canvas=full"]
    config = compose.load(
        PretrainConfig, "pretrain", our_overrides(options, dataset, "arch=trm", "data=arc1_puzzle", *full)
    )
    flops = their_batches(config, BATCHES, race.work / "batches.npz")
    identifiers = Store.load(dataset).metadata.num_puzzle_identifiers
    race.theirs("trm", flops, data=str(race.work / "batches.npz"), identifiers=identifiers)
    task = ["arch.pos_encodings=rope2d", "data.canvas=task", "data.buckets=[10,15,20,30]"]
    for name, steps, more in (
        ("full canvas", options.steps, full),
        ("task canvas", options.task_steps, task),
    ):
        ours = our_overrides(options, dataset, "arch=trm", "data=arc1_puzzle", *more, *options.override)
        race.ours(name, "train", steps, ours, identical=False)


def sudoku(options: argparse.Namespace, race: Race) -> None:
    """A training step on generated 9x9 Sudokus, which cost what those of Sudoku-Extreme do."""
    dataset = race.work / "dataset"
    run(
        [
            "-m",
            "dataset.build_sudoku_dataset",
            "--train-puzzles",
            str(SUDOKUS),
            "--test-puzzles",
            "1",
            "--output-dir",
            str(dataset),
        ]
    )
    ours = our_overrides(options, dataset, "arch=trm", "data=sudoku", *options.override)
    config = compose.load(PretrainConfig, "pretrain", ours)
    flops = their_batches(config, BATCHES, race.work / "batches.npz")
    race.theirs("sudoku", flops, data=str(race.work / "batches.npz"), identifiers=1)
    race.ours("Sudoku 9x9, MLP over cells", "train", options.steps, ours, identical=False)


def evaluation(options: argparse.Namespace, race: Race) -> None:
    """An evaluation up to pass@k of the first tasks, in `views` views; the ancestor's cost is the same for every view."""
    dataset = race.work / "dataset"
    run(["-m", "dataset.build_arc_dataset", "--recipe", "arc1", "--output-dir", str(dataset)])
    full = compose.load(
        PretrainConfig,
        "pretrain",
        our_overrides(
            options,
            dataset,
            "arch=etrm",
            "data=arc1",
            "encoder=standard",
            "data.canvas=full",
            "evaluation.num_views=1",
        ),
    )
    their_views(full, options.tasks, race.work)
    race.theirs("eval", None, data=str(race.work / "views.npz"), tasks=str(race.work))
    views = [f"evaluation.num_views={options.views}", f"evaluation.batch_size={options.batch}"]
    for encoder in ("standard", "memory"):
        ours = our_overrides(
            options, dataset, "arch=etrm", "data=arc1", f"encoder={encoder}", *views, *options.override
        )
        race.ours(f"task canvas, encoder {encoder}", "eval", 1, ours, tasks=options.tasks)


def small(options: argparse.Namespace, race: Race) -> None:
    """A training step of the recipe rules_smoke, hidden size 64 on canvases of 4 to 6, plain, compiled, and with a process per core."""
    dataset = race.work / "dataset"
    families = "--families colour_permutation --stages 1 --test-splits test_rules --rows 4 6 --columns 4 6 --train-tasks 2000"
    run(
        [
            "-m",
            "dataset.build_rules_dataset",
            *families.split(),
            "--test-tasks",
            "10",
            "--output-dir",
            str(dataset),
        ]
    )
    variants = [("theirs", "false", 1), ("compiled", "true", 1)]
    if options.device == "cpu" and options.threads > 1:
        variants.append((f"compiled, {options.threads} processes", "true", options.threads))
    for name, compiled, processes in variants:
        overrides = [
            "experiment=rules_smoke",
            f"data.path='{dataset}'",
            f"device={options.device}",
            f"compile={compiled}",
        ]
        race.ours(
            name, "train", options.task_steps, [*overrides, *options.override], processes, identical=False
        )


CASES = {
    "etrm": (etrm, ETRM, ETRM_FILES),
    "trm": (trm, TRM, TRM_FILES),
    "sudoku": (sudoku, TRM, TRM_FILES),
    "eval": (evaluation, ETRM, ETRM_FILES),
    "small": (small, None, ()),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, its paths absolute."""
    parser = parser_of("benchmarks.speed", __doc__)
    add = parser.add_argument
    add("--what", choices=[*CASES, "build"], required=True)
    add("--against", type=Path, metavar="PATH", help="the ancestor's checkout")
    add("--batch", type=int, default=4, help="samples per step, for both (default: %(default)s)")
    add("--rounds", type=int, default=3)
    add(
        "--steps",
        type=int,
        default=1,
        help="of a round, for what computes full canvases (default: %(default)s)",
    )
    add(
        "--task-steps",
        type=int,
        default=16,
        help="of a round, on task canvases, whose costs differ (default: %(default)s)",
    )
    add("--views", type=int, default=8, help="of ours in an evaluation (default: %(default)s)")
    add("--tasks", type=int, default=4, help="of an evaluation, for both (default: %(default)s)")
    add("--threads", type=int, default=2, help="of PyTorch, for both")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--arch", nargs="+", default=[], metavar="KEY=VALUE", help=f"sizes of both models (default: {ARCH})")
    add("--override", nargs="+", default=[], metavar="KEY=VALUE", help="of our configuration alone")
    add("--record", action="store_true", help=f"append the results to benchmarks/{RESULTS.name}")
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
    """Print the results, and record them if that is asked."""
    theirs = results[0]
    for result in results:
        useful = result.useful_rate
        share = f"{useful / linear:6.1%}" if useful else "     -"
        ratio = f"{spread(result.rates / theirs.rates, 2):>26}"
        print(
            f"{result.side.name:<32}{spread(result.rates, 3):>28}{ratio}{result.memory / data.MB:>10,.0f}{share:>9}"
        )
        if options.record and result is not theirs:
            words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
            memory = " / ".join(f"{side.memory / data.MB:,.0f}" for side in (theirs, result))
            shares = " / ".join(
                f"{side.useful_rate / linear:.1%}" if side.useful_rate else "-" for side in (theirs, result)
            )
            row = [
                date.today().isoformat(),
                git_commit() or "-",
                machine(choose_device(options.device, World())),
            ]
            row += [
                f"`python -m benchmarks.speed {shlex.join(words)}`",
                result.side.name,
                spread(theirs.rates, 3),
            ]
            record(
                RESULTS,
                [*row, spread(result.rates, 3), spread(result.rates / theirs.rates, 2), memory, shares],
                SECTION,
            )


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
        CASES[options.what][0](options, race)
        results, linear = race.run()
    print(
        f"{machine(choose_device(options.device, World()))}; {git_commit()}; F.linear reaches {linear / 1e9:,.0f} GFLOP/s"
    )
    print(f"{'':<32}{'samples/s':>28}{'ratio':>26}{'peak MB':>10}{'useful':>9}")
    report(results, linear, options)
    return None


if __name__ == "__main__":
    main()
