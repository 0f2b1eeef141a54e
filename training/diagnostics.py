"""Does the context carry what it should? Cheap measurements of the encoder, for the log.

Shapes: B batch, N probed samples, X numbers of a context's summary.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dataset import augment
from dataset.batch import Samples, materialise
from dataset.canvas import GridTable
from dataset.samplers import step_rng
from dataset.store import Store
from models.context import Context
from models.trm import RecursiveModel
from utils import distributed
from utils.distributed import World

PROBE_STREAM = 3
PROBED_TASKS = 16
PROBED_VIEWS = 4


def watch_gradient(context: Context) -> Tensor:
    """(B,) bool, filled in by the backward pass: whose context got a gradient that is not zero."""
    reached = torch.zeros(len(context.told), dtype=torch.bool, device=context.told.device)

    def note(gradient: Tensor) -> None:
        reached.copy_(torch.linalg.vector_norm(gradient.flatten(1), torch.inf, dim=1) > 0)

    if context.told.requires_grad:
        context.told.register_hook(note)
    return reached


def gradient_norms(model: RecursiveModel) -> dict[str, Tensor]:
    """Norms of the present gradients: of the recursion, `inner`, of the `encoder` if there is one to train, of both, `total`."""
    encoder = list(model.context.parameters())
    known = {id(parameter) for parameter in encoder}
    parts = {"inner": [p for p in model.parameters() if id(p) not in known], "encoder": encoder}
    norms = {}
    for name, parameters in parts.items():
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            norms[name] = torch.nn.utils.get_total_norm(gradients)
    return norms | {"total": torch.linalg.vector_norm(torch.stack(list(norms.values())))}


def energy_shares(vectors: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """(between, within): the shares of the mean square of `vectors` (N, X) that differ between and within `groups` (N,).

    Scale-free. What is left to 1 is common to all vectors. A lone member of a group has nothing within it.
    """
    _, index = groups.unique(return_inverse=True)
    count = torch.bincount(index).to(vectors)
    means = torch.zeros(len(count), vectors.shape[1]).to(vectors).index_add_(0, index, vectors) / count[:, None]
    total = vectors.square().sum()
    between = (means[index] - vectors.mean(0)).square().sum() / total
    within = (vectors - means[index]).square().sum() / total
    return between, within


@torch.no_grad()
def context_diagnostics(
    model: RecursiveModel, samples: Samples, store: Store, table: GridTable, seed: int, step: int, world: World
) -> dict[str, float]:
    """Of a training batch's first samples (16 over all processes) in four augmented views each, the model in evaluation mode:

    `context/between_task_share` and `context/within_task_share`: shares of the context's energy (see `energy_shares`) by
    task, where a task's samples differ in their augmentation (and its episodes in their demonstrations).
    `context/prefix_rms_ratio`: RMS of valid prefix tokens over that of the core's token embeddings; `context/memory_rms`.
    `train/encoder_...`: the ETRM ancestor's numbers, of the same contexts' summaries; unlike the shares they grow with the scale.
    Nothing for a model without demonstrations. Leaves the model in evaluation mode.
    """
    if not samples.cell.demos:
        return {}
    rows = np.arange(min(len(samples.query), max(1, PROBED_TASKS // world.size))).repeat(PROBED_VIEWS)
    rng = step_rng(seed, step, PROBE_STREAM)
    probed = replace(
        samples[rows],
        transform=rng.integers(0, 8, len(rows)),
        colours=augment.random_colours(rng, len(rows)),
        offset=np.zeros((len(rows), 2), np.int64),
    )
    data = materialise(probed, store, table, with_labels=False).data
    model.eval()
    context = model.context(data)
    vectors = distributed.gather_rows(context.summary())
    between, within = energy_shares(vectors, distributed.gather_rows(data["puzzle_identifiers"]))
    energy = vectors.square().mean()
    values = {
        "train/encoder_output_mean": vectors.mean(),
        "train/encoder_output_std": vectors.std(),
        "train/encoder_output_norm": vectors.unflatten(1, (-1, context.prefix.shape[-1])).norm(dim=-1).mean(),
        "train/encoder_token_std": vectors.std(0).mean(),
        "train/encoder_cross_sample_var": (between + within) * energy,
        "train/encoder_within_group_var": within * energy,
        "context/between_task_share": between,
        "context/within_task_share": within,
        "context/prefix_rms_ratio": _rms(context.prefix, context.prefix_mask) / _rms(model.embed_tokens(data["inputs"])),
    }
    if context.memory is not None:
        values["context/memory_rms"] = _rms(context.memory, context.memory_mask)
    return {name: float(value) for name, value in values.items()}


def _rms(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Over the valid tokens of all processes."""
    tokens = tokens.float() if mask is None else tokens[mask].float()
    sums = torch.stack([tokens.square().sum(), torch.tensor(float(tokens.numel()), device=tokens.device)])
    total, count = distributed.sum_tensor(sums)
    return (total / count).sqrt()
