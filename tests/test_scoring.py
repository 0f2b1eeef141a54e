"""Stored predictions, ranking rules, stopping of votes and of views, statistics over tasks, and the experiments on them."""

import csv
import hashlib
import itertools
import json
import shutil
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from config import compose
from config.schema import EvaluateConfig
from dataset.views import EvaluationSet
from evaluation import compare, predictions, statistics
from evaluation.evaluate import evaluate
from evaluation.inference import VIEWS_PER_ROUND, VoteStop, collect
from evaluation.predictions import Predictions
from evaluation.session import Session
from evaluation.voting import VoteTable, key_of
from experiments import acc_vs_aug, check, efficiency, exp1, published, puzzle_id, steps
from models.act import Answer, act_step, initial_carry, solve
from tests.test_training import ALONE, CPU, Trainer
from utils.distributed import World
from utils.errors import UserError
from utils.files import write_json

A, B, C = (np.array([[value]], np.uint8) for value in (1, 2, 3))
NOTHING = np.zeros((0, 0), np.uint8)


def votes_of(ranking: str, *votes: tuple[np.ndarray, float]) -> VoteTable:
    table = VoteTable(ranking)
    for view, (grid, q) in enumerate(votes):
        table.add(0, view, grid, q)
    return table


def order(table: VoteTable) -> list[int]:
    return [candidate.grid.item() for candidate in table.ranked(0)]


# --- rankings ----------------------------------------------------------------------------------------------------------


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


# --- the end of a vote -------------------------------------------------------------------------------------------------


def test_a_settled_vote_cannot_be_changed():
    """By brute force: every continuation over the answers seen and a new one, at both ends of the probabilities."""
    rng = np.random.default_rng(1)
    ballots = list(itertools.product((A, B, C, np.array([[9]], np.uint8), NOTHING), (-40.0, 40.0)))
    settled = 0
    for _ in range(40):
        cast = [((A, A, A, B, C)[rng.integers(5)], float(rng.choice([-40, 0, 40]))) for _ in range(rng.integers(2, 9))]
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
        assert table.settled(0, 2, 2) and not table.settled(0, 2, 3)  # an answer not yet given could catch up with B
        assert not table.settled(0, 3, 1) and table.settled(0, 3, 0)
    unanimous = votes_of("votes", *[(A, 0.0)] * 9)
    assert unanimous.settled(0, 1, 8) and not unanimous.settled(0, 2, 1)  # the second answer is open until the end
    confident = votes_of("confidence", *cast)
    assert not confident.settled(0, 1, 1) and confident.settled(0, 1, 0)


@pytest.fixture(scope="module")
def untrained(fewshot):
    """A tiny model with answers that differ between views, and its evaluation set of 24 views."""
    trainer = Trainer(fewshot)
    torch.manual_seed(3)
    torch.nn.init.normal_(trainer.state.model.q_head.weight, std=0.5)
    return trainer.state.model.eval(), EvaluationSet(fewshot, trainer.config.data, "test", 24, 0, "none", 2), fewshot.grid_table


@pytest.mark.parametrize("ranking", ["votes", "product"])
def test_stopping_votes_leaves_views_out_and_the_first_answers_as_they_are(untrained, monkeypatch, ranking):
    """Answers are made by hand per view: unanimous, close, and a late reversal."""
    model, questions, table = untrained
    rng = np.random.default_rng(0)
    shares = ([0.95, 0.05, 0.0], [0.6, 0.4, 0.0], [0.34, 0.33, 0.33])
    drawn = {query: rng.choice(3, 24, p=shares[query % 3]) for query in range(len(questions.queries))}
    logit = {query: rng.normal(3, 1, 24) for query in range(len(questions.queries))}

    def answer(model, questions, table, batch, kept, *options):
        for query, view in zip(batch.query[: batch.valid].tolist(), batch.view[: batch.valid].tolist(), strict=True):
            kept.add(query, view, 1, (A, B, C)[drawn[query][view]], float(np.float32(logit[query][view])))

    monkeypatch.setattr("evaluation.inference._answer", answer)
    full = collect(model, questions, table, 5, ALONE)
    for k in (1, 2):
        stopped = collect(model, questions, table, 7, ALONE, stop=VoteStop(k, ranking))
        assert len(questions.queries) * VIEWS_PER_ROUND <= len(stopped) and (
            k > 1 or len(stopped) < len(full) == 24 * len(questions.queries)
        )
        for query in range(len(questions.queries)):
            ours, theirs = (p.vote(ranking).ranked(query)[:k] for p in (stopped, full))
            assert [c.grid.item() for c in ours] == [c.grid.item() for c in theirs]


