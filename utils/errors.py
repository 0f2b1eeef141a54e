"""Errors that a user can cause and mend: one clear message, exit code 2, no traceback."""

import functools
import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Bad input from outside (a task file, a path, a key, a checkpoint). The message says what and where."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """The hint ` (did you mean 'x'?)` for a mistyped `word`, or an empty string when nothing valid is close."""
    valid = list(valid)
    match = get_close_matches(word, valid, n=1, cutoff=0.5)
    if not match:  # a dotted key is often mistyped in its last part only
        tails = {name.rsplit(".", 1)[-1]: name for name in valid}
        match = [tails[tail] for tail in get_close_matches(word.rsplit(".", 1)[-1], tails, n=1, cutoff=0.6)]
    return f" (did you mean '{match[0]}'?)" if match else ""


def reports_user_errors(main: Callable) -> Callable:
    """Decorator for entry points: print a `UserError` once per machine as `error: ...` and exit with code 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            message = f"error: {error}"
        except KeyboardInterrupt:
            message = "interrupted"
        except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return None
        except OSError as error:
            if error.errno is None or error.filename is None:
                raise
            message = f"error: {error.strerror}: {error.filename}"
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(message, file=sys.stderr)
        sys.exit(2)

    return wrapped
