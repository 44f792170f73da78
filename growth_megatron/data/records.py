"""Records with fields, from lines of JSON or rows of Parquet and Arrow files, and which of them are documents.

Owns: the field that holds the text, conditions on other fields, reading tables.
Does not own: files and their compression (``corpus``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growth_megatron.config.words import listed
from growth_megatron.errors import DataError

ROWS = 1024  # read of a table at a time


@dataclass(frozen=True)
class Condition:
    """``FIELD=VALUE`` or ``FIELD!=VALUE``; fields of fields are written with dots."""

    field: str
    value: str
    equal: bool

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Raises: DataError for another form."""
        field, found, value = text.partition("=")
        if not found or not field.rstrip("!"):
            raise DataError(f"--where {text!r} is no condition; write FIELD=VALUE or FIELD!=VALUE, as in lang=en")
        return cls(field.removesuffix("!"), value, not field.endswith("!"))

    def __str__(self) -> str:
        return f"{self.field}{'' if self.equal else '!'}={self.value}"

    def value_in(self, record: Any) -> Any:
        """The field's; None where it is not there."""
        for name in self.field.split("."):
            record = record.get(name) if isinstance(record, Mapping) else None
        return record

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Whether it does; a field that is not there has no value. Values that are no text are compared as JSON."""
        value = self.value_in(record)
        return ((value if isinstance(value, str) else json.dumps(value)) == self.value) == self.equal


@dataclass(frozen=True)
class Fields:
    """What of a record is read."""

    text: str = "text"
    where: tuple[Condition, ...] = ()
    """All must hold, or the record is left out."""

    @classmethod
    def parse(cls, text: str, where: Sequence[str]) -> Fields:
        """As the command line has them.  Raises: DataError for a condition of another form."""
        return cls(text, tuple(map(Condition.parse, where)))

    def document(self, record: Any, where: str) -> str | None:
        """The text of ``record``, which is at ``where``; None where it is left out.  Raises: DataError without text."""
        if isinstance(record, Mapping) and not all(condition.holds(record) for condition in self.where):
            return None
        text = record.get(self.text, 0) if isinstance(record, Mapping) else None
        if text is None and isinstance(record, Mapping):
            return ""
        if not isinstance(text, str):
            has = f"its fields: {', '.join(sorted(record))}" if isinstance(record, Mapping) else "it is not an object"
            raise DataError(f'{where}: no text under "{self.text}" ({has}); name the field with --text-field')
        return text if text.isascii() else _without_lone_surrogates(text)


ALL_RECORDS = Fields()


def _without_lone_surrogates(text: str) -> str:
    r"""JSON can spell half a character (``\ud800``), which has no UTF-8; it becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def table_batches(path: Path, fields: Fields) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Rows of a ``.parquet`` or ``.arrow`` file with the columns that are wanted, and how many rows came before.

    Raises: DataError where it is damaged, has no such column, or the package pyarrow is missing.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path} needs the package pyarrow: pip install pyarrow") from error
    wanted = list(dict.fromkeys([fields.text, *(condition.field.split(".")[0] for condition in fields.where)]))
    try:
        with open(path, "rb") as stream:
            if path.suffix == ".parquet":
                table = parquet.ParquetFile(stream)
                _check_columns(path, fields, table.schema_arrow.names)
                columns = [name for name in wanted if name in table.schema_arrow.names]
                batches: Any = table.iter_batches(ROWS, columns=columns)
            else:
                reader = _arrow_reader(pyarrow, stream)
                _check_columns(path, fields, reader.schema.names)
                columns = [name for name in wanted if name in reader.schema.names]
                batches = (batch.select(columns) for batch in reader)
            before = 0
            for batch in batches:
                yield batch.to_pylist(), before
                before += batch.num_rows
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); fetch it again") from error
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is damaged ({error}); fetch it again") from error


def _arrow_reader(pyarrow: Any, stream: Any) -> Any:
    """Arrow knows a form for streams, which ``datasets`` writes, and one for files."""
    if stream.read(6) == b"ARROW1":
        file = pyarrow.ipc.open_file(stream)
        return pyarrow.RecordBatchReader.from_batches(
            file.schema, (file.get_batch(number) for number in range(file.num_record_batches))
        )
    stream.seek(0)
    return pyarrow.ipc.open_stream(stream)


def _check_columns(path: Path, fields: Fields, columns: list[str]) -> None:
    if fields.text not in columns:
        names = listed(columns, 20, ", ")
        raise DataError(f'{path}: no column "{fields.text}" (its columns: {names}); name it with --text-field')
