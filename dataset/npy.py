"""Datasets in the ancestors' .npy layout, written and read.

    python -m dataset.npy export DATASET FOLDER
    python -m dataset.npy import FOLDER DATASET

The files of the layout:

    {train,test}/all__inputs.npy, all__labels.npy    (N, C * C) uint8 tokens, one row per example
    {train,test}/all__puzzle_identifiers.npy         (puzzles,) int32
    {train,test}/all__puzzle_indices.npy             (puzzles + 1,) int32 first example of each puzzle
    {train,test}/all__group_indices.npy              (groups + 1,) int32 first puzzle of each group (task)
    {train,test}/all__num_demos.npy                  (puzzles,) int32 demonstrations, which come first;
                                                     few-shot layout only
    {train,test}/dataset.json, identifiers.json, test_puzzles.json

Every augmentation is written out, task by task into memory maps; 1000 per ARC task are some 7 GB. As in the
original, each training example of a puzzle is translated by its own offset. One of them stays in the corner.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataset import augment, canvas, writer
from dataset.canvas import TRANSPOSES
from dataset.games import GAMES
from dataset.layouts import LayoutName
from dataset.leaks import find_leaks
from dataset.store import SPLITS, TEST, Metadata, Store
from dataset.task import MAX_SIDE, Pair, Task
from utils.arguments import parser_of
from utils.errors import UserError, reports_user_errors
from utils.files import directory_written_whole, read_json, write_json

SET_NAME = "all"
_INDICES = ("puzzle_identifiers", "puzzle_indices", "group_indices")


@dataclass
class Group:
    """What one task contributes to a split: its pairs, in file order, under each of its view rows."""

    task: int
    pairs: np.ndarray
    view_rows: np.ndarray


def export(source: Store, output: Path, seed: int = 0) -> None:
    """Write `source` in the ancestors' layout.

    puzzle: training holds all pairs of training tasks and the demonstrations of evaluation tasks. Test holds
        their queries.
    fewshot: each split holds its own tasks, demonstrations before queries.
    pairs: each split holds one example per stored augmentation.

    A query without a known answer gets labels of padding only, which every loader ignores.
    """
    side = MAX_SIDE if source.metadata.game == "arc" else source.grids.shape[1]
    with directory_written_whole(output, marker="identifiers.json") as folder:
        for name in SPLITS:
            groups = list(groups_of(source, name))
            if groups:
                _export_split(
                    source,
                    folder / name,
                    groups,
                    side,
                    seed,
                    translate=name == "train" and source.metadata.game == "arc",
                )
        for name in ("identifiers.json", "test_puzzles.json"):
            if (source.path / name).is_file():
                write_json(folder / name, read_json(source.path / name))


def groups_of(source: Store, split: str) -> Iterator[Group]:
    """What each task contributes to a split of the ancestors' layout."""
    for task in range(len(source.task_ids)):
        first, end = int(source.task_pairs[task]), int(source.task_pairs[task + 1])
        border = first + int(source.task_demonstrations[task])
        tested = source.task_split[task] == TEST
        # With learned rows an evaluation task belongs to both splits.
        if source.layout.learns_rows and tested:
            pairs = range(first, border) if split == "train" else range(border, end)
        elif tested == (split == "test"):
            pairs = range(first, end)
        else:
            continue
        if pairs:
            # A game's copies are not stored: its only view row stands for all of them.
            copies = source.metadata.num_aug + 1 if source.layout.shares_rule and split == "train" else 1
            view_rows = np.arange(source.task_rows[task], source.task_rows[task + 1]).repeat(copies)
            yield Group(task, np.array(pairs), view_rows)


def _export_split(
    source: Store, folder: Path, groups: list[Group], side: int, seed: int, translate: bool
) -> None:
    folder.mkdir()
    puzzles = sum(len(group.view_rows) for group in groups)
    examples = sum(len(group.view_rows) * len(group.pairs) for group in groups)
    arrays = {
        name: open_memmap(_file(folder, name), "w+", np.uint8, (examples, side * side))
        for name in ("inputs", "labels")
    }
    written = 0
    for group in groups:
        inputs, labels = _draw(
            source, group, side, augment.task_rng(seed, source.task_ids[group.task]), translate
        )
        arrays["inputs"][written : written + len(inputs)] = inputs
        arrays["labels"][written : written + len(labels)] = labels
        written += len(inputs)
    for array in arrays.values():
        array.flush()
    sizes = np.concatenate([np.full(len(group.view_rows), len(group.pairs)) for group in groups])
    indices = {
        "puzzle_identifiers": np.concatenate([source.identifiers_of(group.view_rows) for group in groups]),
        "puzzle_indices": np.concatenate([[0], np.cumsum(sizes)]),
        "group_indices": np.cumsum([0] + [len(group.view_rows) for group in groups]),
    }
    if source.layout.reads_demonstrations:
        indices["num_demos"] = np.concatenate(
            [np.full(len(group.view_rows), source.task_demonstrations[group.task]) for group in groups]
        )
    for name, values in indices.items():
        np.save(_file(folder, name), values.astype(np.int32))
    about = {
        "pad_id": canvas.PAD,
        "ignore_label_id": canvas.PAD,
        "blank_identifier_id": 0,
        "vocab_size": source.game.vocabulary.size,
        "seq_len": side * side,
        "num_puzzle_identifiers": source.metadata.num_puzzle_identifiers,
        "total_groups": len(groups),
        "mean_puzzle_examples": examples / puzzles,
        "total_puzzles": puzzles,
        "sets": [SET_NAME],
    }
    write_json(folder / "dataset.json", about)


