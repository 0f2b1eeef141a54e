"""The work that a step has to do, whoever does it, and how fast the machine could do it.

Useful work counts matrix products over real tokens alone: cells inside the grids, prefix tokens, demonstrations that exist.
Padding, empty slots and anything computed twice do not count. Shapes: B batch, K demonstrations, L cells.
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from config.schema import PretrainConfig
from dataset.canvas import IGNORE_LABEL_ID, PAD
from models.layers import swiglu_width

ROWS, WIDTH = 4096, 512  # of the matrix products that say what the machine can do
PEAK_SECONDS = 0.5


def linear_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The most FLOP/s that `F.linear` reaches on the shapes of a block with 512 channels."""
    best = 0.0
    for inner in (3 * WIDTH, 2 * swiglu_width(WIDTH, 4)):
        x, weight = (torch.randn(rows, WIDTH, device=device, dtype=dtype) for rows in (ROWS, inner))
        ends = time.perf_counter() + PEAK_SECONDS / 2
        while time.perf_counter() < ends:
            started = time.perf_counter()
            F.linear(x, weight)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = max(best, 2 * ROWS * WIDTH * inner / (time.perf_counter() - started))
    return best


def block_flops(tokens: Tensor, hidden: int, expansion: float, memory: Tensor | int = 0) -> Tensor:
    """Forward FLOPs of one transformer block over `tokens` (any shape) that also read `memory` more."""
    weights = 4 * hidden**2 + 3 * hidden * swiglu_width(hidden, expansion)
    return 2 * tokens * weights + 4 * tokens * (tokens + memory) * hidden


def mixer_flops(tokens: Tensor, hidden: int, expansion: float) -> Tensor:
    """The same of a block that mixes tokens by a feed-forward network over the sequence."""
    along = torch.tensor([swiglu_width(int(length), expansion) for length in tokens.tolist()])
    return 2 * tokens * 3 * hidden * (along + swiglu_width(hidden, expansion))


def useful_flops(config: PretrainConfig, data: dict[str, Tensor]) -> float:
    """FLOPs of a training step of a TRM, or an ETRM with the encoder `standard` or `memory`, on a batch.

    The recursion's passes count once forward, and those with gradient twice more; so does every block of the encoder.
    Left out, under 2 % together: heads, embeddings, and the pooled encoder's attention over demonstrations.
    """
    arch, encoder = config.arch, config.encoder
    hidden, expansion = arch.hidden_size, arch.expansion
    real = (data["inputs"] != PAD) | (data["labels"] != IGNORE_LABEL_ID)
    cells, memory, total = real.sum(1).double(), torch.zeros(1, dtype=torch.float64), 0.0
    prefix = arch.puzzle_emb_len
    if encoder:
        inputs, outputs = data["demo_inputs"] != PAD, data["demo_labels"] != PAD
        pairs = (
            (inputs | outputs).sum(2) if encoder.pair_tokens == "summed" else inputs.sum(2) + outputs.sum(2)
        )  # (B, K)
        total += 3 * encoder.num_layers * float(block_flops(pairs.double(), hidden, expansion).sum())
        prefix = 1
        if encoder.gives_memory:
            memory = pairs.sum(1).double()
            total += 3 * arch.L_layers * float((memory * 4 * hidden**2).sum())
        else:
            prefix = encoder.output_tokens
    passes, tokens = (
        arch.L_layers * (arch.L_cycles + 1) * (arch.H_cycles + 2 * arch.grad_cycles),
        prefix + cells.cpu(),
    )
    mixed = (
        mixer_flops(tokens, hidden, expansion)
        if arch.mlp_t
        else block_flops(tokens, hidden, expansion, memory.cpu())
    )
    return total + passes * float(mixed.sum())
