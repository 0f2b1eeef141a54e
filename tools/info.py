"""What a dataset holds, and what a model sees of it: python -m tools.info data/arc1 [--json] [--page samples.html]

Counts, grid sizes, augmentations, hashes, leaks, and how the evaluation tasks fit their canvases; --page draws training
samples from the very tensors that a model gets, beside the tasks as they are stored.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from config import compose
from dataset import augment
from dataset.batch import DataConfig, Samples, materialise, task_sides
from dataset.canvas import smallest_bucket
from dataset.games import GAMES
from dataset.generate import sudoku
from dataset.layouts import LAYOUTS
from dataset.samplers import SAMPLERS
from dataset.store import SPLITS, TEST, Store
from utils.arguments import parser_of
from utils.errors import UserError, reports_user_errors
from utils.files import json_in_page, write_atomically

TEMPLATE = Path(__file__).with_name("info_template.html")
PLACEHOLDER = "__INFO_DATA__"
LISTED = 10  # ids that the terminal shows of a list; --json has them all
MEANING = {
    **{name: game.meaning for name, game in GAMES.items()},
    **{name: layout.meaning for name, layout in LAYOUTS.items()},
    "inductive": "no evaluation task shares a pair with training, up to rotation, reflection and recolouring",
    "transductive": "something of the evaluation tasks is in training, and every score has to say so",
}


class _Pairs:
    """Per pair (P,): task, whether it is a demonstration, whether its answer is known, cells of its input and output."""

    def __init__(self, source: Store):
        self.task = np.repeat(np.arange(len(source.task_ids)), np.diff(source.task_pairs))
        self.demonstration = (
            np.arange(len(self.task)) - source.task_pairs[self.task] < source.task_demonstrations[self.task]
        )
        self.labelled = source.pair_output >= 0
        cells = source.shapes.prod(axis=1, dtype=np.int64)
        self.cells = np.stack(
            [cells[source.pair_input], np.where(self.labelled, cells[source.pair_output], 0)], axis=1
        )  # (P, 2)


def overrides_for(
    source: Store, data: str | None, buckets: list[int] | None, margin: int | None
) -> list[str]:
    """What a training run on this dataset says of its data on the command line.

    Without a configuration of config/data named `data`, the one that suits the dataset. Raises `UserError` for a canvas
    that a game does not have.
    """
    metadata = source.metadata
    overrides = [f"data={data or _suitable(source)}"]
    if not data and not source.layout.reads_demonstrations:
        overrides.append(f"data.augmentation={'table' if metadata.num_aug else 'none'}")
    if source.layout.shares_rule:
        if buckets or margin is not None:
            raise UserError(
                f"{source.path}: --buckets and --canvas-margin are for tasks of many sizes; a game's grids fill their canvas"
            )
        buckets, margin = [metadata.max_grid_size], 0
    if buckets:
        overrides += ["data.canvas=task", f"data.buckets={buckets}"]
    return overrides + ([f"data.canvas_margin={margin}"] if margin is not None else [])


def _suitable(source: Store) -> str:
    if source.layout.learns_rows:
        return "arc1_puzzle"
    return "arc1_small" if source.metadata.max_grid_size <= 10 else "arc1"


def describe(source: Store, config: DataConfig) -> dict[str, Any]:
    """Everything the command prints, as JSON values; `config` says which canvases there are."""
    pairs = _Pairs(source)
    return {
        "path": str(source.path),
        **source.metadata.model_dump(exclude={"format", "subsets", "num_aug", "augmentations_per_task"}),
        "content_hash": source.metadata.content_hash,
        "counts": _counts(source, pairs),
        "grids": _grids(source, pairs),
        "augmentations": _augmentations(source),
        "canvas": _canvas(source, pairs, config),
    }


def _counts(source: Store, pairs: _Pairs) -> dict[str, dict]:
    def count(tasks: np.ndarray) -> dict[str, int]:
        chosen = tasks[pairs.task]
        return {
            "tasks": int(tasks.sum()),
            "demonstrations": int((chosen & pairs.demonstration).sum()),
            "queries": int((chosen & ~pairs.demonstration).sum()),
            "labelled_pairs": int((chosen & pairs.labelled).sum()),
            "unlabelled_pairs": int((chosen & ~pairs.labelled).sum()),
        }

    test = source.metadata.test_subsets
    return {
        "all": count(np.ones(len(source.task_ids), bool)),
        "splits": {name: count(source.task_split == split) for name, split in SPLITS.items()},
        "subsets": {
            name: {"split": "test" if name in test else "train", **count(source.task_subset == i)}
            for i, name in enumerate(source.subset_names)
        },
    }


def _grids(source: Store, pairs: _Pairs) -> dict[str, dict]:
    longest = np.maximum.reduceat(source.pair_side.max(axis=1), source.task_pairs[:-1])
    split = source.task_split[pairs.task]
    queries = ~pairs.demonstration
    return {
        "longest_sides": {
            "grids": _histogram(source.shapes.max(axis=1)),
            **{
                f"{name}_tasks": _histogram(longest[source.task_split == value])
                for name, value in SPLITS.items()
            },
        },
        "mean_cells": {
            name: {
                "demonstration_pair": _mean(pairs.cells[pairs.demonstration & (split == value)].sum(axis=1)),
                "query_input": _mean(pairs.cells[queries & (split == value), 0]),
            }
            for name, value in SPLITS.items()
        },
    }


def _augmentations(source: Store) -> dict[str, Any]:
    stored = np.diff(source.task_rows) - 1
    wanted = (
        source.metadata.num_aug if not source.layout.shares_rule else 0
    )  # a game computes its copies, see `write_pairs`
    return {
        "num_aug": source.metadata.num_aug,
        "stored": int(stored.sum()),
        "tasks_by_number_stored": _histogram(stored),
        "short": {source.task_ids[task]: int(stored[task]) for task in np.flatnonzero(stored < wanted)},
    }


def _canvas(source: Store, pairs: _Pairs, config: DataConfig) -> dict[str, Any]:
    """How many answers fit the canvas that is chosen without looking at them, and how full the canvases are.

    `real_cells`: the share of canvas cells that demonstrations and query inputs cover. `answers_fit` and `tasks_fit` count
    labelled queries, and the tasks that have one and none whose answer does not fit. Side null: larger than every canvas.
    """
    needed, number = np.unique(task_sides(source, config), return_inverse=True)
    canvas = np.array([smallest_bucket(int(side), config.sides) or 0 for side in needed])[
        number
    ]  # (T,), 0: none is large enough
    scored = ~pairs.demonstration & pairs.labelled
    fits = (
        source.pair_side[:, 1] <= canvas[pairs.task]
    )  # never where there is no canvas: a labelled answer has a side

    def per_task(values: np.ndarray) -> np.ndarray:
        return np.bincount(pairs.task, values, minlength=len(canvas)).astype(np.int64)

    queries, labelled, fitting = per_task(~pairs.demonstration), per_task(scored), per_task(scored & fits)
    cells = per_task(pairs.cells[:, 0] + pairs.cells[:, 1] * pairs.demonstration)
    room = per_task(1 + pairs.demonstration) * canvas**2

    def count(tasks: np.ndarray) -> dict[str, Any]:
        placed = tasks & (canvas > 0)
        return {
            "tasks": int(tasks.sum()),
            "queries": int(queries[tasks].sum()),
            "labelled_queries": int(labelled[tasks].sum()),
            "answers_fit": int(fitting[tasks].sum()),
            "labelled_tasks": int((labelled[tasks] > 0).sum()),
            "tasks_fit": int(((labelled > 0) & (labelled == fitting))[tasks].sum()),
            "real_cells": float(cells[placed].sum() / room[placed].sum()) if placed.any() else None,
        }

    test = source.task_split == TEST
    return {
        "canvas": config.canvas,
        "sides": list(config.sides),
        "margin": config.canvas_margin,
        "by_side": [
            {
                "side": side,
                **{
                    name: count((source.task_split == split) & (canvas == (side or 0)))
                    for name, split in SPLITS.items()
                },
            }
            for side in (*config.sides, None)
        ],
        "total": {name: count(source.task_split == split) for name, split in SPLITS.items()},
        "tasks_missed": [source.task_ids[task] for task in np.flatnonzero(test & (labelled > fitting))],
    }


def _histogram(values: np.ndarray) -> dict[str, int]:
    return {
        str(value): int(count) for value, count in zip(*np.unique(values, return_counts=True), strict=True)
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def as_text(info: dict[str, Any]) -> str:
    """`describe`'s dictionary for a terminal."""
    blocks = [
        _facts_text(info),
        _counts_text(info["counts"]),
        _grids_text(info["grids"]),
        _augmentations_text(info),
        _canvas_text(info),
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks)


