"""What the builders of Sudoku and mazes share.

These are the options, generation in parallel, and splits without a common puzzle.
"""

import argparse
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from itertools import count as count_from
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dataset import puzzle_writer
from dataset.generate.puzzle_files import HEADER, SPLITS, Puzzles
from utils.errors import UserError

BATCH = 512  # puzzles checked together, such that they fit the processor's cache
MAX_BARREN_BLOCKS = 100  # generation gives up when this many blocks in a row yield nothing


def add_arguments(parser: argparse.ArgumentParser, source_repo: str) -> None:
    """The options of both builders. Options that the ancestors had have the ancestors' names."""
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument(
        "--source",
        choices=["generated", "hub"],
        default="generated",
        help="generated (default), or downloaded",
    )
    origin.add_argument(
        "--input-dir",
        type=Path,
        help=f"folder with train.csv and test.csv, columns {','.join(HEADER)}, or "
        "with the ancestors' train/ and test/all__inputs.npy",
    )
    parser.add_argument("--source-repo", help=f"hub: dataset on huggingface.co (default {source_repo})")
    parser.add_argument("--revision", help="hub: branch, tag or commit (default main)")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--train-puzzles", type=int, help="generated (default 1000)")
    parser.add_argument("--test-puzzles", type=int, help="generated (default 1000)")
    parser.add_argument(
        "--workers", type=int, help="generated: processes (default 1); the result does not depend on it"
    )
    parser.add_argument("--subsample-size", type=int, help="keep this many training puzzles, drawn at random")
    parser.add_argument("--seed", type=int, default=42)


def resolve(options: argparse.Namespace, source_repo: str, **generated: Any) -> None:
    """Fill in the defaults of options that belong to one source, and refuse them with another.

    `generated` are the defaults of the game's own options. `options.source` becomes generated, hub or files.
    """
    if options.input_dir is not None:
        options.source = "files"
    defaults = {
        "generated": {**generated, "train_puzzles": 1000, "test_puzzles": 1000, "workers": 1},
        "hub": {"source_repo": source_repo, "revision": "main"},
    }
    for source, names in defaults.items():
        for name, default in names.items():
            if getattr(options, name) is None:
                setattr(options, name, default)
            elif options.source != source:
                raise UserError(f"--{name.replace('_', '-')} goes with --source {source}")
    if options.seed < 0:
        raise UserError(f"--seed must be >= 0, found {options.seed}")
    for name in ("train_puzzles", "test_puzzles", "workers", "subsample_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be >= 1, found {value}")


def generate_splits(
    make: Callable[[np.random.Generator], Puzzles], options: argparse.Namespace
) -> dict[str, Puzzles]:
    """Both splits, each from random numbers of its own, so that neither size changes the other split."""
    counts = {"test": options.test_puzzles, "train": options.train_puzzles}
    return {
        split: generate(make, count, (options.seed, SPLITS.index(split)), options.workers, f"{split} puzzles")
        for split, count in counts.items()
    }


def generate(
    make: Callable[[np.random.Generator], Puzzles],
    count: int,
    seed: tuple[int, ...],
    workers: int,
    label: str,
) -> Puzzles:
    """The first `count` puzzles of the blocks that `make` gives for the seeds (*seed, 0), (*seed, 1), ...

    They are the same for any number of workers. Raises `UserError` when the wanted puzzles are too rare.
    """
    blocks, found, barren = [], 0, 0
    with tqdm(total=count, desc=label, unit="puzzle", disable=None) as progress:
        for block in _in_order(make, seed, workers):
            blocks.append(block)
            found, barren = found + len(block), 0 if len(block) else barren + 1
            progress.update(min(len(block), count - progress.n))
            if found >= count:
                break
            if barren == MAX_BARREN_BLOCKS:
                raise UserError(
                    f"only {found} of {count} {label} found, and none in the last {barren} blocks; "
                    "ask for less rare ones"
                )
    columns = ([getattr(block, field.name) for block in blocks] for field in fields(Puzzles))
    return Puzzles(*(np.concatenate(column)[:count] for column in columns))


def _in_order(
    make: Callable[[np.random.Generator], Puzzles], seed: tuple[int, ...], workers: int
) -> Iterator[Puzzles]:
    """Blocks without end, in the order of their seeds, `workers` of them in the making."""
    seeds = ((*seed, block) for block in count_from(0))
    if workers == 1:
        yield from (_block(make, each) for each in seeds)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        waiting = deque(pool.submit(_block, make, each) for each in islice(seeds, workers))
        try:
            for each in seeds:
                yield waiting.popleft().result()
                waiting.append(pool.submit(_block, make, each))
        finally:
            pool.shutdown(cancel_futures=True)


