"""The `memory` encoder: every demonstration cell stays a token that the recursion can look up.

Nothing is pooled.

Shapes: B batch, K demonstrations, N tokens of a pair, M = K * N, D hidden.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from dataset.batch import BatchData
from models.arch import ArchConfig
from models.colours import NO_COLOUR
from models.context import Context, ContextModule
from models.encoders.pairs import PairConfig, PairEncoder
from models.layers import truncated_normal
from models.relations import after_registers, moved, places_of


class MemoryEncoderConfig(PairConfig):
    """Where the tokens of the demonstrations go.

    placement: `memory` gives them as extra keys and values, computed once per ACT step. `prefix` makes them
        part of the recursive state.
    colour_path: the recursion is handed, at each cell of the query, the mean of the tokens whose input shows
        that cell's colour (models/colours.py).
    """

    name: Literal["memory"]
    placement: Literal["memory", "prefix"]
    colour_path: bool

    needs_layers: ClassVar[bool] = False

    @property
    def gives_memory(self) -> bool:
        return self.placement == "memory"

    @property
    def prefix_grows(self) -> bool:
        return self.placement == "prefix"

    @property
    def tells_colours(self) -> bool:
        return self.colour_path


class MemoryEncoder(ContextModule):
    """One register token as prefix, and all demonstration cells as memory or as prefix.

    The register stands at position 0, which feeds the q_head.
    """

    def __init__(self, config: MemoryEncoderConfig, arch: ArchConfig):
        super().__init__()
        self.config, self.relations = config, arch.relations
        self.pairs = PairEncoder(config, arch, arch.hidden_size, arch.num_heads)
        self.register = nn.Parameter(truncated_normal(1, arch.hidden_size, std=1.0))

    def prefix_length(self, demos: int, cells: int) -> int:
        tokens = demos * cells * (1 if self.config.pair_tokens == "summed" else 2)
        return 1 + (tokens if self.config.placement == "prefix" else 0)

    def forward(self, data: BatchData, state: dict[str, Tensor] | None = None) -> Context:
        read = self.pairs(data)
        tokens = rearrange(read.tokens, "b k n d -> b (k n) d")
        valid = rearrange(read.valid, "b k n -> b (k n)")
        cells = repeat(read.cells, "n -> (k n)", k=read.tokens.shape[1])
        register = repeat(self.register.to(tokens.dtype), "p d -> b p d", b=len(tokens))
        per_cell = read.tokens.shape[2] // data["demo_inputs"].shape[2]
        colours = self._colours(data, per_cell)
        if self.config.placement == "memory":
            return Context(
                prefix=self.as_prefix(register),
                memory=tokens,
                memory_mask=valid,
                memory_cells=cells,
                colours=colours,
            )
        # The register is a token even where there is no demonstration.
        always = torch.ones_like(valid[:, :1])
        return Context(
            prefix=self.as_prefix(torch.cat((register, tokens), 1)),
            prefix_mask=torch.cat((always, valid), 1),
            prefix_cells=cells,
            prefix_places=self._places(data["demo_inputs"], per_cell),
            colours=None if colours is None else F.pad(colours, (1, 0), value=NO_COLOUR),
        )

    def _colours(self, data: BatchData, per_cell: int) -> Tensor | None:
        """What the tokens show (B, T), `per_cell` of which stand for each cell; None: nobody asks."""
        if not self.config.colour_path:
            return None
        return repeat(data["demo_inputs"], "b k l -> b (k grid l)", grid=per_cell)

    def _places(self, inputs: Tensor, per_cell: int) -> Tensor | None:
        """The core's places (B, P, R) for its prefix: tokens of a pair have those of its input (B, K, L)."""
        if not self.relations:
            return None
        batch, demos, cells = inputs.shape
        places = places_of(self.relations, rearrange(inputs, "b k l -> (b k) l"))
        places = repeat(places, "(b k) l r -> b k (grid l) r", b=batch, grid=per_cell)
        start = per_cell * cells * torch.arange(demos, device=inputs.device)
        places = moved(places, rearrange(start, "k -> k 1 1"))
        return after_registers(rearrange(places, "b k n r -> b (k n) r"), 1)
