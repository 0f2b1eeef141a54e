"""Commands of the project in this process: called as their command line would, or only parsed."""

import argparse
import functools
import importlib
import re
import runpy

import pytest
from omegaconf import DictConfig, OmegaConf

from config import compose
from config.compose import CONFIG_DIR
from config.schema import PretrainConfig
from evaluation.session import EvaluateConfig
from tests.support.tree import modules
from utils.errors import UserError, reports_user_errors

PLACEHOLDER = re.compile(r"^([A-Z][A-Z_]*|\W*\.\.\.\W*|value|)$")


class Parsed(BaseException):
    """A command has read its options; nothing is run."""


def call(program: str, arguments: list[str], monkeypatch) -> None:
    """Run a program of the project in this process, as its command line would."""
    monkeypatch.setattr("sys.argv", [program, *arguments])
    if any(getattr(node, "name", "") == "main" for node in modules()[program].tree.body):
        main = importlib.import_module(program).main
    else:
        main = functools.partial(runpy.run_module, program, run_name="__main__")
    reports_user_errors(main)()


real_compose, real_validate = compose.compose, compose.validate
real_parse, real_parse_known = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args


@functools.cache
def defaults(config_name: str) -> DictConfig:
    return real_compose(config_name, [])[0]


def filled(config_name: str, overrides: list[str]) -> list[str]:
    """The overrides without placeholders such as NAME, and with a text for every value that is required."""
    known = defaults(config_name)
    kept = []
    for override in overrides:
        key, _, value = override.partition("=")
        if "=" not in override or not PLACEHOLDER.match(value):
            kept.append(override)
        elif key != "key" and not (CONFIG_DIR / key).is_dir():
            section, _, name = key.rpartition(".")
            if name not in list(OmegaConf.select(known, section) if section else known):
                raise UserError(f"unknown key '{key}'")
    given = {override.split("=")[0] for override in kept}
    return kept + [f"{key}=x" for key in known if OmegaConf.is_missing(known, key) and key not in given]


def stop_when_parsed(monkeypatch) -> None:
    """Programs of the project raise `Parsed` as soon as their options are read, and then run nothing."""

    def parse_known_args(parser, *arguments):
        real_parse_known(parser, *arguments)
        raise Parsed

    def parse_args(parser, *arguments):
        with pytest.MonkeyPatch.context() as within:
            within.setattr(argparse.ArgumentParser, "parse_known_args", real_parse_known)
            options = real_parse(parser, *arguments)
        if keys := [word for word in getattr(options, "overrides", None) or [] if "=" in word]:
            composes(keys)
        raise Parsed

    def validate(schema, composed):
        real_validate(schema, composed)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    monkeypatch.setattr(compose, "validate", validate)
    monkeypatch.setattr(compose, "compose", lambda name, words: real_compose(name, filled(name, words)))


def composes(keys: list[str]) -> None:
    """Raises `UserError` for keys that are neither a training run's nor an evaluation's."""
    problems = []
    for schema, name in ((PretrainConfig, "pretrain"), (EvaluateConfig, "evaluate")):
        try:
            return real_validate(schema, real_compose(name, filled(name, keys))[0])
        except UserError as error:
            problems.append(error)
    raise problems[0]
