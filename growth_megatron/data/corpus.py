"""Text files as a sequence of documents.

Owns: which files are read, in which order, how they are decompressed and decoded.
Does not own: tokens (``encode``), files on the output side (``prepare``).

A ``.txt`` file is one document, a line of a ``.jsonl`` file is one, each may be compressed (``.gz``, ``.zst``); so is a
row of a ``.parquet`` or ``.arrow`` file (``records``).
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from growth_megatron.data.records import ALL_RECORDS, Fields, table_batches
from growth_megatron.errors import DataError

COMPRESSED = (".gz", ".zst")
TABLES = (".parquet", ".arrow")
ALLOWED = "allowed: .txt and .jsonl, each also as .gz or .zst, .parquet, .arrow"
_LOOKED_AT = 20
"""Of records in a file, and of files, to see which fields there are."""
Kind = Literal["txt", "jsonl", "table"]


@dataclass(frozen=True)
class Source:
    """One input file."""

    path: Path
    kind: Kind
    size_bytes: int  # on disk
    name: str  # path below the input it was found in


def _kind(path: Path) -> Kind | None:
    name = path.name
    if name.endswith(TABLES):
        return "table"
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    if name.endswith(".txt"):
        return "txt"
    return "jsonl" if name.endswith(".jsonl") else None


def list_sources(inputs: Sequence[str | Path]) -> list[Source]:
    """The text files of ``inputs``: files as given, directories recursively in the order of their paths.

    Raises: DataError where an input does not exist, is of another kind, or nothing is found.
    """
    if not inputs:
        raise DataError("no input: give at least one text file or directory")
    found: list[Source] = []
    for entry in map(Path, inputs):
        if entry.is_dir():
            paths = sorted(path for path in entry.rglob("*") if path.is_file() and _kind(path))
            if not paths:
                raise DataError(f"no text files under {entry}; {ALLOWED}")
        elif entry.is_file():
            if _kind(entry) is None:
                raise DataError(f"{entry} is not a kind of text file that can be read; {ALLOWED}")
            paths = [entry]
        else:
            raise DataError(f"input {entry} does not exist")
        for path in paths:
            kind = _kind(path)
            assert kind is not None
            name = path.relative_to(entry).as_posix() if path != entry else path.name
            found.append(Source(path, kind, path.stat().st_size, name))
    return found


class _ZstdReader(io.RawIOBase):
    """A zstandard file of any number of frames; raises on a truncated one, which zstandard's own reader does not."""

    def __init__(self, raw: IO[bytes]) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"{raw.name} needs the package zstandard: pip install zstandard") from error
        self._raw, self._zstandard = raw, zstandard
        self._frame: Any = None
        self._left = b""

    def readable(self) -> bool:
        return True

    def _more(self) -> bytes:
        """The next decompressed bytes; none at the end of the file."""
        while True:
            if self._frame is None or self._frame.eof:
                compressed = (self._frame.unused_data if self._frame else b"") or self._raw.read(1 << 18)
                if not compressed:
                    return b""
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            elif not (compressed := self._raw.read(1 << 18)):
                raise EOFError("the file ends before its last frame does")
            try:
                if data := self._frame.decompress(compressed):
                    return bytes(data)
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from error

    def readinto(self, buffer: Any) -> int:
        data = self._left or self._more()
        size = min(len(buffer), len(data))
        buffer[:size], self._left = data[:size], data[size:]
        return size


def decompressed(raw: IO[bytes], path: Path) -> IO[bytes]:
    """``raw``, an open file, seen through the compression that the suffix of ``path`` names."""
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw, mode="rb"))
    if path.suffix == ".zst":
        return cast(IO[bytes], io.BufferedReader(_ZstdReader(raw)))
    return raw


@contextmanager
def reading(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The decompressed bytes of ``path``, and the raw file, whose position tells how far reading has come.

    Raises: DataError where the file cannot be opened or decompressed.
    """
    try:
        with open(path, "rb") as raw:
            yield decompressed(raw, path), raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}); fetch or compress it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from error


def decode(raw: bytes, path: Path, offset: int = 0) -> str:
    """UTF-8 text of ``raw``, which starts at byte ``offset`` of ``path``; a byte order mark is dropped."""
    try:
        return raw.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start}; "
            "convert it (iconv -f ENCODING -t UTF-8) or leave it out"
        ) from error


def read_text(path: Path) -> str:
    """The whole file as text.  Raises: DataError where it is damaged or not UTF-8."""
    with reading(path) as (stream, _):
        return decode(stream.read(), path)


def parse_record(line: bytes, path: Path, offset: int, fields: Fields = ALL_RECORDS) -> str | None:
    """Text of one line of a ``.jsonl`` file that starts at byte ``offset`` of the decompressed file; None: left out."""
    where = f"{path}, record at byte {offset}"
    try:
        record = json.loads(decode(line, path, offset))
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}); a .jsonl file has one object a line") from error
    except RecursionError:
        raise DataError(f"{where}: is nested too deeply; leave it out") from None
    return fields.document(record, where)


def table_texts(path: Path, fields: Fields) -> Iterator[list[str | None]]:
    """The rows of a ``.parquet`` or ``.arrow`` file, some at a time; None for one that is left out."""
    for rows, before in table_batches(path, fields):
        yield [fields.document(row, f"{path}, row {before + number}") for number, row in enumerate(rows)]


def unknown_fields(sources: Sequence[Source], fields: Fields) -> list[str]:
    """A sentence for each condition on a field that the first records do not have.

    Raises: DataError where there are conditions and no records.
    """
    if not fields.where:
        return []
    records = [source for source in sources if source.kind != "txt"]
    if not records:
        raise DataError(f"--where {fields.where[0]}: text files have no fields; leave it out, or give .jsonl or tables")
    first = [record for source in records[:_LOOKED_AT] for record in _first_records(source, fields)]
    return [
        f"--where {condition}: none of the first {len(first):,} records has {condition.field}"
        for condition in fields.where
        if all(condition.value_in(record) is None for record in first)
    ]


def _first_records(source: Source, fields: Fields) -> list[Any]:
    if source.kind == "table":
        return next((rows[:_LOOKED_AT] for rows, _ in table_batches(source.path, fields)), [])
    with reading(source.path) as (stream, _):
        lines = list(itertools.islice((line for line in stream if line.strip()), _LOOKED_AT))
    try:
        return [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        return []  # reading it as text says where


def read_documents(source: Source, fields: Fields = ALL_RECORDS) -> Iterator[str]:
    """The documents of one file, in order."""
    if source.kind == "txt":
        yield read_text(source.path)
        return
    if source.kind == "table":
        for texts in table_texts(source.path, fields):
            yield from (text for text in texts if text is not None)
        return
    offset = 0
    with reading(source.path) as (stream, _):
        for line in stream:
            if line.strip() and (text := parse_record(line, source.path, offset, fields)) is not None:
                yield text
            offset += len(line)
