"""Show how large and how expensive a configured model is.

    python -m tools.summary arch=etrm data=arc1

Give the keys of a training run. Everything is counted on the meta device: nothing is computed, and no memory
is needed. FLOPs are those of PyTorch's counter, which knows matrix products only and counts 2 per
multiply-add. Activations are what autograd keeps for the backward pass.
"""

import sys
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from config.compose import launch
from config.schema import PretrainConfig
from dataset.batch import Bucket, DataSizes
from dataset.canvas import VOCAB_SIZE
from dataset.samplers import SAMPLERS
from dataset.store import Store
from models.act import StepOutput, act_step, initial_carry
from models.context import Context
from models.core import RecursiveModel
from models.losses import act_loss
from models.noise import Noise
from models.trm import build_model, count_parameters
from utils.errors import reports_user_errors

SHOWN_BUCKETS = 6  # rows of the table, the most frequent buckets


@dataclass(frozen=True)
class Cost:
    """What one sample of a bucket costs.

    state_tokens and memory_tokens: the lengths of the recursion's state and of the memory that it reads.
    context, act_step: forward FLOPs of the context, and of one ACT step in an evaluation.
    train_step: FLOPs of one training step, with context and backward pass.
    """

    state_tokens: int
    memory_tokens: int
    context: int
    act_step: int
    train_step: int


class _FusedAttention(torch.autograd.Function):
    """An attention that computes nothing and keeps for the backward pass what fused kernels keep.

    That is queries, keys, values, the output and one sum per query, but no (queries, keys) matrix.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(
            query, key, value, output, torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        )
        return output


class _AsFused(TorchFunctionMode):
    """Makes every attention a `_FusedAttention`: the meta device itself takes the unfused kernel."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


def on_meta(config: PretrainConfig, sizes: DataSizes) -> RecursiveModel:
    """The configured model on the meta device: shapes without values, in the dtype of this machine."""
    here = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        return build_model(config.arch.on(here), sizes, config.encoder)


def meta_data(bucket: Bucket, with_demos: bool, batch: int = 1) -> dict[str, Tensor]:
    """A batch of `batch` samples of one bucket on the meta device, with the shapes of `materialise`."""
    cells, demos = bucket.side**2, bucket.demos

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    data = {
        "inputs": empty(batch, cells, dtype=torch.uint8),
        "labels": empty(batch, cells, dtype=torch.int64),
        "puzzle_identifiers": empty(batch, dtype=torch.int32),
    }
    if with_demos:
        data["demo_inputs"] = empty(batch, demos, cells, dtype=torch.uint8)
        data["demo_labels"] = empty(batch, demos, cells, dtype=torch.uint8)
        data["demo_mask"] = empty(batch, demos, dtype=torch.bool)
    return data


def _train_step(model: RecursiveModel, data: dict[str, Tensor]) -> StepOutput:
    """The first ACT step of a training step."""
    rows = len(data["inputs"])
    keys = partial(torch.empty, rows, dtype=torch.int64, device="meta")
    noise = Noise(partial(torch.empty, rows, device="meta"), keys)
    return act_step(model, initial_carry(model, data), data, noise=noise)


def cost(model: RecursiveModel, config: PretrainConfig, bucket: Bucket) -> Cost:
    """What one sample of `bucket` costs. `model` is on the meta device."""
    data = meta_data(bucket, config.encoder is not None)
    model.eval()
    # All with gradients, evaluation too: without them the counter fails on views of parameters.
    with FlopCounterMode(display=False) as encoding:
        context: Context = model.context(data)
    with FlopCounterMode(display=False) as stepping:
        act_step(model, initial_carry(model, data), data, context=context)
    model.train()
    with FlopCounterMode(display=False) as training:
        act_loss(_train_step(model, data), config.objective)[0].backward()
    model.zero_grad()
    return Cost(
        state_tokens=context.prefix.shape[1] + bucket.side**2,
        memory_tokens=0 if context.memory is None else context.memory.shape[1],
        context=encoding.get_total_flops(),
        act_step=stepping.get_total_flops(),
        train_step=training.get_total_flops(),
    )


