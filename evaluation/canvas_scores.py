"""The ancestors' in-loop evaluation metrics `all.*`: of single views on their canvas, without votes."""

import numpy as np
import torch

from dataset.batch import materialise
from dataset.canvas import IGNORE_LABEL_ID, GridTable
from dataset.store import Store
from dataset.views import ViewBatch
from models.act import Answer, Carry, StepOutput
from models.context import Context
from models.losses import ObjectiveConfig, act_loss
from utils import distributed

NAMES = ("accuracy", "exact_accuracy", "q_halt_accuracy", "steps", "lm_loss", "q_halt_loss")


class CanvasScores:
    """Sums of `act_loss`'s metrics over the views whose answer is known and fits its canvas; the others count nowhere."""

    def __init__(self, store: Store, table: GridTable, objective: ObjectiveConfig):
        self.store, self.table, self.objective = store, table, objective
        self.sums = torch.zeros(len(NAMES) + 1, dtype=torch.float64, device=table.pixels.device)

    def add(self, batch: ViewBatch, answer: Answer) -> None:
        """Take a batch's answers, each at the step at which its view halted."""
        pair = batch.samples.query
        counted = (self.store.pair_output[pair] >= 0) & (
            self.store.pair_side[pair, 1] <= batch.samples.bucket.side
        )
        counted &= np.arange(len(pair)) < batch.valid
        data = materialise(batch.samples, self.store, self.table).data
        hidden = torch.from_numpy(~counted).to(answer.logits.device)
        data["labels"] = data["labels"].masked_fill(hidden[:, None], IGNORE_LABEL_ID)
        carry = Carry((), answer.steps, torch.ones_like(hidden), data)
        unread = (
            answer.q_halt_logits
        )  # in evaluation the loss reads neither the halting alternative nor the context
        output = StepOutput(carry, answer.logits, answer.q_halt_logits, unread, Context(unread), {})
        _, metrics = act_loss(output, self.objective)
        self.sums += torch.stack([metrics[name].double() for name in (*NAMES, "count")])

    def means(self) -> dict[str, float]:
        """Name -> mean over the counted views of all processes; nothing when there is none."""
        *sums, count = distributed.sum_tensor(self.sums.clone()).tolist()
        return (
            {f"all.{name}": value / count for name, value in zip(NAMES, sums, strict=True)} if count else {}
        )
