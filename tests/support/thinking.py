"""Models whose answers differ from step to step and from attempt to attempt, and who asks them how."""

from dataclasses import replace

import numpy as np
import torch

from dataset.generate import sudoku
from dataset.puzzle_writer import pack
from dataset.store import Store
from evaluation.adaptation import AS_IT_IS
from evaluation.in_training import respondent_of
from evaluation.inference import Inference
from evaluation.predictions import Predictions
from evaluation.protocols import adaptation_of
from evaluation.run import Ask, Evaluation, evaluate
from evaluation.thinking import AS_TRAINED, ThinkingConfig
from tests.support.runs import ALONE, Trainer

SIZE = 4


def write_sudokus(folder, train: int = 2, test: int = 6, num_aug: int = 3) -> Store:
    """Sudokus of 4x4."""
    total = train + test
    puzzles, answers, _ = sudoku.generate(SIZE, total, np.random.default_rng(0))
    splits = {"train": (puzzles[:train], answers[:train]), "test": (puzzles[train:], answers[train:])}
    found = sudoku.fingerprints(puzzles, answers)
    prints = {"train": found[:train], "test": found[train:]}
    pack(
        splits,
        game="sudoku",
        source="generated",
        seed=0,
        num_aug=num_aug,
        details={"size": SIZE},
        fingerprints=prints,
    ).save(folder)
    return Store.load(folder)


def restless(store: Store, *overrides: str) -> Trainer:
    """The run of a tiny model with answers that differ, and with halting logits that do, too."""
    trainer = Trainer(store, *overrides)
    torch.manual_seed(3)
    with torch.no_grad():
        torch.nn.init.normal_(trainer.state.model.q_head.weight, std=0.5)
        torch.nn.init.normal_(trainer.state.model.lm_head.weight)[:2] = 0
    return trainer


def thinking(**changes) -> ThinkingConfig:
    return ThinkingConfig(**{**AS_TRAINED.model_dump(), **changes})


def asked(trainer: Trainer, batch_size: int = 8, **changes) -> Inference:
    """Who asks two test tasks in four views; `changes` of the world, the seed and the thinking."""
    respondent = replace(respondent_of(trainer), world=changes.pop("world", ALONE))
    ask = Ask(seed=changes.pop("seed", 0), max_tasks=2, thinking=thinking(**changes))
    adaptation = adaptation_of(AS_IT_IS, respondent, ask.seed, batch_size)
    return Inference(respondent, ask.questions(respondent, 4), adaptation, ask.thinking)


def evaluated(
    trainer: Trainer, depth_curve: bool = False, record_steps: bool = False, **changes
) -> Evaluation:
    """An evaluation of the test tasks in four views, without controls."""
    config = trainer.config.evaluation.model_copy(update={"num_views": 4, "controls": [], "batch_size": 8})
    think = thinking(**changes)
    model = trainer.state.model
    before, model.config = model.config, think.deepened(model.config)
    try:
        ask = Ask(seed=0, record_steps=record_steps, depth_curve=depth_curve, thinking=think)
        return evaluate(respondent_of(trainer), config, ask)
    finally:
        model.config = before


def answers_in(predictions: Predictions, step: int | None = None) -> dict[tuple[int, ...], tuple]:
    """(query, view, rollout) -> answer and halting logit."""
    known, rows = list(predictions.answers), predictions.rows(step)
    keys = zip(*(rows[name].tolist() for name in ("query", "view", "rollout")), strict=True)
    values = zip(rows["answer"].tolist(), rows["q_halt_logit"].tolist(), strict=True)
    return {key: (known[answer], logit) for key, (answer, logit) in zip(keys, values, strict=True)}
