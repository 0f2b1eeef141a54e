"""The ETRM ancestor's mathematics in our layers, so that speeds are compared like for like.

The ancestor's encoder differs from ours in four ways:

- it attends to padding;
- it rotates queries and keys along one line of 2 x 900 cells;
- it projects the mean of a pair instead of normalising it;
- it hands its tokens to the recursion sqrt(D) larger than ours.

It also encodes empty slots and masks the result. That changes nothing and is not repeated here.
"""

import torch
from torch import Tensor, nn

from dataset.canvas import PAD
from models.core import RecursiveModel
from models.encoders.blocks import SelfBlock
from models.encoders.pairs import PairVectors
from models.encoders.pooled import PooledEncoder
from models.layers import Linear, Packed
from models.positions import Rotary
from models.relations import Index

# The differences that our configuration can express.
ENCODER = ["encoder=standard", "encoder.positions=rope", "encoder.attend_padding=true"]
ATTENTION = ("qkv_proj", "o_proj")
MLP = ("gate_up_proj", "down_proj")


class UnmaskedBlock(SelfBlock):
    """A block whose tokens attend to all others. Attention without a mask is faster."""

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None = None,
        mask: Tensor | Packed | None = None,
        index: Index | None = None,
    ) -> Tensor:
        return super().forward(x, rotary, index=index)


class ProjectedVectors(PairVectors):
    """The projected mean of a pair's cells. Padding, though attended to, is not part of the mean."""

    def forward(self, data: dict[str, Tensor]) -> Tensor:
        read = self.pairs(data)
        real = torch.cat((data["demo_inputs"], data["demo_labels"]), dim=2) != PAD
        pooled = self.pool(read.tokens.flatten(0, 1), real.flatten(0, 1))
        return self.project(pooled).view(*read.tokens.shape[:2], -1)


class UnscaledEncoder(PooledEncoder):
    """The tokens at RMS 1, as they are."""

    @staticmethod
    def as_prefix(tokens: Tensor) -> Tensor:
        return tokens


def as_the_ancestor(model: RecursiveModel) -> RecursiveModel:
    """Turn an ETRM with the encoder of `ENCODER` into one that computes what the ancestor's does."""
    encoder = model.context
    # In place, by exchanging classes: the weights and the rest of the model stay as they were built.
    encoder.__class__, encoder.vectors.__class__ = UnscaledEncoder, ProjectedVectors
    for layer in encoder.vectors.pairs.layers:
        layer.__class__ = UnmaskedBlock
    width = encoder.output.weight.shape[1]
    encoder.output, encoder.vectors.project = nn.Identity(), Linear(width, width)
    return model


def load_ancestor(model: RecursiveModel, weights: dict[str, Tensor]) -> None:
    """Give the encoder of an `as_the_ancestor` model all of the ancestor's encoder weights."""
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
        # Ours projects keys and values at once.
        ours[f"{read}.read.branch.kv_proj.weight"] = torch.cat((keys, values))
        for name in ("q_proj", "o_proj"):
            ours[f"{read}.read.branch.{name}.weight"] = theirs.pop(f"{set_layer}.{name}.weight")
        for name in MLP:
            ours[f"{read}.mlp.branch.{name}.weight"] = theirs.pop(f"{set_layer}.mlp.{name}.weight")
    model.context.load_state_dict(ours)
    # What is left over would make the contexts differ.
    assert not theirs, f"no place for {', '.join(theirs)}"
