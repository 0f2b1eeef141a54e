"""Measure how much a TRM's answers depend on the puzzle identifier.

    python -m experiments.puzzle_id checkpoint=runs/NAME num_views=8

Give any keys of evaluate.py. The same evaluation runs in three modes, which change what the model is told and
nothing else. Votes, queries and views stay those of the true puzzle.

- `normal`: the puzzle's own identifier.
- `blank`: the blank identifier.
- `random`: an identifier of another task, drawn once per task. A view gets the one with its own number among
  the other task's augmentations.

The command prints a line per mode, and writes puzzle_id.json into output_dir (default: a folder of
`experiments` in the run's folder):

    checkpoint, data_paths, protocol, ranking, aggregated_voting, num_tasks,
    modes: {mode: {puzzle_id_mode, ARC: {metric: value}, against_normal}}

against_normal compares pass@1 with the mode `normal`, paired over tasks: difference, ci95, p_permutation and
more.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataset.store import LEFT_OUT, Store
from dataset.views import BLANK_ID
from evaluation.metrics import solved_within, task_means
from evaluation.session import Session
from experiments.commands import folder_of, for_model, opened
from models.context import PuzzleEmbedding
from models.core import RecursiveModel
from tools.compare import paired
from utils import distributed
from utils.errors import UserError, reports_user_errors
from utils.files import write_json

MODES = ("normal", "blank", "random")


def identifiers_told(store: Store, mode: str, seed: int) -> torch.Tensor:
    """(identifiers,) the identifier that the model is told in place of each true one."""
    told = np.arange(store.metadata.num_puzzle_identifiers)
    if mode == "blank":
        told[:] = BLANK_ID
    elif mode == "random":
        # The rows of tasks that were left out have learned nothing, so none may stand for another.
        known = np.flatnonzero(store.task_split != LEFT_OUT)
        order = np.random.default_rng(seed).permutation(known)
        # The next task in a random circle is never the task itself.
        for task, other in zip(order, np.roll(order, 1), strict=True):
            own, others = _identifiers_of(store, task), _identifiers_of(store, other)
            told[own] = others[np.arange(len(own)) % len(others)]
    return torch.from_numpy(told)


def _identifiers_of(store: Store, task: int) -> np.ndarray:
    """(n,) the identifiers of a task and its augmentations."""
    return store.identifiers_of(np.arange(store.task_rows[task], store.task_rows[task + 1]))


@contextmanager
def told_instead(model: RecursiveModel, told: torch.Tensor) -> Iterator[None]:
    """Within it the model looks up `told[identifier]`. Others who read the batch see the identifier."""

    def replace(module: torch.nn.Module, arguments: tuple) -> tuple:
        data, *rest = arguments
        return {**data, "puzzle_identifiers": told[data["puzzle_identifiers"].long()]}, *rest

    handle = model.context.register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def ablate(session: Session) -> dict[str, Any]:
    """The content of puzzle_id.json. Only the first process compares the modes.

    Raises `UserError` for a model without puzzle identifiers, and for queries without known answers.
    """
    model, store = session.respondent.model, session.respondent.store
    identified = isinstance(model.context, PuzzleEmbedding) and store.layout.learns_rows
    if not identified or len(store.task_ids) < 2:
        raise UserError(
            f"{session.trained.path} knows its tasks by no puzzle identifiers, so that there are none to "
            "replace"
        )
    modes, shares = {}, {}
    for mode in MODES:
        # The seed of the evaluation, so that one number repeats all of it.
        told = identifiers_told(store, mode, session.config.seed).to(session.respondent.device)
        with told_instead(model, told):
            evaluation = session.evaluate()
        labelled = [record for record in evaluation.records if record["label_hash"] is not None]
        if not labelled:
            raise UserError(
                f"{session.respondent.data.path}: no query that is asked has a known answer, "
                "so that nothing can be compared"
            )
        right = solved_within([record["rank_of_truth"] for record in labelled], 1)
        shares[mode] = task_means([record["task"] for record in labelled], right)
        modes[mode] = {"puzzle_id_mode": mode, "ARC": evaluation.metrics()}
        if session.respondent.world.is_main and mode != "normal":
            modes[mode]["against_normal"] = paired(shares["normal"], shares[mode], session.config.seed)
    return {
        "checkpoint": str(session.trained.path),
        "data_paths": [session.respondent.data.path],
        "protocol": evaluation.protocol,
        "ranking": session.config.ranking,
        "aggregated_voting": evaluation.num_views > 1,
        "num_tasks": evaluation.counts["tasks"],
        "modes": modes,
        "about": session.about(),
    }


@reports_user_errors
def main() -> None:
    options = for_model("experiments.puzzle_id", __doc__).parse_args()
    # Controls would ask every query again in each mode, and are not compared.
    session = opened([*options.overrides, "controls=[]"])
    result = ablate(session)
    if session.respondent.world.is_main:
        path = folder_of(session) / "puzzle_id.json"
        write_json(path, result, indent=1)
        for mode, found in result["modes"].items():
            names = [name for name in ("ARC/pass@1", "ARC/single_view") if name in found["ARC"]]
            scores = "  ".join(f"{name} {100 * found['ARC'][name]:.2f} %" for name in names)
            if mode != "normal":
                low, high = found["against_normal"]["ci95"]
                scores += f"  difference [{100 * low:.2f}, {100 * high:.2f}]"
            print(f"{mode:<8}{scores}")
        print(f"{result['num_tasks']} tasks, {result['protocol']}; {path}")
    distributed.close()


if __name__ == "__main__":
    main()
