"""Ask a trained few-shot model one task, in memory.

    solver = Solver.from_pretrained("runs/first")
    answers = solver.solve("task.json")              # answers[0][0]: the best answer to the first query

Views, votes and answers are as an evaluation has them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt, field_validator

from dataset.batch import DataConfig
from dataset.canvas import smallest_bucket
from dataset.games import GAMES, Game
from dataset.games.game import Facts
from dataset.leaks import nothing_known, tasks_seen
from dataset.sources import file_source
from dataset.store import Store
from dataset.task import Task
from dataset.views import EvaluationSet
from dataset.writer import About, pack
from evaluation.adaptation import AS_IT_IS, Adaptation
from evaluation.inference import Inference
from evaluation.metrics import AnsweredQuery
from evaluation.protocols import ProtocolConfig, adaptation_of, described, label
from evaluation.records import answers_of, known_output, records_of
from evaluation.refinement import Step, agreeing, refinements
from evaluation.respondent import Respondent
from evaluation.run import Ask
from evaluation.thinking import AS_TRAINED, ThinkingConfig
from evaluation.trained_model import AskedDtype, TrainedModel
from evaluation.voting import Candidate
from models.core import RecursiveModel
from utils import checkpoint, hub
from utils.config import Config
from utils.device import choose_device
from utils.distributed import World
from utils.errors import UserError, nearest
from utils.files import sha256_of

SUBSET = "asked"
PERHAPS_REMEMBERED = "nothing is known of what the model was trained on: its answer may be remembered"


class AskConfig(Config):
    """Which checkpoint is asked which task."""

    checkpoint: str
    task: str
    task_id: str | None
    weights: Literal["ema", "raw"]
    protocol: ProtocolConfig
    num_views: PositiveInt
    seed: NonNegativeInt
    device: Literal["auto", "cpu", "cuda"]
    threads: Literal["auto"] | PositiveInt
    forward_dtype: AskedDtype

    @field_validator("task_id", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value


@dataclass
class Solution:
    """What a model answers to a task.

    protocol: the label, in words (`evaluation.protocols.described`).
    num_views: views per query that voted.
    answers: per query, best first.
    records: per query, as in an evaluation's per_example.jsonl.
    notes: what else a reader of the answers should know.
    facts: what is known of a game's puzzle without the model.
    """

    task: Task
    protocol: str
    num_views: int
    answers: list[list[Candidate]]
    records: list[dict[str, Any]]
    notes: list[str]
    facts: Facts | None = None


class Solver:
    """A trained model that reads demonstrations, ready to be asked any task."""

    def __init__(self, trained: TrainedModel, device: torch.device):
        self.trained = trained
        self.model: RecursiveModel = trained.model.to(device)
        self.data: DataConfig = trained.data()
        self.side = self.data.sides[-1]
        self.game: Game = GAMES[trained.game].of_side(self.side)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        weights: str = "ema",
        device: str = "auto",
        forward_dtype: AskedDtype = "checkpoint",
        revision: str | None = None,
        sha256: str | None = None,
    ) -> "Solver":
        """The model of a checkpoint folder, of a run folder's newest checkpoint, or of `owner/name`, a hub's.

        forward_dtype: of its activations; `checkpoint`: as in training, `auto`: the faster one on the device.
        revision: a commit, tag or branch on the hub. sha256: what the file of the weights has to have.
        Raises `UserError` for one that knows its tasks otherwise than by their demonstrations.
        """
        where = choose_device(device, World())
        trained = TrainedModel.load(hub.reference(path, revision), weights, where, forward_dtype)
        found = None if sha256 is None else sha256_of(trained.path / checkpoint.WEIGHTS[weights])
        if found != sha256:
            raise UserError(f"the weights of {path} have SHA-256 {found}, not {sha256}")
        return cls.of(trained, where)

    @classmethod
    def of(cls, trained: TrainedModel, device: torch.device) -> "Solver":
        """The same for a model that was read already."""
        if reason := cls._refused(trained):
            raise UserError(f"{trained.path}: this model (arch={trained.arch}) {reason}")
        return cls(trained, device)

    @classmethod
    def _refused(cls, trained: TrainedModel) -> str | None:
        """Why a model cannot be asked, None if it can."""
        if trained.layout.shares_rule:
            return f"was trained on {trained.game} puzzles and answers no tasks; predict.py asks it puzzles"
        if trained.encoder:
            return None
        return f"without an encoder {trained.layout.unknown}; train one with an encoder"

    def deepened(self, thinking: ThinkingConfig) -> "Solver":
        """This solver, from now on with as many ACT steps as `thinking` says."""
        self.model.config = thinking.deepened(self.model.config)
        return self

    def read(self, source: str, task_id: str | None = None) -> list[Task]:
        """The task of a file, or the one of several with that id, alone in a list."""
        return [read_task(source, task_id)]

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
        """The answers to each task (`ask`)."""
        return [
            self.ask(task, num_views, seed, batch_size, protocol, record_steps, thinking) for task in tasks
        ]

    def solve(
        self,
        task: "Task | dict | str | Path",
        num_views: int = 8,
        seed: int = 0,
        batch_size: int = 64,
        protocol: ProtocolConfig = AS_IT_IS,
    ) -> list[list[dict]]:
        """The answers to each query, best first; none when no view gave one.

        An answer is `{"grid": rows of colours, "votes": of so many views, "probability": the mean halting
        probability of those views}`.

        task: in the ARC format, a file that holds one, or a `Task`. Answers that it may hold are never read.
        protocol: what is done with the demonstrations before (evaluation/protocols.py).
        Raises `UserError` for a malformed task, and for one larger than the model's largest canvas.
        """
        answers = self.ask(read_task(task), num_views, seed, batch_size, protocol).answers
        return [
            [{"grid": c.grid.tolist(), "votes": c.votes, "probability": c.q} for c in candidates]
            for candidates in answers
        ]

    def ask(
        self,
        task: Task,
        num_views: int,
        seed: int,
        batch_size: int,
        protocol: ProtocolConfig = AS_IT_IS,
        record_steps: bool = False,
        thinking: ThinkingConfig = AS_TRAINED,
    ) -> Solution:
        """The answers to every query of `task`.

        record_steps: whether the records hold `steps`, the refinement of view 0.
        thinking: in how many attempts at each view. `deepened` says for how many ACT steps.
        """
        respondent = self.respondent(task)
        store, questions = respondent.store, self.questions(respondent, num_views, seed)
        name = label(protocol, store, tasks_seen(store, questions.tasks, respondent.trained_pairs))
        adaptation = adaptation_of(protocol, respondent, seed, batch_size)
        answers, steps = answered(respondent, questions, adaptation, thinking, record_steps)
        return Solution(
            task=task,
            protocol=described(name, protocol.name),
            num_views=questions.num_views_of(questions.queries[0]),
            answers=[query.candidates for query in answers],
            records=records_of(questions, answers, name, steps),
            notes=self._notes(questions, num_views, name, adaptation),
        )

    def refine(
        self,
        task: Task,
        query: int,
        view: int = 0,
        num_views: int = 1,
        seed: int = 0,
        protocol: ProtocolConfig = AS_IT_IS,
    ) -> list[Step]:
        """The refinement of one query in one of `num_views` views.

        Where the answer is known and fits the canvas, each step also has its `accuracy`, the share of cells
        that are right, and its token `loss`.

        Raises `UserError` when the task has no such query or view.
        """
        respondent = self.respondent(task)
        questions = self.questions(respondent, num_views, seed)
        if not 0 <= query < len(questions.queries):
            raise UserError(
                f"task {task.id} has no query {query}; it has {len(questions.queries)}, counted from 0"
            )
        if view >= questions.num_views_of(questions.queries[query]):
            why = "a puzzle or a model trained without turned grids has one, a regular task has few"
            raise UserError(f"task {task.id} has no view {view} among num_views={num_views}: {why}")
        adaptation = adaptation_of(protocol, respondent, seed, batch_size=num_views)
        inference = Inference(respondent, questions, adaptation)
        steps = refinements(inference.collect(record_steps=True), view)[query]
        truth = task.queries[query].output
        if truth is not None and questions.answer_fits(questions.queries[query]):
            for step, loss in zip(steps, inference.losses(query, view), strict=True):
                right = agreeing(np.array(step["grid"] or [[]], np.uint8), truth)
                step |= {"accuracy": right.sum() / max(right.size, truth.size), "loss": loss}
        return steps

    def respondent(self, task: Task) -> Respondent:
        """The model with one task to be asked, which is drawn, augmented and asked as any evaluation task."""
        store = pack({SUBSET: [task]}, [SUBSET], About(layout="fewshot", source="one task", seed=0)).store()
        return self._respondent(store)

    def _respondent(self, store: Store) -> Respondent:
        """The model with the tasks of a dataset in memory."""
        return Respondent(
            model=self.model,
            store=store,
            table=store.grid_table.to(self.device),
            data=self.data,
            objective=self.trained.objective,
            trained_pairs=self.trained.trained_pairs,
        )

    def questions(self, respondent: Respondent, num_views: int, seed: int) -> EvaluationSet:
        """The views of one task's queries. Raises `UserError` for a task larger than the largest canvas."""
        questions = Ask(seed).questions(respondent, num_views)
        if questions.too_large:
            task, side, largest = respondent.store.task_ids[0], questions.sides[0], self.data.sides[-1]
            raise UserError(
                f"task {task} has a grid with a side of {side}, "
                f"but the model's largest canvas is {largest}x{largest}"
            )
        return questions

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def _notes(
        self, questions: EvaluationSet, num_views: int, protocol: str, adaptation: Adaptation
    ) -> list[str]:
        """What else a reader of the answers should know; `protocol` is the label."""
        data, notes = self.data, []
        demonstrations = len(questions.store.task(0).demonstrations)
        if protocol == "transductive":
            notes.append(
                PERHAPS_REMEMBERED
                if nothing_known(self.trained.trained_pairs)
                else "the model was trained on a pair of this task, up to symmetry and colours: "
                "its answer may be remembered"
            )
        if questions.truncated:
            notes.append(
                f"the task has {demonstrations} demonstrations, more than data.max_demos={data.max_demos}; "
                "the first ones were used"
            )
        if demonstrations < data.min_demos:
            notes.append(
                f"the task has {demonstrations} demonstration(s); "
                f"the model was trained with at least {data.min_demos} (data.min_demos)"
            )
        if questions.num_views < num_views:
            notes.append("one view only: the model was trained without turned grids")
        elif (views := questions.num_views_of(questions.queries[0])) < num_views:
            notes.append(f"{views} views only: the task is so regular that it has no more")
        if questions.rollouts > 1:
            notes.append(f"each view was asked in {questions.rollouts} attempts")
        notes += self._answers_that_do_not_fit(questions)
        if adaptation.adapts and not questions.can_adapt(questions.queries[0]):
            name = adaptation.config.name
            notes.append(f"one demonstration is too few for {name}: the model answered as it is")
        return notes

    def _answers_that_do_not_fit(self, questions: EvaluationSet) -> list[str]:
        """A note for every known answer that is larger than the canvas, which is chosen without answers."""
        notes, side = [], smallest_bucket(int(questions.sides[0]), self.data.sides)
        for query in questions.queries:
            output = known_output(questions, query)
            if output is not None and not questions.answer_fits(query):
                rows, columns = output.shape
                notes.append(
                    f"query {query.number}: the known answer is {rows}x{columns}, "
                    f"larger than the {side}x{side} canvas that demonstrations and inputs ask for, "
                    "so that no answer can be right"
                )
        return notes


