"""The architectures: which networks and states each has, and how it updates a state. Each is one class.

    here            paper   meaning
    z_H             y       answer state, read by lm_head
    z_L             z       latent reasoning state
    L_cycles        n       latent updates before each answer update
    H_cycles        T       answer updates per ACT step, the last `grad_cycles` of them with gradient
    halt_max_steps  N_sup   ACT steps (supervision steps) per sample at most

Source: "Less is More: Recursive Reasoning with Tiny Networks" (arXiv 2510.04871), whose code also has the
ablations, and "Hierarchical Reasoning Model" (arXiv 2506.21734). Each matches the original code numerically.
"""

from typing import Any

from pydantic import PositiveInt, model_validator
from torch import Tensor

from dataset.batch import DataSizes
from models.arch import ArchConfig
from models.context import EncoderConfig, PuzzleEmbedding
from models.core import Apply, RecursiveModel, States


class TRMConfig(ArchConfig):
    """How large the one network is, and how often it is applied.

    L_layers: blocks of the network.
    H_cycles, L_cycles: as above.
    grad_cycles: H cycles, from the last, that carry a gradient (1 in the paper).
    """

    L_layers: PositiveInt
    H_cycles: PositiveInt
    L_cycles: PositiveInt
    grad_cycles: PositiveInt

    @model_validator(mode="after")
    def _check_cycles(self) -> "TRMConfig":
        if self.grad_cycles > self.H_cycles:
            raise ValueError(
                f"arch.grad_cycles={self.grad_cycles} is larger than arch.H_cycles={self.H_cycles}"
            )
        return self


class TRM(RecursiveModel):
    """One network updates the latent state from everything, and the answer from the latent state."""

    networks = {"L_level": "L_layers"}
    config: TRMConfig

    @property
    def updates(self) -> tuple[int, int, int]:
        config = self.config
        answers, latent = self.cycles or (config.H_cycles, config.L_cycles)
        return latent, answers, min(config.grad_cycles, answers) * (latent + 1)

    def think(self, states: States, tokens: Tensor, step: int, apply: Apply) -> States:
        z_H, z_L = states
        return z_H, apply("L_level", z_L, z_H + tokens)

    def answer(self, states: States, tokens: Tensor, apply: Apply) -> States:
        z_H, z_L = states
        return apply("L_level", z_H, z_L), z_L


class ETRM(TRM):
    """A TRM whose context is computed from the task's own demonstrations, so that any task can be asked."""

    def __init__(self, config: TRMConfig, sizes: DataSizes, encoder: EncoderConfig):
        super().__init__(config, sizes, encoder)


class SingleStateTRM(TRM):
    """Answer and latent state are one: the paper's ablation of the split."""

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("L",)

    def think(self, states: States, tokens: Tensor, step: int, apply: Apply) -> States:
        return (apply("L_level", states[0], tokens),)

    def answer(self, states: States, tokens: Tensor, apply: Apply) -> States:
        return (apply("L_level", states[0], None),)


class ManyLatentsConfig(TRMConfig):
    """num_latents: latent states, updated in turn, every one at least once per cycle."""

    num_latents: PositiveInt

    @model_validator(mode="after")
    def _check_latents(self) -> "ManyLatentsConfig":
        if self.num_latents > self.L_cycles:
            raise ValueError(
                f"arch.num_latents={self.num_latents} needs arch.L_cycles of at least that, "
                f"found {self.L_cycles}"
            )
        return self


class ManyLatentsTRM(TRM):
    """Several latent states. Each update reads their sum and replaces one. The paper's ablation has six."""

    config: ManyLatentsConfig

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("H", *(f"L{number}" for number in range(1, self.config.num_latents + 1)))

    def think(self, states: States, tokens: Tensor, step: int, apply: Apply) -> States:
        z_H, *z_L = states
        z_L[step % len(z_L)] = apply("L_level", sum(z_L[1:], z_L[0]), z_H + tokens)
        return z_H, *z_L

    def answer(self, states: States, tokens: Tensor, apply: Apply) -> States:
        z_H, *z_L = states
        return apply("L_level", z_H, sum(z_L[1:], z_L[0])), *z_L


class HRMConfig(ArchConfig):
    """H_layers, L_layers: blocks of the slow and of the fast network."""

    H_layers: PositiveInt
    L_layers: PositiveInt
    H_cycles: PositiveInt
    L_cycles: PositiveInt


class HRM(TRM):
    """Two networks, a slow one for the answer and a fast one for the latent state.

    One update of each carries a gradient.
    """

    networks = {"H_level": "H_layers", "L_level": "L_layers"}
    config: HRMConfig  # type: ignore[assignment]  # shares the recursion, not the settings

    @property
    def updates(self) -> tuple[int, int, int]:
        answers, latent = self.cycles or (self.config.H_cycles, self.config.L_cycles)
        return latent, answers, 2

    def answer(self, states: States, tokens: Tensor, apply: Apply) -> States:
        z_H, z_L = states
        return apply("H_level", z_H, z_L), z_L


class TransformerConfig(ArchConfig):
    """H_layers: blocks of the one network."""

    H_layers: PositiveInt


class Transformer(RecursiveModel):
    """A plain transformer, applied once per ACT step: the baseline without recursion."""

    networks = {"H_level": "H_layers"}
    config: TransformerConfig

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("H",)

    @property
    def updates(self) -> tuple[int, int, int]:
        return 0, 1, 1

    def answer(self, states: States, tokens: Tensor, apply: Apply) -> States:
        return (apply("H_level", states[0], tokens),)


ARCHITECTURES: dict[str, tuple[type[ArchConfig], type[RecursiveModel]]] = {
    "trm": (TRMConfig, TRM),
    "etrm": (TRMConfig, ETRM),
    "trm001": (TRMConfig, TRM),
    "trm_singlez": (TRMConfig, SingleStateTRM),
    "trm_hier6": (ManyLatentsConfig, ManyLatentsTRM),
    "hrm": (HRMConfig, HRM),
    "transformers_baseline": (TransformerConfig, Transformer),
}


def arch_config(values: dict[str, Any]) -> ArchConfig:
    """The typed configuration of the architecture that `values` names. Raises `ValueError` if unknown."""
    if values.get("name") not in ARCHITECTURES:
        raise ValueError(f"arch.name={values.get('name')!r} is unknown; there are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[values["name"]][0](**values)


def build_model(config: ArchConfig, sizes: DataSizes, encoder: EncoderConfig | None) -> RecursiveModel:
    """The model that `config` names. Its context comes from `encoder` or, without one, from puzzle rows."""
    return ARCHITECTURES[config.name][1](config, sizes, encoder)


def count_parameters(model: RecursiveModel) -> dict[str, int]:
    """How many parameters the recursive core and the context module have, and numbers the puzzle table."""
    context = sum(p.numel() for p in model.context.parameters())
    table = model.context.weights.numel() if isinstance(model.context, PuzzleEmbedding) else 0
    return {
        "core": sum(p.numel() for p in model.parameters()) - context,
        "context": context,
        "puzzle_table": table,
    }
