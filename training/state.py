"""Everything of a run that changes: what a checkpoint holds and what a resume restores."""

import math
from dataclasses import dataclass, field
from itertools import dropwhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset.batch import Bucket
from dataset.samplers import local_samples
from models.act import Carry
from models.core import RecursiveModel
from models.pretrained import load_strictly
from training.attempt import Verdict
from training.ema import EMA
from training.optim import load_optimizer
from training.task_errors import TaskErrors
from utils import checkpoint
from utils.distributed import World


@dataclass
class TrainState:
    """Model, optimisers, averages, one carry per bucket, the number of updates made, and the validation score
    by step.

    trained_pairs: fingerprints of all pairs that the weights have been trained on, in this run and in those
    it started from. task_errors: the counts that error-weighted sampling goes by; None: it is off.
    verdict: on the last update, until `settle` hears it.

    Samplers have no state."""

    model: RecursiveModel
    optimizers: list
    ema: EMA | None
    trained_pairs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    step: int = 0
    carries: dict[Bucket, Carry] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)
    task_errors: TaskErrors | None = None
    verdict: Verdict | None = None

    def settle(self) -> None:
        """Hear whether the last update was made. Only then is what the host knows of the optimisers right."""
        if self.verdict is not None:
            _ = self.verdict.made
            self.verdict = None

    @property
    def best_step(self) -> int | None:
        """The first step with the highest validation score."""
        return max(sorted(self.scores), key=lambda step: self.scores[step], default=None)

    def out_of_patience(self, patience: int | None, min_delta: float = 0.0) -> bool:
        """Whether the last `patience` scores were no more than `min_delta` better than the best before.

        The plateau before the model learns anything does not count: the scores up to the first that differs
        from those before it.
        """
        steps = sorted(self.scores)
        best, waited = self.scores[steps[0]] if steps else -math.inf, 0
        for step in dropwhile(lambda step: self.scores[step] == self.scores[steps[0]], steps):
            better = self.scores[step] > best + min_delta
            best, waited = (self.scores[step], 0) if better else (best, waited + 1)
        return patience is not None and waited >= patience

    def save(self, folder: Path, world: World, info: dict[str, Any], keep: int, keep_best: int = 0) -> Path:
        """Write a checkpoint of this step into `folder` (all processes together)."""
        self.settle()
        whole = self.model.state_dict()
        weights = {"raw": whole}
        if self.ema:
            # What is not averaged, as the puzzle table, is written once: with the weights that are evaluated
            # and shared.
            weights = {
                "raw": {name: whole[name] for name in self.ema.shadow},
                "ema": {**whole, **self.ema.shadow},
            }
        training: dict[str, Any] = {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        if self.task_errors:
            training["task_errors"] = self.task_errors.state_dict()
        shared = {
            "training": training,
            "trained_pairs": torch.from_numpy(self.trained_pairs.view(np.int64)),
        }
        carries = [{"cell": tuple(bucket), **vars(carry)} for bucket, carry in self.carries.items()]
        mine = {"carries": carries, "rng": torch.get_rng_state()}
        content = checkpoint.Content(weights, shared, mine, {**info, "scores": self.scores})
        return checkpoint.save(folder, self.step, world, content, checkpoint.Keep(keep, keep_best))

    def load(self, path: Path, world: World, device: torch.device) -> None:
        """Restore the state that `save` wrote, also under another number of processes."""
        info = checkpoint.load_info(path)
        raw = checkpoint.load_weights(path, "raw")
        load_strictly(self.model, raw, path)
        if self.ema:
            averaged = checkpoint.load_weights(path, "ema")
            self.ema.load({name: averaged[name] for name in self.ema.shadow})
        training = checkpoint.load_torch(path / "training.pt")
        for optimizer, saved in zip(self.optimizers, training["optimizers"], strict=True):
            load_optimizer(optimizer, saved)
        if self.task_errors:
            self.task_errors.load(training["task_errors"], world.is_main)
        ranks = [checkpoint.load_torch(path / f"rank_{rank}.pt") for rank in range(info["world_size"])]
        self.carries = _merge_carries(ranks, world, device)
        torch.set_rng_state(ranks[min(world.rank, len(ranks) - 1)]["rng"])
        self.trained_pairs = np.union1d(self.trained_pairs, checkpoint.load_trained_pairs(path))
        self.step = info["step"]
        self.scores = {int(step): score for step, score in info.get("scores", {}).items()}
        score = checkpoint.load_score(path)
        if score is not None:
            self.scores[self.step] = score


def _merge_carries(ranks: list[dict], world: World, device: torch.device) -> dict[Bucket, Carry]:
    """The saved processes' carries as one global batch per bucket, cut into this world's shares."""
    carries = {}
    for parts in zip(*(saved["carries"] for saved in ranks), strict=True):
        whole = Carry.join(
            [Carry(**{name: value for name, value in part.items() if name != "cell"}) for part in parts]
        )
        share = whole[local_samples(len(whole.steps), world.rank, world.size)]
        carries[Bucket(*parts[0]["cell"])] = share.map(lambda value: value.to(device, copy=True))
    return carries
