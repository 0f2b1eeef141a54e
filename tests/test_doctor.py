"""The check before a long run: what it finds, what it says, and that the run's own folder stays as it was."""

import hashlib
from pathlib import Path

import pytest
import torch

from dataset.store import Store
from pretrain_etrm import train
from tests.support.runs import TINY, load_config, run
from tools import doctor
from training import start

CHECKS = [
    "config",
    "device",
    "folder",
    "data",
    "model",
    "start",
    "train",
    "evaluate",
    "logging",
    "save",
    "load",
]


def options(store: Store, output: Path, *overrides: str) -> list[str]:
    layout = (
        []
        if store.metadata.layout == "fewshot"
        else ["arch=trm", "data.augmentation=table", "arch.puzzle_emb_len=2"]
    )
    return [*layout, *TINY, f"data.path={store.path}", f"output_dir={output}", "run_name=r", *overrides]


def snapshot(folder: Path) -> dict[str, str]:
    """Every file of a folder, hashed."""
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def checklist(text: str) -> list[tuple[str, str]]:
    """(outcome, check) of each line."""
    return [tuple(line.split()[:2]) for line in text.splitlines() if line.startswith(("ok ", "failed "))]


def failure(capsys: pytest.CaptureFixture, arguments: list[str]) -> tuple[str, str]:
    """The check that fails, and what is said about it."""
    with pytest.raises(SystemExit) as stopped:
        doctor.examine(arguments)
    assert stopped.value.code == 2
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines[:-1])
    _, name, what = lines[-1].split(maxsplit=2)
    return name, what


def test_a_good_run_passes_every_check_and_nothing_is_left_behind(puzzle, tmp_path, capsys):
    doctor.examine(options(puzzle, tmp_path / "runs", "logging.images_interval=5"))
    said = capsys.readouterr().out
    assert checklist(said) == [("ok", name) for name in CHECKS] and "all is well" in said
    assert not list((tmp_path / "runs").iterdir())


def test_two_processes_pass_together_and_speak_once(fewshot, tmp_path):
    done = run("-m", "tools.doctor", *options(fewshot, tmp_path), world=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert checklist(done.stdout) == [("ok", name) for name in CHECKS] and "2 process(es)" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_failure_under_torchrun_ends_all_processes(fewshot, tmp_path):
    done = run("-m", "tools.doctor", *options(fewshot, tmp_path, "global_batch_size=7"), world=2, timeout=100)
    assert (
        done.returncode != 0
        and "failed  data" in done.stdout
        and "not divisible by the world size 2" in done.stdout
    )
    assert not list(tmp_path.iterdir())


def test_what_the_run_will_do_is_what_is_rehearsed(fewshot, tmp_path, capsys, monkeypatch):
    real, steps = start.train_step, []

    def train_step(state, batch, config, world):
        steps.append((state.step >= 0.9 * config.train_steps, config.micro_batch_size))
        return real(state, batch, config, world)

    monkeypatch.setattr(start, "train_step", train_step)
    arguments = options(fewshot, tmp_path, "validation=2", "eval_interval=5", "micro_batch_size=4")
    doctor.examine([*arguments, "latent_step_from=0.9"])
    said = capsys.readouterr().out
    assert "2 held out for validation" in said and "validation, inductive, 2 tasks" in said
    assert steps == [(True, 4)] * doctor.STEPS
    name, what = failure(capsys, [*arguments, "best_metric=ARC/pass@3"])
    assert name == "data" and "best_metric=ARC/pass@3" in what


def test_an_existing_run_is_continued_in_mind_only(fewshot, tmp_path, capsys):
    arguments = options(fewshot, tmp_path, "train_steps=2")
    train(load_config(fewshot, f"output_dir={tmp_path}", "run_name=r", "train_steps=2"))
    before = snapshot(tmp_path)
    doctor.examine([*arguments, "train_steps=9"])
    assert "continues at step 2" in capsys.readouterr().out
    name, what = failure(capsys, [*arguments, "lr=0.5"])
    assert name == "start" and "lr: 0.0001 then, 0.5 now" in what
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("override", "name", "said"),
    [
        ("lerning_rate=1", "config", "unknown key 'lerning_rate'"),
        ("data.path=nowhere", "data", "nowhere"),
        ("data.min_demos=9 data.max_demos=9", "data", "none of its 6 training tasks can be trained on"),
        ("load_pretrained_decoder=nowhere.pt", "start", "nowhere.pt"),
    ],
)
def test_each_mistake_is_named_by_the_check_that_finds_it(override, name, said, fewshot, tmp_path, capsys):
    found, what = failure(capsys, [*options(fewshot, tmp_path), *override.split()])
    assert found == name and said in what
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_fails(fewshot, tmp_path, capsys):
    (tmp_path / "blocked").write_text("a file where the folder should be")
    name, what = failure(capsys, options(fewshot, tmp_path / "blocked"))
    assert name == "folder" and "blocked" in what


def test_too_little_disk_for_the_checkpoints_fails(fewshot, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2_100_000}))
    name, what = failure(capsys, options(fewshot, tmp_path))
    assert name == "save" and "3 checkpoints of" in what and "keep_checkpoints" in what
    assert not list(tmp_path.iterdir())


def test_a_gradient_that_is_not_finite_fails(fewshot, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.step._all_finite", lambda norm, state: torch.tensor(False))
    name, what = failure(capsys, options(fewshot, tmp_path))
    assert name == "train" and "not finite" in what and "forward_dtype=float32" in what


def test_weights_that_do_not_come_back_fail(fewshot, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.state.TrainState.load", lambda self, path, world, device: None)
    name, what = failure(capsys, options(fewshot, tmp_path))
    assert name == "load" and "not what was saved" in what


def test_lack_of_memory_and_the_unforeseen_are_told_apart(fewshot, tmp_path, capsys, monkeypatch):
    for error, said in (
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "lower global_batch_size"),
        (KeyError("x"), "KeyError"),
    ):

        def failing(*arguments, error=error):
            raise error

        monkeypatch.setattr(start, "train_step", failing)
        name, what = failure(capsys, options(fewshot, tmp_path))
        assert name == "train" and said in what
