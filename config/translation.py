"""Command lines of other systems in this framework's keys: one row per key of theirs, applied before Hydra
composes. The rows themselves are in config/ancestors.py."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from utils.distributed import World
from utils.errors import UserError

DOCUMENT = "docs/ancestors.md"
STAGES = (0, 1, 2)
SWEEPS = {"-m", "--multirun"}
OFF = ("false", "0", "0.0", "null", "none", "[]")  # what a key of theirs says when it asks for nothing
Compose = Callable[[str, list[str]], tuple[DictConfig, list[str]]]


class NoCounterpart(Exception):
    """What was asked for is not here. The message says why, or what is here instead."""


@dataclass(frozen=True)
class Translation:
    """Our keys with the texts of their values, perhaps none, and what is to be said beside them."""

    overrides: dict[str, str] = field(default_factory=dict)
    note: str = ""


class Line:
    """A command line that is being translated.

    given: their keys with the texts of their values, defaults of a configuration of theirs included.
    typed: the same for our keys, which win over every translation. swept: our keys with several values.
    """

    def __init__(self, config_name: str, given: dict[str, str], typed: dict[str, str], compose: Compose):
        self.config_name, self.given, self.typed, self.compose = config_name, given, typed, compose
        self.overrides: dict[str, str] = {}
        self.swept: set[str] = set()
        self._composed: DictConfig | None = None

    def add(self, overrides: dict[str, str]) -> None:
        """Take what was translated: `read` sees it from here on."""
        self.overrides |= overrides
        self._composed = None

    def read(self, key: str) -> Any:
        """The value of our `key` in the configuration as far as it is known, None if there is no such key.

        Raises `UserError` where it takes several values in a sweep.
        """
        if self.swept & {key, key.split(".")[0]}:
            raise UserError(
                f"{key} takes several values in this sweep, and an ancestor's key is converted with it; give "
                f"that one in this framework's keys, {DOCUMENT}"
            )
        if self._composed is None:
            known = {**self.overrides, **self.typed}
            words = [f"{name}={text}" for name, text in known.items() if name not in self.swept]
            self._composed = self.compose(self.config_name, words)[0]
        return OmegaConf.select(self._composed, key)


Convert = Callable[[str, Line], Translation | None]


@dataclass(frozen=True)
class Row:
    """One key of theirs.

    key: as it is typed. here: what `DOCUMENT` says of it.
    convert: from the text of a value and the line it stands in; None where the key and its meaning are
    ours, too. Raises `NoCounterpart`, or `ValueError` for a value that cannot be read.
    stage: a row sees the configuration that the rows of earlier stages lead to.
    replaced_by: our keys that make a default of this row needless. bare: a flag without a value.
    """

    key: str
    here: str
    convert: Convert
    stage: int = 0
    replaced_by: tuple[str, ...] = ()
    bare: bool = False

    def typed(self, text: str) -> str:
        """The key with its value as it stands in a command line."""
        return self.key if self.bare else f"{self.key}{' ' if self.key.startswith('-') else '='}{text}"


def configuration_name(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of --config-name, in any of its spellings, and the arguments without it."""
    for number, argument in enumerate(arguments):
        flag, equals, name = argument.partition("=")
        if flag in ("--config-name", "-cn") and (equals or len(arguments) > number + 1):
            end = number + (1 if equals else 2)
            return name or arguments[end - 1], arguments[:number] + arguments[end:]
    return None, arguments


def nothing(why: str) -> Translation:
    """Nothing is to be set."""
    return Translation({}, why)


def truth(text: str) -> bool:
    """Raises `ValueError` for what is no truth value."""
    if text.lower() not in ("true", "false"):
        raise ValueError("this is either True or False")
    return text.lower() == "true"


def renamed(key: str, name: str) -> Row:
    """A key with another name."""
    return Row(key, f"`{name}`", lambda text, line: Translation({name: text}))


def switch(key: str, here: str, on: dict[str, str], off: dict[str, str] | None = None) -> Row:
    """A truth value. off: what False is here, if not the default."""

    def convert(text: str, line: Line) -> Translation:
        if truth(text):
            return Translation(on)
        return Translation(off) if off else nothing("the default")

    return Row(key, here, convert)


def absent(key: str, why: str, *same: str, bare: bool = False) -> Row:
    """A key without a counterpart, accepted where it asks for what is done here anyway: off, or `same`."""

    def convert(text: str, line: Line) -> Translation:
        if text.lower() in (*OFF, *same):
            return nothing("as it is here")
        raise NoCounterpart(why.replace("`", ""))

    return Row(key, why, convert, bare=bare)


def flag(key: str, **overrides: str) -> Row:
    """A flag without a value; `__` in a name is a dot."""
    ours = {name.replace("__", "."): text for name, text in overrides.items()}
    here = " ".join(f"{name}={text}" for name, text in ours.items())
    return Row(key, f"`{here}`", lambda text, line: Translation(ours), bare=True)


