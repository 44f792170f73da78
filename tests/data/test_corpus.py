"""Which files are read, how they are decompressed and decoded."""

from __future__ import annotations

import builtins
import gzip
import json
from pathlib import Path

import pytest
import zstandard

from growth_megatron.data.corpus import list_sources, read_documents
from growth_megatron.errors import DataError


def documents(*inputs: Path) -> list[str]:
    return [text for source in list_sources(inputs) for text in read_documents(source)]


def record(text: str) -> bytes:
    return json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"


def test_all_kinds_in_the_order_of_their_paths(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("drei äöü".encode()))
    (tmp_path / "c.jsonl").write_bytes(record("four") + b"\n" + record("fi\u2028ve"))
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(record("six")) + zstandard.compress(record("seven")))
    (tmp_path / "sub" / "e.jsonl.gz").write_bytes(gzip.compress(record("eight")))
    (tmp_path / "sub" / "f.txt.zst").write_bytes(zstandard.compress(b"nine"))
    (tmp_path / "ignored.md").write_text("no")
    expected = ["one\ntwo", "drei äöü", "four", "fi\u2028ve", "six", "seven", "eight", "nine"]
    assert documents(tmp_path) == expected
    assert documents(tmp_path / "sub" / "f.txt.zst", tmp_path / "a.txt") == ["nine", "one\ntwo"]


def test_byte_order_mark_is_dropped_and_half_characters_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "b.jsonl").write_text('{"text": "x\\ud83d\\ude00 \\ud800 y"}\n')
    assert documents(tmp_path) == ["text", "x\U0001f600 \ufffd y"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good \xff bad", "a.txt is not UTF-8: byte 0xff at offset 5"),
        ("a.jsonl", record("x") + b'{"text": "\xe4"}\n', "a.jsonl is not UTF-8: byte 0xe4 at offset 24"),
        ("a.jsonl", record("x") + b"{text}\n", "record at byte 14: not JSON"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', 'no text under "text".*body, id.*--text-field'),
        ("a.jsonl", b'["x"]\n', "not an object"),
        ("a.txt.gz", gzip.compress(b"hello" * 100, mtime=0)[:-9], "a.txt.gz is damaged"),
        ("a.txt.gz", b"not gzip", "a.txt.gz is damaged"),
        ("a.jsonl.zst", zstandard.compress(record("y" * 1000))[:-3], "a.jsonl.zst is damaged"),
        ("a.jsonl.zst", b"not zstandard", "a.jsonl.zst is damaged"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        documents(tmp_path)


def test_missing_unknown_and_no_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no input"):
        list_sources([])
    with pytest.raises(DataError, match="nope does not exist"):
        list_sources([tmp_path / "nope"])
    with pytest.raises(DataError, match=r"no text files under .*allowed: \.txt"):
        list_sources([tmp_path])
    (tmp_path / "a.pdf").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.pdf is not a kind .*allowed: \.txt"):
        list_sources([tmp_path / "a.pdf"])


def test_without_zstandard_the_error_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"x"))
    real = builtins.__import__

    def without(name: str, *arguments, **keywords):
        if name == "zstandard":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match="pip install zstandard"):
        documents(tmp_path)
