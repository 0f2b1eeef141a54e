"""Train and evaluate a recipe of the ladder: python -m experiments.ladder RECIPE ... [--seeds 0 1 2], or --list

A recipe (experiments/ladder.yaml) is a dataset, the overrides of a run and the subsets it is asked. For every seed this builds
the dataset if it is not there, trains, evaluates each subset with the controls, and appends a line per score to
experiments/results.jsonl; `python -m experiments.tables` makes the tables of the documents from it. What is done already is not done
again, and a run that was interrupted continues, so that the same command finishes what was begun. Exit status 1 when a score is
not what its recipe expects.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from pydantic import Field, ValidationError

from utils import checkpoint
from utils.arguments import parser_of
from utils.config import Config
from utils.errors import UserError, nearest, reports_user_errors
from utils.files import read_json, write_atomically

ROOT = Path(__file__).resolve().parents[1]
RECIPES = Path(__file__).with_name("ladder.yaml")
RESULTS = Path(__file__).with_name("results.jsonl")
CONTROLS = ("query_only", "shuffled_demonstrations")
METRICS = ("ARC/pass@1", "ARC/pass@2")
NOT_THE_PROTOCOLS = ("max_eval_groups=", "num_views=")
DATASET = re.compile(r"@([\w-]+)")


class Expected(Config):
    """A score that a recipe promises, and how far one seed may be away from it."""

    value: float
    tolerance: float


class Recipe(Config):
    """One row of a table. based_on: another recipe, whose rung, data, evaluation and subsets hold where this one names none, and
    whose overrides come first. starts_from: the recipe whose model, of the same seed, this one trains on. data: a name in
    `datasets`. evaluation: overrides of evaluate.py. subsets: what is asked, by the protocol of evaluate.py with its settings
    behind it (`latent_search search=random`; `max_eval_groups=N` asks the first N tasks only, `num_views=N` in so many views).
    expected: pass@1 by subset under the first protocol.
    """

    title: str
    based_on: str | None = None
    starts_from: str | None = None
    rung: str | None = None
    data: str | None = None
    overrides: list[str] = Field(default_factory=list)
    evaluation: list[str] = Field(default_factory=list)
    subsets: dict[str, list[str]] = Field(default_factory=dict)
    expected: dict[str, Expected] = Field(default_factory=dict)


class Ladder(Config):
    """datasets: a builder's module and options by name, without --output-dir; `@name` there is another one's folder. recipes: by
    name.
    """

    datasets: dict[str, str]
    recipes: dict[str, Recipe]

    def recipe(self, name: str) -> Recipe:
        """The recipe with all that it is based on."""
        if name not in self.recipes:
            raise UserError(
                f"no recipe {name}{nearest(name, self.recipes)}; there are {', '.join(self.recipes)}"
            )
        own = self.recipes[name]
        if own.based_on is None:
            return own
        base = self.recipe(own.based_on)
        inherited = {
            key: getattr(own, key) or getattr(base, key) for key in ("rung", "data", "evaluation", "subsets")
        }
        return own.model_copy(update={**inherited, "overrides": [*base.overrides, *own.overrides]})


def read_ladder(path: Path = RECIPES) -> Ladder:
    """The checked recipes. Raises `UserError`."""
    try:
        ladder = Ladder(**OmegaConf.to_container(OmegaConf.load(path), resolve=True))
    except ValidationError as error:
        raise UserError(
            "\n".join(f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        ) from None
    above: list[str] = []
    for name, build in ladder.datasets.items():
        for other in DATASET.findall(build):
            if other not in above:
                raise UserError(
                    f"{path}: dataset {name}: @{other} is no dataset above it{nearest(other, above)}"
                )
        above.append(name)
    for name in ladder.recipes:
        recipe = ladder.recipe(name)
        if recipe.starts_from:
            ladder.recipe(recipe.starts_from)
        if recipe.data not in ladder.datasets:
            raise UserError(
                f"{path}: recipe {name}: no dataset {recipe.data}{nearest(str(recipe.data), ladder.datasets)}"
            )
    return ladder


@dataclass(frozen=True)
class Result:
    """A line of results.jsonl. value: a share of n tasks with its 95 % interval. seeds: those of the training runs that it is
    of. wall_seconds: training alone.
    """

    recipe: str
    rung: str
    split: str
    arch: str
    encoder: str | None
    protocol: str
    control: str
    metric: str
    value: float
    ci_low: float
    ci_high: float
    n: int
    seeds: list[int]
    command: str
    commit: str
    machine: str
    wall_seconds: float

    @property
    def key(self) -> tuple:
        """What there is only one line of."""
        return self.recipe, self.split, self.protocol, self.control, self.metric, *self.seeds


def read_results(path: Path = RESULTS) -> list[Result]:
    """All lines; of equal keys the last counts, at the place of the first. Raises `UserError` for a line that is none."""
    found: dict[tuple, Result] = {}
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
        try:
            result = Result(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}:{number}: {error}") from None
        found[result.key] = result
    return list(found.values())


def dataset(name: str, ladder: Ladder, data_dir: Path) -> Path:
    """The folder of a dataset, built with all that it is made of unless it is there.

    Raises `UserError` for one that another definition of the name has built.
    """
    folder, definition = data_dir / f"ladder-{name}", data_dir / f"ladder-{name}.txt"
    command = DATASET.sub(
        lambda other: shlex.quote(str(dataset(other[1], ladder, data_dir))), ladder.datasets[name]
    )
    if not folder.is_dir():
        write_atomically(definition, lambda path: path.write_text(command + "\n"))
        _python("-m", *shlex.split(command), "--output-dir", str(folder))
    if not definition.is_file() or definition.read_text().strip() != command:
        raise UserError(
            f"{folder} was not built by what {RECIPES.name} says now, {command}; delete it to have it built"
        )
    return folder


def run(name: str, recipe: Recipe, data: Path, seed: int, options: argparse.Namespace) -> Iterator[Result]:
    """Train and evaluate one seed; the scores as they come in."""
    folder = options.output_dir / f"{name}-seed{seed}"
    own = [f"data.path={data}", f"seed={seed}", f"run_name={folder.name}", f"output_dir={options.output_dir}"]
    if recipe.starts_from:
        before = options.output_dir / f"{recipe.starts_from}-seed{seed}"
        if checkpoint.latest(before / "checkpoints") is None:
            raise UserError(
                f"{name} trains on the model of {recipe.starts_from}, which is not at {before}; run that recipe first"
            )
        own += [f"load_pretrained_decoder={before}", "pretrained_encoder=load"]
    _python("pretrain_etrm.py", *recipe.overrides, *own, *options.overrides)
    seconds = _training_seconds(folder)
    for protocol, subset in (
        (protocol, subset) for protocol, subsets in recipe.subsets.items() for subset in subsets
    ):
        how, *settings = protocol.split()
        asked = (
            folder / "evaluations" / "-".join([how, *settings, subset]).replace("=", "-")
        )  # Hydra reads = in a value
        arguments = [
            f"subsets=[{subset}]",
            f"controls=[{','.join(CONTROLS)}]",
            "pass_ks=[1,2]",
            f"output_dir={asked}",
        ]
        command = ("evaluate.py", f"checkpoint={folder}", *evaluation_of(recipe, protocol), *arguments)
        if not _is_done(asked, command, folder):
            _python(*command)
        found = read_json(asked / "results.json")
        for score in found["scores"]:
            if score["metric"] in METRICS:
                yield Result(
                    recipe=name,
                    rung=recipe.rung,
                    split=subset,
                    arch=found["model"]["arch"],
                    encoder=found["model"]["encoder"],
                    protocol=" ".join([found["protocol"], *settings]),
                    **score,
                    seeds=[seed],
                    command=_command(name, seed, options),
                    commit=found["checkpoint"]["git_commit"],
                    machine=found["device"],
                    wall_seconds=seconds,
                )


def evaluation_of(recipe: Recipe, protocol: str) -> list[str]:
    """The overrides of evaluate.py for one of a recipe's protocols."""
    how, *settings = protocol.split()
    others = [setting for setting in settings if setting.startswith(NOT_THE_PROTOCOLS)]
    own = [f"protocol.{setting}" for setting in settings if setting not in others]
    return [f"protocol={how}", *own, *recipe.evaluation, *others]


