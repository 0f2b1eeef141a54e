"""Optimisers: AdamATan2 for the network, sign-SGD for the rows of the puzzle table."""

from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from config.base import Config
from models.context import PuzzleEmbedding
from models.trm import RecursiveModel
from utils import distributed

try:
    from adam_atan2 import AdamATan2 as FusedAdamATan2
except ImportError:
    FusedAdamATan2 = None


NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class OptimConfig(Config):
    """Learning rates, decay and schedule. lr_min_ratio 1 keeps the rate constant after the warm-up."""

    lr: NonNegative
    lr_min_ratio: Annotated[float, Field(ge=0, le=1)]
    lr_warmup_steps: NonNegativeInt
    beta1: Annotated[float, Field(ge=0, lt=1)]
    beta2: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: NonNegative
    puzzle_emb_lr: NonNegative
    puzzle_emb_weight_decay: NonNegative
    grad_clip_norm: PositiveFloat | None


class AdamATan2(torch.optim.Optimizer):
    """Adam whose update is atan2(m, sqrt(v)) with bias-corrected moments: bounded, and without an epsilon.

    Weight decay is decoupled. Source: "Scaling Exponents Across Parameterizations and Optimizers" (arXiv 2407.05872).
    """

    def __init__(self, params, lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
                state["step"] += 1
            states = [self.state[p] for p in parameters]
            gradients = [p.grad for p in parameters]
            beta1, beta2 = group["betas"]
            first, second = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
            torch._foreach_lerp_(first, gradients, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
            mean = torch._foreach_div(first, [1 - beta1 ** s["step"] for s in states])
            deviation = torch._foreach_div(second, [1 - beta2 ** s["step"] for s in states])
            torch._foreach_sqrt_(deviation)
            update = [torch.atan2(m, d) for m, d in zip(mean, deviation, strict=True)]
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, update, alpha=-group["lr"])


class SparseSignSGD:
    """Sign-SGD with decoupled weight decay on the rows of a `PuzzleEmbedding` that the last forwards gathered.

    Gradients of one identifier are summed over the batch, over gradient accumulation and over processes before the sign
    is taken. Only touched rows decay. Source: HRM and the original TRM, where Adam on rarely seen rows is nearly this.
    """

    def __init__(self, embedding: PuzzleEmbedding, lr: float, weight_decay: float):
        self.embedding = embedding
        self.param_groups: list[dict[str, Any]] = [{"lr": lr, "weight_decay": weight_decay}]

    def gradients(self) -> list[Tensor]:
        """The gathered rows' gradients, to be checked before an update."""
        return [rows.grad for _, rows in self.embedding.gathered if rows.grad is not None]

    @torch.no_grad()
    def step(self) -> None:
        """Update the touched rows on every process alike."""
        (group,) = self.param_groups
        gathered = self.embedding.gathered
        identifiers = distributed.gather_rows(torch.cat([ids for ids, _ in gathered]))
        gradients = distributed.gather_rows(torch.cat([torch.zeros_like(rows) if rows.grad is None else rows.grad for _, rows in gathered]))
        touched, position = identifiers.unique(return_inverse=True)
        total = torch.zeros(len(touched), gradients.shape[1], device=gradients.device).index_add_(0, position, gradients)
        rows = self.embedding.weights[touched]
        self.embedding.weights[touched] = rows * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * total.sign()

    def zero_grad(self) -> None:
        """Forget the gathered rows."""
        self.embedding.gathered.clear()

    def state_dict(self) -> dict:
        """Sign-SGD has no state; the table itself is part of the model."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore."""


def build_optimizers(model: RecursiveModel, config: OptimConfig, device: torch.device) -> tuple[list, str]:
    """The optimisers, each group with its `base_lr`, and a word that names them for the log and the checkpoint."""
    fused = FusedAdamATan2 is not None and device.type == "cuda"
    network = (FusedAdamATan2 if fused else AdamATan2)(
        _trainable(model), lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
    )
    optimizers: list = [network]
    name = "AdamATan2 (fused, adam_atan2 package)" if fused else "AdamATan2 (PyTorch foreach)"
    if isinstance(model.context, PuzzleEmbedding):
        optimizers.append(SparseSignSGD(model.context, config.puzzle_emb_lr, config.puzzle_emb_weight_decay))
        name += " + SparseSignSGD"
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers, name


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
