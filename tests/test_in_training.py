"""Evaluations of a run in training: limits, averaged weights, and full marks for a model that knows."""

import json

import numpy as np
import pytest
import torch

from config import compose
from dataset import augment, canvas
from dataset.batch import materialise
from dataset.store import Store
from dataset.writer import write_dataset
from evaluation import inference
from evaluation.in_training import respondent_of
from evaluation.run import Ask, evaluate
from evaluation.session import EvaluateConfig, Session
from models.act import Answer
from tests.support.grids import random_task
from tests.support.runs import Trainer, train_here, untrained
from utils.errors import UserError


def test_a_limit_of_training_counts_before_subsets_are_chosen(tmp_path):
    """Tasks beyond it have rows that learned nothing."""
    rng = np.random.default_rng(3)
    tasks = {name: [random_task(rng, f"{name}{i}", side=3) for i in range(3)] for name in "xpq"}
    write_dataset(tmp_path / "d", tasks, ["p", "q"], layout="puzzle", source="random", seed=0, num_aug=1)
    path = untrained(Store.load(tmp_path / "d"), tmp_path / "checkpoints", "data.max_eval_groups=4")

    def asked(*overrides: str) -> list[str]:
        questions = Session.open(
            compose.load(EvaluateConfig, "evaluate", [f"checkpoint={path}", "device=cpu", *overrides])
        ).questions()
        return [questions.store.task_ids[task] for task in questions.tasks]

    assert asked() == ["p0", "p1", "p2", "q0"] and asked("subsets=[q]") == ["q0"]
    assert asked("subsets=[p]", "max_eval_groups=2") == ["p0", "p1"]
    for overrides in (["subsets=[x]"], ["subsets=[]"], ["subsets=[p]", "split=train"]):
        with pytest.raises(
            UserError,
            match=r"has no task for split=(test|train) subsets=\[x?p?\]; subsets of this split: (p, q|x)",
        ):
            asked(*overrides)


def test_how_many_tasks_training_evaluated_limits_no_evaluation_of_a_model_that_reads_demonstrations(
    fewshot, tmp_path
):
    path = untrained(fewshot, tmp_path / "checkpoints", "data.max_eval_groups=2", "data.max_train_groups=3")
    settings = [f"checkpoint={path}", "device=cpu"]
    asked = [
        len(Session.open(compose.load(EvaluateConfig, "evaluate", [*settings, *more])).questions().tasks)
        for more in ([], ["split=train"], ["max_eval_groups=1"])
    ]
    assert asked == [len(fewshot.tasks_of("test")), 3, 1]


def test_evaluation_inside_training_uses_the_averages_and_gives_them_back(fewshot, tmp_path, capsys):
    train_here(
        fewshot,
        tmp_path / "a",
        "train_steps=4",
        "eval_interval=2",
        "evaluation.num_views=2",
        "data.max_demos=2",
    )
    said = capsys.readouterr().err
    assert (
        said.count("inductive") == 3
        and said.count("evaluation: ") == said.count("have more than data.max_demos=2") == 1
    )
    train_here(fewshot, tmp_path / "b", "train_steps=4", "data.max_demos=2")
    lines = {
        name: [
            json.loads(line) for line in (tmp_path / name / "r" / "metrics.jsonl").read_text().splitlines()
        ]
        for name in "ab"
    }
    losses = {
        name: [line["train/lm_loss"] for line in lines[name] if "train/lm_loss" in line] for name in "ab"
    }
    assert losses["a"] == losses["b"]
    assert [line["step"] for line in lines["a"] if "ARC/pass@1" in line] == [2, 4]


def test_a_model_that_knows_the_answers_scores_full_marks(fewshot, monkeypatch):
    """The whole path from batches to pass@k: views are undone, votes counted, answers matched."""
    trainer = Trainer(fewshot)
    config = trainer.config
    truth = {}
    for index in range(len(fewshot.task_ids)):
        for number, pair in enumerate(fewshot.task(index).pairs):
            truth[int(fewshot.task_pairs[index]) + number] = pair.output

    def knowing(data, samples):
        rows = [
            canvas.encode(augment.apply(truth[int(query)], int(transform), colours), samples.bucket.side)
            for query, transform, colours in zip(
                samples.query, samples.transform, samples.colours, strict=True
            )
        ]
        return torch.nn.functional.one_hot(torch.from_numpy(np.stack(rows)).long(), 12).float()

    asked = []

    def remember(samples, *arguments, **options):
        asked.append(samples)
        return materialise(samples, *arguments, **options)

    def answer(model, data, watch, shift, rollouts=None):
        logits = knowing(data, asked[-1])
        return Answer(logits, torch.zeros(len(logits)), torch.ones(len(logits), dtype=torch.int32))

    monkeypatch.setattr(inference, "materialise", remember)
    monkeypatch.setattr(inference, "solve", answer)
    settings = config.evaluation.model_copy(update={"num_views": 5, "controls": ["copy_input"]})
    for split, protocol in (("test", "inductive"), ("train", "transductive")):
        result = evaluate(respondent_of(trainer), settings, Ask(seed=0, split=split))
        assert result.metrics()["tasks_solved@1"] == result.metrics()["ARC/single_view"] == 1.0
        assert result.metrics()["ARC/pass@1/copy_input"] == 0.0 and result.protocol == protocol
        assert all(record["top1_correct"] and record["num_votes"] == 5 for record in result.records)