def _command(name: str, seed: int, options: argparse.Namespace) -> str:
    more = ["--overrides", *options.overrides] if options.overrides else []
    return shlex.join(["python", "-m", "experiments.ladder", name, "--seeds", str(seed), *more])


def _python(*arguments: str) -> None:
    """Run to the end. SIGTERM is handed on, so that training saves before it stops."""
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT)
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if status:
        raise UserError(f"{shlex.join(arguments)} ended with status {status}; the same command continues")


def _training_seconds(folder: Path) -> float:
    """The time of all training steps, over restarts, without evaluations."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return round(
        sum(
            {line["step"]: line.get("timing/train_time_per_interval_seconds", 0.0) for line in lines}.values()
        ),
        1,
    )


def _is_done(evaluation: Path, command: tuple[str, ...], run_folder: Path) -> bool:
    """Whether a finished evaluation is of the run's last checkpoint and by this command."""
    if not (evaluation / "results.json").is_file():
        return False
    found = read_json(evaluation / "results.json")
    return (
        found["command"] == shlex.join(command)
        and Path(found["checkpoint"]["path"]).name == checkpoint.latest(run_folder / "checkpoints").name
    )


def append(results: list[Result], path: Path = RESULTS) -> None:
    """Add what is not there yet, in one write."""
    known = {json.dumps(vars(result)) for result in read_results(path)}
    lines = [line for line in (json.dumps(vars(result)) for result in results) if line not in known]
    if lines:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, ("\n".join(lines) + "\n").encode())
        finally:
            os.close(descriptor)


