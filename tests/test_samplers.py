"""Training batches: pure functions of the step, which pairs they ask, and how they are drawn."""

from collections import Counter

import numpy as np
import pytest

from dataset import augment
from dataset.batch import materialise
from dataset.canvas import PAD
from dataset.generate import sudoku
from dataset.puzzle_writer import pack
from dataset.samplers import SAMPLERS, EpisodeSampler
from dataset.store import Store
from dataset.task import Pair, Task
from dataset.views import EvaluationSet
from dataset.writer import write_dataset
from tests.support.grids import random_task, write_store
from tests.support.runs import data_config_of
from utils.errors import UserError


@pytest.mark.parametrize("layout", ["fewshot", "puzzle"])
def test_a_step_is_a_pure_function_and_ranks_share_the_global_batch(layout, fewshot, puzzle):
    store = {"fewshot": fewshot, "puzzle": puzzle}[layout]
    config = data_config_of(store)

    def sample(step: int, rank: int = 0, world: int = 1):
        return SAMPLERS[layout](store, config, 7, 12, rank, world).sample(step)

    for step in (0, 5):
        whole = sample(step)
        for world in (1, 2, 3):
            parts = [sample(step, rank, world) for rank in range(world)]
            for name in ("query", "demos", "transform", "colours", "offset", "identifier"):
                assert np.array_equal(
                    np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name)
                )
    assert not np.array_equal(sample(0).query, sample(1).query)
    with pytest.raises(UserError, match="global_batch_size=12 is not divisible by the world size 5"):
        sample(0, 0, 5)


def test_episodes_use_any_pair_and_never_show_the_query_among_its_demonstrations(fewshot):
    sampler = EpisodeSampler(fewshot, data_config_of(fewshot), 0, 16)
    asked, counts = Counter(), Counter()
    for step in range(400):
        samples = sampler.sample(step)
        demos = samples.demos.tolist()
        assert all(
            len(set(row)) == samples.bucket.demos and query not in row
            for query, row in zip(samples.query, demos, strict=True)
        )
        task_of = np.searchsorted(fewshot.task_pairs, samples.query, side="right") - 1
        assert all(
            fewshot.task_pairs[task] <= min(row) and max(row) < fewshot.task_pairs[task + 1]
            for task, row in zip(task_of, demos, strict=True)
        )
        asked.update(samples.query.tolist())
        counts.update(task_of.tolist())
    training = fewshot.tasks_of("train")
    assert set(asked) == set(range(fewshot.task_pairs[training[-1] + 1]))
    shares = np.array([counts[int(task)] for task in training]) / sum(counts.values())
    assert np.allclose(shares, 1 / len(training), atol=0.03)


def test_query_sampling_test_asks_only_the_tasks_own_queries(fewshot):
    sampler = EpisodeSampler(fewshot, data_config_of(fewshot, query_sampling="test"), 0, 16)
    for step in range(50):
        samples = sampler.sample(step)
        task = np.searchsorted(fewshot.task_pairs, samples.query, side="right") - 1
        border = fewshot.task_pairs[task] + fewshot.task_demonstrations[task]
        assert (samples.query >= border).all() and (samples.demos < border[:, None]).all()


def test_the_puzzle_sampler_trains_on_demonstrations_but_no_queries_of_evaluation_tasks(puzzle):
    sampler = SAMPLERS["puzzle"](puzzle, data_config_of(puzzle), 0, 64)
    asked = {int(pair) for step in range(60) for pair in sampler.sample(step).query}
    held_out = {
        pair
        for task in puzzle.tasks_of("test")
        for pair in range(
            puzzle.task_pairs[task] + puzzle.task_demonstrations[task], puzzle.task_pairs[task + 1]
        )
    }
    assert not asked & held_out
    assert asked == set(range(len(puzzle.pair_input))) - held_out


