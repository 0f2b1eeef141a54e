"""What is done with a task's demonstrations before it is asked: nothing leaks, nothing stays, and what is done helps them."""

import json
import math

import numpy as np
import pytest
import torch

from config import compose
from config.schema import EvaluateConfig
from dataset import canvas
from dataset.batch import leave_one_out, materialise
from dataset.leaks import UNKNOWN_PAIRS, tasks_seen
from dataset.views import EvaluationSet
from evaluation.evaluate import evaluate
from evaluation.inference import agreement, collect
from evaluation.predictions import Predictions
from evaluation.protocols import AsItIsConfig, LatentSearch, adaptation_of, label, protocol_config
from evaluation.session import Session
from evaluation.solver import Solver
from evaluation.test_time_training import TestTimeTraining, Trained, _Episodes, holding, lessons_of
from evaluation.voting import VoteTable
from models.latent_search import LeaveOneOut, search
from models.losses import ObjectiveConfig
from tests.conftest import random_task, run, write_store
from tests.test_predict import untrained
from tests.test_report import embedded
from tests.test_training import ALONE, CPU, Trainer
from training.step import train_step
from utils.distributed import World
from utils.errors import UserError

SEARCH = protocol_config(compose.compose("evaluate", ["checkpoint=x", "protocol=latent_search", "protocol.steps=5"])[0]["protocol"])
ENCODERS = ["memory", "lpn_var", "iterative"]  # memory tokens, prefix tokens, a context that changes with every ACT step


def ttt_config(*overrides: str):
    chosen = ["protocol=test_time_training", "protocol.steps=4", "protocol.batch_size=4", "protocol.lr=1e-3"]
    return compose.load(EvaluateConfig, "evaluate", ["checkpoint=x", *chosen, *(f"protocol.{o}" for o in overrides)]).protocol


def outspoken(trainer):
    """The model of a trainer, with a head that gives answers which differ."""
    torch.manual_seed(0)
    torch.nn.init.normal_(trainer.state.model.lm_head.weight)
    return trainer.state.model.eval()


@pytest.fixture(scope="module", params=ENCODERS)
def encoded(request, fewshot):
    trainer = Trainer(fewshot, f"encoder={request.param}", "data.min_demos=1")
    return outspoken(trainer), trainer


@pytest.fixture(scope="module")
def memory(fewshot):
    trainer = Trainer(fewshot, "encoder=memory")
    return outspoken(trainer), EvaluationSet(fewshot, trainer.config.data, "test", 2, 0), trainer


def episodes(trainer, demos: int, with_labels: bool = False):
    cell = next(cell for cell in trainer.sampler.cells if cell.demos == demos)
    return materialise(trainer.sampler.sample(0, cell), trainer.store, trainer.store.grid_table, with_labels).data


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_leaving_one_out_asks_each_demonstration_and_hides_it(fewshot):
    trainer = Trainer(fewshot, "encoder=memory", "data.min_demos=1")
    data = episodes(trainer, 3)
    data["demo_mask"][0, 2] = False
    data["demo_mask"][1] = torch.tensor([True, False, False])
    rows, counted = leave_one_out(data)
    assert counted[:3].tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert rows["demo_mask"].view(-1, 3, 3)[2].tolist() == [[False, True, True], [True, False, True], [True, True, False]]
    assert rows["demo_mask"].view(-1, 3, 3)[0].tolist() == [[False, True, False], [True, False, False], [True, True, False]]
    for sample, turn in ((0, 1), (2, 0), (2, 2)):
        row = 3 * sample + turn
        assert torch.equal(rows["inputs"][row], data["demo_inputs"][sample, turn])
        assert torch.equal(rows["labels"][row], canvas.labels_of(data["demo_labels"][sample, turn]))
        assert (rows["demo_inputs"][row, turn] == canvas.PAD).all() and (rows["demo_labels"][row, turn] == canvas.PAD).all()


