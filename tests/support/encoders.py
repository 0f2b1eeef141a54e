"""Every encoder and its options, small."""

import torch

from models.encoders import ENCODERS
from models.noise import WORD, Noise
from models.trm import DataSizes, RecursiveModel, build_model
from tests.support.models import SIDE
from tests.support.runs import TRAINER, load_config

SMALL = ["encoder.num_layers=1", "data.min_demos=2", "arch.halt_exploration_prob=1", "global_batch_size=4"]
DRAFTED = ["encoder.draft_places=[motions,falls]", "encoder.draft_conditions=[sizes,nearby,slides]"]
RELATED = ["arch.relations=[symmetries,neighbours]", "encoder.relations=[symmetries,neighbours]"]
CASES = {name: [f"encoder={name}", *SMALL] for name in ENCODERS} | {
    "memory as prefix": ["encoder=memory", "encoder.placement=prefix", *SMALL],
    "memory with relations": ["encoder=memory", "encoder.colour_path=true", *RELATED, *SMALL],
    "prefix with relations": [
        *("encoder=memory", "encoder.placement=prefix", "encoder.colour_path=true"),
        *RELATED,
        *SMALL,
    ],
    "standard with relations": ["encoder=standard", *RELATED, *SMALL],
    "memory with drafts": ["encoder=memory", *DRAFTED, *SMALL],
    "standard with drafts": ["encoder=standard", "encoder.pair_tokens=concatenated", *DRAFTED, *SMALL],
    "memory of single cells": [
        "encoder=memory",
        "encoder.pair_tokens=concatenated",
        "encoder.positions=rope",
        *SMALL,
    ],
    "standard attention": ["encoder=standard", "encoder.pooling_method=attention", *SMALL],
    "standard weighted": ["encoder=standard", "encoder.pooling_method=weighted", *SMALL],
    "every option": [
        *(
            "encoder=hybrid_standard",
            "encoder.shared_colours=true",
            "encoder.qk_norm=true",
            "encoder.layer_scale=0.1",
        ),
        *("encoder.norm=layer", "encoder.bottleneck=demonstration", "encoder.latent_dim=32"),
        *("encoder.hidden_size=24", "encoder.num_heads=3", *SMALL),
    ],
    "iterative recursive": [
        *(
            "encoder=iterative",
            "encoder.update=recursive",
            "encoder.H_cycles=3",
            "encoder.L_cycles=1",
            "encoder.smoothing=0.9",
            *SMALL,
        ),
    ],
}


def normal(batch: int, seed: int = 0):
    """Noise for tests."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(WORD, (batch,), generator=torch.Generator().manual_seed(seed))
    return Noise(lambda *shape: torch.randn(batch, *shape, generator=generator), lambda: keys)


def make_case(case: str, store, dtype: str = "float32", *overrides: str) -> RecursiveModel:
    """The model of one case, from the configuration that its `Trainer` has, too."""
    config = load_config(store, *TRAINER, *CASES[case], *overrides)
    torch.manual_seed(0)
    arch = config.arch.model_copy(update={"forward_dtype": dtype})
    return build_model(arch, DataSizes(12, store.metadata.num_puzzle_identifiers, SIDE**2), config.encoder)
