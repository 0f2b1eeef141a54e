"""Animations, letters and frames: they come back as they were drawn, and tell what changed."""

import numpy as np

from dataset.games.arc import DRAWING
from evaluation import drawing
from evaluation.refinement import agreeing
from tests.support.images import read_gif
from tools import timeline
from utils.images import lettering, write_gif


def test_an_animation_comes_back_as_it_was_drawn(tmp_path):
    palette = np.array(
        [
            drawing.PAPER,
            drawing.LINE,
            drawing.RIGHT,
            drawing.WRONG,
            drawing.CHANGED,
            drawing.INK,
            *np.array(DRAWING.rgb, np.uint8),
        ]
    )
    frames = [palette[np.random.default_rng(0).integers(0, len(palette), (90, 120))]]
    frames.append(frames[0].copy())
    frames[1][10:20, 30:33] = drawing.CHANGED
    write_gif(tmp_path / "a.gif", frames, [0.5, 2])
    read, times = read_gif(tmp_path / "a.gif")
    assert times == [500, 2000] and len(read) == 2
    for ours, theirs in zip(frames, read, strict=True):
        assert np.array_equal(ours, theirs)


def test_letters_are_told_apart():
    ink, paper = np.zeros(3, np.uint8), np.full(3, 255, np.uint8)
    shapes = {
        lettering(character, 14, ink, paper).tobytes()
        for character in "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789."
    }
    assert len(shapes) == 37 and len(lettering("AB", 14, ink, paper)) == len(lettering("Ag", 14, ink, paper))


def test_cells_of_other_sizes_are_compared_where_both_have_one():
    grid, other = np.array([[1, 2], [3, 4], [5, 6]]), np.array([[1, 0, 9], [3, 4, 9]])
    assert agreeing(grid, other).tolist() == [[True, False], [True, True], [False, False]]


def test_frames_tell_right_wrong_and_changed():
    """One row: right unchanged, right changed, wrong unchanged, wrong changed; then another size."""
    truth = np.array([[1, 2, 3, 4]], np.uint8)
    steps = [
        {"grid": [[1, 9, 8, 8]], "q": 0.5, "halted": False},
        {"grid": [[1, 2, 8, 7]], "q": 0.6, "halted": False},
    ]
    steps += [{"grid": [], "q": 0.1, "halted": False}, {"grid": [[1], [1]], "q": 0.9, "halted": True}]
    values = {
        "checkpoint": "",
        "task": "",
        "task_id": None,
        "weights": "ema",
        "num_views": 1,
        "seed": 0,
        "device": "cpu",
        "threads": "auto",
        "forward_dtype": "checkpoint",
        "protocol": {"name": "auto"},
        "output": "t.png",
    }
    config = timeline.TimelineConfig(
        **values,
        pair_index=0,
        view=0,
        demonstrations=False,
        target=True,
        curves=False,
        diff=True,
        dpi=100,
        columns=1,
    )
    panels = timeline.draw(truth, steps, truth, 4, config, DRAWING)
    assert len(panels) == 6
    outer = [panels[2][-15, 1 + 30 * cell] for cell in range(4)]
    inner = [panels[2][-15, 1 + 30 * cell + 4] for cell in range(4)]
    assert [colour.tolist() for colour in outer] == [
        c.tolist() for c in [drawing.RIGHT] * 2 + [drawing.WRONG] * 2
    ]
    assert [(colour == drawing.CHANGED).all() for colour in inner] == [False, True, False, True]
    assert not (panels[1] == drawing.CHANGED).all(axis=-1).any(), "the first step has no step before it"
    assert not (panels[3] == drawing.WRONG).all(axis=-1).any(), "no answer, no cells"
    assert [tuple(panels[4][-15 - 30 * row, 1]) for row in (1, 0)] == [
        tuple(drawing.RIGHT),
        tuple(drawing.WRONG),
    ]
