"""What is answered without learning: the drafts alone, asked the tasks of a dataset.

    python -m experiments.look_up data/rules --subsets test_instances test_rules
    python -m experiments.look_up data/arc1 --without nearby slides

It tells how much of a score of a model that reads drafts (models/drafts.py) is the model's. For each subset
the command prints the share of queries whose first draft is the answer, with its 95 % interval, and the share
of those that any draft answers. A query counts by its share of its task. For generated rules it also prints
the families. --train asks training tasks, on which ways of looking may be chosen.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataset.canvas import encode
from dataset.store import Store
from dataset.task import Task
from evaluation.metrics import wilson
from models.conditions import CONDITIONS
from models.drafts import DraftSettings, drafts_of
from models.relations import RELATIONS
from utils.arguments import parser_of, positive
from utils.errors import UserError, reports_user_errors

PLACES = ("motions", "falls", "copies", "crops", "panels")
THEN = (*CONDITIONS, "slides")
RULES = "rules.json"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("experiments.look_up", __doc__)
    add = parser.add_argument
    add("data", type=Path, metavar="DATASET", help="a dataset's folder")
    add("--subsets", nargs="+", metavar="SUBSET", help="default: all that are asked in a test")
    add("--train", action="store_true", help="ask training tasks instead")
    add("--limit", type=positive, metavar="N", help="the first N tasks of each subset")
    add(
        "--places", nargs="+", choices=RELATIONS, default=PLACES, metavar="NAME",
        help=f"encoder.draft_places (default: {' '.join(PLACES)})",
    )  # fmt: skip
    add(
        "--without", nargs="+", choices=THEN, default=[], metavar="NAME",
        help=f"leave out of encoder.draft_conditions, {' '.join(THEN)}",
    )  # fmt: skip
    return parser.parse_args(arguments)


def right(task: Task, settings: DraftSettings) -> np.ndarray:
    """Which drafts answer which queries of a task with known answers, (queries, DRAFTS_PER_GRID) bool."""
    side = task.max_side

    def canvases(grids: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack([encode(grid, side) for grid in grids])).flatten(1).long()

    shown = [pair.input for pair in task.demonstrations]
    told = canvases([pair.answer for pair in task.demonstrations])[None]
    mask = torch.ones(told.shape[:2], dtype=torch.bool)
    found = []
    for query in task.queries:
        draft = drafts_of(settings, canvases([*shown, query.input])[None], told, mask)[0, :, -1]
        found.append((draft == canvases([query.answer])).all(1).numpy())
    return np.stack(found)


def scores(
    store: Store, subset: str, settings: DraftSettings, options: argparse.Namespace
) -> tuple[list[str], np.ndarray]:
    """A subset's tasks, and the shares (tasks, 2) of their queries that the first and any draft answer."""
    tasks = store.tasks_of("train" if options.train else "test", subsets=[subset])[: options.limit]
    shares = []
    for index in tasks:
        drafts = right(store.task(int(index)), settings)
        shares.append((drafts[:, 0].mean(), drafts.any(1).mean()))
    return [store.task_ids[index] for index in tasks], np.array(shares).reshape(-1, 2)


def table(
    store: Store, settings: DraftSettings, options: argparse.Namespace, families: dict[str, str]
) -> Iterator[str]:
    """The lines that are printed, each as soon as it is known."""
    split = "train" if options.train else "test"
    for subset in options.subsets or store.subset_names:
        if not len(store.tasks_of(split, subsets=[subset])):
            continue
        ids, shares = scores(store, subset, settings, options)
        low, high = wilson(float(shares[:, 0].mean()), len(ids))
        first, some = shares.mean(0)
        yield f"{subset}: {first:.3f} [{low:.3f}, {high:.3f}], any draft {some:.3f}, of {len(ids)}"
        by_family: dict[str, list[float]] = defaultdict(list)
        for task, share in zip(ids, shares[:, 0].tolist(), strict=True):
            if task in families:
                by_family[families[task]].append(share)
        yield from (f"    {name}: {sum(of):g} of {len(of)}" for name, of in sorted(by_family.items()))


@reports_user_errors
def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    store = Store.load(options.data)
    if store.metadata.game != "arc":
        raise UserError(f"{options.data}: drafts are of ARC's grids, not of {store.metadata.game}")
    file = options.data / RULES
    rules = json.loads(file.read_text()) if file.is_file() else {}
    # Two stages are one kind: their families are too many for a table.
    kinds = {
        task: rule["families"][0] if len(rule["families"]) == 1 else "two stages"
        for task, rule in rules.items()
    }
    settings = DraftSettings(list(options.places), [name for name in THEN if name not in options.without])
    for line in table(store, settings, options, kinds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
