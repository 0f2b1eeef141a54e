"""The benchmarks: what they compare, what they refuse, and the whole command against a toy checkout."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data, loaders, precision, processes, scaling, votes
from benchmarks.equality import examples
from dataset import npy
from dataset.store import Store
from tests.support.grids import write_store
from tests.support.runs import called
from utils.errors import UserError

BUILDER = """
import shutil
from argdantic import ArgParser
from pydantic import BaseModel

cli = ArgParser()

class DataProcessConfig(BaseModel):
    output_dir: str

@cli.command(singleton=True)
def convert_dataset(config: DataProcessConfig):
    shutil.copytree({exported!r}, config.output_dir)
"""
LOADER = """
import numpy as np
import torch
from pydantic import BaseModel
from torch.utils.data import IterableDataset

class PuzzleDatasetConfig(BaseModel):
    dataset_paths: list[str]
    epochs_per_iter: int

class PuzzleDataset(IterableDataset):
    def __init__(self, config, split):
        self.folder, self.epochs = config.dataset_paths[0] + "/" + split, config.epochs_per_iter

    def __iter__(self):
        names = ("inputs", "labels", "puzzle_identifiers", "puzzle_indices")
        arrays = (np.load(f"{self.folder}/all__{name}.npy") for name in names)
        inputs, labels, identifiers, first = (array.astype(np.int32) for array in arrays)
        labels[labels == 0] = -100
        batch = {"inputs": inputs, "labels": labels, "puzzle_identifiers": identifiers.repeat(np.diff(first))}
        for _ in range(self.epochs):
            yield "all", {name: torch.from_numpy(values) for name, values in batch.items()}, len(inputs)
"""

SMALL_RULES = ["arch.hidden_size=32", "arch.num_heads=2", "global_batch_size=4", "encoder.num_layers=1"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A toy checkout: its builder writes the store's tasks as the original does, its loader shows all."""
    store = write_store(tmp_path / "store", layout="puzzle", num_aug=2)
    npy.export(store, tmp_path / "exported", seed=1)
    folder = tmp_path / "checkout"
    (folder / "dataset").mkdir(parents=True)
    (folder / "dataset" / "build_arc_dataset.py").write_text(
        BUILDER.format(exported=str(tmp_path / "exported"))
    )
    (folder / "puzzle_dataset.py").write_text(LOADER)
    for subset, split in (("training", "train"), ("evaluation", "test")):
        tasks = [store.task(index) for index in store.tasks_of(split)]
        (folder / f"toy_{subset}_challenges.json").write_text(
            json.dumps({task.id: task.to_json() for task in tasks})
        )
    return folder


def arguments(checkout: Path, *more: str) -> list[str]:
    return [
        "--against",
        str(checkout),
        "--input-file-prefix",
        str(checkout / "toy"),
        "--subsets",
        "training",
        "evaluation",
        *more,
    ]


