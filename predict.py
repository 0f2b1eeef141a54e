"""Answer one task, or puzzles.

    python predict.py checkpoint=pretrained/rules task=pretrained/example.json

Prints the two best answers to each query, with their votes and halting probability, in ARC's colours. A model
trained on Sudoku or mazes reads puzzles as text (`-`: standard input), and the answers are checked.
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
from dataset.games import Game
from dataset.task import Pair
from evaluation.protocols import less_memory
from evaluation.puzzle_solver import open_solver
from evaluation.records import SUBMISSION_ATTEMPTS, attempts
from evaluation.report import write_report
from evaluation.solver import AskConfig, Solution, Solver
from evaluation.terminal import block, side_by_side
from evaluation.thinking import ThinkingConfig
from evaluation.voting import Candidate
from models.trial import settle_threads
from utils.device import describe, explains_out_of_memory
from utils.errors import reports_user_errors

VERDICTS = {True: "right", False: "wrong", None: "answer unknown"}


class PredictConfig(AskConfig, ThinkingConfig):
    """Answers to one task or to puzzles (config/predict.yaml)."""

    batch_size: PositiveInt
    format: Literal["text", "json"]
    page: str | None


def run(config: PredictConfig) -> None:
    """One task or several puzzles, from the checkpoint to the answers."""
    solver = open_solver(config.checkpoint, config.weights, config.device, config.forward_dtype)
    solver = solver.deepened(config)
    tasks = solver.read(config.task, config.task_id)
    settle_threads(config.threads, solver.model, solver.data, config.num_views)
    with explains_out_of_memory("the prediction", less_memory(config.protocol, config.batch_size)):
        solutions = solver.ask_all(
            tasks,
            config.num_views,
            config.seed,
            config.batch_size,
            config.protocol,
            record_steps=config.page is not None,
            thinking=config,
        )
    about = description(config, solver, solutions)
    records = [record for solution in solutions for record in solution.records]
    if config.format == "json":
        submission = {one.task.id: [attempts(candidates) for candidates in one.answers] for one in solutions}
        print(json.dumps({**about, "queries": records, "submission": submission}), flush=True)
    else:
        coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        width = shutil.get_terminal_size().columns
        print("\n\n".join(text(one, solver.game, coloured, width) for one in solutions), flush=True)
    if config.page:
        puzzles = {task.id: task.to_json() for task in tasks}
        write_report(Path(config.page), about, records, puzzles, game=solver.game)
        if config.format != "json":
            print(f"\n{config.page}: the answers after every ACT step")


def description(config: PredictConfig, solver: Solver, solutions: list[Solution]) -> dict[str, Any]:
    """What was asked of which model, as an evaluation's results.json has it."""
    trained, first = solver.trained, solutions[0]
    # If training has seen one of several puzzles, the page as a whole cannot claim otherwise.
    protocols = {one.protocol.split(",")[0] for one in solutions}
    return {
        "task": first.task.id if not solver.game.notation else config.task,
        "protocol": protocols.pop() if len(protocols) == 1 else "transductive",
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
        "num_views": first.num_views,
        **config.model_dump(include={"rollouts", "sigma", "random_init", "select"}),
        "seed": config.seed,
        "device": describe(solver.device),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "notes": list(dict.fromkeys(note for one in solutions for note in one.notes)),
    }


def text(solution: Solution, game: Game, coloured: bool, width: int) -> str:
    """All queries for a terminal of `width` characters."""
    lines = []
    for number, (query, candidates) in enumerate(zip(solution.task.queries, solution.answers, strict=True)):
        lines += [heading(solution, number, candidates), ""]
        drawing, given = game.drawing(len(query.input)), None
        if drawing.given:
            given = query.input > 0
        blocks = [block(["puzzle" if game.notation else "input"], query.input, drawing, coloured, given)]
        total = sum(candidate.votes for candidate in candidates)
        for rank, candidate in enumerate(candidates[:SUBMISSION_ATTEMPTS], 1):
            support = f"{candidate.votes} of {plural(total, 'vote')}, halting {candidate.q:.3f}"
            verdict = f"attempt {rank}: {judged(query, candidate, game)}"
            blocks.append(block([verdict, support], candidate.grid, drawing, coloured, given))
        if not candidates:
            blocks.append(["no answer: no view", "gave a grid"])
        if query.output is not None:
            blocks.append(block(["known answer"], query.output, drawing, coloured, given))
        lines += [*side_by_side(blocks, width), ""]
    return "\n".join([*lines, *(f"note: {note}" for note in solution.notes)]).rstrip()


def heading(solution: Solution, number: int, candidates: list[Candidate]) -> str:
    """What was asked, and how."""
    if solution.facts is not None:
        return f"puzzle {solution.task.id}: {solution.facts.words}; {solution.protocol}"
    found, views = plural(len(candidates), "different answer"), plural(solution.num_views, "view")
    return f"task {solution.task.id}, query {number}: {found} in {views}, {solution.protocol}"


def judged(query: Pair, candidate: Candidate, game: Game) -> str:
    """What an answer is by the rules of its game, and compared with the known answer."""
    right = None if query.output is None else np.array_equal(candidate.grid, query.output)
    if not game.checks:
        return VERDICTS[right]
    verdict = game.verdict({})
    if candidate.grid.shape == query.input.shape:
        passed = game.passed(query.input[None], candidate.grid[None])
        verdict = game.verdict({name: bool(holds[0]) for name, holds in passed.items()})
    return verdict if right is None else f"{verdict}, {'' if right else 'not '}the known answer"


def plural(count: int, word: str) -> str:
    """A count and what is counted."""
    return f"{count} {word}{'s' * (count != 1)}"


@reports_user_errors
def main() -> None:
    launch("predict", PredictConfig, run, __doc__)


if __name__ == "__main__":
    main()
