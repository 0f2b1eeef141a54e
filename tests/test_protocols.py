"""The protocols: what they are called, what they refuse, and that no answer leaks."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch

from config import compose
from dataset.batch import leave_one_out
from dataset.layouts import LAYOUTS
from dataset.leaks import UNKNOWN_PAIRS, tasks_seen
from dataset.views import EvaluationSet
from evaluation.adaptation import AS_IT_IS, Adaptation, AsItIsConfig
from evaluation.in_training import respondent_of
from evaluation.inference import agreement
from evaluation.lessons import lessons_of
from evaluation.protocols import PROTOCOLS, Protocol, adaptation_of, label, less_memory
from evaluation.run import Ask, evaluate
from evaluation.session import EvaluateConfig, Session
from evaluation.solver import Solver
from evaluation.voting import VoteTable
from tests.support.grids import random_task, write_store
from tests.support.protocols import SEARCH, drawn_episodes, outspoken, ttt_config
from tests.support.report import embedded
from tests.support.runs import Trainer, untrained
from utils.config import NamedConfig
from utils.errors import UserError


def test_what_cannot_learn_is_answered_as_it_is_and_said(tmp_path):
    """A task with one demonstration; the control without any."""
    store = write_store(tmp_path / "data")
    trainer = Trainer(store, "encoder=memory", "data.max_demos=1")
    outspoken(trainer)
    respondent = replace(respondent_of(trainer), trained_pairs=np.zeros(0, np.uint64))
    for config in (ttt_config(), SEARCH):
        plain, adapted = (
            evaluate(respondent, trainer.config.evaluation, Ask(seed=0, protocol=protocol))
            for protocol in (AS_IT_IS, config)
        )
        assert np.array_equal(plain.predictions.columns["answer"], adapted.predictions.columns["answer"])
        assert adapted.protocol == config.name
        assert any("have too few demonstrations" in note for note in adapted.notes)
    hidden = EvaluationSet(store, trainer.config.data, "test", 1, 0, "query_only")
    assert lessons_of(hidden, hidden.asked) == ([], pytest.approx(np.ones(len(hidden.queries), bool)))


@pytest.mark.parametrize("split", ["test", "train"])
@pytest.mark.parametrize("control", ["none", "shuffled_demonstrations", "query_only"])
@pytest.mark.parametrize("layout", ["fewshot", "puzzle"])
def test_no_query_is_among_what_is_learned_for_it(split, control, layout, fewshot, puzzle):
    store = {"fewshot": fewshot, "puzzle": puzzle}[layout]
    questions = EvaluationSet(store, Trainer(store).config.data, split, 2, 0, control)
    assert all(query.pair not in questions.adaptation_pairs(query) for query in questions.queries)
    assert any(questions.adaptation_pairs(query) for query in questions.queries) == (control != "query_only")


def test_a_named_protocol_is_checked(fewshot, puzzle):
    none, tasks = np.zeros(0, np.uint64), np.arange(3)
    known = fewshot.pair_fingerprint[fewshot.task_pairs[:2]]
    seen, none, unknown = (
        tasks_seen(fewshot, tasks, trained) for trained in (known, none, np.append(known, UNKNOWN_PAIRS))
    )
    names = {name: AsItIsConfig(name=name) for name in ("auto", "inductive", "transductive")}
    assert label(names["auto"], fewshot, none) == label(names["inductive"], fewshot, none) == "inductive"
    assert label(names["auto"], fewshot, seen) == label(ttt_config(), fewshot, seen) == "transductive"
    assert label(ttt_config(), fewshot, none) == label(ttt_config(), puzzle, none) == "test_time_training"
    assert label(names["auto"], puzzle, none) == "transductive"
    with pytest.raises(UserError, match="2 of the 3 tasks share a pair"):
        label(names["inductive"], fewshot, seen)
    with pytest.raises(
        UserError, match="would be transductive, since nothing is known of the training data of the weights"
    ):
        label(names["inductive"], fewshot, unknown)
    with pytest.raises(UserError, match="learned row per task"):
        label(names["inductive"], puzzle, none)
    with pytest.raises(UserError, match="none of the evaluated tasks shares"):
        label(names["transductive"], fewshot, none)
    for config, layout, words in (
        (SEARCH, "puzzle", "no encoder"),
        (ttt_config(), "pairs", "share one rule have none"),
        (ttt_config("parameters=encoder"), "puzzle", "its puzzle rows learn in any case"),
    ):
        with pytest.raises(UserError, match=words):
            adaptation_of(config, SimpleNamespace(store=SimpleNamespace(layout=LAYOUTS[layout])), 0, 8)
    with pytest.raises(UserError, match="protocol.name='ttt' is unknown"):
        compose.load(EvaluateConfig, "evaluate", ["checkpoint=x", "protocol.name=ttt"])


class ToyConfig(NamedConfig):
    """size: by how much every context is moved."""

    name: Literal["toy"]
    size: float


class Toy(Adaptation):
    """Moves all contexts in the same direction."""

    @classmethod
    def less_memory(cls, config, batch_size):
        return f"lower protocol.size={config.size}"

    def shift(self, data):
        return torch.full_like(self.respondent.model.context(data).told, self.config.size)


def test_a_new_protocol_is_a_row(fewshot, tmp_path, monkeypatch):
    """Command line, label, folder, files and a single task know it by its row alone."""
    path = untrained(fewshot, tmp_path / "run" / "checkpoints")
    monkeypatch.setitem(PROTOCOLS, "toy", Protocol(ToyConfig, Toy))
    found = {}
    for size in (0.0, 1.0):
        keys = ["protocol.name=toy", f"+protocol.size={size}", "num_views=1", "controls=[]", "report=false"]
        config = compose.load(
            EvaluateConfig, "evaluate", [f"checkpoint={path}", "device=cpu", "save_predictions=true", *keys]
        )
        session = Session.open(config)
        found[size] = session.evaluate()
        session.write(session.folder(), found[size], 1.0)
        assert found[size].protocol == found[size].described == "toy"
    assert less_memory(config.protocol, 8) == "lower protocol.size=1.0"
    folders = sorted((tmp_path / "run" / "evaluations").iterdir())
    assert [folder.name for folder in folders] == ["step_0-ema-test-toy", "step_0-ema-test-toy-2"]
    results = json.loads((folders[1] / "results.json").read_text())
    assert results["adaptation"] == results["settings"]["protocol"] == {"name": "toy", "size": 1.0}
    plain = evaluate(session.respondent, config, Ask(seed=0))
    answers = [list(one.predictions.answers) for one in (plain, found[0.0], found[1.0])]
    assert answers[0] == answers[1] != answers[2]
    new = fewshot.task(int(fewshot.tasks_of("test")[0]))
    assert Solver.from_pretrained(path).ask(new, 1, 0, 8, config.protocol).protocol == "toy"


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


def test_agreement_is_the_share_of_demonstrations_answered_exactly_from_the_others(
    memory, fewshot, monkeypatch
):
    model, _, trainer = memory
    data = drawn_episodes(trainer, 2)
    rows, _ = leave_one_out(data)
    right = torch.tensor(
        [True, False] * (len(rows["labels"]) // 4) + [True, True] * (len(rows["labels"]) // 4)
    )

    def answer(model, part, shift=None):
        first = next(
            i for i in range(len(rows["inputs"])) if torch.equal(rows["inputs"][i], part["inputs"][0])
        )
        tokens = torch.where(part["labels"] < 0, 0, part["labels"])
        tokens = torch.where(right[first : first + len(tokens)][:, None], tokens, (tokens + 1) % 12)
        return type("Answer", (), {"logits": torch.nn.functional.one_hot(tokens, 12).float()})

    monkeypatch.setattr("evaluation.inference.solve", answer)
    assert agreement(model, data).tolist() == right.view(-1, 2).float().mean(1).tolist()


def test_agreement_on_contexts_that_were_not_searched_is_refused(memory):
    _, _, trainer = memory
    config = trainer.config.evaluation.model_copy(update={"ranking": "agreement"})
    protocol = SEARCH.model_copy(update={"start": "mean"})
    with pytest.raises(UserError, match="use protocol.start=encoder"):
        evaluate(respondent_of(trainer), config, Ask(seed=0, protocol=protocol))


def test_votes_ranked_by_agreement():
    table, a, b = VoteTable("agreement"), np.array([[1]]), np.array([[2]])
    for view, (grid, agreed) in enumerate([(a, 0.25), (a, 0.25), (a, 0.0), (b, 1.0)]):
        table.add("q", view, grid, 0.0, agreed)
    assert [(c.grid.item(), c.votes, c.agreement) for c in table.ranked("q")] == [
        (2, 1, 1.0),
        (1, 3, pytest.approx(1 / 6)),
    ]
    assert not table.settled("q", 1, 1) and table.settled("q", 1, 0)
    with pytest.raises(UserError, match="evaluate with ranking=agreement"):
        table.add("q", 9, a, 0.0)


def test_an_evaluation_writes_what_its_page_shows(fewshot, tmp_path):
    """The page has the run's curves, the map of contexts and every step's answers; per_example.jsonl, too."""
    run = tmp_path / "run"
    checkpoint = untrained(fewshot, run / "checkpoints")
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "train/lm_loss": 2.0}\n{"step": 2, "train/lm_loss": 1.0}\n'
    )
    keys = [
        f"checkpoint={checkpoint}",
        "num_views=2",
        "controls=[]",
        "device=cpu",
        "save_predictions=true",
        "record_steps=true",
    ]
    session = Session.open(
        compose.load(EvaluateConfig, "evaluate", [*keys, "protocol=latent_search", "protocol.steps=1"])
    )
    session.write(tmp_path / "out", session.evaluate(), 1.0)
    records = [json.loads(line) for line in (tmp_path / "out" / "per_example.jsonl").read_text().splitlines()]
    assert {len(record["steps"]) for record in records} == {session.trained.model.config.halt_max_steps}
    assert {record["protocol"] for record in records} == {"latent_search"}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (
        results["adaptation"]["name"] == results["protocol"] == "latent_search"
        and results["adaptation"]["steps"] == 1
    )
    shown = embedded(tmp_path / "out" / "report.html")
    assert shown["curves"] == {"train/lm_loss": [[1, 2], [2, 1]]}
    assert (
        set(shown["map"]["points"]) == {record["task"] for record in records} and shown["records"][0]["steps"]
    )
