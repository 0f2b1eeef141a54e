"""Weights from a file: checkpoints of this framework, and files of the original TRM, HRM and ETRM.

`load_checkpoint` restores a model whole. `load_decoder` starts a new model from another one, which may have
known its tasks in another way. What fits no weight of the model is refused, or reported.

    weights                        loaded
    recursion, embeddings, heads   always
    puzzle rows                    into a model with puzzle rows, by name, if pretrained_puzzle_rows=match
    encoder                        into a model with the same encoder, if pretrained_encoder=load
    rotary tables                  never, they are computed
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dataset.batch import DataSizes
from dataset.leaks import UNKNOWN_PAIRS
from dataset.store import BLANK_IDENTIFIER, Store
from models.arch import ForwardDtype
from models.context import EncoderConfig, PuzzleEmbedding
from models.core import RecursiveModel
from models.encoders import encoder_config
from models.foreign import ROWS, read_foreign
from models.trm import arch_config, build_model
from utils import checkpoint, hub
from utils.config import Config
from utils.errors import UserError

# Settings that some checkpoints are older than, with the values under which a model is what it was then.
_YOUNGER_ARCH: dict[str, Any] = {"relations": [], "dropout": 0.0, "carry_noise": 0.0}
_YOUNGER_OBJECTIVE: dict[str, Any] = {"differential_weight": 0.0}
_YOUNGER_DATA: dict[str, Any] = {"error_weighted": None, "error_interval": 100, "fresh": None}
_YOUNGER_ENCODER: dict[str, Any] = {"relations": [], "draft_places": [], "draft_conditions": []}
_YOUNGER_MEMORY: dict[str, Any] = {"colour_path": False}
# What changes the arithmetic of the recursion but the shape of no weight.
_ARITHMETIC = ("H_cycles", "L_cycles", "num_heads", "pos_encodings", "halt_pooling", "relations")
# Architectures with the recursion of another one, and the name by which HRM's own repository calls it.
_SAME_RECURSION = {"etrm": "trm", "etrmtrm": "trm", "trm001": "trm", "hrm_act_v1": "hrm"}


class PretrainedConfig(Config):
    """Where the weights of a new run come from, and which of them it takes.

    load_pretrained_decoder: a checkpoint or a file; null: weights are drawn.
    pretrained_mismatch: refuse or allow weights that do not fit, and weights that were trained with other
        arithmetic. That is other cycles, heads, positions, or pooling for halting.
    pretrained_puzzle_rows: a model with puzzle rows takes them by their puzzles' names, or starts without.
    pretrained_encoder: a model with the same encoder takes its weights, too, to train on with other data.
    """

    load_pretrained_decoder: str | None
    pretrained_mismatch: Literal["refuse", "allow"]
    pretrained_puzzle_rows: Literal["match", "skip"]
    pretrained_encoder: Literal["load", "skip"]


@dataclass
class Source:
    """Weights under our names, and what is known of their training.

    which: raw or averaged (ema) weights, in words.
    settings: `arch.*` of their training; None: unknown.
    identifiers: the names of their puzzle rows; None: unknown.
    encoder: `encoder.*` of their training; None: unknown, or there was none.
    """

    path: Path
    weights: dict[str, Tensor]
    which: str
    settings: dict[str, Any] | None
    identifiers: list[str] | None
    encoder: dict[str, Any] | None = None


@dataclass
class DecoderReport:
    """What became of every weight, and which settings differ from those the weights were trained with.

    loaded: names of this model's weights that came from the file.
    missing: names of those that keep their initial values.
    skipped: names in the file -> why.
    differing: what does not fit, in words.
    """

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
            f"decoder from {self.path} ({self.weights} weights): {len(self.loaded)} tensors loaded, "
            f"{len(self.skipped)} skipped, {len(self.missing)} left at their initial values; {self.settings}"
        ]
        reasons = list(self.skipped.values())
        lines += [f"skipped {reasons.count(reason)}: {reason}" for reason in dict.fromkeys(reasons)]
        lines += [f"differs: {text}" for text in self.differing]
        return "\n".join(lines)


def trained_config(info: dict[str, Any]) -> dict[str, Any]:
    """The configuration behind a checkpoint's `info`, as a run of this version would state it.

    Settings that are younger than the checkpoint are said to be off. Nothing else is filled in.
    """
    config = info["config"]
    encoder = config["encoder"]
    if encoder:
        of_kind = _YOUNGER_MEMORY if encoder["name"] == "memory" else {}
        encoder = {**_YOUNGER_ENCODER, **of_kind, **encoder}
        if encoder.pop("evidence", None):
            raise UserError("the model reads encoder.evidence, in whose place came encoder.draft_places")
    return {
        **config,
        "arch": {**_YOUNGER_ARCH, **config["arch"]},
        "encoder": encoder,
        "objective": {**_YOUNGER_OBJECTIVE, **config["objective"]},
        "data": {**_YOUNGER_DATA, **config["data"]},
    }


def load_checkpoint(
    path: Path, weights: str, forward_dtype: ForwardDtype | None = None
) -> tuple[RecursiveModel, dict[str, Any]]:
    """A model in evaluation mode from a checkpoint of this framework, and the checkpoint's info.

    The model is built from the configuration stored with it (`trained_config`). One that does not describe
    the weights is an error.

    weights: `ema` or `raw`. forward_dtype: float32 or bfloat16; None: as in training.
    """
    info = checkpoint.load_info(path)
    try:
        config = trained_config(info)
        arch = config["arch"] | ({"forward_dtype": forward_dtype} if forward_dtype else {})
        encoder = config["encoder"] and encoder_config(config["encoder"])
        model = build_model(arch_config(arch), DataSizes(**info["sizes"]), encoder)
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
    """Give a new model the weights of `load_pretrained_decoder`, and say what became of each.

    Raises `UserError`, and changes nothing, when settings or weights do not fit (unless `pretrained_mismatch`
    allows it), or when rows cannot be matched by name.

    identifiers: the names of this model's puzzle rows.
    """
    assert config.load_pretrained_decoder is not None, "there is nothing to load"
    source = _open(Path(config.load_pretrained_decoder))
    with_encoder = config.pretrained_encoder == "load"
    compared = "its configuration was compared"
    if not source.settings:
        compared = "no configuration beside it, so that cycles could not be compared"
    report = DecoderReport(str(source.path), source.which, compared, differing=_differences(model, source))
    if with_encoder:
        report.differing += _encoder_differences(model, source)
    own = model.state_dict()
    new: dict[str, Tensor] = {}
    for name, value in source.weights.items():
        if reason := _reason_to_skip(name, own, model, config):
            report.skipped[name] = reason
        elif name == ROWS:
            new[name] = _matched_rows(value, own[name], source, identifiers, report)
        elif value.shape != own[name].shape:
            here, there = tuple(own[name].shape), tuple(value.shape)
            report.skipped[name] = f"its shape {there} is not this model's {here}"
            report.differing.append(f"{name} has shape {there} there, {here} here")
        else:
            new[name] = value
    report.loaded = sorted(new)
    report.missing = sorted(own.keys() - new.keys())
    # A decoder is whole without the model's own context, and what was skipped has been named already.
    expected = [name for name in report.missing if with_encoder or not name.startswith("context.")]
    report.differing += [f"{name} is not in the file" for name in expected if name not in report.skipped]
    if report.differing and config.pretrained_mismatch == "refuse":
        shown = "; ".join(report.differing[:6]) + ("; ..." if len(report.differing) > 6 else "")
        raise UserError(
            f"{source.path} does not fit this model: {shown}. pretrained_mismatch=allow loads what fits"
        )
    # Until here nothing has been changed.
    model.load_state_dict(own | {name: value.to(own[name].dtype) for name, value in new.items()})
    return report


def _reason_to_skip(
    name: str, own: dict[str, Tensor], model: RecursiveModel, config: PretrainedConfig
) -> str | None:
    """Why a weight of the file has no place among the model's `own`, whatever its shape; None: it has one."""
    if name == ROWS:
        if not isinstance(model.context, PuzzleEmbedding):
            return "puzzle rows: this model has an encoder"
        return None if config.pretrained_puzzle_rows == "match" else "puzzle rows, as configured"
    if name.startswith(("context.", "encoder.")) and config.pretrained_encoder != "load":
        return "what the file's model computed its context with"
    if name.startswith("rotary_emb."):
        return "positions are computed"
    if name not in own:
        return f"arch={model.config.name} has no such weight"
    return None