def test_all_grids_of_an_episode_share_one_augmentation_and_offset(fewshot):
    config = data_config_of(fewshot, buckets=[9])
    sampler = EpisodeSampler(fewshot, config, 0, 32)
    samples = sampler.sample(3)
    assert len({tuple(offset) for offset in samples.offset}) > 1
    batch = materialise(samples, fewshot, fewshot.grid_table)
    for row in range(batch.size):
        corners = []
        for grid in (
            batch.data["inputs"][row],
            *batch.data["demo_inputs"][row],
            *batch.data["demo_labels"][row],
        ):
            rows, columns = np.nonzero(grid.view(9, 9).numpy() > 1)
            corners.append((rows.min(), columns.min()))
        assert set(corners) == {tuple(samples.offset[row])}
    assert (batch.data["labels"] != PAD).all()


def test_each_pair_may_have_a_place_of_its_own(fewshot):
    samples = EpisodeSampler(fewshot, data_config_of(fewshot, buckets=[9], translate="each"), 0, 32).sample(3)
    count = samples.demos.shape[1]
    assert samples.offset.shape == (32, 1 + count, 2) and (samples.offset[:, 0] != samples.offset[:, 1]).any()
    data = materialise(samples, fewshot, fewshot.grid_table).data
    for row in range(32):
        grids = [data["inputs"][row], *data["demo_inputs"][row], *data["demo_labels"][row]]
        corners = [
            tuple(int(places.min()) for places in np.nonzero(grid.view(9, 9).numpy() > 1)) for grid in grids
        ]
        assert corners == [
            tuple(samples.offset[row, pair]) for pair in (0, *range(1, 1 + count), *range(1, 1 + count))
        ]


def test_a_table_of_augmentations_must_exist(tmp_path):
    store = write_store(tmp_path / "d", num_aug=0)
    with pytest.raises(UserError, match="stores no augmentations"):
        EpisodeSampler(store, data_config_of(store, augmentation="table"), 0, 4)


def test_a_subset_may_be_asked_in_a_way_of_its_own(tmp_path):
    rng = np.random.default_rng(0)
    tasks = {name: [random_task(rng, f"{name}{i}", side=3) for i in range(4)] for name in "abt"}
    write_dataset(tmp_path / "d", tasks, ["t"], layout="fewshot", source="random", seed=0)
    store = Store.load(tmp_path / "d")
    sampler = EpisodeSampler(store, data_config_of(store, query_sampling={"a": "any", "b": "all"}), 0, 64)
    asked: dict[str, set[tuple[int, int]]] = {"a": set(), "b": set()}
    for step in range(60):
        samples = sampler.sample(step)
        task = np.searchsorted(store.task_pairs, samples.query, side="right") - 1
        for subset, place in zip(
            store.task_subset[task], samples.query - store.task_pairs[task], strict=True
        ):
            asked[store.subset_names[subset]].add((int(place), samples.bucket.demos))
    assert asked["a"] == {(place, demos) for place in range(4) for demos in (1, 2, 3)} and asked["b"] == {
        (3, 3)
    }
    with pytest.raises(
        UserError, match=r"data.query_sampling names a; .* trains on a, b: each needs a value"
    ):
        EpisodeSampler(store, data_config_of(store, query_sampling={"a": "any"}), 0, 64)


def test_subsets_are_drawn_in_their_shares(tmp_path):
    rng = np.random.default_rng(0)
    tasks = {
        name: [random_task(rng, f"{name}{i}", side=3) for i in range(count)]
        for name, count in (("a", 2), ("b", 8), ("c", 3), ("t", 1))
    }
    write_dataset(tmp_path / "d", tasks, ["t"], layout="fewshot", source="random", seed=0)
    store = Store.load(tmp_path / "d")
    sampler = EpisodeSampler(store, data_config_of(store, subset_shares={"a": 3, "b": 1, "c": 0}), 0, 64)
    task = np.concatenate(
        [
            np.searchsorted(store.task_pairs, sampler.sample(step).query, side="right") - 1
            for step in range(40)
        ]
    )
    names = np.array(store.subset_names)[store.task_subset[task]]
    assert 0.72 < (names == "a").mean() < 0.78 and not (names == "c").any()
    trained = store.tasks_of("train", subsets=["a", "b"])
    pairs = np.concatenate([np.arange(store.task_pairs[t], store.task_pairs[t + 1]) for t in trained])
    assert set(store.pair_fingerprint[pairs]) == set(sampler.trained_pairs)
    with pytest.raises(UserError, match=r"names a, b; .* trains on a, b, c: each needs a value"):
        EpisodeSampler(store, data_config_of(store, subset_shares={"a": 1, "b": 1}), 0, 64)


