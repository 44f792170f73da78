"""Fields of records: conditions, tables of Parquet and Arrow files."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from growth_megatron.data.corpus import list_sources, read_documents
from growth_megatron.data.encode import make_tasks
from growth_megatron.data.prepare import Prepared, prepare_data
from growth_megatron.data.records import Condition, Fields
from growth_megatron.data.tokenizer import Tokenizer
from growth_megatron.errors import DataError
from tests.data.conftest import make_documents

ROWS: list[dict[str, Any]] = [
    {"text": "one", "meta": {"set": "web", "score": 1}},
    {"text": "two", "meta": {"set": "code", "score": 2}},
    {"text": None, "meta": {"set": "web", "score": 3}},
    {"text": "fo\u00fcr", "meta": None},
]


def _write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=3)
    else:  # the form for files of one name, that for streams of the other
        new = pyarrow.ipc.new_file if path.stem == "file" else pyarrow.ipc.new_stream
        with open(path, "wb") as stream, new(stream, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return path


NAMES = ["a.jsonl", "a.parquet", "file.arrow", "stream.arrow"]


@pytest.mark.parametrize("name", NAMES)
def test_all_kinds_hold_the_same_documents(tmp_path: Path, name: str) -> None:
    (source,) = list_sources([_write(tmp_path / name)])
    assert list(read_documents(source)) == ["one", "two", "", "fo\u00fcr"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("meta.set!=code", ["one", "", "fo\u00fcr"]),  # what has no such field has no such value
        ("meta.set=web", ["one", ""]),
        ("meta.score=2", ["two"]),
        ("meta.nothing=web", []),
    ],
)
def test_records_that_meet_the_condition_are_read(tmp_path: Path, name: str, where: str, expected: list[str]) -> None:
    (source,) = list_sources([_write(tmp_path / name)])
    assert list(read_documents(source, Fields.parse("text", [where]))) == expected
    assert list(read_documents(source, Fields.parse("text", [where, "meta.set=else"]))) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_condition_on_a_field_that_no_record_has_is_told_and_what_conditions_leave_out_is_counted(
    tmp_path: Path, name: str, tokenizer: Tokenizer
) -> None:
    source, told = _write(tmp_path / name), io.StringIO()

    def prepare(where: str) -> Prepared:
        output = tmp_path / f"out_{len(list(tmp_path.iterdir()))}"
        return prepare_data(
            [source], tokenizer.path, output, 1, fields=Fields.parse("text", [where]), progress_stream=told
        )

    assert prepare("meta.set!=code").other_records == 1
    assert "none of the first" not in told.getvalue()
    assert prepare("meta.sett!=code").other_records == 0
    assert re.search(r"--where meta.sett!=code: none of the first \d records has meta.sett\n", told.getvalue())
    with pytest.raises(DataError, match=r"--where meta.set=Code leaves out \d+ records"):
        prepare("meta.set=Code")


def test_a_condition_on_text_files_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(DataError, match="text files have no fields"):
        prepare_data([tmp_path / "a.txt"], tokenizer.path, tmp_path / "out", fields=Fields.parse("text", ["a!=b"]))


@pytest.mark.parametrize("text", ["meta.set", "=web", "!=web"])
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="write FIELD=VALUE or FIELD!=VALUE"):
        Condition.parse(text)


def test_tables_are_prepared_to_the_same_bytes_as_lines_at_any_number_of_workers(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = [{"text": text, "n": number % 2} for number, text in enumerate(make_documents(60, 5, words=30_000))]
    fields = Fields.parse("text", ["n=1"])
    for name, workers in (("a.jsonl", 1), ("a.parquet", 1), ("a.parquet", 2)):
        source = _write(tmp_path / name, rows)
        output = tmp_path / f"{source.suffix[1:]}_{workers}"
        prepare_data([source], tokenizer.path, output, workers, fields=fields, progress_stream=io.StringIO())
    assert len(list(make_tasks(list_sources([tmp_path / "a.parquet"])))) > 1
    expected = (tmp_path / "jsonl_1.bin").read_bytes()
    assert expected
    assert (tmp_path / "parquet_1.bin").read_bytes() == (tmp_path / "parquet_2.bin").read_bytes() == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1 not at all PAR1", r"a\.parquet is damaged"),
        ("a.arrow", b"no table", r"a\.arrow (is damaged|cannot be read)"),
        ("a.arrow", b"ARROW1 no table", r"a\.arrow (is damaged|cannot be read)"),
    ],
)
def test_a_table_that_is_none_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    (source,) = list_sources([tmp_path / name])
    with pytest.raises(DataError, match=message):
        list(read_documents(source))


def test_a_column_that_is_missing_is_named_beside_those_there_are(tmp_path: Path) -> None:
    (source,) = list_sources([_write(tmp_path / "a.parquet")])
    with pytest.raises(DataError, match=r'no column "body" \(its columns: text, meta\); name it with --text-field'):
        list(read_documents(source, Fields("body")))
