"""Stored predictions: they come back, vote the same, and stay small."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from evaluation import predictions
from evaluation.predictions import Predictions
from evaluation.voting import key_of
from tests.support.predictions import NOTHING, A, synthetic, write
from utils.errors import UserError


def test_stored_predictions_come_back_and_vote_the_same(tmp_path):
    kept, names, truths = synthetic(12, 9)
    kept.add(0, 9, 1, NOTHING, 0.0)
    loaded = write(tmp_path / "a", kept, names, [None, *truths[1:]])
    assert (
        loaded.tasks == names
        and loaded.truths == [None, *truths[1:]]
        and loaded.labelled == list(range(1, len(names)))
    )
    for query in range(len(names)):
        for ours, theirs in zip(
            loaded.predictions.vote().ranked(query), kept.vote().ranked(query), strict=True
        ):
            assert np.array_equal(ours.grid, theirs.grid) and replace(ours, grid=None) == replace(
                theirs, grid=None
            )
    assert kept.vote().num_votes(0) == 9  # the empty grid is stored, and is no vote


def test_the_file_does_not_tell_how_many_processes_wrote_it(tmp_path):
    kept, names, truths = synthetic(9, 8)
    shares = [Predictions() for _ in range(3)]
    answers = list(kept.answers)
    rows = kept.columns
    for i in np.random.default_rng(0).permutation(len(kept)):
        shape, cells = answers[rows["answer"][i]]
        grid = np.frombuffer(cells, np.uint8).reshape(shape)
        shares[i % 3].add(rows["query"][i], rows["view"][i], rows["step"][i], grid, rows["q_halt_logit"][i])
    merged = Predictions()
    merged.merge(shares)
    for name, source in (("one", kept), ("three", merged)):
        write(tmp_path / name, source, names, truths)
    one, three = (dict(np.load(tmp_path / name / predictions.FILE)) for name in ("one", "three"))
    assert one.keys() == three.keys() and all(
        np.array_equal(one[key], three[key], equal_nan=one[key].dtype.kind == "f") for key in one
    )


def test_the_size_follows_the_distinct_answers(tmp_path):
    grids = [np.full((30, 30), value, np.uint8) for value in range(3)]
    few = Predictions()
    for query, view in itertools.product(range(20), range(50)):
        few.add(query, view, 1, grids[view % 3], 0.5)
    assert len(few) == 1000 and len(few.answers) == 3
    write(tmp_path, few, [f"t{i}" for i in range(20)], [key_of(grids[0])] * 20)
    assert (
        tmp_path / predictions.FILE
    ).stat().st_size < 10_000  # the grids of all views would be 900,000 cells


def test_missing_and_damaged_predictions_are_told_apart(tmp_path, stored_folder):
    with pytest.raises(UserError, match="save_predictions=true writes it"):
        predictions.load(tmp_path)
    (tmp_path / predictions.FILE).write_bytes((stored_folder / predictions.FILE).read_bytes()[:500])
    with pytest.raises(UserError, match="damaged"):
        predictions.load(tmp_path)
    empty, names, truths = Predictions(), ["t"], [key_of(A)]
    with pytest.raises(UserError, match="no prediction"):
        write(tmp_path / "e", empty, names, truths)