def _block(make: Callable[[np.random.Generator], Puzzles], seed: tuple[int, ...]) -> Puzzles:
    return make(np.random.default_rng(seed))


def batched(function: Callable[..., tuple[np.ndarray, ...]], *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """The arrays that `function` returns, computed for some puzzles at a time to bound the memory."""
    starts = range(0, max(len(arrays[0]), 1), BATCH)
    parts = [function(*(array[start : start + BATCH] for array in arrays)) for start in starts]
    return tuple(np.concatenate(results) for results in zip(*parts, strict=True))


def histogram(values: np.ndarray) -> str:
    """Counts of whole numbers >= 0 in the ranges 0, 1, 2-3, 4-7, 8-15 and so on, as one line."""
    ranges, counts = np.unique(np.ceil(np.log2(values + 1)).astype(int), return_counts=True)
    ends = [(2**r // 2, 2**r - 1) for r in ranges.tolist()]
    return ", ".join(
        f"{low if low == high else f'{low}-{high}'}: {n}" for (low, high), n in zip(ends, counts, strict=True)
    )


def write(
    game: str,
    splits: dict[str, Puzzles],
    fingerprints: Callable[..., np.ndarray],
    options: argparse.Namespace,
    *,
    source: str,
    num_aug: int,
    rating: str,
    record: dict[str, Any],
) -> dict[str, Puzzles]:
    """Keep the splits apart, write the dataset, and print what was written. Returns the splits as written.

    fingerprints: gives equal numbers to puzzles (inputs, answers) that a symmetry maps to each other.
    rating: the name of the puzzles' ratings. record: what to say of the dataset in its details.
    """
    splits, keys, counts = disjoint(splits, fingerprints, options.subsample_size, options.seed)
    histograms = {f"{rating}_{split}": histogram(splits[split].rating) for split in SPLITS}
    packed = puzzle_writer.pack(
        {split: (splits[split].inputs, splits[split].answers) for split in ("train", "test")},
        game=game,
        source=source,
        seed=options.seed,
        num_aug=num_aug,
        fingerprints={split: keys[split] for split in ("train", "test")},
        details={
            name: value for name, value in {**record, **counts, **histograms}.items() if value is not None
        },
    )
    packed.save(options.output_dir)
    train, test = len(splits["train"]), len(splits["test"])
    print(f"{options.output_dir}: {train} training and {test} test puzzles, {source}")
    dropped = counts["dropped_train_puzzles"]
    print(f"{dropped} training puzzles left out because they equal a test puzzle up to symmetry")
    print(*(f"{name}: {value}" for name, value in histograms.items()), sep="\n")
    return splits


def disjoint(
    splits: dict[str, Puzzles], fingerprints: Callable[..., np.ndarray], subsample_size: int | None, seed: int
) -> tuple[dict[str, Puzzles], dict[str, np.ndarray], dict[str, int]]:
    """Drop training puzzles that a symmetry maps to a test puzzle, then subsample.

    Returns the splits, their puzzles' fingerprints, and counts to record. `fingerprints(inputs, answers)`
    gives equal numbers to puzzles that a symmetry maps to each other. Raises `UserError` if too few puzzles
    are left.
    """
    for split in SPLITS:
        if not len(splits[split]):
            raise UserError(f"no puzzle is left in the {split} split; loosen the filters")
    if splits["train"].inputs.shape[1:] != splits["test"].inputs.shape[1:]:
        raise UserError("the training and the test file hold grids of different sizes")
    keys = {}
    for split, puzzles in splits.items():
        (keys[split],) = batched(lambda *pair: (fingerprints(*pair),), puzzles.inputs, puzzles.answers)
    fresh = np.flatnonzero(~np.isin(keys["train"], keys["test"]))
    dropped, offered = len(splits["train"]) - len(fresh), len(fresh)
    if not len(fresh):
        raise UserError(
            f"all {dropped} training puzzles equal a test puzzle up to symmetry; "
            "use fewer test puzzles or larger grids"
        )
    if subsample_size is not None:
        if subsample_size > len(fresh):
            raise UserError(
                f"--subsample-size {subsample_size} asks for more than the {len(fresh)} training puzzles"
            )
        # Sorted, so that a subsample keeps the order of the whole.
        fresh = np.sort(np.random.default_rng(seed).choice(fresh, subsample_size, replace=False))
    record = {
        "dropped_train_puzzles": dropped,
        "offered_train_puzzles": offered,
        "distinct_test_puzzles": len(np.unique(keys["test"])),
    }
    keys["train"] = keys["train"][fresh]
    return {"train": splits["train"][fresh], "test": splits["test"]}, keys, record