def _open(path: Path) -> Source:
    """Read a checkpoint or run folder of ours, or another system's file (models/foreign.py)."""
    if _is_checkpoint(path):
        folder = checkpoint.resolve(path)
        info = checkpoint.load_info(folder)
        # The averaged weights are those that evaluations report.
        which = checkpoint.best_kind(folder)
        weights, config = checkpoint.load_weights(folder, which), trained_config(info)
        return Source(folder, weights, which, config["arch"], _trained_names(info), config["encoder"])
    foreign = read_foreign(path)
    which = "the file's" if foreign.averaged is None else "ema"
    return Source(path, foreign.best, which, foreign.settings, foreign.identifiers)


def pairs_behind(path: Path) -> np.ndarray:
    """The fingerprints (N,) uint64 of all pairs that weights for `load_decoder` were trained on.

    An original's file does not say; then they are `UNKNOWN_PAIRS`.
    """
    return checkpoint.load_trained_pairs(checkpoint.resolve(path)) if _is_checkpoint(path) else UNKNOWN_PAIRS


def _is_checkpoint(path: Path) -> bool:
    """Whether `path` is one of this framework, rather than an original's file. `RUN/best` is only a name, and
    so is one of the hub."""
    return hub.is_reference(path) or path.is_dir() or (path.name == checkpoint.BEST and path.parent.is_dir())


