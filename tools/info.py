"""Show what a dataset holds, and what a model sees of it.

    python -m tools.info data/arc1 --page samples.html

Prints counts, grid sizes, augmentations, hashes, leaks, and how the evaluation tasks fit their canvases.
--page draws training samples from the very tensors that a model gets, beside the tasks as they are stored.
--sanity counts a split's examples as the ancestors store them.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from config import compose
from dataset.batch import DataConfig, task_sides
from dataset.canvas import smallest_bucket
from dataset.npy import groups_of
from dataset.store import SPLITS, TEST, Store
from tools.info_page import write_page
from tools.info_text import as_text
from utils.arguments import parser_of
from utils.errors import UserError, reports_user_errors


class _Pairs:
    """Columns over all P pairs of a dataset.

    - task (P,): the pair's task.
    - demonstration (P,), labelled (P,): whether it is a demonstration, and whether its answer is known.
    - cells (P, 2): the cells of its input and of its output, 0 for an unknown output.
    """

    def __init__(self, source: Store):
        self.task = np.repeat(np.arange(len(source.task_ids)), np.diff(source.task_pairs))
        place_in_task = np.arange(len(self.task)) - source.task_pairs[self.task]
        # A task's demonstrations are stored before its queries.
        self.demonstration = place_in_task < source.task_demonstrations[self.task]
        self.labelled = source.pair_output >= 0
        cells = source.shapes.prod(axis=1, dtype=np.int64)
        output_cells = np.where(self.labelled, cells[source.pair_output], 0)
        self.cells = np.stack([cells[source.pair_input], output_cells], axis=1)  # (P, 2)


def overrides_for(
    source: Store, data: str | None, buckets: list[int] | None, margin: int | None
) -> list[str]:
    """The overrides that describe the data of a training run on this dataset.

    `data` names a configuration of config/data; None chooses the one that suits the dataset. Raises
    `UserError` for a canvas that a game does not have.
    """
    metadata = source.metadata
    overrides = [f"data={data or _suitable(source)}"]
    if not data and not source.layout.reads_demonstrations:
        overrides.append(f"data.augmentation={'table' if metadata.num_aug else 'none'}")
    if source.layout.shares_rule:
        if buckets or margin is not None:
            raise UserError(
                f"{source.path}: --buckets and --canvas-margin are for tasks of many sizes; "
                "a game's grids fill their canvas"
            )
        buckets, margin = [metadata.max_grid_size], 0
    if buckets:
        overrides += ["data.canvas=task", f"data.buckets={buckets}"]
    return overrides + ([f"data.canvas_margin={margin}"] if margin is not None else [])


def _suitable(source: Store) -> str:
    """The name of the data configuration that suits the dataset."""
    if source.layout.learns_rows:
        return "arc1_puzzle"
    return "arc1_small" if source.metadata.max_grid_size <= 10 else "arc1"


def describe(source: Store, config: DataConfig) -> dict[str, Any]:
    """Everything the command prints, as JSON values. `config` says which canvases there are."""
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
    """Tasks and pairs of the whole dataset, of each split and of each subset."""

    def count(tasks: np.ndarray) -> dict[str, int]:
        """The counts of the tasks that the mask `tasks` (T,) chooses."""
        chosen = tasks[pairs.task]
        return {
            "tasks": int(tasks.sum()),
            "demonstrations": int((chosen & pairs.demonstration).sum()),
            "queries": int((chosen & ~pairs.demonstration).sum()),
            "labelled_pairs": int((chosen & pairs.labelled).sum()),
            "unlabelled_pairs": int((chosen & ~pairs.labelled).sum()),
        }

    test_subsets = source.metadata.test_subsets
    return {
        "all": count(np.ones(len(source.task_ids), bool)),
        "splits": {name: count(source.task_split == split) for name, split in SPLITS.items()},
        "subsets": {
            name: {"split": "test" if name in test_subsets else "train", **count(source.task_subset == i)}
            for i, name in enumerate(source.subset_names)
        },
    }


def _grids(source: Store, pairs: _Pairs) -> dict[str, dict]:
    """How large the grids are: histograms of the longest side, and mean numbers of cells."""
    longest = np.maximum.reduceat(source.pair_side.max(axis=1), source.task_pairs[:-1])  # (T,)
    split_of_pair = source.task_split[pairs.task]
    sides = {"grids": _histogram(source.shapes.max(axis=1))}
    mean_cells = {}
    for name, split in SPLITS.items():
        sides[f"{name}_tasks"] = _histogram(longest[source.task_split == split])
        here = split_of_pair == split
        mean_cells[name] = {
            "demonstration_pair": _mean(pairs.cells[here & pairs.demonstration].sum(axis=1)),
            "query_input": _mean(pairs.cells[here & ~pairs.demonstration, 0]),
        }
    return {"longest_sides": sides, "mean_cells": mean_cells}


def _augmentations(source: Store) -> dict[str, Any]:
    """How many augmentations are stored, and which tasks have fewer than were asked for."""
    stored = np.diff(source.task_rows) - 1  # (T,), without the task itself
    # A game's copies are computed from the seed (`write_pairs`); none is stored, so none is missing.
    wanted = 0 if source.layout.shares_rule else source.metadata.num_aug
    return {
        "num_aug": source.metadata.num_aug,
        "stored": int(stored.sum()),
        "tasks_by_number_stored": _histogram(stored),
        "short": {source.task_ids[task]: int(stored[task]) for task in np.flatnonzero(stored < wanted)},
    }


def _canvas(source: Store, pairs: _Pairs, config: DataConfig) -> dict[str, Any]:
    """How many answers fit their canvas, which is chosen without them, and how full the canvases are.

    `real_cells` is the share of canvas cells that demonstrations and query inputs cover. `answers_fit` counts
    labelled queries. `tasks_fit` counts the tasks with labelled queries all of whose answers fit. The side
    null stands for tasks that are larger than every canvas.
    """
    needed, number = np.unique(task_sides(source, config), return_inverse=True)
    canvas_of_side = np.array([smallest_bucket(int(side), config.sides) or 0 for side in needed])
    canvas = canvas_of_side[number]  # (T,), 0 where none is large enough
    scored = ~pairs.demonstration & pairs.labelled
    # False where there is no canvas: a labelled answer has a side above 0.
    fits = source.pair_side[:, 1] <= canvas[pairs.task]

    def per_task(values: np.ndarray) -> np.ndarray:
        """(T,) the sums of a column over the pairs of each task."""
        return np.bincount(pairs.task, values, minlength=len(canvas)).astype(np.int64)

    queries, labelled, fitting = per_task(~pairs.demonstration), per_task(scored), per_task(scored & fits)
    # A demonstration shows two grids, a query one: its answer is not drawn.
    cells = per_task(pairs.cells[:, 0] + pairs.cells[:, 1] * pairs.demonstration)
    room = per_task(1 + pairs.demonstration) * canvas**2

    def count(tasks: np.ndarray) -> dict[str, Any]:
        """The counts of the tasks that the mask `tasks` (T,) chooses."""
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

    in_split = {name: source.task_split == split for name, split in SPLITS.items()}
    by_side = []
    for side in (*config.sides, None):
        here = canvas == (side or 0)
        by_side.append({"side": side, **{name: count(mask & here) for name, mask in in_split.items()}})
    missed = np.flatnonzero((source.task_split == TEST) & (labelled > fitting))
    return {
        "canvas": config.canvas,
        "sides": list(config.sides),
        "margin": config.canvas_margin,
        "by_side": by_side,
        "total": {name: count(mask) for name, mask in in_split.items()},
        "tasks_missed": [source.task_ids[task] for task in missed],
    }


def _histogram(values: np.ndarray) -> dict[str, int]:
    """How often each value occurs; the values as text, since JSON's keys are text."""
    numbers, counts = np.unique(values, return_counts=True)
    return {str(number): int(count) for number, count in zip(numbers, counts, strict=True)}


