"""Commands that have moved: their old names say where they went. Kept for one release (CHANGELOG.md)."""

import sys


def moved(to: str) -> None:
    """End the process with the command's new name."""
    sys.exit(f"error: this command has moved; use python -m {to}")
