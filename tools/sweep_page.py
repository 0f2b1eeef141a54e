"""A page of a sweep: every trial as a line through its values, each value against the score, a table."""

from pathlib import Path
from typing import Any

from config.compose import as_text
from tools.sweep_space import Range, SweepConfig
from tools.sweep_text import FAILURE, SEED, ranked
from utils.files import json_in_page, write_atomically

TEMPLATE = Path(__file__).with_name("sweep_template.html")
PLACEHOLDER = "__SWEEP_DATA__"  # where the template has its data


def write_page(path: Path, folder: Path, trials: list[Any], config: SweepConfig) -> None:
    """Write the trials as one page that a browser opens without a network."""
    data = {
        "folder": str(folder),
        "metric": config.metric,
        "direction": config.direction,
        "score": config.score,
        "seeds": config.seeds,
        "sampler": config.sampler,
        "pruner": config.pruner.name,
        "overrides": config.overrides,
        "axes": [_axis(key, range_) for key, range_ in config.space.items()],
        "trials": [_trial(trial, config) for trial in ranked(trials, config)],
    }
    page = TEMPLATE.read_text(encoding="utf-8").replace(PLACEHOLDER, json_in_page(data))
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _axis(key: str, range_: Any) -> dict[str, Any]:
    """What the page has to know of a key: its choices in words, or its limits."""
    if isinstance(range_, Range):
        return {"key": key, "low": range_.low, "high": range_.high, "log": range_.log, "whole": range_.whole}
    return {"key": key, "choices": [as_text(value) for value in range_.choices]}


def _trial(trial: Any, config: SweepConfig) -> dict[str, Any]:
    """A trial as the page shows it; choices in words, as in `_axis`."""
    choices = {key for key, range_ in config.space.items() if not isinstance(range_, Range)}
    params = {key: as_text(value) if key in choices else value for key, value in trial.params.items()}
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "score": trial.value,
        "seeds": [trial.user_attrs.get(SEED.format(seed)) for seed in config.seeds],
        "params": params,
        "values": [[step, value] for step, value in sorted(trial.intermediate_values.items())],
        "failure": trial.user_attrs.get(FAILURE),
    }