@pytest.mark.parametrize(
    ("start", "kind"), [("encoder", ("gradient", "adam")), ("mean", ("gradient", "sgd")), ("encoder", ("random", "adam"))]
)
def test_latent_search_answers_the_demonstrations_better_and_changes_no_weight(encoded, start, kind):
    model, trainer = encoded
    before, data, objective = weights_of(model), episodes(trainer, 3), trainer.config.objective
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
    data, objective = episodes(trainer, 2, with_labels=True), trainer.config.objective

    def found(rows: slice, **changes) -> torch.Tensor:
        part = {name: value[rows] for name, value in (data | changes).items()}
        return search(model, part, objective, SEARCH, torch.Generator().manual_seed(0))

    whole = found(slice(None))
    other = {"inputs": data["inputs"].flip(0), "labels": data["labels"].flip(0)}
    assert torch.equal(found(slice(None), **other), whole)
    for alone in (0, 3):
        torch.testing.assert_close(found(slice(alone, alone + 1)), whole[alone : alone + 1], rtol=1e-3, atol=1e-4)


def test_one_demonstration_or_none_leaves_the_context_as_it_is(encoded):
    model, trainer = encoded
    data = episodes(trainer, 1)
    assert not search(model, data, trainer.config.objective, SEARCH, torch.Generator()).any()
    data = episodes(trainer, 2)
    data["demo_mask"] = torch.zeros_like(data["demo_mask"])  # as the control query_only shows them
    assert not search(model, data, trainer.config.objective, SEARCH, torch.Generator()).any()


@pytest.mark.parametrize("parameters", ["all", "encoder", "core", "low_rank"])
def test_tasks_trained_side_by_side_are_trained_as_one_by_one_and_the_model_is_itself_again(memory, fewshot, parameters):
    model, questions, trainer = memory
    before, found = weights_of(model), []
    lessons, _ = lessons_of(questions, questions.asked)
    lessons = [lesson for lesson in lessons if (lesson.side, len(lesson.pairs)) == (lessons[0].side, len(lessons[0].pairs))][:2]
    assert len(lessons) == 2
    training = TestTimeTraining(ttt_config(f"parameters={parameters}", "rank=2"), trainer.config.objective, 0)
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
    assert any(not torch.equal(found[0][0][name], found[0][1][name]) for name in changed), "each task has its own weights"


def test_what_training_keeps_fixed_stays_fixed(fewshot):
    trainer = Trainer(fewshot, "encoder=iterative", "encoder.learned_start=false")
    questions = EvaluationSet(fewshot, trainer.config.data, "test", 2, 0)
    lessons = lessons_of(questions, questions.asked)[0][:1]
    names = {name for name, parameter in trainer.state.model.named_parameters() if parameter.requires_grad}
    for parameters in ("all", "encoder"):
        values = Trained(trainer.state.model, questions, lessons, ttt_config(f"parameters={parameters}")).values
        assert set(values) == {name for name in names if parameters == "all" or name.startswith("context.")}
    assert "context.start.context" in dict(trainer.state.model.named_parameters()).keys() - names


def test_training_on_the_demonstrations_lowers_their_loss(memory, fewshot):
    model, questions, trainer = memory
    training = TestTimeTraining(ttt_config("steps=30", "lr=5e-3"), trainer.config.objective, 0)
    lesson = lessons_of(questions, questions.asked)[0][0]
    asked = np.arange(len(questions.queries)) == lesson.queries[0]
    (batch,) = questions.batches(1, views=slice(0, 1), queries=asked)
    left_out = LeaveOneOut(model, materialise(batch.samples, fewshot, fewshot.grid_table, False).data, trainer.config.objective)
    untrained_loss = left_out.solved(left_out.each(left_out.no_shift()))
    trained = training.train(model, questions, fewshot.grid_table, [lesson])
    with holding(model, trained.weights(0), torch.zeros(0), None):
        left_out = LeaveOneOut(model, materialise(batch.samples, fewshot, fewshot.grid_table, False).data, trainer.config.objective)
        assert left_out.solved(left_out.each(left_out.no_shift())) < 0.8 * untrained_loss


def test_an_error_while_a_task_is_asked_gives_the_weights_back(memory, fewshot):
    model, questions, trainer = memory
    before = weights_of(model)
    training = TestTimeTraining(ttt_config(), trainer.config.objective, 0)

    def report(views: int) -> None:
        assert not unchanged(model, before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, questions, fewshot.grid_table, 8, ALONE, report, adaptation=training)
    assert unchanged(model, before)


