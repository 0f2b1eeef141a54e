"""Sudoku of size 4, 6 (boxes of 2 rows, 3 columns), 9 and 16: solver, difficulty, generator, symmetries.

Everything works on many puzzles at once. Grids are uint8, 0 for blank and 1..size. Inside the solver a
state is a mask of candidates per cell, uint16 (size, size, B). The batch stands last, so that every step is
a few bitwise operations on long rows.

The difficulty of a puzzle is the number of guesses in the search tree that proves its solution unique.
First all singles are filled in. A single is the only digit of a cell, or the only cell of a digit in a row,
column or box. When they end, the search branches on the cell with the fewest candidates. 0 means solvable by
singles.
"""

from collections.abc import Iterator

import numpy as np

from dataset.augment import mix

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3), 16: (4, 4)}  # size -> rows and columns of a box
SEARCH_WIDTH = 4096  # states propagated together, while more wait on the stack
WIDTH_PER_PUZZLE = 256  # at most: a wider search of one puzzle would find its second solution later
HASH_ROUNDS = 4
_UNIT_AXES = (1, 3)  # of the views that `_units` gives: the cells of one row, column or box
_MASKS = np.arange(1 << max(BOXES), dtype=">u2").view(np.uint8)
_BITS = np.unpackbits(_MASKS).reshape(-1, 16).sum(axis=1, dtype=np.uint8)  # set in each mask


