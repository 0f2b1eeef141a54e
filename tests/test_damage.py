"""Files that a crash, a bad disk or a second process has damaged: seen, said, and nothing lost."""

import json

import pytest
import torch

from tests.support.runs import ALONE, CPU, Trainer, metrics_of, run, steps_of, train_here
from utils import checkpoint
from utils.errors import UserError
from utils.files import exclusive

FILES = ("model.safetensors", "ema.safetensors", "training.pt", "rank_0.pt", "trained_pairs.pt")


def flip_a_bit(file, place: float = 0.7) -> None:
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)


@pytest.fixture
def saved(fewshot, tmp_path):
    trainer = Trainer(fewshot)
    trainer.steps(1)
    return trainer, trainer.state.save(tmp_path, ALONE, {"scores": {}}, keep=2)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_in_any_file_is_refused_with_the_files_name(saved, name):
    trainer, path = saved
    assert checkpoint.damage(path) == ""
    flip_a_bit(path / name)
    assert name in checkpoint.damage(path) and "damaged" in checkpoint.damage(path)
    with pytest.raises(UserError, match=name):
        trainer.state.load(path, ALONE, CPU)


def test_a_changed_or_missing_word_of_the_info_is_refused(saved):
    _, path = saved
    text = (path / "info.json").read_text()
    (path / "info.json").write_text(text.replace('"step": 1', '"step": 7'))
    with pytest.raises(UserError, match="info.json is damaged"):
        checkpoint.load_info(path)
    (path / "info.json").write_text(text)
    assert checkpoint.load_info(path)["step"] == 1
    (path / "training.pt").unlink()
    assert "training.pt is missing" in checkpoint.damage(path)


def test_a_resumed_run_goes_back_to_the_newest_whole_checkpoint_and_keeps_the_damaged_one(
    fewshot, tmp_path, capsys
):
    whole = train_here(fewshot, tmp_path / "whole", "train_steps=6", "checkpoint_interval=2")
    folder = train_here(fewshot, tmp_path, "train_steps=4", "checkpoint_interval=2")
    damaged = folder / "checkpoints" / "step_4"
    flip_a_bit(damaged / "ema.safetensors")
    assert checkpoint.newest_whole(folder / "checkpoints")[0].name == "step_2"
    train_here(fewshot, tmp_path, "train_steps=6", "checkpoint_interval=2")
    said = capsys.readouterr().err
    assert "resumed at step 2" in said and "ema.safetensors is damaged" in said and "damaged_step_4" in said
    assert (folder / "checkpoints" / "damaged_step_4" / "info.json").is_file()
    assert steps_of(folder) == ["damaged_step_4", "step_4", "step_6"]
    last = [path / "checkpoints" / "step_6" for path in (whole, folder)]
    for which in ("raw", "ema"):
        one, other = (checkpoint.load_weights(path, which) for path in last)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert [line["step"] for line in metrics_of(folder)] == [1, 2, 3, 4, 5, 6]


def test_a_run_without_a_whole_checkpoint_says_so_and_starts_nothing_anew(fewshot, tmp_path):
    folder = train_here(fewshot, tmp_path, "train_steps=2")
    flip_a_bit(folder / "checkpoints" / "step_2" / "model.safetensors")
    with pytest.raises(UserError, match="no whole checkpoint left: .*model.safetensors is damaged"):
        train_here(fewshot, tmp_path, "train_steps=4")
    assert steps_of(folder) == ["step_2"]


@pytest.mark.parametrize(
    "rubbish", [b"\0" * 512 + b"\n", b"\xff\xfe{}\n", b'{"step": 1\n', b"[1, 2]\n", b"null\n"]
)
def test_a_damaged_line_of_the_metrics_is_left_out_and_kept_beside(fewshot, tmp_path, capsys, rubbish):
    folder = train_here(fewshot, tmp_path, "train_steps=2")
    file = folder / "metrics.jsonl"
    first, *rest = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + rubbish + b"".join(rest))
    before = file.read_bytes()
    train_here(fewshot, tmp_path, "train_steps=3")
    assert "1 damaged line(s) left out" in capsys.readouterr().err
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]
    assert (folder / "damaged_metrics.jsonl").read_bytes() == before


def test_a_cut_last_line_is_what_a_killed_run_leaves_and_no_word_is_lost_on_it(fewshot, tmp_path, capsys):
    folder = train_here(fewshot, tmp_path, "train_steps=2")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/lo')
    train_here(fewshot, tmp_path, "train_steps=3")
    assert "damaged" not in capsys.readouterr().err
    assert len(metrics_of(folder)) == 3


def test_two_trainings_in_one_folder_are_refused_and_a_dead_one_is_not(fewshot, tmp_path):
    folder = tmp_path / "r"
    with (
        exclusive(folder, "trains in this folder"),
        pytest.raises(UserError, match="another process .* trains"),
    ):
        train_here(fewshot, tmp_path, "train_steps=1")
    code = "import os; from pathlib import Path; from utils.files import exclusive; "
    code += f"exclusive(Path({str(folder)!r}), 'x').__enter__(); os._exit(9)"
    assert run("-c", code).returncode == 9
    train_here(fewshot, tmp_path, "train_steps=1")
    assert steps_of(folder) == ["step_1"]


@pytest.mark.parametrize("name", ["..", ".", "..."])
def test_a_run_name_cannot_leave_the_output_folder(fewshot, tmp_path, name):
    with pytest.raises(UserError, match="run_name"):
        train_here(fewshot, tmp_path / "runs", f"run_name={name}")
    assert not list(tmp_path.glob("**/checkpoints"))
