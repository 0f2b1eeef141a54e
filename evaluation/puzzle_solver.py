"""Ask a model that was trained on a game puzzles that it has not seen, from a file or standard input."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from dataset import puzzle_writer
from dataset.games import GAMES
from dataset.games.notation import read_puzzles
from dataset.leaks import nothing_known, tasks_seen
from dataset.store import Store
from dataset.task import Pair, Task
from evaluation.adaptation import AS_IT_IS
from evaluation.protocols import ProtocolConfig, adaptation_of, described, label
from evaluation.records import records_of
from evaluation.respondent import Respondent
from evaluation.run import Ask
from evaluation.solver import PERHAPS_REMEMBERED, SUBSET, Solution, Solver, answered
from evaluation.thinking import AS_TRAINED, ThinkingConfig
from evaluation.trained_model import AskedDtype, TrainedModel
from utils.device import choose_device
from utils.distributed import World
from utils.errors import UserError

STANDARD_INPUT = "-"
REMEMBERED = "the model was trained on this puzzle, up to symmetry: its answer may be remembered"


def open_solver(
    path: str | Path, weights: str = "ema", device: str = "auto", forward_dtype: AskedDtype = "checkpoint"
) -> Solver:
    """The solver for a model: of puzzles if it was trained on a game, else of tasks. Raises `UserError`."""
    where = choose_device(device, World())
    trained = TrainedModel.load(path, weights, where, forward_dtype)
    kind = PuzzleSolver if trained.layout.shares_rule else Solver
    return kind.of(trained, where)


class PuzzleSolver(Solver):
    """A model trained on Sudoku, mazes or another game, ready to be asked any puzzle of its size.

    A puzzle is a `Task` with one query and no demonstration.
    """

    @classmethod
    def _refused(cls, trained: TrainedModel) -> str | None:
        if not trained.layout.shares_rule:
            return "was trained on tasks, not on a game"
        return None if GAMES[trained.game].notation else f"plays {trained.game}, which has no notation"

    def read(self, source: str, task_id: str | None = None) -> list[Task]:
        """The puzzles of a file, or of standard input for `-`, each with its known answer if it has one.

        task_id: the number of a puzzle, counted from 1. None: all of them.
        Raises `UserError` that names file and line for text that is no puzzle of the model's game and size.
        """
        name, text = _content(source)
        assert self.game.notation is not None
        tasks = []
        for number, puzzle in enumerate(
            read_puzzles(text, name, self.game.notation(self.side), self.side), 1
        ):
            if flaw := self.game.flaw(puzzle.question):
                raise UserError(f"{name}, line {puzzle.line}: {flaw}")
            tasks.append(Task(str(number), (), (Pair(puzzle.question, puzzle.answer),)))
        if task_id is None:
            return tasks
        chosen = [task for task in tasks if task.id == task_id]
        if not chosen:
            raise UserError(f"{name} has no puzzle {task_id}; it has {len(tasks)}, counted from 1")
        return chosen

    def ask_all(
        self,
        tasks: list[Task],
        num_views: int,
        seed: int,
        batch_size: int,
        protocol: ProtocolConfig = AS_IT_IS,
        record_steps: bool = False,
        thinking: ThinkingConfig = AS_TRAINED,
    ) -> list[Solution]:
        """The answers to all puzzles, with what is known of each without the model."""
        respondent = self.respondent_of(tasks)
        store, questions = respondent.store, Ask(seed).questions(respondent, num_views)
        adaptation = adaptation_of(protocol, respondent, seed, batch_size)
        answers, steps = answered(respondent, questions, adaptation, thinking, record_steps)
        records = records_of(questions, answers, protocol.name, steps)
        inputs = np.stack([task.queries[0].input for task in tasks])
        facts = self.game.facts(inputs) if self.game.facts else [None] * len(tasks)
        remembered = PERHAPS_REMEMBERED if nothing_known(respondent.trained_pairs) else REMEMBERED
        attempts = [f"each view was asked in {thinking.rollouts} attempts"] if thinking.rollouts > 1 else []
        solutions = []
        for number, (task, query, known) in enumerate(zip(tasks, answers, facts, strict=True)):
            name = label(protocol, store, tasks_seen(store, np.array([number]), respondent.trained_pairs))
            about = {"protocol": name} | ({"puzzle": known.values} if known else {})
            solutions.append(
                Solution(
                    task=task,
                    protocol=described(name, protocol.name),
                    num_views=questions.num_views,
                    answers=[query.candidates],
                    records=[records[number] | about],
                    notes=([remembered] if name == "transductive" else []) + attempts,
                    facts=known,
                )
            )
        return solutions

    def respondent(self, task: Task) -> Respondent:
        """The model with one puzzle to be asked."""
        return self.respondent_of([task])

    def respondent_of(self, tasks: list[Task]) -> Respondent:
        """The model with puzzles to be asked, each of which is a task."""
        return self._respondent(self._store(tasks))

    def _store(self, tasks: list[Task]) -> Store:
        pairs = [task.queries[0] for task in tasks]
        inputs = np.stack([pair.input for pair in pairs])
        known = np.array([pair.output is not None for pair in pairs])
        answers = np.stack([pair.input if pair.output is None else pair.output for pair in pairs])
        prints = self.game.recognise(inputs)
        packed = puzzle_writer.pack(
            {"test": (inputs, answers)},
            game=self.game.name,
            source=SUBSET,
            seed=0,
            num_aug=0,
            details={},
            fingerprints={"test": prints},
        )
        store = packed.store()
        return replace(
            store,
            task_ids=[task.id for task in tasks],
            pair_output=np.where(known, store.pair_output, -1),
            pair_fingerprint=np.where(prints > 0, store.pair_fingerprint, 0),
        )


def _content(source: str) -> tuple[str, str]:
    """The name of a file or of standard input, and its text. Raises `UserError`."""
    if source == STANDARD_INPUT:
        return "standard input", sys.stdin.read()
    path = Path(source)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        return str(path), path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file") from None
