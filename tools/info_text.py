"""A dataset's description, as `tools.info` makes it, in words and tables for a terminal."""

import json
from typing import Any

from dataset.games import GAMES
from dataset.layouts import LAYOUTS

LISTED = 10  # ids that the terminal shows of a list; --json has them all
MEANING = {
    **{name: game.meaning for name, game in GAMES.items()},
    **{name: layout.meaning for name, layout in LAYOUTS.items()},
    "inductive": "no evaluation task shares a pair with training, up to rotation, reflection and recolouring",
    "transductive": "something of the evaluation tasks is in training, and every score has to say so",
}


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
    """Where the dataset comes from, what it is, what it leaks, and its hashes."""
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
    # The files' hashes were compared when the dataset was loaded.
    width = max(len(name) for name, _ in lines)
    return [f"{name:{width}}  {value}" for name, value in lines]


def _counts_text(counts: dict[str, dict]) -> list[str]:
    """A row per split, its subsets below it, and a row of all."""
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
    """The histograms of the longest side, and the mean numbers of cells."""
    histograms = grids["longest_sides"]
    largest = max(int(side) for histogram in histograms.values() for side in histogram)
    # Every side up to 10; beyond that ranges of 5, or of a multiple of 5 for sides beyond 30.
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
    """How many augmentations there are, and the tasks with fewer than were asked for."""
    table = info["augmentations"]
    wanted = _number(table["num_aug"])
    if LAYOUTS[info["layout"]].shares_rule:
        return [f"augmentations  {wanted} of each training puzzle, computed from the seed; none is stored"]
    histogram = [
        f"{_number(tasks)} {'task has' if tasks == 1 else 'tasks have'} {count}"
        for count, tasks in table["tasks_by_number_stored"].items()
    ]
    identifiers = f"{_number(info['num_puzzle_identifiers'])} puzzle identifiers"
    indent = " " * len("augmentations  ")
    lines = [
        f"augmentations  {_number(table['stored'])} stored, {wanted} asked for per task; {identifiers}",
        f"{indent}{_some(histogram[::-1])}",
    ]
    by_count = sorted(table["short"].items(), key=lambda entry: entry[1])
    short = [f"{task_id} ({count})" for task_id, count in by_count]
    return lines + ([f"{indent}{_number(len(short))} short of {wanted}: {_some(short)}"] if short else [])


def _canvas_text(info: dict[str, Any]) -> list[str]:
    """A row per canvas side, a row of all, and the test tasks with an answer that does not fit."""
    canvas = info["canvas"]
    train_columns = ["canvas side", "train tasks", "real cells"]
    rows = [[*train_columns, "test tasks", "queries", "labelled", "answer fits", "", "real cells"]]
    by_side = [(line["side"] or "too large", line) for line in canvas["by_side"]]
    for name, line in [*by_side, ("all", canvas["total"])]:
        train, test = line["train"], line["test"]
        # Most datasets fit; an empty row would only raise the question.
        if name == "too large" and not train["tasks"] + test["tasks"]:
            continue
        train_cells, test_cells = (
            "-" if split["real_cells"] is None else f"{100 * split['real_cells']:.1f} %"
            for split in (train, test)
        )
        counted = [_number(test[key]) for key in ("tasks", "queries", "labelled_queries", "answers_fit")]
        share = _percent(test["answers_fit"], test["labelled_queries"])
        rows.append([str(name), _number(train["tasks"]), train_cells, *counted, share, test_cells])
    total = canvas["total"]["test"]
    fitting, labelled = total["tasks_fit"], total["labelled_tasks"]
    summary = (
        f"canvas={canvas['canvas']}, margin {canvas['margin']}; every answer fits: {_number(fitting)} of "
        f"{_number(labelled)} labelled test tasks{_percent(fitting, labelled, ' ({})')}"
    )
    missed = canvas["tasks_missed"]
    return _aligned(rows) + [summary] + ([f"an answer does not fit: {_some(missed)}"] if missed else [])


def _number(value: int) -> str:
    return f"{value:,}"


def _percent(part: int, whole: int, form: str = "{}") -> str:
    """The share in percent within `form`; empty where there is no whole."""
    return form.format(f"{100 * part / whole:.1f} %") if whole else ""


def _some(items: list[str]) -> str:
    """The first items, and how many more there are."""
    more = f", ... {_number(len(items) - LISTED)} more (--json lists all)" if len(items) > LISTED else ""
    return ", ".join(items[:LISTED]) + more


def _aligned(rows: list[list[str]]) -> list[str]:
    """The rows as lines: the first column to the left, the others to the right. A row of one text stays."""
    columns = zip(*(row for row in rows if len(row) > 1), strict=True)
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in rows:
        # `zip` ends with the shorter one, so a single text is only padded, which rstrip takes back.
        others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
        lines.append("  ".join([row[0].ljust(widths[0]), *others]).rstrip())
    return lines
