"""Where rows go: lines of text, plain or compressed, and Parquet. Every chunk adds bytes that stand for themselves."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from geep.data.parquet import columns_of
from geep.data.rows import Row
from geep.scoring.answers import Answers
from geep.scoring.columns import ResultColumns, result_names
from geep.scoring.values import csv_cell, json_line

# Bounds on a row group of Parquet: what a reader must hold of it, and of texts that are long.
_GROUP_ROWS = 2**16
_GROUP_BYTES = 64 * 2**20


# Compressed streams that stand one after the other are one file to whoever reads it. The same rows always give the same
# bytes: there is no name and no time in them.
_COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": lambda data: gzip.compress(data, compresslevel=6, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}


RESULT_FORMATS = (*(kind + packed for kind in (".jsonl", ".csv", ".tsv") for packed in ("", *_COMPRESS)), ".parquet")
"""Endings of the names of results."""

# What no field can hold that is not quoted.
_TSV_ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


class Sink(Protocol):
    """Makes a chunk of a result into the bytes that are appended for it."""

    def chunk(self, rows: Sequence[Row], answers: Answers, *, is_first: bool) -> bytes:
        """Return the bytes of rows: the source's columns, then ours."""

    def ending(self, *, is_empty: bool) -> bytes:
        """Return the bytes that a complete file still needs."""

    def finish(self, partial: Path, whole: Path) -> None:
        """Make the result of what was appended, where the two are not the same."""


class LineSink:
    """Rows as JSON lines, CSV or TSV, plain or compressed."""

    def __init__(self, target_format: str, columns: ResultColumns | None, *, quoted_tabs: bool = False) -> None:
        self._columns = columns
        self._is_plain_tsv = target_format.startswith(".tsv") and not quoted_tabs
        self._delimiter = "\t" if target_format.startswith(".tsv") else ","
        self._compress = _COMPRESS.get(Path(target_format).suffix, bytes)

    def chunk(self, rows: Sequence[Row], answers: Answers, *, is_first: bool) -> bytes:
        """Return lines, the header before the first of them; compressed, they are a stream of their own."""
        if self._columns is None:
            return self._packed(_json_lines(rows, answers))
        return self._packed(self._csv(self._columns, rows, answers, with_header=is_first))

    def ending(self, *, is_empty: bool) -> bytes:
        """Return what makes a file of no rows a valid one."""
        if not is_empty:
            return b""
        return self._packed("" if self._columns is None else self._csv(self._columns, [], None, with_header=True))

    def finish(self, partial: Path, whole: Path) -> None:
        """Do nothing: the lines are the result."""

    def _packed(self, text: str) -> bytes:
        return self._compress(text.encode("utf-8"))

    def _csv(self, columns: ResultColumns, rows: Sequence[Row], answers: Answers | None, *, with_header: bool) -> str:
        lines: list[Iterable[str]] = [columns.names] if with_header else []
        if answers is not None:
            values = columns.values(rows) | answers.values()
            lines += zip(*(map(csv_cell, values[name]) for name in columns.names), strict=True)
        if self._is_plain_tsv:
            return "".join("\t".join(cell.translate(_TSV_ESCAPES) for cell in line) + "\n" for line in lines)
        buffer = io.StringIO(newline="")
        # With "\r\n" between rows, as RFC 4180 has it, the module quotes both characters inside of a field.
        csv.writer(buffer, delimiter=self._delimiter, lineterminator="\r\n").writerows(lines)
        return buffer.getvalue()


def _json_lines(rows: Sequence[Row], answers: Answers) -> str:
    columns = answers.values()
    ours = columns.keys()
    carried = columns_of(rows)
    if carried is not None:
        names = result_names(carried, ours)
        columns = {names[name]: values for name, values in carried.items()} | columns
        return "".join(json_line(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True))
    lines = []
    for row, values in zip(rows, zip(*columns.values(), strict=True), strict=True):
        fields = row.fields
        if not ours.isdisjoint(fields):
            names = result_names(fields, ours)
            fields = {names[name]: value for name, value in fields.items()}
        lines.append(json_line({**fields, **dict(zip(ours, values, strict=True))}))
    return "".join(lines)


class ParquetSink:
    """Rows as Parquet.

    A part of a Parquet file is none: until the end the rows are Arrow streams, one a chunk and one after the other.
    """

    def __init__(self, columns: ResultColumns) -> None:
        self._columns = columns
        self._schema = pa.schema([*columns.schema, *columns.added], metadata=columns.schema.metadata)

    def chunk(self, rows: Sequence[Row], answers: Answers, *, is_first: bool) -> bytes:
        """Return an Arrow stream of the rows."""
        buffer = pa.BufferOutputStream()
        with pa.ipc.new_stream(buffer, self._schema) as writer:
            if rows:
                arrays = self._columns.arrays(rows) | answers.arrays()
                writer.write_table(pa.table([arrays[name] for name in self._schema.names], schema=self._schema))
        return buffer.getvalue().to_pybytes()

    def ending(self, *, is_empty: bool) -> bytes:
        """Return nothing: the end is made of the whole."""
        return b""

    def finish(self, partial: Path, whole: Path) -> None:
        """Write the Arrow streams as one Parquet file, whose row groups are bounded."""
        with open(whole, "wb") as file:
            with pq.ParquetWriter(file, self._schema) as writer:
                for group in _groups(_batches(partial)):
                    table = pa.Table.from_batches(group, schema=self._schema)
                    rows = max(1, min(_GROUP_ROWS, table.num_rows * _GROUP_BYTES // max(table.nbytes, 1)))
                    writer.write_table(table, row_group_size=rows)
            file.flush()
            os.fsync(file.fileno())


def _groups(batches: Iterator[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    """Batches that make a row group together; one that is too large alone stays alone."""
    held: list[pa.RecordBatch] = []
    num_rows = num_bytes = 0
    for batch in batches:
        if held and (num_rows + batch.num_rows > _GROUP_ROWS or num_bytes + batch.nbytes > _GROUP_BYTES):
            yield held
            held, num_rows, num_bytes = [], 0, 0
        held.append(batch)
        num_rows += batch.num_rows
        num_bytes += batch.nbytes
    if held:
        yield held


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The batches of Arrow streams that stand one after the other."""
    num_bytes = path.stat().st_size
    with pa.OSFile(str(path)) as file:
        while file.tell() < num_bytes:
            with pa.ipc.open_stream(file) as stream:
                yield from stream
