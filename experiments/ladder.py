"""Train and evaluate recipes of the ladder.

    python -m experiments.ladder a-all --seeds 0 1 2

A recipe (experiments/ladder.yaml) is a dataset, the overrides of a run and the subsets that it is asked. For
every seed the command does the following:

- build the dataset if it is not there;
- train;
- evaluate each subset with the controls;
- append a line per score to experiments/results.jsonl, of which `python -m experiments.tables` makes tables.

What is done is not done again, and an interrupted run continues, so the same command finishes what was begun.
The exit status is 1 when a score is not what its recipe expects. --list shows the recipes.
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
from typing import Any

from omegaconf import OmegaConf
from pydantic import Field, ValidationError

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

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
NOT_THE_PROTOCOLS = ("max_eval_groups=", "num_views=")  # keys of evaluate.py, allowed behind a protocol
DATASET = re.compile(r"@([\w-]+)")  # another dataset's folder, in a builder's options


class Expected(Config):
    """A score that a recipe promises, and how far one seed may be away from it."""

    value: float
    tolerance: float


class Recipe(Config):
    """One row of a table.

    - based_on: another recipe. Its rung, data, evaluation and subsets hold where this one names none, and its
      overrides come first.
    - starts_from: the recipe whose model, of the same seed, this one trains on.
    - data: a name in `Ladder.datasets`.
    - overrides, evaluation: overrides of pretrain_etrm.py and of evaluate.py.
    - subsets: the subsets that are asked, by protocol. Behind the protocol may stand its settings
      (`latent_search search=random`), `max_eval_groups=N` for the first N tasks, and `num_views=N`.
    - expected: pass@1 by subset, under the first protocol.
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
    """The recipes and their datasets, both by name.

    A dataset is a builder's module and options without --output-dir; `@name` in it is another dataset's
    folder.
    """

    datasets: dict[str, str]
    recipes: dict[str, Recipe]

    def recipe(self, name: str) -> Recipe:
        """The recipe with all that it is based on. Raises `UserError` for an unknown name."""
        if name not in self.recipes:
            raise UserError(
                f"no recipe {name}{nearest(name, self.recipes)}; there are {', '.join(self.recipes)}"
            )
        own = self.recipes[name]
        if own.based_on is None:
            return own
        base = self.recipe(own.based_on)
        keys = ("rung", "data", "evaluation", "subsets")
        inherited = {key: getattr(own, key) or getattr(base, key) for key in keys}
        # What `own` overrides comes last, since the last override of a key counts.
        return own.model_copy(update={**inherited, "overrides": [*base.overrides, *own.overrides]})


def read_ladder(path: Path = RECIPES) -> Ladder:
    """The recipes in a file. Raises `UserError` for a key, recipe or dataset that does not exist."""
    try:
        ladder = Ladder(**OmegaConf.to_container(OmegaConf.load(path), resolve=True))
    except ValidationError as error:
        problems = (f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError("\n".join(problems)) from None
    # A dataset may only be made of those above it, so that no two are made of each other.
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
            hint = nearest(str(recipe.data), ladder.datasets)
            raise UserError(f"{path}: recipe {name}: no dataset {recipe.data}{hint}")
    return ladder


@dataclass(frozen=True)
class Result:
    """A line of results.jsonl.

    value: a share of n tasks, with its 95 % interval. seeds: of the training runs. wall_seconds: of the
    training alone.
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
        """What the line measures: of lines with equal keys only the last counts."""
        return self.recipe, self.split, self.protocol, self.control, self.metric, *self.seeds


def read_results(path: Path = RESULTS) -> list[Result]:
    """The lines of a file. Of equal keys the last counts, at the place of the first.

    Raises `UserError` for a malformed line.
    """
    found: dict[tuple, Result] = {}
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
        try:
            result = Result(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}:{number}: {error}") from None
        found[result.key] = result
    return list(found.values())


def dataset(name: str, ladder: Ladder, data_dir: Path) -> Path:
    """The folder of a dataset. It is built, with all that it is made of, unless it is there.

    Raises `UserError` for a folder that another definition of the name has built.
    """
    folder, definition = data_dir / f"ladder-{name}", data_dir / f"ladder-{name}.txt"
    command = DATASET.sub(
        lambda other: shlex.quote(str(dataset(other[1], ladder, data_dir))), ladder.datasets[name]
    )
    if not folder.is_dir():
        # The definition first: after an interruption its folder is missing, and is built again.
        write_atomically(definition, lambda path: path.write_text(command + "\n"))
        run_python("-m", *shlex.split(command), "--output-dir", str(folder))
    if not definition.is_file() or definition.read_text().strip() != command:
        raise UserError(
            f"{folder} was not built by what {RECIPES.name} says now, {command}; delete it to have it built"
        )
    return folder


def run(name: str, recipe: Recipe, data: Path, seed: int, options: argparse.Namespace) -> Iterator[Result]:
    """Train and evaluate one seed, and give each score when it is there.

    Raises `UserError` where a command fails, or the model of `starts_from` is missing.
    """
    folder = options.output_dir / f"{name}-seed{seed}"
    own = [f"data.path={data}", f"seed={seed}", f"run_name={folder.name}", f"output_dir={options.output_dir}"]
    if recipe.starts_from:
        before = options.output_dir / f"{recipe.starts_from}-seed{seed}"
        if checkpoint.latest(before / "checkpoints") is None:
            raise UserError(
                f"{name} trains on the model of {recipe.starts_from}, which is not at {before}; "
                "run that recipe first"
            )
        own += [f"load_pretrained_decoder={before}", "pretrained_encoder=load"]
    # A run that is finished already ends at once, without another step.
    run_python("pretrain_etrm.py", *recipe.overrides, *own, *options.overrides)
    training = {
        "recipe": name,
        "rung": recipe.rung,
        "seeds": [seed],
        "command": _command(name, seed, options),
        "wall_seconds": _training_seconds(folder),
    }
    for protocol, subsets in recipe.subsets.items():
        for subset in subsets:
            found = _evaluated(folder, recipe, protocol, subset)
            evaluation = {
                "split": subset,
                "arch": found["model"]["arch"],
                "encoder": found["model"]["encoder"],
                "protocol": " ".join([found["protocol"], *protocol.split()[1:]]),
                "commit": found["checkpoint"]["git_commit"],
                "machine": f"{found['device']}, {found['model']['forward_dtype']}",
            }
            for score in found["scores"]:
                if score["metric"] in METRICS:
                    yield Result(**training, **evaluation, **score)


def _evaluated(run_folder: Path, recipe: Recipe, protocol: str, subset: str) -> dict[str, Any]:
    """The results.json of a run's evaluation of one subset, which is made unless it is there."""
    # Hydra would read an = in the folder's name.
    folder = run_folder / "evaluations" / "-".join([*protocol.split(), subset]).replace("=", "-")
    command = (
        "evaluate.py",
        f"checkpoint={run_folder}",
        *evaluation_of(recipe, protocol),
        f"subsets=[{subset}]",
        f"controls=[{','.join(CONTROLS)}]",
        "pass_ks=[1,2]",
        f"output_dir={folder}",
    )
    if not _is_done(folder, command, run_folder):
        run_python(*command)
    return read_json(folder / "results.json")


def evaluation_of(recipe: Recipe, protocol: str) -> list[str]:
    """The overrides of evaluate.py for one of a recipe's protocols."""
    how, *settings = protocol.split()
    others = [setting for setting in settings if setting.startswith(NOT_THE_PROTOCOLS)]
    own = [f"protocol.{setting}" for setting in settings if setting not in others]
    return [f"protocol={how}", *own, *recipe.evaluation, *others]


def _command(name: str, seed: int, options: argparse.Namespace) -> str:
    """The command of this one recipe and seed, to be recorded."""
    more = ["--overrides", *options.overrides] if options.overrides else []
    return shlex.join(["python", "-m", "experiments.ladder", name, "--seeds", str(seed), *more])


def run_python(*arguments: str) -> None:
    """Run a Python command to its end. Raises `UserError` if it fails."""
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT)
    # A request to stop is handed on, so that training saves before it stops.
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if status:
        raise UserError(f"{shlex.join(arguments)} ended with status {status}; the same command continues")


