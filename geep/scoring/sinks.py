"""Where rows go: lines of text, plain or gzipped, and Parquet."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from geep.data.rows import Row
from geep.scoring.answers import Answers
from geep.scoring.columns import ResultColumns, csv_cell, json_line, result_names
from geep.scoring.journal import ByteFile


class LineSink:
    """Rows as JSON lines, CSV or TSV, plain or through gzip."""

    def __init__(self, path: Path, num_bytes: int, target_format: str, columns: ResultColumns | None) -> None:
        self._columns = columns
        self._delimiter = "\t" if target_format.startswith(".tsv") else ","
        self._has_header = columns is None or num_bytes > 0
        self._file = ByteFile(path, num_bytes)
        # No name and no time in the gzip header: the same rows always give the same bytes.
        self._gzip = (
            gzip.GzipFile(filename="", mode="wb", fileobj=cast(io.BufferedIOBase, self._file), mtime=0, compresslevel=6)
            if target_format.endswith(".gz")
            else None
        )

    @property
    def num_bytes(self) -> int:
        """Length of the file."""
        return self._file.num_bytes

    def __enter__(self) -> LineSink:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if self._gzip is not None and error is not None:
            with contextlib.suppress(OSError):  # its last bytes, written into a file that is thrown away
                self._gzip.close()
        self._file.__exit__()
        if self._gzip is not None and error is not None:
            self._file.path.unlink(missing_ok=True)

    def write(self, rows: Sequence[Row], answers: Answers) -> None:
        """Append rows: the source's columns, then ours."""
        self._write(_json_lines(rows, answers) if self._columns is None else self._csv(self._columns, rows, answers))

    def _write(self, text: str) -> None:
        data = text.encode("utf-8")
        if self._gzip is None:
            self._file.write(data)
        else:
            self._gzip.write(data)

    def _csv(self, columns: ResultColumns, rows: Sequence[Row], answers: Answers | None) -> str:
        """Rows as CSV, after the header where it is not written yet; without answers the header alone."""
        buffer = io.StringIO(newline="")
        # With "\r\n" between rows, as RFC 4180 has it, the module quotes both characters inside of a field.
        writer = csv.writer(buffer, delimiter=self._delimiter, lineterminator="\r\n")
        if not self._has_header:
            writer.writerow(columns.names)
            self._has_header = True
        if answers is not None:
            values = columns.values(rows) | answers.values()
            writer.writerows(zip(*(map(csv_cell, values[name]) for name in columns.names), strict=True))
        return buffer.getvalue()

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        self._file.sync()

    def finish(self) -> None:
        """Write what a complete file still needs."""
        if not self._has_header and self._columns is not None:
            self._write(self._csv(self._columns, [], None))
        if self._gzip is not None:
            self._gzip.close()
        self._file.sync()


def _json_lines(rows: Sequence[Row], answers: Answers) -> str:
    columns = answers.values()
    ours = columns.keys()
    lines = []
    for row, values in zip(rows, zip(*columns.values(), strict=True), strict=True):
        fields = row.fields
        if not ours.isdisjoint(fields):
            names = result_names(fields, ours)
            fields = {names[name]: value for name, value in fields.items()}
        lines.append(json_line({**fields, **dict(zip(ours, values, strict=True))}))
    return "".join(lines)


class ParquetSink:
    """Rows as Parquet, one row group a chunk."""

    def __init__(self, path: Path, columns: ResultColumns) -> None:
        self._path = path
        self._columns = columns
        self._schema = pa.schema([*columns.schema, *columns.added])
        self._file = open(path, "wb")  # noqa: SIM115
        self._writer: pq.ParquetWriter | None = None

    @property
    def num_bytes(self) -> int:
        """Nothing: a part of a Parquet file is no Parquet file."""
        return 0

    def __enter__(self) -> ParquetSink:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            self._file.close()
            return
        with contextlib.suppress(OSError):  # the first failure is the one to tell of
            if self._writer is not None:
                self._writer.close()
        with contextlib.suppress(OSError):
            self._file.close()
        self._path.unlink(missing_ok=True)

    def write(self, rows: Sequence[Row], answers: Answers) -> None:
        """Append rows: the source's columns, then ours."""
        if rows:
            arrays = self._columns.arrays(rows) | answers.arrays()
            self._open().write_table(pa.table([arrays[name] for name in self._schema.names], schema=self._schema))

    def _open(self) -> pq.ParquetWriter:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._file, self._schema)
        return self._writer

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Write the footer, and the schema if there was no row."""
        self._open().close()
        self.sync()
