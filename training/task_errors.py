"""Error-weighted sampling: how often training asked each task and how often it was right, and what the
sampler makes of it.

The training is cut into intervals of steps. A step of interval k is drawn by the counts up to the beginning
of interval k - 1. They are known one whole interval before, so that samples may be drawn ahead of the
training by as much, and still are a function of what a checkpoint holds.
Shapes: T tasks of the dataset, B samples of this process.
"""

import numpy as np
import torch
from torch import Tensor

from dataset.batch import TASKS
from dataset.canvas import IGNORE_LABEL_ID
from models.act import Carry
from models.losses import grade
from utils import distributed


class TaskErrors:
    """Counts by task, (2, T): how many samples of it have halted, and how many of them were right.

    exponent, interval: `data.error_weighted`, `data.error_interval`.
    """

    def __init__(self, tasks: int, exponent: float, interval: int, device: torch.device):
        self.exponent, self.interval = exponent, interval
        # Of this process, since the beginning of interval `number`.
        self.pending = torch.zeros(2, tasks, dtype=torch.int64, device=device)
        self.number = 0
        # Of all processes, up to the beginnings of the interval before and of this one.
        self._set(np.zeros((2, tasks), np.int64), np.zeros((2, tasks), np.int64))

    @torch.no_grad()
    def add(self, carry: Carry, logits: Tensor) -> None:
        """Count the samples that have halted; `logits` (B, L, V) are their last answers."""
        labels = carry.data["labels"]
        halted = carry.halted & (labels != IGNORE_LABEL_ID).any(-1)
        right = halted & grade(logits, labels)[1]
        self.pending.index_add_(1, carry.data[TASKS], torch.stack((halted, right)).long())

    def advance(self, step: int) -> None:
        """After an update, which makes `step` of them: share the counts where an interval has ended."""
        while self.number < step // self.interval:
            whole = distributed.sum_tensor(self.pending.clone()).cpu().numpy()
            self._set(self.newer, self.newer + whole)
            self.pending.zero_()
            self.number += 1

    def factors(self, step: int) -> np.ndarray:
        """By what the share of each task is multiplied in the batch of `step`, (T,) in 0..1.

        It is the share of wrong answers to the power of `exponent`. An answer that is still to come counts as
        wrong, so that no task is lost. `step` is one of the present interval or of the next one.
        Source: `custom_sampling` of TinyRecursiveModelsJD. There it chooses among the augmentations of a
        task, and counts an answer for the sample that comes after the one it belongs to.
        """
        ahead = step // self.interval - self.number
        assert ahead in (0, 1), f"the counts that step {step} is drawn by are not known yet, or no more"
        return self._factors[ahead]

    def state_dict(self) -> dict[str, Tensor | int]:
        """For a checkpoint, the same from every process; all of them ask together."""
        counts = {"older": torch.from_numpy(self.older), "newer": torch.from_numpy(self.newer)}
        pending = distributed.sum_tensor(self.pending.clone()).cpu()
        return {**counts, "pending": pending, "number": self.number}

    def load(self, saved: dict, is_main: bool) -> None:
        """Go on from a checkpoint; the first process takes what had not been shared yet."""
        self.number = saved["number"]
        self._set(saved["older"].numpy(), saved["newer"].numpy())
        self.pending.copy_(saved["pending"] if is_main else torch.zeros_like(saved["pending"]))

    def _set(self, older: np.ndarray, newer: np.ndarray) -> None:
        self.older, self.newer = older, newer
        self._factors = [(1 - right / (asked + 1)) ** self.exponent for asked, right in (older, newer)]