def _training_seconds(folder: Path) -> float:
    """The seconds of all training steps, over restarts, without evaluations."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    # By step, since a run that resumes from an older checkpoint logs some steps twice.
    by_step = {line["step"]: line.get("timing/train_time_per_interval_seconds", 0.0) for line in lines}
    return round(sum(by_step.values()), 1)


def _is_done(evaluation: Path, command: tuple[str, ...], run_folder: Path) -> bool:
    """Whether a finished evaluation is of the run's last checkpoint and by this command."""
    if not (evaluation / "results.json").is_file():
        return False
    found = read_json(evaluation / "results.json")
    # Another command asked something else; another checkpoint is from before the run continued.
    return (
        found["command"] == shlex.join(command)
        and Path(found["checkpoint"]["path"]).name == checkpoint.latest(run_folder / "checkpoints").name
    )


def append(results: list[Result], path: Path = RESULTS) -> None:
    """Add the results that are not in the file yet."""
    known = {json.dumps(vars(result)) for result in read_results(path)}
    lines = [line for line in (json.dumps(vars(result)) for result in results) if line not in known]
    if lines:
        # One write in append mode, so that lines of several ladders at work do not mix.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, ("\n".join(lines) + "\n").encode())
        finally:
            os.close(descriptor)


def keeps_promise(result: Result, recipe: Recipe) -> bool:
    """Whether a score is what the recipe expects. Prints the score either way."""
    # A recipe promises pass@1 of the model itself, under its first protocol.
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
    add = parser.add_argument
    add("recipes", nargs="*", metavar="RECIPE", help="names of experiments/ladder.yaml")
    add("--list", action="store_true", help="the recipes, and how many seeds have results")
    add("--seeds", type=int, nargs="+", default=[0], help="of the training runs (default: 0)")
    add("--output-dir", type=Path, default=Path("runs/ladder"), help="of the runs (default: %(default)s)")
    add("--data-dir", type=Path, default=Path("data"), help="of the datasets (default: %(default)s)")
    add("--results", type=Path, default=RESULTS, help=f"default: experiments/{RESULTS.name}")
    overrides = "of all training runs, for example device=cpu"
    add("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help=overrides)
    return parser.parse_args(arguments)


@reports_user_errors
def main() -> None:
    options, ladder = parse_arguments(), read_ladder()
    if options.list or not options.recipes:
        done = {(result.recipe, seed) for result in read_results(options.results) for seed in result.seeds}
        for name in ladder.recipes:
            seeds = sum(recipe == name for recipe, _ in done)
            print(f"{ladder.recipe(name).rung}  {name:<24} {seeds} seeds  {ladder.recipes[name].title}")
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
