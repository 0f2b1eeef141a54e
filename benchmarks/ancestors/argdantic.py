"""Stands in for the package argdantic, which the ancestors import for their command lines alone."""

from collections.abc import Callable
from typing import Any


class ArgParser:
    """Takes the declarations of a command line and ignores them. `drive.py` calls the functions itself."""

    def command(self, *_: Any, **__: Any) -> Callable:
        return lambda function: function
