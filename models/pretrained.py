"""Weights from a file: checkpoints of this framework, and the original TRM's files under this framework's names."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models.encoders import ENCODERS
from models.trm import ArchConfig, DataSizes, RecursiveModel, build_model
from utils import checkpoint
from utils.errors import UserError

_PREFIXES = ("_orig_mod.", "module.", "model.", "inner.")
_RENAMED = {
    "embed_tokens.embedding_weight": "embed_tokens.weight",
    "embed_pos.embedding_weight": "embed_pos.weight",
    "puzzle_emb.weights": "context.weights",
}


def load_original(path: Path) -> dict[str, Tensor]:
    """The state dict of an original TRM checkpoint, compiled or not, as float32 under the names of `models.trm.TRM`.

    Raises `UserError` when the file is missing, truncated or no state dict.
    """
    state = checkpoint.load_torch(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is not a state dict: expected names mapped to tensors")
    return {_our_name(name): value.float() for name, value in state.items()}


def original_name(name: str) -> str:
    """The original's name (below `model.inner.`) of one of our parameters."""
    return {ours: theirs for theirs, ours in _RENAMED.items()}.get(name, name)


def _our_name(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return _RENAMED.get(name, name)


def load_checkpoint(path: Path, weights: str) -> tuple[RecursiveModel, dict[str, Any]]:
    """A model in evaluation mode from a checkpoint of this framework, built from the configuration stored with it.

    weights: `ema` or `raw`. Returns the model and the checkpoint's info. Nothing is filled in from defaults: a
    configuration that does not describe the weights is an error.
    """
    info = checkpoint.load_info(path)
    try:
        arch = ArchConfig(**info["config"]["arch"])
        encoder = info["config"]["encoder"]
        model = build_model(arch, DataSizes(**info["sizes"]), encoder and ENCODERS[encoder["name"]][0](**encoder))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}/info.json does not describe a model of this version: {error}") from None
    load_strictly(model, checkpoint.load_weights(path, weights), path)
    return model.eval(), info


def load_strictly(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load weights that must match name by name and shape by shape; `UserError` lists what does not."""
    own = model.state_dict()
    problems = [f"missing {name}" for name in own.keys() - state.keys()]
    problems += [f"unexpected {name}" for name in state.keys() - own.keys()]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, the model needs {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5]) + ("; ..." if len(problems) > 5 else "")
        raise UserError(f"the weights of {path} do not fit the configured model: {shown}")
    model.load_state_dict(state)
