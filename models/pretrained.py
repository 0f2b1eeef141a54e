"""Weights from elsewhere: files of the original TRM under this framework's names."""

import pickle
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import UserError

_PREFIXES = ("_orig_mod.", "module.", "model.", "inner.")
_RENAMED = {"embed_tokens.embedding_weight": "embed_tokens.weight", "embed_pos.embedding_weight": "embed_pos.weight", "puzzle_emb.weights": "context.weights"}


def load_original(path: Path) -> dict[str, Tensor]:
    """The state dict of an original TRM checkpoint, compiled or not, as float32 under the names of `models.trm.TRM`.

    Raises `UserError` when the file is missing, truncated or no state dict.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path} is not a readable PyTorch checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is not a state dict: expected names mapped to tensors")
    return {_our_name(name): value.float() for name, value in state.items()}


def _our_name(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return _RENAMED.get(name, name)
