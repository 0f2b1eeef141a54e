"""Pictures as files. In memory a picture is (H, W, 3) uint8 red, green, blue.

Pillow and matplotlib are imported where they draw: most commands would wait for them, and a training without
pictures needs neither.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from utils.extras import require
from utils.files import write_atomically


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write a picture as a PNG file, atomically."""
    require("PIL", "this picture")
    from PIL import Image

    image = Image.fromarray(pixels)
    write_atomically(path, lambda temporary: image.save(temporary, format="png"))


def write_gif(path: Path, frames: Sequence[np.ndarray], seconds: Sequence[float]) -> None:
    """Write pictures of one size, each shown for its `seconds`, as a GIF that starts over for ever;
    atomically."""
    require("PIL", "this picture")
    from PIL import Image

    first, *others = map(Image.fromarray, frames)
    durations = [round(1000 * duration) for duration in seconds]
    write_atomically(
        path,
        lambda file: first.save(
            file, format="gif", save_all=True, append_images=others, duration=durations, loop=0
        ),
    )


def lettering(text: str, size: int, ink: np.ndarray, paper: np.ndarray) -> np.ndarray:
    """`text` as a picture, as high as a line of letters of `size` pixels."""
    require("PIL", "this picture")
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "a font of a given size needs Pillow with FreeType"
    width, height = round(font.getlength(text)), sum(font.getmetrics())
    image = Image.new("RGB", (max(width, 1), height), tuple(paper.tolist()))
    ImageDraw.Draw(image).text((0, 0), text, tuple(ink.tolist()), font)
    return np.array(image)


def write_curves(path: Path, curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Write a PNG with a panel per curve, (step, value) points each; atomically. Nothing without curves."""
    if not curves:
        return
    require("matplotlib", "this picture")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(curves), 3), layout="constrained")
    for axes, (name, points) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
    ):
        axes.plot(*zip(*points, strict=True), marker="o" if len(points) == 1 else None)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
