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
from tests.support.jacobian import BASE, CASES, PCGRAD, SUPERVISED, UPGRAD, matrix, rows_of, start
from tests.support.runs import ALONE, Trainer, arguments_for, load_config
from training.splits import ALIASES, SPLITS
from training.step import train_step
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
