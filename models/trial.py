"""A forward pass on made-up grids, which leaves no trace: what a machine is timed by."""

from collections.abc import Callable
from typing import Literal

import torch

from dataset.batch import DataConfig
from models.act import act_step, initial_carry
from models.context import PuzzleEmbedding
from models.core import RecursiveModel
from models.fused import as_written
from utils.processor import choose_threads

NUMBERS = 1 << 20  # activations of a layer at most, where one sample has fewer: a trial takes a moment
DEMOS = 3  # demonstrations of each sample at most


def settle_threads(
    asked: int | Literal["auto"],
    model: RecursiveModel,
    data: DataConfig,
    samples: int,
    kept: int | None = None,
) -> str | None:
    """Set how many threads of the CPU compute with `model`, and return what is to be said of it.

    What `asked` and `kept` mean is in `choose_threads`. Beside a GPU `auto` changes nothing.
    """
    if model.lm_head.weight.device.type == "cpu":
        return choose_threads(asked, kept, trial(model, data, samples))
    if asked != "auto":
        torch.set_num_threads(asked)
    return None


def trial(model: RecursiveModel, data: DataConfig, samples: int) -> Callable[[], None]:
    """A function that makes one ACT step without gradient, on `samples` full canvases of the smallest side.

    Fewer samples where these would take long.
    """
    cells, colours = data.sides[0] ** 2, model.lm_head.weight.shape[0]
    demos = 0 if isinstance(model.context, PuzzleEmbedding) else min(DEMOS, data.max_demos)
    batch = max(1, min(samples, NUMBERS // (cells * (1 + 2 * demos) * model.config.hidden_size)))
    device, generator = model.lm_head.weight.device, torch.Generator().manual_seed(0)

    def grids(*shape: int) -> torch.Tensor:
        """(*shape, L) tokens; 0 and 1 are no colours."""
        return torch.randint(2, colours, (*shape, cells), generator=generator).to(device)

    batch_data = {
        "inputs": grids(batch).byte(),
        "labels": grids(batch),
        "puzzle_identifiers": torch.zeros(batch, dtype=torch.int32, device=device),
    }
    if demos:
        batch_data["demo_inputs"] = grids(batch, demos).byte()
        batch_data["demo_labels"] = grids(batch, demos).byte()
        batch_data["demo_mask"] = torch.ones(batch, demos, dtype=torch.bool, device=device)

    @torch.no_grad()
    def step() -> None:
        training = model.training
        model.eval()
        # A compiled chain is bound to a number of threads, and takes long to compile.
        with as_written():
            act_step(model, initial_carry(model, batch_data), batch_data)
        model.train(training)

    return step
