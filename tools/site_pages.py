"""What the site holds beside docs/: a hook of MkDocs (`make site`, mkdocs.yml). It runs without PyTorch.

A file outside docs/ that a page links to becomes `project/PATH`, a page itself where it is Markdown, and the
links lead there. `api/PACKAGE.md` names a package's modules, whose docstrings mkdocstrings reads.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

DOCS, OUTSIDE, API = "docs", "project", "api"
LINK = re.compile(r"(?<=\]\()([^()\s#:]+)((?:#[^()\s]*)?)(?=\))")  # to a file: an address has a colon


def slug(heading: str, separator: str = "-") -> str:
    """The anchor that GitHub gives a heading, so that a link to it holds in both places."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def linked_files(file: str, text: str) -> list[str]:
    """The files that a Markdown file links to. All are named as seen from the project's folder."""
    return [_target(file, found[1]) for found in LINK.finditer(text)]


def place_of(file: str) -> str:
    """Where the site has a file of the project."""
    return file[len(DOCS) + 1 :] if file.startswith(f"{DOCS}/") else f"{OUTSIDE}/{file}"


def with_links_of_the_site(file: str, text: str) -> str:
    """The text of a Markdown file with links that hold in the site."""
    here = posixpath.dirname(place_of(file))

    def moved(link: re.Match) -> str:
        return posixpath.relpath(place_of(_target(file, link[1])), here or ".") + link[2]

    return LINK.sub(moved, text)


def outside_files(root: Path) -> set[str]:
    """The files outside docs/ that its pages link to, directly or through each other."""
    waiting = [f"{DOCS}/{path.relative_to(root / DOCS).as_posix()}" for path in (root / DOCS).rglob("*.md")]
    seen = set(waiting)
    while waiting:
        file = waiting.pop()
        if not file.endswith(".md"):
            continue
        for target in linked_files(file, (root / file).read_text(encoding="utf-8")):
            if target not in seen and (root / target).is_file():
                seen.add(target)
                waiting.append(target)
    return {file for file in seen if not file.startswith(f"{DOCS}/")}


def reference(root: Path, package: str) -> str:
    """The page that has mkdocstrings read every module of a package."""
    files = sorted((root / package).rglob("*.py"))
    names = [".".join(file.relative_to(root).with_suffix("").parts) for file in files]
    modules = [name.removesuffix(".__init__") for name in names]
    return "\n\n".join([f"# {package}", *(f"::: {name}" for name in modules)]) + "\n"


def pages_of(navigation: Any) -> list[str]:
    """The files that a navigation of mkdocs.yml names, in its order."""
    if isinstance(navigation, str):
        return [navigation]
    inner = navigation.values() if isinstance(navigation, dict) else navigation
    return [page for entry in inner for page in pages_of(entry)]


def _target(file: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(file), link))


def on_config(config: Any) -> Any:
    """MkDocs asks for the settings."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def on_files(files: Any, config: Any) -> Any:
    """MkDocs asks for the files of the site."""
    from mkdocs.structure.files import File

    root = Path(config.config_file_path).parent
    for file in sorted(outside_files(root)):
        files.append(File.generated(config, place_of(file), abs_src_path=str(root / file)))
    for page in pages_of(config.nav):
        if page.startswith(f"{API}/"):
            files.append(File.generated(config, page, content=reference(root, Path(page).stem)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """MkDocs asks for the text of a page."""
    place = page.file.src_uri
    if place.startswith(f"{API}/"):
        return markdown
    beside = place.startswith(f"{OUTSIDE}/")
    return with_links_of_the_site(place[len(OUTSIDE) + 1 :] if beside else f"{DOCS}/{place}", markdown)
