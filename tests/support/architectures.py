"""Every architecture, small, with every kind of context that it takes."""

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from config import compose
from config.schema import PretrainConfig
from dataset.batch import DataSizes
from models.context import PuzzleEmbedding
from models.core import RecursiveModel
from models.trm import build_model
from tests.support.models import SIDE, episodes
from training.ema import EMA
from training.optim import build_optimizers
from training.state import TrainState

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CPU = torch.device("cpu")
SIZES = DataSizes(12, 9, SIDE**2)
SMALL = ["arch.hidden_size=32", "arch.num_heads=2", "arch.halt_max_steps=3", "arch.forward_dtype=float32"]
SMALL += ["data.buckets=[6]", "data.augmentation=none", "global_batch_size=4", "lr_warmup_steps=1"]
CYCLES = {
    "trm": ["arch.H_cycles=2", "arch.L_cycles=2"],
    "trm_singlez": ["arch.H_cycles=2", "arch.L_cycles=2"],
    "trm_hier6": ["arch.H_cycles=2", "arch.L_cycles=3", "arch.num_latents=3"],
    "hrm": ["arch.H_layers=1", "arch.L_layers=2"],
    "transformers_baseline": ["arch.H_layers=2"],
    "trm001": ["arch.H_cycles=2", "arch.L_cycles=2"],
}
CONTEXTS = {"puzzle": ["arch.puzzle_emb_len=2"], "memory": ["encoder=memory", "arch.pos_encodings=rope2d"]}
MLP = ["arch.mlp_t=true", "arch.pos_encodings=none"]
CASES = {
    **{
        (arch, context): [f"arch={arch}", *CYCLES[arch], *CONTEXTS[context]]
        for arch in CYCLES
        for context in CONTEXTS
    },
    ("etrm", "memory"): ["arch=etrm", *CYCLES["trm"]],
    ("mlp_t", "puzzle"): ["arch=trm", *CYCLES["trm"], *CONTEXTS["puzzle"], *MLP],
    ("mlp_t", "standard"): ["arch=etrm", *CYCLES["trm"], "encoder=standard", *MLP],
}
del CASES["trm001", "puzzle"]  # it has an encoder by default
every_case = pytest.mark.parametrize("case", CASES, ids="-".join)


@functools.lru_cache
def config_of(*overrides: str, **arch) -> PretrainConfig:
    """A small configuration; `arch` replaces values of `arch.*` after composing, the slow part."""
    if arch:
        config = config_of(*overrides)
        return config.model_copy(update={"arch": config.arch.model_copy(update=arch)})
    return compose.load(PretrainConfig, "pretrain", [*SMALL, *overrides])


def model_of(config: PretrainConfig, seed: int = 0) -> RecursiveModel:
    torch.manual_seed(seed)
    model = build_model(config.arch, SIZES, config.encoder)
    # At its zero start the halting loss has no gradient for the state.
    torch.nn.init.normal_(model.q_head.weight, std=0.1)
    if isinstance(model.context, PuzzleEmbedding):
        torch.nn.init.normal_(model.context.weights, std=0.1)
    return model


def data_of(config: PretrainConfig, seed: int = 0) -> dict[str, Tensor]:
    data = episodes(seed=seed).data
    if config.encoder:
        return data
    return {name: value for name, value in data.items() if not name.startswith("demo")}


def train_state(config: PretrainConfig) -> TrainState:
    model = model_of(config)
    return TrainState(model, build_optimizers(model, config, CPU)[0], EMA(model, 0.9))
