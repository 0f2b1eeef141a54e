"""Training on a task's own demonstrations: side by side, within a budget, and the model is itself again."""

import math

import numpy as np
import pytest
import torch

from config import compose
from dataset.batch import materialise
from dataset.views import EvaluationSet
from evaluation.adaptation import AS_IT_IS
from evaluation.in_training import respondent_of
from evaluation.lessons import EpisodeSampler, lessons_of, rows_of
from evaluation.predictions import Predictions
from evaluation.session import EvaluateConfig, Session
from evaluation.task_training import TaskTraining
from evaluation.task_weights import TaskWeights, weights_lent
from models.latent_search import LeaveOneOut
from tests.support.grids import write_store
from tests.support.protocols import copied_weights, ttt_config, unchanged
from tests.support.respondents import inference
from tests.support.runs import Trainer, run, untrained
from utils.distributed import World
from utils.errors import UserError


def training_of(trainer: Trainer, *overrides: str) -> TaskTraining:
    return TaskTraining(ttt_config(*overrides), respondent_of(trainer), seed=0, batch_size=8)


def weights_of(trainer: Trainer, questions, lessons, parameters: str) -> TaskWeights:
    """The stacked weights before any step."""
    rows = [rows_of(questions, lesson)[0] for lesson in lessons]
    return TaskWeights(trainer.state.model, rows, parameters, rank=2)


