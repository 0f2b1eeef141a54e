"""What the builders of Sudoku and mazes share.

These are the options, the ancestors' csv files, generation in parallel, and splits without a common puzzle.
"""

import argparse
import csv
import http.client
import shutil
import tempfile
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from itertools import count as count_from
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dataset import puzzle_writer
from utils.errors import UserError

SPLITS = ("test", "train")  # a split's place here is part of its seed
HEADER = ["source", "q", "a", "rating"]
HEADERS = (HEADER, ["source", "question", "answer", "rating"])
NO_CELL = 255  # what a character becomes that stands for no cell
BATCH = 512  # puzzles checked together, such that they fit the processor's cache
DOWNLOAD_TIMEOUT = 30  # seconds without a byte
MAX_BARREN_BLOCKS = 100  # generation gives up when this many blocks in a row yield nothing


Alphabet = Callable[[int, str], Mapping[str, int]]


@dataclass(frozen=True)
class Puzzles:
    """n puzzles.

    inputs, answers: (n, side, side) uint8. rating: (n,) the difficulty, for mazes the length of the path in
    moves.
    """

    inputs: np.ndarray
    answers: np.ndarray
    rating: np.ndarray

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, chosen: np.ndarray | slice) -> "Puzzles":
        return Puzzles(*(getattr(self, field.name)[chosen] for field in fields(self)))


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
        "--input-dir", type=Path, help=f"folder with train.csv and test.csv, columns {','.join(HEADER)}"
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

    `generated` are the defaults of the game's own options. `options.source` becomes generated, hub or csv.
    """
    if options.input_dir is not None:
        options.source = "csv"
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


def read_csv(
    options: argparse.Namespace, alphabet: Alphabet, keep: Callable[[int], bool] = lambda rating: True
) -> dict[str, tuple[Puzzles, "Lines"]]:
    """Both splits of --input-dir or of the hub: puzzles whose rating passes `keep`, and their lines.

    `alphabet` gives for a side and the characters of a file the value of each of them. Raises `UserError`.
    """
    if options.input_dir is not None:
        return {split: _parse(options.input_dir / f"{split}.csv", alphabet, keep) for split in SPLITS}
    result = {}
    for split in SPLITS:
        url = f"https://huggingface.co/datasets/{options.source_repo}/resolve/{options.revision}/{split}.csv"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{split}.csv"
            _download(url, file)
            result[split] = _parse(file, alphabet, keep, url)
    return result


def origin(options: argparse.Namespace) -> str:
    """Where csv files come from, for the description of the dataset."""
    if options.source == "hub":
        return f"{options.source_repo}@{options.revision}"
    return options.input_dir.resolve().name


def _download(url: str, file: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response, file.open("wb") as target:
            shutil.copyfileobj(response, target)
            expected = response.headers.get("Content-Length")
        # A connection that ends early raises no error by itself.
        if expected is not None and int(expected) != file.stat().st_size:
            raise ConnectionError(f"the connection ended after {file.stat().st_size} of {expected} bytes")
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot download {url}: {getattr(error, 'reason', None) or error}; "
            "fetch train.csv and test.csv in another way and pass their folder with --input-dir, "
            "or generate puzzles with --source generated"
        ) from None


@dataclass(frozen=True)
class Lines:
    """Where puzzles stand in a csv file: its name, and the line number (n,) of each."""

    name: str
    numbers: np.ndarray

    def require(self, fine: np.ndarray, problem: str) -> None:
        """Raise `UserError` for the first puzzle (n,) that is not fine."""
        if not fine.all():
            raise UserError(f"{self.name}, line {self.numbers[fine.argmin()]}: {problem}")


def _parse(
    file: Path, alphabet: Alphabet, keep: Callable[[int], bool], name: str | None = None
) -> tuple[Puzzles, Lines]:
    """The puzzles of a csv file and their lines. `name` is what errors call the file."""
    name = name or str(file)
    numbers, ratings, cells = [], [], 0
    # All puzzles of a column in one array of bytes, which numpy reads without a copy.
    text = {"q": bytearray(), "a": bytearray()}
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            records = csv.reader(lines)
            if (header := next(records, None)) not in HEADERS:
                found = ",".join(header or []) or "nothing"
                raise UserError(f"{name}, line 1: expected the columns {','.join(HEADER)}, found {found}")
            for record in records:
                where = f"{name}, line {records.line_num}"
                if len(record) != len(HEADER):
                    raise UserError(f"{where}: expected {len(HEADER)} columns, found {len(record)}")
                _, q, a, rating = record
                try:
                    kept = keep(int(rating))
                except ValueError:
                    raise UserError(f"{where}: rating '{rating}' is not a whole number") from None
                cells = cells or len(q)  # the first puzzle decides the size of all
                _require_grids(q, a, cells, where)
                if kept:
                    text["q"] += q.encode()
                    text["a"] += a.encode()
                    numbers.append(records.line_num)
                    ratings.append(int(rating))
    except FileNotFoundError:
        raise UserError(f"no such file: {name}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{name}: not a csv file ({error})") from None
    if not numbers:
        raise UserError(f"{name}: no puzzle in it passes the filters")
    side, of_puzzles = int(cells**0.5), Lines(name, np.array(numbers, np.int64))
    known = alphabet(side, "".join(map(chr, np.unique(np.frombuffer(text["q"] + text["a"], np.uint8)))))
    inputs, answers = (
        _grids(column, bytes(value), side, known, of_puzzles) for column, value in text.items()
    )
    return Puzzles(inputs, answers, np.array(ratings, np.int64)), of_puzzles


def _grids(column: str, text: bytes, side: int, alphabet: Mapping[str, int], lines: Lines) -> np.ndarray:
    """The grids (n, side, side) of a column. Raises `UserError` for the first character that is no cell."""
    table = np.full(256, NO_CELL, np.uint8)
    table[[ord(character) for character in alphabet]] = list(alphabet.values())
    values = table[np.frombuffer(text, np.uint8)]
    if (strange := values == NO_CELL).any():
        row, place = divmod(int(strange.argmax()), side * side)
        character = chr(text[row * side * side + place])
        raise UserError(
            f"{lines.name}, line {lines.numbers[row]}: {column} has '{character}' at position {place + 1}"
        )
    return values.reshape(-1, side, side)


def _require_grids(q: str, a: str, cells: int, where: str) -> None:
    """Raise `UserError` unless question and answer are square grids of so many cells."""
    if int(cells**0.5) ** 2 != cells or not cells:
        raise UserError(f"{where}: q has {cells} characters, which is no square grid")
    for column, value in (("q", q), ("a", a)):
        if len(value) != cells:
            raise UserError(f"{where}: {column} has {len(value)} characters, expected {cells}")
        if not value.isascii():
            strange = next(i for i, character in enumerate(value) if not character.isascii())
            raise UserError(f"{where}: {column} has '{value[strange]}' at position {strange + 1}")


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
    puzzle_writer.write_pairs(
        options.output_dir,
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
        raise UserError("train.csv and test.csv hold grids of different sizes")
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
