"""Measure what blocks gain from frames that fit, laid out one after the other.

    python -m benchmarks.packing data/arc1 --canvases 10,15,20,30:2 every2:1 --widths 512 64 --rounds 5

First it counts the tokens of rectangular frames, and the answers that they hold. A frame that may be used in
an evaluation looks at the query's input and at demonstrations alone. Then the core's blocks compute the same
training samples on square canvases, and packed into rows of --pack tokens. Ratios are to the first canvases.
"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.data import machine
from benchmarks.real_tokens import CPU, Canvases
from benchmarks.steps import buckets, build_sampler
from dataset.batch import task_sides
from dataset.canvas import smallest_bucket
from dataset.store import TEST, Store
from dataset.task import MAX_SIDE
from models import layers
from models.layers import AttentionBlock, Packed, weights_cast_once
from models.positions import rotary_square
from utils.arguments import parser_of, positive
from utils.environment import git_commit
from utils.errors import reports_user_errors

REGISTERS = 1  # tokens of the state before the cells
BLOCKS = 2  # of the core, as the recipes have them
HEAD = 64  # channels of a head, where the width has as many


@dataclass
class Episodes:
    """Queries (N,) and their demonstrations (N, K) as pairs of a store, an empty slot again the first one.

    trains: whether an answer may decide how much room it gets.
    """

    store: Store
    query: np.ndarray
    demos: np.ndarray
    trains: bool

    @classmethod
    def drawn(cls, canvases: Canvases, dataset: Path, draws: int) -> "Episodes":
        """One sample of so many training batches, in the shares in which training meets its buckets."""
        config = canvases.config(dataset, [], "global_batch_size=1")
        store = Store.load(dataset, *config.layouts)
        sampler = build_sampler(config, store)
        order = enumerate(islice(buckets(sampler), draws))
        drawn = [sampler.sample(step, bucket) for step, bucket in order]
        return cls.of(store, [(int(one.query[0]), one.demos[0]) for one in drawn], trains=True)

    @classmethod
    def asked(cls, store: Store) -> "Episodes":
        """The labelled test queries, with all their demonstrations."""
        found = []
        for task in np.flatnonzero(store.task_split == TEST):
            first, end = store.task_pairs[task : task + 2].tolist()
            border = first + int(store.task_demonstrations[task])
            labelled = [pair for pair in range(border, end) if store.pair_output[pair] >= 0]
            found += [(pair, np.arange(first, border)) for pair in labelled]
        return cls.of(store, found, trains=False)

    @classmethod
    def of(cls, store: Store, pairs: list[tuple[int, np.ndarray]], trains: bool) -> "Episodes":
        """From each query and its demonstrations."""
        most = max(len(demos) for _, demos in pairs)
        filled = [np.append(demos, np.full(most - len(demos), demos[0])) for _, demos in pairs]
        return cls(store, np.array([query for query, _ in pairs]), np.array(filled, np.int64), trains)

    def inputs(self, pairs: np.ndarray) -> np.ndarray:
        """(..., 2) rows and columns."""
        return self.store.shapes[self.store.pair_input[pairs]].astype(np.int64)

    def outputs(self, pairs: np.ndarray) -> np.ndarray:
        """(..., 2) rows and columns."""
        return self.store.shapes[self.store.pair_output[pairs]].astype(np.int64)

    def thinned(self, frames: np.ndarray, count: int) -> "Episodes":
        """`count` of these that stand for all: evenly spread, by their frames and how full these are."""
        order = np.lexsort((self.real(frames), frames.prod(1)))
        chosen = order[((np.arange(count) + 0.5) * len(order) / count).astype(np.int64)]
        return Episodes(self.store, self.query[chosen], self.demos[chosen], self.trains)

    def real(self, frames: np.ndarray) -> np.ndarray:
        """(N,) cells of frames (N, 2) in the query's input or its answer, or among the ends behind them."""
        counts = []
        for frame, *shapes in zip(frames, self.inputs(self.query), self.outputs(self.query), strict=True):
            canvas = np.zeros(frame, bool)
            for rows, columns in shapes:
                canvas[: rows + 1, :columns] = canvas[:rows, : columns + 1] = True
            counts.append(canvas.sum())
        return np.array(counts)


