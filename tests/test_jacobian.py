"""The rows of a Jacobian: what an objective is, and its gradient."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from config import compose
from config.schema import PretrainConfig
from models.act import ANSWER, act_step, initial_carry
from models.core import answers_after_every_cycle
from models.losses import act_loss, halting_losses, sample_loss
from tests.support.jacobian import MANY, NOISY, gradient, matrix, noise_of, rows_of, split_of, written_out
from tests.support.runs import ALONE
from training.jacobian import objectives_of
from training.splits import SPLITS, Numbering, Sizes
from training.step import accumulate

# Every split in the first case, and in the others those that meet the model in another way. A cell is a
# backward pass.
ROWS = [
    *(("trm", split, "inside") for split in MANY if not split.endswith("instance_cell")),
    *(("trm", split, "apart") for split in MANY if split not in ("loss_terms", "supervision_instance_cell")),
    *(("etrm memory", split, "apart") for split in ("instance", "cell", "internal", "supervision")),
    *(
        ("etrm prefix", split, "inside")
        for split in ("loss_terms", "instance", "internal", "supervision_instance")
    ),
    *(
        (case, split, "inside")
        for case in ("hrm", "trm_hier6")
        for split in ("loss_terms", "instance", "internal_only")
    ),
    *(
        (case, split, "inside")
        for case in ("trm dropout", "etrm dropout")
        for split in ("loss_terms", "instance", "internal", "supervision_instance")
    ),
    *(("trm bf16", split, "inside") for split in ("instance", "internal")),
]


@pytest.mark.parametrize("case, split, halting", ROWS)
def test_the_rows_are_the_gradients_of_their_objectives(cases, case, split, halting):
    trainer = cases(case, *split_of(split), f"objective.halting={halting}")
    found = matrix(trainer, rows_of(trainer))
    expected = torch.stack([gradient(trainer, loss) for loss in written_out(trainer, split, halting)])
    scale = expected.norm()
    tolerance = 2e-2 if "bf16" in case else 1e-5
    assert found.shape == expected.shape
    assert (found - expected).norm() < tolerance * scale
    assert (found @ found.T - expected @ expected.T).norm() < tolerance * scale**2


@pytest.mark.parametrize("split", MANY)
@pytest.mark.parametrize("case", ["trm", "etrm prefix"])
def test_the_rows_add_up_to_the_summed_loss(cases, case, split):
    groups = [] if not split.endswith("cell") else ["objective.groups=5"]
    trainer = cases(case, *split_of(split), *groups)
    model, batch = trainer.state.model, trainer.batch()
    found = matrix(trainer, rows_of(trainer)).sum(0)
    with answers_after_every_cycle(model, split.startswith("internal")):
        output = act_step(model, initial_carry(model, batch.data), batch.data, noise=noise_of(trainer, batch))
    loss = act_loss(output, trainer.config.objective)[0]
    weight = trainer.config.objective.internal_weight if split == "internal" else 1.0
    for logits in output.earlier_logits:
        loss = loss + weight * sample_loss(logits, batch.data["labels"], trainer.config.objective).sum()
    expected = gradient(trainer, loss)
    assert (found - expected).norm() < 1e-6 * expected.norm()


def test_the_rows_of_a_later_step_with_all_noise_are_the_gradients_of_their_samples(cases):
    trainer = cases("trm", "objective.split=instance", "objective.aggregator=sum", "data.min_demos=2", *NOISY)
    model, objective, batch = trainer.state.model, trainer.config.objective, trainer.batch()
    carry = initial_carry(model, batch.data)
    carry, _ = accumulate(trainer.state, carry, batch, trainer.config, ALONE)
    carry = replace(carry, halted=torch.tensor([False, True, False, False]))
    model.zero_grad()
    model.context.gathered.clear()
    jacobian = objectives_of(trainer.state, carry, batch, trainer.config, ALONE)
    accumulate(trainer.state, carry, batch, trainer.config, ALONE, divisor=1, objectives=jacobian)
    found = matrix(trainer, jacobian)
    output = act_step(model, carry, batch.data, noise=noise_of(trainer, batch))
    labels = output.carry.data["labels"]
    before = torch.where(carry.halted[:, None, None], 0, carry.context_state[ANSWER])
    share = objective.differential_weight
    losses = (1 - share) * sample_loss(output.logits, labels, objective)
    losses = losses + share * sample_loss(output.logits - before, labels, objective)
    losses = losses + objective.halt_loss_weight * halting_losses(output)["q_halt"]
    expected = torch.stack([gradient(trainer, loss) for loss in losses])
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("noisy", [(), NOISY])
def test_the_rows_of_later_steps_add_up_too_with_portions_and_groups(cases, noisy):
    """Three ACT steps of samples dealt into groups, computed one sample at a time, against all at once."""
    options = ("mode=supervised", "objective.aggregator=sum", "arch.halt_exploration_prob=1", *noisy)
    whole = cases("trm", *options)
    parts = cases(
        "trm", *options, "objective.split=supervision_instance", "objective.groups=3", "micro_batch_size=1"
    )
    batch = whole.batch()
    carry = initial_carry(whole.state.model, batch.data)
    for _ in range(3):
        carry, _ = accumulate(whole.state, carry, batch, whole.config, ALONE, divisor=1)
        carry = replace(carry, halted=torch.zeros_like(carry.halted))
    jacobian = rows_of(parts, steps=3)
    assert sorted(jacobian.rows) == [0, 1, 2]
    found = sum(row.of[parts.state.model.lm_head.weight] for row in jacobian.rows.values())
    expected = whole.state.model.lm_head.weight.grad
    assert (found - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize(
    "axes",
    ["instance", "cell", "instance_cell", "supervision", "supervision_cell", "supervision_instance_cell"],
)
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_random_groups_partition_the_real_cells(axes, count):
    rng = np.random.default_rng(0)
    real = rng.random((5, 9)) < 0.5
    real[2], real[:, 4] = False, False
    config = compose.load(PretrainConfig, "pretrain", []).objective.model_copy(
        update={"split": axes, "groups": count}
    )
    numbering = Numbering(config, Sizes(3, 5, 9), real, np.random.default_rng(1))
    groups = np.stack([numbering.of_cells(step, np.arange(5)) for step in range(3)])  # (S, G, L)
    units = {}  # what is dealt -> its group
    for step, sample, cell in itertools.product(range(3), range(5), range(9)):
        if real[sample, cell]:
            place = {"step": step, "sample": sample, "cell": cell}
            units.setdefault(tuple(place[axis] for axis in SPLITS[axes]), set()).add(
                int(groups[step, sample, cell])
            )
    assert all(len(found) == 1 for found in units.values())
    sizes = np.bincount([found.pop() for found in units.values()], minlength=min(count, len(units)))
    assert (
        sizes.sum() == len(units) and sizes.max() - sizes.min() <= 1 and len(sizes) == min(count, len(units))
    )


def test_groups_are_drawn_anew_at_every_step_and_alike_after_a_resume(cases):
    def dealt(step: int) -> list[int]:
        trainer = cases("trm", *split_of("cell"), "objective.groups=4")
        trainer.state.step = step
        batch = trainer.batch()
        carry = initial_carry(trainer.state.model, batch.data)
        return objectives_of(
            trainer.state, carry, batch, trainer.config, trainer.world
        ).numbering.dealt.tolist()

    assert dealt(3) == dealt(3) != dealt(4)