def test_answers_are_ranked_once_and_every_process_could_write_the_files(fewshot, monkeypatch):
    trainer, calls, plain = Trainer(fewshot), [], VoteTable.ranked
    monkeypatch.setattr(VoteTable, "ranked", lambda table, question: calls.append(question) or plain(table, question))
    config = trainer.config.evaluation.model_copy(update={"num_views": 2, "controls": []})
    for rank in (0, 1):
        calls.clear()
        pairs, objective = trainer.sampler.trained_pairs, trainer.config.objective
        world = World(rank, 2)
        found = evaluate(trainer.state.model, fewshot, trainer.config.data, config, objective, CPU, world, seed=0, trained_pairs=pairs)
        queries = found.counts["queries"]
        assert sorted(calls) == list(range(queries))
        assert len(found.records) == queries == sum(len(task["test"]) for task in found.puzzles.values())
        assert {name: len(task["test"]) for name, task in found.puzzles.items()} == {n: len(a) for n, a in found.submission.items()}
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


# --- ACT steps ---------------------------------------------------------------------------------------------------------


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
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-4) and torch.allclose(ours.q_halt_logits, theirs.q_halt_logits, atol=1e-4)
    assert sizes == [int((ours.steps > done).sum()) for done in range(len(sizes))] and sizes[-1] < sizes[0]


def test_recorded_steps_end_in_the_answers_of_a_plain_run(untrained):
    model, questions, table = untrained
    plain = collect(model, questions, table, 16, ALONE)
    recorded = collect(model, questions, table, 16, ALONE, every_step=True)
    assert len(recorded) == model.config.halt_max_steps * len(plain)
    ours, theirs = recorded.rows(), plain.rows()
    for name in ("query", "view", "step", "q_halt_logit"):
        assert np.array_equal(ours[name], theirs[name])
    for early in range(1, model.config.halt_max_steps + 1):
        assert set(recorded.rows(early)["step"]) == {early}
    keys = list(recorded.answers), list(plain.answers)
    assert [keys[0][i] for i in ours["answer"]] == [keys[1][i] for i in theirs["answer"]]


# --- stored predictions ------------------------------------------------------------------------------------------------


def about(**changes) -> dict:
    """What the experiments read of results.json."""
    return {
        "protocol": "inductive",
        "split": "test",
        "dataset": {"path": "data/x", "sha256": "d"},
        "checkpoint": {"path": "runs/x", "sha256": "c", "weights": "ema", "file": "ema.safetensors"},
        "model": {"arch": "etrm"},
        "num_views": 16,
        "ranking": "votes",
        "seed": 0,
        "record_steps": False,
        "vote_stop": False,
        "scores": [{"metric": f"ARC/pass@{k}"} for k in (1, 2)],
        "prediction_seconds": 8.0,
        "peak_gpu_memory_bytes": None,
        "device": "CPU",
        "git_commit": "g",
        "command": "evaluate.py",
        **changes,
    }


def synthetic(tasks: int, views: int, act_steps: int = 1, seed: int = 0) -> tuple[Predictions, list[str], list]:
    """Two queries for every third task; each view right with the query's own probability, which grows with the ACT step."""
    rng = np.random.default_rng(seed)
    kept, names, truths = Predictions(), [], []
    for task in range(tasks):
        for _ in range(1 + (task % 3 == 0)):
            query, truth = len(names), rng.integers(0, 10, rng.integers(1, 6, 2)).astype(np.uint8)
            wrong = [rng.integers(0, 10, (2, 2)).astype(np.uint8) for _ in range(4)]
            chance = rng.random()
            for view in range(views):
                for step in range(1, act_steps + 1):
                    right = rng.random() < chance * step / act_steps
                    kept.add(query, view, step, truth if right else wrong[rng.integers(4)], float(np.float32(rng.normal() + right)))
            names.append(f"task{task}")
            truths.append(key_of(truth))
    return kept, names, truths


