"""Parquet as a stream of rows, in bounded memory.

Columns stay what Arrow read; only those that make a row (text, second text, label) become Python's values, a batch at a
time. Read `read_parquet`, then `ArrowFields`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from geep.data.arrow_values import is_binary, python_values
from geep.data.rows import BadRow, Columns, Row, damaged, unique_names

_BATCH_ROWS = 1024

# Of long rows there are fewer in a batch, by what the row group says of its size.
_BATCH_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ArrowRows:
    """Rows of a Parquet file that were read together.

    Attributes:
        batch: The rows as Arrow read them.
        known: Columns, by name, that were made Python's values already.
        names: Names of all columns.
    """

    batch: pa.RecordBatch
    known: Mapping[str, list[object]]
    names: Mapping[str, None]


class ArrowFields(Mapping[str, object]):
    """The columns of one row of a Parquet file; a value becomes Python's when it is asked for.

    Attributes:
        part: The rows that were read together.
        index: Which of them this one is.
    """

    __slots__ = ("index", "part")

    def __init__(self, part: ArrowRows, index: int) -> None:
        self.part = part
        self.index = index

    def __getitem__(self, name: str) -> object:
        if name in self.part.known:
            return self.part.known[name][self.index]
        return python_values(self.part.batch.column(name).slice(self.index, 1))[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.part.names)

    def __len__(self) -> int:
        return len(self.part.names)


def carried(rows: Sequence[Row]) -> pa.Table | None:
    """The columns of rows of one Parquet file as Arrow read them, in the order of the rows.

    Returns:
        A table of as many rows; None where the rows are not of a Parquet file, or there are none.
    """
    runs: list[tuple[pa.RecordBatch, int, int]] = []
    for row in rows:
        fields = row.fields
        if not isinstance(fields, ArrowFields):
            return None
        batch, index = fields.part.batch, fields.index
        if runs and runs[-1][0] is batch and runs[-1][2] == index:
            runs[-1] = (batch, runs[-1][1], index + 1)
        else:
            runs.append((batch, index, index + 1))
    if not runs:
        return None
    # Arrow cuts slices of every type, which cannot be said of picking single rows.
    return pa.Table.from_batches([batch.slice(start, end - start) for batch, start, end in runs]).combine_chunks()


def columns_of(rows: Sequence[Row]) -> dict[str, list[object]] | None:
    """The same columns as Python's values (`python_values`), texts as strings; None where `carried` is None."""
    table = carried(rows)
    if table is None:
        return None
    fields = [cast(ArrowFields, row.fields) for row in rows]
    return {
        name: [item[name] for item in fields] if name in fields[0].part.known else python_values(table.column(name))
        for name in table.column_names
    }


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file.

    Raises:
        ValueError: If it is none, or names a column twice.
    """
    try:
        file = pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)
        unique_names(path, file.schema_arrow.names)  # names that are no UTF-8 raise when they are asked for
    except (pa.ArrowException, OSError, UnicodeDecodeError) as err:
        if isinstance(err, OSError) and err.errno is not None:  # the disk's word, not the format's
            raise
        raise ValueError(f"{path} is no readable Parquet file ({err}); write or fetch it again.") from err
    return file


def read_parquet(path: Path, columns: Columns) -> Iterator[Row | BadRow]:
    """Stream the rows of a Parquet file, good and bad, in the file's order; their fields are `ArrowFields`.

    Texts may be of any string type, also dictionary-encoded, or binary that holds UTF-8.
    """
    line = 0
    with open_parquet(path) as file:
        columns.check(path, file.schema_arrow.names)
        batches = _batches(file)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (pa.ArrowException, OSError) as err:
                raise damaged(path, line, err) from err
            yield from _rows_of(batch, line, columns)
            line += batch.num_rows


def _batches(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    # One row group after the other: no batch of a whole one waits for rows of the next, which may be damaged.
    for group in range(file.num_row_groups):
        about = file.metadata.row_group(group)
        rows = _BATCH_BYTES * about.num_rows // max(about.total_byte_size, 1)
        yield from file.iter_batches(batch_size=max(1, min(_BATCH_ROWS, rows)), row_groups=[group])


def _rows_of(batch: pa.RecordBatch, before: int, columns: Columns) -> Iterator[Row | BadRow]:
    names = dict.fromkeys(batch.schema.names)
    known: dict[str, list[object]] = {}
    broken: dict[int, str] = {}
    for name in (columns.text, columns.pair):
        if name in names:
            known[name] = values = _as_texts(batch.column(name))
            for index, value in enumerate(values):
                if isinstance(value, _NotUtf8):
                    broken.setdefault(index, f"column {name!r} is not UTF-8: {value.where}")
    if columns.label in names and columns.label not in known:
        known[columns.label] = python_values(batch.column(columns.label))
    part = ArrowRows(batch, known, names)
    nothing = [None] * batch.num_rows
    texts, pairs, labels = (known.get(name, nothing) for name in (columns.text, columns.pair, columns.label))
    for index, (text, pair, label) in enumerate(zip(texts, pairs, labels, strict=True)):
        line = before + index + 1
        if index in broken:
            yield BadRow(line, broken[index])
        else:
            yield columns.row_of(line, ArrowFields(part, index), text, pair, label)


@dataclass(frozen=True, slots=True)
class _NotUtf8:
    """Stands for a text that is none; `where` tells the byte."""

    where: str


def _as_texts(column: pa.Array) -> list[object]:
    """Values of a text column; what is neither a string nor bytes is left for the row to refuse."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not is_binary(column.type):
        try:
            return cast(list[object], column.to_pylist())
        except UnicodeDecodeError:
            column = column.cast(pa.large_binary())
        except (ValueError, OverflowError, pa.ArrowException):
            return python_values(column)
    return [None if value is None else _decoded(value) for value in column.to_pylist()]


def _decoded(value: bytes) -> str | _NotUtf8:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as err:
        return _NotUtf8(f"byte 0x{value[err.start]:02x} at byte {err.start + 1} of the value")
