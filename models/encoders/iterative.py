"""The `iterative` encoder: its tokens are a recurrent state that every ACT step refines once more.

The state travels in the carry, detached. The context is computed from it with gradient at every step, which
the recurrent encoders of the ancestor cut off.
Shapes: B batch, K demonstrations, P output tokens, D hidden.
"""

from typing import Annotated, Literal

from einops import repeat
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from dataset.batch import BatchData
from models.arch import ArchConfig
from models.context import Context, ContextModule
from models.encoders.blocks import ReadBlock, SelfBlock
from models.encoders.pairs import POOLING, MeanPool, PairConfig, PairVectors
from models.layers import rms_norm, truncated_normal
from models.noise import Noise


class IterativeEncoderConfig(PairConfig):
    """How the tokens are refined.

    update: what one ACT step does, `read` (the ancestor's recurrent_standard) or `recursive` (its trm_style).
        read: the tokens read the demonstrations' vectors.
        recursive: two levels as in the core, all updates with gradient. The context is updated `H_cycles`
        times, each time after `L_cycles` updates of a latent, into which the mean demonstration is added.
    update_layers: blocks of an update.
    smoothing: the share of the previous state that is kept (0.9 in the ancestor).
    learned_start: whether the initial state is trained.
    """

    name: Literal["iterative"]
    pooling_method: POOLING
    output_tokens: PositiveInt
    update: Literal["read", "recursive"]
    update_layers: PositiveInt
    H_cycles: PositiveInt | None
    L_cycles: PositiveInt | None
    smoothing: Annotated[float, Field(ge=0, lt=1)]
    learned_start: bool

    @property
    def readers(self) -> dict[str, tuple[str, bool]]:
        recursive = "encoder.update=recursive", self.update == "recursive"
        return {"H_cycles": recursive, "L_cycles": recursive}


class ReadUpdate(nn.Module):
    """One level, `context`: it reads the set of demonstrations."""

    levels = ("context",)

    def __init__(self, config: IterativeEncoderConfig, arch: ArchConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            ReadBlock(arch.hidden_size, arch.num_heads, arch.expansion, config)
            for _ in range(config.update_layers)
        )

    def forward(self, state: dict[str, Tensor], members: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = state["context"]
        for layer in self.layers:
            x = layer(x, members, mask)
        return {"context": self.config.final_norm(x)}


class RecursiveUpdate(nn.Module):
    """Two levels, `context` and `latent`, refined in turn by the same blocks."""

    levels = ("context", "latent")

    def __init__(self, config: IterativeEncoderConfig, arch: ArchConfig):
        super().__init__()
        self.config, self.pool = config, MeanPool()
        self.layers = nn.ModuleList(
            SelfBlock(arch.hidden_size, arch.num_heads, arch.expansion, config)
            for _ in range(config.update_layers)
        )

    def forward(self, state: dict[str, Tensor], members: Tensor, mask: Tensor) -> dict[str, Tensor]:
        shown = self.pool(members, mask)[:, None]
        context, latent = state["context"], state["latent"]
        cycles, updates = self.config.H_cycles, self.config.L_cycles
        assert cycles is not None and updates is not None, (
            "the configuration asks for them with update=recursive"
        )
        for _ in range(cycles):
            for _ in range(updates):
                latent = self._level(latent + context + shown)
            context = self._level(context + latent)
        return {"context": context, "latent": latent}

    def _level(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.config.final_norm(x)


class IterativeEncoder(ContextModule):
    """P prefix tokens, invariant to the order of the demonstrations and to empty slots."""

    refines = True

    def __init__(self, config: IterativeEncoderConfig, arch: ArchConfig):
        super().__init__()
        self.config, self.dtype = config, arch.dtype
        self.vectors = PairVectors(config, config.pooling_method, arch, arch.hidden_size, arch.num_heads)
        updates: dict[str, type[ReadUpdate] | type[RecursiveUpdate]]
        updates = {"read": ReadUpdate, "recursive": RecursiveUpdate}
        self.update = update = updates[config.update](config, arch)
        self.start = nn.ParameterDict(
            {
                level: nn.Parameter(
                    truncated_normal(config.output_tokens, arch.hidden_size, std=1.0),
                    requires_grad=config.learned_start,
                )
                for level in update.levels
            }
        )

    def prefix_length(self, demos: int, cells: int) -> int:
        return self.config.output_tokens

    def initial_state(self, data: BatchData, noise: Noise | None = None) -> dict[str, Tensor]:
        batch = len(data["demo_mask"])
        starts = {level: start.to(self.dtype) for level, start in self.start.items()}
        return {level: repeat(start, "p d -> b p d", b=batch) for level, start in starts.items()}

    def forward(self, data: BatchData, state: dict[str, Tensor] | None = None) -> Context:
        before = state or self.initial_state(data)
        after = self.update(before, self.vectors(data), data["demo_mask"])
        # What is kept of earlier steps has no gradient; the update of this one has.
        keep = self.config.smoothing
        after = {level: keep * before[level] + (1 - keep) * value for level, value in after.items()}
        return Context(
            prefix=self.as_prefix(rms_norm(after["context"])),
            state={level: x.detach() for level, x in after.items()},
        )
