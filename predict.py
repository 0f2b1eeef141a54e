"""Answer one task: python predict.py checkpoint=runs/NAME task=FILE [key=value ...]

Prints the two best answers to each query, with their votes and halting probability, in ARC's colours.
format=json is for programs; page=FILE.html makes a page that shows how the answers came about.
"""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import PositiveInt

from config.compose import launch
from evaluation.pictures import COLOURS
from evaluation.protocols import less_memory
from evaluation.records import SUBMISSION_ATTEMPTS, attempts
from evaluation.report import write_report
from evaluation.solver import AskConfig, Solution, Solver, read_task
from evaluation.thinking import ThinkingConfig
from models.trial import settle_threads
from utils.device import describe, explains_out_of_memory
from utils.errors import reports_user_errors

GAP = 4  # characters between grids
VERDICTS = {True: "right", False: "wrong", None: "answer unknown"}


class PredictConfig(AskConfig, ThinkingConfig):
    """Answers to one task (config/predict.yaml)."""

    batch_size: PositiveInt
    format: Literal["text", "json"]
    page: str | None


def run(config: PredictConfig) -> None:
    """One task, from the checkpoint to its answers."""
    task = read_task(config.task, config.task_id)
    solver = Solver.from_pretrained(config.checkpoint, config.weights, config.device, config.forward_dtype)
    solver = solver.deepened(config)
    settle_threads(config.threads, solver.model, solver.data, config.num_views)
    with explains_out_of_memory("the prediction", less_memory(config.protocol, config.batch_size)):
        solution = solver.ask(
            task,
            config.num_views,
            config.seed,
            config.batch_size,
            config.protocol,
            record_steps=config.page is not None,
            thinking=config,
        )
    about = description(config, solver, solution)
    if config.format == "json":
        submission = {task.id: [attempts(candidates) for candidates in solution.answers]}
        print(json.dumps({**about, "queries": solution.records, "submission": submission}), flush=True)
    else:
        coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(text(solution, coloured, shutil.get_terminal_size().columns), flush=True)
    if config.page:
        write_report(Path(config.page), about, solution.records, {task.id: task.to_json()})
        if config.format != "json":
            print(f"\n{config.page}: the answers after every ACT step")


def description(config: PredictConfig, solver: Solver, solution: Solution) -> dict[str, Any]:
    """What was asked of which model, as an evaluation's results.json has it."""
    trained = solver.trained
    return {
        "task": solution.task.id,
        "protocol": solution.protocol.split(",")[0],
        "adaptation": config.protocol.model_dump(),
        "checkpoint": {
            "path": str(trained.path),
            "step": trained.step,
            "weights": trained.weights,
            "git_commit": trained.git_commit,
        },
        "model": {
            "arch": trained.arch,
            "encoder": trained.encoder,
            "forward_dtype": solver.model.config.forward_dtype,
            "parameters": trained.parameters,
        },
        "num_views": solution.num_views,
        **config.model_dump(include={"rollouts", "sigma", "random_init", "select"}),
        "seed": config.seed,
        "device": describe(solver.device),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "notes": solution.notes,
    }


def text(solution: Solution, coloured: bool, width: int) -> str:
    """All queries for a terminal of `width` characters."""
    lines = []
    for number, (query, candidates) in enumerate(zip(solution.task.queries, solution.answers, strict=True)):
        total = sum(candidate.votes for candidate in candidates)
        found, views = plural(len(candidates), "different answer"), plural(solution.num_views, "view")
        lines += [f"task {solution.task.id}, query {number}: {found} in {views}, {solution.protocol}", ""]
        blocks = [block(["input"], query.input, coloured)]
        for rank, candidate in enumerate(candidates[:SUBMISSION_ATTEMPTS], 1):
            right = None if query.output is None else np.array_equal(candidate.grid, query.output)
            support = f"{candidate.votes} of {plural(total, 'vote')}, halting {candidate.q:.3f}"
            blocks.append(block([f"attempt {rank}: {VERDICTS[right]}", support], candidate.grid, coloured))
        if not candidates:
            blocks.append(["no answer: no view", "gave a grid"])
        if query.output is not None:
            blocks.append(block(["known answer"], query.output, coloured))
        lines += [*side_by_side(blocks, width), ""]
    return "\n".join([*lines, *(f"note: {note}" for note in solution.notes)]).rstrip()


def plural(count: int, word: str) -> str:
    """A count and what is counted."""
    return f"{count} {word}{'s' * (count != 1)}"


def block(heading: list[str], grid: np.ndarray, coloured: bool) -> list[str]:
    """A heading of at most two lines, and the grid below it."""
    return [*(heading + [""])[:2], *grid_lines(grid, coloured)]


def grid_lines(grid: np.ndarray, coloured: bool) -> list[str]:
    """A grid's rows: two background-coloured blanks per cell, or digits."""
    if not coloured:
        return [" ".join(map(str, row)) for row in grid]
    return [
        "".join("\033[48;2;{};{};{}m  ".format(*COLOURS[cell]) for cell in row) + "\033[0m" for row in grid
    ]


def side_by_side(blocks: list[list[str]], width: int) -> list[str]:
    """Blocks beside each other as far as `width` goes, the others below."""
    lines: list[str] = []
    row: list[list[str]] = []
    for block in [*blocks, None]:
        if row and (block is None or sum(_width(one) + GAP for one in row) + _width(block) > width):
            height = max(map(len, row))
            padded = [
                [line + " " * (_width(one) - _visible(line)) for line in one + [""] * (height - len(one))]
                for one in row
            ]
            lines += ([""] if lines else []) + [
                (" " * GAP).join(parts).rstrip() for parts in zip(*padded, strict=True)
            ]
            row = []
        if block is not None:
            row.append(block)
    return lines


def _width(block: list[str]) -> int:
    return max(map(_visible, block))


def _visible(line: str) -> int:
    """The characters that a terminal shows of `line`."""
    return 2 * line.count("\033[48") or len(line)


@reports_user_errors
def main() -> None:
    launch("predict", PredictConfig, run, __doc__)


if __name__ == "__main__":
    main()
