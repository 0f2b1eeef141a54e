"""Training on a task's own demonstrations: side by side, within a budget, and the model is itself again."""

import math

import numpy as np
import pytest
import torch

from config import compose
from dataset.batch import materialise
from dataset.views import EvaluationSet
from evaluation.inference import collect
from evaluation.predictions import Predictions
from evaluation.session import EvaluateConfig, Session
from evaluation.task_training import TaskTraining, Trained, _Episodes, holding, lessons_of
from models.latent_search import LeaveOneOut
from models.losses import ObjectiveConfig
from tests.support.grids import write_store
from tests.support.protocols import copied_weights, ttt_config, unchanged
from tests.support.runs import ALONE, Trainer, run, untrained
from utils.distributed import World
from utils.errors import UserError


@pytest.mark.parametrize("parameters", ["all", "encoder", "core", "low_rank"])
def test_tasks_trained_side_by_side_are_trained_as_one_by_one_and_the_model_is_itself_again(
    memory, fewshot, parameters
):
    model, questions, trainer = memory
    before, found = copied_weights(model), []
    lessons, _ = lessons_of(questions, questions.asked)
    lessons = [
        lesson
        for lesson in lessons
        if (lesson.side, len(lesson.pairs)) == (lessons[0].side, len(lessons[0].pairs))
    ][:2]
    assert len(lessons) == 2
    training = TaskTraining(ttt_config(f"parameters={parameters}", "rank=2"), trainer.config.objective, 0)
    for stack in (lessons, lessons[:1], lessons[1:]):
        trained = training.train(model, questions, fewshot.grid_table, stack)
        found.append([trained.weights(number) for number in range(len(stack))])
    assert unchanged(model, before) and not model.training
    for side_by_side, (alone,) in zip(found[0], found[1:], strict=True):
        for name, value in alone.items():
            torch.testing.assert_close(side_by_side[name], value, rtol=1e-4, atol=1e-5)
    changed = {name for name, value in found[1][0].items() if not torch.equal(value, before[name])}
    encoder = {name for name in before if name.startswith("context.")}
    assert changed, "training trains"
    if parameters in ("encoder", "core"):
        assert (changed <= encoder) if parameters == "encoder" else not changed & encoder
    if parameters == "all":
        assert changed & encoder and changed - encoder
    assert any(not torch.equal(found[0][0][name], found[0][1][name]) for name in changed), (
        "each task has its own weights"
    )


def test_what_training_keeps_fixed_stays_fixed(fewshot):
    trainer = Trainer(fewshot, "encoder=iterative", "encoder.learned_start=false")
    questions = EvaluationSet(fewshot, trainer.config.data, "test", 2, 0)
    lessons = lessons_of(questions, questions.asked)[0][:1]
    names = {name for name, parameter in trainer.state.model.named_parameters() if parameter.requires_grad}
    for parameters in ("all", "encoder"):
        values = Trained(
            trainer.state.model, questions, lessons, ttt_config(f"parameters={parameters}")
        ).values
        assert set(values) == {name for name in names if parameters == "all" or name.startswith("context.")}
    assert "context.start.context" in dict(trainer.state.model.named_parameters()).keys() - names


def test_training_on_the_demonstrations_lowers_their_loss(memory, fewshot):
    model, questions, trainer = memory
    training = TaskTraining(ttt_config("steps=30", "lr=5e-3"), trainer.config.objective, 0)
    lesson = lessons_of(questions, questions.asked)[0][0]
    asked = np.arange(len(questions.queries)) == lesson.queries[0]
    (batch,) = questions.batches(1, views=slice(0, 1), queries=asked)
    left_out = LeaveOneOut(
        model, materialise(batch.samples, fewshot, fewshot.grid_table, False).data, trainer.config.objective
    )
    untrained_loss = left_out.solved(left_out.each(left_out.no_shift()))
    trained = training.train(model, questions, fewshot.grid_table, [lesson])
    with holding(model, trained.weights(0), torch.zeros(0), None):
        left_out = LeaveOneOut(
            model,
            materialise(batch.samples, fewshot, fewshot.grid_table, False).data,
            trainer.config.objective,
        )
        assert left_out.solved(left_out.each(left_out.no_shift())) < 0.8 * untrained_loss


