"""Build a Sudoku dataset: python -m dataset.build_sudoku_dataset --output-dir data/sudoku

Puzzles of size 4, 6, 9 or 16 come from one of three sources:

  (default)      generated, with one solution each
  --source hub   the ancestors' Sudoku-Extreme
  --input-dir    its csv files in a folder, or the .npy files that the ancestors train on

The solutions in files are checked, but not whether each is the only one. No test puzzle is in training,
not even relabelled, reordered or transposed.
"""

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataset import writer
from dataset.games.sudoku import alphabet as of_game
from dataset.generate import game_builder, puzzle_files, sudoku
from dataset.generate.puzzle_files import Lines, Puzzles
from utils.arguments import parser_of
from utils.errors import UserError, reports_user_errors

BLOCK = 256  # puzzles generated together
SOURCE_REPO = "sapientinc/sudoku-extreme"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Options that the ancestors had have the ancestors' names."""
    parser = parser_of("dataset.build_sudoku_dataset", __doc__)
    game_builder.add_arguments(parser, SOURCE_REPO)
    parser.add_argument(
        "--size", type=int, choices=list(sudoku.BOXES), help="generated: side of the grid (default 9)"
    )
    parser.add_argument(
        "--clues", type=int, help="generated: exactly this many clues (default: as few as uniqueness allows)"
    )
    parser.add_argument(
        "--min-difficulty",
        type=int,
        default=0,
        help="generated: guesses needed, 0 = solvable by singles; csv: its rating",
    )
    parser.add_argument("--max-difficulty", type=int)
    parser.add_argument(
        "--num-aug",
        type=int,
        default=0,
        help="symmetric copies of each training puzzle for data.augmentation=table",
    )
    return parser.parse_args(arguments)


def alphabet(side: int, text: str) -> Mapping[str, int]:
    """The cell value of every character of a csv file that uses those of `text`."""
    # Digits beyond the side are read, so that they can be named as such.
    return {**{str(digit): digit for digit in range(10)}, **of_game(side, text)}


def make(rng: np.random.Generator, size: int, clues: int | None, least: int, most: int | None) -> Puzzles:
    """A block of generated puzzles, without those that have other clues or difficulties than wanted."""
    puzzles, answers, difficulty = sudoku.generate(size, BLOCK, rng, clues=clues, max_difficulty=most)
    wanted = difficulty >= least
    # Where no clue can go any more, a puzzle stays above the wanted number.
    if clues is not None:
        wanted &= (puzzles > 0).sum(axis=(1, 2)) == clues
    return Puzzles(puzzles, answers, difficulty)[wanted]


def check(puzzles: Puzzles, lines: Lines) -> Puzzles:
    """The puzzles of a file. Raises `UserError` for the first wrong one."""
    side = puzzles.inputs.shape[-1]
    if len(puzzles) and side not in sudoku.BOXES:
        sizes = ", ".join(map(str, sudoku.BOXES))
        raise UserError(f"{lines.name}: grids of {side}x{side} cells; Sudoku here is of size {sizes}")
    lines.require((puzzles.inputs <= side).all(axis=(1, 2)), f"q has a digit beyond {side}")
    (solved,) = game_builder.batched(lambda grids: (sudoku.is_solved(grids),), puzzles.answers)
    lines.require(solved, "a is not a solved Sudoku")
    kept = (puzzles.inputs == 0) | (puzzles.inputs == puzzles.answers)
    lines.require(kept.all(axis=(1, 2)), "a changes a clue of q")
    return puzzles


def build(options: argparse.Namespace) -> dict[str, Puzzles]:
    """Read or generate, keep the splits apart and write. Returns the splits. Raises `UserError`."""
    writer.check_output(options.output_dir)
    game_builder.resolve(options, SOURCE_REPO, size=9, clues=None)
    least, most = options.min_difficulty, options.max_difficulty
    if least < 0 or (most is not None and most < least) or options.num_aug < 0:
        raise UserError("need 0 <= --min-difficulty <= --max-difficulty and --num-aug >= 0")
    record = {"min_difficulty": least, "max_difficulty": most, "subsample_size": options.subsample_size}
    if options.source == "generated":
        if options.clues is not None and not 0 < options.clues < options.size**2:
            raise UserError(
                f"--clues must be 1..{options.size**2 - 1} for --size {options.size}, found {options.clues}"
            )
        block = partial(make, size=options.size, clues=options.clues, least=least, most=most)
        splits = game_builder.generate_splits(block, options)
        source = f"generated: sudoku {options.size}x{options.size}"
        record |= {
            "clues": "minimal" if options.clues is None else options.clues,
            "difficulty": "guesses beyond singles",
        }
    else:
        filters = least > 0 or most is not None
        files = puzzle_files.read(
            options,
            alphabet,
            (lambda rating: least <= rating <= (rating if most is None else most)) if filters else None,
        )
        splits = {split: check(*file) for split, file in files.items()}
        source = puzzle_files.origin(options)
        record |= {"difficulty": "rating of the csv files; 0 in .npy files"} | puzzle_files.copies(files)
    return game_builder.write(
        "sudoku",
        splits,
        sudoku.fingerprints,
        options,
        source=source,
        num_aug=options.num_aug,
        rating="difficulty",
        record=record,
    )


@reports_user_errors
def main() -> None:
    build(parse_arguments())


if __name__ == "__main__":
    main()
