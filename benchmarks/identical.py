"""The ETRM ancestor's mathematics in our layers: what it takes to give the same context, for a comparison like for like.

Its encoder attends to padding, turns queries and keys along one line of 2 x 900 cells, projects a pair's mean instead of
normalising it, and hands its tokens to the recursion sqrt(D) larger than ours. It encodes empty slots too, and then masks
what comes of them, which changes nothing and is not repeated here.
"""

import torch
from torch import Tensor, nn

from dataset.canvas import PAD
from models.core import RecursiveModel
from models.encoders.blocks import SelfBlock
from models.encoders.pairs import PairVectors
from models.encoders.pooled import PooledEncoder
from models.layers import Linear, Packed, Rotary

ENCODER = [
    "encoder=standard",
    "encoder.positions=rope",
    "encoder.attend_padding=true",
]  # what our configuration can say of it
ATTENTION = ("qkv_proj", "o_proj")
MLP = ("gate_up_proj", "down_proj")


class UnmaskedBlock(SelfBlock):
    """A block whose tokens attend to all others; without a mask the attention is faster."""

    def forward(self, x: Tensor, rotary: Rotary | None = None, mask: Tensor | Packed | None = None) -> Tensor:
        return super().forward(x, rotary)


class ProjectedVectors(PairVectors):
    """The mean of a pair's cells, without padding after all, projected."""

    def forward(self, data: dict[str, Tensor]) -> Tensor:
        read = self.pairs(data)
        real = torch.cat((data["demo_inputs"], data["demo_labels"]), dim=2) != PAD
        pooled = self.pool(read.tokens.flatten(0, 1), real.flatten(0, 1))
        return self.project(pooled).view(*read.tokens.shape[:2], -1)


class UnscaledEncoder(PooledEncoder):
    """The tokens at RMS 1."""

    @staticmethod
    def as_prefix(tokens: Tensor) -> Tensor:
        return tokens


def as_the_ancestor(model: RecursiveModel) -> RecursiveModel:
    """Turn an ETRM with the encoder of `ENCODER` into one that computes what the ancestor's does."""
    encoder = model.context
    encoder.__class__, encoder.vectors.__class__ = UnscaledEncoder, ProjectedVectors
    for layer in encoder.vectors.pairs.layers:
        layer.__class__ = UnmaskedBlock
    width = encoder.output.weight.shape[1]
    encoder.output, encoder.vectors.project = nn.Identity(), Linear(width, width)
    return model


def load_ancestor(model: RecursiveModel, weights: dict[str, Tensor]) -> None:
    """Give the encoder of an `as_the_ancestor` model the ancestor's weights, every one of them."""
    theirs = {
        name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")
    }
    ours = {
        "vectors.pairs.colours.0.weight": theirs.pop("grid_encoder.input_embed.embedding_weight"),
        "vectors.pairs.colours.1.weight": theirs.pop("grid_encoder.output_embed.embedding_weight"),
        "vectors.project.weight": theirs.pop("grid_encoder.pool_proj.weight"),
        "aggregate.queries": theirs.pop("set_encoder.query_tokens"),
    }
    for number in range(len(model.context.vectors.pairs.layers)):
        for name in ATTENTION:
            key = f"grid_encoder.layers.{number}.self_attn.{name}.weight"
            ours[f"vectors.pairs.layers.{number}.attention.branch.{name}.weight"] = theirs.pop(key)
        for name in MLP:
            ours[f"vectors.pairs.layers.{number}.mlp.branch.{name}.weight"] = theirs.pop(
                f"grid_encoder.layers.{number}.mlp.{name}.weight"
            )
    for number in range(len(model.context.aggregate.layers)):
        read, set_layer = f"aggregate.layers.{number}", f"set_encoder.layers.{number}"
        keys, values = (theirs.pop(f"{set_layer}.{name}.weight") for name in ("k_proj", "v_proj"))
        ours[f"{read}.read.branch.kv_proj.weight"] = torch.cat((keys, values))
        for name in ("q_proj", "o_proj"):
            ours[f"{read}.read.branch.{name}.weight"] = theirs.pop(f"{set_layer}.{name}.weight")
        for name in MLP:
            ours[f"{read}.mlp.branch.{name}.weight"] = theirs.pop(f"{set_layer}.mlp.{name}.weight")
    model.context.load_state_dict(ours)
    assert not theirs, f"no place for {', '.join(theirs)}"
