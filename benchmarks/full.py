"""Training states and batches of any size, without a dataset.

Every cell of every grid is full, so that all work on them is useful.
"""

import torch

from config.schema import PretrainConfig
from dataset.batch import Batch, Bucket, DataSizes
from dataset.canvas import VOCAB_SIZE
from models.trm import build_model
from training.ema import EMA
from training.optim import build_optimizers
from training.state import TrainState


def full_batch(bucket: Bucket, batch: int, device: torch.device) -> Batch:
    """`batch` samples with random colours in every cell; a bucket of 0 demonstrations has none."""
    torch.manual_seed(0)

    def grids(*shape: int) -> torch.Tensor:
        """(*shape, L) tokens; 0 and 1 are no colours."""
        return torch.randint(2, VOCAB_SIZE, (*shape, bucket.side**2), device=device)

    data = {
        "inputs": grids(batch).byte(),
        "labels": grids(batch),
        "puzzle_identifiers": torch.zeros(batch, dtype=torch.int32, device=device),
    }
    if bucket.demos:
        shown = batch, bucket.demos
        data |= {"demo_inputs": grids(*shown).byte(), "demo_labels": grids(*shown).byte()}
        data["demo_mask"] = torch.ones(shown, dtype=torch.bool, device=device)
    return Batch(bucket, data)


def full_state(config: PretrainConfig, side: int, device: torch.device) -> TrainState:
    """The configured model with its first weights, its optimisers and averages, for one canvas."""
    torch.manual_seed(0)
    sizes = DataSizes(VOCAB_SIZE, 1, side**2)
    model = build_model(config.arch.on(device), sizes, config.encoder).to(device)
    return TrainState(model, build_optimizers(model, config, device)[0], EMA(model, config.ema_rate))
