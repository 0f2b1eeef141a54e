"""Augmentation and canvas: every transform can be undone, and the fast drawing equals the plain one."""

import itertools

import numpy as np
import pytest
import torch

from dataset import augment, canvas
from dataset.canvas import GridTable
from dataset.task import MAX_SIDE, Pair, Task

RNG = np.random.default_rng(0)


def random_grid(rows: int, columns: int) -> np.ndarray:
    return RNG.integers(0, 10, (rows, columns)).astype(np.uint8)


def test_augment_then_invert_is_the_identity_for_all_transforms_and_sizes():
    for index in range(8):
        for side in range(1, MAX_SIDE + 1):
            grid, (colours,) = (
                random_grid(side, int(RNG.integers(1, MAX_SIDE + 1))),
                augment.random_colours(RNG, 1),
            )
            assert colours[0] == 0 and sorted(colours) == list(range(10))
            assert np.array_equal(augment.invert(augment.apply(grid, index, colours), index, colours), grid)


def test_names_are_the_ancestors_and_parse_back():
    colours = np.array([0, 9, 8, 7, 6, 5, 4, 3, 2, 1], np.uint8)
    rows = np.array([0, 3], np.uint8), np.stack([augment.IDENTITY_COLOURS, colours])
    assert augment.names_of("abc", *rows) == ["abc", "abc|||t3|||0987654321"]
    name, index, parsed = augment.parse_name("abc|||t3|||0987654321")
    assert (name, index) == ("abc", 3) and np.array_equal(parsed, colours)


def drawn_puzzle(task: Task, index: int, colours: np.ndarray) -> tuple:
    """What the original hashes to compare puzzles: the sorted pairs, drawn."""
    grids = [
        [augment.apply(grid, index, colours) for grid in (pair.input, pair.output) if grid is not None]
        for pair in task.pairs
    ]
    return tuple(sorted(tuple((grid.shape, grid.tobytes()) for grid in pair) for pair in grids))


def test_drawn_augmentations_give_different_puzzles_and_start_with_the_identity():
    task = Task("t", (Pair(random_grid(3, 2), random_grid(2, 2)),), (Pair(random_grid(3, 3), None),))
    index, colours = augment.draw(task, 50, augment.task_rng(0, "t"))
    assert len(index) == 51 and index[0] == 0 and np.array_equal(colours[0], augment.IDENTITY_COLOURS)
    assert len({drawn_puzzle(task, i, c) for i, c in zip(index, colours, strict=True)}) == 51


@pytest.mark.parametrize("kind", ["blank", "one colour", "two colours", "mirrored", "swapped pairs"])
def test_symmetric_tasks_keep_one_of_the_augmentations_that_give_the_same_puzzle(kind):
    """Against the original's rule by brute force: as many as there are different puzzles, no two equal."""
    one, two = np.array([[0, 1], [0, 0]], np.uint8), np.array([[0, 1], [2, 0]], np.uint8)
    mirrored = np.array([[1, 2, 1]], np.uint8)
    pairs = {
        "blank": [(one * 0, one * 0)],
        "one colour": [(one, one)],
        "two colours": [(two, two)],
        "mirrored": [(mirrored, mirrored)],
        "swapped pairs": [(one, two), (one[:, ::-1], two[:, ::-1])],
    }[kind]
    task = Task("t", tuple(Pair(*pair) for pair in pairs), (Pair(*pairs[0]),))
    index, colours = augment.draw(task, 3000, augment.task_rng(0, "t"))
    shown = sorted({int(c) for pair in pairs for grid in pair for c in np.unique(grid)} - {0})
    every = set()
    for permutation in itertools.permutations(range(1, 10), len(shown)):
        table = np.zeros(10, np.uint8)
        table[shown] = permutation
        every |= {drawn_puzzle(task, i, table) for i in range(8)}
    found = [drawn_puzzle(task, i, c) for i, c in zip(index, colours, strict=True)]
    assert len(found) == len(set(found)) == len(every) and set(found) == every


def test_fingerprints_are_equal_up_to_symmetry_and_recolouring_only():
    pairs, moved, changed = [], [], []
    for _ in range(20):
        pair = Pair(random_grid(*RNG.integers(2, 6, 2)), random_grid(*RNG.integers(2, 6, 2)))
        (colours,) = augment.random_colours(RNG, 1)
        index = int(RNG.integers(0, 8))
        other = pair.output.copy()
        other[0, 0] = 0 if other[0, 0] else 1
        pairs.append(pair)
        moved.append(
            Pair(augment.apply(pair.input, index, colours), augment.apply(pair.output, index, colours))
        )
        changed.append(Pair(pair.input, other))
    prints = augment.fingerprints(pairs)
    assert np.array_equal(augment.fingerprints(moved), prints) and len(set(prints.tolist())) == 20
    assert not np.isin(augment.fingerprints(changed), prints).any()
    assert augment.fingerprints([Pair(pairs[0].input, None), pairs[1]]).tolist() == [0, prints[1]]


def test_encode_then_decode_is_the_identity_for_all_sizes():
    for rows in range(1, MAX_SIDE + 1):
        grids = [random_grid(rows, columns) for columns in range(1, MAX_SIDE + 1)]
        for decoded, grid in zip(
            canvas.decode(np.stack([canvas.encode(grid) for grid in grids])), grids, strict=True
        ):
            assert np.array_equal(decoded, grid)


def test_decode_takes_the_largest_rectangle_and_nothing_from_a_colourless_corner():
    tokens = canvas.encode(random_grid(3, 3), 5).reshape(5, 5).copy()
    tokens[2, 2] = canvas.EOS
    assert canvas.decode(tokens.reshape(1, -1))[0].shape == (2, 3)
    tokens[0, 0] = canvas.PAD
    assert canvas.decode(tokens.reshape(1, -1))[0].shape == (0, 0)


def test_drawing_on_the_canvas_equals_the_plain_encoding_at_every_transform_and_offset():
    grids = [random_grid(*RNG.integers(1, 9, 2)) for _ in range(64)]
    pixels = np.zeros((64, 8, 8), np.uint8)
    for row, grid in zip(pixels, grids, strict=True):
        row[: grid.shape[0], : grid.shape[1]] = grid
    table = GridTable(torch.from_numpy(pixels), torch.tensor([grid.shape for grid in grids]))
    count, side = 800, 12
    chosen, index, colours = (
        RNG.integers(0, 64, count),
        RNG.integers(0, 8, count),
        augment.random_colours(RNG, count),
    )
    offset = RNG.integers(0, 5, (count, 2))
    drawn = canvas.render(table, *(torch.from_numpy(a) for a in (chosen, index, colours, offset)), side)
    for i in range(count):
        expected = canvas.encode(
            augment.apply(grids[chosen[i]], index[i], colours[i]), side, tuple(offset[i])
        )
        assert np.array_equal(drawn[i].numpy(), expected), (index[i], offset[i])


def test_padding_is_not_supervised():
    labels = canvas.labels_of(torch.tensor([[0, 1, 2]], dtype=torch.uint8))
    assert labels.tolist() == [[canvas.IGNORE_LABEL_ID, 1, 2]]


@pytest.mark.parametrize("side, bucket", [(1, 6), (6, 6), (7, 10), (11, None)])
def test_the_smallest_canvas_is_chosen(side, bucket):
    assert canvas.smallest_bucket(side, (6, 10)) == bucket
