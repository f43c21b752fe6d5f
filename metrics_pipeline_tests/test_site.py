"""The site of the documents: it builds strictly, from the same texts, and asks nobody else for anything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from metrics_pipeline.settings import ROOT
from metrics_pipeline_tests.documents import PAGES, page, table

README = ROOT / "README.md"


class _Assets(HTMLParser):
    """What a page makes a browser fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in {"script", "img", "iframe", "source"} and given.get("src"):
            self.fetched.append(given["src"] or "")
        if tag == "link" and given.get("rel") in {"stylesheet", "icon", "preconnect", "preload"}:
            self.fetched.append(given["href"] or "")


def built(checkout: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` does, into another folder."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=checkout,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    ended = built(ROOT, folder)
    assert ended.returncode == 0, ended.stderr
    return folder


def test_the_site_has_every_page_and_the_readme_is_its_home(site: Path) -> None:
    names = {path.stem for path in PAGES} | {"index", "contributing", "security", "changelog"}
    assert {path.stem for path in site.glob("*.html")} == names | {"404"}
    home = (site / "index.html").read_text("utf-8")
    title = README.read_text("utf-8").splitlines()[0].lstrip("# ")
    assert re.search(rf"<h1[^>]*>{title}<", home)
    assert 'src="architecture.svg"' in home
    assert 'src="ui.png"' in home
    assert {"architecture.svg", "ui.png"} <= {path.name for path in site.iterdir()}
    assert not list(site.glob("hooks*"))


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        assets = _Assets(path.read_text("utf-8")).fetched
        assert assets
        assert not [name for name in assets if "//" in name], path
        assert "mermaid" not in path.read_text("utf-8"), "the theme fetches mermaid from elsewhere"


def test_a_file_beside_docs_is_shown_with_its_text(site: Path) -> None:
    assert "FROM " in (site / "files" / "Dockerfile.html").read_text("utf-8")
    assert "metric-key.json.html" in (site / "files" / "connect" / "schemas.html").read_text("utf-8")


def test_the_navigation_and_the_readme_ask_in_the_same_order() -> None:
    sections = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]
    entries = [entry for section in sections for entry in next(iter(section.values())) if isinstance(entry, dict)]
    pages = [name for entry in entries for name in entry.values()]
    asked = [re.findall(r"\(docs/([\w-]+\.md)\)", row[1])[0] for row in table(README, "## Where to go on")]
    assert asked == [name for name in pages if page(Path(name).stem).exists()]
    assert set(asked) == {path.name for path in PAGES}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout that may be broken."""
    copy = tmp_path_factory.mktemp("documents") / "checkout"
    skipped = [".git", ".venv", ".local", ".cache", "site", "__pycache__", ".*_cache", ".hypothesis", ".env", ".tmp_*"]
    return Path(shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*skipped, "metrics_pipeline_tests")))


@pytest.mark.parametrize(
    ("where", "link", "complaint"),
    [
        ("docs/verify.md", "nowhere.md", "'nowhere.md'"),
        ("docs/verify.md", "#nowhere", "'#nowhere'"),
        ("docs/verify.md", "settings.md#nowhere", "'#nowhere'"),
        ("docs/verify.md", "../Nowhere", "'../Nowhere'"),
        ("README.md", "docs/nowhere.md", "'nowhere.md'"),
        ("README.md", "CONTRIBUTING.md#nowhere", "'#nowhere'"),
    ],
)
def test_a_broken_link_fails_the_site(where: str, link: str, complaint: str, checkout: Path, tmp_path: Path) -> None:
    document = checkout / where
    text = document.read_text("utf-8")
    document.write_text(f"{text}\n[planted]({link})\n", "utf-8")
    try:
        ended = built(checkout, tmp_path)
    finally:
        document.write_text(text, "utf-8")
    assert ended.returncode == 1, ended.stderr
    assert complaint in ended.stderr
    assert ended.stderr.count("WARNING") == 1, "something else is wrong, too"
