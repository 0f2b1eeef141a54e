"""Packages that only a part of the framework needs: the extras of pyproject.toml, and what draws pictures."""

from importlib.util import find_spec

from utils.errors import UserError

# The package that is imported -> the extra that installs it.
EXTRAS = {
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "torchjd": "jacobian",
    "optuna": "sweep",
    "submitit": "slurm",
    "huggingface_hub": "hub",
    "transformers": "llm",
    "peft": "llm",
    "bitsandbytes": "qlora",
    "modal": "modal",
}
# The package that is imported -> its name, of those that every installation with a network has.
DRAWING = {"PIL": "pillow", "matplotlib": "matplotlib"}


def install(package: str) -> str:
    """The command that installs what `package` belongs to, from the project's folder."""
    if package in DRAWING:
        return f"pip install {DRAWING[package]}"
    return f"pip install -e '.[{EXTRAS[package]}]'"


def require(package: str, what: str, otherwise: str = "") -> None:
    """Raise `UserError` unless `package` is installed.

    what: what needs it. otherwise: how to do without.
    """
    if find_spec(package) is None:
        or_else = f", or {otherwise}" if otherwise else ""
        name = DRAWING.get(package, package)
        raise UserError(f"{what} needs {name}, which is not installed: {install(package)}{or_else}")
