"""Hooks of mkdocs.yml: files of the repository outside docs/ that a page links to become files of the site.

A link such as `../benchmarks/results/scaling.json` works in the repository. On the site the file is in `repository/`.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "repository"
LINK = re.compile(r"\]\((\.\./[^)#\s]+)((?:#[^)\s]*)?)\)")


def outside(page: str, link: str) -> str | None:
    """Returns the path in the repository that a page links to, or None if the path is in docs/.

    Args:
      page: the page's path in docs/.
      link: the relative link.
    """
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith("docs/") else path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files that pages link to; one that does not exist is left for the check of links."""
    pages = [file for file in files if file.is_documentation_page()]
    linked = {outside(page.src_uri, link) for page in pages for link, _ in LINK.findall(page.content_string)}
    for path in sorted(path for path in linked if path is not None and (ROOT / path).is_file()):
        # Markdown files of the repository are shown as they are: their own links are relative to their folders.
        name = f"{FOLDER}/{path}" + (".txt" if path.endswith(".md") else "")
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Returns the page with links to these files."""

    def inside(match: re.Match[str]) -> str:
        link, anchor = match.groups()
        path = outside(page.file.src_uri, link)
        if path is None:
            return match[0]
        name = f"{FOLDER}/{path}" + (".txt" if path.endswith(".md") else "")
        return f"]({posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return LINK.sub(inside, markdown)
