"""The metrics `all.*` of the ancestors' training loops: single views on their canvas, without votes."""

import numpy as np
import torch

from dataset.batch import materialise
from dataset.canvas import IGNORE_LABEL_ID, GridTable
from dataset.store import Store
from dataset.views import ViewBatch
from models.act import Answer
from models.losses import ObjectiveConfig, answer_metrics
from utils import distributed

NAMES = ("accuracy", "exact_accuracy", "q_halt_accuracy", "steps", "lm_loss", "q_halt_loss")


class CanvasScores:
    """Sums of `answer_metrics` over single views.

    A view counts whose answer is known and fits its canvas.
    """

    def __init__(self, store: Store, table: GridTable, objective: ObjectiveConfig):
        self.store, self.table, self.objective = store, table, objective
        self.sums = torch.zeros(len(NAMES) + 1, dtype=torch.float64, device=table.pixels.device)

    def add(self, batch: ViewBatch, answer: Answer) -> None:
        """Take a batch's answers, each at the step at which its view halted."""
        pair = batch.samples.query
        known = self.store.pair_output[pair] >= 0
        fits = self.store.pair_side[pair, 1] <= batch.samples.bucket.side
        # Rows from `valid` on repeat a view, so that shapes stay static.
        counted = known & fits & (np.arange(len(pair)) < batch.valid)
        data = materialise(batch.samples, self.store, self.table).data
        hidden = torch.from_numpy(~counted).to(answer.logits.device)
        labels = data["labels"].masked_fill(hidden[:, None], IGNORE_LABEL_ID)
        metrics = answer_metrics(answer, labels, torch.ones_like(hidden), self.objective)
        self.sums += torch.stack([metrics[name].double() for name in (*NAMES, "count")])

    def right(self) -> tuple[int, int]:
        """How many of this process's views are answered exactly, and how many count."""
        return int(self.sums[NAMES.index("exact_accuracy")]), int(self.sums[-1])

    def means(self) -> dict[str, float]:
        """Name -> mean over the counted views of all processes; nothing when there is none."""
        *sums, count = distributed.sum_tensor(self.sums.clone()).tolist()
        return (
            {f"all.{name}": value / count for name, value in zip(NAMES, sums, strict=True)} if count else {}
        )
