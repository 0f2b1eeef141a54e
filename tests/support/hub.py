"""A hub in a folder: what huggingface_hub's client is asked for, without a network."""

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace


class FolderHub:
    """Repositories as huggingface_hub's cache has them: models--owner--name/snapshots/<commit>, and refs."""

    def __init__(self, root: Path):
        self.root, self.reachable, self.downloads = root, True, 0
        self.created: dict[str, bool | None] = {}

    def install(self, monkeypatch) -> "FolderHub":
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        return self

    def folder(self, repository: str) -> Path:
        return self.root / f"models--{repository.replace('/', '--')}"

    def create_repo(self, repository: str, private: bool | None = None, exist_ok: bool = False) -> None:
        assert exist_ok
        self.created[repository] = private

    def create_branch(self, repository: str, branch: str, exist_ok: bool = False) -> None:
        assert exist_ok and repository in self.created and branch

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str, revision: str | None,
                      create_pr: bool) -> SimpleNamespace:  # fmt: skip
        assert commit_message and not create_pr and repo_id in self.created
        files = sorted(path for path in Path(folder_path).iterdir() if not path.name.startswith("."))
        commit = hashlib.sha1(b"".join(path.read_bytes() for path in files)).hexdigest()
        shutil.copytree(folder_path, self.folder(repo_id) / "snapshots" / commit, dirs_exist_ok=True)
        ref = self.folder(repo_id) / "refs" / (revision or "main")
        ref.parent.mkdir(exist_ok=True)
        ref.write_text(commit)
        return SimpleNamespace(oid=commit)

    def snapshot_download(self, repository: str, revision: str | None = None, allow_patterns=None) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        self.downloads += 1
        ref = self.folder(repository) / "refs" / (revision or "main")
        commit = ref.read_text() if ref.is_file() else revision
        found = self.folder(repository) / "snapshots" / str(commit)
        if not self.reachable or not found.is_dir():
            raise LocalEntryNotFoundError(f"no {repository} at {revision}\nand more of it")
        return str(found)