def solve(puzzles: np.ndarray, max_guesses: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number of solutions (B,), guesses (B,) and answers (B, size, size) of puzzles (B, size, size).

    The number of solutions is 0, 1 or 2, where 2 stands for more, too. It is also 2 for a search that was
    given up because it needed more than `max_guesses`. Guesses (the difficulty) and the answer are
    determined only for a puzzle with one solution.
    """
    solutions, guesses = np.zeros(len(puzzles), np.int64), np.zeros(len(puzzles), np.int64)
    answers = np.zeros_like(puzzles)
    # The last pieces are taken first (depth first), which bounds the memory.
    width = min(SEARCH_WIDTH, WIDTH_PER_PUZZLE * max(1, len(puzzles)))
    stack = _pieces(_states(puzzles), np.arange(len(puzzles)), width)
    while stack:
        states, owner = stack.pop()
        # A second solution settles a puzzle: its other branches need not be searched.
        needed = solutions[owner] < 2
        states, solved, unsolved = _propagate(states[..., needed])
        owner = owner[needed]
        np.add.at(solutions, owner[solved], 1)
        answers[owner[solved]] = _digits(states[..., solved])
        states, owner = states[..., unsolved], owner[unsolved]
        np.add.at(guesses, owner, 1)
        if max_guesses is not None:
            solutions[owner[guesses[owner] > max_guesses]] = 2
        if len(owner):
            stack += _pieces(*_branch(states, owner), width)
    return np.minimum(solutions, 2), guesses, answers


def _states(puzzles: np.ndarray) -> np.ndarray:
    """Candidate masks (size, size, B) of puzzles (B, size, size): all digits for a blank cell."""
    size = puzzles.shape[-1]
    masks = np.concatenate([[(1 << size) - 1], 1 << np.arange(size)]).astype(np.uint16)
    return np.ascontiguousarray(masks[puzzles].transpose(1, 2, 0))


def _digits(states: np.ndarray) -> np.ndarray:
    """The grids (B, size, size) of solved states."""
    # The mask of digit d is 2^(d - 1), and minus one it has d - 1 bits.
    return (_BITS[states - np.uint16(1)] + np.uint8(1)).transpose(2, 0, 1)


def _pieces(states: np.ndarray, owner: np.ndarray, width: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """States and their puzzles' indices, cut into pieces of at most `width`."""
    starts = range(0, len(owner), width)
    return [(states[..., start : start + width], owner[start : start + width]) for start in starts]


def _propagate(states: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fill in singles until nothing changes.

    Returns the states, which are solved (B,), and which are unsolved (B,). The rest have no solution.
    """
    states, cells, active = states.copy(), states, np.arange(states.shape[-1])
    solved, unsolved = np.zeros(len(active), bool), np.zeros(len(active), bool)
    full = (1 << len(states)) - 1
    # A digit twice in a unit needs no check of its own: some other digit of the unit then ends without a
    # cell.
    while len(active):
        # Cells with one candidate take it from the other cells of their units.
        single = (cells & (cells - np.uint16(1))) == 0
        fixed = cells * single
        seen = np.zeros_like(cells)
        for units, seen_units in zip(_units(fixed), _units(seen), strict=True):
            seen_units |= np.bitwise_or.reduce(units, axis=_UNIT_AXES, keepdims=True)
        after = cells & (fixed | ~seen)
        # Digits with one cell left in a unit belong there. Each cell and each digit needs at least one place.
        only, possible = np.zeros_like(cells), after.all(axis=(0, 1))
        for units, only_units in zip(_units(after), _units(only), strict=True):
            once, twice = _once_twice(units)
            only_units |= (once & ~twice)[:, None, :, None]
            possible &= (once == full).all(axis=(0, 1))
        forced = after & only
        # A cell cannot be the only place of two digits.
        possible &= ((forced & (forced - np.uint16(1))) == 0).all(axis=(0, 1))
        np.copyto(after, forced, where=forced != 0)
        changed = (after != cells).any(axis=(0, 1))
        resting = possible & ~changed
        complete = single.all(axis=(0, 1))
        solved[active[resting & complete]] = True
        unsolved[active[resting & ~complete]] = True
        states[..., active[resting]] = after[..., resting]
        # States at rest leave the batch, so that a few long ones do not cost the time of all.
        going = possible & changed
        active, cells = active[going], after[..., going]
    return states, solved, unsolved


def _units(cells: np.ndarray) -> Iterator[np.ndarray]:
    """Views of cells (size, size, B) as rows, as columns and as boxes.

    Each view has the axes (units down, rows of a unit, units across, columns of a unit, B).
    """
    size = len(cells)
    for rows, columns in ((1, size), (size, 1), BOXES[size]):
        yield cells.reshape(size // rows, rows, size // columns, columns, -1)


def _once_twice(units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The digits that at least one cell of each unit admits, and those that at least two admit."""
    once, twice = np.zeros_like(units[:, 0, :, 0]), np.zeros_like(units[:, 0, :, 0])
    for row in range(units.shape[1]):
        for column in range(units.shape[3]):
            cell = units[:, row, :, column]
            twice |= once & cell
            once |= cell
    return once, twice


def _branch(states: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One child per candidate of each state's narrowest cell."""
    cell, candidates = _narrowest(states)
    parent, digit = np.nonzero(_candidate_table(candidates, len(states)))
    children = states[..., parent]
    children.reshape(-1, len(parent))[cell[parent], np.arange(len(parent))] = 1 << digit
    return children, owner[parent]


def _narrowest(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first undecided cell (B,) with the fewest candidates, as a flat index, and their mask (B,)."""
    flat = states.reshape(-1, states.shape[-1])
    candidates = _BITS[flat]
    cell = np.where(candidates < 2, 99, candidates).argmin(axis=0)
    return cell, flat[cell, np.arange(flat.shape[1])]


def _candidate_table(masks: np.ndarray, size: int) -> np.ndarray:
    """(B, size) 1 for each digit in a mask (B,), else 0."""
    return (masks[:, None] >> np.arange(size, dtype=np.uint16)) & np.uint16(1)


def generate(
    size: int,
    count: int,
    rng: np.random.Generator,
    *,
    clues: int | None = None,
    max_difficulty: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Puzzles (count, size, size), their only solutions, and their difficulties (count,).

    The clues of a random solved grid are taken away in random order. A clue goes only if the puzzle stays
    unique and within `max_difficulty` guesses. This ends at `clues` clues, or else when none can go.
    """
    answers = _solved_grids(size, count, rng)
    order = rng.random((count, size * size)).argsort(axis=1)
    puzzles, difficulty = answers.copy(), np.zeros(count, np.int64)
    for row, column in zip(*np.divmod(order.T, size), strict=True):
        # Each puzzle tries its next cell. Those that have few enough clues rest.
        rich = np.flatnonzero((puzzles > 0).sum(axis=(1, 2)) > (clues or 0))
        trial = puzzles[rich]
        trial[np.arange(len(rich)), row[rich], column[rich]] = 0
        solutions, guesses, _ = solve(trial, max_difficulty)
        unique = solutions == 1
        puzzles[rich[unique]], difficulty[rich[unique]] = trial[unique], guesses[unique]
    return puzzles, answers, difficulty


def _solved_grids(size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Random solved grids (count, size, size).

    Random digits are set in the narrowest cells of empty grids. A grid that runs into a contradiction
    starts again.
    """
    grids, wanted = np.zeros((count, size, size), np.uint8), np.arange(count)
    states, empty = _states(grids), _states(grids[:1])
    while len(wanted):
        states, solved, unsolved = _propagate(states)
        grids[wanted[solved]] = _digits(states[..., solved])
        states[..., ~unsolved] = empty
        wanted, states = wanted[~solved], states[..., ~solved]
        if len(wanted):
            cell, candidates = _narrowest(states)
            weight = _candidate_table(candidates, size) * (1 - rng.random((len(wanted), size)))
            digit = weight.argmax(axis=1)
            states.reshape(-1, len(wanted))[cell, np.arange(len(wanted))] = 1 << digit
    return grids


def is_solved(grids: np.ndarray) -> np.ndarray:
    """Which of (B, size, size) grids hold every digit once in every row, column and box: (B,) bool."""
    size = grids.shape[-1]
    masks = np.ascontiguousarray(
        np.where(grids > 0, 1 << (np.maximum(grids, 1) - 1).astype(np.uint16), 0).transpose(1, 2, 0)
    )
    unions = [np.bitwise_or.reduce(units, axis=_UNIT_AXES) == (1 << size) - 1 for units in _units(masks)]
    return np.all([union.all(axis=(0, 1)) for union in unions], axis=0)


def solves(puzzles: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Which answers (B, size, size) obey the rules and keep every given digit of their puzzle: (B,) bool."""
    kept = ((puzzles == 0) | (puzzles == answers)).all(axis=(1, 2))
    in_range = ((answers > 0) & (answers <= answers.shape[-1])).all(axis=(1, 2))
    return kept & in_range & is_solved(np.where(in_range[:, None, None], answers, np.uint8(0)))


def num_uniforms(size: int) -> int:
    """How many uniform numbers `symmetries` needs per puzzle."""
    box_rows, box_columns = BOXES[size]
    return 1 + 3 * size + size // box_rows + size // box_columns


def symmetries(uniform: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Uniformly distributed symmetries of Sudoku from uniform numbers (B, num_uniforms(size)) in [0, 1).

    Returns four arrays for `transform`:
      - transpose (B,) bool, never for size 6, whose boxes are not square.
      - digits (B, 10), or (B, 17) for size 16, uint8 that each digit becomes. 0 and all beyond `size` are
        fixed.
      - row order and column order (B, size) int64. They permute bands (stacks) and the lines inside them.

    The group is that of HRM's and TRM's Sudoku augmentation.
    """
    box_rows, box_columns = BOXES[size]
    flip, digit, *lines = np.split(
        uniform, np.cumsum([1, size, size // box_rows, size, size // box_columns]), axis=1
    )
    transpose = (flip[:, 0] < 0.5) & (box_rows == box_columns)
    digits = np.tile(np.arange(max(10, size + 1), dtype=np.uint8), (len(uniform), 1))
    digits[:, 1 : size + 1] = digit.argsort(axis=1) + 1
    rows, columns = _line_order(lines[0], lines[1]), _line_order(lines[2], lines[3])
    return transpose, digits, rows, columns


def _line_order(band: np.ndarray, line: np.ndarray) -> np.ndarray:
    """Orders (B, size) of lines from uniform numbers for bands (B, bands) and for lines (B, size)."""
    # The rank of its band as a whole number, plus a number below 1: lines are sorted by band, then at random.
    rank = band.argsort(axis=1).argsort(axis=1)
    return (rank.repeat(line.shape[1] // band.shape[1], axis=1) + line).argsort(axis=1)


def transform(
    grids: np.ndarray, transpose: np.ndarray, digits: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Apply one symmetry to each of (B, size, size) grids: transpose, reorder rows and columns, relabel."""
    index = np.arange(len(grids))[:, None, None]
    grids = np.where(transpose[:, None, None], grids.swapaxes(1, 2), grids)
    return digits[index, grids[index, rows[:, :, None], columns[:, None, :]]]


def fingerprints(puzzles: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """(B,) uint64, equal for puzzles that a symmetry maps to each other. Rarely other puzzles share one.

    This is colour refinement. A cell starts as given or blank. It repeatedly takes in the sums over its row
    and column (alike, because of transposition), over its box, and over the cells with its digit in the
    answer.
    """
    size = puzzles.shape[-1]
    colours = mix(np.ascontiguousarray((puzzles > 0).transpose(1, 2, 0)).astype(np.uint64))
    # (cells, B), the cells of digit 1 first
    by_digit = answers.reshape(len(answers), -1).argsort(axis=1, kind="stable").T
    place = by_digit.argsort(axis=0)
    for _ in range(HASH_ROUNDS):
        rows, columns, boxes = (
            np.broadcast_to(units.sum(axis=_UNIT_AXES, keepdims=True), units.shape).reshape(colours.shape)
            for units in _units(colours)
        )
        sorted_cells = np.take_along_axis(colours.reshape(size * size, -1), by_digit, axis=0)
        sums = sorted_cells.reshape(size, size, -1).sum(axis=1).repeat(size, axis=0)
        digits = np.take_along_axis(sums, place, axis=0).reshape(colours.shape)
        colours += 3 * mix(mix(rows) + mix(columns)) + 5 * mix(boxes) + 7 * mix(digits)
        colours = mix(colours)
    return colours.sum(axis=(0, 1))
