"""What mkdocs asks while it builds the site (mkdocs.yml): files of the checkout's root, README first, are pages too.

Owns: which files those are, and their links, which are written for a reader of the checkout. Does not own: the pages.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md"}
PAGES |= {name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "tools/experiments/README.md")}
OTHERS = ("CITATION.cff",)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what does not lie in docs/."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=_from_docs((ROOT / name).read_text(encoding="utf-8"))))
    for name in OTHERS:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links of a page in docs/ to a file of the root."""
    return markdown if "/" in page.file.src_uri else re.sub(r"\]\(\.\./", "](", markdown)


def _from_docs(markdown: str) -> str:
    """Links of a file of the root to a page in docs/."""
    return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)