def keeps_promise(result: Result, recipe: Recipe) -> bool:
    """Whether a score is what the recipe expects; prints it either way."""
    promised = (
        result.control == "none"
        and result.metric == METRICS[0]
        and result.protocol == next(iter(recipe.subsets))
    )
    expected = recipe.expected.get(result.split) if promised else None
    kept = expected is None or abs(result.value - expected.value) <= expected.tolerance
    promise = f"; expected {expected.value:g} +- {expected.tolerance:g}" if expected else ""
    interval = f"[{result.ci_low:.3f}, {result.ci_high:.3f}], n {result.n}"
    who = "model" if result.control == "none" else result.control
    asked = f"{result.recipe} {result.split}, {result.protocol}, {who}"
    print(f"{'ok  ' if kept else 'FAIL'} {asked}: {result.metric} {result.value:.3f} {interval}{promise}")
    return kept


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("experiments.ladder", __doc__)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE")
    parser.add_argument("--list", action="store_true", help="the recipes, and how many seeds have results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ladder"))
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--overrides",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="of all training runs, for example device=cpu",
    )
    return parser.parse_args(arguments)


@reports_user_errors
def main() -> None:
    options, ladder = parse_arguments(), read_ladder()
    if options.list or not options.recipes:
        done = {(result.recipe, seed) for result in read_results(options.results) for seed in result.seeds}
        for name in ladder.recipes:
            print(
                f"{ladder.recipe(name).rung}  {name:<24} {sum(who == name for who, _ in done)} seeds  {ladder.recipes[name].title}"
            )
        return
    broken = []
    for name in options.recipes:
        recipe = ladder.recipe(name)
        for seed in options.seeds:
            results = list(run(name, recipe, dataset(recipe.data, ladder, options.data_dir), seed, options))
            append(results, options.results)
            broken += [result for result in results if not keeps_promise(result, recipe)]
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