@dataclass(frozen=True)
class Dialect:
    """Their words for one of our commands, whose configuration is called `base`.

    rows: by key; where two of them set the same key of ours, the later row wins.
    configs: the name of a configuration of theirs -> what it sets, in their keys or in ours.
    """

    base: str
    rows: dict[str, Row]
    configs: dict[str, dict[str, str]] = field(default_factory=dict)

    def translated(self, name: str, arguments: list[str], compose: Compose) -> tuple[str, list[str]]:
        """The name of our configuration and the arguments in our keys; what is not theirs stays as it is.

        Says on stderr what became of each key. Raises `UserError` for what has no counterpart.
        """
        given, typed, kept = self._read(arguments)
        if not given and name not in self.configs:
            return name, arguments
        defaults = self._needed_defaults(name, given, typed)
        theirs = {key: text for key, text in (defaults | given).items() if key in self.rows}
        line = Line(self.base if name in self.configs else name, theirs, typed, compose)
        line.add({key: text for key, text in defaults.items() if key not in self.rows})
        sweep = bool(SWEEPS & set(kept))
        line.swept = {key for key, text in typed.items() if sweep and len(_choices(text)) > 1}
        found = self._by_stages(line, sweep)
        if World.from_environment().is_main:
            self._say(name, line, given, found)
        overrides = [f"{key}={text}" for key, text in line.overrides.items() if key not in typed]
        return line.config_name, [*overrides, *kept]

    def _read(self, arguments: list[str]) -> tuple[dict[str, str], dict[str, str], list[str]]:
        """Their keys, our keys, and the arguments that are not theirs."""
        given, typed, kept = {}, {}, []
        waiting = iter(arguments)
        for argument in waiting:
            name, equals, text = argument.partition("=")
            key = name if argument.startswith("-") else name.lstrip("+")
            row = self.rows.get(key)
            if row and row.bare:
                given[key] = "true"
            elif row and equals:
                given[key] = text
            elif row and key.startswith("-"):
                given[key] = next(waiting, "")
                if not given[key]:
                    raise UserError(f"{key} needs a value")
            else:
                kept.append(argument)
                if equals and not argument.startswith("-"):
                    typed[key] = text
        return given, typed, kept

    def _needed_defaults(self, name: str, given: dict[str, str], typed: dict[str, str]) -> dict[str, str]:
        """What a configuration of theirs sets, without what the line makes needless."""
        defaults = dict(self.configs.get(name, {}))
        if "arch" in given and given["arch"] != defaults.get("arch"):  # its settings are of another one
            defaults = {key: text for key, text in defaults.items() if not key.startswith("arch.")}
        for key in list(defaults):
            if key in self.rows and typed.keys() & set(self.rows[key].replaced_by):
                del defaults[key]
        return defaults

    def _by_stages(self, line: Line, sweep: bool) -> dict[str, Translation | None]:
        """What became of every key of theirs, also added to the line."""
        found: dict[str, Translation | None] = {}
        for stage in STAGES:
            overrides: dict[str, str] = {}
            for key, row in self.rows.items():
                if row.stage == stage and key in line.given:
                    choices = _choices(line.given[key]) if sweep else [line.given[key]]
                    here, swept = _one_for_all(row, choices, line)
                    found[key] = here
                    overrides |= here.overrides if here else {key: line.given[key]}
                    line.swept |= swept
            line.add(overrides)
        return found

    def _say(
        self, name: str, line: Line, given: dict[str, str], found: dict[str, Translation | None]
    ) -> None:
        """One line for the configuration of theirs, and one for each key on the command line."""
        if name in self.configs:
            said = {key for source in given if (of := found[source]) for key in of.overrides}
            left = line.overrides.keys() - said - given.keys() - line.typed.keys()
            notes = [of.note for key, of in found.items() if of and of.overrides and key not in given]
            words = _words({key: line.overrides[key] for key in line.overrides if key in left}, notes)
            print(f"ancestor's configuration {name} -> {words}", file=sys.stderr)
        for key, text in given.items():
            if of := found[key]:
                what = f"ancestor's {'flag' if key.startswith('-') else 'key'} {self.rows[key].typed(text)}"
                print(f"{what} -> {_words(of.overrides, [of.note])}", file=sys.stderr)


def _words(overrides: dict[str, str], notes: Iterable[str]) -> str:
    """`a=1 b=2 (note)`, or `nothing (note)`."""
    what = " ".join(f"{key}={text}" for key, text in overrides.items()) or "nothing"
    why = "; ".join(filter(None, notes))
    return f"{what} ({why})" if why else what


def _choices(text: str) -> list[str]:
    """The values of a sweep; a list or a quoted text is one value."""
    return [text] if text[:1] in ("[", "{", "'", '"') else text.split(",")


def _one_for_all(row: Row, choices: list[str], line: Line) -> tuple[Translation | None, set[str]]:
    """The translation of all values of a sweep as one, and our key that then takes several values."""
    found = [_translate(row, text, line) for text in choices]
    if len(found) == 1:
        return found[0], set()
    each = [{row.key: text} if of is None else of.overrides for of, text in zip(found, choices, strict=True)]
    keys = each[0].keys()
    differing = {key for key in keys if len({overrides.get(key) for overrides in each}) > 1}
    if any(overrides.keys() != keys for overrides in each) or len(differing) > 1:
        raise UserError(
            f"{row.key} cannot take several values in a sweep: they set several keys here; sweep over those, "
            f"{DOCUMENT}"
        )
    joined = {key: ",".join(o[key] for o in each) if key in differing else each[0][key] for key in keys}
    return (Translation(joined) if any(found) else None), differing


def _translate(row: Row, text: str, line: Line) -> Translation | None:
    """What one value is here. Raises `UserError` where it is nothing, or no value."""
    try:
        return row.convert(text, line)
    except NoCounterpart as why:
        raise UserError(f"{row.typed(text)} has no counterpart here: {why} ({DOCUMENT})") from None
    except ValueError as why:
        raise UserError(f"{row.typed(text)}: {why}") from None
