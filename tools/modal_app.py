"""Run the project's commands on Modal (modal.com), in containers with GPUs.

    python -m tools.modal_app train data=arc1 run_name=first --gpu H100 --gpus 8
    python -m tools.modal_app exp1 --checkpoint runs/first --gpu H100 --dry-run

Keys behind the action go to its main command. Data and runs stay in the volumes etrm-data and etrm-runs; the
same command continues a run. --dry-run prints what would be run and needs neither the package nor an account.
"""

import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.arguments import natural, parser_of, positive
from utils.environment import git_commit
from utils.errors import UserError, reports_user_errors
from utils.extras import require

ROOT = Path(__file__).resolve().parents[1]
HOME = PurePosixPath("/etrm")  # the project's folder in a container
VOLUMES = {"data": "etrm-data", "runs": "etrm-runs"}
LEFT_OUT = [".git", ".venv*", "site", "data", "runs", "outputs", "wandb", "**/__pycache__", "**/.*_cache"]
HOUR = 3600  # seconds
PYTHON = "python"
PREDICTIONS = ["controls=[]", "save_predictions=true"]

Words = list[str]


def _module(name: str, *words: object) -> Words:
    return [PYTHON, "-m", name, *map(str, words)]


def _several(options: Namespace, *words: object) -> Words:
    """A command that runs alone, or under torchrun on all GPUs of its container."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.gpus)]
    return [PYTHON, *(several if options.gpus > 1 else []), *map(str, words)]


def _dataset(options: Namespace, num_aug: int, *words: str) -> Words:
    folder = f"data/arc-aug-{num_aug}"
    keys = [
        "--layout",
        "puzzle",
        "--test-set-name",
        "evaluation",
        "--num-aug",
        num_aug,
        "--seed",
        options.seed,
    ]
    return _module("dataset.build_arc_dataset", *keys, "--output-dir", folder, *words)


def _arc1(options: Namespace, num_aug: int) -> Words:
    return _dataset(options, num_aug, "--subsets", "training", "evaluation")


def _all_subsets(options: Namespace) -> list[Words]:
    subsets = ["--subsets", "training", "training2", "evaluation", "evaluation2", "--drop-duplicates"]
    return [_dataset(options, options.paper_aug, *subsets)]


def _evaluate(options: Namespace, folder: str, *words: str) -> Words:
    """An evaluation whose predictions an experiment reads in `folder`."""
    if not options.checkpoint:
        raise UserError(f"{options.action} needs --checkpoint, a run or a checkpoint in the volume of runs")
    asked = [f"checkpoint={options.checkpoint}", f"seed={options.seed}", f"output_dir={folder}", *PREDICTIONS]
    return _several(options, "evaluate.py", *asked, *words, *options.overrides)


def _model(options: Namespace, experiment: str, *words: str) -> list[Words]:
    """An experiment that asks a model itself, on one GPU."""
    if not options.checkpoint:
        raise UserError(f"{options.action} needs --checkpoint, a run or a checkpoint in the volume of runs")
    given = [f"checkpoint={options.checkpoint}", f"seed={options.seed}", *words, *options.overrides]
    return [_module(f"experiments.{experiment}", *given)]


def _exp1(options: Namespace, *words: str) -> list[Words]:
    folder = f"runs/{options.action}"
    asked = _evaluate(options, folder, f"num_views={options.paper_aug + 1}", *words)
    return [asked, _module("experiments.votes_against_one_view", folder, "--seed", options.seed)]


def _steps(options: Namespace) -> list[Words]:
    folder = f"runs/{options.action}"
    return [_evaluate(options, folder, "record_steps=true"), _module("experiments.steps", folder)]


def _one_mode(options: Namespace, num_views: int) -> list[Words]:
    return [_evaluate(options, f"runs/{options.action}", f"num_views={num_views}")]


def _train(options: Namespace) -> list[Words]:
    given = options.overrides
    return [_several(options, "-m", "tools.doctor", *given), _several(options, "pretrain_etrm.py", *given)]


def _train_short(options: Namespace) -> list[Words]:
    data = ["data=arc1_puzzle", f"data.path={options.data_dir or f'data/arc-aug-{options.paper_aug}'}"]
    depth = [f"arch={options.arch}", "arch.L_cycles=4", "arch.H_cycles=3", "arch.L_layers=2"]
    size = ["global_batch_size=512", "epochs=50000", "eval_interval=5000", f"seed={options.seed}"]
    keys = [*depth, *data, *size, "run_name=train_short", *options.overrides]
    return [_several(options, "pretrain_etrm.py", *keys)]


def _check_data(options: Namespace) -> list[Words]:
    return [_module("tools.info", options.data_dir or "data/arc-aug-1000", "--sanity")]


def _fetch(options: Namespace) -> list[Words]:
    return [_module("tools.published", options.published, "--output-dir", "runs/published")]


# Action -> its commands, and whether they want a GPU. From train_short on, the names are those of the
# reproduction's modal_trm.py; `llm` is its modal_llama.py.
ACTIONS: dict[str, tuple[Callable[[Namespace], list[Words]], bool]] = {
    "train": (_train, True),
    "evaluate": (lambda options: [_several(options, "evaluate.py", *options.overrides)], True),
    "llm": (lambda options: [_module("baselines.llm", *options.overrides)], True),
    "train_short": (_train_short, True),
    "prepare_data": (_all_subsets, False),
    "build_arc1": (
        lambda options: [_arc1(options, options.paper_aug), _arc1(options, options.single_aug)],
        False,
    ),
    "fetch_ckpt": (_fetch, False),
    "check_data": (_check_data, False),
    "quick_exp1": (lambda options: _exp1(options, "max_eval_groups=5"), True),
    "exp1": (_exp1, True),
    "exp1_paper_only": (lambda options: _one_mode(options, options.paper_aug + 1), True),
    "exp1_single_only": (lambda options: _one_mode(options, options.single_aug + 1), True),
    "exp6": (lambda options: _model(options, "efficiency", "batch_size=32"), True),
    "expC": (lambda options: _model(options, "puzzle_id"), True),
    "expE": (_steps, True),
}


def commands_of(options: Namespace) -> list[Words]:
    """What an action runs, one command after the other.

    Raises `UserError` for an option that it lacks, and for keys of an action without a GPU, which has none.
    """
    commands, on_gpu = ACTIONS[options.action]
    if options.overrides and not on_gpu:
        raise UserError(f"{options.action} takes no keys, found {options.overrides[0]}")
    return commands(options)


def run(commands: list[Words]) -> int:
    """In a container: the exit status of the first command that fails, 0 where none does."""
    for words in commands:
        print(f"$ {shlex.join(words)}", flush=True)
        if status := subprocess.run(words, cwd=str(HOME)).returncode:
            return status
    return 0


def app_of(options: Namespace) -> tuple[Any, Any]:
    """Modal's app, and its one function: `run` with image, volumes and GPUs."""
    import modal

    # The function travels as bytecode, which belongs to one version of Python.
    image = modal.Image.debian_slim(python_version="{}.{}".format(*sys.version_info))
    image = image.apt_install("g++")  # what torch.compile builds kernels with
    image = image.pip_install_from_requirements(str(ROOT / "requirements.txt"))
    image = image.pip_install_from_requirements(
        str(ROOT / "requirements-no-deps.txt"), extra_options="--no-deps"
    )
    if options.extras:
        image = image.pip_install_from_pyproject(str(ROOT / "pyproject.toml"), options.extras)
    image = image.env({"PYTHONPATH": str(HOME), "ETRM_COMMIT": git_commit() or ""}).workdir(HOME)
    app = modal.App("etrm")
    function = app.function(
        name="run",
        serialized=True,
        image=image.add_local_dir(ROOT, str(HOME), ignore=LEFT_OUT),
        gpu=f"{options.gpu}:{options.gpus}" if ACTIONS[options.action][1] and options.gpu else None,
        cpu=options.cpus,
        volumes={
            str(HOME / folder): modal.Volume.from_name(name, create_if_missing=True)
            for folder, name in VOLUMES.items()
        },
        secrets=[modal.Secret.from_name(name) for name in options.secret],
        timeout=options.hours * HOUR,
    )(run)
    return app, function