def test_no_answer_is_read_in_training_and_every_query_is_asked_once(memory, fewshot, monkeypatch):
    model, questions, trainer = memory
    drawn = []
    monkeypatch.setattr("evaluation.test_time_training.materialise", lambda samples, *a: drawn.append(samples) or materialise(samples, *a))
    whole = collect(model, questions, fewshot.grid_table, 8, ALONE, adaptation=TestTimeTraining(ttt_config(), trainer.config.objective, 0))
    asked = {query.pair for query in questions.queries}
    shown = {int(pair) for samples in drawn for pair in (*samples.query, *samples.demos.flatten())}
    assert not shown & asked and shown <= {pair for query in questions.queries for pair in query.demos}
    for samples in drawn:
        assert (samples.query[:, None] != samples.demos).all()
    halves = Predictions()
    for rank in (0, 1):
        training = TestTimeTraining(ttt_config(), trainer.config.objective, 0)
        halves.merge([collect(model, questions, fewshot.grid_table, 8, World(rank, 2), adaptation=training)])
    one, two = whole.columns, halves.columns
    assert len(one["query"]) == len(questions.queries) * 2
    assert all(np.array_equal(one[name], two[name]) for name in ("query", "view", "step"))
    assert [list(whole.answers)[i] for i in one["answer"]] == [list(halves.answers)[i] for i in two["answer"]]


def test_what_cannot_learn_is_answered_as_it_is_and_said(tmp_path):
    """A task with one demonstration; the control without any."""
    store = write_store(tmp_path / "data")
    trainer = Trainer(store, "encoder=memory", "data.max_demos=1")
    model = outspoken(trainer)
    for config in (ttt_config(), SEARCH):
        plain, adapted = (
            evaluate(
                *(model, store, trainer.config.data, trainer.config.evaluation, trainer.config.objective, CPU, ALONE),
                seed=0,
                trained_pairs=np.zeros(0, np.uint64),
                protocol=protocol,
            )
            for protocol in (AsItIsConfig(name="auto"), config)
        )
        assert np.array_equal(plain.predictions.columns["answer"], adapted.predictions.columns["answer"])
        assert adapted.protocol == config.name
        assert any("have too few demonstrations" in note for note in adapted.notes)
    hidden = EvaluationSet(store, trainer.config.data, "test", 1, 0, "query_only")
    assert lessons_of(hidden, hidden.asked) == ([], pytest.approx(np.ones(len(hidden.queries), bool)))


def test_seconds_are_a_budget_per_task(memory, fewshot, monkeypatch):
    model, questions, trainer = memory
    clock = iter(range(1000))
    monkeypatch.setattr("evaluation.test_time_training.clock", lambda device: float(next(clock)))
    training = TestTimeTraining(ttt_config("steps=1000", "seconds=3"), trainer.config.objective, 0)
    training.train(model, questions, fewshot.grid_table, lessons_of(questions, questions.asked)[0][:1])
    assert next(clock) == 5  # the beginning, before each of three steps, and before the fourth, which is not taken


@pytest.mark.parametrize("split", ["test", "train"])
@pytest.mark.parametrize("control", ["none", "shuffled_demonstrations", "query_only"])
@pytest.mark.parametrize("layout", ["fewshot", "puzzle"])
def test_no_query_is_among_what_is_learned_for_it(split, control, layout, fewshot, puzzle):
    store = {"fewshot": fewshot, "puzzle": puzzle}[layout]
    questions = EvaluationSet(store, Trainer(store).config.data, split, 2, 0, control)
    assert all(query.pair not in questions.demonstrations(query) for query in questions.queries)
    assert any(questions.demonstrations(query) for query in questions.queries) == (control != "query_only")


def test_training_turns_grids_only_if_the_model_has_seen_turned_grids(fewshot):
    for augmentation, turned, recoloured in (("none", False, False), ("colours", False, True), ("random", True, True)):
        config = Trainer(fewshot, "encoder=memory", f"data.augmentation={augmentation}").config.data
        questions = EvaluationSet(fewshot, config, "test", 4, 0)
        samples = _Episodes(questions, lessons_of(questions, questions.asked)[0][0], 0)(64)
        assert bool(samples.transform.any()) == turned and bool((samples.colours != np.arange(10)).any()) == recoloured


