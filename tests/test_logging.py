"""What a run records: documented metrics, pictures, its environment; and what it asks for that is missing."""

import json
import re
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.batch import materialise
from dataset.games.arc import DRAWING
from dataset.games.drawing import rgb
from dataset.store import Store
from dataset.task import Pair
from dataset.views import EvaluationSet
from evaluation import pictures
from evaluation.canvas_scores import CanvasScores
from evaluation.scoreboard import metric_names
from models.act import Answer
from models.losses import is_per_row
from pretrain_etrm import train
from tests.support.runs import ROOT, load_config, metrics_of, train_here
from utils import extras
from utils.distributed import World
from utils.environment import git_commit
from utils.errors import UserError
from utils.images import write_png
from utils.logging import LoggingConfig, RunLogger

QUIET = LoggingConfig(
    wandb="disabled", tensorboard=False, progress=False, images_interval=None, images_samples=2
)
VARIATIONAL = ["encoder=variational", "encoder.num_layers=1"]
OBJECTIVES = [f"objective.{name}_weight=0.01" for name in ("kl", "reconstruct", "contrastive")]


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "r" / "metrics.jsonl").read_text().splitlines()]


def trained(store: Store, folder, *overrides: str) -> list[dict]:
    """The lines of a run of two steps, scored at the end."""
    options = (
        "train_steps=2",
        "eval_interval=2",
        "evaluation.num_views=2",
        "evaluation.pass_ks=[1,2]",
        "run_name=r",
    )
    train(load_config(store, *options, f"output_dir={folder}", *overrides))
    return metrics(folder)


@pytest.fixture(scope="module")
def run_of_everything(fewshot, tmp_path_factory):
    """One run with every term of the loss, controls and pictures."""
    folder = tmp_path_factory.mktemp("run")
    options = [
        "arch.no_ACT_continue=false",
        "evaluation.controls=[query_only,shuffled_demonstrations,copy_input]",
    ]
    return folder, trained(
        fewshot,
        folder,
        *VARIATIONAL,
        *OBJECTIVES,
        *options,
        "logging.images_interval=2",
        "logging.images_samples=2",
    )


