"""Fetch the text of the experiments: speeches and the documentation of some Debian packages, about 45 MB in English.

    python tools/experiments/fetch_text.py OUTPUT

Writes OUTPUT/SOURCE/train/*.txt and OUTPUT/SOURCE/validation/*.txt (every 20th document); of the source ``git``, which
is never trained on, all documents are for validation. A source that is there already is not fetched again. Downloads
are pip's and apt-get's, so their settings for proxies and mirrors apply; needs a Debian or Ubuntu with
``apt-get update`` done, and lxml.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lxml.html

VALIDATION_EVERY = 20
MINIMUM_CHARACTERS = 200
FETCH_CORPUS = Path(__file__).resolve().parents[1] / "fetch_corpus.py"


@dataclass(frozen=True)
class Package:
    """A Debian package of documentation: its documents below usr/share/doc, its licence in a few words."""

    name: str
    pattern: str
    licence: str
    is_trained_on: bool = True


PACKAGES = {
    "anarchism": Package("anarchism", "**/*.html", "An Anarchist FAQ, GPL-2"),
    "postgresql": Package("postgresql-doc-15", "**/*.html", "PostgreSQL's manual, PostgreSQL licence"),
    "python": Package("python3.11-doc", "**/_sources/**/*.rst.txt", "Python's manual, PSF licence"),
    "git": Package("git-doc", "**/*.txt", "Git's manual, GPL-2", is_trained_on=False),
}


def text_of(document: Path) -> str:
    """The words of a page, HTML without its head, scripts and styles; as it stands where it is no HTML."""
    if document.suffix != ".html":
        return document.read_text(encoding="utf-8", errors="replace")
    page = lxml.html.fromstring(document.read_bytes())
    for part in page.xpath("//head | //script | //style | //nav"):
        part.drop_tree()
    return re.sub(r"[ \t]*\n\s*\n\s*", "\n\n", page.text_content()).strip()


def documents_of(package: Package, folder: Path) -> Iterator[str]:
    """Texts of an unpacked package, in the order of their paths: no short ones, none twice."""
    seen = set()
    for path in sorted((folder / "usr/share/doc").glob(package.pattern)):
        text = text_of(path) if path.is_file() and not path.is_symlink() else ""
        if len(text) >= MINIMUM_CHARACTERS and text not in seen:
            seen.add(text)
            yield text


def unpack(package: Package, folder: Path) -> None:
    """Download ``package`` and unpack it into ``folder``; ends the program with apt's reason where that fails."""
    command = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", package.name]
    if shutil.which(command[0]) is None:
        sys.exit("the text comes from Debian packages and needs apt-get and dpkg; run this on a Debian or an Ubuntu")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.deb"))
    if done.returncode or not archives:
        reason = [line for line in done.stderr.splitlines() if line.startswith("E:")] or ["apt-get failed"]
        sys.exit(
            f"could not download {package.name}: {reason[-1]}\n"
            "This needs a Debian mirror that apt-get is set up for, with its lists (apt-get update). Offline: run the\n"
            "command on another machine, and bring the output folder here"
        )
    subprocess.run(["dpkg", "-x", str(archives[0]), str(folder)], check=True)


def write(texts: Iterator[str], output: Path, is_trained_on: bool) -> None:
    """One file a document beside ``output``, then renamed to it, so that a source that is there is whole."""
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    for part in ("train", "validation"):
        (partial / part).mkdir(parents=True)
    for number, text in enumerate(texts, start=1):
        part = "train" if is_trained_on and number % VALIDATION_EVERY else "validation"
        (partial / part / f"{number:04}.txt").write_text(text, encoding="utf-8")
    partial.rename(output)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for a folder of each source")
    output = parser.parse_args(arguments).output
    output.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, str(FETCH_CORPUS), str(output / "speeches")], check=True)
    for name, package in PACKAGES.items():
        print(f"{name}: Debian {package.name} ({package.licence})")
        if (output / name).is_dir():
            print(f"{output / name} is there already")
            continue
        with tempfile.TemporaryDirectory() as temporary:
            unpack(package, Path(temporary))
            write(documents_of(package, Path(temporary)), output / name, package.is_trained_on)


if __name__ == "__main__":
    main()
