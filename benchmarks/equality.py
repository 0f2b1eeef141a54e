"""Do the ancestors' files and ours hold the same data?"""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.processes import DRIVE, our_build, run, their_build
from dataset import npy
from dataset.canvas import EOS, IGNORE_LABEL_ID, PAD
from dataset.store import Store
from utils.files import read_json

AUGMENTATIONS = 2
READ_BATCH = 16


def check(trm: Path, prefix: str, subsets: list[str], work: Path) -> dict[str, bool]:
    """What was compared, and whether it was the same. Leaves the original's dataset in `work`/original, and as ours in
    `work`/imported."""
    run(their_build(prefix, subsets, AUGMENTATIONS, work / "original"), trm)
    npy.import_(work / "original", work / "imported")
    npy.export(Store.load(work / "imported", "puzzle"), work / "again")
    run(our_build(prefix, subsets, AUGMENTATIONS, work / "own"))
    npy.export(Store.load(work / "own", "puzzle"), work / "exported")
    results = {}
    for split in ("train", "test"):
        original, again = (examples(work / name, split) for name in ("original", "again"))
        results[f"{original.total():,} {split} examples of the original, imported and exported again"] = (
            original == again
        )
        shown, written = (
            read_by_original(trm, work / "exported", split),
            _rows(_arrays(work / "exported", split)),
        )
        same = shown == written if split == "test" else set(shown) <= set(written)
        results[f"{len(shown):,} {split} examples of ours, exported, as the original's loader reads them"] = (
            bool(shown) and same
        )
    return results


def examples(folder: Path, split: str) -> Counter:
    """The multiset of (input, label, puzzle name) of a split in the ancestors' layout, translations removed.

    Where a translated grid touches the canvas' border, its end-of-grid tokens fall off; so they are removed from training
    examples too.
    """
    names = read_json(folder / "identifiers.json")
    arrays = _arrays(folder, split)
    counted: Counter = Counter()
    for question, answer, identifier in zip(*arrays.values(), strict=True):
        corner = int((question != PAD).argmax())
        tokens = [np.roll(row, -corner) for row in (question, answer)]
        if split == "train":
            tokens = [np.where(row == EOS, PAD, row) for row in tokens]
        counted[tokens[0].tobytes(), tokens[1].tobytes(), names[identifier]] += 1
    return counted


def _arrays(folder: Path, split: str) -> dict[str, np.ndarray]:
    """inputs (N, L) and labels (N, L) tokens and puzzle_identifiers (N,) of a split in the ancestors' layout."""
    names = ("inputs", "labels", "puzzle_identifiers", "puzzle_indices")
    inputs, labels, identifiers, first = (
        np.load(folder / split / f"{npy.SET_NAME}__{name}.npy") for name in names
    )
    return {"inputs": inputs, "labels": labels, "puzzle_identifiers": identifiers.repeat(np.diff(first))}


def _rows(arrays: dict[str, np.ndarray]) -> list[tuple[bytes, bytes, int]]:
    columns = (arrays[name] for name in ("inputs", "labels", "puzzle_identifiers"))
    return [
        (question.tobytes(), answer.tobytes(), int(identifier))
        for question, answer, identifier in zip(*columns, strict=True)
    ]


def read_by_original(trm: Path, folder: Path, split: str) -> list[tuple[bytes, bytes, int]]:
    """One epoch of a dataset in the ancestors' layout as the original's loader shows it: input, label, identifier."""
    output = folder.with_name(f"read-{split}.npz")
    options = {
        "loader": "puzzle_dataset:PuzzleDataset",
        "data": str(folder),
        "split": split,
        "batch_size": READ_BATCH,
    }
    run([str(DRIVE), "read", json.dumps({**options, "output": str(output)})], trm)
    with np.load(output) as file:
        shown = dict(file)
    shown["labels"] = np.where(shown["labels"] == IGNORE_LABEL_ID, PAD, shown["labels"])
    return _rows(shown | {name: shown[name].astype(np.uint8) for name in ("inputs", "labels")})
