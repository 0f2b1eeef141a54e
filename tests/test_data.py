"""The store, leaks and the evaluation set."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dataset.batch import materialise, task_sides
from dataset.build_arc_dataset import build, parse_arguments
from dataset.canvas import IGNORE_LABEL_ID
from dataset.leaks import find_leaks
from dataset.store import Store
from dataset.task import Pair, Task
from dataset.views import EvaluationSet
from dataset.writer import write_dataset
from tests.support.grids import random_task, write_store
from tests.support.runs import data_config_of, run
from utils.errors import UserError
from utils.files import read_json


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
    with pytest.raises(UserError, match="format: game: .*the games are arc, maze, sudoku, found 'chess'$"):
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
@pytest.mark.parametrize("world, batch", [(1, 1), (1, 7), (2, 3), (3, 64), (4, 16)])
def test_every_evaluation_query_is_asked_exactly_once_per_view(layout, world, batch, fewshot, puzzle):
    store = {"fewshot": fewshot, "puzzle": puzzle}[layout]
    questions = EvaluationSet(store, data_config_of(store), "test", 3, 0)
    seen = Counter()
    for rank in range(world):
        for part in questions.batches(batch, rank, world):
            assert len(part.query) == batch
            seen.update(zip(part.query[: part.valid].tolist(), part.view[: part.valid].tolist(), strict=True))
    expected = {(number, view) for number in range(len(questions.queries)) for view in range(3)}
    assert set(seen) == expected and set(seen.values()) == {1}


def test_evaluation_never_reads_the_answers(fewshot):
    questions = EvaluationSet(fewshot, data_config_of(fewshot), "test", 2, 0)
    for part in questions.batches(8):
        assert (
            materialise(part.samples, fewshot, fewshot.grid_table, with_labels=False).data["labels"]
            == IGNORE_LABEL_ID
        ).all()


def test_shuffled_demonstrations_come_from_another_task_and_query_only_hides_them(fewshot):
    plain = EvaluationSet(fewshot, data_config_of(fewshot), "test", 1, 0)
    shuffled = EvaluationSet(fewshot, data_config_of(fewshot), "test", 1, 0, "shuffled_demonstrations")
    hidden = EvaluationSet(fewshot, data_config_of(fewshot), "test", 1, 0, "query_only")
    demos = {
        number: set(row)
        for part in plain.batches(1)
        for number, row in zip(part.query, part.samples.demos, strict=True)
    }
    for part in shuffled.batches(1):
        assert not demos[int(part.query[0])] & set(part.samples.demos[0])
    assert all(not part.samples.demo_mask.any() for part in hidden.batches(4))


def test_a_task_without_a_fitting_donor_is_left_out_of_the_shuffled_control(fewshot):
    alone = EvaluationSet(
        fewshot, data_config_of(fewshot), "test", 1, 0, "shuffled_demonstrations", max_tasks=1
    )
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
                task_sides(store, data_config_of(store, buckets=[9], canvas_margin=3)),
                strict=True,
            )
        )
        assert sides == {"t": 5, "other": 8}
    sides = dict(
        zip(
            store.task_ids,
            task_sides(store, data_config_of(store, buckets=[9], canvas_margin=1)),
            strict=True,
        )
    )
    assert sides["t"] == 3


def test_truncated_demonstrations_are_reported(fewshot):
    questions = EvaluationSet(fewshot, data_config_of(fewshot, max_demos=2), "test", 1, 0)
    assert questions.truncated and all(len(query.demos) <= 2 for query in questions.queries)


def test_an_answer_larger_than_the_canvas_is_known_to_be_a_miss(tmp_path):
    store = write_store(tmp_path / "d", side=5)
    questions = EvaluationSet(store, data_config_of(store, buckets=[1]), "test", 1, 0)
    assert questions.too_large and not any(questions.answer_fits(query) for query in questions.too_large)


def test_a_query_that_no_canvas_holds_counts_as_wrong_with_shuffled_demonstrations_too(tmp_path):
    store = write_store(tmp_path / "d", side=5)
    config = data_config_of(store, buckets=[int(np.median(store.pair_side[store.task_pairs[:-1]]))])
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
    assert len(EvaluationSet(fewshot, data_config_of(fewshot), "test", 1, 0, max_tasks=2).tasks) == 2


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
