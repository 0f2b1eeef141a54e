"""Longer and wider thinking at test time: what one pass tells of every depth, and attempts that differ."""

import numpy as np
import pytest
import torch

from config import compose
from evaluation.adaptation import as_it_is
from evaluation.depth import best_of
from evaluation.inference import Inference, VoteStop
from evaluation.predictions import Predictions
from evaluation.records import answers_of
from evaluation.run import Ask
from evaluation.selection import Selection
from evaluation.session import EvaluateConfig, Session
from evaluation.voting import VoteTable, grid_of, key_of
from experiments import depth_width
from models.act import solve
from models.noise import Draws
from models.rollouts import Rollouts, residual
from tests.support.predictions import NOTHING, A, B, C
from tests.support.respondents import inference
from tests.support.runs import called, untrained
from tests.support.thinking import answers_in, asked, evaluated, restless, thinking, write_sudokus
from utils.distributed import World
from utils.errors import UserError
from utils.files import read_json

WIDE = {"rollouts": 5, "sigma": 0.5}
GAME = ("data=sudoku", "data.buckets=[4]")


@pytest.fixture(scope="module")
def arc(fewshot):
    return restless(fewshot)


@pytest.fixture(scope="module")
def game(tmp_path_factory):
    store = write_sudokus(tmp_path_factory.mktemp("data") / "sudoku")
    return restless(store, *GAME, f"data.path={store.path}")


def test_one_attempt_without_noise_is_the_plain_answer_to_the_bit(arc):
    plain = inference(arc, asked(arc).questions).collect(record_steps=True)
    ours = asked(arc, rollouts=1, sigma=0.0, select="residual").collect(record_steps=True)
    assert ours.answers == plain.answers
    for name, column in plain.columns.items():
        assert np.array_equal(column, ours.columns[name], equal_nan=True), name
    data, model = arc.batch().data, arc.state.model.eval()
    quiet = Rollouts(torch.arange(len(data["inputs"])), sigma=0.0, random_init=False)
    still, known = solve(model, data, rollouts=quiet), solve(model, data)
    assert torch.equal(still.logits, known.logits) and torch.equal(still.q_halt_logits, known.q_halt_logits)
    assert known.residual is None and (still.residual > 0).all()


