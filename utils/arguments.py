"""Command lines that are read by argparse: a parser, and the types of its numbers."""

from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter


def parser_of(module: str, description: str | None) -> ArgumentParser:
    """The parser of `python -m module`, whose help is the module's docstring."""
    return ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=RawDescriptionHelpFormatter
    )


def natural(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(0, text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(1, text)


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is no whole number") from None
    if value < least:
        raise ArgumentTypeError(f"{value} is less than {least}")
    return value
