"""Files as streams of rows: the reader of a file is chosen by its name and by what it holds.

Read `open_rows`, `open_columns`, then `read_rows`. What a label means and what rows are for is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from geep.data.compression import COMPRESSIONS, Opened, is_stream, open_bytes
from geep.data.delimited import Delimited, warn_once
from geep.data.json_rows import read_json
from geep.data.kinds import foreign_kind, is_json
from geep.data.parquet import open_parquet, read_parquet
from geep.data.rows import PAIR_COLUMN, BadRow, Columns, Row

_TEXT_FORMATS = (".jsonl", ".json", ".csv", ".tsv")

FORMATS = (*(kind + packed for kind in _TEXT_FORMATS for packed in ("", *COMPRESSIONS)), ".parquet")
"""Endings of the names of files that are read."""

_IN_WORDS = f"{', '.join(_TEXT_FORMATS)} (each also {', '.join(COMPRESSIONS)}) or .parquet"


def file_format(path: str | os.PathLike[str]) -> str:
    """Return the entry of `FORMATS` that the file's name ends with.

    Raises:
        ValueError: If the name ends with none of them; the message lists them.
    """
    name = Path(path).name.lower()
    for suffix in FORMATS:
        if name.endswith(suffix):
            return suffix
    raise ValueError(f"{path} is of no known format; expected a name that ends with one of {_IN_WORDS}.")


@dataclass(frozen=True, eq=False)
class RowStream:
    """The rows of one open file, to be iterated over once; `read_rows` says what comes out.

    Attributes:
        format: What is read: ``.jsonl`` (lines of JSON, or an array), ``.csv``, ``.tsv`` or ``.parquet``.
        header: Names of the columns that the file declares, in its order; empty for a CSV file without a single line.
            None for JSON, which declares nothing.
    """

    format: str
    header: tuple[str, ...] | None
    _rows: Iterator[Row | BadRow] = field(repr=False)

    def __iter__(self) -> Iterator[Row | BadRow]:
        return self._rows


@contextlib.contextmanager
def open_rows(
    path: str | os.PathLike[str],
    *,
    text_column: str = "text",
    text_pair_column: str = PAIR_COLUMN,
    label_column: str = "label",
    require_label: bool = False,
    quoting: bool | None = None,
) -> Iterator[RowStream]:
    """Open a file for one pass over its header and its rows; a pipe is opened this once.

    Standard input (``-``) and pipes without an ending of `FORMATS` hold what they seem to hold: JSON, or else CSV with
    the delimiter that gives its header the text column. Arguments and errors are those of `read_rows`.
    """
    columns = Columns(text_column, text_pair_column, label_column, require_label, quoting)
    with open_columns(path, columns) as stream:
        yield stream


@contextlib.contextmanager
def open_columns(path: str | os.PathLike[str], columns: Columns) -> Iterator[RowStream]:
    """Open a file as `open_rows` does."""
    path = check_source(path)
    named = _named_format(path)
    if named == ".parquet" and is_stream(path):
        raise ValueError(f"{path} is a pipe, and Parquet is read from its end; write it to a file first.")
    with open_bytes(path) as opened:
        declared = _check_kind(path, named, opened)
        if declared == ".parquet":
            with open_parquet(path) as file:
                header = tuple(file.schema_arrow.names)
            yield RowStream(declared, header, read_parquet(path, columns))
        elif declared == ".jsonl":
            yield RowStream(declared, None, read_json(path, opened, columns))
        else:
            table = Delimited(path, opened, "\t" if declared == ".tsv" else ",", columns)
            yield RowStream(declared, table.header, table.rows())


def read_rows(
    path: str | os.PathLike[str],
    *,
    text_column: str = "text",
    text_pair_column: str = PAIR_COLUMN,
    label_column: str = "label",
    require_label: bool = False,
    quoting: bool | None = None,
) -> Iterator[Row | BadRow]:
    """Stream the rows of a file, good and bad, in the file's order.

    Every row of the file comes out exactly once, as a `Row` or as a `BadRow`: a bad row never ends the stream. Memory
    stays bounded whatever the file's size: a line of more than 64 MiB, or a field of CSV of more than 16 Mi characters,
    is a bad row. Lines of CSV that quotes join, but in which text follows a closing quote, are one bad row. Blank lines
    are no rows; byte order marks are accepted. If the file is damaged, all rows before the damage come out before that
    is raised.

    Compression, UTF-16 (with its byte order mark), a JSON array in place of lines and another delimiter than the
    name's are seen in the file itself, and said in a warning where the name says otherwise.

    Args:
        path: A file whose name ends with one of `FORMATS`; a pipe; or ``-`` for standard input, see `open_rows`. CSV
            and TSV start with a header row. All text is UTF-8 or UTF-16.
        text_column: Column of the text; it must exist.
        text_pair_column: Column of the second text. It may be absent unless it is named otherwise than the default.
        label_column: Column of the label.
        require_label: Whether a row without a label is a bad row.
        quoting: Whether fields of CSV and TSV may be quoted, as the `csv` module has it: with delimiters and line
            breaks in them. A row of more than 100 lines is warned of. If not, quotes are characters like any other.
            None: where commas delimit, but not where tabs do.

    Returns:
        An iterator over the rows. The file is opened at the first step.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the format is unknown, or one column is to be both texts; at the first step, if the file is of
            another kind than its name says, its header (in JSON the first 100 objects) is unreadable or lacks a column
            that is asked for, or not one of its first rows is JSON; at any step, if the file itself is damaged (a cut
            .gz, an unreadable Parquet page, a broken JSON array).
    """
    columns = Columns(text_column, text_pair_column, label_column, require_label, quoting)
    _named_format(check_source(path))

    def rows() -> Iterator[Row | BadRow]:
        with open_columns(path, columns) as stream:
            yield from stream

    return rows()


def read_header(
    path: str | os.PathLike[str], *, text_column: str = "text", quoting: bool | None = None
) -> tuple[str, ...] | None:
    """Return the column names that a file declares, in its order; of a pipe use `open_rows`, which reads it once.

    Returns:
        The names; empty for a CSV file without a single line. None for JSON, which declares nothing.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: See `read_rows`.
    """
    if is_stream(path):
        raise ValueError(f"{path} is a pipe, which can be read only once; use open_rows for its header and its rows.")
    with open_rows(path, text_column=text_column, quoting=quoting) as stream:
        return stream.header


def check_source(path: str | os.PathLike[str]) -> Path:
    """Return a path from which rows could be read.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is a folder.
    """
    if os.fspath(path) == "-":
        return Path("-")
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a file that ends with one of {_IN_WORDS}.")
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}; check the path (relative paths start at {Path.cwd()}).")
    return path


def _named_format(path: Path) -> str | None:
    """The entry of `FORMATS` that a name ends with; None for a pipe, which need not have one."""
    try:
        return file_format(path)
    except ValueError:
        if is_stream(path):
            return None
        raise


def _check_kind(path: Path, named: str | None, opened: Opened) -> str:
    """The format to read, without compression; raise if the file is plainly of another kind than its name says."""
    head, packed = opened.head, opened.compression
    if named == ".parquet":
        if not packed and head.startswith(b"PAR1"):
            return named
        if packed:
            found = f"it is compressed ({packed}), which Parquet is within itself: unpack it."
        elif is_json(head):
            found = "it seems to be JSON: name it .jsonl."
        else:
            found = "it does not begin as one: write or fetch it again."
        raise ValueError(f"{path} is no readable Parquet file; {found}")
    if foreign := foreign_kind(head):
        raise ValueError(f"{path} seems to be {foreign}.")
    if named is None:
        return ".jsonl" if is_json(head) else ".csv"
    told = next((suffix for suffix in COMPRESSIONS if named.endswith(suffix)), "")
    kind = named.removesuffix(told)
    if head and told != packed:
        warn_once(
            f"{path} is compressed ({packed}), which its name does not say; it is read so."
            if packed
            else f"{path} is not compressed, although its name ends with {told}; it is read as it is."
        )
    if kind in (".json", ".jsonl"):
        return ".jsonl"
    if is_json(head):
        raise ValueError(f"{path} seems to be JSON; name it .jsonl.")
    return kind
