"""Files of other systems, under our names: the original TRM, HRM, the first ETRM and nano-trm.

An original's file is a state dict, with `all_config.yaml` and perhaps `identifiers.json` beside it. A
checkpoint of nano-trm is one of Lightning, which holds its settings and perhaps averaged weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from yaml import YAMLError

from dataset.games import GAMES
from models.core import Q_HEAD_BIAS
from utils import checkpoint
from utils.errors import UserError
from utils.files import read_json

# What compiling, wrapping and the original's loss head put before a name.
_PREFIXES = ("_orig_mod.", "module.", "model.", "inner.")
_RENAMED = {
    "embed_tokens.embedding_weight": "embed_tokens.weight",
    "embed_pos.embedding_weight": "embed_pos.weight",
    "puzzle_emb.weights": "context.weights",
}
_NANO_RENAMED = {
    "input_embedding.embedding_weight": "embed_tokens.weight",
    "z_H_init": "H_init",
    "z_L_init": "L_init",
    "puzzle_emb.weights": "context.weights",
}
ROWS = "context.weights"
SETTINGS, NAMES = "all_config.yaml", "identifiers.json"
ETRM, NANO = "first ETRM", "nano-trm"
GAMES_THERE = ("arc", "sudoku", "maze")  # a game of one's own may have a vocabulary of the same size
# nano-trm's settings -> `arch.*` here.
_NANO_SETTINGS = {
    "hidden_size": "hidden_size",
    "num_heads": "num_heads",
    "num_layers": "L_layers",
    "H_cycles": "H_cycles",
    "L_cycles": "L_cycles",
    "N_supervision": "halt_max_steps",
    "halt_exploration_prob": "halt_exploration_prob",
    "ffn_expansion": "expansion",
    "puzzle_emb_dim": "puzzle_emb_ndim",
}
_NANO_POSITIONS = {"1d": "rope", None: "none"}
_NANO_ONLY = ("use_conv_swiglu", "use_board_swiglu", "attn_gate_type")  # changes of a block, off by default
_NANO_NEEDED = (
    *("lenet.layers.0.mlp.gate_up_proj.weight", "input_embedding.embedding_weight", "lm_head.weight"),
    *("q_head.weight", "q_head.bias", "z_H_init", "z_L_init"),
)
_THETA = 10000  # of rotary positions, a constant here


@dataclass(frozen=True)
class Foreign:
    """Weights of another system under our names, float32, and what is known of their training.

    kind: whose file it is, in words. averaged: moving averages, where the file has both.
    settings: `arch.*` of their training; None: unknown. identifiers: the names of their puzzle rows; None:
    unknown. step: updates behind them; None: unknown.
    """

    path: Path
    kind: str
    weights: dict[str, Tensor]
    averaged: dict[str, Tensor] | None
    settings: dict[str, Any] | None
    identifiers: list[str] | None
    step: int | None

    @property
    def best(self) -> dict[str, Tensor]:
        """The weights that an evaluation would use."""
        return self.averaged or self.weights

    @property
    def game(self) -> str | None:
        """The game whose vocabulary the weights have, None for that of none."""
        embedding = self.weights.get("embed_tokens.weight")
        sizes = {GAMES[name].vocabulary.size: name for name in GAMES_THERE}
        return None if embedding is None else sizes.get(len(embedding))


def read_foreign(path: Path) -> Foreign:
    """A file of another system. Raises `UserError` when it is missing, truncated or nothing of the kind."""
    content = checkpoint.load_torch(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        return _nano(path, content)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} is not a state dict: expected names mapped to tensors")
    weights = {_our_name(name): value.float() for name, value in content.items()}
    number = path.name.removeprefix("step_")
    step = int(number) if number.isdigit() else None
    identifiers = path.with_name(NAMES)
    names = read_json(identifiers) if identifiers.is_file() else None
    return Foreign(path, _kind(weights), weights, None, _settings(path), names, step)


def load_original(path: Path) -> dict[str, Tensor]:
    """The weights of an original's file, compiled or not, as float32 under our names. Raises `UserError`."""
    return read_foreign(path).weights


def original_name(name: str) -> str:
    """The original's name (below `model.inner.`) of one of our parameters."""
    return {ours: theirs for theirs, ours in _RENAMED.items()}.get(name, name)


