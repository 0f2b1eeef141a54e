"""Properties of the data layer that must hold for every grid, seed, step and world size."""

import functools
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dataset import augment, canvas
from dataset.samplers import SAMPLERS
from dataset.store import Store
from tests.support.grids import write_store
from tests.support.runs import load_config
from utils.errors import UserError

SHARED_FIXTURES = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)


@functools.cache
def data_config(path):
    return load_config(Store.load(path)).data


sides = st.integers(1, 30)
grids = st.tuples(sides, sides).flatmap(
    lambda shape: arrays.arrays(np.uint8, shape, elements=st.integers(0, 9))
)
permutations = st.permutations(range(1, 10)).map(lambda order: np.array([0, *order], np.uint8))


@given(grids, st.integers(0, 7), permutations)
@settings(deadline=None)
def test_augmentation_then_its_inverse_is_the_identity(grid, index, colours):
    assert np.array_equal(augment.invert(augment.apply(grid, index, colours), index, colours), grid)


@given(grids, st.data())
@settings(deadline=None)
def test_encoding_then_decoding_is_the_identity_at_any_translation(grid, data):
    side = data.draw(st.integers(max(grid.shape), 30))
    offset = tuple(data.draw(st.integers(0, side - length)) for length in grid.shape)
    found, place = canvas.undraw(canvas.encode(grid, side, offset))
    assert np.array_equal(found, grid) and place == offset
    assert np.array_equal(canvas.decode(canvas.encode(grid, side)[None])[0], grid)


@given(grids, st.integers(0, 7), permutations)
@settings(deadline=None)
def test_an_identifier_says_its_augmentation(grid, index, colours):
    name = augment.names_of("task", np.array([0, index]), np.stack([augment.IDENTITY_COLOURS, colours]))[1]
    task_id, parsed, parsed_colours = augment.parse_name(name)
    assert (task_id, parsed) == ("task", index) and np.array_equal(parsed_colours, colours)


@pytest.mark.parametrize("layout", ["fewshot", "puzzle"])
@given(
    seed=st.integers(0, 2**31),
    step=st.integers(0, 2**40),
    world=st.sampled_from([1, 2, 3]),
    batch=st.integers(1, 8),
)
@SHARED_FIXTURES
def test_the_stream_is_the_same_alone_resumed_and_split_over_ranks(
    layout, fewshot, puzzle, seed, step, world, batch
):
    store = {"fewshot": fewshot, "puzzle": puzzle}[layout]
    config = data_config(store.path)
    alone = SAMPLERS[layout](store, config, seed, batch * world)
    if step:
        alone.sample(step - 1)  # an earlier step leaves no trace
    whole = alone.sample(step)
    parts = [
        SAMPLERS[layout](store, config, seed, batch * world, rank, world).sample(step)
        for rank in range(world)
    ]
    for name in ("query", "demos", "demo_mask", "transform", "colours", "offset", "identifier"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
    assert {part.bucket for part in parts} == {whole.bucket}


@given(seed=st.integers(0, 2**31), step=st.integers(0, 2**40))
@SHARED_FIXTURES
def test_no_query_is_among_its_demonstrations(fewshot, seed, step):
    samples = SAMPLERS["fewshot"](fewshot, data_config(fewshot.path), seed, 16).sample(step)
    assert not (samples.demos == samples.query[:, None]).any()
    assert all(len(set(row)) == len(row) for row in samples.demos.tolist())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("hash") / "whole").path


@given(st.data())
@SHARED_FIXTURES
def test_any_changed_byte_of_a_dataset_is_detected(written, tmp_path, data):
    names = sorted(Store.load(written).metadata.sha256)
    name = data.draw(st.sampled_from(names))
    folder = tmp_path / "copy"
    shutil.copytree(written, folder, dirs_exist_ok=True)
    content = bytearray((folder / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        Store.load(folder)