def _facts_text(info: dict[str, Any]) -> list[str]:
    leaks = [f"{leak['train_task']} = {leak['test_task']}" for leak in info["leaks"]]
    lines = [
        ("dataset", info["path"]),
        ("source", f"{info['source']}, seed {info['seed']}, grids up to {info['max_grid_size']} a side"),
        *((key, f"{info[key]}: {MEANING[info[key]]}") for key in ("game", "layout", "protocol")),
        *((f"  {key}", json.dumps(value)) for key, value in info["details"].items()),
        ("leaks", f"{len(leaks)} (training task = evaluation task): {_some(leaks)}" if leaks else "none"),
        *(("left out", f"{len(ids)} for {reason}: {_some(ids)}") for reason, ids in info["left_out"].items()),
        ("content", info["content_hash"]),
        *((f"  {name}", f"{digest}  verified") for name, digest in info["sha256"].items()),
    ]
    width = max(len(name) for name, _ in lines)
    return [f"{name:{width}}  {value}" for name, value in lines]


def _counts_text(counts: dict[str, dict]) -> list[str]:
    keys = ["tasks", "demonstrations", "queries", "labelled_pairs", "unlabelled_pairs"]
    rows = [["", *(key.replace("_", " ") for key in keys)]]
    for split, total in counts["splits"].items():
        rows.append([split, *(_number(total[key]) for key in keys)])
        rows += [
            [f"  {name}", *(_number(subset[key]) for key in keys)]
            for name, subset in counts["subsets"].items()
            if subset["split"] == split
        ]
    return _aligned([*rows, ["all", *(_number(counts["all"][key]) for key in keys)]])


