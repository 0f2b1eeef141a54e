"""Commands that have moved: their old names say where they went. Kept for one release (CHANGELOG.md)."""

from utils.errors import UserError, reports_user_errors


@reports_user_errors
def moved(to: str) -> None:
    """End the process with one line, the command's new name, and the exit status of a user's mistake."""
    raise UserError(f"this command has moved; use python -m {to}")
