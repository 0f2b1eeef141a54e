"""Weights from a file: checkpoints of this framework, and files of the original TRM, HRM and ETRM under our names.

`load_checkpoint` restores a model whole. `load_decoder` starts a new model from the recursion, embeddings and heads of
another one, which may have known its tasks in another way.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from yaml import YAMLError

from config.base import Config
from dataset import store as datasets
from dataset.leaks import UNKNOWN_PAIRS
from models.context import PuzzleEmbedding
from models.core import DataSizes, RecursiveModel
from models.encoders import ENCODERS
from models.trm import arch_config, build_model
from utils import checkpoint
from utils.errors import UserError
from utils.files import read_json

_PREFIXES = ("_orig_mod.", "module.", "model.", "inner.")
_RENAMED = {
    "embed_tokens.embedding_weight": "embed_tokens.weight",
    "embed_pos.embedding_weight": "embed_pos.weight",
    "puzzle_emb.weights": "context.weights",
}
_ROWS = "context.weights"
# What changes the arithmetic of the recursion but the shape of no weight.
_ARITHMETIC = ("H_cycles", "L_cycles", "num_heads", "pos_encodings", "halt_pooling", "relations")
# Architectures with the recursion of another one, and the name by which HRM's own repository calls it.
_SAME_RECURSION = {"etrm": "trm", "etrmtrm": "trm", "trm001": "trm", "hrm_act_v1": "hrm"}


class PretrainedConfig(Config):
    """load_pretrained_decoder: where a new run's recursion, embeddings and heads come from (a checkpoint or a file).

    pretrained_mismatch: whether other cycles, heads, positions or pooling for halting, and weights that do not fit, are refused
    or reported.
    pretrained_puzzle_rows: a model with puzzle rows takes them by the names of their puzzles, or starts with none.
    pretrained_encoder: whether a model with the same encoder takes that one's weights, too, to train on with other data.
    """

    load_pretrained_decoder: str | None
    pretrained_mismatch: Literal["refuse", "allow"]
    pretrained_puzzle_rows: Literal["match", "skip"]
    pretrained_encoder: Literal["load", "skip"]


@dataclass
class Source:
    """Weights under our names, the settings they were trained with (None: unknown), those of their encoder, and their puzzles' names."""

    path: Path
    weights: dict[str, Tensor]
    which: str
    settings: dict[str, Any] | None
    identifiers: list[str] | None
    encoder: dict[str, Any] | None = None


@dataclass
class DecoderReport:
    """What became of every weight, and which settings differ from those the weights were trained with."""

    path: str
    weights: str
    settings: str
    loaded: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = [
            f"decoder from {self.path} ({self.weights} weights): {len(self.loaded)} tensors loaded, {len(self.skipped)} skipped, "
            f"{len(self.missing)} left at their initial values; {self.settings}"
        ]
        reasons = list(self.skipped.values())
        lines += [f"skipped {reasons.count(reason)}: {reason}" for reason in dict.fromkeys(reasons)]
        lines += [f"differs: {text}" for text in self.differing]
        return "\n".join(lines)


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
        arch = arch_config(info["config"]["arch"])
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


def load_decoder(model: RecursiveModel, config: PretrainedConfig, identifiers: list[str]) -> DecoderReport:
    """Give a new model the recursion, embeddings and heads of `load_pretrained_decoder`, and say what became of each weight.

    Not loaded: an encoder, since the file's context is not this model's, unless `pretrained_encoder` says that it is; puzzle rows
    into a model with an encoder.
    identifiers: the names of this model's puzzle rows. Raises `UserError`, and changes nothing, when settings or weights
    do not fit (unless `pretrained_mismatch` allows it) or when rows cannot be matched by name.
    """
    source = _open(Path(config.load_pretrained_decoder))
    known = "its configuration was compared" if source.settings else "no configuration beside it, so that cycles could not be compared"
    with_encoder = config.pretrained_encoder == "load"
    report = DecoderReport(str(source.path), source.which, known, differing=_differences(model, source))
    report.differing += _encoder_differences(model, source) if with_encoder else []
    own = model.state_dict()
    new: dict[str, Tensor] = {}
    for name, value in source.weights.items():
        if name == _ROWS and isinstance(model.context, PuzzleEmbedding) and config.pretrained_puzzle_rows == "match":
            new[name] = _matched_rows(value, own[name], source, identifiers, report)
        elif name == _ROWS:
            with_rows = isinstance(model.context, PuzzleEmbedding)
            report.skipped[name] = "puzzle rows, as configured" if with_rows else "puzzle rows: this model has an encoder"
        elif name.startswith(("context.", "encoder.")) and not with_encoder:
            report.skipped[name] = "what the file's model computed its context with"
        elif name.startswith("rotary_emb."):
            report.skipped[name] = "positions are computed"
        elif name not in own:
            report.skipped[name] = f"arch={model.config.name} has no such weight"
        elif value.shape != own[name].shape:
            report.skipped[name] = f"its shape {tuple(value.shape)} is not this model's {tuple(own[name].shape)}"
            report.differing.append(f"{name} has shape {tuple(value.shape)} there, {tuple(own[name].shape)} here")
        else:
            new[name] = value
    report.loaded = sorted(new)
    report.missing = sorted(own.keys() - new.keys())
    expected = [name for name in report.missing if with_encoder or not name.startswith("context.")]
    lacking = [name for name in expected if name not in report.skipped]
    report.differing += [f"{name} is not in the file" for name in lacking]
    if report.differing and config.pretrained_mismatch == "refuse":
        shown = "; ".join(report.differing[:6]) + ("; ..." if len(report.differing) > 6 else "")
        raise UserError(f"{source.path} does not fit this model: {shown}. pretrained_mismatch=allow loads what fits")
    model.load_state_dict(own | {name: value.to(own[name].dtype) for name, value in new.items()})
    return report


