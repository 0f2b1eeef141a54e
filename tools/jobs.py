"""Work through a list of commands, one after the other.

    python -m tools.jobs jobs.txt

A line of the list is a mark and a shell command. A line without a mark is a command that waits:

    [ ] python pretrain_etrm.py run_name=first seed=0       waits
    [-] python pretrain_etrm.py run_name=second seed=1      runs, or ran when the queue was killed
    [x] python evaluate.py checkpoint=runs/first            is done
    [!] python evaluate.py checkpoint=runs/nowhere          has failed
    # a comment

The queue keeps the marks in the file while it runs. So the list can be looked at and extended meanwhile, and
the same command continues it after a stop: it runs what waits or was interrupted. --retry runs failed
commands again. A signal (Ctrl-C, SIGTERM, SIGUSR1) is handed to the running command, which saves its state
and keeps the mark [-].
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

if not __package__:  # called by its path: import from the project's folder, not from this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.arguments import parser_of
from utils.errors import EXIT_STOPPED, Stopped, UserError, reports_user_errors
from utils.files import exclusive, write_atomically
from utils.signals import ASKING_TO_STOP

WAITS, RUNS, DONE, FAILED = " ", "-", "x", "!"
_LINE = re.compile(r"\[([ x!-])\] (.+)")


def read(path: Path) -> list[str]:
    """The lines of the list, unmarked commands with their mark. Raises `UserError` for an unreadable file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    return [f"[{WAITS}] {line}" if _is_unmarked(line) else line for line in lines]


def _is_unmarked(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#") and not _LINE.fullmatch(line)


def next_job(path: Path, tried: set[str], retry: bool) -> tuple[int, str] | None:
    """Line number and command of the next line to run, None when there is none.

    `tried` are commands that this queue has run already. With `retry`, failed ones are run, too.
    """
    open_marks = {WAITS, RUNS, *([FAILED] if retry else [])}
    for number, line in enumerate(read(path)):
        found = _LINE.fullmatch(line)
        if found and found[1] in open_marks and found[2] not in tried:
            return number, found[2]
    return None


def mark(path: Path, number: int, command: str, sign: str) -> None:
    """Write the mark of the command that was on line `number`."""
    # Read anew, since somebody may have added lines meanwhile. Of equal commands the nearest is meant.
    lines = read(path)
    places = [i for i, line in enumerate(lines) if (found := _LINE.fullmatch(line)) and found[2] == command]
    if not places:
        return  # somebody took the line out
    lines[min(places, key=lambda i: abs(i - number))] = f"[{sign}] {command}"
    text = "\n".join(lines) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def run(command: str) -> tuple[int, bool]:
    """Run a shell command. Returns its exit status, and whether a signal asked to stop meanwhile."""
    # In a process group of its own, so that a Ctrl-C at the terminal reaches it once: from here.
    process = subprocess.Popen(command, shell=True, start_new_session=True)
    asked: list[int] = []

    def hand_on(number: int, frame: object) -> None:
        asked.append(number)
        os.killpg(process.pid, number)  # the shell and what it started

    before = {number: signal.signal(number, hand_on) for number in ASKING_TO_STOP}
    try:
        return process.wait(), bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def work(path: Path, retry: bool) -> tuple[int, int]:
    """Run all that waits. Returns how many were done, how many failed. Raises `Stopped` after a signal."""
    done = failed = 0
    tried: set[str] = set()
    while (job := next_job(path, tried, retry)) is not None:
        number, command = job
        mark(path, number, command, RUNS)
        print(f"[{RUNS}] {command}", flush=True)
        status, asked = run(command)
        if asked or status == EXIT_STOPPED:  # its mark stays, so that it is continued
            raise Stopped(f"stopped during: {command}; the same queue continues it")
        tried.add(command)
        sign = FAILED if status else DONE
        done, failed = done + (not status), failed + bool(status)
        mark(path, number, command, sign)
        print(f"[{sign}] {command}" + (f" (exit status {status})" if status else ""), flush=True)
    return done, failed


@reports_user_errors
def main() -> None:
    parser = parser_of("tools.jobs", __doc__)
    parser.add_argument("list", type=Path, metavar="LIST", help="a file of commands")
    parser.add_argument("--retry", action="store_true", help="also run what has failed")
    options = parser.parse_args()
    read(options.list)  # an unreadable list is an error, before a lock is made beside it
    with exclusive(options.list.resolve().parent, "works through a list here", f".{options.list.name}.lock"):
        done, failed = work(options.list, options.retry)
    print(f"{options.list}: {done} done, {failed} failed")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