def _grids_text(grids: dict[str, dict]) -> list[str]:
    histograms = grids["longest_sides"]
    largest = max(int(side) for histogram in histograms.values() for side in histogram)
    step = 1 if largest <= 10 else -(-largest // 30) * 5
    rows = [["longest side", "grids", "", "train tasks", "", "test tasks", ""]]
    for first in range(1, largest + 1, step):
        inside = range(first, first + step)
        row = [str(first) if step == 1 else f"{first}-{inside[-1]}"]
        for histogram in histograms.values():
            count = sum(histogram.get(str(side), 0) for side in inside)
            row += [_number(count), _percent(count, sum(histogram.values()))]
        if row[1] != "0":
            rows.append(row)
    for name, means in grids["mean_cells"].items():
        shown = [f"{mean:.1f} per {key.replace('_', ' ')}" for key, mean in means.items() if mean is not None]
        rows.append([f"cells, {name}: {', '.join(shown)}"] if shown else [f"cells, {name}: no grids"])
    return _aligned(rows)


def _augmentations_text(info: dict[str, Any]) -> list[str]:
    table = info["augmentations"]
    if LAYOUTS[info["layout"]].shares_rule:
        return [
            f"augmentations  {_number(table['num_aug'])} of each training puzzle, computed from the seed; none is stored"
        ]
    by_number = table["tasks_by_number_stored"].items()
    histogram = [
        f"{_number(tasks)} {'task has' if tasks == 1 else 'tasks have'} {count}" for count, tasks in by_number
    ]
    lines = [
        f"augmentations  {_number(table['stored'])} stored, {_number(table['num_aug'])} asked for per task; "
        f"{_number(info['num_puzzle_identifiers'])} puzzle identifiers",
        f"               {_some(histogram[::-1])}",
    ]
    short = [
        f"{task_id} ({count})"
        for task_id, count in sorted(table["short"].items(), key=lambda entry: entry[1])
    ]
    return lines + (
        [f"               {_number(len(short))} short of {_number(table['num_aug'])}: {_some(short)}"]
        if short
        else []
    )


def _canvas_text(info: dict[str, Any]) -> list[str]:
    canvas = info["canvas"]
    rows = [
        [
            "canvas side",
            "train tasks",
            "real cells",
            "test tasks",
            "queries",
            "labelled",
            "answer fits",
            "",
            "real cells",
        ]
    ]
    for name, line in [
        *((line["side"] or "too large", line) for line in canvas["by_side"]),
        ("all", canvas["total"]),
    ]:
        train, test = line["train"], line["test"]
        if name == "too large" and not train["tasks"] + test["tasks"]:
            continue
        full = [
            "-" if split["real_cells"] is None else f"{100 * split['real_cells']:.1f} %"
            for split in (train, test)
        ]
        counted = [_number(test[key]) for key in ("tasks", "queries", "labelled_queries", "answers_fit")]
        share = _percent(test["answers_fit"], test["labelled_queries"])
        rows.append([str(name), _number(train["tasks"]), full[0], *counted, share, full[1]])
    total = canvas["total"]["test"]
    summary = (
        f"canvas={canvas['canvas']}, margin {canvas['margin']}; every answer fits: {_number(total['tasks_fit'])} of "
        f"{_number(total['labelled_tasks'])} labelled test tasks{_percent(total['tasks_fit'], total['labelled_tasks'], ' ({})')}"
    )
    missed = canvas["tasks_missed"]
    return _aligned(rows) + [summary] + ([f"an answer does not fit: {_some(missed)}"] if missed else [])


def _number(value: int) -> str:
    return f"{value:,}"


def _percent(part: int, whole: int, form: str = "{}") -> str:
    return form.format(f"{100 * part / whole:.1f} %") if whole else ""


def _some(items: list[str]) -> str:
    more = f", ... {_number(len(items) - LISTED)} more (--json lists all)" if len(items) > LISTED else ""
    return ", ".join(items[:LISTED]) + more


def _aligned(rows: list[list[str]]) -> list[str]:
    """The first column to the left, the others to the right; a row of a single text takes no part."""
    table = [row for row in rows if len(row) > 1]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        row[0]
        if len(row) == 1
        else "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


def sample_cards(source: Store, config: DataConfig, count: int, seed: int) -> Iterable[dict[str, Any]]:
    """The first `count` training samples of a run with this seed and a batch size of 1, as the page shows them.

    Tokens are those of `materialise`: lists of side * side, labels with -100 where nothing is learned. Raises `UserError`
    where no training task fits.
    """
    sampler = SAMPLERS[source.metadata.layout](source, config, seed, 1)
    for step in range(count):
        yield _card(source, sampler.sample(step))


def _card(source: Store, samples: Samples) -> dict[str, Any]:
    tokens = {
        name: tensor.tolist() for name, tensor in materialise(samples, source, source.grid_table).data.items()
    }
    task = int(np.searchsorted(source.task_pairs, samples.query[0], side="right")) - 1
    first = int(source.task_pairs[task])
    grids = source.task(task)
    view = (
        np.append(np.uint8(0), samples.transform[:1]),
        np.stack([augment.IDENTITY_COLOURS, samples.colours[0]]),
    )
    unchanged = not samples.transform[0] and (samples.colours[0] == augment.IDENTITY_COLOURS).all()
    return {
        "task": grids.id,
        "subset": source.subset_names[source.task_subset[task]],
        "split": "test" if source.task_split[task] == TEST else "train",
        "name": grids.id if unchanged or source.layout.shares_rule else augment.names_of(grids.id, *view)[1],
        "identifier": tokens["puzzle_identifiers"][0],
        "side": samples.bucket.side,
        "offset": samples.offset[0].tolist(),
        "transform": int(samples.transform[0]),
        "colours": samples.colours[0].tolist(),
        "order": None if samples.order is None else samples.order[0].tolist(),
        "demonstrations": [
            {"pair": int(pair) - first, "input": shown, "label": answer}
            for pair, shown, answer in zip(
                samples.demos[0],
                *(tokens.get(k, [[]])[0] for k in ("demo_inputs", "demo_labels")),
                strict=True,
            )
        ],
        "query": {
            "pair": int(samples.query[0]) - first,
            "input": tokens["inputs"][0],
            "label": tokens["labels"][0],
        },
        "stored_demonstrations": len(grids.demonstrations),
        "stored": [
            [grid if grid is None else grid.tolist() for grid in (pair.input, pair.output)]
            for pair in grids.pairs
        ],
    }


def write_page(path: Path, source: Store, config: DataConfig, count: int, seed: int) -> None:
    """Write `count` samples as one page that a browser opens without a network."""
    metadata, vocabulary = source.metadata, source.game.vocabulary
    data = {
        "dataset": {
            "path": str(source.path),
            "hash": metadata.content_hash,
            **{
                key: f"{getattr(metadata, key)}: {MEANING[getattr(metadata, key)]}"
                for key in ("layout", "protocol")
            },
        },
        "game": metadata.game,
        "boxes": sudoku.BOXES.get(metadata.max_grid_size) if metadata.game == "sudoku" else None,
        "first": vocabulary.first,
        "symbols": vocabulary.symbols,
        "eos": vocabulary.eos,
        "seed": seed,
        "settings": config.model_dump(exclude={"path"}),
        "samples": list(sample_cards(source, config, count, seed)),
    }
    page = TEMPLATE.read_text(encoding="utf-8").replace(PLACEHOLDER, json_in_page(data))
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


@reports_user_errors
def main() -> None:
    parser = parser_of("tools.info", __doc__)
    add = parser.add_argument
    add("dataset", type=Path)
    add("--json", action="store_true", help="print JSON")
    add(
        "--data", metavar="NAME", help="configuration of config/data; default: the one that suits the dataset"
    )
    add("--buckets", type=int, nargs="+", metavar="SIDE", help="canvas sides; default: those of --data")
    add(
        "--canvas-margin", type=int, metavar="CELLS", help="room for a larger answer; default: that of --data"
    )
    add(
        "--page",
        type=Path,
        metavar="FILE.html",
        help="write a page of training samples as they enter the model",
    )
    add("--samples", type=int, default=8, help="how many the page shows (default 8)")
    add("--seed", type=int, default=0, help="seed of the run whose first samples they are (default 0)")
    options = parser.parse_args()
    if options.samples < 1 or options.seed < 0:
        raise UserError("--samples must be >= 1, --seed >= 0")
    source = Store.load(options.dataset)
    overrides = overrides_for(source, options.data, options.buckets, options.canvas_margin)
    config = compose.validate(DataConfig, compose.compose("pretrain", overrides)[0].data)
    info = describe(source, config)
    if options.page:
        write_page(options.page, source, config, options.samples, options.seed)
    print(json.dumps(info, indent=1, allow_nan=False) if options.json else as_text(info))


if __name__ == "__main__":
    main()
