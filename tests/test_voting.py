"""Ranking rules, and the stopping of votes, views and ACT steps."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from config import compose
from dataset.views import EvaluationSet
from evaluation.in_training import respondent_of
from evaluation.inference import VIEWS_PER_ROUND, Inference, VoteStop
from evaluation.predictions import Predictions
from evaluation.run import Ask, evaluate
from evaluation.session import EvaluateConfig
from evaluation.voting import VoteTable, key_of
from models.act import Answer, act_step, initial_carry, solve
from tests.support.predictions import NOTHING, A, B, C
from tests.support.respondents import inference
from tests.support.runs import Trainer
from utils.distributed import World
from utils.errors import UserError


def votes_of(ranking: str, *votes: tuple[np.ndarray, float]) -> VoteTable:
    table = VoteTable(ranking)
    for view, (grid, q) in enumerate(votes):
        table.add(0, view, grid, q)
    return table


def order(table: VoteTable) -> list[int]:
    return [candidate.grid.item() for candidate in table.ranked(0)]


def test_the_rankings_are_what_they_say():
    cast = [(A, -3.0), (A, -3.0), (A, -3.0), (B, 0.0), (B, 0.0), (C, 0.5)]
    assert order(votes_of("votes", *cast)) == [1, 2, 3]  # 3, 2, 1 votes
    assert order(votes_of("confidence", *cast)) == [3, 2, 1]  # means 0.62, 0.5, 0.05
    assert order(votes_of("product", *cast)) == [2, 3, 1]  # sums 1.0, 0.62, 0.14


@pytest.mark.parametrize("ranking", ["votes", "confidence", "product"])
def test_ties_go_to_the_earliest_view_whatever_the_order_of_counting(ranking):
    cast = [(view, grid, 0.25) for view, grid in enumerate((C, A, B, A, B, C))]
    for shuffled in itertools.permutations(cast):
        table = VoteTable(ranking)
        for view, grid, q in shuffled:
            table.add(0, view, grid, q)
        assert order(table) == [3, 1, 2]


@pytest.mark.parametrize("ranking", ["votes", "confidence", "product"])
def test_the_rank_of_an_answer_is_its_place_in_the_ranking(ranking):
    rng = np.random.default_rng(0)
    grids = [np.array([[value]], np.uint8) for value in range(8)]
    table = votes_of(ranking, *((grids[rng.integers(7)], float(rng.normal())) for _ in range(40)))
    for place, candidate in enumerate(table.ranked(0), 1):
        assert table.rank_of(0, key_of(candidate.grid)) == place
    assert table.rank_of(0, key_of(grids[7])) is None and table.rank_of("never asked", key_of(A)) is None


def test_a_settled_vote_cannot_be_changed():
    """By brute force: every continuation over the answers seen and a new one, at both ends of probability."""
    rng = np.random.default_rng(1)
    ballots = list(itertools.product((A, B, C, np.array([[9]], np.uint8), NOTHING), (-40.0, 40.0)))
    settled = 0
    for _ in range(40):
        cast = [
            ((A, A, A, B, C)[rng.integers(5)], float(rng.choice([-40, 0, 40])))
            for _ in range(rng.integers(2, 9))
        ]
        remaining, k = int(rng.integers(1, 3)), int(rng.integers(1, 3))
        for ranking in ("votes", "product"):
            before = votes_of(ranking, *cast)
            if before.settled(0, k, remaining):
                settled += 1
                for more in itertools.product(ballots, repeat=remaining):
                    assert order(votes_of(ranking, *cast, *more))[:k] == order(before)[:k]
    assert settled > 10


def test_a_vote_is_settled_as_soon_as_every_lead_exceeds_the_remaining_views():
    cast = [(A, 40.0)] * 6 + [(B, 40.0)] * 3
    for ranking in ("votes", "product"):
        table = votes_of(ranking, *cast)
        assert table.settled(0, 1, 2) and not table.settled(0, 1, 3)  # three more for B would make a tie
        assert table.settled(0, 2, 2) and not table.settled(
            0, 2, 3
        )  # an answer not yet given could catch up with B
        assert not table.settled(0, 3, 1) and table.settled(0, 3, 0)
    unanimous = votes_of("votes", *[(A, 0.0)] * 9)
    assert unanimous.settled(0, 1, 8) and not unanimous.settled(
        0, 2, 1
    )  # the second answer is open until the end
    confident = votes_of("confidence", *cast)
    assert not confident.settled(0, 1, 1) and confident.settled(0, 1, 0)


@pytest.fixture(scope="module")
def untrained(fewshot):
    """The run of a tiny model with answers that differ between views, and its evaluation set of 24 views."""
    trainer = Trainer(fewshot)
    torch.manual_seed(3)
    torch.nn.init.normal_(trainer.state.model.q_head.weight, std=0.5)
    return trainer, EvaluationSet(fewshot, trainer.config.data, "test", 24, 0, "none", 2)


@pytest.mark.parametrize("ranking", ["votes", "product"])
def test_stopping_votes_leaves_views_out_and_the_first_answers_as_they_are(untrained, monkeypatch, ranking):
    """Answers are made by hand per view: unanimous, close, and a late reversal."""
    trainer, questions = untrained
    rng = np.random.default_rng(0)
    shares = ([0.95, 0.05, 0.0], [0.6, 0.4, 0.0], [0.34, 0.33, 0.33])
    drawn = {query: rng.choice(3, 24, p=shares[query % 3]) for query in range(len(questions.queries))}
    logit = {query: rng.normal(3, 1, 24) for query in range(len(questions.queries))}

    def answer(self, batch, kept, *options):
        for query, view in zip(
            batch.query[: batch.valid].tolist(), batch.view[: batch.valid].tolist(), strict=True
        ):
            kept.add(query, view, 1, (A, B, C)[drawn[query][view]], float(np.float32(logit[query][view])))

    monkeypatch.setattr(Inference, "_answer", answer)
    full = inference(trainer, questions, batch_size=5).collect()
    for k in (1, 2):
        stopped = inference(trainer, questions, batch_size=7).collect(stop=VoteStop(k, ranking))
        assert len(questions.queries) * VIEWS_PER_ROUND <= len(stopped) and (
            k > 1 or len(stopped) < len(full) == 24 * len(questions.queries)
        )
        for query in range(len(questions.queries)):
            ours, theirs = (p.vote(ranking).ranked(query)[:k] for p in (stopped, full))
            assert [c.grid.item() for c in ours] == [c.grid.item() for c in theirs]


def test_an_evaluation_says_how_many_views_its_votes_left_out(fewshot, monkeypatch):
    """Every view gives the same answer: after 16 of 24 views no other one can win."""

    def answer(self, batch, kept, *options):
        for query, view in zip(batch.query[: batch.valid], batch.view[: batch.valid], strict=True):
            kept.add(int(query), int(view), 1, A, 0.0)
        count, side = len(batch.query), batch.samples.bucket.side
        return Answer(torch.zeros(count, side**2, 12), torch.zeros(count), torch.ones(count))

    monkeypatch.setattr(Inference, "_answer", answer)
    trainer = Trainer(fewshot)
    changes = {"num_views": 24, "vote_stop": True, "pass_ks": [1], "controls": []}
    config = trainer.config.evaluation.model_copy(update=changes)
    found = evaluate(respondent_of(trainer), config, Ask(seed=0))
    queries = found.counts["queries"]
    assert found.counts["views"] == 16 * queries
    assert found.notes[-1].startswith(f"{16 * queries} of {24 * queries} views were asked")
    assert found.notes[-1].endswith("the second attempt in the submission may differ from the full vote's")


def test_answers_are_ranked_once_and_every_process_could_write_the_files(fewshot, monkeypatch):
    trainer, calls, plain = Trainer(fewshot), [], VoteTable.ranked
    monkeypatch.setattr(
        VoteTable, "ranked", lambda table, question: calls.append(question) or plain(table, question)
    )
    config = trainer.config.evaluation.model_copy(update={"num_views": 2, "controls": []})
    for rank in (0, 1):
        calls.clear()
        found = evaluate(replace(respondent_of(trainer), world=World(rank, 2)), config, Ask(seed=0))
        queries = found.counts["queries"]
        assert sorted(calls) == list(range(queries))
        assert len(found.records) == queries == sum(len(task["test"]) for task in found.puzzles.values())
        assert {name: len(task["test"]) for name, task in found.puzzles.items()} == {
            n: len(a) for n, a in found.submission.items()
        }
        assert sorted(calls) == list(range(queries))


def test_contradictory_settings_are_refused():
    for wrong, message in (
        (["vote_stop=true", "ranking=confidence"], "vote_stop=true saves nothing"),
        (["record_steps=true"], "record_steps=true needs save_predictions=true"),
        (["save_predictions=true", "vote_stop=true"], "would leave views out"),
        (["halt_threshold=1.5"], "halt_threshold"),
    ):
        with pytest.raises(UserError, match=message):
            compose.load(EvaluateConfig, "evaluate", ["checkpoint=x", *wrong])


def solve_without_compaction(model, data) -> Answer:
    """The plain loop: every row runs for all steps, and keeps the answer at which it halted."""
    carry, answer, done = initial_carry(model, data), None, torch.zeros(len(data["inputs"]), dtype=torch.bool)
    context = None if model.context.refines else model.context(data)
    with torch.no_grad():
        for _ in range(model.config.halt_max_steps):
            output = act_step(model, carry, data, context=context)
            new = Answer(output.logits, output.q_halt_logits, output.carry.steps)
            answer = answer or new
            keep = done.clone()
            answer = Answer(
                torch.where(keep[:, None, None], answer.logits, new.logits),
                torch.where(keep, answer.q_halt_logits, new.q_halt_logits),
                torch.where(keep, answer.steps, new.steps),
            )
            done |= output.carry.halted
            carry = replace(output.carry, halted=torch.zeros_like(done))
    return answer


@pytest.mark.parametrize("encoder", ["memory", "standard", "iterative"])
def test_halted_rows_leave_the_batch_and_the_answers_stay_the_same(fewshot, encoder):
    model = Trainer(fewshot, f"encoder={encoder}", "arch.halt_max_steps=6").state.model.eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(model.q_head.weight, std=1.0)
    torch.nn.init.zeros_(model.q_head.bias)
    data = Trainer(fewshot).batch().data
    with torch.no_grad():  # half of the rows are sure enough at once
        sure = act_step(model, initial_carry(model, data), data).q_halt_logits.sigmoid().median().item()
    model.config = model.config.model_copy(update={"halt_threshold": sure})
    sizes = []
    hook = model.register_forward_hook(lambda module, arguments, output: sizes.append(len(output.logits)))
    ours = solve(model, data)
    hook.remove()
    theirs = solve_without_compaction(model, data)
    assert torch.equal(ours.steps, theirs.steps) and len(set(ours.steps.tolist())) > 1
    assert torch.equal(ours.logits.argmax(-1), theirs.logits.argmax(-1))
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-4) and torch.allclose(
        ours.q_halt_logits, theirs.q_halt_logits, atol=1e-4
    )
    assert sizes == [int((ours.steps > done).sum()) for done in range(len(sizes))] and sizes[-1] < sizes[0]


def test_recorded_steps_end_in_the_answers_of_a_plain_run(untrained):
    trainer, questions = untrained
    plain, recorded = (
        inference(trainer, questions, batch_size=16).collect(record_steps=record) for record in (False, True)
    )
    most = trainer.state.model.config.halt_max_steps
    assert len(recorded) == most * len(plain)
    ours, theirs = recorded.rows(), plain.rows()
    for name in ("query", "view", "step", "q_halt_logit"):
        assert np.array_equal(ours[name], theirs[name])
    for early in range(1, most + 1):
        assert set(recorded.rows(early)["step"]) == {early}
    keys = list(recorded.answers), list(plain.answers)
    assert [keys[0][i] for i in ours["answer"]] == [keys[1][i] for i in theirs["answer"]]


def test_a_halted_view_votes_with_the_answer_at_which_it_halted():
    kept = Predictions()
    for view, answers in enumerate(([A], [B, A], [B, B, B])):
        for step, grid in enumerate(answers, 1):
            kept.add(0, view, step, grid, 0.0)
    assert [order(kept.vote(step=step)) for step in (1, 2, 3)] == [[2, 1], [1, 2], [1, 2]]
    assert [len(kept.rows(step)["view"]) for step in (1, 3)] == [3, 3]


@pytest.mark.parametrize("ranking", ["votes", "confidence", "product", "agreement"])
def test_tables_of_several_processes_merge_to_the_one_of_all_views(ranking):
    rng = np.random.default_rng(0)
    rows = [
        (query, view, (A, B, C)[rng.integers(3)], float(rng.normal()), float(rng.random()))
        for query in range(4)
        for view in range(12)
    ]
    whole, parts = VoteTable(ranking), [VoteTable(ranking) for _ in range(3)]
    for number, row in enumerate(rows):
        whole.add(*row)
        parts[number * 7 % 3].add(*row)
    for order in ([0, 1, 2], [2, 0, 1]):
        merged = VoteTable(ranking)
        merged.merge([parts[number] for number in order])
        for query in range(4):
            ours, theirs = (
                [(c.grid.item(), c.votes, c.q, c.first_view, c.agreement) for c in table.ranked(query)]
                for table in (merged, whole)
            )
            assert ours == theirs


def test_counts_that_are_gathered_are_the_votes_of_the_predictions(untrained):
    trainer, questions = untrained
    asked = inference(trainer, questions, batch_size=16)
    counted, kept = asked.predict(), asked.collect().vote()
    for number in range(len(questions.queries)):
        ours, theirs = (
            [(c.grid.tolist(), c.votes, c.q, c.first_view) for c in table.ranked(number)]
            for table in (counted, kept)
        )
        assert ours == theirs and ours


def test_an_evaluation_that_keeps_no_predictions_finds_the_same(untrained):
    trainer, _ = untrained
    config = trainer.config.evaluation.model_copy(update={"num_views": 12, "controls": ["query_only"]})
    kept, counted = (
        evaluate(respondent_of(trainer), config, Ask(seed=0, keep_predictions=keep)) for keep in (True, False)
    )
    assert kept.predictions is not None and counted.predictions is None
    assert kept.records == counted.records and kept.metrics() == counted.metrics()
    assert kept.counts == counted.counts and kept.submission == counted.submission