def _our_name(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return _RENAMED.get(name, name)


def _kind(weights: dict[str, Tensor]) -> str:
    """Whose file this is, by what it holds."""
    parts = {name.split(".")[0] for name in weights}
    if "encoder" in parts:
        return ETRM
    return "HRM" if {"H_level", "L_level"} <= parts else "original TRM"


def _settings(path: Path) -> dict[str, Any] | None:
    """`arch.*` of the configuration beside an original's file, None without one. Raises `UserError`."""
    file = path.with_name(SETTINGS)
    if not file.is_file():
        return None
    try:
        read: Any = OmegaConf.to_container(OmegaConf.load(file))
        settings = dict(read["arch"])
        settings["name"] = settings["name"].split("@")[0].rsplit(".", 1)[-1]
        return settings
    except (OmegaConfBaseException, YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is no configuration of a TRM: {str(error).splitlines()[0]}") from None


def _nano(path: Path, content: dict[str, Any]) -> Foreign:
    """A checkpoint of nano-trm. Raises `UserError` for a model that has no counterpart here."""
    theirs, state = content.get("hyper_parameters") or {}, content["state_dict"]
    if missing := [name for name in _NANO_NEEDED if name not in state]:
        raise UserError(
            f"{path} is a checkpoint of Lightning, but not one of nano-trm: it has no {missing[0]}"
        )
    if missing := [key for key in (*_NANO_SETTINGS, "puzzle_emb_len") if key not in theirs]:
        raise UserError(f"{path} does not say what {', '.join(missing)} was in its training")
    if found := [f"{key}={theirs[key]}" for key in _NANO_ONLY if theirs.get(key)]:
        raise UserError(f"{path} was trained with {', '.join(found)}, which has no counterpart here")
    positions = theirs.get("pos_emb_type")
    if positions not in _NANO_POSITIONS or theirs.get("rope_theta", _THETA) != _THETA:
        raise UserError(
            f"{path} was trained with pos_emb_type={positions} and rope_theta={theirs.get('rope_theta')}, "
            f"which have no counterpart here; 1d, none and {_THETA} have"
        )
    tokens = _nano_tokens(path, theirs)
    settings = {ours: theirs[key] for key, ours in _NANO_SETTINGS.items()}
    rows = settings["puzzle_emb_ndim"] > 0
    settings |= {
        "name": "trm",
        "pos_encodings": _NANO_POSITIONS[positions],
        "mlp_t": bool(theirs.get("use_mlp_t", theirs.get("use_mlp", False))),
        "puzzle_emb_len": theirs["puzzle_emb_len"] if rows else 0,
        # The initial states are kept in the dtype of the activations.
        "forward_dtype": str(state["z_H_init"].dtype).removeprefix("torch."),
    }
    weights, averaged = _nano_weights(state, tokens), None
    for callback in (content.get("callbacks") or {}).values():
        if isinstance(callback, dict) and callback.get("shadow"):
            averaged = _nano_weights({**state, **callback["shadow"]}, tokens)
    return Foreign(path, NANO, weights, averaged, settings, None, content.get("global_step"))


def _nano_weights(state: dict[str, Tensor], tokens: Sequence[int]) -> dict[str, Tensor]:
    """Weights under our names, in the order of our tokens."""
    named = {}
    for theirs, value in state.items():
        name = _our_name(theirs)
        name = _NANO_RENAMED.get(name, name.replace("lenet.", "L_level.", 1))
        named[name] = value.float()
    for name in ("embed_tokens.weight", "lm_head.weight"):
        named[name] = named[name][list(tokens)]
    # It learns to stop only. What would go on is never asked.
    weight, bias = named["q_head.weight"], named["q_head.bias"]
    named["q_head.weight"] = torch.cat((weight, torch.zeros_like(weight)))
    named["q_head.bias"] = torch.cat((bias, torch.full_like(bias, Q_HEAD_BIAS)))
    if ROWS not in named:  # all puzzles share one row, and it is empty
        named[ROWS] = torch.zeros(1, 0)
    return named


def _nano_tokens(path: Path, theirs: dict[str, Any]) -> list[int]:
    """For each of our tokens, theirs. Mazes have the same ones.

    A Sudoku has padding, an end, a blank and its digits there. Here it has no end, and all nine digits. A
    digit that their Sudokus lack gets the row of padding, and wins where padding does. Raises `UserError`.
    """
    size, side = theirs.get("vocab_size", 0), theirs.get("max_grid_size") or 0
    if size == GAMES["maze"].vocabulary.size:
        return list(range(size))
    if size == 3 + side and 4 <= side <= 9:
        ours = GAMES["sudoku"].vocabulary
        return [0, *(2 + value if value <= side else 0 for value in range(ours.symbols))]
    raise UserError(
        f"{path} has {size} tokens for grids of side {side}: neither a Sudoku's nor a maze's of nano-trm"
    )