def parse_arguments(arguments: list[str] | None = None) -> Namespace:
    """The command line. Raises `UserError` for several GPUs of no kind."""
    parser = parser_of("tools.modal_app", __doc__)
    add = parser.add_argument
    add("action", choices=ACTIONS, metavar="ACTION", help=", ".join(ACTIONS))
    add("overrides", nargs="*", metavar="key=value", help="of the action's main command")
    add("--gpu", default="H100", help="its kind, as Modal calls it, or an empty text (default: %(default)s)")
    add("--gpus", type=positive, default=1, help="how many, one process each (default: %(default)s)")
    add("--cpus", type=positive, default=4, help="cores (default: %(default)s)")
    add("--hours", type=positive, default=24, help="time limit, Modal's longest by default")
    add("--extras", nargs="+", default=[], help="of pyproject.toml, installed too, such as llm qlora")
    add("--secret", action="append", default=[], help="of Modal, for example with WANDB_API_KEY")
    add("--detach", action="store_true", help="go on when this command ends")
    add("--checkpoint", help="exp*: what is asked")
    add("--paper-aug", type=natural, default=1000, help="augmentations of all votes (default: %(default)s)")
    add(
        "--single-aug",
        type=natural,
        default=0,
        help="augmentations of the single mode (default: %(default)s)",
    )
    add("--data-dir", help="check_data, train_short: the dataset (default: data/arc-aug-1000)")
    add("--published", default="arc_v1", help="fetch_ckpt: a name of tools.published (default: %(default)s)")
    add("--arch", default="trm", help="train_short (default: %(default)s)")
    add("--seed", type=natural, default=42, help="of all actions but train, evaluate and llm")
    add("--dry-run", action="store_true", help="print the commands, and run nothing")
    options = parser.parse_intermixed_args(arguments)
    if options.gpus > 1 and not options.gpu:
        raise UserError("--gpus needs a kind of --gpu")
    return options


@reports_user_errors
def main() -> None:
    options = parse_arguments()
    commands = commands_of(options)
    if options.dry_run:
        print("\n".join(map(shlex.join, commands)))
        return
    require("modal", "running on Modal", "--dry-run shows the commands")
    import modal

    app, function = app_of(options)
    try:
        with modal.enable_output(), app.run(detach=options.detach):
            status = function.remote(commands)
    except modal.exception.Error as error:
        raise UserError(f"Modal: {str(error).splitlines()[0]}") from None
    sys.exit(status)


if __name__ == "__main__":
    main()
