"""Command lines of the rules builder."""

from dataset.build_rules_dataset import parse_arguments


def options_for(folder, *arguments: str):
    return parse_arguments(["--output-dir", str(folder), *arguments])
