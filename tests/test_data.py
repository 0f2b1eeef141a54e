"""The store, leaks, samplers and the evaluation set."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dataset.batch import DataConfig, materialise, task_sides
from dataset.build_arc_dataset import build, parse_arguments
from dataset.canvas import IGNORE_LABEL_ID, PAD
from dataset.leaks import find_leaks
from dataset.samplers import SAMPLERS, EpisodeSampler
from dataset.store import Store
from dataset.task import Pair, Task
from dataset.views import EvaluationSet
from dataset.writer import write_dataset
from tests.support.grids import random_task, write_store
from tests.support.runs import load_config, run
from utils.errors import UserError
from utils.files import read_json


def config_for(store, **changes) -> DataConfig:
    return load_config(store).data.model_copy(update=changes)


def test_a_build_is_the_same_bytes_under_any_hash_seed(tmp_path):
    digests = set()
    for hash_seed in ("1", "2"):
        folder = tmp_path / hash_seed
        done = run(
            *(
                "-m",
                "dataset.build_arc_dataset",
                "--max-tasks",
                "3",
                "--max-grid-size",
                "6",
                "--num-aug",
                "5",
                "--output-dir",
                str(folder),
            ),
            env={"PYTHONHASHSEED": hash_seed},
        )
        assert done.returncode == 0, done.stderr
        digests.add(tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())))
    assert len(digests) == 1


def test_tasks_and_names_come_back_from_the_store(fewshot):
    assert fewshot.identifiers[0] == "<blank>"
    assert len(fewshot.identifiers) == fewshot.metadata.num_puzzle_identifiers == len(fewshot.dihedral) + 1
    for index, task_id in enumerate(fewshot.task_ids):
        assert fewshot.identifiers[fewshot.task_rows[index] + 1] == task_id
        assert all(
            fewshot.identifiers[row + 1].startswith(task_id)
            for row in range(*fewshot.task_rows[index : index + 2])
        )
    rng = np.random.default_rng(0)
    assert fewshot.task(0).to_json() == random_task(rng, "a0", 2, 1).to_json()


@pytest.mark.parametrize(
    "layout, matters, changes_nothing",
    [
        ("puzzle", {"identifiers_start": 5}, {"seed": 9}),
        ("pairs", {"seed": 9}, {"identifiers_start": 5}),
        ("pairs", {"num_aug": 5}, {}),
        ("fewshot", {}, {"identifiers_start": 5, "seed": 9}),
    ],
)
def test_the_hash_of_a_dataset_tells_numbering_and_copies_apart(layout, matters, changes_nothing, fewshot):
    """They are part of what a model is trained on, and the arrays do not hold them."""
    metadata = fewshot.metadata.model_copy(update={"layout": layout})
    arrays = metadata.sha256["tasks.npz"][:16] + metadata.sha256["augmentations.npz"][:16]
    assert metadata.model_copy(update=changes_nothing).content_hash == metadata.content_hash
    assert all(
        metadata.model_copy(update={name: value}).content_hash != metadata.content_hash
        for name, value in matters.items()
    )
    assert metadata.model_copy(update={"num_aug": 0}).content_hash == arrays


def test_a_damaged_or_foreign_dataset_is_refused(tmp_path):
    store = write_store(tmp_path / "d")
    with pytest.raises(UserError, match="layout 'fewshot' but this model needs 'puzzle'"):
        Store.load(store.path, "puzzle")
    file = tmp_path / "d" / "augmentations.npz"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="augmentations.npz is damaged"):
        Store.load(store.path)
    file.unlink()
    with pytest.raises(UserError, match="augmentations.npz is missing"):
        Store.load(store.path)
    about = read_json(tmp_path / "d" / "dataset.json")
    (tmp_path / "d" / "dataset.json").write_text(json.dumps({**about, "game": "chess"}))
    with pytest.raises(UserError, match="format: game: .*the games are arc, sudoku, maze, found 'chess'$"):
        Store.load(store.path)
    (tmp_path / "d" / "dataset.json").write_text("[]")
    with pytest.raises(UserError, match="not of this framework's format"):
        Store.load(store.path)
    (tmp_path / "d" / "dataset.json").write_text('{"pad_id": 0}')
    with pytest.raises(UserError, match="not of this framework's format"):
        Store.load(store.path)
    with pytest.raises(UserError, match="no dataset at"):
        Store.load(tmp_path / "nowhere")


def test_the_known_shared_pair_of_arc1_stops_the_build(tmp_path):
    with pytest.raises(UserError, match="40853293 = 070dd51e"):
        build(parse_arguments(["--output-dir", str(tmp_path / "d")]))
    assert not any(tmp_path.iterdir())
    metadata = build(parse_arguments(["--output-dir", str(tmp_path / "d"), "--drop-leaks"]))
    assert "40853293" in metadata.left_out["leak"] and metadata.protocol == "inductive"
    metadata = build(parse_arguments(["--output-dir", str(tmp_path / "d"), "--allow-leaks"]))
    assert metadata.protocol == "transductive" and metadata.subsets == {"training": 400, "evaluation": 400}


def test_only_foreign_pairs_leak_in_the_puzzle_layout():
    rng = np.random.default_rng(1)
    train, test = random_task(rng, "a"), random_task(rng, "b")
    assert find_leaks([train], [test], "fewshot") == []
    repeated = type(test)("c", test.demonstrations, (test.demonstrations[0],))
    assert find_leaks([train], [repeated], "puzzle") == []
    assert [(leak.train_task, leak.test_task) for leak in find_leaks([test], [repeated], "puzzle")] == [
        ("b", "c")
    ]


@pytest.mark.parametrize("layout", ["fewshot", "puzzle"])
def test_a_step_is_a_pure_function_and_ranks_share_the_global_batch(layout, fewshot, puzzle):
    store = {"fewshot": fewshot, "puzzle": puzzle}[layout]
    config = config_for(store)

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
    sampler = EpisodeSampler(fewshot, config_for(fewshot), 0, 16)
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
    sampler = EpisodeSampler(fewshot, config_for(fewshot, query_sampling="test"), 0, 16)
    for step in range(50):
        samples = sampler.sample(step)
        task = np.searchsorted(fewshot.task_pairs, samples.query, side="right") - 1
        border = fewshot.task_pairs[task] + fewshot.task_demonstrations[task]
        assert (samples.query >= border).all() and (samples.demos < border[:, None]).all()


def test_the_puzzle_sampler_trains_on_demonstrations_but_no_queries_of_evaluation_tasks(puzzle):
    sampler = SAMPLERS["puzzle"](puzzle, config_for(puzzle), 0, 64)
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
    config = config_for(fewshot, buckets=[9])
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
    samples = EpisodeSampler(fewshot, config_for(fewshot, buckets=[9], translate="each"), 0, 32).sample(3)
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


@pytest.mark.parametrize("layout", ["fewshot", "puzzle"])
@pytest.mark.parametrize("world, batch", [(1, 1), (1, 7), (2, 3), (3, 64), (4, 16)])
def test_every_evaluation_query_is_asked_exactly_once_per_view(layout, world, batch, fewshot, puzzle):
    store = {"fewshot": fewshot, "puzzle": puzzle}[layout]
    questions = EvaluationSet(store, config_for(store), "test", 3, 0)
    seen = Counter()
    for rank in range(world):
        for part in questions.batches(batch, rank, world):
            assert len(part.query) == batch
            seen.update(zip(part.query[: part.valid].tolist(), part.view[: part.valid].tolist(), strict=True))
    expected = {(number, view) for number in range(len(questions.queries)) for view in range(3)}
    assert set(seen) == expected and set(seen.values()) == {1}


def test_evaluation_never_reads_the_answers(fewshot):
    questions = EvaluationSet(fewshot, config_for(fewshot), "test", 2, 0)
    for part in questions.batches(8):
        assert (
            materialise(part.samples, fewshot, fewshot.grid_table, with_labels=False).data["labels"]
            == IGNORE_LABEL_ID
        ).all()


def test_shuffled_demonstrations_come_from_another_task_and_query_only_hides_them(fewshot):
    plain = EvaluationSet(fewshot, config_for(fewshot), "test", 1, 0)
    shuffled = EvaluationSet(fewshot, config_for(fewshot), "test", 1, 0, "shuffled_demonstrations")
    hidden = EvaluationSet(fewshot, config_for(fewshot), "test", 1, 0, "query_only")
    demos = {
        number: set(row)
        for part in plain.batches(1)
        for number, row in zip(part.query, part.samples.demos, strict=True)
    }
    for part in shuffled.batches(1):
        assert not demos[int(part.query[0])] & set(part.samples.demos[0])
    assert all(not part.samples.demo_mask.any() for part in hidden.batches(4))


def test_a_task_without_a_fitting_donor_is_left_out_of_the_shuffled_control(fewshot):
    alone = EvaluationSet(fewshot, config_for(fewshot), "test", 1, 0, "shuffled_demonstrations", max_tasks=1)
    assert not any(alone.asked) and not list(alone.batches(1))


def test_training_and_evaluation_tasks_choose_their_canvas_by_the_same_rule(tmp_path):
    """Otherwise the canvas would tell the size of the answer in training."""
    small, large = np.ones((2, 2), np.uint8), np.ones((5, 5), np.uint8)
    task = Task("t", (Pair(small, small),), (Pair(small, large),))
    for split in ("a", "b"):
        tasks = {
            split: [task],
            "ab".replace(split, ""): [Task("other", (Pair(large, large),), (Pair(large, small),))],
        }
        folder = tmp_path / split
        write_dataset(folder, tasks, ["b"], layout="fewshot", source="x", seed=0, max_grid_size=5)
        store = Store.load(folder)
        sides = dict(
            zip(
                store.task_ids,
                task_sides(store, config_for(store, buckets=[9], canvas_margin=3)),
                strict=True,
            )
        )
        assert sides == {"t": 5, "other": 8}
    sides = dict(
        zip(store.task_ids, task_sides(store, config_for(store, buckets=[9], canvas_margin=1)), strict=True)
    )
    assert sides["t"] == 3


def test_truncated_demonstrations_are_reported(fewshot):
    questions = EvaluationSet(fewshot, config_for(fewshot, max_demos=2), "test", 1, 0)
    assert questions.truncated and all(len(query.demos) <= 2 for query in questions.queries)


def test_an_answer_larger_than_the_canvas_is_known_to_be_a_miss(tmp_path):
    store = write_store(tmp_path / "d", side=5)
    questions = EvaluationSet(store, config_for(store, buckets=[1]), "test", 1, 0)
    assert questions.too_large and not any(questions.answer_fits(query) for query in questions.too_large)


def test_a_query_that_no_canvas_holds_counts_as_wrong_with_shuffled_demonstrations_too(tmp_path):
    store = write_store(tmp_path / "d", side=5)
    config = config_for(store, buckets=[int(np.median(store.pair_side[store.task_pairs[:-1]]))])
    plain, shuffled = (
        EvaluationSet(store, config, "test", 1, 0, control) for control in ("none", "shuffled_demonstrations")
    )
    assert 0 < len(plain.too_large) < len(plain.queries) and plain.too_large == shuffled.too_large
    assert all(
        asked
        for asked, query in zip(shuffled.asked, shuffled.queries, strict=True)
        if query in shuffled.too_large
    )


def test_limits_take_the_first_tasks(fewshot):
    assert len(fewshot.tasks_of("train", 2)) == 2
    assert len(EvaluationSet(fewshot, config_for(fewshot), "test", 1, 0, max_tasks=2).tasks) == 2


def test_a_table_of_augmentations_must_exist(tmp_path):
    store = write_store(tmp_path / "d", num_aug=0)
    with pytest.raises(UserError, match="stores no augmentations"):
        EpisodeSampler(store, config_for(store, augmentation="table"), 0, 4)


def test_a_subset_may_be_asked_in_a_way_of_its_own(tmp_path):
    rng = np.random.default_rng(0)
    tasks = {name: [random_task(rng, f"{name}{i}", side=3) for i in range(4)] for name in "abt"}
    write_dataset(tmp_path / "d", tasks, ["t"], layout="fewshot", source="random", seed=0)
    store = Store.load(tmp_path / "d")
    sampler = EpisodeSampler(store, config_for(store, query_sampling={"a": "any", "b": "all"}), 0, 64)
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
        EpisodeSampler(store, config_for(store, query_sampling={"a": "any"}), 0, 64)


def test_subsets_are_drawn_in_their_shares(tmp_path):
    rng = np.random.default_rng(0)
    tasks = {
        name: [random_task(rng, f"{name}{i}", side=3) for i in range(count)]
        for name, count in (("a", 2), ("b", 8), ("c", 3), ("t", 1))
    }
    write_dataset(tmp_path / "d", tasks, ["t"], layout="fewshot", source="random", seed=0)
    store = Store.load(tmp_path / "d")
    sampler = EpisodeSampler(store, config_for(store, subset_shares={"a": 3, "b": 1, "c": 0}), 0, 64)
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
        EpisodeSampler(store, config_for(store, subset_shares={"a": 1, "b": 1}), 0, 64)


def test_colours_alone_are_drawn_afresh_for_every_episode(fewshot, tmp_path):
    samples = EpisodeSampler(fewshot, config_for(fewshot, augmentation="colours"), 0, 32).sample(0)
    assert not samples.transform.any() and len({tuple(colours) for colours in samples.colours}) == 32
    assert (samples.colours[:, 0] == 0).all() and (np.sort(samples.colours, axis=1) == np.arange(10)).all()
    assert EvaluationSet(fewshot, config_for(fewshot, augmentation="colours"), "test", 8, 0).num_views == 1


def test_a_folder_that_is_no_dataset_is_never_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="was not written by this command"):
        write_store(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "keep me"
    write_store(tmp_path / "d")
    write_store(tmp_path / "d", seed=1)


def test_the_build_leaves_nothing_behind_when_it_fails(tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        build(parse_arguments(["--input-dir", str(tmp_path / "none"), "--output-dir", str(tmp_path / "out")]))
    assert not any(tmp_path.iterdir())


def test_puzzle_rows_refuse_fresh_augmentations(puzzle):
    with pytest.raises(UserError, match="set data.augmentation to table or none"):
        SAMPLERS["puzzle"](puzzle, config_for(puzzle, augmentation="random"), 0, 4)
