"""Trainings some of whose gradients are not finite."""

import math

from tests.support.relations import FEW, FEW_DRAFTS
from tests.support.runs import Trainer
from training.step import StepResult, train_step

CASES = {
    "adam_atan2": ("fewshot", []),
    "adamw": ("fewshot", ["optimizer=adamw"]),
    "muon": ("fewshot", ["optimizer=muon"]),
    "puzzle rows": ("puzzle", []),
    "fct": ("fewshot", ["mode=fct", "mode.num_act_steps=2", "arch.halt_max_steps=2"]),
    "supervised": ("puzzle", ["mode=supervised"]),
    "cached": ("fewshot", ["mode=cached"]),
    "several objectives": ("fewshot", ["objective.split=loss_terms", "objective.aggregator=sum"]),
    "drafts": ("fewshot", [*FEW, *FEW_DRAFTS]),
    "frozen": ("fewshot", ["freeze_encoder_steps=2"]),
}
BROKEN = (0, 2, 3)  # calls of `train_step` with a gradient that is not a number


def trained(trainer: Trainer) -> Trainer:
    """The trainer after six batches, some of them broken."""
    for call in range(6):
        broken_step(trainer) if call in BROKEN else train_step(*asked(trainer))
    trainer.state.settle()
    return trainer


def asked(trainer: Trainer) -> tuple:
    return trainer.state, trainer.batch(), trainer.config, trainer.world


def broken_step(trainer: Trainer) -> StepResult:
    """A call of `train_step` whose gradient is not a number."""
    hook = trainer.state.model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
    result = train_step(*asked(trainer))
    hook.remove()
    return result
