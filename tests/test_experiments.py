"""Experiments on stored predictions and on an opened session, and the download of published checkpoints."""

import csv
import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from config import compose
from evaluation import predictions
from evaluation.in_training import respondent_of
from evaluation.session import EvaluateConfig, Session
from evaluation.trained_model import TrainedModel
from evaluation.voting import VoteTable
from experiments import acc_vs_aug, efficiency, puzzle_id, steps, votes_against_one_view
from tests.support.predictions import synthetic, write
from tests.support.runs import Trainer, called
from tools import published
from utils.errors import UserError


def test_exp1_compares_all_views_with_the_first_one(stored_folder, tmp_path, monkeypatch):
    called(monkeypatch, votes_against_one_view.main, stored_folder, "--output-dir", tmp_path)
    table = json.loads((tmp_path / "exp1_table.json").read_text())
    stored = predictions.load(stored_folder)
    votes, alone = stored.predictions.vote(), stored.predictions.vote(views={0})
    by_task: dict[str, list] = {}
    for query, truth in enumerate(stored.truths):
        right = [table.ranked(query)[0].grid.tobytes() == truth[1] for table in (votes, alone)]
        by_task.setdefault(stored.tasks[query], []).append(right)
    expected = np.mean([np.mean(rights, axis=0) for rights in by_task.values()], axis=0)
    assert [table["paper_mode"]["mean"], table["single_aug"]["mean"]] == pytest.approx(expected)
    assert table["delta_paper_minus_single"] == pytest.approx(expected[0] - expected[1])
    assert table["delta_ci95"][0] < table["delta_paper_minus_single"] < table["delta_ci95"][1]
    assert table["paper_mode"]["n"] == 30 and table["paper_mode"]["votes_histogram"] == {
        "bins": [16],
        "counts": [40],
    }
    assert table["single_aug"]["votes_histogram"] == {"bins": [1], "counts": [40]}
    modes = json.loads((tmp_path / "exp1_report.json").read_text())["modes"]
    assert (
        modes["paper"]["avg_time_seconds_per_original_example"] == 0.2
        and modes["single_aug"]["elapsed_seconds"] is None
    )
    assert (
        modes["paper"]["augmentations_per_original"],
        modes["single_aug"]["augmentations_per_original"],
    ) == (16, 1)


def test_accuracy_against_augmentations_ends_in_the_full_vote_and_begins_with_one_view(
    stored_folder, tmp_path, monkeypatch
):
    called(monkeypatch, votes_against_one_view.main, stored_folder, "--output-dir", tmp_path)
    for name in ("a", "b"):
        called(monkeypatch, acc_vs_aug.main, stored_folder, "--output-dir", tmp_path / name, "--draws", "5")
    assert (tmp_path / "a" / "acc_vs_aug.csv").read_bytes() == (
        tmp_path / "b" / "acc_vs_aug.csv"
    ).read_bytes()
    rows = list(csv.DictReader((tmp_path / "a" / "acc_vs_aug.csv").open()))
    table = json.loads((tmp_path / "exp1_table.json").read_text())
    assert [int(row["augmentations"]) for row in rows] == [0, 1, 3, 7, 15]
    for row, name in ((rows[0], "single_aug"), (rows[-1], "paper_mode")):
        assert float(row["mean_top1"]) == pytest.approx(table[name]["mean"])
    assert all(float(row["ci95_lo"]) <= float(row["mean_top1"]) <= float(row["ci95_hi"]) for row in rows)
    assert float(rows[0]["mean_top1"]) < float(rows[-1]["mean_top1"])


def test_a_subsample_is_a_vote_of_some_views(stored_folder):
    stored = predictions.load(stored_folder)
    shares = acc_vs_aug.first_right(stored, [2], 1, "votes", 0)
    possible = [
        {stored.ranks(stored.predictions.vote(views={0, other}))[query] == 1 for other in range(1, 16)}
        for query in range(len(shares))
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
        for query, view, at, answer, q in zip(
            *(rows[name] for name in ("query", "view", "step", "answer", "q_halt_logit")), strict=True
        ):
            if at == step:
                table.count(int(query), int(view), answers[answer], float(q))
        assert value == pytest.approx(stored.task_means([rank == 1 for rank in stored.ranks(table)]).mean())
    assert (
        summary["pass_at_1_per_step"][0] < summary["pass_at_1_per_step"][-1] and printed[0]["changed"] is None
    )
    write(tmp_path / "last", kept, names, truths)
    with pytest.raises(SystemExit):
        called(monkeypatch, steps.main, tmp_path / "last")
    assert "record_steps=true" in capsys.readouterr().err


@pytest.fixture(scope="module")
def opened(puzzle):
    """A TRM with different puzzle rows, opened for evaluation."""
    trainer = Trainer(puzzle)
    model = trainer.state.model.eval()
    torch.manual_seed(1)
    model.context.weights.normal_(std=1.0)
    settings = [
        "checkpoint=x",
        "num_views=2",
        "controls=[]",
        "batch_size=16",
        "device=cpu",
        "max_eval_groups=3",
        "save_predictions=true",
    ]
    config = compose.load(EvaluateConfig, "evaluate", settings)
    info = {"config": trainer.config.model_dump()}
    trained = TrainedModel(puzzle.path, "ema", model, info, trainer.sampler.trained_pairs)
    session = Session(config, trained, respondent_of(trainer))
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
    hook = opened.trained.model.context.register_forward_hook(
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
        return replace(found, answers=[replace(query, truth=None) for query in found.answers])

    monkeypatch.setattr(Session, "evaluate", evaluate)
    with pytest.raises(UserError, match="no query that is asked has a known answer"):
        puzzle_id.ablate(opened)


def test_votes_stay_with_the_true_puzzle_whatever_the_model_is_told(opened, monkeypatch):
    """Every mode has all its votes under the true puzzle: the ancestor misfiled them, and scored zero."""
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
    assert all(
        np.array_equal(rows["query"], views[0]["query"]) and np.array_equal(rows["view"], views[0]["view"])
        for rows in views
    )


def test_efficiency_measures_what_it_says(opened):
    result = efficiency.measure(opened, warmup=1, steps=3)
    assert result["steps_measured"] == 3 and result["peak_memory_gb"] > 0.01 and result["warmup_seconds"] > 0
    assert result["throughput_samples_per_sec"] == pytest.approx(1e3 / result["avg_latency_sample_ms"])
    assert result["throughput_with_loading_samples_per_sec"] < result["throughput_samples_per_sec"]
    assert result["act_steps_per_sample"] == opened.trained.model.config.halt_max_steps
    with pytest.raises(UserError, match="--steps"):
        efficiency.measure(opened, warmup=1, steps=0)


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
    assert [path.name for path in files] == ["step_1", "all_config.yaml"] and files[0].read_bytes() == (
        source / "step_1"
    ).read_bytes()
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