def frame_of_all(episodes: Episodes) -> np.ndarray:
    """(N, 2) the largest rows and columns of the query's input and of all grids of the demonstrations."""
    demos = np.maximum(episodes.inputs(episodes.demos), episodes.outputs(episodes.demos))
    return np.maximum(demos.max(1), episodes.inputs(episodes.query))


def frame_of_query(episodes: Episodes) -> np.ndarray:
    """(N, 2) of the query's input, and of the outputs of the demonstrations.

    Their outputs do not count where all are as large as their inputs.
    """
    outputs, query = episodes.outputs(episodes.demos), episodes.inputs(episodes.query)
    alike = (outputs == episodes.inputs(episodes.demos)).all((1, 2))
    return np.where(alike[:, None], query, np.maximum(query, outputs.max(1)))


def frame_of_pair(episodes: Episodes) -> np.ndarray:
    """(N, 2) of the query's input and its answer, which no evaluation knows."""
    return np.maximum(episodes.inputs(episodes.query), episodes.outputs(episodes.query))


FRAMES = {
    "all grids shown": frame_of_all,
    "query, outputs shown": frame_of_query,
    "query, its answer": frame_of_pair,
}


def framed(episodes: Episodes, rule: Callable[[Episodes], np.ndarray], margin: int) -> np.ndarray:
    """(N, 2) frames of `rule` with a margin. A training sample whose answer would not fit gets more room."""
    frame = np.minimum(rule(episodes) + margin, MAX_SIDE)
    return np.maximum(frame, episodes.outputs(episodes.query)) if episodes.trains else frame


def squares(episodes: Episodes, canvases: Canvases, dataset: Path) -> np.ndarray:
    """(N, 2) the square canvases of the tasks."""
    config = canvases.config(dataset, []).data
    tasks = np.searchsorted(episodes.store.task_pairs, episodes.query, side="right") - 1
    needed = task_sides(episodes.store, config)[tasks]
    sides = [smallest_bucket(int(side), config.sides) or MAX_SIDE for side in needed]
    return np.repeat(np.array(sides)[:, None], 2, 1)


@dataclass
class Call:
    """Rows of tokens that are computed at once.

    cells: (S,) each token's cell on a canvas of 30, 0 for a register. mask: of the blocks' attention.
    """

    rows: int
    cells: Tensor
    mask: Tensor | Packed | BlockMask | None = None


def cells_of(frame: np.ndarray) -> Tensor:
    """The tokens of one sample: registers, then the cells of its frame, which are counted from 1."""
    rows, columns = (torch.arange(int(length)) for length in frame)
    cells = 1 + MAX_SIDE * rows[:, None] + columns
    return torch.cat((torch.zeros(REGISTERS, dtype=torch.int64), cells.flatten()))