def documented() -> set[str]:
    """The names in the first column of the table in docs/metrics.md."""
    rows = re.findall(r"^\| (`[^|]+`) \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def as_documented(name: str) -> str:
    """The name without what a run chooses: k of pass@k, an H cycle's number, and the control behind a
    score."""
    name = re.sub(r"/(query_only|shuffled_demonstrations|copy_input)$", "", name)
    return re.sub(r"@\d+$", "@k", re.sub(r"cycle_\d+", "cycle_N", name))


def test_outside_a_checkout_the_commit_is_what_the_environment_says(monkeypatch):
    assert git_commit()
    monkeypatch.setenv("PATH", "")  # no git
    assert git_commit() is None
    monkeypatch.setenv("ETRM_COMMIT", "abc")
    assert git_commit() == "abc"


def test_every_logged_name_is_documented_and_every_documented_name_is_logged(
    run_of_everything, fewshot, tmp_path
):
    internal = ("objective.split=internal", "objective.aggregator=mean")
    lines = run_of_everything[1] + trained(fewshot, tmp_path / "internal", "encoder=memory", *internal)
    changing = ("encoder=memory", "depth_schedule=[[0,1,1],[0.5,2,1]]", "objective.differential_weight=0.1")
    lines += trained(fewshot, tmp_path / "changing", *changing)
    logged = {as_documented(name) for line in lines for name in line if name not in ("step", "protocol")}
    assert logged == documented()


def test_the_names_of_an_evaluation_are_known_before_it(run_of_everything, fewshot):
    controls = ["query_only", "shuffled_demonstrations", "copy_input"]
    config = load_config(fewshot, "evaluation.pass_ks=[1,2]").evaluation.model_copy(
        update={"controls": controls}
    )
    (line,) = (line for line in run_of_everything[1] if "protocol" in line)
    assert {*metric_names(config, fewshot)} == {
        name for name in line if name.startswith(("ARC/", "tasks_solved@", "all."))
    }


def test_a_puzzle_run_logs_the_same_evaluation_names(run_of_everything, puzzle, tmp_path):
    (last,) = (line for line in trained(puzzle, tmp_path) if "protocol" in line)
    assert {as_documented(name) for name in last} <= documented() | {"step", "protocol"}
    assert last["protocol"] == "transductive" and 0 < last["all.steps"] <= 3


def test_the_logged_loss_is_the_sum_of_its_weighted_terms(run_of_everything):
    for line in run_of_everything[1]:
        if "train/loss" in line:
            halting = 0.5 * (line["train/q_halt_loss"] + line["train/q_continue_loss"])
            auxiliary = sum(value for name, value in line.items() if name.endswith("_loss_weighted"))
            assert line["train/loss"] == pytest.approx(line["train/lm_loss"] + halting + auxiliary, rel=1e-5)
            assert line["train/kl_loss_weighted"] == pytest.approx(0.01 * line["train/kl_loss"], rel=1e-5)


def test_losses_are_means_over_all_rows_and_the_others_over_those_that_halted():
    assert all(map(is_per_row, ("loss", "lm_loss", "kl_loss", "kl_loss_weighted", "context_gradient")))
    assert not any(map(is_per_row, ("accuracy", "exact_accuracy", "q_halt_accuracy", "steps")))


def test_speeds_are_consistent_with_each_other(run_of_everything):
    train_line = [line for line in run_of_everything[1] if "train/loss" in line][-1]
    (evaluation,) = (line for line in run_of_everything[1] if "protocol" in line)
    seconds, samples = (
        train_line["timing/train_time_per_interval_seconds"],
        train_line["timing/train_samples_this_interval"],
    )
    assert samples == 8 and train_line["timing/train_samples_per_second"] == pytest.approx(samples / seconds)
    assert train_line["timing/train_ms_per_step"] == pytest.approx(
        8 * train_line["timing/train_ms_per_sample"]
    )
    # 7 queries in two views, asked plainly and under two controls that the model answers
    assert evaluation["timing/eval_samples_this_interval"] == 3 * 7 * 2
    ratio = train_line["timing/train_samples_per_second"] / evaluation["timing/eval_samples_per_second"]
    assert evaluation["timing/train_vs_eval_throughput_ratio"] == pytest.approx(ratio)
    assert 0.01 < train_line["timing/peak_memory_gb"] < 100


def test_means_over_single_views_count_what_can_be_compared(fewshot):
    """Answers made of the truth, one with a wrong cell; the row that only fills the batch counts nowhere."""
    questions = EvaluationSet(fewshot, load_config(fewshot).data, "test", 2, 0)
    scores = CanvasScores(fewshot, fewshot.grid_table, load_config(fewshot).objective)
    batches = list(questions.batches(4))
    wrong_cells = 0
    for number, batch in enumerate(batches):
        labels = materialise(batch.samples, fewshot, fewshot.grid_table).data["labels"]
        tokens = labels.clamp_min(0)
        if number == 0:
            cell = (labels[0] >= 0).nonzero()[0, 0]
            tokens[0, cell] = (tokens[0, cell] + 1) % 12
            wrong_cells = 1 / (labels[0] >= 0).sum().item()
        logits = 50 * torch.nn.functional.one_hot(tokens, 12).float()
        scores.add(batch, Answer(logits, torch.full((4,), 30.0), torch.full((4,), 2)))
    fitting = [q for q in questions.queries if questions.answer_fits(q)]
    count = 2 * len(fitting)
    assert any(batch.valid < 4 for batch in batches) and count
    means = scores.means()
    assert means["all.exact_accuracy"] == means["all.q_halt_accuracy"] == pytest.approx((count - 1) / count)
    assert means["all.accuracy"] == pytest.approx((count - wrong_cells) / count)
    assert means["all.steps"] == 2 and means["all.q_halt_loss"] == pytest.approx(30 / count, rel=1e-3)


def test_queries_whose_answer_is_unknown_count_nowhere_in_the_means(fewshot):
    questions = EvaluationSet(fewshot, load_config(fewshot).data, "test", 1, 0)
    (batch, *_) = questions.batches(1)
    (pair,) = batch.samples.query
    unknown = replace(
        fewshot, pair_output=np.where(np.arange(len(fewshot.pair_output)) == pair, -1, fewshot.pair_output)
    )
    cells = batch.samples.bucket.side**2
    answer = Answer(torch.zeros(1, cells, 12), torch.zeros(1), torch.ones(1))
    for store, expected in ((fewshot, True), (unknown, False)):
        scores = CanvasScores(store, store.grid_table, load_config(fewshot).objective)
        scores.add(batch, answer)
        assert bool(scores.means()) == expected


def test_a_run_says_what_it_ran_on_each_time_it_starts(fewshot, tmp_path):
    for steps in (2, 4):
        trained(fewshot, tmp_path, f"train_steps={steps}", "eval_interval=null")
    first, second = json.loads((tmp_path / "r" / "environment.json").read_text())
    assert (first["step"], second["step"]) == (0, 2)
    assert first["data"]["hash"] == fewshot.metadata.content_hash and first["parameters"]["core"] > 0
    assert (
        first["packages"]["torch"].startswith("2.")
        and first["processes"] == 1
        and first["gpu_memory_gb"] is None
    )
    assert first["git_commit"] and first["command"] and first["device"].endswith("threads")


def test_a_png_holds_its_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    write_png(tmp_path / "deep" / "x.png", pixels)
    assert np.array_equal(np.array(Image.open(tmp_path / "deep" / "x.png")), pixels)


def test_a_run_draws_what_it_predicts(run_of_everything):
    folder = run_of_everything[0] / "r" / "images"
    assert sorted(file.name for file in folder.iterdir()) == [
        "eval_predictions_2.png",
        "train_predictions_2.png",
    ]
    assert all(Image.open(file).mode == "RGB" for file in folder.iterdir())


def test_a_picture_shows_cells_in_their_colours_and_frames_the_prediction():
    grid = np.array([[1, 2], [3, 4]], np.uint8)
    red = np.array(rgb(DRAWING.colours[2]))
    for prediction, frame in ((grid, pictures.RIGHT), (grid.T, pictures.WRONG), (None, pictures.WRONG)):
        pixels = pictures.draw([pictures.Example([Pair(grid, grid)], grid, prediction, grid)], DRAWING)
        count = (pixels == red).all(-1).sum()
        # a pair, the query, the truth, and a prediction if there is one, each with a red cell in its lines
        assert count == (4 + (prediction is not None)) * (DRAWING.cell - 1) ** 2
        assert (pixels == frame).all(-1).any()
        assert not (pixels == (pictures.WRONG if frame is pictures.RIGHT else pictures.RIGHT)).all(-1).any()


def test_an_unknown_truth_is_neither_right_nor_wrong():
    pixels = pictures.draw(
        [pictures.Example([], np.zeros((3, 1), np.uint8), np.zeros((1, 1), np.uint8), None)],
        DRAWING,
    )
    assert not any((pixels == colour).all(-1).any() for colour in (pictures.RIGHT, pictures.WRONG))


class Recorder:
    """Stands in for TensorBoard's writer."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.images, self.closed = (
            folder,
            purge_step,
            [],
            [],
            False,
        )
        Recorder.made = self

    def add_scalar(self, *scalar):
        self.scalars.append(scalar)

    def add_image(self, name, pixels, step, dataformats):
        self.images.append((name, pixels.shape, step, dataformats))

    def close(self):
        self.closed = True


def test_tensorboard_gets_numbers_and_pictures(tmp_path, monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Recorder
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(extras, "find_spec", lambda name: name)
    config = QUIET.model_copy(update={"tensorboard": True, "images_interval": 1})
    logger = RunLogger(config, tmp_path, "p", "n", {}, World(), 10, 4)
    logger.log(5, {"train/loss": 0.5, "eval/tasks": 3, "protocol": "inductive", "train/accuracy": None})
    logger.image(5, "eval_predictions", np.zeros((2, 3, 3), np.uint8))
    logger.close()
    assert Recorder.made.scalars == [("train/loss", 0.5, 5), ("eval/tasks", 3, 5)]
    assert Recorder.made.images == [("eval_predictions", (2, 3, 3), 5, "HWC")]
    assert Recorder.made.purge_step == 5 and Recorder.made.closed
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["train/accuracy"] is None


@pytest.mark.parametrize(
    ("package", "changes"), [("wandb", {"wandb": "offline"}), ("tensorboard", {"tensorboard": True})]
)
def test_a_missing_package_is_one_message_before_anything_is_written(package, changes, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    words = rf"needs {package}, which is not installed: pip install -e '.\[{package}\]', or logging"
    with pytest.raises(UserError, match=words):
        RunLogger(QUIET.model_copy(update=changes), tmp_path, "p", "n", {}, World(), 10, 0)
    assert not list(tmp_path.iterdir())


def test_wandb_continues_the_run_of_its_folder_and_no_other_of_its_name(tmp_path, monkeypatch):
    asked = []
    module = types.ModuleType("wandb")
    module.init = lambda **options: asked.append(options) or types.SimpleNamespace(finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(extras, "find_spec", lambda name: name)
    for folder in ("a", "a", "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        RunLogger(
            QUIET.model_copy(update={"wandb": "offline"}), tmp_path / folder, "p", "n", {}, World(), 10, 0
        ).close()
    first, again, other = (options["id"] for options in asked)
    assert first == again != other and {options["name"] for options in asked} == {"n"}


def test_other_ranks_write_nothing(tmp_path):
    logger = RunLogger(QUIET, tmp_path, "p", "n", {}, World(rank=1, size=2), 10, 0)
    logger.log(1, {"train/loss": 1.0})
    logger.image(1, "eval_predictions", np.zeros((2, 2, 3), np.uint8))
    logger.say("nothing")
    logger.close()
    assert not list(tmp_path.iterdir())


def test_the_log_says_what_is_frozen_and_at_which_rate_the_encoder_learns(fewshot, puzzle, tmp_path):
    staged = (
        "train_steps=4",
        "freeze_decoder_steps=2",
        "encoder_lr=3e-4",
        "lr_warmup_steps=0",
        "log_interval=1",
    )
    lines = metrics_of(train_here(fewshot, tmp_path / "a", *staged))
    assert [line["train/decoder_frozen"] for line in lines] == [1, 1, 0, 0]
    assert [line["train/encoder_frozen"] for line in lines] == [0] * 4
    assert {line["train/encoder_lr"] for line in lines} == {3e-4}
    assert {line["train/lr"] for line in lines} == {1e-4}
    (line,) = metrics_of(train_here(puzzle, tmp_path / "b", "train_steps=1", "log_interval=1"))
    assert line["train/decoder_frozen"] == 0 and "train/encoder_frozen" not in line
