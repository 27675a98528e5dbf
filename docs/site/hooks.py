"""What MkDocs builds beyond the files in `docs/`: reference pages from the code, formulas as MathML, no network.

The site has no script and no font from another host, so that it works from a disk. A new page is a file in `docs/`
and a line under `nav` in `mkdocs.yml`.
"""

from __future__ import annotations

import re
import sys
from html import unescape
from pathlib import Path

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import command_reference  # noqa: E402
import python_reference  # noqa: E402
import recipe_reference  # noqa: E402

GENERATED = {
    "reference/recipe.md": recipe_reference.markdown,
    "reference/commands.md": command_reference.markdown,
    "reference/python.md": python_reference.markdown,
}
FOREIGN = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
}
"""Pages that are files of the repository's root."""
MOVED = {
    **{f"({name}": f"({path}" for path, name in FOREIGN.items()},
    **{f"(../{name}": f"({path}" for path, name in FOREIGN.items()},
    "(docs/": "(",
}
"""How links in the repository begin, and how they do on the site."""
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\([\[(])(.*?)\\[\])]\s*</\1>', re.DOTALL)
FETCHED = re.compile(
    r'<(?:script|img|iframe|source)[^>]*\ssrc="(?:https?:)?//[^"]*"|<link[^>]*stylesheet[^>]*href="(?:https?:)?//'
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no files in `docs/`."""
    for path, markdown in GENERATED.items():
        files.append(File.generated(config, path, content=markdown()))
    for path, name in FOREIGN.items():
        files.append(File.generated(config, path, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    return moved(markdown)


def moved(markdown: str) -> str:
    """The text of a page whose links begin as in the repository, with those of the site."""
    for old, new in MOVED.items():
        markdown = markdown.replace(old, new)
    return markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn formulas into MathML, which browsers draw by themselves."""

    def convert(found: re.Match[str]) -> str:
        display = "block" if found[2] == "[" else "inline"
        return latex2mathml.converter.convert(unescape(found[3]).strip(), display=display)

    return FORMULA.sub(convert, html)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that would fetch something from another host."""
    if found := FETCHED.search(output):
        raise PluginError(f"{page.file.src_path}: fetches from another host: {found[0][:120]}")
    return output
