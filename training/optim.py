"""Optimisers: AdamATan2, AdamW or Muon for the network, sign-SGD for the rows of the puzzle table; and what
is frozen when."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor

from models.context import PuzzleEmbedding
from models.core import RecursiveModel
from models.layers import Linear
from utils import distributed
from utils.config import Config
from utils.errors import UserError

try:
    from adam_atan2 import AdamATan2 as FusedAdamATan2
except ImportError:
    FusedAdamATan2 = None


NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class OptimConfig(Config):
    """Optimiser, learning rates, decay, schedule and staging. lr_min_ratio 1 keeps the rate constant after
    the warm-up.

    encoder_lr, encoder_weight_decay: null takes lr and weight_decay. The encoder is `model.context` (its
    puzzle rows have their own rate and decay), the decoder everything else. freeze_*_steps: the part does not
    change before this step. latent_step_from: the share of the training after which the recursion reads
    contexts moved by one step of latent search (`inner_step`), of size latent_step_lr in units of the
    context's RMS; null: never.
    """

    optimizer: Literal["adam_atan2", "adamw", "muon"]
    lr: NonNegative
    lr_min_ratio: Annotated[float, Field(ge=0, le=1)]
    lr_warmup_steps: NonNegativeInt
    beta1: Annotated[float, Field(ge=0, lt=1)]
    beta2: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: NonNegative
    encoder_lr: NonNegative | None
    encoder_weight_decay: NonNegative | None
    puzzle_emb_lr: NonNegative
    puzzle_emb_weight_decay: NonNegative
    grad_clip_norm: PositiveFloat | None
    freeze_decoder_steps: NonNegativeInt | Literal["all"]
    freeze_encoder_steps: NonNegativeInt | Literal["all"]
    latent_step_from: Annotated[float, Field(ge=0, lt=1)] | None
    latent_step_lr: PositiveFloat

    def trains(self, part: str, step: int) -> bool:
        """Whether the `core` or the `encoder` learns in the update after `step` updates."""
        steps = {"core": self.freeze_decoder_steps, "encoder": self.freeze_encoder_steps}[part]
        return steps != "all" and step >= steps


class AdamATan2(torch.optim.Optimizer):
    """Adam whose update is atan2(m, sqrt(v)) with bias-corrected moments: bounded, and without an epsilon.

    Weight decay is decoupled. Source: "Scaling Exponents Across Parameterizations and Optimizers" (arXiv
    2407.05872).
    """

    def __init__(self, params, lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is ever evaluated
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state.update(
                        step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter)
                    )
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
    """Sign-SGD with decoupled weight decay on the rows of a `PuzzleEmbedding` that the last forwards
    gathered.

    Gradients of one identifier are summed over the batch, over gradient accumulation and over processes
    before the sign is taken. Only touched rows decay. Source: HRM and the original TRM, where Adam on rarely
    seen rows is nearly this.
    """

    def __init__(self, embedding: PuzzleEmbedding, lr: float, weight_decay: float):
        self.embedding = embedding
        self.param_groups: list[dict[str, Any]] = [{"lr": lr, "weight_decay": weight_decay}]

    def gradients(self) -> list[Tensor]:
        """The gathered rows' gradients, to be checked before an update."""
        return [rows.grad for _, rows in self.embedding.gathered if rows.grad is not None]

    @torch.no_grad()
    def step(self, finite: Tensor) -> None:
        """Update the touched rows on every process alike, if `finite`, () bool. Nothing waits for it."""
        (group,) = self.param_groups
        gathered = self.embedding.gathered
        identifiers = distributed.gather_rows(torch.cat([ids for ids, _ in gathered]))
        gradients = distributed.gather_rows(
            torch.cat([torch.zeros_like(rows) if rows.grad is None else rows.grad for _, rows in gathered])
        )
        # The number of different identifiers is known on the device alone. So their gradients are summed in
        # the places where they first stand in order, and a row is written as often as it was read.
        position = torch.searchsorted(identifiers.sort().values, identifiers)
        total = torch.zeros_like(gradients).index_add_(0, position, gradients)[position]
        rows = self.embedding.weights[identifiers]
        moved = rows * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * total.sign()
        self.embedding.weights[identifiers] = torch.where(finite, moved, rows)

    def zero_grad(self) -> None:
        """Forget the gathered rows."""
        self.embedding.gathered.clear()

    def state_dict(self) -> dict:
        """Sign-SGD has no state; the table itself is part of the model."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to restore."""


