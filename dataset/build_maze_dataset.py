"""Build a maze dataset: python -m dataset.build_maze_dataset --output-dir data/maze

Generated (default), the ancestors' Maze-Hard from the hub (--source hub), or its csv files in a folder (--input-dir).
Where several shortest paths exist, one drawn path is no determined answer: generated mazes have a unique shortest path
(--paths unique), or every cell on any shortest path is marked (--paths all). No test maze, rotated or reflected, is in training.
"""

import argparse
from functools import partial

import numpy as np

from dataset import writer
from dataset.generate import game_builder, maze
from dataset.generate.game_builder import Lines, Puzzles
from utils.arguments import parser_of
from utils.errors import UserError, reports_user_errors

BLOCK = 64  # mazes generated together
SOURCE_REPO = "sapientinc/maze-30x30-hard-1k"
ALPHABET = {character: index for index, character in enumerate(maze.CHARACTERS)}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; the ancestors' option names where they had one."""
    parser = parser_of("dataset.build_maze_dataset", __doc__)
    game_builder.add_arguments(parser, SOURCE_REPO)
    parser.add_argument("--side", type=int, help="generated: cells a side, odd or even (default 30)")
    parser.add_argument(
        "--loops", type=float, help="generated: share of the spanning tree's walls to remove (default 0.05)"
    )
    parser.add_argument(
        "--min-path-length",
        type=int,
        default=1,
        help="keep mazes whose shortest path has at least this many moves",
    )
    parser.add_argument(
        "--paths",
        choices=["unique", "all", "given"],
        help="unique: only mazes with one shortest path (generated: default); all: mark every one; given: as in the csv (its default)",
    )
    parser.add_argument(
        "--aug",
        action="store_true",
        help="the other seven rotations and reflections for data.augmentation=table",
    )
    return parser.parse_args(arguments)


def make(rng: np.random.Generator, side: int, loops: float, least: int, paths: str) -> Puzzles:
    """A block of generated mazes, without those that `paths` and the minimum path length rule out."""
    mazes = maze.generate(side, BLOCK, loops, least, rng)
    answers, length, unique = maze.shortest_paths(mazes)
    return Puzzles(mazes, answers, length)[unique | (paths == "all")]


def check(puzzles: Puzzles, lines: Lines, least: int, paths: str) -> tuple[Puzzles, int]:
    """The mazes of a csv file with their path lengths, and how many of all have one shortest path; `UserError` for a wrong one."""
    for name, cell in (("S", maze.START), ("G", maze.GOAL)):
        lines.require((puzzles.inputs == cell).sum(axis=(1, 2)) == 1, f"q needs exactly one {name}")
    lines.require((puzzles.inputs != maze.PATH).all(axis=(1, 2)), "q already shows a path")
    unmarked = np.where(puzzles.answers == maze.PATH, np.uint8(maze.OPEN), puzzles.answers)
    lines.require((unmarked == puzzles.inputs).all(axis=(1, 2)), "a differs from q in more than the path")
    marked, length, unique = game_builder.batched(maze.shortest_paths, puzzles.inputs)
    lines.require(length > 0, "no path from S to G")
    answers = puzzles.answers if paths == "given" else marked
    return Puzzles(puzzles.inputs, answers, length)[(length >= least) & (unique | (paths != "unique"))], int(
        unique.sum()
    )


def build(options: argparse.Namespace) -> dict[str, Puzzles]:
    """Read or generate, keep the splits apart and write. Returns the splits. Raises `UserError`."""
    writer.check_output(options.output_dir)
    game_builder.resolve(options, SOURCE_REPO, side=30, loops=0.05)
    generated, least = options.source == "generated", options.min_path_length
    paths = options.paths or ("unique" if generated else "given")
    if least < 1 or options.side < maze.MIN_SIDE or not 0 <= options.loops <= 1:
        raise UserError(f"need --min-path-length >= 1, --side >= {maze.MIN_SIDE} and --loops in 0..1")
    record = {"min_path_length": least, "paths": paths, "subsample_size": options.subsample_size}
    if generated:
        if paths == "given":
            raise UserError("--paths given goes with csv files")
        block = partial(make, side=options.side, loops=options.loops, least=least, paths=paths)
        splits, source = (
            game_builder.generate_splits(block, options),
            f"generated: maze {options.side}x{options.side}, {paths} shortest paths",
        )
        record |= {"loops": options.loops}
    else:
        splits, source = {}, f"{game_builder.origin(options)}, {paths} paths"
        for split, file in game_builder.read_csv(options, ALPHABET).items():
            splits[split], record[f"unique_shortest_paths_{split}_csv"] = check(*file, least, paths)
    return game_builder.write(
        "maze",
        splits,
        lambda mazes, _: maze.fingerprints(mazes),
        options,
        source=source,
        num_aug=7 if options.aug else 0,
        rating="path_length",
        record=record,
    )


@reports_user_errors
def main() -> None:
    build(parse_arguments())


if __name__ == "__main__":
    main()