def write(folder, kept, names, truths, **changes) -> predictions.StoredPredictions:
    folder.mkdir(parents=True, exist_ok=True)
    predictions.save(folder / predictions.FILE, kept, names, [names[:i].count(name) for i, name in enumerate(names)], truths)
    write_json(folder / "results.json", about(**changes))
    return predictions.load(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("stored")
    write(path, *synthetic(30, 16))
    return path


def test_stored_predictions_come_back_and_vote_the_same(tmp_path):
    kept, names, truths = synthetic(12, 9)
    kept.add(0, 9, 1, NOTHING, 0.0)
    loaded = write(tmp_path / "a", kept, names, [None, *truths[1:]])
    assert loaded.tasks == names and loaded.truths == [None, *truths[1:]] and loaded.labelled == list(range(1, len(names)))
    for query in range(len(names)):
        for ours, theirs in zip(loaded.predictions.vote().ranked(query), kept.vote().ranked(query), strict=True):
            assert np.array_equal(ours.grid, theirs.grid) and replace(ours, grid=None) == replace(theirs, grid=None)
    assert kept.vote().num_votes(0) == 9  # the empty grid is stored, and is no vote


def test_the_file_does_not_tell_how_many_processes_wrote_it(tmp_path):
    kept, names, truths = synthetic(9, 8)
    shares = [Predictions() for _ in range(3)]
    answers = list(kept.answers)
    rows = kept.columns
    for i in np.random.default_rng(0).permutation(len(kept)):
        shape, cells = answers[rows["answer"][i]]
        grid = np.frombuffer(cells, np.uint8).reshape(shape)
        shares[i % 3].add(rows["query"][i], rows["view"][i], rows["step"][i], grid, rows["q_halt_logit"][i])
    merged = Predictions()
    merged.merge(shares)
    for name, source in (("one", kept), ("three", merged)):
        write(tmp_path / name, source, names, truths)
    one, three = (dict(np.load(tmp_path / name / predictions.FILE)) for name in ("one", "three"))
    assert one.keys() == three.keys() and all(np.array_equal(one[key], three[key], equal_nan=one[key].dtype.kind == "f") for key in one)


def test_the_size_follows_the_distinct_answers(tmp_path):
    grids = [np.full((30, 30), value, np.uint8) for value in range(3)]
    few = Predictions()
    for query, view in itertools.product(range(20), range(50)):
        few.add(query, view, 1, grids[view % 3], 0.5)
    assert len(few) == 1000 and len(few.answers) == 3
    write(tmp_path, few, [f"t{i}" for i in range(20)], [key_of(grids[0])] * 20)
    assert (tmp_path / predictions.FILE).stat().st_size < 10_000  # the grids of all views would be 900,000 cells


def test_missing_and_damaged_predictions_are_told_apart(tmp_path, folder):
    with pytest.raises(UserError, match="save_predictions=true writes it"):
        predictions.load(tmp_path)
    (tmp_path / predictions.FILE).write_bytes((folder / predictions.FILE).read_bytes()[:500])
    with pytest.raises(UserError, match="damaged"):
        predictions.load(tmp_path)
    empty, names, truths = Predictions(), ["t"], [key_of(A)]
    with pytest.raises(UserError, match="no prediction"):
        write(tmp_path / "e", empty, names, truths)


# --- statistics --------------------------------------------------------------------------------------------------------


def test_mcnemar_is_the_binomial_test_of_the_tasks_that_differ():
    first, second = np.array([1] * 7 + [0] * 1 + [1] * 5, bool), np.array([0] * 7 + [1] * 1 + [1] * 5, bool)
    assert statistics.mcnemar(first, second) == (7, 1, pytest.approx(0.0703125))  # 2 * (1 + 8) / 2^8
    assert statistics.mcnemar(first, first) == (0, 0, 1.0)
    assert statistics.mcnemar(np.ones(400, bool), np.zeros(400, bool))[2] == float(Fraction(2, 2**400))


def test_the_permutation_test_matches_all_sign_patterns():
    differences = np.array([0.5, 1.0, -0.5, 0.0, 1.0, 0.5, 0.25])
    signs = np.array(list(itertools.product((-1, 1), repeat=7)))
    exact = (np.abs(signs @ differences) >= differences.sum() - 1e-9).mean()
    assert statistics.permutation_test(differences) == pytest.approx(exact, abs=0.02)
    assert statistics.permutation_test(np.zeros(5)) == 1.0


def test_the_bootstrap_has_the_width_of_the_standard_error_and_pairs_columns():
    rng = np.random.default_rng(0)
    first = rng.random(300)
    second = first + 0.1
    low, high = statistics.bootstrap(np.stack([first, second, second - first], axis=1))
    error = first.std() / np.sqrt(300)
    assert high[0] - low[0] == pytest.approx(2 * 1.96 * error, rel=0.05) and low[0] < first.mean() < high[0]
    assert low[2] == pytest.approx(0.1) and high[2] == pytest.approx(0.1)  # a constant difference has no spread
    again = statistics.bootstrap(first)
    assert again[0] == pytest.approx(low[0], rel=1e-12) and statistics.bootstrap(first, seed=1)[0] != again[0]


# --- experiments -------------------------------------------------------------------------------------------------------


def called(monkeypatch, main, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
    main()


def test_exp1_compares_all_views_with_the_first_one(folder, tmp_path, monkeypatch):
    called(monkeypatch, exp1.main, folder, "--output-dir", tmp_path)
    table = json.loads((tmp_path / "exp1_table.json").read_text())
    stored = predictions.load(folder)
    votes, alone = stored.predictions.vote(), stored.predictions.vote(views={0})
    by_task: dict[str, list] = {}
    for query, truth in enumerate(stored.truths):
        right = [table.ranked(query)[0].grid.tobytes() == truth[1] for table in (votes, alone)]
        by_task.setdefault(stored.tasks[query], []).append(right)
    expected = np.mean([np.mean(rights, axis=0) for rights in by_task.values()], axis=0)
    assert [table["paper_mode"]["mean"], table["single_aug"]["mean"]] == pytest.approx(expected)
    assert table["delta_paper_minus_single"] == pytest.approx(expected[0] - expected[1])
    assert table["delta_ci95"][0] < table["delta_paper_minus_single"] < table["delta_ci95"][1]
    assert table["paper_mode"]["n"] == 30 and table["paper_mode"]["votes_histogram"] == {"bins": [16], "counts": [40]}
    assert table["single_aug"]["votes_histogram"] == {"bins": [1], "counts": [40]}
    modes = json.loads((tmp_path / "exp1_report.json").read_text())["modes"]
    assert modes["paper"]["avg_time_seconds_per_original_example"] == 0.2 and modes["single_aug"]["elapsed_seconds"] is None
    assert (modes["paper"]["augmentations_per_original"], modes["single_aug"]["augmentations_per_original"]) == (16, 1)


def test_accuracy_against_augmentations_ends_in_the_full_vote_and_begins_with_one_view(folder, tmp_path, monkeypatch):
    called(monkeypatch, exp1.main, folder, "--output-dir", tmp_path)
    for name in ("a", "b"):
        called(monkeypatch, acc_vs_aug.main, folder, "--output-dir", tmp_path / name, "--draws", "5")
    assert (tmp_path / "a" / "acc_vs_aug.csv").read_bytes() == (tmp_path / "b" / "acc_vs_aug.csv").read_bytes()
    rows = list(csv.DictReader((tmp_path / "a" / "acc_vs_aug.csv").open()))
    table = json.loads((tmp_path / "exp1_table.json").read_text())
    assert [int(row["augmentations"]) for row in rows] == [0, 1, 3, 7, 15]
    for row, name in ((rows[0], "single_aug"), (rows[-1], "paper_mode")):
        assert float(row["mean_top1"]) == pytest.approx(table[name]["mean"])
    assert all(float(row["ci95_lo"]) <= float(row["mean_top1"]) <= float(row["ci95_hi"]) for row in rows)
    assert float(rows[0]["mean_top1"]) < float(rows[-1]["mean_top1"])


def test_a_subsample_is_a_vote_of_some_views(folder):
    stored = predictions.load(folder)
    shares = acc_vs_aug.first_right(stored, [2], 1, "votes", 0)
    possible = [
        {stored.ranks(stored.predictions.vote(views={0, other}))[query] == 1 for other in range(1, 16)} for query in range(len(shares))
    ]
    assert all(bool(share) in options for share, options in zip(shares[:, 0], possible, strict=True))


def test_accuracy_against_steps_is_that_of_the_answers_at_each_step(tmp_path, monkeypatch, capsys):
    kept, names, truths = synthetic(20, 6, act_steps=4)
    stored = write(tmp_path, kept, names, truths, record_steps=True)
    called(monkeypatch, steps.main, tmp_path)
    summary = json.loads((tmp_path / "steps.json").read_text())
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert printed == summary["per_step"] and summary["steps"] == 4
    rows, answers = stored.predictions.columns, list(stored.predictions.answers)
    for step, value in enumerate(summary["pass_at_1_per_step"], 1):
        table = VoteTable()
        for query, view, at, answer, q in zip(*(rows[name] for name in ("query", "view", "step", "answer", "q_halt_logit")), strict=True):
            if at == step:
                table.count(int(query), int(view), answers[answer], float(q))
        assert value == pytest.approx(stored.task_means([rank == 1 for rank in stored.ranks(table)]).mean())
    assert summary["pass_at_1_per_step"][0] < summary["pass_at_1_per_step"][-1] and printed[0]["changed"] is None
    write(tmp_path / "last", kept, names, truths)
    with pytest.raises(SystemExit):
        called(monkeypatch, steps.main, tmp_path / "last")
    assert "record_steps=true" in capsys.readouterr().err


def test_a_halted_view_votes_with_the_answer_at_which_it_halted():
    kept = Predictions()
    for view, answers in enumerate(([A], [B, A], [B, B, B])):
        for step, grid in enumerate(answers, 1):
            kept.add(0, view, step, grid, 0.0)
    assert [order(kept.vote(step=step)) for step in (1, 2, 3)] == [[2, 1], [1, 2], [1, 2]]
    assert [len(kept.rows(step)["view"]) for step in (1, 3)] == [3, 3]


@pytest.fixture(scope="module")
def opened(puzzle):
    """A TRM with different puzzle rows, opened for evaluation."""
    trainer = Trainer(puzzle)
    model = trainer.state.model.eval()
    torch.manual_seed(1)
    model.context.weights.normal_(std=1.0)
    settings = ["checkpoint=x", "num_views=2", "controls=[]", "batch_size=16", "device=cpu", "max_eval_groups=3"]
    config = compose.load(EvaluateConfig, "evaluate", settings)
    info = {"config": trainer.config.model_dump()}
    session = Session(config, ALONE, CPU, puzzle.path, model, info, trainer.config.data, puzzle, trainer.sampler.trained_pairs)
    session.about = dict
    return session


def test_the_puzzle_id_ablation_changes_what_the_model_is_told_and_nothing_else(opened, puzzle):
    owner = np.full(puzzle.metadata.num_puzzle_identifiers, -1)
    for task in range(len(puzzle.task_ids)):
        owner[puzzle.identifiers_of(np.arange(puzzle.task_rows[task], puzzle.task_rows[task + 1]))] = task
    random = puzzle_id.identifiers_told(puzzle, "random", 0).numpy()
    assert (owner[random[1:]] != owner[1:]).all() and (owner[random[1:]] >= 0).all() and random[0] == 0
    assert not puzzle_id.identifiers_told(puzzle, "blank", 0).any()
    looked_up = []
    hook = opened.model.context.register_forward_hook(
        lambda module, arguments, output: looked_up.append(arguments[0]["puzzle_identifiers"])
    )
    result = puzzle_id.ablate(opened)
    hook.remove()
    calls = len(looked_up) // 3
    normal, blank, other = (torch.cat(looked_up[i * calls : (i + 1) * calls]).long() for i in range(3))
    assert (normal > 0).all() and not blank.any() and torch.equal(other, torch.from_numpy(random)[normal])
    assert list(result["modes"]) == ["normal", "blank", "random"] and result["aggregated_voting"]
    assert {"difference", "p_permutation"} <= result["modes"]["blank"]["against_normal"].keys()


def test_the_puzzle_id_ablation_refuses_queries_without_answers(opened, monkeypatch):
    plain = Session.evaluate

    def evaluate(session):
        found = plain(session)
        return replace(found, answered=[replace(query, truth=None) for query in found.answered])

    monkeypatch.setattr(Session, "evaluate", evaluate)
    with pytest.raises(UserError, match="no query that is asked has a known answer"):
        puzzle_id.ablate(opened)


def test_votes_stay_with_the_true_puzzle_whatever_the_model_is_told(opened, monkeypatch):
    """Every mode has all its votes under the true puzzle: the ancestor lost or misfiled them, and scored zero for that alone."""
    found = []
    plain = Session.evaluate

    def evaluate(session):
        found.append(plain(session))
        return found[-1]

    monkeypatch.setattr(Session, "evaluate", evaluate)
    puzzle_id.ablate(opened)
    normal, *others = ([(r["task"], r["query"], r["input_hash"]) for r in e.records] for e in found)
    assert all(asked == normal for asked in others)
    views = [e.predictions.rows() for e in found]
    assert all(np.array_equal(rows["query"], views[0]["query"]) and np.array_equal(rows["view"], views[0]["view"]) for rows in views)


def test_efficiency_measures_what_it_says(opened):
    result = efficiency.measure(opened, warmup=1, steps=3)
    assert result["steps_measured"] == 3 and result["peak_memory_gb"] > 0.01 and result["warmup_seconds"] > 0
    assert result["throughput_samples_per_sec"] == pytest.approx(1e3 / result["avg_latency_sample_ms"])
    assert result["throughput_with_loading_samples_per_sec"] < result["throughput_samples_per_sec"]
    assert result["act_steps_per_sample"] == opened.model.config.halt_max_steps
    with pytest.raises(UserError, match="--steps"):
        efficiency.measure(opened, warmup=1, steps=0)


# --- published checkpoints ---------------------------------------------------------------------------------------------


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A mirror on disk with a small checkpoint, and what is expected of it."""
    content = b"weights" * 1000
    expected = published.Published("v0", "step_1", len(content), hashlib.sha256(content).hexdigest(), "arc1")
    source = tmp_path / "mirror" / published.REPOSITORY / "resolve" / published.REVISION / "v0"
    source.mkdir(parents=True)
    (source / "step_1").write_bytes(content)
    (source / published.CONFIG).write_text("arch: {}")
    monkeypatch.setenv("HF_ENDPOINT", (tmp_path / "mirror").as_uri())
    return expected, source


def test_a_published_checkpoint_is_fetched_once_and_verified_always(mirror, tmp_path):
    expected, source = mirror
    files = published.fetch(expected, tmp_path / "out")
    assert [path.name for path in files] == ["step_1", "all_config.yaml"] and files[0].read_bytes() == (source / "step_1").read_bytes()
    (source / "step_1").unlink()
    assert published.fetch(expected, tmp_path / "out") == files
    files[0].write_bytes(b"other")
    with pytest.raises(UserError, match="not the published v0/step_1: 5 bytes"):
        published.fetch(expected, tmp_path / "out")


def test_nothing_wrong_is_kept_and_no_network_is_said_clearly(mirror, tmp_path, monkeypatch):
    expected, source = mirror
    (source / "step_1").write_bytes(b"cut off")
    with pytest.raises(UserError, match="nothing was kept"):
        published.fetch(expected, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="without a network, bring the file to"):
        published.fetch(expected, tmp_path / "out")


# --- side by side ------------------------------------------------------------------------------------------------------


def evaluation_folder(path, ranks: list[int | None], **changes):
    """A folder as evaluate.py writes it, two queries per task."""
    path.mkdir()
    write_json(path / "results.json", about(**changes))
    records = [
        {"task": f"t{i // 2}", "query": i % 2, "input_hash": f"i{i}", "label_hash": f"l{i}", "rank_of_truth": rank}
        for i, rank in enumerate(ranks)
    ]
    (path / "per_example.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_evaluations_stand_side_by_side_with_paired_tests(tmp_path, monkeypatch, capsys):
    one = evaluation_folder(tmp_path / "one", [1, 1, 1, None, 2, 1, 1, 1] * 3)
    two = evaluation_folder(tmp_path / "two", [1, 1, 1, 1, 1, 1, 3, 1] * 3)
    called(monkeypatch, compare.main, one, two, "--json", tmp_path / "c.json")
    result = json.loads((tmp_path / "c.json").read_text())
    first, second = (e["scores"] for e in result["evaluations"])
    assert result["tasks"] == 12 and first["ARC/pass@1"]["value"] == 0.75 and second["ARC/pass@1"]["value"] == 0.875
    assert first["tasks_solved@2"]["value"] == second["tasks_solved@2"]["value"] == 0.75
    at1, at2 = result["pairs"]
    assert at1["difference"] == pytest.approx(0.125) and (at1["solved_by_first_only"], at1["solved_by_second_only"]) == (3, 6)
    assert at1["p_mcnemar"] == pytest.approx(2 * (1 + 9 + 36 + 84) / 2**9) and at1["ci95"][0] < 0.125 < at1["ci95"][1]
    assert at2["solved_by_first_only"] == at2["solved_by_second_only"] == 3 and at2["p_mcnemar"] == 1.0
    out = capsys.readouterr().out
    assert "12 tasks" in out and "+12.5 %" in out and str(two) in out


def test_different_tasks_or_protocols_are_refused_unless_told(tmp_path):
    one = compare.read(evaluation_folder(tmp_path / "one", [1, 1, 1, None]))
    shorter = compare.read(evaluation_folder(tmp_path / "shorter", [1, 1]))
    other = compare.read(evaluation_folder(tmp_path / "other", [1, 1, 1, 1], protocol="transductive"))
    with pytest.raises(UserError, match="has 2 tasks, 1 of them in common"):
        compare.compare([one, shorter], [1], False, 0)
    with pytest.raises(UserError, match="transductive"):
        compare.compare([one, other], [1], False, 0)
    assert compare.compare([one, shorter], [1], True, 0)["tasks"] == 1
    assert "transductive" in compare.compare([one, other], [1], True, 0)["notes"][0]
    with pytest.raises(UserError, match="no such file"):
        compare.read(tmp_path)
    stopped = compare.read(evaluation_folder(tmp_path / "stopped", [1, 1, 1, None], vote_stop=True))
    assert compare.compare([one, stopped], [1, 2], False, 0)["tasks"] == 2
    with pytest.raises(UserError, match="--k up to 2"):
        compare.compare([one, stopped], [3], False, 0)
    game = {"vote_stop": True, "scores": [{"metric": "all.exact_accuracy"}]}
    played = [compare.read(evaluation_folder(tmp_path / name, [1, 1, 1, None], **game)) for name in "ab"]
    assert compare.compare(played, [1], False, 0)["tasks"] == 2


@pytest.mark.parametrize("foreign", [[], {}, {"scores": [1]}])
def test_a_foreign_results_file_is_named(foreign, folder, tmp_path, monkeypatch, capsys):
    shutil.copy(folder / predictions.FILE, tmp_path)
    write_json(tmp_path / "results.json", foreign)
    for main, arguments in ((check.main, ["ARC/pass@1"]), (exp1.main, [])):
        with pytest.raises(SystemExit) as ended:
            called(monkeypatch, main, tmp_path, *arguments)
        assert ended.value.code == 2 and "results.json" in capsys.readouterr().err
