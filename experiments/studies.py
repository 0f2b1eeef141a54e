"""What the studies share: a line for each training in a file that grows, where nothing is done again."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a study, none where it has not begun."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def complete(
    path: Path, keys: tuple[str, ...], cases: Iterable[tuple[Any, ...]], run: Callable[..., dict[str, Any]]
) -> None:
    """Append the line that `run(*case)` returns for each case whose values of `keys` no line has."""
    for case in cases:
        if case not in {tuple(line[key] for key in keys) for line in read(path)}:
            line = run(*case)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