def test_training_places_pairs_as_the_model_has_seen_them(fewshot):
    trained = Trainer(fewshot, "encoder=memory").config.data
    for translate, places in ((False, 0), (True, 1), ("each", None)):
        config = trained.model_copy(update={"translate": translate, "canvas": "full"})
        questions = EvaluationSet(fewshot, config, "test", 4, 0)
        samples = _Episodes(questions, lessons_of(questions, questions.asked)[0][0], 0)(16)
        if places is None:
            assert samples.offset.shape == (16, 1 + samples.cell.demos, 2) and (samples.offset[:, 0] != samples.offset[:, 1]).any()
        else:
            assert samples.offset.shape == (16, 2) and samples.offset.any() == places


def test_a_model_with_puzzle_rows_learns_the_rows_of_tasks_it_was_not_trained_on(puzzle, tmp_path):
    checkpoint = untrained(puzzle, tmp_path / "run" / "checkpoints")
    other = write_store(tmp_path / "other", layout="puzzle", seed=5)
    keys = [f"checkpoint={checkpoint}", f"data_path={other.path}", "num_views=3", "controls=[]", "device=cpu", "report=false"]
    with pytest.raises(UserError, match="another dataset, whose rows protocol=test_time_training learns"):
        Session.open(compose.load(EvaluateConfig, "evaluate", keys))
    steps = ["protocol=test_time_training", "protocol.steps=2", "protocol.batch_size=4", "protocol.row_steps=1"]
    session = Session.open(compose.load(EvaluateConfig, "evaluate", [*keys, *steps]))
    table = session.model.context.weights
    assert len(table) == other.metadata.num_puzzle_identifiers and (table == table[0]).all()
    evaluation = session.evaluate()
    assert evaluation.protocol == "test_time_training" and len(evaluation.predictions) and (table == table[0]).all()
    questions = session.questions()
    lesson = lessons_of(questions, questions.asked)[0][0]
    config = ttt_config("steps=1", "row_steps=1", "batch_size=32")
    trained = TestTimeTraining(config, ObjectiveConfig.of_run(session.info["config"]["objective"]), 0).train(
        session.model, questions, other.grid_table, [lesson]
    )
    assert (trained.rows(0) != table[0]).any(dim=1).all(), "rows of all views learn"
    own = dict(session.model.named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in trained.weights(0).items()), "and at first nothing else"


def test_a_broken_gradient_counts_as_none(memory):
    model, questions, trainer = memory
    trained = Trained(model, questions, lessons_of(questions, questions.asked)[0][:2], ttt_config())
    for value in trained.values.values():
        value.grad = torch.ones_like(value)
        value.grad[0, ...] = 5.0
    next(iter(trained.values.values())).grad[1].view(-1)[0] = math.nan
    assert trained.prepare_gradients(1.0).tolist() == [True, False]
    first, second = (sum(value.grad[task].square().sum() for value in trained.values.values()) for task in (0, 1))
    assert first == pytest.approx(1.0, abs=1e-4) and second == 0


def test_a_named_protocol_is_checked(fewshot, puzzle):
    none, tasks = np.zeros(0, np.uint64), np.arange(3)
    known = fewshot.pair_fingerprint[fewshot.task_pairs[:2]]
    seen, none, unknown = (tasks_seen(fewshot, tasks, trained) for trained in (known, none, np.append(known, UNKNOWN_PAIRS)))
    names = {name: AsItIsConfig(name=name) for name in ("auto", "inductive", "transductive")}
    assert label(names["auto"], fewshot, none) == label(names["inductive"], fewshot, none) == "inductive"
    assert label(names["auto"], fewshot, seen) == label(ttt_config(), fewshot, seen) == "transductive"
    assert label(ttt_config(), fewshot, none) == label(ttt_config(), puzzle, none) == "test_time_training"
    assert label(names["auto"], puzzle, none) == "transductive"
    with pytest.raises(UserError, match="2 of the 3 tasks share a pair"):
        label(names["inductive"], fewshot, seen)
    with pytest.raises(UserError, match="would be transductive, since nothing is known of the training data of the weights"):
        label(names["inductive"], fewshot, unknown)
    with pytest.raises(UserError, match="learned row per task"):
        label(names["inductive"], puzzle, none)
    with pytest.raises(UserError, match="none of the evaluated tasks shares"):
        label(names["transductive"], fewshot, none)
    with pytest.raises(UserError, match="no encoder"):
        adaptation_of(SEARCH, None, 0, 8, "puzzle")
    with pytest.raises(UserError, match="share one rule have none"):
        adaptation_of(ttt_config(), None, 0, 8, "pairs")
    with pytest.raises(UserError, match="protocol.name='ttt' is unknown"):
        compose.load(EvaluateConfig, "evaluate", ["checkpoint=x", "protocol.name=ttt"])


