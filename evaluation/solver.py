"""Ask a trained few-shot model one task, in memory: views, votes and answers as an evaluation has them.

solver = Solver.from_pretrained("runs/first")
answers = solver.solve("task.json")              # answers[0][0]: the best answer to the first query
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt, SerializeAsAny, field_validator

from dataset.batch import DataConfig
from dataset.canvas import smallest_bucket
from dataset.layouts import LAYOUTS
from dataset.leaks import tasks_seen
from dataset.sources import file_source
from dataset.store import Store
from dataset.task import Task
from dataset.views import EvaluationSet
from dataset.writer import About, pack
from evaluation.inference import collect
from evaluation.protocols import Adaptation, ProtocolConfig, adaptation_of, described, label, typed_protocol
from evaluation.refinement import Step, refinements
from evaluation.run import AS_IT_IS, answered_of, records_of
from evaluation.voting import Candidate
from models.core import RecursiveModel
from models.losses import ObjectiveConfig
from models.pretrained import load_checkpoint
from utils import checkpoint
from utils.config import Config
from utils.device import choose_device
from utils.distributed import World
from utils.errors import UserError, nearest

SUBSET = "asked"


class AskConfig(Config):
    """Which checkpoint is asked which task."""

    checkpoint: str
    task: str
    task_id: str | None
    weights: Literal["ema", "raw"]
    protocol: SerializeAsAny[ProtocolConfig]
    num_views: PositiveInt
    seed: NonNegativeInt
    device: Literal["auto", "cpu", "cuda"]

    _typed_protocol = field_validator("protocol", mode="before")(typed_protocol)

    @field_validator("task_id", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value


@dataclass
class Solution:
    """What a model answers to a task.

    protocol: the label, in words (`evaluation.protocols.described`). num_views: views per query that voted.
    answers: per query, best first. records: per query, as in an evaluation's per_example.jsonl. notes: what else a reader
    of the answers should know.
    """

    task: Task
    protocol: str
    num_views: int
    answers: list[list[Candidate]]
    records: list[dict[str, Any]]
    notes: list[str]


class Solver:
    """A model that reads demonstrations, with what its training says of canvases and demonstrations."""

    def __init__(
        self,
        model: RecursiveModel,
        data: DataConfig,
        trained_pairs: np.ndarray,
        path: Path,
        info: dict[str, Any],
    ):
        self.model, self.data, self.trained_pairs, self.path, self.info = (
            model,
            data,
            trained_pairs,
            path,
            info,
        )

    @classmethod
    def from_pretrained(cls, path: str | Path, weights: str = "ema", device: str = "auto") -> "Solver":
        """The model of a checkpoint folder, or of a run folder's newest checkpoint.

        Raises `UserError` for one that knows its tasks otherwise than by their demonstrations.
        """
        path = checkpoint.resolve(path)
        model, info = load_checkpoint(path, weights)
        if not info["config"]["encoder"]:
            knows = LAYOUTS[info["data"]["layout"]].unknown
            raise UserError(
                f"{path}: this model (arch={info['config']['arch']['name']} without an encoder) {knows}; train one with an encoder"
            )
        trained_pairs = checkpoint.load_trained_pairs(path)
        return cls(
            model.to(choose_device(device, World())),
            DataConfig(**info["config"]["data"]),
            trained_pairs,
            path,
            info,
        )

    def solve(
        self,
        task: "Task | dict | str | Path",
        num_views: int = 8,
        seed: int = 0,
        batch_size: int = 64,
        protocol: ProtocolConfig | None = None,
    ) -> list[list[dict]]:
        """Per query its answers, best first: `{"grid": rows of colours, "votes": of so many views, "probability": mean halting
        probability of those views}`; empty when no view gave one.

        task: in the ARC format, a file that holds one, or a `Task`; answers that it may hold are never read. protocol: what
        is done with the demonstrations before (evaluation/protocols.py); None: nothing. Raises
        `UserError` for a malformed task, and for one larger than the model's largest canvas.
        """
        answers = self.ask(read_task(task), num_views, seed, batch_size, protocol or AS_IT_IS).answers
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
        with_steps: bool = False,
    ) -> Solution:
        """The answers to every query of `task`; with_steps records `steps`, the refinement of view 0, too."""
        questions, store = self.questions(task, num_views, seed)
        found = label(protocol, store, tasks_seen(store, questions.tasks, self.trained_pairs))
        adaptation = self._adaptation(protocol, seed, batch_size, store)
        table = store.grid_table.to(self.device)
        predictions = collect(
            self.model, questions, table, batch_size, World(), adaptation=adaptation, every_step=with_steps
        )
        votes = predictions.vote()
        answered = answered_of(questions, votes)
        records = records_of(questions, answered, found)
        for number, steps in refinements(predictions).items() if with_steps else ():
            records[number]["steps"] = steps
        notes = self._notes(questions, num_views, found)
        if adaptation is not None and not questions.can_adapt(questions.queries[0]):
            notes.append(f"one demonstration is too few for {protocol.name}: the model answered as it is")
        answers = [query.candidates for query in answered]
        return Solution(
            task,
            described(found, protocol.name),
            questions.views_of(questions.queries[0]),
            answers,
            records,
            notes,
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
        """The refinement of one query in one of `num_views` views. Raises `UserError` when the task has no such query or view."""
        questions, store = self.questions(task, num_views, seed)
        if not 0 <= query < len(questions.queries):
            raise UserError(
                f"task {task.id} has no query {query}; it has {len(questions.queries)}, counted from 0"
            )
        if view >= questions.views_of(questions.queries[query]):
            why = "a regular task has few, a model trained without turned grids has one"
            raise UserError(f"task {task.id} has no view {view} among num_views={num_views}: {why}")
        adaptation = self._adaptation(protocol, seed, num_views, store)
        table = store.grid_table.to(self.device)
        predictions = collect(
            self.model, questions, table, num_views, World(), adaptation=adaptation, every_step=True
        )
        return refinements(predictions, view)[query]

    def questions(self, task: Task, num_views: int, seed: int) -> tuple[EvaluationSet, Store]:
        """The views of one task's queries. Raises `UserError` when the task is larger than the largest canvas."""
        store = _store_of(task)
        questions = EvaluationSet(store, self.data, "test", num_views, seed)
        if questions.too_large:
            side, largest = questions.sides[0], self.data.sides[-1]
            raise UserError(
                f"task {task.id} has a grid with a side of {side}, but the model's largest canvas is {largest}x{largest}"
            )
        return questions, store

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def _adaptation(
        self, protocol: ProtocolConfig, seed: int, batch_size: int, store: Store
    ) -> Adaptation | None:
        return adaptation_of(
            protocol, ObjectiveConfig.of_run(self.info["config"]["objective"]), seed, batch_size, store.layout
        )

    def _notes(self, questions: EvaluationSet, num_views: int, protocol: str) -> list[str]:
        data, task, notes = self.data, questions.store.task(0), []
        if protocol == "transductive":
            notes.append(
                "the model was trained on a pair of this task, up to symmetry and colours: its answer may be remembered"
            )
        shown = len(task.demonstrations)
        if questions.truncated:
            notes.append(
                f"the task has {shown} demonstrations, more than data.max_demos={data.max_demos}; the first ones were used"
            )
        if shown < data.min_demos:
            notes.append(
                f"the task has {shown} demonstration(s); the model was trained with at least {data.min_demos} (data.min_demos)"
            )
        if questions.num_views < num_views:
            notes.append("one view only: the model was trained without turned grids")
        elif (views := questions.views_of(questions.queries[0])) < num_views:
            notes.append(f"{views} views only: the task is so regular that it has no more")
        side = smallest_bucket(int(questions.sides[0]), data.sides)
        for query in questions.queries:
            if not questions.answer_fits(query):
                rows, columns = task.queries[query.number].output.shape
                notes.append(
                    f"query {query.number}: the known answer is {rows}x{columns}, larger than the {side}x{side} canvas that "
                    "demonstrations and inputs ask for, so that no answer can be right"
                )
        return notes


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
            f"{file} holds {len(found)} tasks; say which one with task_id=ID, for example task_id={min(found)}"
        )
    if task_id is not None and task_id not in found:
        raise UserError(f"{file} has no task {task_id}{nearest(task_id, found)}")
    return found[task_id] if task_id else next(iter(found.values()))


def _store_of(task: Task) -> Store:
    """The task as a dataset of its own, so that it is drawn, augmented and asked as any evaluation task."""
    return pack({SUBSET: [task]}, [SUBSET], About(layout="fewshot", source="one task", seed=0)).store()
