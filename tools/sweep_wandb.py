"""A sweep as a file for W&B's own: the same space, drawn and stopped early by W&B's server."""

from pathlib import Path
from typing import Any

import yaml

from tools.sweep_space import Choices, Searched, SweepConfig
from utils.errors import UserError
from utils.files import write_atomically

METHODS = {"tpe": "bayes", "random": "random", "grid": "grid"}
HEADER = """\
# A sweep for W&B, written by python -m tools.sweep SWEEP --wandb-yaml FILE. From the project's folder:
# wandb sweep FILE, then wandb agent. Both need W&B's server.
"""


def wandb_sweep(config: SweepConfig) -> dict[str, Any]:
    """The sweep as W&B describes one (docs.wandb.ai/guides/sweeps), with the metric that `config` names.

    Raises `UserError` for what W&B's sweeps cannot do.
    """
    stops = {}
    if len(config.seeds) > 1:
        raise UserError(f"W&B judges each run alone, not the mean of seeds={config.seeds}: give one seed")
    if config.score == "best":
        raise UserError("W&B judges a run by the metric's last value: score=best is not possible")
    if config.pruner.name == "median":
        raise UserError("W&B stops runs early by hyperband only: give pruner.name=hyperband or none")
    if config.pruner.name == "hyperband":
        eta, least = config.pruner.reduction_factor, config.pruner.min_resource
        stops = {"early_terminate": {"type": "hyperband", "min_iter": least, "eta": eta}}
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(config.processes)]
    # The agent names each run, and so its folder.
    own = [f"seed={config.seeds[0]}", "logging.wandb=online", "run_name=sweep-${oc.env:WANDB_RUN_ID}"]
    return {
        "program": "pretrain_etrm.py",
        "method": METHODS[config.sampler],
        "metric": {"name": config.metric, "goal": config.direction},
        "run_cap": config.wanted,
        **stops,
        "parameters": {key: _parameter(searched) for key, searched in config.space.items()},
        "command": [
            "${env}",
            "${interpreter}",
            *(several if config.processes > 1 else []),
            "${program}",
            *config.overrides,
            *own,
            "${args_no_hyphens}",
        ],
    }


def _parameter(searched: Searched) -> dict[str, Any]:
    if isinstance(searched, Choices):
        return {"values": list(searched.choices)}
    low, high, step = searched.low, searched.high, searched.step
    if step is not None:  # W&B's steps are counted from 0, ours from `low`
        count = int((high - low) / step + 1e-9) + 1
        return {"values": [low + number * step for number in range(count)]}
    ends = {"min": low, "max": high} if searched.whole else {"min": float(low), "max": float(high)}
    if not searched.whole:
        return {"distribution": "log_uniform_values" if searched.log else "uniform", **ends}
    if searched.log:
        return {"distribution": "q_log_uniform_values", **ends, "q": 1}
    return {"distribution": "int_uniform", **ends}


def write_wandb_sweep(path: Path, config: SweepConfig) -> None:
    """Write the file that `wandb sweep` reads."""
    text = HEADER + yaml.safe_dump(wandb_sweep(config), sort_keys=False, width=100)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
