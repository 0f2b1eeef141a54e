"""Draw how an answer comes about, step by step.

    python -m tools.timeline checkpoint=pretrained/arc-small task=pretrained/example.json

Writes a PNG with the query's input, the answer after each ACT step with its halting probability, and the
known answer. Beside it a GIF shows one step after the other, and a second PNG accuracy, loss and halting. A
green frame marks a right cell, a red one a wrong cell. A yellow frame inside it marks a cell that changed
since the step before.
"""

import sys
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from config.compose import launch
from dataset.games.drawing import Drawing
from dataset.task import Task
from evaluation.drawing import INK, PAPER, grid_pixels
from evaluation.pictures import stack
from evaluation.puzzle_solver import open_solver
from evaluation.refinement import Step, agreeing
from evaluation.solver import AskConfig
from models.trial import settle_threads
from utils.errors import UserError, reports_user_errors
from utils.images import lettering, write_curves, write_gif, write_png

CELL_INCHES = 0.3  # as in the ancestor's pictures
SECONDS, LAST_SECONDS = 0.6, 2.5  # how long the GIF shows a step, and the last one


class TimelineConfig(AskConfig):
    """What to draw, and how (config/timeline.yaml has a line on each key)."""

    pair_index: NonNegativeInt
    view: NonNegativeInt
    demonstrations: bool
    target: bool
    curves: bool
    diff: bool
    dpi: Annotated[int, Field(ge=20, le=600)]
    columns: PositiveInt
    output: str


def run(config: TimelineConfig) -> None:
    """Answer one query and write both pictures. Raises `UserError` for a missing file or query."""
    output = Path(config.output)
    animation = output.with_suffix(".gif")
    if output.suffix != ".png":
        raise UserError(
            f"output={output} should end in .png; the animation is written beside it as {animation}"
        )
    solver = open_solver(config.checkpoint, config.weights, config.device, config.forward_dtype)
    tasks = solver.read(config.task, config.task_id)
    if len(tasks) > 1:
        raise UserError(f"{config.task} holds {len(tasks)} puzzles; say which one with task_id=1 and so on")
    (task,) = tasks
    settle_threads(config.threads, solver.model, solver.data, config.num_views)
    # The first view is the task as it is, whatever the number of views.
    num_views = config.num_views if config.view else 1
    steps = solver.refine(task, config.pair_index, config.view, num_views, config.seed, config.protocol)
    query = task.queries[config.pair_index]
    drawing, max_steps = solver.game.drawing(len(query.input)), solver.model.config.halt_max_steps
    panels = draw(query.input, steps, query.output, max_steps, config, drawing)
    shown = pair_panels(task, config, drawing) if config.demonstrations else []
    rows = [stack(part, axis=1) for group in (shown, panels) for part in in_rows(group, config.columns)]
    write_png(output, stack(rows, axis=0))
    write_gif(animation, frames(panels, len(steps)), [SECONDS] * (len(steps) - 1) + [LAST_SECONDS])
    files = [str(output), str(animation)]
    if config.curves and "accuracy" in steps[0]:
        files.append(str(output.with_name(f"{output.stem}_curves.png")))
        write_curves(Path(files[-1]), curves_of(steps))
    print(f"{', '.join(files)}: task {task.id}, query {config.pair_index}, {len(steps)} ACT steps")


def in_rows(panels: list[np.ndarray], columns: int) -> list[list[np.ndarray]]:
    """The panels, so many beside each other."""
    return [panels[start : start + columns] for start in range(0, len(panels), columns)]


def pair_panels(task: Task, config: TimelineConfig, drawing: Drawing) -> list[np.ndarray]:
    """A panel for the input and one for the output of every demonstration."""
    cell = round(CELL_INCHES * config.dpi)
    return [
        panel([f"PAIR {number} {name}"], grid, cell, drawing)
        for number, pair in enumerate(task.demonstrations)
        for name, grid in (("INPUT", pair.input), ("OUTPUT", pair.answer))
    ]


def curves_of(steps: list[Step]) -> dict[str, list[tuple[float, float]]]:
    """Accuracy, token loss and halting probability after every ACT step, counted from 0."""
    names = {"accuracy": "accuracy", "loss": "loss", "halting probability": "q"}
    return {title: [(i, step[key]) for i, step in enumerate(steps)] for title, key in names.items()}


def draw(
    grid: np.ndarray,
    steps: list[Step],
    truth: np.ndarray | None,
    max_steps: int,
    config: TimelineConfig,
    drawing: Drawing,
) -> list[np.ndarray]:
    """The panels from the input to the known answer, each (H, W, 3) uint8 with its caption.

    grid: the query's input. truth: the known answer, None where there is none. max_steps: after so many ACT
    steps the model ends without having halted.
    """
    cell = round(CELL_INCHES * config.dpi)
    given = grid > 0
    panels, before = [panel(["INPUT"], grid, cell, drawing, given)], None
    for number, step in enumerate(steps):
        # Tokens that form no grid are no answer, and drawn as an empty panel.
        answer = np.array(step["grid"] or [[]], np.uint8)
        ending = "" if not step["halted"] else "HALTED" if number + 1 < max_steps else "LAST STEP"
        right = agreeing(answer, truth) if config.diff and truth is not None else None
        changed = ~agreeing(answer, before) if config.diff and before is not None else None
        caption = [f"STEP {number} CONF {step['q']:.3f}", ending]
        panels.append(panel(caption, answer, cell, drawing, given, right, changed))
        before = answer
    if config.target and truth is not None:
        panels.append(panel(["TARGET"], truth, cell, drawing, given))
    return panels


def panel(
    caption: list[str],
    grid: np.ndarray,
    cell: int,
    drawing: Drawing,
    given: np.ndarray | None = None,
    right: np.ndarray | None = None,
    changed: np.ndarray | None = None,
) -> np.ndarray:
    """A caption of at most two lines above a grid of `cell` pixels per cell, (H, W, 3) uint8.

    given: the cells that the question fills, shaded in a grid of its shape. right and changed: masks of the
    grid's shape, which frame cells. An empty grid leaves the caption alone.
    """
    size, gap = max(10, cell // 2), max(4, cell // 8)
    # Always two lines, so that all grids of a row start at one height.
    written = [lettering(line, size, INK, PAPER) for line in (caption + [""])[:2]]
    top = sum(len(line) + gap for line in written)
    (rows, columns), lines_wide = grid.shape, max(line.shape[1] for line in written)
    pixels = np.tile(PAPER, (top + rows * cell + 1, max(lines_wide, columns * cell + 1), 1))
    for number, line in enumerate(written):
        pixels[number * (len(line) + gap) :][: len(line), : line.shape[1]] = line
    if grid.size:
        shaded = given if given is not None and given.shape == grid.shape else None
        pixels[top:, : columns * cell + 1] = grid_pixels(grid, drawing, cell, shaded, right, changed)
    return pixels


def frames(panels: list[np.ndarray], steps: int) -> list[np.ndarray]:
    """One picture per step, all of one size: the input, the step, and the known answer if it is shown."""
    shown, rest = panels[1 : 1 + steps], panels[1 + steps :]
    height, width = (max(panel.shape[axis] for panel in shown) for axis in (0, 1))
    padded = [np.tile(PAPER, (height, width, 1)) for _ in shown]
    for room, one in zip(padded, shown, strict=True):
        room[: one.shape[0], : one.shape[1]] = one
    return [stack([panels[0], one, *rest], axis=1) for one in padded]


@reports_user_errors
def main() -> None:
    launch("timeline", TimelineConfig, run, __doc__)


if __name__ == "__main__":
    main()
