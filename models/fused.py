"""Chains of elementwise operations that may be compiled to take one pass over memory.

They are written in plain PyTorch operations, so that compiling them with shapes of any size stays simple.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# A chain is compiled anew for other strides, with and without gradients.
# Beyond this many variants PyTorch would run it uncompiled.
_VARIANTS_COMPILED = 64


class Fused:
    """A decorator: the function runs as it is written, or compiled after `compile_fused(True)`."""

    known: list["Fused"] = []

    def __init__(self, function: Callable):
        self.function = self.call = function
        self.known.append(self)

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)


def compile_fused(on: bool) -> None:
    """From now on, run every `Fused` function compiled, for shapes of any size, or as it is written."""
    if on:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS_COMPILED)
    for fused in Fused.known:
        fused.call = torch.compile(fused.function, dynamic=True) if on else fused.function


def is_compiled() -> bool:
    """What `compile_fused` said last."""
    return any(fused.call is not fused.function for fused in Fused.known)


@contextmanager
def as_written() -> Iterator[None]:
    """Inside the context nothing is compiled, whatever `compile_fused` said."""
    calls = [fused.call for fused in Fused.known]
    for fused in Fused.known:
        fused.call = fused.function
    try:
        yield
    finally:
        for fused, call in zip(Fused.known, calls, strict=True):
            fused.call = call
