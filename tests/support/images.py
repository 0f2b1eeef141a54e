"""Pictures, read back."""

import numpy as np
from PIL import Image, ImageSequence


def read_gif(path) -> tuple[list[np.ndarray], list[int]]:
    """Frames and their milliseconds."""
    with Image.open(path) as image:
        shown = [
            (np.array(frame.convert("RGB")), frame.info["duration"])
            for frame in ImageSequence.Iterator(image)
        ]
    return [frame for frame, _ in shown], [time for _, time in shown]
