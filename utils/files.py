"""Writing files so that a killed process or a full disk never leaves half of one behind."""

import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from utils.errors import UserError

LOCK = ".lock"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)`, then rename the result to `path`; on any failure the old file stays as it
    was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def as_json(value: Any) -> Any:
    """`value` as plain JSON types: arrays become lists, numbers that are not finite None, since JSON has no
    NaN."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if set(map(type, value)) == {int}:
            return value  # a row of a grid, of which a file has many
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write `value` as JSON (`as_json`), atomically."""
    text = json.dumps(as_json(value), indent=indent, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """The parsed JSON of `path`; `UserError` with file, line and column when it is missing or malformed."""
    try:
        return json.loads(
            path.read_text(encoding="utf-8-sig")
        )  # some editors begin a file with a byte order mark
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise UserError(f"expected a JSON file, found a folder: {path}") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: not valid JSON (line {error.lineno}, column {error.colno}: {error.msg})"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file") from None
    except RecursionError:
        raise UserError(f"{path}: too many brackets inside each other") from None


def json_in_page(value: Any) -> str:
    """`value` as JSON (`as_json`) that may stand inside a `<script>` element: without any `<`, since `<!--`
    matters there as well as `</`."""
    return json.dumps(as_json(value), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def check_replaceable(path: Path, marker: str) -> None:
    """Raise `UserError` unless `path` is free, an empty folder, or one with the file `marker`: an older one
    of the same kind."""
    if path.exists() and not (path / marker).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(
            f"{path} exists and was not written by this command (it has no {marker}); choose another folder"
        )


@contextmanager
def directory_written_whole(path: Path, marker: str) -> Iterator[Path]:
    """Yield a temporary directory beside `path` that takes its place on success and disappears on failure.

    An existing folder is replaced only if `check_replaceable` allows it.
    """
    path = path.resolve()
    check_replaceable(path, marker)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        replace_directory(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_directory(source: Path, target: Path) -> None:
    """Rename `source` to `target`; an existing `target` is moved aside first, so that one of the two always
    exists."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        os.replace(target, aside)
    os.replace(source, target)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def exclusive(folder: Path, what: str, lock: str = LOCK) -> Iterator[None]:
    """Inside the context no other process can enter it for the same folder. The lock dies with its process.

    Raises `UserError` where another one is inside. File systems without locks let everybody in.
    """
    path = folder / lock
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            raise UserError(
                f"{folder}: another process ({holder}) {what}; wait for it, or choose another folder"
            ) from None
        except OSError:  # no locks here, as on some network file systems
            pass
        else:
            file.truncate(0)
            file.write(f"{os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
