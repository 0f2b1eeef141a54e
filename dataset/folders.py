"""Folders of task files as they are found on a disk: which files hold tasks, and in which subsets.

Links are followed. Hidden files and what archives and notebooks leave behind are no tasks.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from utils.errors import UserError

# Folders that programs make beside one's own. A name that begins with a point is hidden in any case.
DEBRIS = {"__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "lost+found"}
SUBSET_NAME = re.compile(r"\w([\w .+()-]*[\w.+()-])?")
LISTED = 10  # names that a line of text shows


@dataclass
class Found:
    """The task files below a folder.

    files: those of each folder that has some, in the order of the names.
    left_out: folders and files that were not looked into, each with the reason where it is not its name.
    """

    files: dict[Path, list[Path]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def note(self, root: Path) -> list[str]:
        """What was left out, as one line, or nothing."""
        if not self.left_out:
            return []
        more = ", ..." if len(self.left_out) > LISTED else ""
        return [f"{root}: left out {', '.join(sorted(self.left_out)[:LISTED])}{more}"]


def listed(names: list[str]) -> str:
    """The first of some names."""
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


def find_files(root: Path) -> Found:
    """Every `*.json` file below `root`, each folder once, links included.

    A folder that can be reached on several ways keeps the way without a link. So loops of links end, and no
    task is read twice. Raises `UserError` for a link that leads nowhere.
    """
    found = Found()
    seen: dict[Path, Path] = {}
    top = root.resolve()
    files: list[Path] = []
    folders, links = [root], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        real = folder.resolve()
        if real in seen or real in top.parents:
            same = seen.get(real)
            why = "which contains this folder" if same is None else f"the same as {same.relative_to(root)}"
            found.left_out.append(f"{folder.relative_to(root)} ({why})")
            continue
        seen[real] = folder
        for entry in sorted(folder.iterdir()):
            if entry.name.startswith(".") or entry.name in DEBRIS:
                found.left_out.append(str(entry.relative_to(root)))
            elif entry.is_dir():
                (links if entry.is_symlink() else folders).append(entry)
            # Without a suffix it may have been a subset.
            elif entry.suffix in ("", ".json") and entry.is_symlink() and not entry.exists():
                raise UserError(f"{entry} is a link to {os.readlink(entry)}, which does not exist")
            elif entry.suffix == ".json" and entry.is_file():
                files.append(entry)
    for file in sorted(files):
        found.files.setdefault(file.parent, []).append(file)
    return found


def subset_files(root: Path, name: str | None, notes: list[str] | None = None) -> dict[str, list[Path]]:
    """The task files of each subset below `root`. `notes` hears of what was left out.

    Each folder that holds task files, at any depth, is a subset. With `name` all files together are one.
    Raises `UserError` for a folder without files, and for two folders of one name.
    """
    if not root.is_dir():
        raise UserError(
            f"{root} is a file; --input-file reads it" if root.is_file() else f"no such folder: {root}"
        )
    found = find_files(root)
    left_out = found.note(root)
    if not found.files:
        raise UserError("; ".join([f"{root}: no *.json task files in this folder or below it", *left_out]))
    if notes is not None:
        notes += left_out
    if name is not None:
        return {name: [file for files in found.files.values() for file in files]}
    # Two subsets of one name would silently become one.
    named: dict[str, Path] = {}
    for folder in found.files:
        called = name_of(folder)
        other = named.setdefault(called, folder)
        if other != folder:
            raise UserError(
                f"{root}: two subfolders are called '{called}' ({other} and {folder}); "
                f"give all tasks one name with NAME={root}"
            )
    return {called: found.files[folder] for called, folder in named.items()}


def name_of(folder: Path) -> str:
    """The last part of a path. A link keeps its own, `.` and `..` get those that they stand for."""
    return Path(os.path.abspath(folder)).name


def check_subset_name(name: str, origin: str) -> None:
    """Raise `UserError` unless `name` can be the name of a subset in options and configurations."""
    if not SUBSET_NAME.fullmatch(name):
        raise UserError(
            f"{origin}: {name!r} cannot be the name of a subset; a name is made of letters, digits, spaces "
            "and _ . + - ( ), begins with a letter, a digit or _, and does not end in a space. "
            "Rename the folder or file, or give a folder a name with NAME=DIR"
        )


def named_folder(argument: str) -> tuple[str | None, Path]:
    """`DIR` or `NAME=DIR` of --input-dir as the name, None without one, and the folder.

    An existing folder is never taken apart, whatever its path is. Raises `UserError`.
    """
    name, equals, folder = argument.partition("=")
    if not equals or Path(argument).is_dir():
        return None, Path(argument)
    # No name has a slash: this is a path with an = in it.
    if "/" in name:
        raise UserError(f"no such folder: {argument}")
    if not name or not folder:
        missing = "the name before" if not name else "the folder behind"
        raise UserError(f"--input-dir {argument}: {missing} the = is missing; say DIR or NAME=DIR")
    check_subset_name(name, f"--input-dir {argument}")
    if not Path(folder).exists():
        raise UserError(f"no such folder: {folder}, which --input-dir {argument} calls {name}")
    return name, Path(folder)
