"""What tools.info says of a dataset is what a plain count finds, and its page shows the batch itself."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from dataset import npy
from dataset.batch import DataConfig, materialise
from dataset.samplers import SAMPLERS
from dataset.store import Leak, Store
from dataset.task import Pair, Task
from dataset.views import EvaluationSet
from dataset.writer import write_dataset
from tests.support.grids import write_store
from tests.support.runs import load_config
from tests.support.thinking import write_sudokus
from tools import info, info_page, info_text

DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def small_config(store, **changes) -> DataConfig:
    return load_config(store).data.model_copy(update=changes)


def sudoku_store(folder):
    return write_sudokus(folder, train=4, test=2, num_aug=5)


def grid(rows: int, columns: int) -> np.ndarray:
    return np.ones((rows, columns), np.uint8)


def hand_made_store(folder):
    """`fits` shows and answers 4x4, `misses` answers 5x6 to 4x4, `large` shows 8x2, `open` is unlabelled."""
    shown = (Pair(grid(4, 4), grid(3, 3)),)
    train = [Task("t", (Pair(grid(2, 2), grid(2, 2)),), (Pair(grid(2, 2), grid(6, 6)),))]
    test = [
        Task("fits", shown, (Pair(grid(2, 2), grid(4, 4)),)),
        Task("misses", shown, (Pair(grid(2, 2), grid(5, 6)), Pair(grid(1, 4), grid(4, 1)))),
        Task("large", (Pair(grid(8, 2), grid(1, 1)),), (Pair(grid(1, 1), grid(1, 1)),)),
        Task("open", shown, (Pair(grid(4, 4), None),)),
    ]
    write_dataset(folder, {"a": train, "b": test}, ["b"], layout="fewshot", source="hand", seed=0)
    return Store.load(folder)


def test_counts_and_sizes_are_those_of_a_plain_count(tmp_path):
    store = write_store(tmp_path / "d", train=7, test=4, num_aug=3)
    told = info.describe(store, small_config(store))
    tasks = [store.task(index) for index in range(len(store.task_ids))]
    for name, start, stop in (("train", 0, 7), ("test", 7, 11)):
        chosen = tasks[start:stop]
        demonstrations, queries = (
            [p for t in chosen for p in t.demonstrations],
            [p for t in chosen for p in t.queries],
        )
        counts = told["counts"]["splits"][name]
        assert counts == {
            "tasks": len(chosen),
            "demonstrations": len(demonstrations),
            "queries": len(queries),
            "labelled_pairs": len(demonstrations) + len(queries),
            "unlabelled_pairs": 0,
        }
        subset = {"train": "a", "test": "b"}[name]
        assert told["counts"]["subsets"][subset] == {"split": name, **counts}
        means = told["grids"]["mean_cells"][name]
        assert means["demonstration_pair"] == pytest.approx(
            np.mean([p.input.size + p.output.size for p in demonstrations])
        )
        assert means["query_input"] == pytest.approx(np.mean([p.input.size for p in queries]))
        sides = [task.max_side for task in chosen]
        assert told["grids"]["longest_sides"][f"{name}_tasks"] == {
            str(side): sides.count(side) for side in sorted(set(sides))
        }
    longest = [max(g.shape) for task in tasks for pair in task.pairs for g in (pair.input, pair.output)]
    assert told["grids"]["longest_sides"]["grids"] == {
        str(side): longest.count(side) for side in sorted(set(longest))
    }


def test_augmentations_are_those_of_the_metadata_and_short_tasks_are_named(tmp_path):
    rng = np.random.default_rng(0)
    plain = Task(
        "plain", (Pair(grid(2, 2), grid(2, 2)),), (Pair(grid(2, 2), grid(2, 2)),)
    )  # one colour, fully symmetric
    rich = Task(
        "rich",
        *(tuple(Pair(*rng.integers(0, 10, (2, 5, 4)).astype(np.uint8)) for _ in range(2)) for _ in range(2)),
    )
    write_dataset(
        tmp_path / "d", {"a": [rich], "b": [plain]}, ["b"], layout="puzzle", source="hand", seed=0, num_aug=20
    )
    store = Store.load(tmp_path / "d")
    told = info.describe(store, small_config(store))["augmentations"]
    count = store.metadata.augmentations_per_task
    assert count["rich"] == 20 > count["plain"]
    assert told["short"] == {"plain": count["plain"]} and told["stored"] == sum(count.values())
    assert told["tasks_by_number_stored"] == {str(count["plain"]): 1, "20": 1}


def test_an_answer_beyond_its_canvas_is_a_miss(tmp_path):
    store = hand_made_store(tmp_path / "d")
    told = info.describe(store, small_config(store, buckets=[4, 6], canvas_margin=0))["canvas"]
    four, six, beyond = told["by_side"]
    assert (four["side"], six["side"], beyond["side"]) == (4, 6, None)
    shared = {"labelled_tasks": 2, "tasks_fit": 1}
    cells = (3 * (16 + 9) + 4 + 4 + 4 + 16) / (16 * (6 + 4))  # three tasks show a pair; four query inputs
    expected = {
        "tasks": 3,
        "queries": 4,
        "labelled_queries": 3,
        "answers_fit": 2,
        "real_cells": pytest.approx(cells),
        **shared,
    }
    assert four["test"] == expected
    assert six["test"]["tasks"] == 0 and six["test"]["real_cells"] is None
    assert six["train"]["tasks"] == 1  # a training task's canvas holds its answer
    assert (beyond["test"]["tasks"], beyond["test"]["answers_fit"], beyond["test"]["real_cells"]) == (
        1,
        0,
        None,
    )
    assert told["tasks_missed"] == ["large", "misses"] and told["total"]["test"]["tasks_fit"] == 1
    with_room = info.describe(store, small_config(store, buckets=[4, 6], canvas_margin=2))["canvas"]
    assert with_room["by_side"][1]["test"]["answers_fit"] == 3 and with_room["tasks_missed"] == ["large"]


@pytest.mark.parametrize("buckets", [[3, 5], [4], [5, 6]])
def test_coverage_is_the_one_of_the_evaluation(buckets, fewshot):
    config = small_config(fewshot, buckets=buckets)
    told = info.describe(fewshot, config)["canvas"]["total"]["test"]
    asked = EvaluationSet(fewshot, config, "test", 1, 0)
    assert told["queries"] == len(asked.queries)
    assert told["answers_fit"] == sum(asked.answer_fits(query) for query in asked.queries)


@pytest.mark.parametrize("layout", ["fewshot", "puzzle", "pairs"])
def test_the_page_holds_the_tokens_of_the_batch(layout, tmp_path, fewshot, puzzle):
    store = {
        "fewshot": lambda: fewshot,
        "puzzle": lambda: puzzle,
        "pairs": lambda: sudoku_store(tmp_path / "d"),
    }[layout]()
    config = small_config(
        store,
        augmentation="random" if layout == "fewshot" else "table",
        buckets=[4] if layout == "pairs" else [6],
    )
    info_page.write_page(tmp_path / "page.html", store, config, 4, seed=3)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    told = json.loads(DATA.search(page).group(1))
    sampler = SAMPLERS[layout](store, config, 3, 1)
    assert len(told["samples"]) == 4
    for step, shown in enumerate(told["samples"]):
        samples = sampler.sample(step)
        batch = materialise(samples, store, store.grid_table).data
        assert (
            shown["query"]["input"] == batch["inputs"][0].tolist()
            and shown["query"]["label"] == batch["labels"][0].tolist()
        )
        assert len(shown["demonstrations"]) == samples.bucket.demos and shown["side"] == samples.bucket.side
        for number, demonstration in enumerate(shown["demonstrations"]):
            assert demonstration["input"] == batch["demo_inputs"][0, number].tolist()
            assert demonstration["label"] == batch["demo_labels"][0, number].tolist()
        assert (
            store.identifiers[shown["identifier"]]
            == {"fewshot": shown["task"], "puzzle": shown["name"], "pairs": "<blank>"}[layout]
        )
        task = store.task(store.task_ids.index(shown["task"]))
        assert shown["stored"] == [[pair.input.tolist(), pair.output.tolist()] for pair in task.pairs]
        assert np.array_equal(store.pair(samples.query[0]).input, shown["stored"][shown["query"]["pair"]][0])
    assert not re.search(
        r"https?://|\b(src|href)\s*=|@import|url\(|\bfetch\(|\bimport\(|XMLHttpRequest|innerHTML", page
    )


def test_an_id_cannot_break_out_of_the_page(tmp_path):
    hostile = "</script><script>document.title = 'broken'</script>"
    task = Task(hostile, (Pair(grid(2, 2), grid(2, 2)),), (Pair(grid(2, 2), grid(2, 2)),))
    write_dataset(tmp_path / "d", {"a": [task], "b": []}, ["b"], layout="fewshot", source="hand", seed=0)
    store = Store.load(tmp_path / "d")
    info_page.write_page(tmp_path / "page.html", store, small_config(store, augmentation="none"), 1, 0)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("</script") == info_page.TEMPLATE.read_text(encoding="utf-8").count("</script")
    assert json.loads(DATA.search(page).group(1))["samples"][0]["task"] == hostile
    assert "no grids" in info_text.as_text(
        info.describe(store, small_config(store))
    )  # no evaluation task at all


def test_the_browser_draws_every_sample(tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    store = sudoku_store(tmp_path / "d")
    info_page.write_page(tmp_path / "page.html", store, small_config(store, buckets=[4]), 3, 0)
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    done = subprocess.run(
        [chromium, *flags, (tmp_path / "page.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    drawn = done.stdout.split("<main", 1)[1].split("</main>", 1)[0]
    assert drawn.count("<article>") == 3 and drawn.count('aria-label="query label, 4 rows by 4 columns"') == 3
    assert len(re.findall(r"<canvas[^>]* width=", drawn)) == drawn.count("<canvas") > 12


def test_the_command_prints_text_json_and_clear_errors(tmp_path, monkeypatch, capsys):
    def command(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["tools.info", *map(str, arguments)])
        info.main()
        return capsys.readouterr().out

    store = hand_made_store(tmp_path / "d")
    canvas = ("--buckets", "4", "6", "--canvas-margin", "0")
    text = command(store.path, *canvas)
    assert "an answer does not fit: large, misses" in text
    assert f"{store.metadata.sha256['tasks.npz']}  verified" in text
    told = json.loads(command(store.path, *canvas, "--json", "--page", tmp_path / "page.html"))
    assert told["content_hash"] == store.metadata.content_hash and told["canvas"]["tasks_missed"] == [
        "large",
        "misses",
    ]
    assert (tmp_path / "page.html").is_file()
    sides = json.loads(command(store.path, "--json"))["canvas"]["sides"]
    assert sides == [11, 15, 20, 25, 30]  # grids up to 30x30: data=arc1
    game = sudoku_store(tmp_path / "game")
    assert json.loads(command(game.path, "--json"))["canvas"]["sides"] == [4]
    (store.path / "tasks.npz").write_bytes(b"other")
    for arguments, message in (
        ([tmp_path / "nowhere"], "no dataset at"),
        ([store.path], "tasks.npz is damaged"),
        ([game.path, "--buckets", 6], "a game's grids fill their canvas"),
        ([game.path, "--data", "arc3"], "did you mean 'arc2'?"),
        ([game.path, "--samples", 0], "--samples must be >= 1"),
    ):
        with pytest.raises(SystemExit) as exit:
            command(*arguments)
        error = capsys.readouterr().err
        assert exit.value.code == 2 and message in error and error.count("\n") == 1


def test_leaks_and_left_out_tasks_are_reported(tmp_path):
    tasks = {
        name: [Task(f"{name}0", (Pair(grid(2, 2), grid(1, 2)),), (Pair(grid(2, 2), grid(2, 1)),))]
        for name in "ab"
    }
    leaks, left_out = [Leak(train_task="a0", test_task="b0")], {"oversized": [f"x{i}" for i in range(12)]}
    write_dataset(
        tmp_path / "d", tasks, ["b"], layout="fewshot", source="hand", seed=0, leaks=leaks, left_out=left_out
    )
    store = Store.load(tmp_path / "d")
    told = info.describe(store, small_config(store))
    assert told["leaks"] == [{"train_task": "a0", "test_task": "b0"}] and told["left_out"] == left_out
    text = info_text.as_text(told)
    assert "a0 = b0" in text and "transductive: " in text
    assert "12 for oversized: x0, x1" in text and "x9, ... 2 more" in text and "x10" not in text


@pytest.mark.parametrize("layout", ["fewshot", "puzzle"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_sanity_check_counts_what_an_export_holds(layout, split, tmp_path, monkeypatch, capsys):
    store = write_store(tmp_path / "d", layout=layout, train=4, test=3, num_aug=6, side=2)
    npy.export(store, tmp_path / "npy")
    names = ("inputs", "puzzle_indices", "group_indices")
    arrays = [np.load(tmp_path / "npy" / split / f"all__{name}.npy") for name in names]
    examples, puzzles, groups = len(arrays[0]), arrays[1], arrays[2]
    single = sum(int(puzzles[first + 1] - puzzles[first]) for first in groups[:-1])
    asked = json.loads((tmp_path / "npy" / "test_puzzles.json").read_text())
    queries = sum(len(task["test"]) for task in asked.values())
    monkeypatch.setattr("sys.argv", ["info", str(tmp_path / "d"), "--sanity", "--split", split])
    info.main()
    assert json.loads(capsys.readouterr().out) == {
        "data_dir": str(tmp_path / "d"),
        "total_augmented_examples": examples,
        "original_test_pairs": queries,
        "augmentations_per_original": examples / queries,
        "single_aug_kept_examples": single,
        "single_aug_examples_per_original": single / queries,
    }
    assert examples > single > 0
    if (layout, split) == ("puzzle", "test"):
        assert single == queries


def test_the_sanity_check_of_a_game_counts_its_copies(tmp_path):
    told = info.sanity(sudoku_store(tmp_path / "d"), "train")
    assert told["total_augmented_examples"] == 4 * (1 + 5) and told["single_aug_kept_examples"] == 4
    assert told["original_test_pairs"] == 2