def activation_bytes(model: RecursiveModel, config: PretrainConfig, bucket: Bucket, batch: int) -> int:
    """Bytes that a training step keeps for its backward pass, without the parameters.

    `model` is on the meta device, `batch` the number of samples.
    """
    model.train()
    data = meta_data(bucket, config.encoder is not None, batch)
    # By storage, since several saved tensors may be views of the same one.
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with _AsFused(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        act_loss(_train_step(model, data), config.objective)
    # Parameters are kept too, but they are in memory anyway.
    for owned in model.state_dict().values():
        kept.pop(owned.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def training_buckets(config: PretrainConfig) -> tuple[DataSizes, dict[Bucket, float], str]:
    """The model's sizes, the share of training samples in each bucket, and a phrase that says where both come
    from.

    Without the dataset, all samples are in one bucket: the largest canvas with as many demonstrations as
    allowed.
    """
    # A model can be planned before its dataset is built.
    if (Path(config.data.path) / "dataset.json").is_file():
        store = Store.load(config.data.path, *config.layouts)
        sampler = SAMPLERS[store.metadata.layout](store, config.data, config.seed, config.global_batch_size)
        shares = np.diff(sampler.chances.bucket_cumulative, prepend=0.0).tolist()
        by_bucket = dict(zip(sampler.buckets, shares, strict=True))
        return DataSizes.of(store, config.data), by_bucket, f"the training samples of {config.data.path}"
    side = config.data.sides[-1]
    bucket = Bucket(side, config.data.max_demos if config.encoder else 0)
    one_canvas = side**2 if len(config.data.sides) == 1 else None
    sizes = DataSizes(VOCAB_SIZE, 1, one_canvas)
    return sizes, {bucket: 1.0}, f"the largest canvas (no dataset at {config.data.path})"


def summarise(config: PretrainConfig) -> str:
    """The summary as text: parameters, the table of costs by bucket, and the memory of a training step."""
    sizes, shares, source = training_buckets(config)
    model = on_meta(config, sizes)
    parameters = count_parameters(model)
    shown = sorted(shares, key=lambda bucket: -shares[bucket])[:SHOWN_BUCKETS]
    costs = {bucket: astuple(cost(model, config, bucket)) for bucket in shown}
    encoder = config.encoder.name if config.encoder else "none"
    lines = [
        f"arch {config.arch.name}, encoder {encoder}, {model.config.forward_dtype}",
        f"{'parameters of the trunk':<28}{parameters['core']:>16,}",
        f"{'parameters of the encoder':<28}{parameters['context']:>16,}",
        f"{'values of the puzzle table':<28}{parameters['puzzle_table']:>16,}",
        "",
        f"per sample, on {source}",
        f"{'':>25}{'tokens of':>16}{'GFLOP of':>36}",
        f"{'share':>8}{'canvas':>10}{'demos':>7}{'state':>8}{'memory':>8}"
        f"{'context':>12}{'ACT step':>12}{'train step':>12}",
    ]
    for bucket, numbers in costs.items():
        canvas = f"{bucket.side}x{bucket.side}"
        lines.append(_row(f"{shares[bucket]:.1%}", canvas, str(bucket.demos or "-"), numbers))
    if len(shares) > 1:
        weights = [shares[bucket] for bucket in shown]
        mean = np.average(list(costs.values()), axis=0, weights=weights)
        lines.append(_row(f"{sum(weights):.1%}", "mean", "", mean))
    return "\n".join([*lines, "", memory_line(model, config, list(shares), parameters)])


def _row(share: str, canvas: str, demos: str, numbers: Iterable[float]) -> str:
    """A line of the table; `numbers` are the fields of a `Cost`."""
    state, memory, *flops = numbers
    giga = "".join(f"{value / 1e9:>12.3f}" for value in flops)
    return f"{share:>8}{canvas:>10}{demos:>7}{state:>8.0f}{memory:>8.0f}{giga}"


def memory_line(
    model: RecursiveModel, config: PretrainConfig, buckets: list[Bucket], parameters: dict[str, int]
) -> str:
    """The device memory of a training step, in words.

    It has three parts: what is held throughout, what the backward pass of the largest bucket needs, and the
    carries.
    """
    batch = config.global_batch_size
    largest = max(buckets, key=lambda bucket: (bucket.side**2 * (1 + bucket.demos), bucket.side))
    # From two small batches, since a part does not grow with the batch: the casts of the weights.
    one, two = (activation_bytes(model, config, largest, count) for count in (1, 2))
    activations = one + (two - one) * (batch - 1)
    # The training loop keeps a carry per bucket.
    tokens = sum(
        model.context.prefix_length(bucket.demos, bucket.side**2) + bucket.side**2 for bucket in buckets
    )
    bytes_per_token = len(model.state_names) * config.arch.hidden_size * model.config.dtype.itemsize
    carries = batch * tokens * bytes_per_token
    per_parameter = 16 + 4 * config.ema  # in float32: weight, gradient, two moments, and the average
    held = per_parameter * (parameters["core"] + parameters["context"]) + 4 * parameters["puzzle_table"]
    total, *parts = (
        f"{value / 2**30:.2f} GiB" for value in (held + activations + carries, held, activations, carries)
    )
    return (
        f"memory of a training step with {batch} samples on one device, "
        f"temporary buffers not counted: {total}\n"
        f"  {parts[0]} weights, gradients, moments and averages; "
        f"{parts[1]} activations ({largest.side}x{largest.side} canvas, {largest.demos} demonstrations); "
        f"{parts[2]} carries"
    )


@reports_user_errors
def main() -> None:
    launch("pretrain", PretrainConfig, lambda config: print(summarise(config)), __doc__)


if __name__ == "__main__":
    main()
