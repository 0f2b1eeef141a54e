"""Another system's file becomes a checkpoint of this framework, to be evaluated, asked and started from."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from config.compose import as_overrides, load
from config.schema import PretrainConfig
from dataset.batch import DataSizes
from dataset.games import GAMES
from dataset.layouts import LAYOUTS
from dataset.leaks import UNKNOWN_PAIRS
from dataset.store import Store
from models.core import RecursiveModel
from models.foreign import ETRM, ROWS, SETTINGS, Foreign, read_foreign
from models.pretrained import load_decoder, load_strictly
from models.trm import ARCHITECTURES, build_model, count_parameters
from utils import checkpoint
from utils.distributed import World
from utils.environment import git_commit
from utils.errors import UserError
from utils.files import sha256_of

# The dataset configuration of each game, without an encoder; ARC's with one is `arc1`.
DATA = {"arc": "arc1_puzzle", "sudoku": "sudoku", "maze": "maze"}
CANVAS = {"arc": ["data.canvas=full"], "sudoku": [], "maze": []}
NAMES = {"hrm_act_v1": "hrm", "etrm": "etrm", "etrmtrm": "etrm"}  # of architectures, where they differ


def convert(path: Path, output: Path, data: Path | None, encoder: str | None, overrides: list[str]) -> Path:
    """Write the model of another system's file as a checkpoint in `output`, and return its path.

    data: a dataset that the rows of a model are matched with, by the names of its puzzles. Without one the
    table stays as it is, and belongs to no dataset.
    encoder: a new one beside the recursion of a first ETRM, whose own computes its context in another way.
    overrides: settings of the model that the file does not tell.

    Raises `UserError` where something is missing or does not fit.
    """
    foreign = read_foreign(path)
    if foreign.kind == ETRM and encoder is None:
        raise UserError(
            f"{path} is a first ETRM's: its encoder hands over another scale without a norm, and cannot be "
            "converted; --fresh-encoder NAME keeps its recursion beside a new one"
        )
    if encoder is not None and foreign.kind != ETRM:
        raise UserError(f"{path} is no first ETRM's, so it takes no --fresh-encoder")
    store = Store.load(data) if data else None
    config = load(PretrainConfig, "pretrain", [*_settings(foreign, store, encoder), *overrides])
    if not encoder and not (foreign.settings or {}).get("puzzle_emb_ndim", 1):
        config = config.model_copy(update={"arch": config.arch.model_copy(update={"puzzle_emb_ndim": 0})})
    sizes = _sizes(foreign, config, store)
    torch.manual_seed(config.seed)
    model = build_model(config.arch, sizes, config.encoder)
    by_name = store is not None and store.layout.learns_rows
    if by_name or encoder:
        config = config.model_copy(update={"load_pretrained_decoder": str(path)})
        print(load_decoder(model, config, store.identifiers if store and by_name else []).summary())
    else:
        load_strictly(model, foreign.best, path)
    # Files with one kind of weights hold averages, which evaluations report.
    raw = foreign.weights if foreign.averaged is not None else {}
    shared = {"trained_pairs": torch.from_numpy(UNKNOWN_PAIRS.view(np.int64).copy())}
    weights = {"raw": raw, "ema": model.state_dict()}
    info = _info(foreign, config, sizes, model, store)
    content = checkpoint.Content(weights, shared, {}, info)
    folder, keep = output / "checkpoints", checkpoint.Keep(newest=1)
    return checkpoint.save(folder, foreign.step or 0, World(), content, keep)


def _settings(foreign: Foreign, store: Store | None, encoder: str | None) -> list[str]:
    """The overrides of a training run with this model, as far as the file tells."""
    game = foreign.game
    if game is None:
        raise UserError(f"{foreign.path} has the vocabulary of no game, or no tokens at all")
    if store and store.metadata.game != game:
        raise UserError(f"{foreign.path} is a model of {game}, and {store.path} holds {store.metadata.game}")
    if foreign.settings is None:
        raise UserError(
            f"{foreign.path} has no {SETTINGS} beside it, which says how the weights are to be used"
        )
    theirs = dict(foreign.settings)
    name = NAMES.get(theirs["name"], theirs["name"])
    name = "etrm" if encoder else name
    if name not in ARCHITECTURES:
        raise UserError(f"{foreign.path}: there is no arch={theirs['name']} here")
    known = ARCHITECTURES[name][0].model_fields.keys() - {"name"}
    if encoder:
        known -= {"puzzle_emb_ndim", "puzzle_emb_len"}
    arch = {f"arch.{key}": value for key, value in theirs.items() if key in known}
    if not encoder and not theirs.get("puzzle_emb_ndim", 1):
        arch["arch.puzzle_emb_ndim"] = 1  # a run needs a row; `convert` takes it away again
    settings = [f"arch={name}", f"data={'arc1' if encoder else DATA[game]}", *as_overrides(arch)]
    settings += [f"encoder={encoder}"] if encoder else []
    side = _side(foreign, theirs)
    settings += CANVAS[game] if side is None else ["data.canvas=task", f"data.buckets=[{side}]"]
    return [*settings, *([f"data.path={store.path}"] if store else [])]


def _side(foreign: Foreign, settings: dict[str, Any]) -> int | None:
    """The side of the canvas, where a weight per position tells it."""
    weights = foreign.weights
    of_position = [value for name, value in weights.items() if name.endswith("mlp_t.down_proj.weight")]
    of_position += [weights["embed_pos.weight"]] if "embed_pos.weight" in weights else []
    if not of_position:
        return None
    rows, hidden = settings.get("puzzle_emb_ndim", 0), settings["hidden_size"]
    prefix = settings.get("puzzle_emb_len") or -(rows // -hidden)
    return round((len(of_position[0]) - prefix) ** 0.5)


def _sizes(foreign: Foreign, config: PretrainConfig, store: Store | None) -> DataSizes:
    """What the data decided of the model's shape: this dataset's, or the file's own."""
    if store:
        return DataSizes.of(store, config.data)
    rows = len(foreign.weights[ROWS]) if ROWS in foreign.weights else 1
    cells = config.data.sides[0] ** 2 if len(config.data.sides) == 1 else None
    assert foreign.game is not None, "a file without a game was refused"
    vocabulary = GAMES[foreign.game].vocabulary
    return DataSizes(vocabulary.size, rows, cells, vocabulary.eos)


def _info(
    foreign: Foreign, config: PretrainConfig, sizes: DataSizes, model: RecursiveModel, store: Store | None
) -> dict[str, Any]:
    """What the checkpoint says of itself, as that of a run does, and where it is from."""
    game = foreign.game
    layout = LAYOUTS["fewshot" if config.encoder else "puzzle" if game == "arc" else "pairs"]
    data = {
        "path": config.data.path,
        "layout": layout.name,
        "game": game,
        "protocol": "unknown",
        "hash": "unknown",
    }
    if store:
        metadata = store.metadata
        data |= {"layout": metadata.layout, "protocol": metadata.protocol, "hash": metadata.content_hash}
    return {
        "config": config.model_dump(),
        "sizes": vars(sizes),
        "data": data,
        "parameters": count_parameters(model),
        "optimizer": "unknown",
        "git_commit": None,
        "torch": torch.__version__,
        "device": "unknown",
        "scores": {},
        "converted_from": {
            "path": str(foreign.path),
            "kind": foreign.kind,
            "sha256": sha256_of(foreign.path),
            "by": git_commit(),
        },
    }