def normal(keys: torch.Tensor, count: int) -> torch.Tensor:
    """What rows with these keys (n,) draw at once, (n, count)."""
    return Draws(keys).normal(torch.zeros(len(keys), count, device=keys.device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_noise_of_a_cpu():
    keys = torch.arange(8) << 29
    ours, theirs = (normal(keys.to(device), 1001).cpu() for device in ("cuda", "cpu"))
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("how", [{"sigma": 0.5}, {"random_init": True}])
def test_attempts_differ_and_depend_on_no_batch_no_process_and_no_number_of_them(arc, how):
    many = asked(arc, batch_size=16, rollouts=5, **how).collect()
    known = answers_in(many)
    assert len({logit for (query, view, _), (_, logit) in known.items() if (query, view) == (0, 0)}) == 5
    for other in (
        asked(arc, batch_size=3, rollouts=5, **how).collect(),
        asked(arc, batch_size=64, rollouts=3, **how).collect(),
        _of_two_processes(arc, batch_size=8, rollouts=5, **how),
    ):
        found = answers_in(other)
        assert found.keys() <= known.keys() and found
        for key, (answer, logit) in found.items():
            assert answer == known[key][0] and logit == pytest.approx(known[key][1], abs=1e-4)
    again = answers_in(asked(arc, batch_size=16, rollouts=5, seed=1, **how).collect())
    assert all(again[key][1] != logit for key, (_, logit) in known.items())


def _of_two_processes(trainer, **how) -> Predictions:
    whole = Predictions()
    whole.merge([asked(trainer, world=World(rank, 2), **how).collect() for rank in (0, 1)])
    return whole


def test_no_forward_pass_has_more_rows_than_the_batch(arc):
    rows = []
    hook = arc.state.model.register_forward_hook(lambda *call: rows.append(len(call[2].logits)))
    ours = asked(arc, batch_size=8, **WIDE)
    found = ours.collect()
    hook.remove()
    views = sum(map(ours.questions.num_views_of, ours.questions.queries))
    assert max(rows) == 8 and len(found) == 5 * views
    # Attempts fill the batches: no batch but a bucket's last one has rows to spare.
    steps = arc.state.model.config.halt_max_steps
    buckets = len({(ours.questions.side_of(q), len(q.demos)) for q in ours.questions.queries})
    assert len(rows) <= steps * (5 * views // 8 + buckets)


def test_stopping_the_votes_of_several_attempts_keeps_the_first_answer(arc):
    whole = asked(arc, **WIDE).collect()
    stopped = asked(arc, **WIDE).collect(stop=VoteStop(1, "votes"))
    answered = asked(arc, **WIDE).predict("votes", VoteStop(1, "votes"))
    for query in range(len(asked(arc).questions.queries)):
        firsts = [votes.ranked(query)[0].grid.tolist() for votes in (whole.vote(), stopped.vote(), answered)]
        assert firsts[0] == firsts[1] == firsts[2]


@pytest.mark.parametrize("which", ["arc", "game"])
def test_the_curve_is_what_evaluations_of_every_depth_find(request, which):
    trainer = request.getfixturevalue(which)
    steps = 4
    found = evaluated(trainer, depth_curve=True, record_steps=True, halt_max_steps=steps)
    curve, first = found.depths, set()
    assert [depth.step for depth in curve] == list(range(1, steps + 1))
    for depth in curve:
        alone = evaluated(trainer, halt_max_steps=depth.step)
        assert depth.scores == alone.scores, depth.step
        votes = found.predictions.vote(step=depth.step)
        ours = [[(key_of(c.grid), c.votes, c.q) for c in votes.ranked(q)] for q in range(len(found.answers))]
        assert ours == [[(key_of(c.grid), c.votes, c.q) for c in one.candidates] for one in alone.answers]
        first.add(ours[0][0][0])
    assert len(first) > 1, "the answer changes with the depth"
    assert [depth.seconds for depth in curve] == sorted(depth.seconds for depth in curve)
    wide = evaluated(trainer, depth_curve=True, halt_max_steps=3, select="halting", **WIDE)
    assert wide.depths[-1].scores == wide.scores
    assert wide.depths[1].scores == evaluated(trainer, halt_max_steps=2, select="halting", **WIDE).scores


def test_a_halted_attempt_keeps_its_answer_on_the_curve(arc):
    logits = asked(arc).collect(record_steps=True).rows(1)["q_halt_logit"]
    half = 1 / (1 + np.exp(-float(np.median(logits))))
    curve = evaluated(arc, depth_curve=True, halt_threshold=half).depths
    assert curve[0].at_work == 1 > curve[1].at_work > 0
    assert curve[-1].scores == evaluated(arc, halt_threshold=half).scores


def test_predictions_that_were_made_for_a_curve_keep_the_last_answers_alone(arc):
    found = evaluated(arc, depth_curve=True)
    assert found.predictions is not None and set(found.predictions.columns["step"]) == {3}
    assert "steps" not in found.records[0]


# view 0: most say A, B is surest, C is stillest; view 1 has an empty answer that is surest and stillest
ATTEMPTS = [
    (0, A, 0.0, 3.0),
    (0, A, 0.5, 2.0),
    (0, B, 2.0, 4.0),
    (0, C, 1.0, 1.0),
    (1, NOTHING, 9.0, 0.1),
    (1, A, float("nan"), float("nan")),
    (1, B, -1.0, 5.0),
    (1, B, -1.0, 5.0),
]


def made_up() -> Predictions:
    kept = Predictions()
    seen: dict[int, int] = {}
    for view, grid, logit, moved in ATTEMPTS:
        seen[view] = seen.get(view, -1) + 1
        kept.add(0, view, 1, grid, logit, rollout=seen[view], residual=moved)
    return kept


def voted(select: str, questions, kept: Predictions | None = None) -> list[tuple[int, int]]:
    votes = (kept or made_up()).vote(selection=Selection(select, questions))
    return [(c.grid.item(), c.votes) for c in votes.ranked(0)]


def test_every_attempt_votes_or_one_of_each_view_that_is_surest_or_stillest(arc):
    questions = asked(arc).questions
    assert voted("votes", questions) == [(2, 3), (1, 3), (3, 1)]
    assert voted("halting", questions) == [(2, 2)]
    assert voted("residual", questions) == [(3, 1), (2, 1)]


def test_equal_numbers_of_votes_are_ordered_by_halting_and_then_by_the_earlier_attempt():
    kept = Predictions()
    for rollout, (grid, logit) in enumerate(((A, 0.0), (B, 1.0), (C, 1.0))):
        kept.add(0, 0, 1, grid, logit, rollout=rollout)
    assert [c.grid.item() for c in kept.vote().ranked(0)] == [2, 3, 1]


def test_the_rules_of_the_game_choose_a_valid_answer_and_else_the_surest(game):
    questions = asked(game, select="verifier").questions
    truth = [questions.store.pair(query.pair).output for query in questions.queries]
    wrong = truth[0][::-1].copy()
    kept = Predictions()
    for rollout, (grid, logit) in enumerate(((wrong, 5.0), (truth[0], -3.0), (truth[0][:2], 9.0))):
        kept.add(0, 0, 1, grid, logit, rollout=rollout)
        kept.add(1, 0, 1, truth[0] if rollout == 1 else wrong, logit, rollout=rollout)  # valid elsewhere
    votes = kept.vote(selection=Selection("verifier", questions))
    assert [key_of(votes.ranked(query)[0].grid) for query in (0, 1)] == [key_of(truth[0]), key_of(wrong)]
    assert len(votes.ranked(0)) == 1


def test_the_oracle_is_right_where_any_attempt_is(game, monkeypatch):
    """Answers are made by hand: the surest attempt is wrong, and one of the others right."""
    questions = evaluated(game).questions
    truth = [questions.store.pair(query.pair).output for query in questions.queries]

    def answer(self, batch, kept, *options):
        for row in range(batch.valid):
            query, rollout = int(batch.query[row]), int(batch.rollout[row])
            right = query % 2 == 0 and rollout == 2
            kept.add(query, 0, 1, truth[query] if right else truth[query][::-1], -rollout, rollout=rollout)

    monkeypatch.setattr("evaluation.inference.Inference._answer", answer)
    monkeypatch.setattr("evaluation.canvas_scores.CanvasScores.add", lambda *batch: None)
    found = {}
    for select in ("votes", "halting", "verifier"):
        scores = evaluated(game, select=select, **WIDE).scores
        found[select] = {s.name: s.value for s in scores if s.metric == "all.exact_accuracy"}
    wrong = {"all.exact_accuracy": 0.0, "all.exact_accuracy/oracle": 0.5}
    assert found == {"votes": wrong, "halting": wrong, "verifier": wrong | {"all.exact_accuracy": 0.5}}


def test_the_table_of_depth_and_width_holds_what_each_of_them_answers(game, tmp_path, monkeypatch, capsys):
    """What counts as right is what the plain model answers after two steps."""
    folder = untrained(game.store, tmp_path, *GAME, f"data.path={game.store.path}")
    options = [f"checkpoint={folder}", "device=cpu", "sigma=0.5", "batch_size=8", f"output_dir={tmp_path}"]
    config = compose.load(EvaluateConfig, "evaluate", options)
    respondent = Session.open(config).respondent
    found: dict[tuple[int, int], dict] = {}
    for width in (1, 3):
        think = thinking(rollouts=width, sigma=0.5 if width > 1 else 0.0)
        questions = Ask(seed=0, thinking=think).questions(respondent, 1)
        asked_so = Inference(respondent, questions, as_it_is(respondent, 8), think).collect(record_steps=True)
        found |= {(depth, width): answers_in(asked_so, depth) for depth in (2, 3)}
    truth = {query: answer for (query, _, _), (answer, _) in found[2, 1].items()}
    monkeypatch.setattr(
        depth_width, "known_output", lambda of, query: grid_of(truth[of.queries.index(query)])
    )
    called(monkeypatch, depth_width.main, *options, "--depths", "3", "2", "--widths", "1", "3")
    result = read_json(tmp_path / "depth_width.json")
    assert [(row["depth"], row["width"]) for row in result["rows"]] == [(2, 1), (2, 3), (3, 1), (3, 3)]
    for row in result["rows"]:
        answers = found[row["depth"], row["width"]]
        right = {key: answer == truth[key[0]] for key, (answer, _) in answers.items()}
        surest = {
            query: max((k for k in answers if k[0] == query), key=lambda k: answers[k][1]) for query in truth
        }
        accuracy = {name: of["value"] for name, of in row["accuracy"].items()}
        assert list(accuracy) == ["votes", "halting", "residual", "verifier", "oracle"]
        assert accuracy["halting"] == np.mean([right[key] for key in surest.values()])
        assert accuracy["oracle"] == np.mean([any(right[k] for k in right if k[0] == q) for q in truth])
        assert all(of["ci95"][0] <= of["value"] <= of["ci95"][1] for of in row["accuracy"].values())
    assert result["rows"][0]["accuracy"]["votes"]["value"] == 1 > accuracy["votes"]
    assert result["rows"][2]["model_seconds"] > result["rows"][0]["model_seconds"]
    assert len(capsys.readouterr().out.splitlines()) == 6
    with pytest.raises(SystemExit):
        called(monkeypatch, depth_width.main, f"checkpoint={folder}", "device=cpu", "--widths", "3")
    assert "--widths above 1 need sigma" in capsys.readouterr().err


def test_what_the_oracle_chooses_is_judged_by_the_games_rules_itself(game):
    questions = asked(game).questions
    votes = VoteTable()
    for number, query in enumerate(questions.queries):
        pair = questions.store.pair(query.pair)
        for view, grid in enumerate((pair.input, pair.input, pair.output)):
            votes.add(number, view, grid, 0.0)
    first = answers_of(questions, votes)
    assert not any(query.passed["valid"] for query in first)
    assert all(query.passed["valid"] and query.rank == 1 for query in best_of(questions, first))


def test_contradictory_thinking_is_refused(arc):
    for wrong, message in (
        (["rollouts=4"], "rollouts=4 would all be the same with sigma=0"),
        (["sigma=-1"], "sigma"),
        (["select=best"], "select"),
        (["depth_curve=true", "vote_stop=true"], "would leave views out"),
    ):
        with pytest.raises(UserError, match=message):
            compose.load(EvaluateConfig, "evaluate", ["checkpoint=x", *wrong])
    with pytest.raises(UserError, match="select=verifier: arc has no rules"):
        evaluated(arc, select="verifier", **WIDE)


def test_the_noise_is_standard_normal_and_its_rows_and_streams_do_not_resemble_each_other():
    keys = torch.arange(40)  # neighbours, which a weak generator would betray
    drawn = normal(keys, 20_001).double()
    assert drawn.mean().abs() < 0.004 and (drawn.std() - 1).abs() < 0.004
    assert (drawn.pow(4).mean() - 3).abs() < 0.05 and torch.isfinite(drawn).all()
    assert (torch.corrcoef(drawn) - torch.eye(40)).abs().max() < 0.04
    states = (torch.zeros(40, 50, 8), torch.zeros(40, 50, 8))
    noisy = Rollouts(keys, sigma=0.5, random_init=True)
    first, second = (noisy.disturbed(states, keys, step)[0] for step in (0, 1))
    assert first.std() == pytest.approx(0.5, abs=0.02) and torch.equal(states[1], torch.zeros(40, 50, 8))
    streams = torch.stack([first, second, *noisy.started(states)]).flatten(1)
    assert (torch.corrcoef(streams) - torch.eye(4)).abs().max() < 0.04
    some = torch.tensor([7, 3])
    assert torch.equal(noisy.disturbed((states[0][some], states[1]), some, 0)[0], first[some])


def test_a_residual_is_the_root_of_the_mean_square_of_the_change():
    before = (torch.zeros(2, 3, 4), torch.ones(2, 3, 4))
    after = (torch.zeros(2, 3, 4), torch.ones(2, 3, 4))
    after[0][1] += 2
    after[1][1] -= 4
    assert residual(before, after).tolist() == pytest.approx([0, 10**0.5])