def _draw(
    source: Store, group: Group, side: int, rng: np.random.Generator, translate: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (views * pairs, side * side) of inputs and of labels, all pairs of a view together."""
    views, each = len(group.view_rows), len(group.pairs)
    transform = source.dihedral[group.view_rows].astype(np.int64)
    colours, order = source.colours[group.view_rows], None
    if source.layout.shares_rule and views > 1:
        copies = source.game.stored_symmetries(
            source.metadata.seed, np.full(views, group.task), np.arange(views), side
        )
        transform, colours, order = copies.transform, copies.colours, copies.order
    pairs = np.tile(group.pairs, views)
    transform, colours = transform.repeat(each), colours.repeat(each, axis=0)
    known = source.pair_output[pairs] >= 0
    inputs, outputs = source.pair_input[pairs], np.where(known, source.answers_under(pairs, transform), 0)
    offset = np.zeros((len(pairs), 2), np.int64)
    if translate:
        extent = np.maximum(
            source.shapes[inputs], np.where(known[:, None], source.shapes[outputs], 0)
        ).astype(np.int64)
        extent = np.where(TRANSPOSES.numpy()[transform][:, None], extent[:, ::-1], extent)
        offset = (rng.random((len(pairs), 2)) * (side - extent + 1)).astype(np.int64)
        # Of each view one example, drawn at random, stays where evaluation shows it.
        corner = rng.integers(0, each, views) + np.arange(views) * each
        offset[corner] = 0

    def tokens(grids: np.ndarray) -> np.ndarray:
        return canvas.render(
            source.grid_table,
            torch.from_numpy(grids.astype(np.int64)),
            torch.from_numpy(transform),
            torch.from_numpy(colours),
            torch.from_numpy(offset),
            side,
            source.game.vocabulary,
            None if order is None else torch.from_numpy(order.repeat(each, axis=0)),
        ).numpy()

    return tokens(inputs), tokens(outputs) * known[:, None].astype(np.uint8)  # PAD is 0


def import_(folder: Path, output: Path) -> Metadata:
    """Read an ARC dataset in the ancestors' layout and write it as ours, with the same identifiers.

    The layout is `fewshot` if num_demos.npy says which pairs are demonstrations, else `puzzle`. There the
    original mixes a training task's demonstrations and queries, and its last pair is taken as the query. A
    pair that training and evaluation share makes the dataset `transductive`.

    The ancestors store one black cell, [[0]], for a missing solution. Such an evaluation answer becomes
    unknown, and `details` names its task.

    Raises `UserError` for other games, and for missing or contradictory files.
    """
    start, augmentations = writer.read_identifiers(folder / "identifiers.json")
    names = read_json(folder / "identifiers.json")
    read = {split: _read_split(folder / split, names) for split in SPLITS if (folder / split).is_dir()}
    fewshot = any(demonstrations is not None for _, demonstrations in read.values())
    if fewshot and any(demonstrations is None for _, demonstrations in read.values()):
        raise UserError(f"{folder}: one split has all__num_demos.npy and the other has not")
    tasks: dict[str, list[Task]] = {"train": [], "test": []}
    unknown: list[str] = []
    for task_id in augmentations:
        train, test = (read[split][0].get(task_id, []) if split in read else [] for split in SPLITS)
        split, pairs = "test" if test else "train", train + test
        demonstrations = read[split][1] if pairs else None
        # Without num_demos.npy the training file of a test task holds its demonstrations alone.
        count = demonstrations[task_id] if demonstrations else len(train) - (split == "train")
        if not 0 < count < len(pairs):
            raise UserError(
                f"{folder}: puzzle {task_id} needs a demonstration and a query; "
                f"{count} of its {len(pairs)} examples are demonstrations"
            )
        queries = tuple(pairs[count:])
        if split == "test":
            queries = tuple(
                Pair(query.input, None) if _is_placeholder(query.output) else query for query in queries
            )
            unknown += [task_id] * any(_is_placeholder(query.output) for query in pairs[count:])
        tasks[split].append(Task(task_id, tuple(pairs[:count]), queries))
    layout: LayoutName = "fewshot" if fewshot else "puzzle"
    return writer.write_dataset(
        output,
        tasks,
        ["test"],
        layout=layout,
        leaks=find_leaks(tasks["train"], tasks["test"], layout),
        source=f"npy: {folder.resolve().name}",
        seed=0,
        num_aug=max(len(index) for index, _ in augmentations.values()) - 1,
        identifiers_start=start,
        augmentations=augmentations,
        details={"unknown_answers": unknown} if unknown else {},
    )


def _is_placeholder(answer: np.ndarray | None) -> bool:
    return answer is not None and answer.shape == (1, 1) and not answer.any()


def _read_split(folder: Path, names: list[str]) -> tuple[dict[str, list[Pair]], dict[str, int] | None]:
    """The pairs of each task's unaugmented puzzle, and its number of demonstrations.

    The latter is None if the files do not say it. Raises `UserError` if they do not belong together.
    """
    about = read_json(folder / "dataset.json")
    size = GAMES["arc"].vocabulary.size
    if not isinstance(about, dict) or about.get("vocab_size") != size or about.get("seq_len") != MAX_SIDE**2:
        raise UserError(
            f"{folder}/dataset.json: expected an ARC dataset (vocab_size {size}, seq_len {MAX_SIDE**2})"
        )
    try:
        inputs, labels = (np.load(_file(folder, name), mmap_mode="r") for name in ("inputs", "labels"))
        identifiers, first, _ = (np.load(_file(folder, name)) for name in _INDICES)
        num_demos = np.load(_file(folder, "num_demos")) if _file(folder, "num_demos").is_file() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot read the dataset's arrays: {error}") from None
    fits = len(inputs) == len(labels) and len(first) == len(identifiers) + 1 and first[-1] == len(inputs)
    if (
        not fits
        or identifiers.max(initial=0) >= len(names)
        or (num_demos is not None and len(num_demos) != len(identifiers))
    ):
        raise UserError(f"{folder}: the arrays and identifiers.json do not belong together")
    pairs, demonstrations = {}, {}
    for puzzle, identifier in enumerate(identifiers.tolist()):
        name = names[identifier]
        if augment.NAME_SEPARATOR in name:  # an augmented copy says nothing new
            continue
        examples = range(first[puzzle], first[puzzle + 1])
        pairs[name] = [
            Pair(
                _grid(inputs[i], f"{folder}: input {i}"),
                _grid(labels[i], f"{folder}: label {i}") if labels[i].any() else None,
            )
            for i in examples
        ]
        if num_demos is not None:
            demonstrations[name] = int(num_demos[puzzle])
    return pairs, None if num_demos is None else demonstrations


def _grid(tokens: np.ndarray, place: str) -> np.ndarray:
    try:
        return canvas.undraw(tokens)[0]
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None


def _file(folder: Path, name: str) -> Path:
    return folder / f"{SET_NAME}__{name}.npy"


@reports_user_errors
def main() -> None:
    parser = parser_of("dataset.npy", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    exporting = commands.add_parser("export", help="write a dataset in the ancestors' layout")
    exporting.add_argument("dataset", type=Path)
    exporting.add_argument("folder", type=Path)
    exporting.add_argument("--seed", type=int, default=0, help="of the translations")
    importing = commands.add_parser("import", help="read the ancestors' layout")
    importing.add_argument("folder", type=Path)
    importing.add_argument("dataset", type=Path)
    options = parser.parse_args()
    if options.command == "export":
        export(Store.load(options.dataset), options.folder, options.seed)
        print(f"{options.folder}: exported")
    else:
        metadata = import_(options.folder, options.dataset)
        counts = ", ".join(f"{count} {name}" for name, count in metadata.subsets.items())
        print(
            f"{options.dataset}: {counts} tasks, layout {metadata.layout}, protocol {metadata.protocol}, "
            f"{metadata.num_puzzle_identifiers} puzzle identifiers"
        )
        if unknown := metadata.details.get("unknown_answers"):
            first = ", ".join(unknown[:10]) + (", ..." if len(unknown) > 10 else "")
            print(
                f"{len(unknown)} evaluation tasks have an answer of one black cell, "
                f"which stands for a missing one: unknown in {first}"
            )
        if metadata.leaks:
            print(
                f"{len(metadata.leaks)} pairs of tasks share a pair between training and evaluation; "
                "python -m tools.info lists them"
            )


if __name__ == "__main__":
    main()
