"""Makes pages of README.md, CONTRIBUTING.md and their like, which lie outside of docs/.

Documents link to each other and to sources by their paths in the repository, so that the links work
in a checkout and in a web view of it. For the site, every link that leaves docs/ is turned into one
to the page, or to a copy of the file: a link that leads nowhere still ends `mkdocs build --strict`.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {  # path in the repository -> path below docs/, as if it lay there
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
}
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?\)")


def repository_path(source: str) -> str:
    """Path in the repository of a page of the site."""
    return next((path for path, page in PAGES.items() if page == source), f"docs/{source}")


def site_path(path: str) -> str:
    """Path below docs/ of a file of the repository."""
    return PAGES.get(path) or (path[len("docs/") :] if path.startswith("docs/") else path)


def target_of(source: str, link: str) -> str | None:
    """File of the repository that a link of this page names; None for the web and for none."""
    if re.match(r"[a-z]+:", link):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(repository_path(source)), link))
    return path if (ROOT / path).is_file() else None


def on_files(files: Files, config: Any) -> Files:
    for path, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    for page in files.documentation_pages():
        for _, link, _ in LINK.findall(page.content_string):
            target = target_of(page.src_uri, link)
            if target and files.get_file_from_path(site_path(target)) is None:
                copy = File.generated(config, site_path(target), abs_src_path=str(ROOT / target))
                files.append(copy)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = page.file.src_uri

    def rewritten(found: re.Match[str]) -> str:
        target = target_of(source, found[2])
        if target is None:
            return found[0]
        link = posixpath.relpath(site_path(target), posixpath.dirname(source) or ".")
        return f"{found[1]}{link}{found[3] or ''})"

    return LINK.sub(rewritten, markdown)
