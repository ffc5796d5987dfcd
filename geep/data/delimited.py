"""CSV and TSV as a stream of rows, in bounded memory. Read `Delimited`."""

from __future__ import annotations

import csv
import functools
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from geep.data.compression import DamagedBytesError, Opened
from geep.data.rows import BadRow, Columns, Row, damaged, unique_names

logger = logging.getLogger(__name__)

# A line, or a quoted field that is never closed, may be as long as the file: these two bound what is held of it.
_MAX_LINE_CHARS = 64 * 2**20
_MAX_FIELD_CHARS = 16 * 2**20

MANY_LINES = 100
"""Lines that one row may take in before a warning says that quotes may be paired that are none."""

_DELIMITERS = (",", "\t", ";", "|")

_HINT = "If quotes are mere characters in this file, read it without: quoting=False, --no-quoting"


@functools.lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Log a warning, unless it was logged before: a file may be opened several times."""
    logger.warning("%s", message)


class Delimited:
    """A CSV or TSV file whose header is read.

    The delimiter is the one that is declared, unless only another one gives the header the text column. Fields may be
    quoted as the `csv` module has it, or quotes are characters like any other: by default where tabs delimit.

    Attributes:
        header: Names of the columns, empty for a file without a single line. One without a name is called after its
            place: ``column_3``.
        delimiter: What stands between two fields.

    Raises:
        ValueError: If the header is unreadable, has stray quotes or names a column twice, or the text column is
            missing.
    """

    def __init__(self, path: Path, opened: Opened, declared: str, columns: Columns) -> None:
        self._path = path
        self._columns = columns
        self.delimiter = _delimiter(path, opened.head, declared, columns.text)
        self._quoting = _csv_quoting(self.delimiter != "\t" if columns.quoting is None else columns.quoting)
        self._lines = _TextLines(opened.file)
        self._has_warned = False
        # The module's own limit of 131,072 characters would refuse long texts. It is one number for the whole process,
        # so it is only ever raised.
        if csv.field_size_limit() < _MAX_FIELD_CHARS:
            csv.field_size_limit(_MAX_FIELD_CHARS)
        self._reader = csv.reader(self._lines, delimiter=self.delimiter, quoting=self._quoting)
        self.header = self._read_header()
        if self.header:
            columns.check(path, self.header)

    def _read_header(self) -> tuple[str, ...]:
        path, lines = self._path, self._lines
        header: list[str] | None = []
        try:
            while header is not None and not header:
                lines.row_line = lines.number + 1
                header = next(self._reader, None)
        except csv.Error as err:
            raise _no_header(path, self._reason(err)) from err
        except _LineTooLong as err:
            raise _no_header(path, f"longer than {_MAX_LINE_CHARS // 2**20} Mi characters") from err
        except DamagedBytesError as err:
            raise damaged(path, lines.number, err) from err
        if header is None:
            return ()
        if reason := self._stray_quotes():
            raise _no_header(path, reason)
        if where := lines.is_odd and _bad_byte(header, ()):
            raise ValueError(f"The header row of {path} is {where}; write the file as UTF-8.")
        return unique_names(path, _named(header))

    def rows(self) -> Iterator[Row | BadRow]:
        """Stream the rows behind the header, good and bad, in the file's order; to be called once."""
        header, lines, reader, columns = self.header, self._lines, self._reader, self._columns
        if not header:
            return
        again, width, make = list(header), len(header), columns.row
        while True:
            lines.row_line = line = lines.number + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except _LineTooLong:
                reason = f"longer than {_MAX_LINE_CHARS // 2**20} Mi characters"
                yield BadRow(line, reason, lines.number - line + 1)
                continue
            except csv.Error as err:
                yield BadRow(line, self._reason(err), lines.number - line + 1)
                continue
            except DamagedBytesError as err:
                raise damaged(self._path, line - 1, err) from err
            if (lines.is_odd or lines.number != line) and (oddity := self._oddity(line, fields)):
                yield BadRow(line, oddity, lines.number - line + 1)
            elif len(fields) == width:
                if fields == again and width > 1:
                    yield BadRow(line, "the header again, as where files are joined")
                else:
                    yield make(line, dict(zip(header, fields)))  # noqa: B905 (both have `width` entries)
            elif fields:
                reason = f"expected {width} fields as in the header, found {len(fields)}"
                yield BadRow(line, reason, lines.number - line + 1)

    def _reason(self, err: csv.Error) -> str:
        """Why the reader gave up on a row, in our words."""
        line, last = self._lines.row_line, self._lines.number
        if not str(err).startswith("field larger than field limit"):
            return f"no row in {_span(line, last)}: {err}"
        most = f"{csv.field_size_limit():,} characters"
        if line == last:
            return f"a field is longer than {most}"
        return f"a quote is opened here and not closed within {most}: it takes in {_span(line, last)}. {_HINT}"

    def _stray_quotes(self) -> str | None:
        """Why the quotes of the row that was read just now are mere characters, as far as can be told."""
        lines = self._lines
        span = _span(lines.row_line, lines.number)
        if lines.is_exhausted:
            # A whole row is handed out before the reader asks for the next line: it ran out inside a quote.
            return f"a quote is opened here and never closed: it takes in {span}, the end. {_HINT}"
        if lines.number == lines.row_line:
            return None
        strict = csv.reader(lines.held(), delimiter=self.delimiter, quoting=self._quoting, strict=True)
        try:
            next(strict)
        except csv.Error:
            return f"quotes pair up over {span}, but text follows the closing one. {_HINT}"
        return None

    def _oddity(self, line: int, fields: list[str]) -> str | None:
        """Why a row cannot be used that has bad bytes, met the end or takes in several lines; warn of many."""
        lines = self._lines
        lines.is_odd = False
        if reason := self._stray_quotes():
            return reason
        if lines.number - line >= MANY_LINES and not self._has_warned:
            self._has_warned = True
            warn_once(f"{self._path}, line {line}: a quoted field takes in all lines to line {lines.number}. {_HINT}.")
        return _bad_byte(fields, self.header)


