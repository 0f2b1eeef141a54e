"""What the experiments share: command lines, folders, the origin of their numbers, and how these print."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any, get_args

from config import compose
from evaluation.predictions import StoredPredictions
from evaluation.protocols import adaptation_class
from evaluation.session import EvaluateConfig, Session
from evaluation.voting import Ranking
from utils.arguments import natural, parser_of
from utils.environment import git_commit
from utils.errors import UserError


def for_predictions(module: str, description: str) -> ArgumentParser:
    """The parser of an experiment on stored predictions. The experiment adds its own options to it."""
    parser = parser_of(module, description)
    add = parser.add_argument
    add("folder", type=Path, help="an evaluation's folder, made with save_predictions=true")
    add("--output-dir", type=Path, help="where the files go (default: the evaluation's folder)")
    add("--ranking", choices=get_args(Ranking), default="votes", help="how votes order the answers")
    add("--seed", type=natural, default=0, help="of everything that is drawn (default: %(default)s)")
    return parser


def for_model(module: str, description: str) -> ArgumentParser:
    """The parser of an experiment that runs a model. The experiment adds its own options to it.

    `overrides` are the keys of evaluate.py, for the model and what it is asked; options are for the
    experiment.
    """
    parser = parser_of(module, description)
    keys = "checkpoint=... and other keys of evaluate.py"
    parser.add_argument("overrides", nargs="+", metavar="key=value", help=keys)
    return parser


def opened(overrides: list[str]) -> Session:
    """A session that asks the model as it is. Raises `UserError` for a protocol that adapts it."""
    config = compose.load(EvaluateConfig, "evaluate", overrides)
    if adaptation_class(config.protocol).adapts:
        raise UserError(f"protocol={config.protocol.name}: this experiment asks the model as it is")
    return Session.open(config)


def folder_of(session: Session) -> Path:
    """Where an experiment that runs a model writes: output_dir, or a folder in the run's `experiments`."""
    # Not in the evaluation's own folder: evaluate.py replaces that as a whole.
    beside = session.trained.run_folder / "experiments" / session.folder().name
    return Path(session.config.output_dir or beside)


def origin(stored: StoredPredictions, ranking: str) -> dict[str, Any]:
    """Where the predictions come from, as JSON values for an experiment's file."""
    about = stored.about
    return {
        "checkpoint": about["checkpoint"]["path"],
        "checkpoint_sha256": about["checkpoint"]["sha256"],
        "data_paths": [about["dataset"]["path"]],
        "dataset_sha256": about["dataset"]["sha256"],
        "protocol": about["protocol"],
        "split": about["split"],
        "num_views": stored.num_views,
        "ranking": ranking,
        "num_tasks": len(stored.task_means(stored.labelled)),
        "num_queries": len(stored.labelled),
        "command": about["command"],
        "git_commit": git_commit(),
    }


def percent(value: float, low: float, high: float) -> str:
    """A share with its interval, in percent."""
    return f"{100 * value:6.2f} % [{100 * low:.2f}, {100 * high:.2f}]"
