"""Settings of encoders and objectives that cannot work, or would not be read, are refused."""

import re

import pytest
from pydantic import ValidationError

from config.schema import PretrainConfig
from tests.support.encoders import CASES
from tests.support.runs import TRAINER, load_config


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("standard", {"shared_colours": True, "pair_tokens": "summed"}, "cannot tell input from output"),
        ("memory", {"shared_colours": True}, "cannot tell input from output"),
        ("standard", {"set_layers": 0}, "set_layers=0 does not fit encoder.aggregator=queries"),
        ("standard", {"variational": True, "initial_sigma": 0.03}, "needs a latent"),
        ("lpn", {"latent_dim": None}, "encoder.latent_dim must be given with an encoder.bottleneck"),
        ("lpn_var", {"initial_sigma": None}, "encoder.initial_sigma must be given with encoder.variational"),
        (
            "iterative recursive",
            {"H_cycles": None},
            "encoder.H_cycles must be given with encoder.update=recursive",
        ),
        ("lpn", {"num_heads": None}, "belong together"),
        ("lpn", {"num_heads": 64}, "divisible by 4 * encoder.num_heads=64"),
        ("perceiver", {"num_layers": 0, "positions": "rope2d"}, "would not see where cells are"),
        ("iterative", {"smoothing": 1.0}, "less than 1"),
        ("lpn", {"latent_dims": 8}, "Extra inputs are not permitted"),
    ],
)
def test_encoder_settings_that_cannot_work_say_so(name, changes, words, fewshot):
    config = load_config(fewshot, *TRAINER, *CASES[name]).encoder
    with pytest.raises(ValidationError, match=re.escape(words)):
        type(config)(**(config.model_dump() | changes))


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("standard", {"latent_dim": 512}, "encoder.latent_dim=512 is read only with an encoder.bottleneck"),
        ("lpn", {"initial_sigma": 0.1}, "encoder.initial_sigma=0.1 is read only with encoder.variational"),
        ("iterative", {"H_cycles": 6}, "encoder.H_cycles=6 is read only with encoder.update=recursive"),
    ],
)
def test_a_run_is_not_given_what_its_encoder_does_not_read(name, changes, words, fewshot):
    config = load_config(fewshot, *TRAINER, *CASES[name])
    encoder = type(config.encoder)(
        **(config.encoder.model_dump() | changes)
    )  # a checkpoint of an earlier version holds it
    with pytest.raises(ValidationError, match=re.escape(words)):
        PretrainConfig(**(config.model_dump() | {"encoder": encoder}))


def test_an_objective_without_anything_to_weigh_is_refused(fewshot, puzzle):
    for store, changes, words in (
        (fewshot, {"kl_weight": 0.1}, "weighs nothing: the context is not variational"),
        (puzzle, {"reconstruct_weight": 1.0}, "reconstruct_weight=1.0 needs demonstrations"),
        (puzzle, {"contrastive_weight": 1.0}, "contrastive_weight=1.0 needs demonstrations"),
    ):
        values = load_config(store).model_dump()
        with pytest.raises(ValidationError, match=re.escape(words)):
            PretrainConfig(**(values | {"objective": values["objective"] | changes}))
