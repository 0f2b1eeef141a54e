"""What a sweep searches: its space, its seeds, and how trials are chosen and judged (docs/sweeps.md)."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveInt,
    Tag,
    ValidationError,
    model_validator,
)
from yaml import YAMLError

from config.compose import CONFIG_DIR, as_overrides, load
from config.schema import PretrainConfig
from utils.config import Config
from utils.errors import UserError, nearest

SPACES = CONFIG_DIR / "sweep"
OWN_KEYS = ("seed", "run_name", "output_dir", "resume")  # what a sweep sets for each of its runs
Value = bool | int | float | str | None


class Range(Config):
    """Numbers from low to high, both included. They are whole where low and high are.

    log: drawn evenly by their logarithm. step: the distance between values; null: any value.
    """

    low: int | float
    high: int | float
    log: bool = False
    step: Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"low={self.low} is not below high={self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log takes a low above 0, and no step")
        if self.whole and isinstance(self.step, float):
            raise ValueError(
                f"step={self.step} leads to numbers that are not whole; write low as {self.low}.0"
            )
        return self

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are drawn."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def drawn(self, trial: Any, key: str) -> Value:
        """The value of `key` in a trial of Optuna."""
        if self.whole:
            return trial.suggest_int(key, self.low, self.high, log=self.log, step=self.step or 1)
        return trial.suggest_float(key, self.low, self.high, log=self.log, step=self.step)

    @property
    def tried(self) -> list[Value]:
        """The values that a check of the configuration looks at."""
        return [self.low, self.high]


class Choices(Config):
    """One of some values."""

    choices: Annotated[list[Value], Field(min_length=2)]

    def drawn(self, trial: Any, key: str) -> Value:
        """The value of `key` in a trial of Optuna."""
        return trial.suggest_categorical(key, self.choices)

    @property
    def tried(self) -> list[Value]:
        """The values that a check of the configuration looks at."""
        return self.choices


def _kind(value: Any) -> str:
    """Which of the two a value of `space` is meant to be, for an error that speaks of that one alone."""
    return (
        "Choices"
        if isinstance(value, Choices) or (isinstance(value, dict) and "choices" in value)
        else "Range"
    )


Searched = Annotated[
    Annotated[Range, Tag("Range")] | Annotated[Choices, Tag("Choices")], Discriminator(_kind)
]


class PrunerConfig(Config):
    """When a trial is given up, by the values of the metric that its runs have logged so far.

    A resource is one logged value, counted over the seeds of a trial.

    startup_trials: `median` waits for so many finished trials. warmup: it spares so many values of a trial.
    min_resource, reduction_factor: those of `hyperband`.
    """

    name: Literal["none", "median", "hyperband"] = "none"
    startup_trials: PositiveInt = 5
    warmup: NonNegativeInt = 0
    min_resource: PositiveInt = 1
    reduction_factor: Annotated[int, Field(ge=2)] = 3


class SweepConfig(Config):
    """A sweep over the keys of pretrain_etrm.py.

    overrides: of every run. space: by key.
    seeds: every trial trains each of them, and its score is their mean.
    trials: how many get a score or are pruned; null: 20, or the whole grid.
    metric: a name in metrics.jsonl; null: `best_metric` on the validation tasks.
    score: the metric's last value in a run, or its best.
    sampler_seed: decides what is drawn. processes: of one run, under torchrun.
    """

    overrides: list[str] = Field(default_factory=list)
    space: Annotated[dict[str, Searched], Field(min_length=1)]
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = Field(default_factory=lambda: [0])
    trials: PositiveInt | None = None
    metric: str | None = None
    direction: Literal["maximize", "minimize"] = "maximize"
    score: Literal["last", "best"] = "last"
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    sampler_seed: NonNegativeInt = 0
    pruner: PrunerConfig = PrunerConfig()
    processes: PositiveInt = 1

    @model_validator(mode="after")
    def _check(self) -> "SweepConfig":
        fixed = [override.lstrip("+").split("=", 1)[0] for override in self.overrides]
        for key in (*fixed, *self.space):
            if key in OWN_KEYS:
                raise ValueError(
                    f"{key} is set by the sweep itself" + (", by seeds" if key == "seed" else "")
                )
        if twice := [key for key in self.space if key in fixed]:
            raise ValueError(f"{twice[0]} is both in space and in overrides")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds} names a seed twice")
        if self.sampler == "grid" and any(isinstance(range_, Range) for range_ in self.space.values()):
            raise ValueError("sampler=grid takes choices only, and no range")
        return self

    @property
    def wanted(self) -> int:
        """How many trials get a score or are pruned."""
        if self.trials or self.sampler != "grid":
            return self.trials or 20
        return math.prod(len(range_.tried) for range_ in self.space.values())

    def first_run(self) -> PretrainConfig:
        """The configuration of a run with the first value of every key.

        Raises `UserError` for a key or a value that is none, in whichever trial it would occur.
        """
        first = {key: range_.tried[0] for key, range_ in self.space.items()}
        for key, range_ in self.space.items():
            for value in range_.tried[1:]:
                load(PretrainConfig, "pretrain", [*self.overrides, *as_overrides({**first, key: value})])
        return load(PretrainConfig, "pretrain", [*self.overrides, *as_overrides(first)])

    def chosen_metric(self, run: PretrainConfig) -> str:
        """The name of what trials are judged by. Raises `UserError` where nothing would log it."""
        metric = self.metric
        if metric is None:
            if run.validation is None:
                raise UserError(
                    "a sweep chooses by validation tasks: give validation=N among its overrides, or a metric"
                )
            metric = f"validation/{run.best_metric}"
        if not metric.startswith("train/") and run.eval_interval is None:
            raise UserError(f"metric={metric} is logged by evaluations, and eval_interval is null")
        if metric.startswith("validation/") and run.validation is None:
            raise UserError(f"metric={metric} is that of validation tasks, and validation is null")
        return metric


def read_space(path: Path) -> SweepConfig:
    """The sweep in a YAML file. Raises `UserError` with a line per problem."""
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        return SweepConfig(**values)
    except FileNotFoundError:
        names = [file.stem for file in SPACES.glob("*.yaml")]
        raise UserError(f"no such file: {path}{nearest(path.stem, names)}") from None
    except ValidationError as error:
        lines = dict.fromkeys(
            f"{path}: {_where(one['loc'])}{one['msg'].removeprefix('Value error, ')}"
            for one in error.errors()
        )
        raise UserError("\n       ".join(lines)) from None
    except (OmegaConfBaseException, YAMLError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no sweep: {str(error).splitlines()[0]}") from None


def _where(place: tuple[int | str, ...]) -> str:
    """The dotted key of a problem; nothing for a rule between several."""
    # pydantic also names the member of a union.
    named = [str(part) for part in place if part not in ("Range", "Choices")]
    return ".".join(named) + ": " if named else ""


def find_space(name: str) -> Path:
    """The file that `name` means: a path, or the name of a sweep in config/sweep."""
    path = Path(name)
    return SPACES / f"{name}.yaml" if not path.suffix and (SPACES / f"{name}.yaml").is_file() else path
