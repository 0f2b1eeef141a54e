"""Puzzle-id ablation of a TRM: python -m experiments.puzzle_id checkpoint=runs/NAME [key=value of evaluate.py ...]

The same evaluation under three modes of what the model is told, and of nothing else: `normal`, its puzzle's identifier;
`blank`, the blank identifier; `random`, an identifier of another task, drawn once per task (the view's own number among the
other task's augmentations). Votes, queries and views stay those of the true puzzle. Writes puzzle_id.json into
output_dir (default: experiments/ in the run's folder) and prints a line per mode:
  checkpoint, data_paths, protocol, ranking, aggregated_voting, num_tasks; modes: {mode: {puzzle_id_mode, ARC {metric: value},
  against_normal (paired over tasks, by pass@1: difference, ci95, p_permutation, ...; absent for normal)}}
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

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
    """(identifiers,) what the model is told for each true identifier."""
    told = np.arange(store.metadata.num_puzzle_identifiers)
    if mode == "blank":
        told[:] = BLANK_ID
    elif mode == "random":
        known = np.flatnonzero(store.task_split != LEFT_OUT)  # the others' rows have learned nothing
        order = np.random.default_rng(seed).permutation(known)
        for task, other in zip(order, np.roll(order, 1), strict=True):
            mine, theirs = (
                store.identifiers_of(np.arange(store.task_rows[t], store.task_rows[t + 1]))
                for t in (task, other)
            )
            told[mine] = theirs[np.arange(len(mine)) % len(theirs)]
    return torch.from_numpy(told)


@contextmanager
def told_instead(model: RecursiveModel, told: torch.Tensor) -> Iterator[None]:
    """Let the model look up `told[identifier]`; whoever else reads the batch still sees the identifier."""

    def replace(module: torch.nn.Module, arguments: tuple) -> tuple:
        data, *rest = arguments
        return {**data, "puzzle_identifiers": told[data["puzzle_identifiers"].long()]}, *rest

    handle = model.context.register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def ablate(session: Session) -> dict[str, Any]:
    """puzzle_id.json; only the first process compares the modes."""
    identified = isinstance(session.model.context, PuzzleEmbedding) and session.store.layout.learns_rows
    if not identified or len(session.store.task_ids) < 2:
        raise UserError(
            f"{session.path} knows its tasks by no puzzle identifiers, so that there are none to replace"
        )
    modes, shares = {}, {}
    for mode in MODES:
        told = identifiers_told(session.store, mode, session.config.seed).to(session.device)
        with told_instead(session.model, told):
            evaluation = session.evaluate()
        labelled = [record for record in evaluation.records if record["label_hash"] is not None]
        if not labelled:
            raise UserError(
                f"{session.data.path}: no query that is asked has a known answer, so that nothing can be compared"
            )
        right = solved_within([record["rank_of_truth"] for record in labelled], 1)
        shares[mode] = task_means([record["task"] for record in labelled], right)
        modes[mode] = {"puzzle_id_mode": mode, "ARC": evaluation.metrics()}
        if session.world.is_main and mode != "normal":
            modes[mode]["against_normal"] = paired(shares["normal"], shares[mode], session.config.seed)
    return {
        "checkpoint": str(session.path),
        "data_paths": [session.data.path],
        "protocol": evaluation.protocol,
        "ranking": session.config.ranking,
        "aggregated_voting": evaluation.num_views > 1,
        "num_tasks": evaluation.counts["tasks"],
        "modes": modes,
        "about": session.about(),
    }


@reports_user_errors
def main() -> None:
    arguments = for_model("experiments.puzzle_id", __doc__)
    session = opened([*arguments.overrides, "controls=[]"])
    result = ablate(session)
    if session.world.is_main:
        path = folder_of(session) / "puzzle_id.json"
        write_json(path, result, indent=1)
        for mode, found in result["modes"].items():
            names = [name for name in ("ARC/pass@1", "ARC/single_view") if name in found["ARC"]]
            scores = "  ".join(f"{name} {100 * found['ARC'][name]:.2f} %" for name in names)
            low, high = found.get("against_normal", {}).get("ci95", (0, 0))
            print(
                f"{mode:<8}{scores}"
                + (f"  difference [{100 * low:.2f}, {100 * high:.2f}]" if mode != "normal" else "")
            )
        print(f"{result['num_tasks']} tasks, {result['protocol']}; {path}")
    distributed.close()


if __name__ == "__main__":
    main()
