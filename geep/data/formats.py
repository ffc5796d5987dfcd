"""JSON lines, CSV, TSV and Parquet as streams of rows, in bounded memory.

Read `read_rows`, then the reader of a format. What a label means and what rows are for is decided elsewhere.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

from geep.data.parquet import open_parquet, read_parquet
from geep.data.rows import PAIR_COLUMN, BadRow, Columns, Row, damaged, shown, unique_names

FORMATS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")


# A line, or a quoted field that is never closed, may be as long as the file: these two bound what is held of it.
_MAX_LINE_BYTES = 64 * 2**20


_MAX_FIELD_CHARS = 16 * 2**20


# Rows of a .jsonl file looked at before a text column that none of them has is called missing.
_HEADER_ROWS = 100


def file_format(path: str | os.PathLike[str]) -> str:
    """Return the entry of `FORMATS` that the file's name ends with.

    Raises:
        ValueError: If the name ends with none of them; the message lists them.
    """
    name = Path(path).name.lower()
    for suffix in FORMATS:
        if name.endswith(suffix):
            return suffix
    raise ValueError(f"{path} is of no known format; expected a name that ends with one of {', '.join(FORMATS)}.")


def read_header(path: str | os.PathLike[str]) -> tuple[str, ...] | None:
    """Return the column names that a file declares, in its order.

    Returns:
        The names; empty for a CSV file without a single line. None for JSON lines, which declare nothing.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the format is unknown, the header is unreadable or names a column twice.
    """
    path = _existing(path)
    suffix = file_format(path)
    if suffix.startswith(".jsonl"):
        return None
    if suffix == ".parquet":
        with open_parquet(path) as file:
            return unique_names(path, file.schema_arrow.names)
    with _open_binary(path) as binary:
        header, _ = _csv_header(path, _TextLines(binary), suffix)
    return header


def read_rows(
    path: str | os.PathLike[str],
    *,
    text_column: str = "text",
    text_pair_column: str = PAIR_COLUMN,
    label_column: str = "label",
    require_label: bool = False,
) -> Iterator[Row | BadRow]:
    """Stream the rows of a file, good and bad, in the file's order.

    Every row of the file comes out exactly once, as a `Row` or as a `BadRow`: a bad row never ends the stream. Memory
    stays bounded whatever the file's size. Blank lines are no rows; a byte order mark is accepted.

    Args:
        path: A file whose name ends with one of `FORMATS`. CSV and TSV start with a header row and follow the `csv`
            module (quotes, newlines within quotes); all text is UTF-8.
        text_column: Column of the text; it must exist.
        text_pair_column: Column of the second text. It may be absent unless it is named otherwise than the default.
        label_column: Column of the label.
        require_label: Whether a row without a label is a bad row.

    Returns:
        An iterator over the rows. The file is opened at the first step.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the format is unknown; at the first step, if the header lacks a column that is asked for; at
            any step, if the file itself is damaged (a cut .gz, an unreadable Parquet page).
    """
    path = _existing(path)
    suffix = file_format(path)
    columns = Columns(text_column, text_pair_column, label_column, require_label)
    if suffix == ".parquet":
        return read_parquet(path, columns)
    if suffix.startswith(".jsonl"):
        return _read_jsonl(path, columns)
    return _read_csv(path, columns, suffix)


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a file that ends with one of {', '.join(FORMATS)}.")
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}; check the path (relative paths start at {Path.cwd()}).")
    return path


def _open_binary(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb"))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parse_json(line: bytes) -> dict[str, object] | str:
    """The object on a line, or the reason why there is none."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as err:
        return f"not UTF-8: byte 0x{line[err.start]:02x} at byte {err.start + 1} of the line"
    try:
        # An object has no order of its own, yet ours keep the file's: json gives dictionaries in reading order.
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:
            # Escapes can spell half a character, which no tokenizer and no UTF-8 file can take.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return "a \\u escape stands for half a character (a lone surrogate)"
    except RecursionError:
        return "invalid JSON: nested too deeply"
    except ValueError as err:
        return f"invalid JSON: {err}"
    if not isinstance(value, dict):
        return f"expected a JSON object, found {shown(value)}"
    return value


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, object] | str]]:
    """Each line that is not blank, with its number."""
    number = 0
    try:
        with _open_binary(path) as file:
            while line := file.readline(_MAX_LINE_BYTES):
                number += 1
                if len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
                    while (rest := file.readline(_MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                        pass
                    yield number, f"longer than {_MAX_LINE_BYTES // 2**20} MiB"
                    continue
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, _parse_json(line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as err:
        raise damaged(path, number, err) from err


def _read_jsonl(path: Path, columns: Columns) -> Iterator[Row | BadRow]:
    # JSON lines have no header: the first objects together stand for one, so that a wrong column name is said once
    # and not once a row.
    found: dict[str, None] = {}
    held: list[Row | BadRow] | None = []
    objects = 0
    for line, value in _json_lines(path):
        row = BadRow(line, value) if isinstance(value, str) else columns.row(line, value)
        if held is None:
            yield row
            continue
        held.append(row)
        if isinstance(value, dict):
            objects += 1
            found.update(dict.fromkeys(value))
        if (isinstance(value, dict) and columns.text in value) or objects >= _HEADER_ROWS:
            # Only the text is judged here: labels and pairs may start further down.
            if columns.text not in found:
                columns.check(path, found)
            yield from held
            held = None
        elif len(held) > _HEADER_ROWS:  # broken lines only: nothing to learn from keeping them
            yield from held
            held.clear()
    if held is not None:
        if objects:
            columns.check(path, found)
        yield from held


class _LineTooLong(Exception):
    """A physical line of a CSV file is longer than is held in memory."""


class _TextLines:
    """Lines of a CSV file for `csv.reader`, with what the reader cannot say: bad bytes and the end of the file.

    An iterator that survives its own exceptions, which a generator does not.
    """

    def __init__(self, binary: BinaryIO) -> None:
        # surrogateescape keeps rows with bad bytes in step: the delimiters around them are still found.
        self._text = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self.number = 0
        self.has_bad_bytes = False
        self.is_exhausted = False

    def __iter__(self) -> _TextLines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(_MAX_LINE_BYTES)
        if not line:
            self.is_exhausted = True
            raise StopIteration
        self.number += 1
        if len(line) == _MAX_LINE_BYTES and line[-1] not in "\r\n":
            while (rest := self._text.readline(_MAX_LINE_BYTES)) and rest[-1] not in "\r\n":
                pass
            raise _LineTooLong
        if not line.isascii():
            try:
                line.encode("utf-8")
            except UnicodeEncodeError:
                self.has_bad_bytes = True
        return line


def _csv_reader(lines: _TextLines, suffix: str) -> Iterator[list[str]]:
    # The module's own limit of 131,072 characters would refuse long texts. It is one number for the whole process, so
    # it is only ever raised.
    if csv.field_size_limit() < _MAX_FIELD_CHARS:
        csv.field_size_limit(_MAX_FIELD_CHARS)
    return csv.reader(lines, delimiter="\t" if suffix.startswith(".tsv") else ",")


def _csv_header(path: Path, lines: _TextLines, suffix: str) -> tuple[tuple[str, ...], Iterator[list[str]]]:
    """The header, empty if the file is, and the reader that stands behind it."""
    reader = _csv_reader(lines, suffix)
    try:
        header = next((row for row in reader if row), [])
    except (csv.Error, _LineTooLong, EOFError, zlib.error, gzip.BadGzipFile) as err:
        raise ValueError(f"{path} has no readable header row ({err}); expected the column names on line 1.") from err
    if lines.has_bad_bytes:
        raise ValueError(f"The header row of {path} is not UTF-8; write the file as UTF-8.")
    return unique_names(path, header), reader


def _read_csv(path: Path, columns: Columns, suffix: str) -> Iterator[Row | BadRow]:
    with _open_binary(path) as binary:
        lines = _TextLines(binary)
        header, reader = _csv_header(path, lines, suffix)
        if not header:
            return
        columns.check(path, header)
        while True:
            line = lines.number + 1
            lines.has_bad_bytes = False
            try:
                fields = next(reader)
            except StopIteration:
                return
            except _LineTooLong:
                yield BadRow(line, f"longer than {_MAX_LINE_BYTES // 2**20} Mi characters")
                continue
            except csv.Error as err:
                yield BadRow(line, f"no CSV row in lines {line} to {lines.number}: {err}")
                continue
            except (EOFError, zlib.error, gzip.BadGzipFile) as err:
                raise damaged(path, lines.number, err) from err
            if lines.is_exhausted:
                # A whole row is handed out before the reader asks for the next line: it ran out inside a quote.
                yield BadRow(line, f"a quote is opened here and never closed: it takes in lines {line} to the end")
            elif lines.has_bad_bytes:
                yield BadRow(line, "not UTF-8")
            elif len(fields) == len(header):
                yield columns.row(line, dict(zip(header, fields, strict=True)))
            elif fields:
                yield BadRow(line, f"expected {len(header)} fields as in the header, found {len(fields)}")