def _trained_names(info: dict[str, Any]) -> list[str] | None:
    """The puzzle names of the dataset a checkpoint was trained on, if it is still there and the same."""
    if not Path(info["data"]["path"]).exists():
        return None
    store = Store.load(info["data"]["path"])
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
    return different + [
        f"arch.{key}={source.settings[key]} there, {ours[key]} here"
        for key in shared
        if ours[key] != source.settings[key]
    ]


def _encoder_differences(model: RecursiveModel, source: Source) -> list[str]:
    """Settings in which the model's encoder differs from that of the weights."""
    settings = getattr(model.context, "config", None)
    ours = settings.model_dump() if isinstance(settings, EncoderConfig) else None
    if ours is None or source.encoder is None:
        return [
            "pretrained_encoder=load: " + ("this model has no encoder" if ours is None else "there is none")
        ]
    keys = ["name"] if ours["name"] != source.encoder["name"] else sorted(ours.keys() | source.encoder.keys())
    return [
        f"encoder.{key}={source.encoder.get(key)} there, {ours.get(key)} here"
        for key in keys
        if source.encoder.get(key) != ours.get(key)
    ]


def _matched_rows(
    theirs: Tensor, ours: Tensor, source: Source, identifiers: list[str], report: DecoderReport
) -> Tensor:
    """This model's table with the rows of those puzzles that the file knows by the same name."""
    names = source.identifiers
    if names is None or len(names) != len(theirs):
        found = "no identifiers.json" if names is None else f"identifiers.json with {len(names)} names"
        advice = "put the one of its dataset beside it"
        if source.path.is_dir():
            advice = "its dataset is not where it was, or has changed"
        raise UserError(
            f"{source.path} has {len(theirs)} puzzle rows but {found} to say whose they are: {advice}, "
            "or start without rows (pretrained_puzzle_rows=skip)"
        )
    if theirs.shape[1] != ours.shape[1]:
        raise UserError(
            f"puzzle rows of {source.path} have width {theirs.shape[1]}, "
            f"this model's {ours.shape[1]} (arch.puzzle_emb_ndim)"
        )
    row_of = {name: row for row, name in enumerate(names)}
    known = [row for row, name in enumerate(identifiers) if name in row_of]
    # Every dataset has blank identifiers, so that they match without meaning anything.
    if all(identifiers[row] == BLANK_IDENTIFIER for row in known):
        raise UserError(
            f"none of the puzzles of {source.path} is in this dataset; "
            "pretrained_puzzle_rows=skip starts without rows"
        )
    table = ours.clone()
    table[known] = theirs[torch.tensor([row_of[identifiers[row]] for row in known])].to(table)
    report.settings += f"; {len(known)} of {len(identifiers)} puzzle rows matched by name"
    return table