def padded(frames: np.ndarray, batch: int) -> list[Call]:
    """Samples with the same frame in batches of at most `batch`."""
    calls = []
    for frame, count in zip(*np.unique(frames, axis=0, return_counts=True), strict=True):
        sizes = [batch] * (count // batch) + [count % batch]
        calls += [Call(size, cells_of(frame)) for size in sizes if size]
    return calls


def packs(frames: np.ndarray, tokens: int) -> list[list[Tensor]]:
    """Samples in packs of at most `tokens`, the largest first, each in the first pack with room for it.

    What remains of a pack is its last part, of registers.
    """
    found: list[list[Tensor]] = []
    for cells in sorted(map(cells_of, frames), key=len, reverse=True):
        room = (pack for pack in found if sum(map(len, pack)) + len(cells) <= tokens)
        pack = next(room, None)
        if pack is None:
            found.append(pack := [])
        pack.append(cells)
    for pack in found:
        rest = tokens - sum(map(len, pack))
        pack += [torch.zeros(rest, dtype=torch.int64)] if rest > 0 else []
    return found


def by_segments(pack: list[Tensor]) -> Call:
    """Attention goes through the samples one after the other."""
    return Call(1, torch.cat(pack), Packed([len(part) for part in pack]))


def _owners(pack: list[Tensor]) -> Tensor:
    return torch.repeat_interleave(torch.tensor([len(part) for part in pack]))


def by_mask(pack: list[Tensor]) -> Call:
    """One attention over the pack, whose mask shows each token its own sample."""
    owner = _owners(pack)
    return Call(1, torch.cat(pack), owner[:, None] == owner)


def by_flex(pack: list[Tensor]) -> Call:
    """The same with a mask by blocks, which a compiled FlexAttention leaves out where they are empty."""
    owner = _owners(pack)

    def same(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return owner[query] == owner[key]

    size = len(owner)
    return Call(1, torch.cat(pack), create_block_mask(same, None, None, size, size, device="cpu"))


LAYOUTS = {"segments": by_segments, "mask": by_mask, "FlexAttention": by_flex}
_flex = torch.compile(flex_attention)


def attend_by_blocks(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    """`layers.attend` by FlexAttention."""
    return _flex(query, key, value, block_mask=mask)


def attention_of(call: Call) -> AbstractContextManager:
    """Inside the context the blocks' attention takes the mask of `call`."""
    if isinstance(call.mask, BlockMask):
        return patch.object(layers, "attend", attend_by_blocks)
    return nullcontext()


class Stack:
    """The core's blocks with their positions, at a width and in a dtype."""

    def __init__(self, width: int, dtype: torch.dtype):
        torch.manual_seed(0)
        heads = max(2, width // HEAD)
        self.width, self.dtype = width, dtype
        self.blocks = nn.ModuleList(AttentionBlock(width, heads, 4) for _ in range(BLOCKS))
        self.table = rotary_square(MAX_SIDE, width // heads, CPU, values=True).after_registers(REGISTERS)

    def __call__(self, call: Call, x: Tensor) -> Tensor:
        """The blocks' output for tokens (rows, S, width)."""
        rotary = self.table.rows(call.cells)
        for block in self.blocks:
            x = block(x, rotary, call.mask)
        return x

    def seconds(self, calls: list[Call], backward: bool) -> np.ndarray:
        """Processor and wall seconds of all calls, forward, and backward if asked."""
        inputs = [torch.randn(call.rows, len(call.cells), self.width, dtype=self.dtype) for call in calls]
        cast = nullcontext() if backward else weights_cast_once([self.blocks], self.dtype)
        started = np.array([time.process_time(), time.perf_counter()])
        with attention_of(calls[0]), cast, torch.set_grad_enabled(backward):
            for call, x in zip(calls, inputs, strict=True):
                output = self(call, x.requires_grad_(backward))
                if backward:
                    output.backward(torch.ones_like(output))
        return np.array([time.process_time(), time.perf_counter()]) - started


def layouts(options: argparse.Namespace, episodes: Episodes) -> dict[str, list[Call]]:
    """The calls that compute all samples, by name: square canvases, then packs of legal frames."""
    found = {}
    for canvases in options.canvases:
        found[f"squares {canvases.name}"] = padded(
            squares(episodes, canvases, options.dataset), options.batch
        )
    packed = packs(framed(episodes, frame_of_query, 1), options.pack)
    return found | {f"packed, {name}": [call(pack) for pack in packed] for name, call in LAYOUTS.items()}


def print_frames(options: argparse.Namespace, episodes: Episodes) -> None:
    """Shares of real cells on canvases and in frames, and the test answers that these hold."""
    asked = Episodes.asked(episodes.store)
    rules = {f"squares {c.name}": (lambda e, c=c: squares(e, c, options.dataset)) for c in options.canvases}
    for name, rule in FRAMES.items():
        rules |= {f"{name}, margin {m}": (lambda e, r=rule, m=m: framed(e, r, m)) for m in (2, 1, 0)}
    print(f"{'':<36}{'real cells':>12}{'answers fit':>14}")
    for name, rule in rules.items():
        frames = rule(episodes)
        share = episodes.real(frames).sum() / frames.prod(1).sum()
        fit = (asked.outputs(asked.query) <= rule(asked)).all(1)
        print(f"{name:<36}{share:>12.1%}{f'{fit.sum()}/{len(fit)}':>14}", flush=True)


def print_times(options: argparse.Namespace, found: dict[str, list[Call]], real: int) -> None:
    """Time per real cell of all layouts, which take turns, and how often as fast as the first they are."""
    tokens = {name: sum(call.rows * len(call.cells) for call in calls) for name, calls in found.items()}
    for width in options.widths:
        for dtype in (torch.float32, torch.bfloat16):
            stack = Stack(width, dtype)
            print(
                f"\nwidth {width}, {dtype}: us of the processor per real cell, ratio; the same with backward"
            )
            times: dict[tuple[str, bool], np.ndarray] = {}
            # FlexAttention has no backward pass on CPUs.
            jobs = [(name, back) for name in found for back in (False, True) if not (back and "Flex" in name)]
            for _ in range(1 + options.rounds):  # the first round is not counted
                for job in jobs:
                    spent = stack.seconds(found[job[0]], job[1])[None]
                    times[job] = np.concatenate([times.get(job, spent[:0]), spent])
            base = next(iter(found))
            for name in found:
                cells = [_cell(times.get((name, b)), times[base, b], real) for b in (False, True)]
                print(f"{name:<28}{real / tokens[name]:>8.1%}{cells[0]:>32}{cells[1]:>32}", flush=True)


def _cell(spent: np.ndarray | None, base: np.ndarray, real: int) -> str:
    if spent is None:
        return "-"
    ratios = base[1:, 0] / spent[1:, 0]
    time_of_cell = 1e6 * np.median(spent[1:, 0]) / real
    return f"{time_of_cell:.2f} {np.median(ratios):.2f} [{ratios.min():.2f}, {ratios.max():.2f}]"


@reports_user_errors
def main() -> None:
    parser = parser_of("benchmarks.packing", __doc__)
    add = parser.add_argument
    add("dataset", type=Path, help="the folder of an ARC dataset of the layout fewshot")
    add("--canvases", type=Canvases.read, nargs="+", required=True, metavar="SIDES:MARGIN", help="see above")
    add("--widths", type=positive, nargs="+", default=[512], help="of the blocks (default: %(default)s)")
    add("--samples", type=positive, default=64, help="that are computed (default: %(default)s)")
    add("--draws", type=positive, default=2000, help="samples that are counted (default: %(default)s)")
    add("--batch", type=positive, default=8, help="samples of a square canvas at once (default: %(default)s)")
    add("--pack", type=positive, default=2048, help="tokens of a pack (default: %(default)s)")
    add("--rounds", type=positive, default=5, help="in which all take their turn (default: %(default)s)")
    options = parser.parse_args()
    options.dataset = options.dataset.resolve()
    torch.set_num_threads(1)  # the processor time of several threads is not the time that a step takes
    print(f"{machine(CPU)}; {git_commit()}", flush=True)
    drawn = Episodes.drawn(options.canvases[0], options.dataset, options.draws)
    print_frames(options, drawn)
    canvas = squares(drawn, options.canvases[0], options.dataset)
    episodes = drawn.thinned(canvas, min(options.samples, options.draws))
    real = episodes.real(squares(episodes, options.canvases[0], options.dataset))
    print_times(options, layouts(options, episodes), int(real.sum()))


if __name__ == "__main__":
    main()
