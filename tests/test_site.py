"""The site: every page of docs/ is in it, and every link holds in the repository and in the site."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from tests.support.documents import FENCE
from tests.support.runs import ROOT
from tools import site_pages

LINKS = re.compile(r"\]\(\s*([^()\s#]*)(?:#([^()\s]+))?\)")
DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
OUTSIDE = [ROOT / file for file in sorted(site_pages.outside_files(ROOT)) if file.endswith(".md")]


def anchors_of(path: Path) -> set[str]:
    """The anchors of a document's headings, for each heading the first."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {site_pages.slug(heading) for heading in headings}


def broken_links(path: Path) -> list[str]:
    """The relative links of a document that lead nowhere in the repository."""
    broken = []
    for link, anchor in LINKS.findall(FENCE.sub("", path.read_text())):
        if ":" in link:
            continue
        target = path.parent / link if link else path
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(f"{path.name}: {link}#{anchor}")
    return broken


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCUMENTS, *OUTSIDE], ids=lambda path: path.name)
def test_every_link_of_a_document_leads_to_a_file_and_a_heading(path):
    assert not broken_links(path)


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "a.md").write_text(
        "# A `b`, c\n[x](#a-b-c) [x](b.md) [x](#a-b)\n```\n[x](y.md)\n```\n[x](https://z)"
    )
    assert broken_links(tmp_path / "a.md") == ["a.md: b.md#", "a.md: #a-b"]


def test_the_navigation_names_every_page_once():
    named = site_pages.pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    outside = [site_pages.place_of(path.relative_to(ROOT).as_posix()) for path in OUTSIDE]
    reference = [page for page in named if page.startswith("api/")]
    assert sorted(named) == sorted([*(path.name for path in DOCUMENTS), *outside, *reference])
    assert all((ROOT / Path(page).stem / "__init__.py").is_file() for page in reference)


def test_links_to_files_beside_the_documents_lead_into_the_site():
    text = "[a](../experiments/LOG.md#x) [b](training.md#y) [c](https://z/w.md) [d](../LICENSE)"
    assert site_pages.with_links_of_the_site("docs/README.md", text) == (
        "[a](project/experiments/LOG.md#x) [b](training.md#y) [c](https://z/w.md) [d](project/LICENSE)"
    )
    back = site_pages.with_links_of_the_site("experiments/LOG.md", "[a](README.md) [b](../docs/training.md)")
    assert back == "[a](README.md) [b](../../training.md)"


class Page(HTMLParser):
    """What a page of the site holds: its anchors and what it links to."""

    def __init__(self, file: Path):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors.add(given.get("id") or "")
        self.links += [given[key] or "" for key in ("href", "src") if key in given]


@pytest.mark.slow
def test_a_strict_build_passes_and_every_link_of_the_site_holds(tmp_path):
    pytest.importorskip("mkdocs", reason="the site needs pip install -r requirements-docs.txt")
    pytest.importorskip("mkdocstrings", reason="the site needs pip install -r requirements-docs.txt")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {file: Page(file) for file in (tmp_path / "site").rglob("*.html") if file.name != "404.html"}
    assert len(pages) > len(DOCUMENTS) + len(OUTSIDE)
    broken = []
    for file, page in pages.items():
        for link in page.links:
            name, _, anchor = link.partition("#")
            target = (file.parent / name).resolve() if name else file
            if ":" not in link and (not target.exists() or (anchor and anchor not in pages[target].anchors)):
                broken.append(f"{file.name}: {link}")
    assert not broken
    assert "tools.sweep" in (tmp_path / "site" / "api" / "tools.html").read_text()


@pytest.mark.slow
def test_a_strict_build_fails_on_a_link_that_leads_nowhere(tmp_path):
    pytest.importorskip("mkdocs", reason="the site needs pip install -r requirements-docs.txt")
    pytest.importorskip("mkdocstrings", reason="the site needs pip install -r requirements-docs.txt")
    for name in ("docs", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    settings |= {"plugins": [], "nav": [path.name for path in DOCUMENTS]}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings))
    words = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "experiments/LOG.md" in done.stderr