def answered(
    respondent: Respondent,
    questions: EvaluationSet,
    adaptation: Adaptation,
    thinking: ThinkingConfig,
    record_steps: bool,
) -> tuple[list[AnsweredQuery], dict[int, list[Step]]]:
    """The ranked answers to all questions, and with `record_steps` the refinement of each query."""
    questions.rollouts = thinking.rollouts
    inference = Inference(respondent, questions, adaptation, thinking)
    selection = inference.selection
    predictions = inference.collect(record_steps=record_steps)
    answers = answers_of(questions, predictions.vote(selection=selection))
    return answers, refinements(predictions) if record_steps else {}


def read_task(task: "Task | dict | str | Path", task_id: str | None = None) -> Task:
    """A task from what may stand for one; task_id says which one of a file that holds several."""
    if isinstance(task, Task):
        return task
    if isinstance(task, dict):
        return Task.from_json(task_id or "task", task, "the given dictionary")
    file = Path(task)
    found = {one.id: one for one in file_source(file)[file.stem]()}
    if task_id is None and len(found) > 1:
        raise UserError(
            f"{file} holds {len(found)} tasks; "
            f"say which one with task_id=ID, for example task_id={min(found)}"
        )
    if task_id is not None and task_id not in found:
        raise UserError(f"{file} has no task {task_id}{nearest(task_id, found)}")
    return found[task_id] if task_id else next(iter(found.values()))
