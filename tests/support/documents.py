"""Commands in Markdown: where they stand, how they are marked, and what they are in this process.

A comment above a code block says what the tests do with its commands:
`<!-- test: run -->` runs them, small; words after `run` are added to each of them;
`<!-- test: check -->` reads their options and runs nothing;
`<!-- test: skip, REASON -->` leaves them alone.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE
)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
SETTING = re.compile(r"\+?([A-Za-z_][\w.]*)=\S*$")
MARK = re.compile(r"<!-- test: (run|check|skip,)( [^>]*)?-->\s*$")
STARTS = ("python", "torchrun", "make", "bash", "source", "pip", "cat")
SHELLS = ("bash", "sh", "shell", "console")


@dataclass(frozen=True)
class Command:
    """A command line, and in a session what stands below it."""

    words: tuple[str, ...]
    where: str
    below: str = ""

    @property
    def program(self) -> str | None:
        """The script or module of the project that is run, dotted, else None."""
        words = list(self.words)
        if words[0] == "torchrun":
            words = ["python", *_behind_options_of_torchrun(words[1:])]
        if words[0] != "python" or len(words) < 2:
            return None
        return words[2] if words[1] == "-m" else words[1].removesuffix(".py").replace("/", ".")

    @property
    def arguments(self) -> list[str]:
        words = list(self.words)
        if words[0] == "torchrun":
            words = ["python", *_behind_options_of_torchrun(words[1:])]
        return words[3:] if words[1] == "-m" else words[2:]


@dataclass(frozen=True)
class Block:
    """A fenced code block. `task` and `words`: what its mark says, None and empty without one."""

    where: str
    language: str
    text: str
    task: str | None
    words: tuple[str, ...]

    @property
    def commands(self) -> list[Command]:
        lines = self.text.replace("\\\n", " ").split("\n")
        prompted = any(line.startswith("$ ") for line in lines)
        found = []
        for number, line in enumerate(lines):
            if not (line.startswith("$ ") if prompted else _is_command(line)):
                continue
            rest = lines[number + 1 :]
            end = next((i for i, other in enumerate(rest) if other.startswith("$ ")), len(rest))
            found.append(Command(_words(line.removeprefix("$ ")), self.where, "\n".join(rest[:end])))
        return found

    @property
    def needs_a_mark(self) -> bool:
        return self.language in SHELLS or bool(self.commands)


def blocks_of(path: Path) -> list[Block]:
    """The code blocks of a document, in order."""
    content = path.read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(content):
        above = content[: fence.start()]
        mark = MARK.search(above)
        indent = fence["indent"]
        text = "".join(line.removeprefix(indent) for line in fence["text"].splitlines(keepends=True))
        where = f"{path.name}:{above.count(chr(10)) + 1}"
        task = mark[1].strip(",") if mark else None
        words = tuple(shlex.split(mark[2] or "")) if mark and task == "run" else ()
        if mark and task == "skip":
            assert (mark[2] or "").strip(), f"{where}: a mark that skips says why"
        found.append(Block(where, fence["language"], text, task, words))
    return found


def commands_in(path: Path) -> list[Command]:
    """Every command of a document, in blocks and in the text."""
    found = [command for block in blocks_of(path) for command in block.commands]
    content = _without_blocks(path)
    for span in SPAN.finditer(content):
        text = " ".join(span[1].split())
        if text.startswith(("python ", "torchrun ")):
            where = f"{path.name}:{content[: span.start()].count(chr(10)) + 1}"
            found.append(Command(_words(text), where))
    return found


def modules_named_in(path: Path) -> list[tuple[str, str]]:
    """Where and which module a document runs with `python -m`."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [
        (f"{path.name}:{number}", name)
        for number, line in enumerate(lines, 1)
        for name in re.findall(r"\bpython3? -m ([\w.]*\w)", line)
    ]


def settings_in(path: Path) -> list[tuple[str, str]]:
    """Where and which key has a value in the text (`key=value`); keys in capitals are the environment's."""
    content, found = _without_blocks(path), []
    for span in SPAN.finditer(content):
        keys = [SETTING.match(word) for word in span[1].split()]
        if all(keys):
            where = f"{path.name}:{content[: span.start()].count(chr(10)) + 1}"
            found += [(where, key[1]) for key in keys if not key[1].isupper()]
    return found


def _without_blocks(path: Path) -> str:
    """The text of a document with its code blocks blank, so that lines keep their numbers."""
    return FENCE.sub(lambda fence: re.sub(r"[^\n]", "", fence[0]), path.read_text(encoding="utf-8"))


def _is_command(line: str) -> bool:
    return line.split(" ", 1)[0] in STARTS and not line.startswith("cat ")


def _words(line: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(line, comments=True))
    except ValueError:
        return tuple(line.split())


def _behind_options_of_torchrun(words: list[str]) -> list[str]:
    """From `-m` or the script on."""
    for number, word in enumerate(words):
        if word == "-m" or word.endswith(".py"):
            return words[number:]
    return ["..."]
