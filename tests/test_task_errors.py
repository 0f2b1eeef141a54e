"""Error-weighted sampling: what is counted for which task, when it counts, and what is drawn by it."""

import numpy as np
import pytest
import torch

from config import compose
from config.schema import PretrainConfig
from dataset.batch import TASKS
from dataset.canvas import IGNORE_LABEL_ID
from dataset.samplers import SAMPLERS
from models.act import Carry
from tests.support.runs import CPU, Trainer, data_config_of
from training.step import train_step
from training.task_errors import TaskErrors
from utils.errors import UserError


def counted(labels: torch.Tensor, logits: torch.Tensor, halted: list[bool], tasks: list[int]) -> TaskErrors:
    errors = TaskErrors(4, 1.0, 10, CPU)
    data = {"labels": labels, TASKS: torch.tensor(tasks)}
    errors.add(Carry((), torch.ones(len(tasks)), torch.tensor(halted), data), logits)
    return errors


def test_a_halted_sample_counts_for_its_own_task_and_is_right_as_a_whole():
    labels = torch.tensor([[3, 1], [3, 1], [3, 1], [3, IGNORE_LABEL_ID], [IGNORE_LABEL_ID] * 2])
    answers = torch.tensor([[3, 1], [3, 0], [3, 1], [3, 0], [0, 0]])
    logits = torch.nn.functional.one_hot(answers, 5).float()
    errors = counted(labels, logits, [True, True, False, True, True], [2, 2, 2, 0, 1])
    assert errors.pending.tolist() == [[1, 0, 2, 0], [1, 0, 1, 0]]


def test_counts_take_part_in_sampling_from_one_interval_after_they_are_complete():
    errors = TaskErrors(3, 2.0, 10, CPU)
    errors.pending += torch.tensor([[3, 9, 0], [0, 9, 0]])
    errors.advance(9)
    assert errors.factors(9).tolist() == [1, 1, 1]
    errors.advance(10)  # the first interval is over
    assert all(errors.factors(step).tolist() == [1, 1, 1] for step in (10, 19))
    ahead = [errors.factors(step).tolist() for step in (20, 29)]
    assert ahead == [[1, pytest.approx(0.01), 1]] * 2
    with pytest.raises(AssertionError, match="step 30 is drawn by are not known yet"):
        errors.factors(30)
    errors.pending += torch.tensor([[6, 0, 0], [6, 0, 0]])
    errors.advance(20)
    assert errors.factors(20).tolist() == ahead[0]
    assert errors.factors(30).tolist() == pytest.approx([0.16, 0.01, 1])
    with pytest.raises(AssertionError, match="or no more"):
        errors.factors(19)


@pytest.mark.parametrize("layout", ["fewshot", "puzzle"])
def test_tasks_are_drawn_by_share_times_factor_and_alike_on_all_ranks(layout, fewshot, puzzle):
    store = {"fewshot": fewshot, "puzzle": puzzle}[layout]
    config = data_config_of(store)

    def sampler(rank: int = 0, world: int = 1):
        return SAMPLERS[layout](store, config, 7, 12, rank, world)

    whole, factors = sampler(), np.full(len(store.task_ids), 0.5)
    trained = sorted({task for choice in whole.chances.choices.values() for task in choice.tasks.tolist()})
    factors[trained[0]], factors[trained[1]] = 1.0, 0.125
    drawn = np.concatenate([whole.sample(step, factors=factors).query for step in range(700)])
    tasks = np.searchsorted(store.task_pairs, drawn, side="right") - 1
    shares = np.bincount(tasks, minlength=len(factors))[trained] / len(tasks)
    assert np.allclose(shares, factors[trained] / factors[trained].sum(), atol=0.02)
    parts = [sampler(rank, 2).sample(5, factors=factors).query for rank in range(2)]
    assert np.array_equal(np.concatenate(parts), whole.sample(5, factors=factors).query)
    even = whole.sample(5, factors=np.full(len(factors), 0.25)).query
    assert np.array_equal(even, whole.sample(5).query)  # what is alike for all tasks changes nothing


def test_a_sample_that_goes_on_keeps_its_task(fewshot):
    trainer = Trainer(fewshot, "data.error_weighted=1", "arch.halt_exploration_prob=1")
    asked: dict[int, int] = {}
    for _ in range(6):
        batch = trainer.batch()
        train_step(trainer.state, batch, trainer.config, trainer.world)
        pairs = np.searchsorted(fewshot.task_pairs, trainer.samples().query, side="right") - 1
        assert np.array_equal(trainer.batch().data[TASKS], pairs)
        for carry in trainer.state.carries.values():
            for row in range(8):  # the grids of a row are those of the task that it counts for
                grids, task = carry.data["inputs"][row].sum().item(), carry.data[TASKS][row].item()
                if carry.steps[row] > 1:
                    assert asked[row, grids] == task
                asked[row, grids] = task
    seen = trainer.state.task_errors.pending[0].sum()
    assert 0 < seen < 48


@pytest.mark.parametrize("mode", ["act", "fct", "supervised", "cached"])
def test_every_mode_counts_each_sample_once(mode, fewshot):
    options = ["mode.num_act_steps=2", "arch.halt_max_steps=2"] if mode == "fct" else []
    trainer = Trainer(fewshot, f"mode={mode}", "data.error_weighted=1", *options)
    results = [
        train_step(trainer.state, trainer.batch(), trainer.config, trainer.world).metrics for _ in range(3)
    ]
    found = trainer.state.task_errors.pending.sum(1)
    halted = sum(result["count"].item() for result in results)
    assert found[0] == (24 if mode == "fct" else halted) and found[1] <= found[0]


def test_its_settings_are_checked():
    for value in ("0", "-1", "inf"):
        with pytest.raises(UserError, match="data.error_weighted"):
            compose.load(PretrainConfig, "pretrain", [f"data.error_weighted={value}"])
