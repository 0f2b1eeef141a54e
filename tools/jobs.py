"""Work through a list of commands, one after the other: python -m tools.jobs LIST

Every line of LIST is a mark and a shell command, and an unmarked line is a command that waits:

    [ ] python pretrain_etrm.py run_name=first seed=0       waits
    [-] python pretrain_etrm.py run_name=second seed=1      runs, or ran when the queue was killed
    [x] python evaluate.py checkpoint=runs/first            is done
    [!] python evaluate.py checkpoint=runs/nowhere          failed
    # a comment

The marks are kept in the file while the queue runs, so that it can be looked at, extended and, after a stop,
continued by the same command: what waits or was interrupted runs, what is done or failed does not. --retry
runs failed commands again. A signal (Ctrl-C, SIGTERM, SIGUSR1) is handed to the running command, which saves
its state; its mark stays [-].
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from utils.arguments import parser_of
from utils.errors import EXIT_STOPPED, Stopped, UserError, reports_user_errors
from utils.files import exclusive, write_atomically
from utils.signals import ASKING_TO_STOP

WAITS, RUNS, DONE, FAILED = " ", "-", "x", "!"
_LINE = re.compile(r"\[([ x!-])\] (.+)")


def read(path: Path) -> list[str]:
    """The lines of the list; unmarked commands get their mark. Raises `UserError`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    return [f"[{WAITS}] {line}" if _is_unmarked(line) else line for line in lines]


def _is_unmarked(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#") and not _LINE.fullmatch(line)


def next_job(path: Path, tried: set[str], retry: bool) -> tuple[int, str] | None:
    """Number and command of the next line that waits, was interrupted or, with `retry`, failed before."""
    open_marks = {WAITS, RUNS, *([FAILED] if retry else [])}
    for number, line in enumerate(read(path)):
        found = _LINE.fullmatch(line)
        if found and found[1] in open_marks and found[2] not in tried:
            return number, found[2]
    return None


def mark(path: Path, number: int, command: str, sign: str) -> None:
    """Write a command's mark. The file is read anew, since somebody may have added lines meanwhile."""
    lines = read(path)
    places = [i for i, line in enumerate(lines) if (found := _LINE.fullmatch(line)) and found[2] == command]
    if not places:
        return  # somebody took the line out
    lines[min(places, key=lambda i: abs(i - number))] = f"[{sign}] {command}"
    text = "\n".join(lines) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def run(command: str) -> tuple[int, bool]:
    """A shell command's exit status, and whether a signal asked to stop meanwhile, which the command was told
    as well."""
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
    """Run all that waits; how many commands were done and how many failed. Raises `Stopped` after a
    signal."""
    done = failed = 0
    tried: set[str] = set()
    while (job := next_job(path, tried, retry)) is not None:
        number, command = job
        mark(path, number, command, RUNS)
        print(f"[{RUNS}] {command}", flush=True)
        status, asked = run(command)
        if asked or status == EXIT_STOPPED:
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
    parser.add_argument("list", type=Path, metavar="LIST")
    parser.add_argument("--retry", action="store_true", help="run what failed again")
    options = parser.parse_args()
    read(options.list)
    with exclusive(options.list.resolve().parent, "works through a list here", f".{options.list.name}.lock"):
        done, failed = work(options.list, options.retry)
    print(f"{options.list}: {done} done, {failed} failed")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
