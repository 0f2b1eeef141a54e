"""Jacobian descent: what an objective is, its gradient, how gradients are combined, and when all of it is
plain training."""

import copy
import itertools
import json
import multiprocessing
import re
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from config import compose
from config.schema import PretrainConfig
from dataset.batch import Batch
from dataset.canvas import IGNORE_LABEL_ID
from dataset.store import Store
from models.act import act_step, initial_carry
from models.context import Noise, PuzzleEmbedding
from models.core import answers_after_every_cycle
from models.losses import TOKEN_LOSSES, ObjectiveConfig, act_loss, halting_losses, sample_loss
from pretrain_etrm import train
from tests.support.runs import ALONE, TRAINER, Trainer, arguments_for, load_config
from training.aggregation import AGGREGATORS, REGULARISATION, statistics, weigh, weighting
from training.jacobian import Jacobian, objectives_of
from training.splits import ALIASES, SPLITS, Numbering, Sizes
from training.step import _noise, accumulate, train_step
from utils.distributed import World
from utils.errors import UserError

UPGRAD, PCGRAD = ("upgrad", "pcgrad") if find_spec("torchjd") else ("mean", "mean")
BASE = (*TRAINER, "global_batch_size=4", "lr=1e-3", "data.min_demos=2")
MANY = [name for name in SPLITS if name != "sum"]
SUPERVISED = {name: axes for name, axes in SPLITS.items() if "step" in axes}
CASES = {
    "trm": ("puzzle", "arch.H_cycles=3", "arch.L_cycles=2", "arch.grad_cycles=2"),
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


@pytest.fixture(scope="module")
def cases(fewshot, puzzle):
    """Of a case and further options, a trainer whose first batch is about to be computed."""
    stores = {"fewshot": fewshot, "puzzle": puzzle}

    def build(case: str, *options: str, world: World = ALONE) -> Trainer:
        layout, *rest = CASES[case]
        store = stores[layout]
        config = load_config(store, *BASE, *rest, *options)
        return start(store, config, world)

    return build


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


def test_the_rows_of_later_steps_add_up_too_with_portions_and_groups(cases):
    """Three ACT steps of samples dealt into groups, computed one sample at a time, against all at once."""
    options = ("mode=supervised", "objective.aggregator=sum", "arch.halt_exploration_prob=1")
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


def solved(gramian: Tensor) -> Tensor:
    """m times UPGrad's weights (m,), written anew: of every row the v >= e_i with the least v G v. Every set
    of weights that may lie at their bound is tried. Where gradients depend on each other, the regularisation
    decides, beside their squared lengths."""
    count = len(gramian)
    squares = gramian.diagonal().where(gramian.diagonal() > 0, torch.ones(()).double())
    gramian = (gramian + REGULARISATION * (gramian.diagonal() > 0).sum() * squares.diag()).numpy()
    total = np.zeros(count)
    for bound in np.eye(count):
        candidates = []
        for free in itertools.product((False, True), repeat=count):
            free, weights = np.array(free), bound.copy()
            if free.any():
                weights[free] = np.linalg.solve(
                    gramian[np.ix_(free, free)], -gramian[np.ix_(free, ~free)] @ bound[~free]
                )
            if (weights >= bound - 1e-12).all():
                candidates.append(weights)
        total += min(candidates, key=lambda weights: weights @ gramian @ weights)
    return torch.from_numpy(total)


def jacobians() -> dict[str, Tensor]:
    """Random and degenerate ones (m, n), float64."""
    generator = torch.Generator().manual_seed(0)
    found = {
        f"random {m} x {n}": torch.randn(m, n, generator=generator).double()
        for m, n in ((2, 5), (5, 20), (8, 8), (7, 3))
    }
    base = torch.randn(6, 10, generator=generator).double()
    twins, opposed, idle, scaled = base.clone(), base.clone(), base.clone(), base.clone()
    twins[3] = twins[1]
    opposed[3] = -0.5 * opposed[1]
    idle[2] = 0
    scaled[4] *= 1e-4
    alike = torch.ones(4, 3).double()
    return found | {"twins": twins, "opposed": opposed, "idle": idle, "scaled": scaled, "alike": alike}


@pytest.mark.parametrize("name", jacobians())
@pytest.mark.parametrize("length", [1.0, 1e-6])
def test_upgrad_solves_its_quadratic_programme(name, length):
    """Also where the gradients are short: torchjd's own projector takes those for zero."""
    pytest.importorskip("torchjd")
    jacobian = length * jacobians()[name]
    gramian = jacobian @ jacobian.T
    weights, failed = weigh("upgrad", weighting("upgrad"), gramian, seed=0)
    assert not failed and (weights - solved(gramian)).abs().max() < 1e-5 * weights.abs().max()
    update = jacobian.T @ weights
    assert (jacobian @ update >= -1e-5 * jacobian.norm(dim=1) * update.norm()).all()


def test_gradient_descent_raises_an_objective_where_upgrad_raises_none():
    pytest.importorskip("torchjd")
    jacobian = torch.tensor([[4.0, 1.0], [-1.0, 0.5], [-0.5, 0.5]]).double()
    gramian = jacobian @ jacobian.T
    even, weights = torch.ones(3).double(), weigh("upgrad", weighting("upgrad"), gramian, seed=0)[0]
    assert (gramian @ even).min() < -1
    assert (gramian @ weights).min() > -1e-5
    found = statistics(gramian, weights)
    assert found["conflicts"] == pytest.approx(2 / 3) and found["gramian_min"] == pytest.approx(-3.5)
    assert 0 < found["gd_similarity"] < 1


@pytest.mark.parametrize("name", AGGREGATORS)
def test_without_a_conflict_every_method_gives_the_same_update_whatever_the_order(name):
    """Equal objectives: the sum of their gradients. And what is random follows from the seed alone."""
    method = method_or_skip(name)
    gramian = torch.ones(3, 3, dtype=torch.float64) * 2
    weights, failed = weigh(name, method, gramian, seed=1)
    if name not in ("imtlg", "fairgrad", "aligned_mtl"):  # these choose lengths of their own
        assert not failed and weights.sum() == pytest.approx(3, rel=1e-3)
    torch.manual_seed(5)
    uneven = torch.tensor([[2.0, -1.0, 0.3], [-1.0, 1.0, 0.1], [0.3, 0.1, 0.5]])
    first = weigh(name, method, uneven, seed=1)[0]
    torch.manual_seed(6)
    assert torch.equal(first, weigh(name, method, uneven, seed=1)[0])


def method_or_skip(name: str):
    try:
        return weighting(name)
    except UserError as error:
        pytest.skip(str(error))


def test_a_solver_that_fails_leaves_the_mean_and_says_so():
    def raises(gramian: Tensor) -> Tensor:
        raise ValueError("no solution")

    gramian = torch.eye(3)
    for method in (raises, lambda gramian: torch.full((3,), torch.nan)):
        weights, failed = weigh("upgrad", method, gramian, seed=0)
        assert failed and torch.equal(weights, torch.ones(3, dtype=torch.float64))
    # What is not a number is no failure of the solver: its update is skipped.
    assert weigh("upgrad", raises, gramian * torch.nan, seed=0)[1] is False


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(
        UserError, match=r"objective.aggregator=mgda needs the package torchjd: pip install 'torchjd\["
    ):
        weighting("mgda")


def trained(trainer: Trainer, updates: int) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of some updates, and the weights after them."""
    results = [
        train_step(trainer.state, trainer.batch(), trainer.config, trainer.world) for _ in range(updates)
    ]
    assert all(result.updated for result in results)
    return [
        (result.metrics["loss"] / result.metrics["rows"]).item() for result in results
    ], trainer.state.model.state_dict()


@pytest.mark.parametrize(
    "case, options",
    [
        ("trm", ["objective.split=instance", "objective.aggregator=sum"]),
        ("trm", ["objective.split=instance_cell", "objective.aggregator=mean", "objective.groups=3"]),
        ("trm", ["objective.split=cell", "objective.aggregator=mgda", "objective.groups=1"]),
        ("etrm memory", ["objective.split=loss_terms", "objective.aggregator=mean"]),
        ("etrm memory", ["mode=supervised", "objective.split=supervision", "objective.aggregator=sum"]),
        ("etrm prefix", ["objective.split=instance", "objective.aggregator=mean", "freeze_decoder_steps=2"]),
        (
            "trm",
            [
                "mode=fct",
                "mode.num_act_steps=2",
                "arch.halt_max_steps=2",
                "objective.split=instance",
                "objective.aggregator=mean",
            ],
        ),
    ],
)
def test_one_objective_and_the_mean_are_plain_training(cases, case, options):
    if "objective.aggregator=mgda" in options:
        pytest.importorskip("torchjd")
    plain = cases(case, *(option for option in options if not option.startswith("objective")))
    losses, weights = trained(plain, 5)
    found, theirs = trained(cases(case, *options), 5)
    assert found == pytest.approx(losses, rel=1e-6)
    assert all((weights[name] - theirs[name]).abs().max() < 1e-6 for name in weights)


@pytest.mark.parametrize("split", ["loss_terms", "instance", "cell", "internal", "supervision"])
@pytest.mark.parametrize("case", ["trm", "etrm memory"])
def test_no_objective_of_the_batch_rises_to_first_order(cases, case, split):
    pytest.importorskip("torchjd")
    mode = ["mode=supervised"] if split in SUPERVISED else []
    groups = ["objective.groups=9"] if split == "cell" else []
    trainer = cases(case, f"objective.split={split}", "objective.internal_weight=0.5", *mode, *groups)
    jacobian = rows_of(trainer, 3 if mode else 1)
    rows = matrix(trainer, jacobian)
    metrics = jacobian.finish()
    model = trainer.state.model
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    if isinstance(model.context, PuzzleEmbedding):
        ((identifiers, leaf),) = model.context.gathered
        table = torch.zeros_like(model.context.weights)
        table[identifiers] = leaf.grad
        parts.append(table)
    update = torch.cat([part.flatten() for part in parts]).double()
    assert (rows @ update >= -1e-5 * rows.norm(dim=1) * update.norm()).all()
    assert metrics["jacobian/fallbacks"] == 0 and metrics["jacobian/objectives"] == len(rows)
    cosine = torch.nn.functional.cosine_similarity(update, rows.sum(0), dim=0)
    assert metrics["jacobian/gd_similarity"] == pytest.approx(cosine.item(), abs=1e-4)


def refused(mode: str, split: str) -> bool:
    return split in SUPERVISED and mode != "supervised"


@pytest.mark.parametrize("mode", ["act", "fct", "supervised"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", ["trm", "etrm memory"])
def test_every_split_trains_in_every_mode_or_says_why_not(cases, case, split, mode):
    """With UPGrad where torchjd is installed, and 16 groups where there would be more than 64 objectives."""
    options = [f"mode={mode}", f"objective.split={split}", f"objective.aggregator={UPGRAD}"]
    options += ["mode.num_act_steps=2", "arch.halt_max_steps=2"] if mode == "fct" else []
    options += ["objective.groups=5"] if split.endswith("cell") else []
    if refused(mode, split):
        with pytest.raises(UserError, match="which only mode=supervised has"):
            cases(case, *options)
        return
    trainer = cases(case, *options)
    before = copy.deepcopy(trainer.state.model.state_dict())
    trained(trainer, 3)
    moved = [
        name
        for name, value in trainer.state.model.state_dict().items()
        if not torch.equal(value, before[name])
    ]
    assert "L_level.layers.0.mlp.down_proj.weight" in moved and "q_head.weight" in moved
    assert all(value.isfinite().all() for value in trainer.state.model.state_dict().values())


def test_a_resumed_run_deals_and_draws_as_the_uninterrupted_one(cases, tmp_path):
    options = ("objective.split=cell", "objective.groups=4", f"objective.aggregator={PCGRAD}")
    whole, resumed = cases("etrm prefix", *options), cases("etrm prefix", *options)
    trained(whole, 2)
    resumed.state.load(whole.state.save(tmp_path, ALONE, {}, keep=2), ALONE, torch.device("cpu"))
    losses, weights = trained(whole, 3)
    found, theirs = trained(resumed, 3)
    assert found == losses and all(torch.equal(weights[name], theirs[name]) for name in weights)


# With groups objectives are shared between processes, without them each is at home in one.
SHARED = {
    "instance": ("trm", ("objective.split=instance",)),
    "instance groups": (
        "etrm memory",
        ("objective.split=instance", "objective.groups=3", "objective.halting=apart"),
    ),
    "cell": ("trm", ("objective.split=cell", "objective.groups=5")),
    "supervision": ("etrm memory", ("mode=supervised", "objective.split=supervision")),
}


def worker(rank: int, size: int, folder: Path, stores: dict) -> None:
    """One process's summed losses and first weights in each case."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=size)
    found = {name: shared(stores, name, World(rank, size)) for name in SHARED}
    dist.destroy_process_group()
    torch.save(found, folder / f"{rank}.pt")


def shared(stores: dict, name: str, world: World = ALONE) -> dict[str, Tensor]:
    case, options = SHARED[name]
    layout, *rest = CASES[case]
    config = load_config(stores[layout], *BASE, *rest, *options, f"objective.aggregator={UPGRAD}")
    trainer = start(stores[layout], config, world)
    for _ in range(2):
        result = train_step(trainer.state, trainer.batch(), trainer.config, trainer.world)
    return {**trainer.state.model.state_dict(), "similarity": result.metrics["jacobian/gd_similarity"]}


def test_processes_descend_like_one(fewshot, puzzle, tmp_path):
    stores = {"fewshot": fewshot, "puzzle": puzzle}
    multiprocessing.set_forkserver_preload(["tests.test_jacobian"])
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=worker, args=(rank, 2, tmp_path, stores)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    for name in SHARED:
        alone = shared(stores, name)
        for rank in range(2):
            found = torch.load(tmp_path / f"{rank}.pt")[name]
            assert all((found[key] - value).abs().max() < 2e-5 for key, value in alone.items()), name


@pytest.mark.parametrize(
    "overrides, words",
    [
        (
            ["objective.split=instances"],
            "objective.split=instances: there is no such split (did you mean 'instance'?)",
        ),
        (["objective.aggregator=upgrade"], "there is no such aggregator (did you mean 'upgrad'?)"),
        (
            ["objective.split=supervision"],
            "compares the ACT steps of one update, which only mode=supervised has",
        ),
        (["objective.split=internal", "arch.H_cycles=1"], "needs arch.H_cycles of at least 2, found 1"),
        (["objective.halting=apart"], "say split=loss_terms"),
        (
            ["objective.split=instance", "objective.halting=apart", "objective.halt_loss_weight=0"],
            "there is no halting loss",
        ),
        (
            ["objective.split=internal", "objective.groups=3"],
            "deals samples, cells or ACT steps; split=internal has none",
        ),
        (
            ["objective.split=instance", "objective.contrastive_weight=1"],
            "which objective.split=instance takes apart",
        ),
        (
            ["objective.split=instance", "global_batch_size=65"],
            "up to 65 objectives, and aggregator=upgrad takes 64",
        ),
        (["objective.split=cell", "objective.halting=apart"], "set objective.groups=32 or less"),
        (["objective.split=instance", "objective.groups=65", "global_batch_size=80"], "up to 65 objectives"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_the_reason(overrides, words):
    with pytest.raises(UserError, match=re.escape(words)):
        compose.load(PretrainConfig, "pretrain", overrides)


@pytest.mark.parametrize("alias, meaning", ALIASES.items())
def test_the_ancestors_names_are_understood(alias, meaning):
    mode = ["mode=supervised"] if alias.startswith("stack_supervisions") else []
    options = [f"objective.split={alias}", "objective.aggregator=mgda", *mode]
    objective = compose.load(PretrainConfig, "pretrain", options).objective
    assert objective.split in SPLITS
    assert {name: getattr(objective, name) for name in meaning} == meaning


def test_an_evaluation_reads_the_loss_alone(fewshot):
    values = load_config(fewshot, "objective.split=instance").objective.model_dump()
    assert ObjectiveConfig.of_run(values) == ObjectiveConfig.of_run(
        {name: values[name] for name in ObjectiveConfig.model_fields}
    )


def test_the_log_says_how_the_objectives_differ(fewshot, tmp_path):
    options = ("objective.split=instance", f"objective.aggregator={UPGRAD}", "train_steps=2")
    _, *arguments = arguments_for(fewshot, tmp_path, *options)
    train(compose.load(PretrainConfig, "pretrain", arguments))
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    line = next(line for line in lines if "train/loss" in line)
    assert (
        line["jacobian/objectives"] == 8
        and line["jacobian/fallbacks"] == 0
        and line["jacobian/memory_gb"] > 0
    )
    assert -1 <= line["gd_similarity"] == line["jacobian/gd_similarity"] <= 1
    assert line["grammian_min"] <= line["grammian_median"] and 0 <= line["jacobian/conflicts"] <= 1
