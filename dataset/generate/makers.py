"""Generators that make further training tasks of a dataset, and the processes in which they do.

A builder writes under `made_by` in `dataset.json` which generator made a subset, and its plan.
"""

import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing import parent_process
from multiprocessing.connection import wait
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError

from dataset.augment import fingerprints
from dataset.generate.rearc import RearcGenerator, RearcPlan
from dataset.generate.rule_tasks import Generator, Plan
from dataset.task import Task
from utils.errors import UserError


class TaskMaker(Protocol):
    """Makes training tasks of which each depends on its number alone."""

    def training_tasks(self, numbers: Sequence[int]) -> list[Task]:
        """The tasks of these numbers. One that cannot be made within the plan's limits is left out."""
        ...


_MAKERS: dict[str, tuple[type, Callable[[Any], TaskMaker]]] = {
    "rules": (Plan, Generator),
    "rearc": (RearcPlan, RearcGenerator),
}


def maker_of(made_by: dict[str, Any], where: str) -> TaskMaker:
    """The generator of a subset. Raises `UserError` that begins with `where` for one that is not known."""
    try:
        kind, make = _MAKERS[made_by["generator"]]
        plan: Any = TypeAdapter(kind).validate_python(made_by["plan"])
    except (KeyError, ValidationError):
        raise UserError(f"{where} was made by a generator that this version has not; build it anew") from None
    return make(plan)


# --- In another process ---


def start_worker() -> None:
    """Make this process end with the one that started it, and not at a key that asks that one to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None, "a worker has been started by another process"
    threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def make_tasks(made_by: str, where: str, numbers: Sequence[int]) -> list[Task]:
    """The tasks of these numbers, with their pairs' fingerprints. `made_by` is JSON."""
    tasks = _kept_maker(made_by, where).training_tasks(numbers)
    fingerprints([pair for task in tasks for pair in task.pairs])
    return tasks


@cache
def _kept_maker(made_by: str, where: str) -> TaskMaker:
    # A generator takes long to build, so every process builds its own only once.
    return maker_of(json.loads(made_by), where)