def build_optimizers(model: RecursiveModel, config: OptimConfig, device: torch.device) -> tuple[list, str]:
    """The optimisers, each group with its `base_lr`, and a word that names them for the log and the
    checkpoint.

    A group of network parameters also names its `part` of the model, `core` or `encoder`.
    Raises `UserError` for Muon when the installed PyTorch lacks it.
    """
    optimizers: list = []
    names = []
    matrices: set[int] = set()
    betas = (config.beta1, config.beta2)
    if config.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise UserError(
                f"optimizer=muon needs torch.optim.Muon, which PyTorch {torch.__version__} lacks; 2.9 and "
                "later have it"
            )
        matrices = hidden_matrices(model)
        # Scaled to the size of Adam's updates, so that one learning rate and one decay serve both.
        optimizers.append(
            torch.optim.Muon(_groups(model, config, matrices, True), adjust_lr_fn="match_rms_adamw")
        )
        names.append("Muon")
    rest = _groups(model, config, matrices, False)
    if config.optimizer == "adamw":
        optimizers.append(torch.optim.AdamW(rest, betas=betas))
        names.append("AdamW")
    elif FusedAdamATan2 is not None and device.type == "cuda":
        optimizers.append(FusedAdamATan2(rest, lr=config.lr, betas=betas, weight_decay=config.weight_decay))
        names.append("AdamATan2 (fused, adam_atan2 package)")
    else:
        optimizers.append(AdamATan2(rest, lr=config.lr, betas=betas, weight_decay=config.weight_decay))
        names.append("AdamATan2 (PyTorch foreach)")
    if isinstance(model.context, PuzzleEmbedding):
        optimizers.append(SparseSignSGD(model.context, config.puzzle_emb_lr, config.puzzle_emb_weight_decay))
        names.append("SparseSignSGD")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers, " + ".join(names)


def load_optimizer(optimizer: Any, saved: dict) -> None:
    """Restore what `state_dict` gave, also that of the other AdamATan2: ours counts updates in an int, the
    fused kernel reads the count from the parameter's device, where PyTorch leaves it on the CPU unless a
    group is called `fused` or `capturable`."""
    optimizer.load_state_dict(saved)
    for parameter, state in getattr(optimizer, "state", {}).items():
        if FusedAdamATan2 is not None and isinstance(optimizer, FusedAdamATan2):
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)
        elif isinstance(optimizer, AdamATan2):
            state["step"] = int(state["step"])


def hidden_matrices(model: RecursiveModel) -> set[int]:
    """The ids of the parameters that map hidden vectors to hidden vectors: no embeddings, heads, learned
    tokens or vectors."""
    return {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, Linear) and module not in model.heads
    }


def set_trainable(optimizers: list, config: OptimConfig, step: int) -> None:
    """Thaw what trains at `step` and freeze the rest, whose gradient is then not computed: neither weights
    nor moments change.

    A pure function of the step, so that a resumed run is in the right stage.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group.get("params", ()):
                parameter.requires_grad_(config.trains(group["part"], step))


def _groups(
    model: RecursiveModel, config: OptimConfig, matrices: set[int], inside: bool
) -> list[dict[str, Any]]:
    """The trainable parameters in or outside `matrices` as one group per part of the model, with its rate and
    decay."""
    encoder = {id(parameter) for parameter in model.context.parameters()}
    groups: dict[str, dict[str, Any]] = {
        "core": {"lr": config.lr, "weight_decay": config.weight_decay},
        "encoder": {
            "lr": config.lr if config.encoder_lr is None else config.encoder_lr,
            "weight_decay": config.weight_decay
            if config.encoder_weight_decay is None
            else config.encoder_weight_decay,
        },
    }
    for part, group in groups.items():
        chosen = [p for p in model.parameters() if p.requires_grad and (id(p) in matrices) == inside]
        group |= {"part": part, "params": [p for p in chosen if (id(p) in encoder) == (part == "encoder")]}
    return [group for group in groups.values() if group["params"]]
