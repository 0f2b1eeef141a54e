"""The `memory` encoder: every demonstration cell stays a token that the recursion can look up. Nothing is pooled.

Shapes: B batch, K demonstrations, N tokens of a pair, M = K * N, D hidden.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from models.colours import ColourPath
from models.context import Context, ContextModule
from models.encoders.pairs import PairConfig, PairEncoder
from models.layers import truncated_normal
from models.relations import NONE, Relations, moved, places_of

if TYPE_CHECKING:
    from models.core import ArchConfig


class MemoryEncoderConfig(PairConfig):
    """placement: `memory` gives the tokens as extra keys and values, computed once per ACT step; `prefix` makes them part
    of the recursive state. colour_path: the recursion is handed, at each cell of the query, the mean of the tokens whose input
    shows that cell's colour (models/colours.py). evidence: relations at whose places that path looks for the colour, too, as
    far as they explain the demonstrations.
    """

    name: Literal["memory"]
    placement: Literal["memory", "prefix"]
    colour_path: bool = False  # what checkpoints from before there was one have
    evidence: Relations = []

    needs_layers: ClassVar[bool] = False

    @model_validator(mode="after")
    def _check_evidence(self) -> "MemoryEncoderConfig":
        if self.evidence and not self.colour_path:
            raise ValueError(f"encoder.evidence={self.evidence} is that of encoder.colour_path, which is false")
        return self

    @property
    def gives_memory(self) -> bool:
        return self.placement == "memory"

    @property
    def gives_colours(self) -> bool:
        return self.colour_path

    @property
    def prefix_grows(self) -> bool:
        return self.placement == "prefix"


class MemoryEncoder(ContextModule):
    """One register token as prefix (position 0 feeds the q_head) and all demonstration cells as memory or as prefix."""

    def __init__(self, config: MemoryEncoderConfig, arch: "ArchConfig"):
        super().__init__()
        self.config, self.relations = config, arch.relations
        self.pairs = PairEncoder(config, arch, arch.hidden_size, arch.num_heads)
        self.register = nn.Parameter(truncated_normal(1, arch.hidden_size, std=1.0))

    def prefix_length(self, demos: int, cells: int) -> int:
        tokens = demos * cells * (1 if self.config.pair_tokens == "summed" else 2)
        return 1 + (tokens if self.config.placement == "prefix" else 0)

    def forward(self, data: dict[str, Tensor], state: dict[str, Tensor] | None = None) -> Context:
        read = self.pairs(data)
        tokens, valid, cells = read.tokens.flatten(1, 2), read.valid.flatten(1), read.cells.repeat(read.tokens.shape[1])
        register = self.register.to(tokens.dtype).expand(len(tokens), 1, -1)
        inputs = data["demo_inputs"]
        colours = self._colours(data, len(read.cells)) if self.config.colour_path else None
        if self.config.placement == "memory":
            return Context(prefix=self.as_prefix(register), memory=tokens, memory_mask=valid, memory_cells=cells, colours=colours)
        always = torch.ones_like(valid[:, :1])
        return Context(
            prefix=self.as_prefix(torch.cat((register, tokens), 1)),
            prefix_mask=torch.cat((always, valid), 1),
            prefix_cells=cells,
            prefix_places=self._places(inputs, len(read.cells)) if self.relations else None,
            colours=colours and colours.after_registers(1),
        )

    def _colours(self, data: dict[str, Tensor], tokens: int) -> ColourPath:
        path = ColourPath.read(data, self.config.evidence)
        demos, cells = data["demo_inputs"].shape[1:]
        of_pairs = path.of_tokens.unflatten(2, (demos, cells))
        return path.map(of_pairs.repeat(1, 1, 1, tokens // cells).flatten(2))

    def _places(self, inputs: Tensor, tokens: int) -> Tensor:
        """The core's places (B, P, R) for its prefix: each pair's tokens have those of their own input (B, K, L)."""
        batch, demos, cells = inputs.shape
        places = places_of(self.relations, inputs.flatten(0, 1)).repeat(1, tokens // cells, 1).unflatten(0, (batch, demos))
        start = 1 + tokens * torch.arange(demos, device=inputs.device)
        return F.pad(moved(places, start[:, None, None]).flatten(1, 2), (0, 0, 1, 0), value=NONE)