def test_an_error_while_a_task_is_asked_gives_the_weights_back(memory, fewshot):
    model, questions, trainer = memory
    before = copied_weights(model)
    training = TaskTraining(ttt_config(), trainer.config.objective, 0)

    def report(views: int) -> None:
        assert not unchanged(model, before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, questions, fewshot.grid_table, 8, ALONE, report, adaptation=training)
    assert unchanged(model, before)


def test_no_answer_is_read_in_training_and_every_query_is_asked_once(memory, fewshot, monkeypatch):
    model, questions, trainer = memory
    drawn = []
    monkeypatch.setattr(
        "evaluation.task_training.materialise",
        lambda samples, *a: drawn.append(samples) or materialise(samples, *a),
    )
    whole = collect(
        model,
        questions,
        fewshot.grid_table,
        8,
        ALONE,
        adaptation=TaskTraining(ttt_config(), trainer.config.objective, 0),
    )
    asked = {query.pair for query in questions.queries}
    shown = {int(pair) for samples in drawn for pair in (*samples.query, *samples.demos.flatten())}
    assert not shown & asked and shown <= {pair for query in questions.queries for pair in query.demos}
    for samples in drawn:
        assert (samples.query[:, None] != samples.demos).all()
    halves = Predictions()
    for rank in (0, 1):
        training = TaskTraining(ttt_config(), trainer.config.objective, 0)
        halves.merge([collect(model, questions, fewshot.grid_table, 8, World(rank, 2), adaptation=training)])
    one, two = whole.columns, halves.columns
    assert len(one["query"]) == len(questions.queries) * 2
    assert all(np.array_equal(one[name], two[name]) for name in ("query", "view", "step"))
    assert [list(whole.answers)[i] for i in one["answer"]] == [list(halves.answers)[i] for i in two["answer"]]


def test_seconds_are_a_budget_per_task(memory, fewshot, monkeypatch):
    model, questions, trainer = memory
    clock = iter(range(1000))
    monkeypatch.setattr("evaluation.task_training.clock", lambda device: float(next(clock)))
    training = TaskTraining(ttt_config("steps=1000", "seconds=3"), trainer.config.objective, 0)
    training.train(model, questions, fewshot.grid_table, lessons_of(questions, questions.asked)[0][:1])
    assert (
        next(clock) == 5
    )  # the beginning, before each of three steps, and before the fourth, which is not taken


def test_training_turns_grids_only_if_the_model_has_seen_turned_grids(fewshot):
    for augmentation, turned, recoloured in (
        ("none", False, False),
        ("colours", False, True),
        ("random", True, True),
    ):
        config = Trainer(fewshot, "encoder=memory", f"data.augmentation={augmentation}").config.data
        questions = EvaluationSet(fewshot, config, "test", 4, 0)
        samples = _Episodes(questions, lessons_of(questions, questions.asked)[0][0], 0)(64)
        assert (
            bool(samples.transform.any()) == turned
            and bool((samples.colours != np.arange(10)).any()) == recoloured
        )


def test_training_places_pairs_as_the_model_has_seen_them(fewshot):
    trained = Trainer(fewshot, "encoder=memory").config.data
    for translate, places in ((False, 0), (True, 1), ("each", None)):
        config = trained.model_copy(update={"translate": translate, "canvas": "full"})
        questions = EvaluationSet(fewshot, config, "test", 4, 0)
        samples = _Episodes(questions, lessons_of(questions, questions.asked)[0][0], 0)(16)
        if places is None:
            assert (
                samples.offset.shape == (16, 1 + samples.bucket.demos, 2)
                and (samples.offset[:, 0] != samples.offset[:, 1]).any()
            )
        else:
            assert samples.offset.shape == (16, 2) and samples.offset.any() == places