@pytest.mark.slow
def test_the_command_compares_measures_and_records(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    results = tmp_path / "RESULTS.md"
    results.write_text(data.RESULTS.read_text())
    monkeypatch.setattr(data, "RESULTS", results)
    monkeypatch.setattr(data, "ROOT", tmp_path)
    monkeypatch.setattr(loaders, "small_dataset", lambda work: write_store(work / "small").path)
    small = arguments(
        checkout,
        "--num-aug",
        "2",
        "--rounds",
        "1",
        "--seconds",
        "0.01",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--record",
    )
    monkeypatch.setattr(sys, "argv", ["data.py", *small])
    data.main()
    printed = capsys.readouterr().out
    assert printed.count("\nsame ") == 4 and "DIFFERENT" not in printed
    *_, header, _, row = results.read_text().splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == len(header.strip("|").split("|"))
    assert cells[3].startswith("`python -m benchmarks.data --against checkout ") and str(tmp_path) not in row
    assert cells[7] == "yes" and cells[10] == "-" and "-" not in (cells[8], cells[9], cells[12])


def test_only_a_translation_leaves_two_datasets_equal(puzzle: Store, tmp_path: Path) -> None:
    for seed in (0, 1):
        npy.export(puzzle, tmp_path / str(seed), seed)
    first, second = (np.load(tmp_path / str(seed) / "train" / "all__inputs.npy") for seed in (0, 1))
    assert not np.array_equal(first, second)
    for split in ("train", "test"):
        assert examples(tmp_path / "0", split) == examples(tmp_path / "1", split)
        for name in ("inputs", "labels", "puzzle_identifiers"):
            file = tmp_path / "1" / split / f"all__{name}.npy"
            values = np.load(file)
            changed = values.copy()
            cell = tuple(np.argwhere(values >= 2)[-1])
            changed[cell] = values[cell] - 1 if values[cell] > 2 else 3
            np.save(file, changed)
            assert examples(tmp_path / "0", split) != examples(tmp_path / "1", split), name
            np.save(file, values)


def test_what_is_no_checkout_or_names_no_subset_is_refused(checkout: Path, tmp_path: Path) -> None:
    words = "no checkout of SamsungSAILMontreal/TinyRecursiveModels: it has no dataset/build_arc_dataset.py"
    with pytest.raises(UserError, match=words):
        data.parse_arguments(["--against", str(tmp_path)])
    with pytest.raises(UserError, match="no checkout of bdsaglam/etrm"):
        data.parse_arguments(arguments(checkout, "--against-etrm", str(checkout)))
    prefix = str(checkout / "toy")
    with pytest.raises(UserError, match=r"no subset 'trainin' \(did you mean 'training'\?\)"):
        data.count_pairs(prefix, ["trainin"])
    with pytest.raises(UserError, match="must hold 'evaluation'"):
        data.count_pairs(prefix, ["training"])


def test_a_build_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes.require_room(1000, tmp_path)
    words = "needs about 4000000.0 GB of memory, .* GB are free; measure fewer augmentations with --num-aug"
    with pytest.raises(UserError, match=words):
        processes.require_room(10**12, tmp_path)
    monkeypatch.setattr(processes.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(UserError, match=r"needs about 0.0 GB of disk, .*TMPDIR"):
        processes.require_room(1000, tmp_path)


def test_a_child_is_measured_without_its_parents_memory(tmp_path: Path) -> None:
    ballast = np.ones(400_000_000, np.uint8)
    write = "from pathlib import Path; x = bytearray(b'1') * 100_000_000; "
    write += f"Path(r'{tmp_path}/file').write_bytes(bytes(1000))"
    cost = processes.measured(["-c", write], tmp_path)
    assert 100e6 < cost.memory < ballast.nbytes and cost.disk == 1000 and 0 < cost.seconds < 60
    with pytest.raises(UserError, match="exit status 1: ValueError: no luck"):
        processes.measured(["-c", "raise ValueError('no luck')"], tmp_path)


def test_every_size_of_the_scaling_is_a_valid_model() -> None:
    for name, values in scaling.AXES.items():
        for value in values:
            config = scaling.configuration({**scaling.BASE, name: value}, [])
            assert config.arch.hidden_size == (value if name == "width" else scaling.BASE["width"])


def test_made_up_predictions_are_loaded_voted_and_ranked(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    called(monkeypatch, votes.main, "--queries", 3, "--views", 4)
    assert "3 queries x 4 views: load " in capsys.readouterr().out


def test_loaders_take_turns() -> None:
    turns: list[str] = []
    contestants = {name: lambda seconds, name=name: turns.append(name) or len(turns) for name in ("a", "b")}
    rates = loaders.alternate(contestants, rounds=3, seconds=0)
    assert turns == ["a", "b"] * 3
    assert rates["a"].rounds == [1, 3, 5] and str(rates["b"]) == "4 [2, 6]"


def test_precisions_and_threads_take_turns_and_are_recorded(
    fewshot: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    results = tmp_path / "RESULTS.md"
    results.write_text(data.RESULTS.read_text())
    monkeypatch.setattr(precision, "RESULTS", results)
    monkeypatch.setattr(precision, "rules_dataset", lambda folder: fewshot.path)
    # One thread beside one: the same contestants, whatever the machine has.
    called(monkeypatch, precision.main, "--rounds", 2, "--steps", 1, "--threads", 1, "--record", *SMALL_RULES)
    printed = capsys.readouterr().out
    assert "arch.forward_dtype=auto: " in printed.splitlines()[0]
    section = results.read_text().partition("## Precision and threads\n")[2].partition("\n## ")[0]
    heading, _, *rows = [line for line in section.splitlines() if line.startswith("|")]
    rows = rows[-2:]
    assert [row.split(" | ")[4] for row in rows] == ["float32, 1 thread", "bfloat16, 1 thread"]
    assert all(row.count("|") == heading.count("|") for row in rows)
    assert rows[0].endswith("| 1.00 [1.00, 1.00] |")