def _mean(values: np.ndarray) -> float | None:
    """The mean; None of no values."""
    return float(values.mean()) if len(values) else None


def sanity(source: Store, split: str) -> dict[str, Any]:
    """How many examples a split has in the ancestors' layout, with and without its augmentations.

    The keys are those of the fork with the reproduction. `original_test_pairs` are the evaluation queries,
    whatever the split.
    """
    sizes = [(len(group.pairs), len(group.view_rows)) for group in groups_of(source, split)]
    examples, single = sum(pairs * views for pairs, views in sizes), sum(pairs for pairs, _ in sizes)
    test = source.tasks_of("test")
    queries = int((np.diff(source.task_pairs)[test] - source.task_demonstrations[test]).sum())
    return {
        "data_dir": str(source.path),
        "total_augmented_examples": examples,
        "original_test_pairs": queries,
        "augmentations_per_original": examples / queries if queries else None,
        "single_aug_kept_examples": single,
        "single_aug_examples_per_original": single / queries if queries else None,
    }


@reports_user_errors
def main() -> None:
    parser = parser_of("tools.info", __doc__)
    add = parser.add_argument
    add("dataset", type=Path, help="a dataset's folder")
    add("--json", action="store_true", help="print JSON")
    add("--sanity", action="store_true", help="print only, as JSON, how many examples --split has")
    add("--split", choices=list(SPLITS), default="test", help="the split of --sanity (default test)")
    add("--data", metavar="NAME", help="a configuration of config/data; default: what suits the dataset")
    add("--buckets", type=int, nargs="+", metavar="SIDE", help="canvas sides; default: those of --data")
    add("--canvas-margin", type=int, metavar="CELLS", help="room for a larger answer; default: as in --data")
    add("--page", type=Path, metavar="FILE.html", help="write a page of training samples")
    add("--samples", type=int, default=8, help="how many the page shows (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the run whose first samples they are (default: %(default)s)")
    options = parser.parse_args()
    if options.samples < 1 or options.seed < 0:
        raise UserError("--samples must be >= 1, --seed >= 0")
    source = Store.load(options.dataset)
    if options.sanity:
        print(json.dumps(sanity(source, options.split), indent=1))
        return
    overrides = overrides_for(source, options.data, options.buckets, options.canvas_margin)
    config = compose.validate(DataConfig, compose.compose("pretrain", overrides)[0].data)
    info = describe(source, config)
    if options.page:
        write_page(options.page, source, config, options.samples, options.seed)
    print(json.dumps(info, indent=1, allow_nan=False) if options.json else as_text(info))


if __name__ == "__main__":
    main()
