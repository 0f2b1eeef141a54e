"""Runs with many objectives, their rows, and the same gradients written out by hand."""

import itertools
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

from config.schema import PretrainConfig
from dataset.batch import Batch
from dataset.canvas import IGNORE_LABEL_ID
from dataset.store import Store
from models.act import act_step, initial_carry
from models.context import PuzzleEmbedding
from models.core import answers_after_every_cycle
from models.losses import TOKEN_LOSSES, halting_losses
from models.noise import Noise
from tests.support.runs import ALONE, TRAINER, Trainer
from training.jacobian import Jacobian, objectives_of
from training.splits import SPLITS
from training.step import _noise, accumulate
from utils.distributed import World

UPGRAD, PCGRAD = ("upgrad", "pcgrad") if find_spec("torchjd") else ("mean", "mean")
BASE = (*TRAINER, "global_batch_size=4", "lr=1e-3", "data.min_demos=2")
# All that training draws, remembers or counts beside its steps.
NOISY = (
    "arch.dropout=0.2",
    "arch.carry_noise=0.1",
    "objective.differential_weight=0.4",
    "data.error_weighted=1",
    "data.error_interval=1",
)
MANY = [name for name in SPLITS if name != "sum"]
SUPERVISED = {name: axes for name, axes in SPLITS.items() if "step" in axes}
CASES = {
    "trm": ("puzzle", "arch.H_cycles=3", "arch.L_cycles=2", "arch.grad_cycles=2"),
    "trm dropout": ("puzzle", "arch.H_cycles=3", "arch.L_cycles=2", "arch.grad_cycles=2", "arch.dropout=0.2"),
    "etrm dropout": ("fewshot", "arch.H_cycles=3", "arch.L_cycles=2", "arch.dropout=0.2"),
    "trm bf16": ("puzzle", "arch.forward_dtype=bfloat16"),
    "hrm": ("puzzle", "arch=hrm", "arch.H_layers=1", "arch.L_layers=1", "arch.H_cycles=2"),
    "trm_hier6": ("puzzle", "arch=trm_hier6", "arch.H_cycles=2", "arch.L_cycles=6"),
    "etrm memory": ("fewshot", "arch.H_cycles=3", "arch.L_cycles=2"),
    "etrm prefix": (
        "fewshot",
        "encoder=hybrid_variational",
        "encoder.num_layers=1",
        "objective.kl_weight=0.1",
    ),
}


def start(store: Store, config: PretrainConfig, world: World = ALONE) -> Trainer:
    """A trainer whose samples halt after different numbers of ACT steps."""
    trainer = Trainer(store, config=config, world=world)
    head, generator = trainer.state.model.q_head, torch.Generator().manual_seed(1)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
        head.bias.zero_()
    return trainer


def split_of(name: str) -> list[str]:
    return [
        f"objective.split={name}",
        "objective.aggregator=sum",
        *(["mode=supervised"] if name in SUPERVISED else []),
    ]


def rows_of(trainer: Trainer, steps: int = 1) -> Jacobian:
    """The rows of the first update, after some ACT steps."""
    batch = trainer.batch()
    carry = initial_carry(trainer.state.model, batch.data)
    jacobian = objectives_of(trainer.state, carry, batch, trainer.config, trainer.world)
    for _ in range(steps):
        carry, _ = accumulate(
            trainer.state, carry, batch, trainer.config, ALONE, divisor=1, objectives=jacobian
        )
        carry = replace(carry, halted=torch.zeros_like(carry.halted))
    return jacobian


def matrix(trainer: Trainer, jacobian: Jacobian) -> Tensor:
    """The Jacobian (m, N), with a column for every number of the puzzle table."""
    model = trainer.state.model
    rows = []
    for _, row in sorted(jacobian.rows.items()):
        parts = [row.of[p] if p in row.of else torch.zeros_like(p) for p in model.parameters()]
        if isinstance(model.context, PuzzleEmbedding):
            table = torch.zeros_like(model.context.weights)
            for identifiers, gradients in row.table:
                table.index_add_(0, identifiers, gradients)
            parts.append(table)
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows).double()


def gradient(trainer: Trainer, loss: Tensor) -> Tensor:
    """The gradient of a loss as a row of `matrix`."""
    model = trainer.state.model
    leaves = [rows for _, rows in getattr(model.context, "gathered", [])]
    found = torch.autograd.grad(
        loss, [*model.parameters(), *leaves], retain_graph=True, materialize_grads=True
    )
    parts = list(found[: len(found) - len(leaves)])
    if leaves:
        table = torch.zeros_like(model.context.weights)
        for (identifiers, _), rows in zip(model.context.gathered, found[len(parts) :], strict=True):
            table.index_add_(0, identifiers, rows)
        parts.append(table)
    return torch.cat([part.flatten() for part in parts]).double()


def written_out(trainer: Trainer, split: str, halting: str) -> list[Tensor]:
    """The objectives of the first ACT step of a whole batch, one term after the other."""
    model, objective, batch = trainer.state.model, trainer.config.objective, trainer.batch()
    with answers_after_every_cycle(model, split.startswith("internal")):
        output = act_step(model, initial_carry(model, batch.data), batch.data, noise=noise_of(trainer, batch))
    labels = batch.data["labels"]
    real = labels != IGNORE_LABEL_ID
    loss = TOKEN_LOSSES[objective.loss_type]

    def share(logits: Tensor, sample: int, cell: int) -> Tensor:
        return loss(logits, labels)[sample, cell] / real[sample].sum()

    def extra(sample: int) -> Tensor:
        return sum(objective.weight(name) * terms[sample] for name, terms in output.losses.items())

    halt = objective.halt_loss_weight * sum(halting_losses(output).values())
    cells = [
        (sample, cell)
        for sample, cell in itertools.product(range(len(real)), range(real.shape[1]))
        if real[sample, cell]
    ]
    halting_of = {sample: halt[sample] if halting == "inside" else 0.0 for sample in range(len(real))}
    whole = {
        (s, c): share(output.logits, s, c) + (halting_of[s] + extra(s)) / real[s].sum() for s, c in cells
    }
    apart = [halt[sample] for sample in range(len(real))] if halting == "apart" else []
    if split == "loss_terms":
        terms = [sum(share(output.logits, s, c) for s, c in cells), halt.sum()]
        return terms + [
            objective.weight(n) * t.sum() for n, t in output.losses.items() if objective.weight(n)
        ]
    if split in ("instance", "supervision_instance"):
        return [sum(whole[s, c] for s, c in cells if s == sample) for sample in range(len(real))] + apart
    if split in ("cell", "supervision_cell"):
        return [
            sum(whole[s, c] for s, c in cells if c == cell) for cell in sorted({c for _, c in cells})
        ] + apart
    if split in ("instance_cell", "supervision_instance_cell"):
        return [whole[place] for place in cells] + apart
    final = sum(whole.values())
    apart = [sum(apart)] if apart else []
    weight = objective.internal_weight if split == "internal" else 1.0
    earlier = [weight * sum(share(logits, s, c) for s, c in cells) for logits in output.earlier_logits]
    return [final, *apart, *earlier] if split.startswith("internal") else [final, *apart]


def noise_of(trainer: Trainer, batch: Batch) -> Noise:
    return _noise(trainer.state, batch, trainer.config, trainer.world)
