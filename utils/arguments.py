"""Numbers on argparse's command lines."""

from argparse import ArgumentTypeError


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
