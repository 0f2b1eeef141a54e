"""What the experiments share: their command lines, where their files go, the run they describe, how numbers are printed."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any, get_args

from config import compose
from evaluation.predictions import StoredPredictions
from evaluation.protocols import adapts
from evaluation.session import EvaluateConfig, Session
from evaluation.voting import Ranking
from utils.arguments import natural, parser_of
from utils.environment import git_commit
from utils.errors import UserError


def for_predictions(module: str, description: str) -> ArgumentParser:
    """The options of an experiment on stored predictions; its own may be added."""
    parser = parser_of(module, description)
    parser.add_argument("folder", type=Path, help="an evaluation's folder, made with save_predictions=true")
    parser.add_argument(
        "--output-dir", type=Path, help="where the files go (default: the evaluation's folder)"
    )
    parser.add_argument(
        "--ranking", choices=get_args(Ranking), default="votes", help="how votes order the answers"
    )
    parser.add_argument("--seed", type=natural, default=0, help="of everything that is drawn")
    return parser


def for_model(module: str, description: str, **numbers: int) -> Namespace:
    """The options of an experiment that runs a model: `overrides`, evaluate.py's keys, and a whole number for each of `numbers`."""
    parser = parser_of(module, description)
    parser.add_argument(
        "overrides", nargs="+", metavar="key=value", help="checkpoint=... and other keys of evaluate.py"
    )
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    return parser.parse_args()


def opened(overrides: list[str]) -> Session:
    """The session of an experiment on the model as it is. Raises `UserError` for a protocol that adapts it."""
    config = compose.load(EvaluateConfig, "evaluate", overrides)
    if adapts(config.protocol):
        raise UserError(f"protocol={config.protocol.name}: this experiment asks the model as it is")
    return Session.open(config)


def folder_of(session: Session) -> Path:
    """Where such an experiment writes: output_dir, or a folder beside the run's evaluations, which evaluate.py replaces whole."""
    return Path(
        session.config.output_dir or session.path.parent.parent / "experiments" / session.folder().name
    )


def origin(stored: StoredPredictions, ranking: str) -> dict[str, Any]:
    """Where the predictions come from."""
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
    """A share with its interval."""
    return f"{100 * value:6.2f} % [{100 * low:.2f}, {100 * high:.2f}]"
