"""Puzzles in the ancestors' files: csv files, and the .npy arrays that the ancestors train on."""

import argparse
import csv
import http.client
import shutil
import tempfile
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from utils.errors import UserError

SPLITS = ("test", "train")  # a split's place here is part of its seed
HEADER = ["source", "q", "a", "rating"]
HEADERS = (HEADER, ["source", "question", "answer", "rating"])
NO_CELL = 255  # what a character becomes that stands for no cell
FIRST = 1  # the token of cell value 0 in .npy files
DOWNLOAD_TIMEOUT = 30  # seconds without a byte

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


def read(
    options: argparse.Namespace, alphabet: Alphabet, keep: Callable[[int], bool] | None = None
) -> dict[str, tuple[Puzzles, "Lines"]]:
    """Both splits of --input-dir or of the hub: puzzles whose rating passes `keep`, and their lines.

    `alphabet` gives for a side and the characters of a file the value of each of them. Raises `UserError`.
    """
    folder = options.input_dir
    if folder is not None:
        if not _array(folder / "train", "inputs").is_file():
            return {split: _parse(folder / f"{split}.csv", alphabet, keep) for split in SPLITS}
        if keep is not None:
            raise UserError(f"{folder}: .npy files hold no rating, by which puzzles could be chosen")
        return {split: _of_arrays(folder / split, alphabet) for split in SPLITS}
    result = {}
    for split in SPLITS:
        url = f"https://huggingface.co/datasets/{options.source_repo}/resolve/{options.revision}/{split}.csv"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{split}.csv"
            _download(url, file)
            result[split] = _parse(file, alphabet, keep, url)
    return result


def origin(options: argparse.Namespace) -> str:
    """Where the files come from, for the description of the dataset."""
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
    """Where puzzles stand in a file: its name, and the number (n,) of each one's line, or of its example.

    copies: augmented copies that the file holds beside the puzzles.
    """

    name: str
    numbers: np.ndarray
    word: str = "line"
    copies: int = 0

    def require(self, fine: np.ndarray, problem: str) -> None:
        """Raise `UserError` for the first puzzle (n,) that is not fine."""
        if not fine.all():
            raise UserError(f"{self.name}, {self.word} {self.numbers[fine.argmin()]}: {problem}")


def _parse(
    file: Path, alphabet: Alphabet, keep: Callable[[int], bool] | None, name: str | None = None
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
                    score = int(rating)
                except ValueError:
                    raise UserError(f"{where}: rating '{rating}' is not a whole number") from None
                cells = cells or len(q)  # the first puzzle decides the size of all
                _require_grids(q, a, cells, where)
                if keep is None or keep(score):
                    text["q"] += q.encode()
                    text["a"] += a.encode()
                    numbers.append(records.line_num)
                    ratings.append(score)
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


def _of_arrays(folder: Path, alphabet: Alphabet) -> tuple[Puzzles, Lines]:
    """The puzzles of one split in the ancestors' .npy layout, with rating 0, and their examples.

    A group of examples is a puzzle and its augmented copies. The first one is the puzzle itself.
    """
    names = ("inputs", "labels", "puzzle_indices", "group_indices")
    try:
        inputs, labels, first, groups = (np.load(_array(folder, name)) for name in names)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot read the puzzles' arrays: {error}") from None
    grids_fit = inputs.ndim == 2 and inputs.shape == labels.shape and first.ndim == groups.ndim == 1
    cells = inputs.shape[1] if grids_fit else 0
    side = int(cells**0.5)
    fits = grids_fit and 0 < side * side == cells and len(first) > 1 and len(groups) > 1
    if not fits or first[-1] != len(inputs) or groups[-1] != len(first) - 1:
        raise UserError(f"{folder}: the arrays do not belong together, or hold no square grids")
    examples = first[groups[:-1]]
    values = sorted(set(alphabet(side, "").values()))
    lines = Lines(str(_array(folder, "inputs")), examples, "example", len(inputs) - len(examples))
    grids: list[np.ndarray] = []
    for name, tokens in (("inputs", inputs), ("labels", labels)):
        chosen = tokens[examples]
        known = np.isin(chosen, np.add(values, FIRST))
        lines.require(
            np.all(known, axis=1), f"{name} has a token that is no cell ({FIRST} to {values[-1] + FIRST})"
        )
        grids.append((chosen - FIRST).astype(np.uint8).reshape(-1, side, side))
    questions, answers = grids
    return Puzzles(questions, answers, np.zeros(len(examples), np.int64)), lines


def _array(folder: Path, name: str) -> Path:
    return folder / f"all__{name}.npy"


def copies(files: Mapping[str, tuple[Puzzles, Lines]]) -> dict[str, int]:
    """What to record of the copies that files hold and a dataset leaves out."""
    return {f"copies_{split}_files": lines.copies for split, (_, lines) in files.items() if lines.copies}
