"""A stand-in for the package reasoning-gym, with generators that are good, too large, endless or broken."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from dataset.build_rearc_dataset import build, parse_arguments
from dataset.generate.rearc import INSTALL, VERSION

needs_package = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason=f"needs {INSTALL}")

DSL = """
def grid(rng, low, high, longest=30):
    side = 3 + round((longest - 3) * rng.uniform(low, high))
    return tuple(tuple(rng.randint(0, 9) for _ in range(side)) for _ in range(side))
"""
GENERATORS = """
from ..dsl import *

def generate_mirror(rng, low, high):
    given = grid(rng, low, high)
    return {"input": given, "output": tuple(row[::-1] for row in given)}

def generate_flip(rng, low, high):
    given = grid(rng, low, high)
    return {"input": given, "output": given[::-1]}

def generate_shift(rng, low, high):
    given = grid(rng, low, high)
    return {"input": given, "output": tuple(row[-1:] + row[:-1] for row in given)}

def generate_some(rng, low, high):
    given = grid(rng, low, high, 8)
    if rng.random() < 0.5:
        return {"input": given, "output": given}
    return {"input": given, "output": ((given[0][0],),)}

def generate_wide(rng, low, high):
    return {"input": grid(rng, 1, 1), "output": ((1,),)}

def generate_same(rng, low, high):
    given = grid(rng, low, high)
    return {"input": given, "output": given}

def generate_broken(rng, low, high):
    return ()[0]

def generate_ragged(rng, low, high):
    return {"input": ((1, 2), (3,)), "output": ((1,),)}

def generate_endless(rng, low, high):
    while True:
        rng.random()
"""
ROWS = """
def moved(rng, size, by):
    place = rng.randint(0, size - 1)
    if place + by >= size:
        return None
    rows = [[0] * size, [0] * size]
    rows[0][place] = rows[1][place + by] = rng.randint(1, 9)
    return {"input": rows[0], "output": rows[1]}

ARC_1D_TASKS = {"move_2": (moved, {"by": 2}), "move_1": (moved, {"by": 1})}
"""
GOOD = ("flip", "mirror", "shift", "some")
HOPELESS = {
    "broken": "failed", "endless": "endless", "ragged": "invalid", "same": "unchanged", "wide": "too_large",
}  # fmt: skip


def write_package(folder: Path) -> Path:
    """The stand-in, for the front of the path of modules."""
    files = {
        # Its own imports ask for packages that are not there.
        "reasoning_gym/__init__.py": "raise ImportError('nothing here may import the whole package')",
        "reasoning_gym/arc/__init__.py": "raise ImportError('nor this part of it')",
        "reasoning_gym/arc/arc_1d_tasks.py": ROWS,
        "reasoning_gym/arc/rearc_utils/__init__.py": "",
        "reasoning_gym/arc/rearc_utils/dsl.py": DSL,
        "reasoning_gym/arc/rearc_utils/generators/__init__.py": GENERATORS,
        f"reasoning_gym-{VERSION}.dist-info/METADATA": f"Name: reasoning-gym\nVersion: {VERSION}\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def build_rearc(folder: Path, *arguments: str):
    """A dataset in `folder`: its metadata, and what is said of its generators."""
    return build(parse_arguments(["--output-dir", str(folder), *arguments]))
