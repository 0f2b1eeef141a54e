"""The trials of a sweep in a terminal."""

import shlex
from typing import Any

from config.compose import as_overrides, as_text
from tools.sweep_space import SweepConfig

SEED, FAILURE = "seed {}", "failure"  # what a trial remembers: the score of each seed, and why it failed


def ranked(trials: list[Any], config: SweepConfig) -> list[Any]:
    """Trials with a score first, the best before the others, then those that were pruned, run, or failed."""
    states = ("COMPLETE", "PRUNED", "RUNNING", "WAITING", "FAIL")
    sign = -1 if config.direction == "maximize" else 1

    def place(trial: Any) -> tuple[int, float, int]:
        score = 0.0 if trial.value is None else sign * trial.value
        return states.index(trial.state.name), score, trial.number

    return sorted(trials, key=place)


def table(trials: list[Any], config: SweepConfig) -> str:
    """A line per trial: its score, that of each seed, and its values."""
    keys = list(config.space)
    seeds = [SEED.format(seed) for seed in config.seeds] if len(config.seeds) > 1 else []
    rows = [["trial", "state", "score", *seeds, "values", *keys]]
    for trial in ranked(trials, config):
        scores = [number(trial.user_attrs.get(seed)) for seed in seeds]
        values = [shown(trial.params[key]) if key in trial.params else "-" for key in keys]
        known = str(len(trial.intermediate_values))
        rows.append(
            [str(trial.number), trial.state.name.lower(), number(trial.value), *scores, known, *values]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    failed = [trial for trial in trials if trial.state.name == "FAIL"]
    return "\n".join(
        [*lines, *(f"trial {trial.number} failed: {trial.user_attrs[FAILURE]}" for trial in failed)]
    )


def best_line(trials: list[Any], config: SweepConfig) -> list[str]:
    """The best trial and the overrides of its runs, where there is a score."""
    found = ranked([trial for trial in trials if trial.state.name == "COMPLETE"], config)
    if not found:
        return ["no trial has a score"]
    best = found[0]
    words = shlex.join([*config.overrides, *as_overrides(best.params)])
    seeds = f"mean over {len(config.seeds)} seeds" if len(config.seeds) > 1 else f"seed {config.seeds[0]}"
    return [
        f"best: trial {best.number}, {number(best.value)} ({seeds})",
        f"python pretrain_etrm.py {words}",
    ]


def number(value: float | None) -> str:
    """A score, or a dash."""
    return "-" if value is None else f"{value:.4g}"


def shown(value: Any) -> str:
    """A setting's value, short enough for a table."""
    return f"{value:.4g}" if isinstance(value, float) else as_text(value)
