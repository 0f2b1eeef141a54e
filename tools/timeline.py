"""How an answer comes about, as pictures: python -m tools.timeline checkpoint=runs/NAME task=FILE [key=value ...]

The query's input, the answer after each ACT step with its halting probability, and the known answer; cells framed in green
are right, in red wrong, and with a yellow frame inside it changed since the step before. A PNG of all, and a GIF step by step.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from config.compose import launch
from evaluation.pictures import COLOURS, LINE, PAPER, RIGHT, WRONG, stack
from evaluation.refinement import Step, agreeing
from evaluation.solver import AskConfig, Solver, read_task
from utils.errors import UserError, reports_user_errors
from utils.images import lettering, write_gif, write_png

CELL_INCHES = 0.3  # the ancestor's
INK, CHANGED = np.array((29, 29, 27), np.uint8), np.array((255, 212, 0), np.uint8)
SECONDS, LAST_SECONDS = 0.6, 2.5  # how long the GIF shows a step, and the last one


class TimelineConfig(AskConfig):
    """Pictures of one answer's refinement (config/timeline.yaml)."""

    pair_index: NonNegativeInt
    view: NonNegativeInt
    target: bool
    diff: bool
    dpi: Annotated[int, Field(ge=20, le=600)]
    columns: PositiveInt
    output: str


def run(config: TimelineConfig) -> None:
    """One query, from the checkpoint to its two pictures."""
    output = Path(config.output)
    if output.suffix != ".png":
        raise UserError(
            f"output={output} should end in .png; the animation is written beside it as {output.with_suffix('.gif')}"
        )
    task = read_task(config.task, config.task_id)
    solver = Solver.from_pretrained(config.checkpoint, config.weights, config.device)
    steps = solver.refine(
        task,
        config.pair_index,
        config.view,
        config.num_views if config.view else 1,
        config.seed,
        config.protocol,
    )
    query = task.queries[config.pair_index]
    panels = draw(query.input, steps, query.output, solver.model.config.halt_max_steps, config)
    rows = [
        stack(panels[start : start + config.columns], axis=1)
        for start in range(0, len(panels), config.columns)
    ]
    write_png(output, stack(rows, axis=0))
    animation = output.with_suffix(".gif")
    write_gif(animation, frames(panels, len(steps)), [SECONDS] * (len(steps) - 1) + [LAST_SECONDS])
    print(f"{output}, {animation}: task {task.id}, query {config.pair_index}, {len(steps)} ACT steps")


def draw(
    grid: np.ndarray, steps: list[Step], truth: np.ndarray | None, max_steps: int, config: TimelineConfig
) -> list[np.ndarray]:
    """The panels from the input to the known answer, each with its caption, (H, W, 3) uint8."""
    cell = round(CELL_INCHES * config.dpi)
    panels, before = [panel(["INPUT"], grid, cell)], None
    for number, step in enumerate(steps):
        answer = np.array(step["grid"] or [[]], np.uint8)
        ending = "" if not step["halted"] else "HALTED" if number + 1 < max_steps else "LAST STEP"
        right = agreeing(answer, truth) if config.diff and truth is not None else None
        changed = ~agreeing(answer, before) if config.diff and before is not None else None
        panels.append(panel([f"STEP {number} CONF {step['q']:.3f}", ending], answer, cell, right, changed))
        before = answer
    return panels + ([panel(["TARGET"], truth, cell)] if config.target and truth is not None else [])


def panel(
    caption: list[str],
    grid: np.ndarray,
    cell: int,
    right: np.ndarray | None = None,
    changed: np.ndarray | None = None,
) -> np.ndarray:
    """A caption of at most two lines above a grid of `cell` pixels per cell; a step without an answer has no grid."""
    size, gap = max(10, cell // 2), max(4, cell // 8)
    written = [lettering(line, size, INK, PAPER) for line in (caption + [""])[:2]]
    top = sum(len(line) + gap for line in written)
    (rows, columns), lines_wide = grid.shape, max(line.shape[1] for line in written)
    pixels = np.tile(PAPER, (top + rows * cell + 1, max(lines_wide, columns * cell + 1), 1))
    for number, line in enumerate(written):
        pixels[number * (len(line) + gap) :][: len(line), : line.shape[1]] = line
    if not grid.size:
        return pixels
    drawn = pixels[top:, : columns * cell + 1]
    drawn[:] = LINE
    for row, column in np.ndindex(grid.shape):
        inside = drawn[row * cell + 1 : (row + 1) * cell, column * cell + 1 : (column + 1) * cell]
        if right is not None:
            inside = framed(inside, RIGHT if right[row, column] else WRONG)
        if changed is not None and changed[row, column]:
            inside = framed(inside, CHANGED)
        inside[:] = COLOURS[grid[row, column]]
    return pixels


def framed(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Draw a frame and a thin dark line inside it, which tells it from a cell of the same colour; returns what is left within."""
    side = min(pixels.shape[:2])
    thick, line = max(1, side // 8), int(side >= 12)
    pixels[:] = colour
    pixels = pixels[thick:-thick, thick:-thick]
    pixels[:] = LINE
    return pixels[line:-line, line:-line] if line else pixels


def frames(panels: list[np.ndarray], steps: int) -> list[np.ndarray]:
    """One picture per step, all of one size: the input, the step, the known answer if it is shown."""
    shown, rest = panels[1 : 1 + steps], panels[1 + steps :]
    height, width = (max(panel.shape[axis] for panel in shown) for axis in (0, 1))
    padded = [np.tile(PAPER, (height, width, 1)) for _ in shown]
    for room, one in zip(padded, shown, strict=True):
        room[: one.shape[0], : one.shape[1]] = one
    return [stack([panels[0], one, *rest], axis=1) for one in padded]


@reports_user_errors
def main() -> None:
    launch("timeline", TimelineConfig, run)


if __name__ == "__main__":
    main()
