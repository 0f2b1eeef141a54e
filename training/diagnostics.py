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
from dataset.samplers import Stream, step_rng
from dataset.store import Store
from models.context import Context
from models.core import RecursiveModel
from utils import distributed
from utils.distributed import World

PROBED_TASKS = 16
PROBED_VIEWS = 4


def watch_gradient(context: Context) -> Tensor:
    """(B,) bool, filled in by the backward passes: whose context got a gradient that is not zero."""
    reached = torch.zeros(len(context.told), dtype=torch.bool, device=context.told.device)

    def note(gradient: Tensor) -> None:
        reached.logical_or_(torch.linalg.vector_norm(gradient.flatten(1), torch.inf, dim=1) > 0)

    if context.told.requires_grad:
        context.told.register_hook(note)
    return reached


def gradient_norms(model: RecursiveModel) -> dict[str, Tensor]:
    """Norms of the present gradients: of the recursion, `inner`, and of the `encoder`, unless frozen or
    absent, and of both, `total`."""
    encoder = list(model.context.parameters())
    known = {id(parameter) for parameter in encoder}
    parts = {"inner": [p for p in model.parameters() if id(p) not in known], "encoder": encoder}
    norms = {}
    for name, parameters in parts.items():
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            norms[name] = torch.nn.utils.get_total_norm(gradients)
    nothing = torch.zeros((), device=model.lm_head.weight.device)
    return norms | {"total": torch.linalg.vector_norm(torch.stack([nothing, *norms.values()]))}


def energy_shares(vectors: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """(between, within): the shares of the mean square of `vectors` (N, X) that differ between and within
    `groups` (N,).

    Scale-free. What is left to 1 is common to all vectors. A lone member of a group has nothing within it.
    """
    _, index = groups.unique(return_inverse=True)
    count = torch.bincount(index).to(vectors)
    means = (
        torch.zeros(len(count), vectors.shape[1]).to(vectors).index_add_(0, index, vectors) / count[:, None]
    )
    total = vectors.square().sum()
    between = (means[index] - vectors.mean(0)).square().sum() / total
    within = (vectors - means[index]).square().sum() / total
    return between, within


@torch.no_grad()
def context_diagnostics(
    model: RecursiveModel,
    samples: Samples,
    store: Store,
    table: GridTable,
    seed: int,
    step: int,
    world: World,
) -> dict[str, float]:
    """Of up to 16 samples of a training batch in four augmented views each, the model in evaluation mode:

    `context/between_task_share` and `context/within_task_share`: shares of the context's energy (see
    `energy_shares`) by task, where a task's samples differ in their augmentation (and its episodes in their
    demonstrations). `context/prefix_rms_ratio`: RMS of valid prefix tokens over that of the core's token
    embeddings; `context/memory_rms`. `train/encoder_...`: the ETRM ancestor's numbers, of the same contexts'
    summaries; unlike the shares they grow with the scale. Nothing for a model without demonstrations. Leaves
    the model in evaluation mode.
    """
    if not samples.bucket.demos:
        return {}
    # Evenly spaced, so that the probed samples are the same for any number of processes that divides them.
    count = min(len(samples.query), max(1, PROBED_TASKS // world.size))
    rows = (np.arange(count) * len(samples.query) // count).repeat(PROBED_VIEWS)
    rng, mine = (
        step_rng(seed, step, Stream.PROBE),
        slice(world.rank * len(rows), (world.rank + 1) * len(rows)),
    )
    probed = replace(
        samples[rows],
        transform=rng.integers(0, 8, len(rows) * world.size)[mine],
        colours=augment.random_colours(rng, len(rows) * world.size)[mine],
        offset=np.zeros((len(rows), 2), np.int64),
    )
    data = materialise(probed, store, table, with_labels=False).data
    model.eval()
    context = model.context(data)
    vectors = distributed.gather_rows(context.summary())
    tasks = torch.from_numpy(np.searchsorted(store.task_pairs, probed.query, side="right"))
    between, within = energy_shares(vectors, distributed.gather_rows(tasks.to(vectors.device)))
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
        "context/prefix_rms_ratio": _rms(context.prefix, context.prefix_mask)
        / _rms(model.embed_tokens(data["inputs"])),
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
