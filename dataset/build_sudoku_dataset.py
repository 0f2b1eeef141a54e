"""Build a Sudoku dataset: python -m dataset.build_sudoku_dataset --output-dir data/sudoku

Puzzles of size 4, 6 or 9: generated (default) with one solution each, the ancestors' Sudoku-Extreme from the hub (--source hub),
or its csv files in a folder (--input-dir), whose solutions are checked, but not that each is the only one. No test puzzle,
relabelled, reordered or transposed, is in training.
"""

import argparse
from functools import partial

import numpy as np

from dataset import writer
from dataset.generate import game_builder, sudoku
from dataset.generate.game_builder import Lines, Puzzles
from utils.arguments import parser_of
from utils.errors import UserError, reports_user_errors

BLOCK = 256  # puzzles generated together
ALPHABET = {".": 0, **{str(digit): digit for digit in range(10)}}
SOURCE_REPO = "sapientinc/sudoku-extreme"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; the ancestors' option names where they had one."""
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


def make(rng: np.random.Generator, size: int, clues: int | None, least: int, most: int | None) -> Puzzles:
    """A block of generated puzzles, without those outside the wanted clues and difficulties."""
    puzzles, answers, difficulty = sudoku.generate(size, BLOCK, rng, clues=clues, max_difficulty=most)
    wanted = difficulty >= least
    if clues is not None:
        wanted &= (puzzles > 0).sum(axis=(1, 2)) == clues
    return Puzzles(puzzles, answers, difficulty)[wanted]


def check(puzzles: Puzzles, lines: Lines) -> Puzzles:
    """The puzzles of a csv file, or `UserError` for the first wrong one."""
    side = puzzles.inputs.shape[-1]
    if len(puzzles) and side not in sudoku.BOXES:
        raise UserError(
            f"{lines.name}: grids of {side}x{side} cells; Sudoku here is of size {', '.join(map(str, sudoku.BOXES))}"
        )
    lines.require((puzzles.inputs <= side).all(axis=(1, 2)), f"q has a digit beyond {side}")
    lines.require(
        game_builder.batched(lambda grids: (sudoku.is_solved(grids),), puzzles.answers)[0],
        "a is not a solved Sudoku",
    )
    lines.require(
        ((puzzles.inputs == 0) | (puzzles.inputs == puzzles.answers)).all(axis=(1, 2)),
        "a changes a clue of q",
    )
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
        splits, source = (
            game_builder.generate_splits(block, options),
            f"generated: sudoku {options.size}x{options.size}",
        )
        record |= {
            "clues": "minimal" if options.clues is None else options.clues,
            "difficulty": "guesses beyond singles",
        }
    else:
        files = game_builder.read_csv(
            options, ALPHABET, lambda rating: least <= rating <= (rating if most is None else most)
        )
        splits, source = {split: check(*file) for split, file in files.items()}, game_builder.origin(options)
        record |= {"difficulty": "rating of the csv files"}
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
