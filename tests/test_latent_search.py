"""Latent search: a better context for the demonstrations, the same weights, and no neighbour's answer."""

import pytest
import torch

from dataset import canvas
from dataset.batch import leave_one_out
from evaluation.protocols import LatentSearch
from models.latent_search import LeaveOneOut, search
from tests.support.protocols import SEARCH, copied_weights, drawn_episodes, outspoken, unchanged
from tests.support.runs import Trainer
from training.step import train_step
from utils.errors import UserError

ENCODERS = [
    "memory",
    "lpn_var",
    "iterative",
]  # memory tokens, prefix tokens, a context that changes with every ACT step


@pytest.fixture(scope="module", params=ENCODERS)
def encoded(request, fewshot):
    trainer = Trainer(fewshot, f"encoder={request.param}", "data.min_demos=1")
    return outspoken(trainer), trainer


def test_leaving_one_out_asks_each_demonstration_and_hides_it(fewshot):
    trainer = Trainer(fewshot, "encoder=memory", "data.min_demos=1")
    data = drawn_episodes(trainer, 3)
    data["demo_mask"][0, 2] = False
    data["demo_mask"][1] = torch.tensor([True, False, False])
    rows, counted = leave_one_out(data)
    assert counted[:3].tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert rows["demo_mask"].view(-1, 3, 3)[2].tolist() == [
        [False, True, True],
        [True, False, True],
        [True, True, False],
    ]
    assert rows["demo_mask"].view(-1, 3, 3)[0].tolist() == [
        [False, True, False],
        [True, False, False],
        [True, True, False],
    ]
    for sample, turn in ((0, 1), (2, 0), (2, 2)):
        row = 3 * sample + turn
        assert torch.equal(rows["inputs"][row], data["demo_inputs"][sample, turn])
        assert torch.equal(rows["labels"][row], canvas.labels_of(data["demo_labels"][sample, turn]))
        assert (rows["demo_inputs"][row, turn] == canvas.PAD).all() and (
            rows["demo_labels"][row, turn] == canvas.PAD
        ).all()


@pytest.mark.parametrize(
    ("start", "kind"),
    [("encoder", ("gradient", "adam")), ("mean", ("gradient", "sgd")), ("encoder", ("random", "adam"))],
)
def test_latent_search_answers_the_demonstrations_better_and_changes_no_weight(encoded, start, kind):
    model, trainer = encoded
    before, data, objective = copied_weights(model), drawn_episodes(trainer, 3), trainer.config.objective
    config = SEARCH.model_copy(update={"start": start, "search": kind[0], "optimizer": kind[1]})
    left_out = LeaveOneOut(model, data, objective)
    shift = search(model, data, objective, config, torch.Generator().manual_seed(0))
    assert shift.shape == left_out.full.told.shape and shift.any() and unchanged(model, before)
    if start == "encoder":
        loss, found = (left_out.solved(left_out.each(moved)) for moved in (left_out.no_shift(), shift))
        assert (found <= loss).all() and found.sum() < loss.sum()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_search_knows_neither_the_answer_nor_its_neighbours(encoded):
    model, trainer = encoded
    data, objective = drawn_episodes(trainer, 2, with_labels=True), trainer.config.objective

    def found(rows: slice, **changes) -> torch.Tensor:
        part = {name: value[rows] for name, value in (data | changes).items()}
        return search(model, part, objective, SEARCH, torch.Generator().manual_seed(0))

    whole = found(slice(None))
    other = {"inputs": data["inputs"].flip(0), "labels": data["labels"].flip(0)}
    assert torch.equal(found(slice(None), **other), whole)
    for alone in (0, 3):
        torch.testing.assert_close(
            found(slice(alone, alone + 1)), whole[alone : alone + 1], rtol=1e-3, atol=1e-4
        )


def test_one_demonstration_or_none_leaves_the_context_as_it_is(encoded):
    model, trainer = encoded
    data = drawn_episodes(trainer, 1)
    assert not search(model, data, trainer.config.objective, SEARCH, torch.Generator()).any()
    data = drawn_episodes(trainer, 2)
    data["demo_mask"] = torch.zeros_like(data["demo_mask"])  # as the control query_only shows them
    assert not search(model, data, trainer.config.objective, SEARCH, torch.Generator()).any()


@pytest.mark.parametrize(
    ("encoder", "mode"), [*((encoder, "act") for encoder in ENCODERS), ("memory", "supervised")]
)
def test_a_latent_step_moves_what_the_recursion_reads_from_its_time_on(fewshot, encoder, mode):
    plain, late = (
        Trainer(fewshot, f"encoder={encoder}", f"mode={mode}", "train_steps=4", "lr_warmup_steps=0", *more)
        for more in ((), ("latent_step_from=0.5",))
    )
    for step in range(3):
        results = [
            train_step(trainer.state, trainer.batch(), trainer.config, trainer.world).metrics["lm_loss"]
            for trainer in (plain, late)
        ]
        assert torch.equal(*results) == (step < 2)
    assert all(torch.isfinite(parameter).all() for parameter in late.state.model.parameters())


def test_a_latent_step_needs_a_context_to_move(fewshot, puzzle):
    for store, keys in ((fewshot, ["encoder=memory", "mode=cached"]), (puzzle, [])):
        with pytest.raises(UserError, match="latent_step_from=0.5"):
            Trainer(store, *keys, "latent_step_from=0.5")


def test_searches_of_a_large_batch_are_cut_into_portions(memory):
    model, _, trainer = memory
    data = drawn_episodes(trainer, 2)
    whole, cut = (
        LatentSearch(SEARCH, trainer.config.objective, 0, rows).shift(model, data) for rows in (64, 4)
    )
    torch.testing.assert_close(whole, cut, rtol=1e-3, atol=1e-4)