def test_a_model_with_puzzle_rows_learns_the_rows_of_tasks_it_was_not_trained_on(puzzle, tmp_path):
    checkpoint = untrained(puzzle, tmp_path / "run" / "checkpoints")
    other = write_store(tmp_path / "other", layout="puzzle", seed=5)
    keys = [
        f"checkpoint={checkpoint}",
        f"data_path={other.path}",
        "num_views=3",
        "controls=[]",
        "device=cpu",
        "report=false",
    ]
    with pytest.raises(UserError, match="another dataset, whose rows protocol=test_time_training learns"):
        Session.open(compose.load(EvaluateConfig, "evaluate", keys))
    steps = [
        "protocol=test_time_training",
        "protocol.steps=2",
        "protocol.batch_size=4",
        "protocol.row_steps=1",
    ]
    session = Session.open(compose.load(EvaluateConfig, "evaluate", [*keys, *steps]))
    table = session.model.context.weights
    assert len(table) == other.metadata.num_puzzle_identifiers and (table == table[0]).all()
    evaluation = session.evaluate()
    assert (
        evaluation.protocol == "test_time_training"
        and len(evaluation.predictions)
        and (table == table[0]).all()
    )
    questions = session.questions()
    lesson = lessons_of(questions, questions.asked)[0][0]
    config = ttt_config("steps=1", "row_steps=1", "batch_size=32")
    trained = TaskTraining(config, ObjectiveConfig.of_run(session.info["config"]["objective"]), 0).train(
        session.model, questions, other.grid_table, [lesson]
    )
    assert (trained.rows(0) != table[0]).any(dim=1).all(), "rows of all views learn"
    own = dict(session.model.named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in trained.weights(0).items()), (
        "and at first nothing else"
    )


def test_a_broken_gradient_counts_as_none(memory):
    model, questions, trainer = memory
    trained = Trained(model, questions, lessons_of(questions, questions.asked)[0][:2], ttt_config())
    for value in trained.values.values():
        value.grad = torch.ones_like(value)
        value.grad[0, ...] = 5.0
    next(iter(trained.values.values())).grad[1].view(-1)[0] = math.nan
    assert trained.prepare_gradients(1.0).tolist() == [True, False]
    first, second = (
        sum(value.grad[task].square().sum() for value in trained.values.values()) for task in (0, 1)
    )
    assert first == pytest.approx(1.0, abs=1e-4) and second == 0


def test_tasks_on_a_large_canvas_are_trained_side_by_side(tmp_path):
    """A batch alone would leave out padding of its demonstrations, and its shape would depend on the data."""
    store = write_store(tmp_path, train=3, test=3, side=10)
    trainer = Trainer(store, "encoder=memory", "data.buckets=[10]", "arch.halt_max_steps=1")
    questions = EvaluationSet(store, trainer.config.data, "test", 1, 0)
    lesson = lessons_of(questions, questions.asked)[0][0]
    training = TaskTraining(ttt_config("steps=1"), trainer.config.objective, 0)
    trained = training.train(trainer.state.model, questions, store.grid_table, [lesson, lesson])
    alone = training.train(trainer.state.model, questions, store.grid_table, [lesson]).weights(0)
    for name, value in trained.weights(1).items():
        torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_processes_share_the_tasks_to_train(fewshot, tmp_path):
    """Two processes and one stack of tasks: one has nothing to do. And one task at a time, for both."""
    checkpoint = untrained(fewshot, tmp_path / "run" / "checkpoints")
    for count in (8, 1):
        keys = [
            f"checkpoint={checkpoint}",
            "num_views=2",
            "controls=[]",
            "device=cpu",
            "report=false",
            "max_eval_groups=4",
        ]
        keys += [
            "protocol=test_time_training",
            "protocol.steps=2",
            "protocol.batch_size=4",
            f"protocol.tasks_at_once={count}",
        ]
        folders = {world: tmp_path / f"{count}-{world}" for world in (1, 2)}
        for world, folder in folders.items():
            done = run("evaluate.py", *keys, f"output_dir={folder}", world=world)
            assert done.returncode == 0, done.stderr
        one, two = ((folder / "per_example.jsonl").read_text() for folder in folders.values())
        assert one == two and '"protocol": "test_time_training"' in one
