"""Models on the Hugging Face hub, by name: `hub:owner/name@revision`, or `hub:FOLDER` with the same files.

The names of files and parameters are those of huggingface_hub's PyTorchModelHubMixin. What is in the files:
utils/checkpoint.py reads and tools/publish.py writes them.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.extras import require

PREFIX = "hub:"
WEIGHTS, CONFIG, PAIRS = "model.safetensors", "config.json", "trained_pairs.safetensors"
FILES = (WEIGHTS, CONFIG, PAIRS)  # that a model is read from
FOLDERS = "folders"  # of the cache: models that came from a folder
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_reference(path: Path | str) -> bool:
    """Whether `path` names a model of the hub."""
    return str(path).startswith(PREFIX)


def reference(path: Path | str, revision: str | None) -> str:
    """What `path` means where a name of the hub is allowed, too: what is on the disk comes first."""
    if is_reference(path) or Path(path).exists() or not _NAME.fullmatch(str(path)):
        if revision is not None:
            raise UserError(f"{path} is no name on the hub, so it has no revision={revision}")
        return str(path)
    return f"{PREFIX}{path}" + (f"@{revision}" if revision else "")


def cache_folder() -> Path:
    """Where models of the hub are kept as checkpoints. XDG_CACHE_HOME moves it."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "etrm" / "hub"


def name_of(text: str) -> tuple[str, str | None]:
    """The repository and the revision of `hub:owner/name@revision`. Raises `UserError` for another form."""
    repository, at, revision = text.removeprefix(PREFIX).partition("@")
    if not _NAME.fullmatch(repository) or (at and not revision):
        raise UserError(f"{text} is no model on the hub: expected hub:owner/name@revision, or hub:FOLDER")
    return repository, revision or None


def fetch(text: str) -> tuple[Path | None, Path]:
    """The folder with the files of a model, and the one in the cache that is to hold it as a checkpoint.

    The first is None where the second is there already: a commit never changes. Without a network the cache
    of huggingface_hub serves. Raises `UserError` where the model cannot be had.
    """
    local = Path(text.removeprefix(PREFIX))
    if text != PREFIX and local.is_dir():
        return local, cache_folder() / FOLDERS
    repository, revision = name_of(text)
    kept = cache_folder() / repository.replace("/", "--")
    if revision and _COMMIT.fullmatch(revision) and (kept / revision).is_dir():
        return None, kept / revision
    require("huggingface_hub", f"there is no folder {repository}; a model from the hub ({text})")
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(FILES))
    except _problems() as error:
        raise UserError(
            f"cannot fetch {text}: {_first_line(error)}; nor is there a folder {repository}"
        ) from None
    commit = Path(found).name
    if revision != commit:
        print(f"{text} is the commit {commit}; {PREFIX}{repository}@{commit} stays the same", file=sys.stderr)
    return Path(found), kept / commit


def push(folder: Path, repository: str, message: str, **options: Any) -> str:
    """Upload a folder to `owner/name`, and return the commit. Raises `UserError`.

    options: private, token, branch and create_pr, as in `PyTorchModelHubMixin.push_to_hub`.
    """
    require("huggingface_hub", "pushing to the hub")
    import huggingface_hub

    branch, create_pr = options.get("branch"), bool(options.get("create_pr"))
    try:
        api = huggingface_hub.HfApi(token=options.get("token"))
        api.create_repo(repository, private=options.get("private"), exist_ok=True)
        if branch:
            api.create_branch(repository, branch=branch, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=message,
            revision=branch,
            create_pr=create_pr,
        )
    except _problems() as error:
        raise UserError(f"cannot push to {PREFIX}{repository}: {_first_line(error)}") from None
    return commit.oid


def _problems() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises for a name, a network or a permission."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError, OSError, ValueError


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
