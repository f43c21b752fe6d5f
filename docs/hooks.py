"""What the site takes from beside docs/: README and its like as pages, and the files that a page links to.

So each text has one home, and its links are right where it lies: in the checkout, and on a forge that shows Markdown.
mkdocs calls the functions `on_…` (see mkdocs.yml).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT: Final = Path(__file__).resolve().parent.parent
DOCS: Final = ROOT / "docs"

BESIDE: Final = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages that lie at the top of the checkout, and their names in the site."""

_LINK: Final = re.compile(
    r"^(?P<fence>```+).*?^(?P=fence)|`[^`\n]+`|\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)",
    re.MULTILINE | re.DOTALL,
)
"""A link; or code, in which there are none."""

_LANGUAGES: Final = {".yaml": "yaml", ".yml": "yaml", ".json": "json", ".properties": "ini"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Headings get the anchors that forges give them, which the pages' links use."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from beside docs/, and a page for each file there that some page links to."""
    for name, uri in BESIDE.items():
        files.append(File.generated(config, uri, content=(ROOT / name).read_text("utf-8")))
    waiting = [path for file in files.documentation_pages() for path in _linked(file.content_string, _folder(file))]
    done = set()
    while waiting:
        path = waiting.pop()
        if (uri := _uri(path)) in done or not path.exists() or path.is_relative_to(DOCS) or _is_beside(path):
            continue
        done.add(uri)
        files.append(File.generated(config, uri, content=_shown(path, uri)))
        waiting += _members(path) if path.is_dir() else []
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Turn each link into one that is right in the site; one that leads nowhere stays, and mkdocs names it."""
    if page.file.src_uri.startswith("files/"):
        return markdown

    def turned(path: Path, written: str) -> str:
        if not path.exists() and not path.is_relative_to(DOCS):
            return written
        return _relative(_uri(path), page.file.src_uri)

    return _links(markdown, _folder(page.file), turned)


def _links(text: str, folder: Path, turned: Callable[[Path, str], str]) -> str:
    """The text with the target of each link within the checkout replaced."""

    def replaced(match: re.Match[str]) -> str:
        target = match["target"]
        if target is None or "://" in target:
            return match[0]
        return f"]({turned((folder / target).resolve(), target)}{match['anchor'] or ''})"

    return _LINK.sub(replaced, text)


def _linked(text: str, folder: Path) -> Iterator[Path]:
    for match in _LINK.finditer(text):
        if (target := match["target"]) and "://" not in target:
            yield (folder / target).resolve()


def _folder(file: File) -> Path:
    """Where a page lies in the checkout."""
    return ROOT if file.src_uri in BESIDE.values() else DOCS


def _is_beside(path: Path) -> bool:
    return path.parent == ROOT and path.name in BESIDE


def _uri(path: Path) -> str:
    """A page's or a file's name in the site. Names that begin with a dot would be left out of it."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    if _is_beside(path):
        return BESIDE[path.name]
    parts = path.relative_to(ROOT).parts if path.is_relative_to(ROOT) else path.parts
    return "/".join(["files", *(part.lstrip(".") for part in parts)]) + ".md"


def _relative(uri: str, page: str) -> str:
    return posixpath.relpath(uri, posixpath.dirname(page) or ".")


def _members(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__")))


def _shown(path: Path, uri: str) -> str:
    """A file's text, or a folder's contents, as a page that the search leaves out."""
    head = f"---\nsearch:\n  exclude: true\nhide: [navigation, toc]\n---\n\n# {path.relative_to(ROOT).as_posix()}\n\n"
    if path.is_dir():
        return head + "".join(f"- [{member.name}]({_relative(_uri(member), uri)})\n" for member in _members(path))
    return f"{head}~~~~~~{_LANGUAGES.get(path.suffix, 'text')}\n{path.read_text('utf-8')}\n~~~~~~\n"