def test_one_task_is_answered_under_a_protocol(fewshot, tmp_path):
    solver = Solver.from_pretrained(untrained(fewshot, tmp_path))
    task = random_task(np.random.default_rng(3), "mine", 3)
    for protocol in (SEARCH, ttt_config()):
        solution = solver.ask(task, 2, 0, 8, protocol)
        assert solution.protocol == protocol.name and not solution.notes
        assert {record["protocol"] for record in solution.records} == {protocol.name}
    (note,) = solver.ask(random_task(np.random.default_rng(3), "mine", 1), 2, 0, 8, ttt_config()).notes
    assert note == "one demonstration is too few for test_time_training: the model answered as it is"
    assert json.dumps(solver.solve(task.to_json(), 2, protocol=SEARCH))


def test_agreement_is_the_share_of_demonstrations_answered_exactly_from_the_others(memory, fewshot, monkeypatch):
    model, _, trainer = memory
    data = episodes(trainer, 2)
    rows, _ = leave_one_out(data)
    right = torch.tensor([True, False] * (len(rows["labels"]) // 4) + [True, True] * (len(rows["labels"]) // 4))

    def answer(model, part, shift=None):
        first = next(i for i in range(len(rows["inputs"])) if torch.equal(rows["inputs"][i], part["inputs"][0]))
        tokens = torch.where(part["labels"] < 0, 0, part["labels"])
        tokens = torch.where(right[first : first + len(tokens)][:, None], tokens, (tokens + 1) % 12)
        return type("Answer", (), {"logits": torch.nn.functional.one_hot(tokens, 12).float()})

    monkeypatch.setattr("evaluation.inference.solve", answer)
    assert agreement(model, data).tolist() == right.view(-1, 2).float().mean(1).tolist()


def test_agreement_on_contexts_that_were_not_searched_is_refused(memory, fewshot):
    model, _, trainer = memory
    config, protocol = trainer.config.evaluation.model_copy(update={"ranking": "agreement"}), SEARCH.model_copy(update={"start": "mean"})
    with pytest.raises(UserError, match="use protocol.start=encoder"):
        evaluate(
            *(model, fewshot, trainer.config.data, config, trainer.config.objective, CPU, ALONE),
            seed=0,
            trained_pairs=np.zeros(0, np.uint64),
            protocol=protocol,
        )


def test_votes_ranked_by_agreement():
    table, a, b = VoteTable("agreement"), np.array([[1]]), np.array([[2]])
    for view, (grid, agreed) in enumerate([(a, 0.25), (a, 0.25), (a, 0.0), (b, 1.0)]):
        table.add("q", view, grid, 0.0, agreed)
    assert [(c.grid.item(), c.votes, c.agreement) for c in table.ranked("q")] == [(2, 1, 1.0), (1, 3, pytest.approx(1 / 6))]
    assert not table.settled("q", 1, 1) and table.settled("q", 1, 0)
    with pytest.raises(UserError, match="evaluate with ranking=agreement"):
        table.add("q", 9, a, 0.0)


@pytest.mark.parametrize(("encoder", "mode"), [*((encoder, "act") for encoder in ENCODERS), ("memory", "supervised")])
def test_a_latent_step_moves_what_the_recursion_reads_from_its_time_on(fewshot, encoder, mode):
    plain, late = (
        Trainer(fewshot, f"encoder={encoder}", f"mode={mode}", "train_steps=4", "lr_warmup_steps=0", *more)
        for more in ((), ("latent_step_from=0.5",))
    )
    for step in range(3):
        results = [train_step(trainer.state, trainer.batch(), trainer.settings).metrics["lm_loss"] for trainer in (plain, late)]
        assert torch.equal(*results) == (step < 2)
    assert all(torch.isfinite(parameter).all() for parameter in late.state.model.parameters())


def test_a_latent_step_needs_a_context_to_move(fewshot, puzzle):
    for store, keys in ((fewshot, ["encoder=memory", "mode=cached"]), (puzzle, [])):
        with pytest.raises(UserError, match="latent_step_from=0.5"):
            Trainer(store, *keys, "latent_step_from=0.5")


def test_searches_of_a_large_batch_are_cut_into_portions(memory):
    model, _, trainer = memory
    data = episodes(trainer, 2)
    whole, cut = (LatentSearch(SEARCH, trainer.config.objective, 0, rows).shift(model, data) for rows in (64, 4))
    torch.testing.assert_close(whole, cut, rtol=1e-3, atol=1e-4)


def test_an_evaluation_writes_what_its_page_shows(fewshot, tmp_path):
    """The page has the run's curves, the map of contexts, and the answers after every ACT step; so has per_example.jsonl."""
    run = tmp_path / "run"
    checkpoint = untrained(fewshot, run / "checkpoints")
    (run / "metrics.jsonl").write_text('{"step": 1, "train/lm_loss": 2.0}\n{"step": 2, "train/lm_loss": 1.0}\n')
    keys = [f"checkpoint={checkpoint}", "num_views=2", "controls=[]", "device=cpu", "save_predictions=true", "record_steps=true"]
    session = Session.open(compose.load(EvaluateConfig, "evaluate", [*keys, "protocol=latent_search", "protocol.steps=1"]))
    session.write(tmp_path / "out", session.evaluate(), 1.0)
    records = [json.loads(line) for line in (tmp_path / "out" / "per_example.jsonl").read_text().splitlines()]
    assert {len(record["steps"]) for record in records} == {session.model.config.halt_max_steps}
    assert {record["protocol"] for record in records} == {"latent_search"}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["adaptation"]["name"] == results["protocol"] == "latent_search" and results["adaptation"]["steps"] == 1
    shown = embedded(tmp_path / "out" / "report.html")
    assert shown["curves"] == {"train/lm_loss": [[1, 2], [2, 1]]}
    assert set(shown["map"]["points"]) == {record["task"] for record in records} and shown["records"][0]["steps"]


def test_tasks_on_a_large_canvas_are_trained_side_by_side(tmp_path):
    """There, a batch alone would leave out the padding of its demonstrations, and shapes would depend on the data."""
    store = write_store(tmp_path, train=3, test=3, side=10)
    trainer = Trainer(store, "encoder=memory", "data.buckets=[10]", "arch.halt_max_steps=1")
    questions = EvaluationSet(store, trainer.config.data, "test", 1, 0)
    lesson = lessons_of(questions, questions.asked)[0][0]
    training = TestTimeTraining(ttt_config("steps=1"), trainer.config.objective, 0)
    trained = training.train(trainer.state.model, questions, store.grid_table, [lesson, lesson])
    alone = training.train(trainer.state.model, questions, store.grid_table, [lesson]).weights(0)
    for name, value in trained.weights(1).items():
        torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_processes_share_the_tasks_to_train(fewshot, tmp_path):
    """Two processes and one stack of tasks, so that one of them has nothing to do; and one task at a time, shared by both."""
    checkpoint = untrained(fewshot, tmp_path / "run" / "checkpoints")
    for count in (8, 1):
        keys = [f"checkpoint={checkpoint}", "num_views=2", "controls=[]", "device=cpu", "report=false", "max_eval_groups=4"]
        keys += ["protocol=test_time_training", "protocol.steps=2", "protocol.batch_size=4", f"protocol.tasks_at_once={count}"]
        folders = {world: tmp_path / f"{count}-{world}" for world in (1, 2)}
        for world, folder in folders.items():
            done = run("evaluate.py", *keys, f"output_dir={folder}", world=world)
            assert done.returncode == 0, done.stderr
        one, two = ((folder / "per_example.jsonl").read_text() for folder in folders.values())
        assert one == two and '"protocol": "test_time_training"' in one
