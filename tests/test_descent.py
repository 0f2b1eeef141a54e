"""Training with many objectives: when it is plain, in every mode, resumed, over processes, and its log."""

import copy
import json
import multiprocessing
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from config import compose
from config.schema import PretrainConfig
from models.context import PuzzleEmbedding
from models.losses import ObjectiveConfig
from pretrain_etrm import train
from tests.support.jacobian import BASE, CASES, NOISY, PCGRAD, SUPERVISED, UPGRAD, matrix, rows_of, start
from tests.support.runs import ALONE, Trainer, arguments_for, load_config, set_counts
from training.splits import ALIASES, SPLITS
from training.step import MODES, train_step
from utils.distributed import World
from utils.errors import UserError


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
            "etrm memory",
            ["mode=cached", "arch.dropout=0.2", "objective.split=instance", "objective.aggregator=sum"],
        ),
        (
            "etrm memory",
            [
                "mode=cached",
                "objective.split=internal",
                "objective.aggregator=mean",
                "objective.internal_weight=0",
            ],
        ),
        ("trm", ["optimizer=muon", "objective.split=instance", "objective.aggregator=mean"]),
        (
            "etrm memory",
            ["optimizer=muon", "objective.split=cell", "objective.groups=4", "objective.aggregator=sum"],
        ),
        (
            "trm",
            [
                "arch.dropout=0.2",
                "arch.carry_noise=0.1",
                "objective.split=instance",
                "objective.aggregator=mean",
            ],
        ),
        (
            "etrm memory",
            [
                "mode=supervised",
                "arch.dropout=0.2",
                "objective.split=supervision_instance",
                "objective.aggregator=sum",
            ],
        ),
        (
            "trm",
            [
                "mode=fct",
                "mode.num_act_steps=2",
                "arch.halt_max_steps=2",
                "arch.dropout=0.2",
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
    # Muon makes its updates orthogonal in bfloat16, which turns another order of a sum into another rounding.
    tolerance = 1e-3 if "optimizer=muon" in options else 1e-6
    assert found == pytest.approx(losses, rel=tolerance)
    assert all((weights[name] - theirs[name]).abs().max() < tolerance for name in weights)


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


def options_of(split: str, mode: str) -> tuple[str, ...]:
    """With UPGrad where torchjd is installed, and groups where there would be more than 64 objectives."""
    options = [f"mode={mode}", f"objective.split={split}", f"objective.aggregator={UPGRAD}"]
    options += ["mode.num_act_steps=2", "arch.halt_max_steps=2"] if mode == "fct" else []
    return (*options, *(["objective.groups=5"] if split.endswith("cell") else []))


def refusal(case: str, split: str, mode: str) -> str | None:
    """What is said of a combination that is not trained."""
    if mode == "cached" and case == "trm":
        return "mode=cached keeps what an encoder reads once per sample, found encoder=none"
    return "which only mode=supervised has" if split in SUPERVISED and mode != "supervised" else None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", ["trm", "etrm memory"])
def test_every_split_trains_in_every_mode_or_says_why_not(cases, case, split, mode):
    if words := refusal(case, split, mode):
        with pytest.raises(UserError, match=words):
            cases(case, *options_of(split, mode))
        return
    trainer = cases(case, *options_of(split, mode))
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
    "noise": ("trm", ("objective.split=instance", *NOISY)),
    "noise groups": (
        "etrm memory",
        ("mode=supervised", "objective.split=supervision_cell", "objective.groups=4", *NOISY),
    ),
}


TABLE = {
    f"{case}, {split}, {mode}": (case, options_of(split, mode))
    for case in ("trm", "etrm memory")
    for split in SPLITS
    for mode in MODES
    if not refusal(case, split, mode)
}


def worker(rank: int, size: int, folder: Path, stores: dict, cases: dict) -> None:
    """One process's weights in each case."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=size)
    world = World(rank, size)
    found = {name: shared(stores, case, world) for name, case in cases.items()}
    dist.destroy_process_group()
    torch.save(found, folder / f"{rank}.pt")


def shared(stores: dict, of: tuple, world: World = ALONE) -> dict[str, Tensor]:
    case, options = of
    layout, *rest = CASES[case]
    config = load_config(stores[layout], *BASE, *rest, *options, f"objective.aggregator={UPGRAD}")
    trainer = start(stores[layout], config, world)
    set_counts(trainer)
    for _ in range(4 if trainer.state.task_errors else 3):
        result = train_step(trainer.state, trainer.batch(), trainer.config, trainer.world)
    counts = trainer.state.task_errors.state_dict() if trainer.state.task_errors else {}
    return {
        **trainer.state.model.state_dict(),
        "similarity": result.metrics.get("jacobian/gd_similarity", torch.ones(())),
        **{name: torch.as_tensor(value).double() for name, value in counts.items()},
    }


def differences(stores: dict, folder: Path, cases: dict) -> dict[str, float]:
    """By case, the farthest that something of two processes is from what a single one has."""
    multiprocessing.set_forkserver_preload(["tests.test_jacobian"])
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=worker, args=(rank, 2, folder, stores, cases)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(400)
    assert [process.exitcode for process in processes] == [0, 0]
    found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    farthest = {}
    for name, case in cases.items():
        alone = shared(stores, case)
        apart = [(one[name][key] - value).abs().max() for one in found for key, value in alone.items()]
        farthest[name] = max(apart).item()
    return farthest


def test_processes_descend_like_one(fewshot, puzzle, tmp_path):
    stores = {"fewshot": fewshot, "puzzle": puzzle}
    found = differences(stores, tmp_path, SHARED)
    assert all(apart < 2e-5 for apart in found.values()), found


@pytest.mark.slow
def test_every_split_trains_alike_over_two_processes_in_every_mode(fewshot, puzzle, tmp_path):
    found = differences({"fewshot": fewshot, "puzzle": puzzle}, tmp_path, TABLE)
    assert all(apart < 1e-4 for apart in found.values()), found


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
    assert ObjectiveConfig.of_run({**values, "differential_weight": 1.0}).differential_weight == 0


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