def test_colours_alone_are_drawn_afresh_for_every_episode(fewshot, tmp_path):
    samples = EpisodeSampler(fewshot, data_config_of(fewshot, augmentation="colours"), 0, 32).sample(0)
    assert not samples.transform.any() and len({tuple(colours) for colours in samples.colours}) == 32
    assert (samples.colours[:, 0] == 0).all() and (np.sort(samples.colours, axis=1) == np.arange(10)).all()
    assert (
        EvaluationSet(fewshot, data_config_of(fewshot, augmentation="colours"), "test", 8, 0).num_views == 1
    )


def test_turns_alone_are_drawn_afresh_for_every_episode_and_voted_over(fewshot):
    config = data_config_of(fewshot, augmentation="turns")
    samples = EpisodeSampler(fewshot, config, 0, 64).sample(0)
    assert set(samples.transform.tolist()) == set(range(8))
    assert (samples.colours == np.arange(10)).all()
    for wanted in (1, 4, 8, 100):
        questions = EvaluationSet(fewshot, config, "test", wanted, 0)
        for query in questions.queries:
            views = [questions.view(query, number) for number in range(questions.num_views_of(query))]
            assert [turn for turn, _ in views] == list(range(min(wanted, 8)))
            assert all((colours == np.arange(10)).all() for _, colours in views)


def test_turns_that_give_the_same_task_count_once():
    square = Pair(np.full((2, 2), 3, np.uint8), np.full((3, 3), 4, np.uint8))
    flat = Pair(np.full((1, 2), 3, np.uint8), np.full((3, 3), 4, np.uint8))
    for pair, expected in ((square, [0]), (flat, [0, 1])):
        index, colours = augment.turns(Task("t", (pair,), (pair,)), 7)
        assert index.tolist() == expected and (colours == np.arange(10)).all()


def test_turns_of_a_game_keep_its_digits(tmp_path):
    puzzles, answers, _ = sudoku.generate(9, 3, np.random.default_rng(0))
    parts = {"train": slice(0, 2), "test": slice(2, 3)}
    pack(
        {name: (puzzles[part], answers[part]) for name, part in parts.items()},
        game="sudoku",
        source="generated",
        seed=0,
        num_aug=0,
        details={},
        fingerprints={name: np.arange(3, dtype=np.uint64)[part] for name, part in parts.items()},
    ).save(tmp_path / "d")
    store = Store.load(tmp_path / "d")
    config = data_config_of(store, augmentation="turns", buckets=[9], canvas_margin=0, translate=False)
    samples = SAMPLERS["pairs"](store, config, 0, 16).sample(0)
    plain = SAMPLERS["pairs"](store, config.model_copy(update={"augmentation": "random"}), 0, 16).sample(0)
    assert (samples.colours == np.arange(10)).all() and (plain.colours != np.arange(10)).any()
    assert np.array_equal(samples.order, plain.order)
    assert np.array_equal(samples.transform, plain.transform)


@pytest.mark.parametrize("augmentation", ["random", "colours", "turns"])
def test_puzzle_rows_refuse_fresh_augmentations(augmentation, puzzle):
    with pytest.raises(UserError, match="set data.augmentation to table or none"):
        SAMPLERS["puzzle"](puzzle, data_config_of(puzzle, augmentation=augmentation), 0, 4)
