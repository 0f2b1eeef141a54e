"""Who is asked: a model with its tasks, as an evaluation, a solver and a training run hold it."""

from dataclasses import dataclass

import numpy as np
import torch

from dataset.batch import DataConfig
from dataset.canvas import GridTable
from dataset.store import Store
from models.core import RecursiveModel
from models.losses import ObjectiveConfig
from utils.distributed import World


@dataclass(frozen=True, eq=False)
class Respondent:
    """A model, the tasks that it can be asked, and what an evaluation has to know of its training.

    store: the tasks. table: their grids, on the model's device. data, objective: as in training.
    trained_pairs (N,) uint64: fingerprints of all pairs behind the weights, those of earlier runs included.
    world: the processes that answer together.
    """

    model: RecursiveModel
    store: Store
    table: GridTable
    data: DataConfig
    objective: ObjectiveConfig
    trained_pairs: np.ndarray
    world: World = World()

    @property
    def device(self) -> torch.device:
        """Where the answers are computed."""
        return self.table.pixels.device