def _open(path: Path) -> Source:
    """A checkpoint or run folder of ours, or an original's file with `all_config.yaml` and `identifiers.json` beside it."""
    if _is_checkpoint(path):
        folder = checkpoint.resolve(path)
        info = checkpoint.load_info(folder)
        which = "ema" if (folder / checkpoint.WEIGHTS["ema"]).is_file() else "raw"
        weights, config = checkpoint.load_weights(folder, which), info["config"]
        return Source(folder, weights, which, config["arch"], _trained_names(info), config["encoder"])
    settings_file = path.with_name("all_config.yaml")
    settings = None
    if settings_file.is_file():
        try:
            settings = OmegaConf.to_container(OmegaConf.load(settings_file))["arch"]
        except (OmegaConfBaseException, YAMLError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{settings_file} is no configuration of a TRM: {str(error).splitlines()[0]}") from None
        settings = {**settings, "name": settings["name"].split("@")[0].rsplit(".", 1)[-1]}
    return Source(path, load_original(path), "the file's", settings, _names(path.with_name("identifiers.json")))


def pairs_behind(path: Path) -> np.ndarray:
    """The fingerprints (N,) uint64 of all pairs that weights for `load_decoder` were trained on; an original's file does not say."""
    return checkpoint.load_trained_pairs(checkpoint.resolve(path)) if _is_checkpoint(path) else UNKNOWN_PAIRS


def _is_checkpoint(path: Path) -> bool:
    """Whether `path` is one of this framework, rather than an original's file; `RUN/best` is only a name."""
    return path.is_dir() or (path.name == checkpoint.BEST and path.parent.is_dir())


def _names(path: Path) -> list[str] | None:
    return read_json(path) if path.is_file() else None


def _trained_names(info: dict[str, Any]) -> list[str] | None:
    """The puzzle names of the dataset a checkpoint was trained on, if it is still there and the same."""
    if not Path(info["data"]["path"]).exists():
        return None
    store = datasets.load(info["data"]["path"])
    return store.identifiers if store.metadata.content_hash == info["data"]["hash"] else None


def _differences(model: RecursiveModel, source: Source) -> list[str]:
    """Settings that change no shape, in which the model differs from what the weights were trained with."""
    if source.settings is None:
        return []
    ours = model.config.model_dump()
    names = ours["name"], source.settings["name"]
    recursions = [_SAME_RECURSION.get(name, name) for name in names]
    different = [f"arch={names[1]} there, {names[0]} here"] if recursions[0] != recursions[1] else []
    shared = [key for key in _ARITHMETIC if key in ours and key in source.settings]
    return different + [f"arch.{key}={source.settings[key]} there, {ours[key]} here" for key in shared if ours[key] != source.settings[key]]


def _encoder_differences(model: RecursiveModel, source: Source) -> list[str]:
    """Settings in which the model's encoder differs from that of the weights."""
    ours = None if isinstance(model.context, PuzzleEmbedding) else model.context.config.model_dump()
    if ours is None or source.encoder is None:
        return ["pretrained_encoder=load: " + ("this model has no encoder" if ours is None else "there is none")]
    theirs = {key: field.default for key, field in type(model.context.config).model_fields.items() if not field.is_required()}
    theirs |= source.encoder
    keys = ["name"] if ours["name"] != theirs["name"] else sorted(ours.keys() | theirs.keys())
    return [f"encoder.{key}={theirs.get(key)} there, {ours.get(key)} here" for key in keys if theirs.get(key) != ours.get(key)]


def _matched_rows(theirs: Tensor, ours: Tensor, source: Source, identifiers: list[str], report: DecoderReport) -> Tensor:
    """This model's table with the rows of those puzzles that the file knows by the same name."""
    if source.identifiers is None or len(source.identifiers) != len(theirs):
        found = "no identifiers.json" if source.identifiers is None else f"identifiers.json with {len(source.identifiers)} names"
        place = "its dataset is not where it was, or has changed" if source.path.is_dir() else "put the one of its dataset beside it"
        raise UserError(
            f"{source.path} has {len(theirs)} puzzle rows but {found} to say whose they are: {place}, or start without rows "
            "(pretrained_puzzle_rows=skip)"
        )
    if theirs.shape[1] != ours.shape[1]:
        raise UserError(f"puzzle rows of {source.path} have width {theirs.shape[1]}, this model's {ours.shape[1]} (arch.puzzle_emb_ndim)")
    row_of = {name: row for row, name in enumerate(source.identifiers)}
    known = [row for row, name in enumerate(identifiers) if name in row_of]
    if all(identifiers[row] == datasets.BLANK_IDENTIFIER for row in known):  # every dataset has them
        raise UserError(f"none of the puzzles of {source.path} is in this dataset; pretrained_puzzle_rows=skip starts without rows")
    table = ours.clone()
    table[known] = theirs[torch.tensor([row_of[identifiers[row]] for row in known])].to(table)
    report.settings += f"; {len(known)} of {len(identifiers)} puzzle rows matched by name"
    return table