@pytest.mark.parametrize("parameters", ["all", "encoder", "core", "low_rank"])
def test_tasks_trained_side_by_side_are_trained_as_one_by_one_and_the_model_is_itself_again(
    memory, parameters
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
    training = training_of(trainer, f"parameters={parameters}", "rank=2")
    for stack in (lessons, lessons[:1], lessons[1:]):
        trained = training.train(questions, stack)
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
        values = weights_of(trainer, questions, lessons, parameters).values
        assert set(values) == {name for name in names if parameters == "all" or name.startswith("context.")}
    assert "context.start.context" in dict(trainer.state.model.named_parameters()).keys() - names


def test_training_on_the_demonstrations_lowers_their_loss(memory, fewshot):
    model, questions, trainer = memory
    training = training_of(trainer, "steps=30", "lr=5e-3")
    lesson = lessons_of(questions, questions.asked)[0][0]
    asked = np.arange(len(questions.queries)) == lesson.queries[0]
    (batch,) = questions.batches(1, views=slice(0, 1), queries=asked)
    left_out = LeaveOneOut(
        model, materialise(batch.samples, fewshot, fewshot.grid_table, False).data, trainer.config.objective
    )
    untrained_loss = left_out.solved(left_out.each(left_out.no_shift()))
    trained = training.train(questions, [lesson])
    with weights_lent(model, trained.weights(0), torch.zeros(0), None):
        left_out = LeaveOneOut(
            model,
            materialise(batch.samples, fewshot, fewshot.grid_table, False).data,
            trainer.config.objective,
        )
        assert left_out.solved(left_out.each(left_out.no_shift())) < 0.8 * untrained_loss


def test_an_error_while_a_task_is_asked_gives_the_weights_back(memory):
    model, questions, trainer = memory
    before = copied_weights(model)

    def fail(views: int) -> None:
        assert not unchanged(model, before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inference(trainer, questions, protocol=ttt_config()).collect(progress=fail)
    assert unchanged(model, before)


def test_no_answer_is_read_in_training_and_every_query_is_asked_once(memory, monkeypatch):
    _, questions, trainer = memory
    drawn = []
    monkeypatch.setattr(
        "evaluation.task_training.materialise",
        lambda samples, *a: drawn.append(samples) or materialise(samples, *a),
    )
    whole = inference(trainer, questions, protocol=ttt_config()).collect()
    asked = {query.pair for query in questions.queries}
    shown = {int(pair) for samples in drawn for pair in (*samples.query, *samples.demos.flatten())}
    assert not shown & asked and shown <= {pair for query in questions.queries for pair in query.demos}
    for samples in drawn:
        assert (samples.query[:, None] != samples.demos).all()
    halves = Predictions()
    for rank in (0, 1):
        half = inference(trainer, questions, protocol=ttt_config(), world=World(rank, 2))
        halves.merge([half.collect()])
    one, two = whole.columns, halves.columns
    assert len(one["query"]) == len(questions.queries) * 2
    assert all(np.array_equal(one[name], two[name]) for name in ("query", "view", "step"))
    assert [list(whole.answers)[i] for i in one["answer"]] == [list(halves.answers)[i] for i in two["answer"]]


def test_the_model_as_it_was_answers_its_share_of_the_views(memory, puzzle):
    _, two_views, trainer = memory
    three_views = EvaluationSet(two_views.store, trainer.config.data, "test", 3, 0)

    def answers(protocol, questions=three_views, **changes) -> dict[tuple[int, int], bytes]:
        found = inference(trainer, questions, protocol=protocol, **changes).collect()
        told, columns = list(found.answers), found.columns
        rows = zip(columns["query"], columns["view"], columns["answer"], strict=True)
        return {(query, view): told[answer] for query, view, answer in rows}

    def sharing(share):  # with a rate at which what is learned is seen in the answers
        return ttt_config("lr=1", "parameters=core", f"as_it_was={share}")

    as_it_was, adapted = answers(AS_IT_IS), answers(sharing(0.0))
    assert answers(sharing(1.0)) == as_it_was != adapted
    for share, own in ((0.5, 2), (0.1, 1)):  # of three views, rounded up
        expected = {row: (as_it_was if row[1] < own else adapted)[row] for row in adapted}
        assert answers(sharing(share)) == expected
        halves = [answers(sharing(share), world=World(rank, 2)) for rank in (0, 1)]
        assert {**halves[0], **halves[1]} == expected and len(halves[0]) + len(halves[1]) == len(expected)
    refusal = TaskTraining.refuses(sharing(0.5), puzzle.layout, "votes", False)
    assert refusal is not None and "as_it_was=0.5" in refusal


def test_seconds_are_a_budget_per_task(memory, monkeypatch):
    _, questions, trainer = memory
    clock = iter(range(1000))
    monkeypatch.setattr("evaluation.task_training.clock", lambda device: float(next(clock)))
    training = training_of(trainer, "steps=1000", "seconds=3")
    training.train(questions, lessons_of(questions, questions.asked)[0][:1])
    # The beginning, before each of three steps, and before the fourth, which is not taken.
    assert next(clock) == 5


def test_training_turns_grids_only_if_the_model_has_seen_turned_grids(fewshot):
    for augmentation, turned, recoloured in (
        ("none", False, False),
        ("colours", False, True),
        ("random", True, True),
    ):
        config = Trainer(fewshot, "encoder=memory", f"data.augmentation={augmentation}").config.data
        questions = EvaluationSet(fewshot, config, "test", 4, 0)
        samples = EpisodeSampler(questions, lessons_of(questions, questions.asked)[0][0], 0).draw(64)
        assert (
            bool(samples.transform.any()) == turned
            and bool((samples.colours != np.arange(10)).any()) == recoloured
        )


def test_training_places_pairs_as_the_model_has_seen_them(fewshot):
    trained = Trainer(fewshot, "encoder=memory").config.data
    for translate, places in ((False, 0), (True, 1), ("each", None)):
        config = trained.model_copy(update={"translate": translate, "canvas": "full"})
        questions = EvaluationSet(fewshot, config, "test", 4, 0)
        samples = EpisodeSampler(questions, lessons_of(questions, questions.asked)[0][0], 0).draw(16)
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
    session = Session.open(compose.load(EvaluateConfig, "evaluate", [*keys, *steps, "save_predictions=true"]))
    model = session.trained.model
    table = model.context.weights
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
    trained = TaskTraining(config, session.respondent, 0, batch_size=8).train(questions, [lesson])
    assert (trained.rows(0) != table[0]).any(dim=1).all(), "rows of all views learn"
    own = dict(model.named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in trained.weights(0).items()), (
        "and at first nothing else"
    )


def test_a_broken_gradient_counts_as_none(memory):
    _, questions, trainer = memory
    trained = weights_of(trainer, questions, lessons_of(questions, questions.asked)[0][:2], "all")
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
    training = training_of(trainer, "steps=1")
    trained = training.train(questions, [lesson, lesson])
    alone = training.train(questions, [lesson]).weights(0)
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