def _span(first: int, last: int) -> str:
    return f"line {first}" if first == last else f"lines {first} to {last}"


def _no_header(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} has no readable header row ({reason}); expected the column names on line 1.")


def _csv_quoting(is_quoted: bool) -> Literal[0, 3]:
    return csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE


def _delimiter(path: Path, head: bytes, declared: str, text_column: str) -> str:
    """The delimiter that gives the header its text column: the declared one where it does, or where none does."""
    first = next((line for line in head.decode("utf-8-sig", "replace").splitlines() if line.strip()), "")
    for delimiter in (declared, *_DELIMITERS):
        try:
            names = next(csv.reader([first], delimiter=delimiter, quoting=_csv_quoting(delimiter != "\t")), [])
        except csv.Error:
            continue
        if text_column in names:
            if delimiter != declared:
                warn_once(f"The columns of {path} are delimited by {delimiter!r}, not {declared!r}; it is read so.")
            return delimiter
    return declared


def _named(header: list[str]) -> list[str]:
    """The header with a name for every column."""
    names = list(header)
    for index, name in enumerate(header):
        if not name.strip():
            new = f"column_{index + 1}"
            while new in names:
                new = f"{new}_"
            names[index] = new
    return names


def _bad_byte(fields: list[str], names: tuple[str, ...]) -> str | None:
    """Where the first byte that is no UTF-8 stands in a row."""
    for index, field in enumerate(fields):
        try:
            field.encode("utf-8")
        except UnicodeEncodeError as err:
            byte = ord(field[err.start]) - 0xDC00
            place = len(field[: err.start].encode("utf-8")) + 1
            column = repr(names[index]) if index < len(names) else str(index + 1)
            return f"not UTF-8: byte 0x{byte:02x} at byte {place} of column {column}"
    return None


class _LineTooLong(Exception):
    """A physical line is longer than is held in memory."""


class _TextLines:
    """Lines for `csv.reader`, with what the reader cannot say.

    An iterator that survives its own exceptions, which a generator does not.

    Attributes:
        number: Lines read.
        row_line: Line on which the row begins that is being read; to be set by whoever reads rows.
        is_odd: Whether the end was reached, or bytes that are no UTF-8; the latter to be cleared.
        is_exhausted: Whether the end was reached.
    """

    def __init__(self, binary: BinaryIO) -> None:
        # surrogateescape keeps rows with bad bytes in step: the delimiters around them are still found.
        self._readline = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="").readline
        self.number = 0
        self.row_line = 1
        self.is_odd = False
        self.is_exhausted = False
        self._held: str | io.StringIO = ""

    def held(self) -> Iterator[str]:
        """The lines of the row that was read last, as they stand in the file; to be called once a row."""
        if isinstance(self._held, str):
            return iter([self._held])
        self._held.seek(0)
        return self._held

    def __iter__(self) -> _TextLines:
        return self

    def __next__(self) -> str:
        line = self._readline(_MAX_LINE_CHARS)
        self.number += 1
        if not line or not line.isascii() or len(line) >= _MAX_LINE_CHARS:
            line = self._odd(line)
        if self.number == self.row_line:
            self._held = line
        else:
            self._hold(line)
        return line

    def _hold(self, line: str) -> None:
        # One buffer: millions of short lines, each a string of its own, would be many times as large.
        if isinstance(self._held, str):
            first, self._held = self._held, io.StringIO(newline="")
            self._held.write(first)
        self._held.write(line)

    def _odd(self, line: str) -> str:
        """A line that must be looked at: the end, or one that is too long, or one with other bytes than ASCII."""
        if not line:
            self.number -= 1
            self.is_exhausted = self.is_odd = True
            raise StopIteration
        if len(line) == _MAX_LINE_CHARS and line[-1] not in "\r\n":
            while (rest := self._readline(_MAX_LINE_CHARS)) and rest[-1] not in "\r\n":
                pass
            raise _LineTooLong
        if line[0] == "\ufeff" and self.number == self.row_line:  # of a file that was appended to another
            line = line[1:]
        try:
            line.encode("utf-8")
        except UnicodeEncodeError:
            self.is_odd = True
        return line
