"""How a command ends when it does not simply finish: one clear message, a documented exit status, no
traceback.

0 finished, 1 a failure of the program or of another process, 2 an error that the user can mend (`UserError`),
75 stopped on request with everything saved (`Stopped`), 130 interrupted at once.
"""

import errno
import functools
import io
import os
import sys
import time
from collections.abc import Callable, Iterable
from difflib import get_close_matches

EXIT_FAILURE, EXIT_USER_ERROR, EXIT_STOPPED, EXIT_INTERRUPTED = 1, 2, 75, 130
FIRST_SPEAKS = 5.0  # seconds
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class UserError(Exception):
    """Bad input from outside (a task file, a path, a key, a checkpoint). The message says what and where."""


class ProcessError(UserError):
    """An error that one of several processes meets alone, so that it has to be printed wherever it
    happens."""


class PeerLost(ProcessError):
    """Another process of the run failed or stopped answering."""


class Stopped(Exception):
    """The run ended on request before it was finished; its state is saved."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """The hint ` (did you mean 'x'?)` for a mistyped `word`, or an empty string when nothing valid is
    close."""
    valid = list(valid)
    match = get_close_matches(word, valid, n=1, cutoff=0.5)
    if not match:  # a dotted key is often mistyped in its last part only
        tails = {name.rsplit(".", 1)[-1]: name for name in valid}
        match = [tails[tail] for tail in get_close_matches(word.rsplit(".", 1)[-1], tails, n=1, cutoff=0.6)]
    return f" (did you mean '{match[0]}'?)" if match else ""


def never_fail_on_an_encoding() -> None:
    """Let the terminal show what it can and escape the rest: no name of a task is worth the loss of a
    result."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def reports_user_errors(main: Callable) -> Callable:
    """Decorator for entry points: print what ended the command, once per machine where all processes met it,
    and exit.

    With an error, every process but a machine's first waits for `FIRST_SPEAKS` seconds: torchrun ends the
    others as soon as one has ended, which would silence the first if it were slower. Whoever is still there
    after that met the error alone, and says so.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        never_fail_on_an_encoding()
        try:
            return main(*args, **kwargs)
        except ProcessError as error:
            rank = os.environ.get("RANK")
            print(f"error{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr)
            sys.exit(EXIT_FAILURE if isinstance(error, PeerLost) else EXIT_USER_ERROR)
        except UserError as error:
            message, status = f"error: {error}", EXIT_USER_ERROR
        except Stopped as stopped:
            message, status = str(stopped), EXIT_STOPPED
        except KeyboardInterrupt:
            message, status = "interrupted", EXIT_INTERRUPTED
        except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return None
        except OSError as error:
            if error.filename is None and error.errno not in _DISK_ERRORS:
                raise
            where = (
                f": {error.filename}" if error.filename else ""
            )  # a write to an open file does not say which
            message, status = f"error: {error.strerror}{where}", EXIT_USER_ERROR
        if os.environ.get("LOCAL_RANK", "0") != "0":
            if status != EXIT_USER_ERROR:
                sys.exit(status)
            time.sleep(FIRST_SPEAKS)
            message = message.replace("error", f"error (rank {os.environ.get('RANK')})", 1)
        print(message, file=sys.stderr)
        sys.exit(status)

    return wrapped
