"""Builders of Sudoku and maze datasets: generation, the ancestors' csv files, splits that share nothing."""

import io
import urllib.request
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest

from dataset import build_maze_dataset, build_sudoku_dataset, puzzle_writer
from dataset.generate import game_builder, maze, sudoku
from dataset.store import Store
from tests.support.grids import puzzle_of
from utils.errors import UserError

ONE_WAY = "x,#####|#S  #|### #|#  G#|#####,#####|#Soo#|###o#|#  G#|#####,4".replace("|", "")
TWO_WAYS = "x,#####|#S  #|# # #|#  G#|#####,#####|#Soo#|# #o#|#  G#|#####,4".replace("|", "")
SHORT = "x,#####|#S G#|#####|#####|#####,#####|#SoG#|#####|#####|#####,2".replace("|", "")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What a builder hands to the store."""
    record = SimpleNamespace(calls=[])

    def pack(splits, **described):
        record.calls.append(SimpleNamespace(splits=splits, **described))
        return SimpleNamespace(save=lambda output: None)

    monkeypatch.setattr(puzzle_writer, "pack", pack)
    return record


def build(module, written, *arguments: object) -> SimpleNamespace:
    module.build(module.parse_arguments(["--output-dir", "out", *map(str, arguments)]))
    return written.calls[-1]


def test_the_mazes_paths_and_lengths_are_as_asked(written):
    sizes = (
        "--side",
        20,
        "--train-puzzles",
        40,
        "--test-puzzles",
        30,
        "--loops",
        0.2,
        "--min-path-length",
        20,
    )
    some = build(build_maze_dataset, written, *sizes, "--paths", "unique")
    every = build(build_maze_dataset, written, *sizes, "--paths", "all", "--aug")
    assert "unique" in some.source and "all" in every.source and some.num_aug == 0 and every.num_aug == 7
    shares = []
    for call in (some, every):
        for mazes, answers in call.splits.values():
            marked, length, unique = maze.shortest_paths(mazes)
            assert length.min() >= 20 and np.array_equal(marked, answers)
            shares.append(unique.mean())
        assert [len(call.splits[split][0]) for split in ("train", "test")] == [40, 30]
    assert shares[:2] == [1, 1] and max(shares[2:]) < 1


def test_the_sudokus_are_as_asked(written):
    call = build(
        build_sudoku_dataset,
        written,
        "--size",
        6,
        "--train-puzzles",
        30,
        "--test-puzzles",
        9,
        "--min-difficulty",
        1,
        "--num-aug",
        5,
    )
    assert call.game == "sudoku" and call.num_aug == 5 and call.source == "generated: sudoku 6x6"
    for puzzles, answers in call.splits.values():
        solutions, guesses, found = sudoku.solve(puzzles)
        assert (solutions == 1).all() and guesses.min() >= 1 and np.array_equal(found, answers)
    assert all(isinstance(value, (str, int, float)) for value in call.details.values())


def test_the_number_of_workers_changes_nothing():
    make = partial(build_maze_dataset.make, side=8, loops=0.1, least=9, paths="unique")
    alone, shared = (game_builder.generate(make, 300, (7, 0), workers, "puzzles") for workers in (1, 2))
    other = game_builder.generate(make, 300, (8, 0), 1, "puzzles")
    assert (
        len(alone) == 300
        and np.array_equal(alone.inputs, shared.inputs)
        and np.array_equal(alone.answers, shared.answers)
    )
    assert np.array_equal(alone.rating, shared.rating) and not np.array_equal(alone.inputs, other.inputs)
    fewer = game_builder.generate(make, 50, (7, 0), 1, "puzzles")
    assert np.array_equal(fewer.inputs, alone.inputs[:50])


def test_the_same_seed_gives_the_same_sudokus(written):
    size = ("--size", 4, "--clues", 8, "--train-puzzles", 50, "--test-puzzles", 20)
    first, again, other = (build(build_sudoku_dataset, written, *size, "--seed", seed) for seed in (1, 1, 2))
    for split in ("train", "test"):
        assert np.array_equal(first.splits[split], again.splits[split])
        assert not np.array_equal(first.splits[split][0][:10], other.splits[split][0][:10])
    assert not np.array_equal(*(first.splits[split][0][:10] for split in ("train", "test")))


def test_no_training_puzzle_is_a_test_puzzle_in_disguise(written):
    """Of size 4 with 6 clues there are few puzzles up to symmetry: many are drawn twice."""
    arguments = ("--size", 4, "--clues", 6, "--train-puzzles", 400, "--test-puzzles", 60)
    call = build(build_sudoku_dataset, written, *arguments)
    dropped = call.details["dropped_train_puzzles"]
    assert dropped > 0 and len(call.splits["train"][0]) == 400 - dropped
    prints = {split: set(sudoku.fingerprints(*pair).tolist()) for split, pair in call.splits.items()}
    assert not prints["train"] & prints["test"] and call.details["distinct_test_puzzles"] == len(
        prints["test"]
    )
    smaller = build(build_sudoku_dataset, written, *arguments, "--subsample-size", 50)
    rows = {bytes(puzzle) for puzzle in call.splits["train"][0]}
    assert (
        len(smaller.splits["train"][0]) == 50
        and {bytes(puzzle) for puzzle in smaller.splits["train"][0]} <= rows
    )
    assert np.array_equal(smaller.splits["test"][0], call.splits["test"][0])
    with pytest.raises(UserError, match="equal a test puzzle up to symmetry"):
        build(build_sudoku_dataset, written, "--size", 4, "--train-puzzles", 5, "--test-puzzles", 600)


def test_what_cannot_be_generated_is_refused(written, monkeypatch):
    monkeypatch.setattr(game_builder, "MAX_BARREN_BLOCKS", 2)
    for module, arguments, message in (
        (build_sudoku_dataset, ("--size", 4, "--clues", 2), "only 0 of 1000 test puzzles found"),
        (build_maze_dataset, ("--side", 5, "--min-path-length", 99), "only 0 of 1000 test puzzles found"),
        (build_sudoku_dataset, ("--clues", 81), "--clues must be 1..80"),
        (
            build_sudoku_dataset,
            ("--min-difficulty", 3, "--max-difficulty", 2),
            "--min-difficulty <= --max-difficulty",
        ),
        (build_sudoku_dataset, ("--revision", "x"), "--revision goes with --source hub"),
        (build_maze_dataset, ("--input-dir", "x", "--side", 9), "--side goes with --source generated"),
        (build_maze_dataset, ("--paths", "given"), "goes with the ancestors"),
        (build_maze_dataset, ("--side", 4), "--side >= 5"),
        (build_maze_dataset, ("--workers", 0), "--workers must be >= 1"),
        (build_maze_dataset, ("--seed", -1), "--seed must be >= 0"),
    ):
        with pytest.raises(UserError, match=message):
            build(module, written, *arguments)
    assert not written.calls


def test_a_built_dataset_is_read_back_from_the_store(tmp_path):
    for module, game, arguments in (
        (build_sudoku_dataset, "sudoku", ("--size", 4, "--clues", 8, "--num-aug", 3)),
        (build_maze_dataset, "maze", ("--side", 8, "--paths", "all", "--aug")),
    ):
        folder = tmp_path / game
        options = ("--output-dir", folder, "--train-puzzles", 30, "--test-puzzles", 10, *arguments)
        splits = module.build(module.parse_arguments(list(map(str, options))))
        loaded = Store.load(folder)
        assert loaded.metadata.game == game and loaded.metadata.num_aug == {"sudoku": 3, "maze": 7}[game]
        assert loaded.metadata.details["distinct_test_puzzles"] <= 10
        for split in ("train", "test"):
            found = [loaded.pair(int(loaded.task_pairs[task])) for task in loaded.tasks_of(split)]
            assert np.array_equal([pair.input for pair in found], splits[split].inputs)
            assert np.array_equal([pair.output for pair in found], splits[split].answers)


def write_csv(folder: Path, train: list[str], test: list[str], header: str = "source,q,a,rating") -> Path:
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder


def sudoku_rows(count: int, seed: int) -> list[str]:
    puzzles, answers, _ = sudoku.generate(4, count, np.random.default_rng(seed), clues=8)
    texts = ["".join(map(str, cells.ravel())) for cells in (*puzzles, *answers)]
    return [
        f"made,{q.replace('0', '.')},{a},{i}"
        for i, (q, a) in enumerate(zip(texts[:count], texts[count:], strict=True))
    ]


def test_the_ancestors_sudoku_files_are_read_and_filtered(written, tmp_path):
    write_csv(tmp_path, sudoku_rows(20, 0), sudoku_rows(4, 9))
    call = build(build_sudoku_dataset, written, "--input-dir", tmp_path, "--min-difficulty", 2)
    assert call.source == tmp_path.name and len(call.splits["test"][0]) == 2
    assert len(call.splits["train"][0]) == 18 - call.details["dropped_train_puzzles"]
    q, a = sudoku_rows(4, 9)[2].split(",")[1:3]
    assert np.array_equal(call.splits["test"][0][0], puzzle_of(q)[0]) and np.array_equal(
        call.splits["test"][1][0], puzzle_of(a)[0]
    )


@pytest.mark.parametrize("paths, marks", [("given", [3, 3]), ("all", [3, 6]), ("unique", [3])])
def test_the_ancestors_maze_files_are_read_and_marked_as_asked(paths, marks, written, tmp_path):
    write_csv(tmp_path, [ONE_WAY, TWO_WAYS], [SHORT])
    call = build(build_maze_dataset, written, "--input-dir", tmp_path, "--paths", paths)
    drawn = [int((answer == maze.PATH).sum()) for answer in call.splits["train"][1]]
    assert drawn == marks and call.details["paths"] == paths
    assert (
        call.details["unique_shortest_paths_train_files"] == 1
        and call.details["unique_shortest_paths_test_files"] == 1
    )
    with pytest.raises(UserError, match="no puzzle is left in the test split"):
        build(build_maze_dataset, written, "--input-dir", tmp_path, "--paths", paths, "--min-path-length", 3)


EASY = sudoku_rows(1, 0)[0]
Q, A = EASY.split(",")[1:3]


def write_npy(folder: Path, inputs: np.ndarray, answers: np.ndarray, copies: int = 1) -> Path:
    """Both splits in the layout that the ancestors train on: `copies` examples of each puzzle."""
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        examples = np.arange(len(inputs) * copies + 1, dtype=np.int32)
        arrays = {"inputs": inputs, "labels": answers}
        tokens = {name: grids.reshape(len(grids), -1) + 1 for name, grids in arrays.items()}
        tokens = {name: np.repeat(rows, copies, axis=0) for name, rows in tokens.items()}
        tokens |= {"puzzle_indices": examples, "group_indices": examples[::copies]}
        for name, array in tokens.items():
            np.save(folder / split / f"all__{name}.npy", array)
    return folder


def test_the_arrays_that_ancestors_train_on_are_read_without_their_copies(written, tmp_path):
    puzzles, answers, _ = sudoku.generate(9, 12, np.random.default_rng(0))
    write_npy(tmp_path, puzzles[:4], answers[:4], copies=3)
    others = write_npy(tmp_path / "others", puzzles[4:], answers[4:])
    (tmp_path / "train").rename(tmp_path / "unused")
    (others / "train").rename(tmp_path / "train")
    call = build(build_sudoku_dataset, written, "--input-dir", tmp_path)
    assert np.array_equal(call.splits["test"][0], puzzles[:4])
    assert np.array_equal(call.splits["train"][1], answers[4:])
    assert call.details["copies_test_files"] == 8 and "copies_train_files" not in call.details
    with pytest.raises(UserError, match="hold no rating"):
        build(build_sudoku_dataset, written, "--input-dir", tmp_path, "--min-difficulty", 1)
    tokens = (answers[:4] + 1).repeat(3, 0).reshape(12, 81)
    tokens[3:6] = 0
    np.save(tmp_path / "test" / "all__labels.npy", tokens)
    with pytest.raises(UserError, match="example 3: labels has a token that is no cell"):
        build(build_sudoku_dataset, written, "--input-dir", tmp_path)
    np.save(tmp_path / "test" / "all__group_indices.npy", np.arange(9))
    with pytest.raises(UserError, match="do not belong together"):
        build(build_sudoku_dataset, written, "--input-dir", tmp_path)


def test_arrays_of_mazes_say_how_many_labels_follow_the_rule(written, tmp_path, capsys):
    mazes = maze.generate(7, 60, 0.3, 4, np.random.default_rng(1))
    paths = maze.first_paths(mazes)
    write_npy(tmp_path / "m", mazes[:5], paths[:5])
    tokens = mazes[5:].reshape(len(mazes) - 5, -1) + 1
    for name, array in (("inputs", tokens), ("labels", paths[5:].reshape(tokens.shape) + 1)):
        np.save(tmp_path / "m" / "train" / f"all__{name}.npy", array)
    for name in ("puzzle_indices", "group_indices"):
        np.save(tmp_path / "m" / "train" / f"all__{name}.npy", np.arange(len(tokens) + 1))
    call = build(build_maze_dataset, written, "--input-dir", tmp_path / "m")
    assert call.details["labels"] == "breadth_first"
    assert f"labels_by_rule_train_files: {len(tokens)} of {len(tokens)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "module, row, message",
    [
        (build_sudoku_dataset, "x,1,2", "line 3: expected 4 columns, found 3"),
        (build_sudoku_dataset, f"x,{Q},{A},many", "line 3: rating 'many' is not a whole number"),
        (build_sudoku_dataset, f"x,{Q},{A[:-1]},1", "line 3: a has 15 characters, expected 16"),
        (build_sudoku_dataset, f"x,{Q[:2]}x{Q[3:]},{A},1", "line 3: q has 'x' at position 3"),
        (build_sudoku_dataset, f"x,{'9' + Q[1:]},{A},1", "line 3: q has a digit beyond 4"),
        (build_sudoku_dataset, f"x,{Q},{A[::-1][:4] + A[4:]},1", "line 3: a is not a solved Sudoku"),
        (
            build_sudoku_dataset,
            f"x,{Q},{A.translate(str.maketrans('1234', '2341'))},1",
            "line 3: a changes a clue of q",
        ),
        (build_maze_dataset, ONE_WAY.replace("G", " "), "line 3: q needs exactly one G"),
        (
            build_maze_dataset,
            f"x,{ONE_WAY.split(',')[2]},{ONE_WAY.split(',')[2]},4",
            "line 3: q already shows a path",
        ),
        (
            build_maze_dataset,
            ONE_WAY.replace("Soo#", "So##"),
            "line 3: a differs from q in more than the path",
        ),
        (
            build_maze_dataset,
            ONE_WAY.replace(" ##  G", "###  G").replace("o##  G", "###  G"),
            "line 3: no path from S to G",
        ),
    ],
)
def test_a_malformed_csv_row_is_named(module, row, message, written, tmp_path):
    good = EASY if module is build_sudoku_dataset else ONE_WAY
    write_csv(tmp_path, [good, row], [good])
    with pytest.raises(UserError, match=f"train.csv, {message}"):
        build(module, written, "--input-dir", tmp_path)
    assert not written.calls


def test_csv_files_that_are_missing_empty_or_of_another_kind_are_named(written, tmp_path):
    with pytest.raises(UserError, match="no such file: .*test.csv"):
        build(build_sudoku_dataset, written, "--input-dir", tmp_path)
    write_csv(tmp_path, [EASY], [EASY], header="question,answer")
    with pytest.raises(
        UserError, match="test.csv, line 1: expected the columns source,q,a,rating, found question,answer"
    ):
        build(build_sudoku_dataset, written, "--input-dir", tmp_path)
    write_csv(tmp_path, [EASY], [])
    with pytest.raises(UserError, match="test.csv: no puzzle in it passes the filters"):
        build(build_sudoku_dataset, written, "--input-dir", tmp_path)
    five = "1" * 25
    write_csv(tmp_path, [EASY], [f"x,{five},{five},1"])
    with pytest.raises(UserError, match="grids of 5x5 cells"):
        build(build_sudoku_dataset, written, "--input-dir", tmp_path)


def serve(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], cut: int = 0) -> list[str]:
    """Answer downloads from `files`, `cut` bytes short of what is announced; the addresses asked for."""
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        content = files[url.rsplit("/", 1)[1]]
        response = io.BytesIO(content[: len(content) - cut])
        response.headers = {"Content-Length": str(len(content))}
        return response

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def test_the_hub_gives_the_same_as_its_files(written, tmp_path, monkeypatch):
    write_csv(tmp_path, [ONE_WAY, TWO_WAYS], [SHORT])
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    asked = serve(monkeypatch, files)
    local = build(build_maze_dataset, written, "--input-dir", tmp_path)
    remote = build(build_maze_dataset, written, "--source", "hub")
    assert asked[-1] == "https://huggingface.co/datasets/sapientinc/maze-30x30-hard-1k/resolve/main/train.csv"
    assert "sapientinc/maze-30x30-hard-1k@main" in remote.source and remote.details == local.details
    assert np.array_equal(remote.splits["train"][1], local.splits["train"][1])
    serve(monkeypatch, files, cut=5)
    with pytest.raises(UserError, match="the connection ended after .* bytes"):
        build(build_maze_dataset, written, "--source", "hub")


def test_without_a_network_the_hub_names_the_file_and_the_alternatives(written, monkeypatch):
    def refuse(url, timeout):
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(
        UserError,
        match="(?s)org/name/resolve/v1/test.csv: Temporary failure.*--input-dir.*--source generated",
    ):
        build(
            build_sudoku_dataset, written, "--source", "hub", "--source-repo", "org/name", "--revision", "v1"
        )


def test_numbers_are_counted_in_ranges_of_powers_of_two():
    assert (
        game_builder.histogram(np.array([0, 0, 1, 2, 3, 4, 7, 8, 100]))
        == "0: 2, 1: 1, 2-3: 2, 4-7: 2, 8-15: 1, 64-127: 1"
    )
