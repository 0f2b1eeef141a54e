"""Build a maze dataset: python -m dataset.build_maze_dataset --output-dir data/maze

Mazes come from one of three sources:

  (default)      generated
  --source hub   the ancestors' Maze-Hard
  --input-dir    its csv files in a folder, or the .npy files that the ancestors train on

If a maze has several shortest paths, a rule says which one is the answer: the one that a breadth-first search
finds first (--paths first). All labels of Maze-Hard follow it. The rule does not turn with the maze, so that
the answers to turned mazes are stored, too. No test maze is in training, not even rotated or reflected.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataset import writer
from dataset.games.maze import BREADTH_FIRST, NOTATION
from dataset.generate import game_builder, maze, puzzle_files, scattered_maze
from dataset.generate.puzzle_files import Lines, Puzzles
from utils.arguments import parser_of
from utils.errors import UserError, reports_user_errors

BLOCK = 64  # mazes generated together
LOOPS = 0.05
TRIES = 1 << 14  # random mazes of scattered walls that are tried together
SOURCE_REPO = "sapientinc/maze-30x30-hard-1k"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Options that the ancestors had have the ancestors' names."""
    parser = parser_of("dataset.build_maze_dataset", __doc__)
    game_builder.add_arguments(parser, SOURCE_REPO)
    parser.add_argument("--side", type=int, help="generated: cells a side, odd or even (default 30)")
    parser.add_argument(
        "--walls",
        choices=["rooms", "scattered"],
        help="generated: corridors between rooms (default), or every cell a wall by chance, as in Maze-Hard",
    )
    parser.add_argument(
        "--loops", type=float, help=f"rooms: share of the spanning tree's walls to remove (default {LOOPS})"
    )
    parser.add_argument(
        "--min-path-length",
        type=int,
        default=1,
        help="keep mazes whose shortest path has at least this many moves",
    )
    parser.add_argument(
        "--paths",
        choices=["first", "unique", "all", "given"],
        help="first: the one that a breadth-first search finds first (generated: default); "
        "unique: only mazes with one shortest path; all: mark every one; given: as in files (default)",
    )
    parser.add_argument(
        "--aug",
        action="store_true",
        help="the other seven rotations and reflections for data.augmentation=table",
    )
    return parser.parse_args(arguments)


def make(rng: np.random.Generator, side: int, loops: float | None, least: int, paths: str) -> Puzzles:
    """A block of generated mazes, without those that `paths` and the minimum path length rule out.

    loops: of mazes with rooms. None: mazes of scattered walls.
    """
    if loops is None:
        mazes = scattered_maze.generate(side, TRIES, least, rng)
    else:
        mazes = maze.generate(side, BLOCK, loops, least, rng)
    answers, length, unique = maze.shortest_paths(mazes)
    if paths == "first":
        answers = maze.first_paths(mazes)
    return Puzzles(mazes, answers, length)[unique | (paths != "unique")]


def check(puzzles: Puzzles, lines: Lines) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All shortest paths of the mazes of a file, their lengths, and which are unique.

    Raises `UserError` for the first wrong maze.
    """
    for name, cell in (("S", maze.START), ("G", maze.GOAL)):
        lines.require((puzzles.inputs == cell).sum(axis=(1, 2)) == 1, f"q needs exactly one {name}")
    lines.require((puzzles.inputs != maze.PATH).all(axis=(1, 2)), "q already shows a path")
    unmarked = np.where(puzzles.answers == maze.PATH, np.uint8(maze.OPEN), puzzles.answers)
    lines.require((unmarked == puzzles.inputs).all(axis=(1, 2)), "a differs from q in more than the path")
    marked, length, unique = game_builder.batched(maze.shortest_paths, puzzles.inputs)
    lines.require(length > 0, "no path from S to G")
    return marked, length, unique


def read(options: argparse.Namespace, paths: str) -> tuple[dict[str, Puzzles], dict[str, Any]]:
    """The wanted mazes of files, and what to record of them."""
    splits: dict[str, Puzzles] = {}
    all_by_rule = True
    files = puzzle_files.read(options, lambda side, text: NOTATION.alphabet(text))
    record: dict[str, Any] = puzzle_files.copies(files)
    for split, (puzzles, lines) in files.items():
        marked, length, unique = check(puzzles, lines)
        (first,) = game_builder.batched(lambda mazes: (maze.first_paths(mazes),), puzzles.inputs)
        by_rule = (first == puzzles.answers).all(axis=(1, 2))
        all_by_rule &= bool(by_rule.all())
        record[f"unique_shortest_paths_{split}_files"] = int(unique.sum())
        record[f"labels_by_rule_{split}_files"] = f"{by_rule.sum()} of {len(by_rule)}"
        answers = {"given": puzzles.answers, "first": first}.get(paths, marked)
        wanted = (length >= options.min_path_length) & (unique | (paths != "unique"))
        splits[split] = Puzzles(puzzles.inputs, answers, length)[wanted]
    if paths == "given" and all_by_rule:
        record["labels"] = BREADTH_FIRST
    return splits, record


def build(options: argparse.Namespace) -> dict[str, Puzzles]:
    """Read or generate, keep the splits apart and write. Returns the splits. Raises `UserError`."""
    writer.check_output(options.output_dir)
    game_builder.resolve(options, SOURCE_REPO, side=30, walls="rooms", loops=None)
    generated, least = options.source == "generated", options.min_path_length
    paths = options.paths or ("first" if generated else "given")
    if options.loops is not None and options.walls == "scattered":
        raise UserError("--loops goes with --walls rooms")
    loops = LOOPS if options.loops is None and options.walls == "rooms" else options.loops
    if least < 1 or options.side < maze.MIN_SIDE or not 0 <= (loops or 0) <= 1:
        raise UserError(f"need --min-path-length >= 1, --side >= {maze.MIN_SIDE} and --loops in 0..1")
    if options.walls == "scattered" and options.side > scattered_maze.MOST_SIDE:
        raise UserError(f"--walls scattered: --side must be <= {scattered_maze.MOST_SIDE}")
    record: dict[str, Any] = {
        "min_path_length": least,
        "paths": paths,
        "labels": BREADTH_FIRST if paths == "first" else paths,
        "subsample_size": options.subsample_size,
    }
    if generated:
        if paths == "given":
            raise UserError("--paths given goes with the ancestors' files")
        block = partial(make, side=options.side, loops=loops, least=least, paths=paths)
        splits = game_builder.generate_splits(block, options)
        source = f"generated: maze {options.side}x{options.side}, {paths} shortest paths"
        record |= {"walls": options.walls, "loops": loops}
    else:
        splits, found = read(options, paths)
        source, record = f"{puzzle_files.origin(options)}, {paths} paths", record | found
        print(*(f"{name}: {value}" for name, value in found.items()), sep="\n")
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
