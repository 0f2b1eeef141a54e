"""The work that a step has to do, whoever does it, and how fast the machine could do it.

Useful work is matrix products over real tokens: cells inside the grids, prefix tokens, demonstrations that
exist. Padding, empty slots and anything computed twice do not count. Shapes: B batch, K demonstrations, L
cells.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from config.schema import PretrainConfig
from dataset.canvas import IGNORE_LABEL_ID, PAD
from models.layers import swiglu_width
from utils.device import clock

ROWS, WIDTH = 4096, 512  # of the matrix products that say what the machine can do
PEAK_SECONDS = 0.5  # that the search for its peak takes
SIDE = {"cpu": 1024, "cuda": 8192}  # of square matrices, whose product says the same of larger work
COPIED = {"cpu": 2**28, "cuda": 2**30}  # bytes, more than any cache holds


def linear_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The most FLOP/s that `F.linear` reaches on the shapes of a block with 512 channels."""
    rates = []
    # The two widest products: queries, keys and values, and the gated feed-forward network's first.
    for inner in (3 * WIDTH, 2 * swiglu_width(WIDTH, 4)):
        x, weight = (torch.randn(rows, WIDTH, device=device, dtype=dtype) for rows in (ROWS, inner))
        rates.append(2 * ROWS * WIDTH * inner / _fastest(partial(F.linear, x, weight), device))
    return max(rates)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The most FLOP/s that a product of two square matrices reaches, of `SIDE` rows each."""
    side = SIDE[device.type]
    x, y = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _fastest(lambda: x @ y, device)


def copy_rate(device: torch.device) -> float:
    """The most bytes per second that a copy of `COPIED` bytes reaches, each read once and written once."""
    source = torch.zeros(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)


def _fastest(work: Callable[[], Tensor], device: torch.device) -> float:
    """The seconds of the fastest repetition."""
    best, ends = float("inf"), time.perf_counter() + PEAK_SECONDS
    while time.perf_counter() < ends:
        started = clock(device)
        work()
        best = min(best, clock(device) - started)
    return best


def block_flops(tokens: Tensor, hidden: int, expansion: float, memory: Tensor | int = 0) -> Tensor:
    """Forward FLOPs of one transformer block over `tokens` (any shape) that also read `memory` others."""
    weights = 4 * hidden**2 + 3 * hidden * swiglu_width(hidden, expansion)
    return 2 * tokens * weights + 4 * tokens * (tokens + memory) * hidden


def mixer_flops(tokens: Tensor, hidden: int, expansion: float) -> Tensor:
    """Forward FLOPs of one block that mixes `tokens` (B,) by a feed-forward network over the sequence."""
    along = torch.tensor([swiglu_width(int(length), expansion) for length in tokens.tolist()])
    return 2 * tokens * 3 * hidden * (along + swiglu_width(hidden, expansion))


def useful_flops(config: PretrainConfig, data: dict[str, Tensor]) -> float:
    """FLOPs of a training step of a TRM, or of an ETRM with the encoder `standard` or `memory`, on a batch.

    Left out are heads, embeddings, and the pooled encoder's attention over demonstrations, under 2 %
    together.
    """
    arch, encoder = config.arch, config.encoder
    hidden, expansion = arch.hidden_size, arch.expansion
    real = (data["inputs"] != PAD) | (data["labels"] != IGNORE_LABEL_ID)
    cells = real.sum(1).double()  # (B,)
    memory = torch.zeros(1, dtype=torch.float64)
    encoding = 0.0
    prefix = arch.puzzle_emb_len
    if encoder:
        inputs, outputs = data["demo_inputs"] != PAD, data["demo_labels"] != PAD
        summed = encoder.pair_tokens == "summed"
        pairs = (inputs | outputs).sum(2) if summed else inputs.sum(2) + outputs.sum(2)  # (B, K) tokens
        # 3 times: a backward pass costs twice a forward pass.
        encoding = 3 * encoder.num_layers * float(block_flops(pairs.double(), hidden, expansion).sum())
        prefix = 1 if encoder.gives_memory else encoder.output_tokens
        if encoder.gives_memory:
            memory = pairs.sum(1).double()  # (B,)
            # Its keys and values, projected once for each layer.
            encoding += 3 * arch.L_layers * float((memory * 4 * hidden**2).sum())
    tokens = prefix + cells.cpu()
    # Every H cycle goes forward, and those with a gradient go back, which costs twice as much.
    passes = arch.L_layers * (arch.L_cycles + 1) * (arch.H_cycles + 2 * arch.grad_cycles)
    if arch.mlp_t:
        one_pass = mixer_flops(tokens, hidden, expansion)
    else:
        one_pass = block_flops(tokens, hidden, expansion, memory.cpu())
    return encoding + passes * float(one_pass.sum())
