"""Mazes: a shortest path from start to goal."""

import numpy as np

from dataset import augment
from dataset.canvas import Vocabulary
from dataset.games.drawing import Drawing
from dataset.games.game import Check, Facts, Game, Symmetries, TieBreak
from dataset.games.notation import Notation
from dataset.generate import maze

BREADTH_FIRST = "breadth_first"  # the rule of the labels, as datasets name it
DRAWING = Drawing(
    colours=["#2b2b29", "#ffffff", "#2ecc40", "#ff4136", "#5aa9f5"],
    names=["wall", "open", "start", "goal", "path"],
    characters=maze.CHARACTERS,
    gap="",
    written="  SG ",
)
NOTATION = Notation(
    characters=maze.CHARACTERS,
    alphabet=lambda text: {character: value for value, character in enumerate(maze.CHARACTERS)},
    described="# wall, space open, S start, G goal, o path",
    question=lambda grid: np.where(grid == maze.PATH, np.uint8(maze.OPEN), grid),
)


def _symmetry(uniform: np.ndarray, side: int) -> Symmetries:
    identity = augment.identity_colours(len(uniform))
    return Symmetries((uniform[:, 0] * 8).astype(np.int64), identity)


def _flaw(grid: np.ndarray) -> str | None:
    for name, cell in (("S", maze.START), ("G", maze.GOAL)):
        if (count := int((grid == cell).sum())) != 1:
            return f"a maze needs exactly one {name}, found {count}"
    return None


def _facts(mazes: np.ndarray) -> list[Facts]:
    _, lengths, unique = maze.shortest_paths(mazes)
    return [_said(*fact) for fact in zip(lengths.tolist(), unique.tolist(), strict=True)]


def _said(length: int, unique: bool) -> Facts:
    if length < 0:
        return Facts("no path from S to G", {"shortest_path": None, "unique": None})
    how_many = "one shortest path" if unique else "several shortest paths"
    return Facts(f"{how_many}, {length} moves", {"shortest_path": length, "unique": unique})


GAME = Game(
    name="maze",
    title="Maze",
    meaning="one rule for all puzzles; walls, free cells, start, goal and path",
    vocabulary=Vocabulary(len(maze.CHARACTERS), eos=False),
    numbers=lambda side: 1,
    symmetry=_symmetry,
    drawing=lambda side: DRAWING,
    notation=lambda side: NOTATION,
    checks={
        "shortest": Check("a shortest path", "marks a shortest path", maze.marks_shortest_path),
        "path": Check("a path, but not a shortest one", "marks a path", maze.marks_path),
    },
    # Where every shortest path is marked at once, the marks are no path.
    checkable=lambda details: details.get("paths") != "all",
    tie_break=TieBreak(
        BREADTH_FIRST,
        "the path that a breadth-first search from the start finds first; it looks down, left, right, up",
        maze.first_paths,
    ),
    recognise=maze.fingerprints,
    flaw=_flaw,
    facts=_facts,
)
