"""Rows of files: what a usable row is, and what is said of one that is none.

The file knows columns and values; it refuses to know file formats, labels' meaning and how files are written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PAIR_COLUMN = "text_pair"

_SHOWN_COLUMNS = 30


@dataclass(frozen=True, slots=True)
class Row:
    """One usable row of a file.

    Attributes:
        line: Line of the file on which the row begins, counted from 1; in Parquet the row's number, from 1.
        fields: All columns of the row, the text included, in the file's order. In CSV every value is a string; in
            Parquet a value becomes Python's when it is asked for (`geep.data.parquet.ArrowFields`).
        text: The text, a valid Unicode string. It may be empty.
        text_pair: The second text, or None where the row has none.
        label: The label as it stands in the file, or None where the row has none.
    """

    line: int
    fields: Mapping[str, object]
    text: str
    text_pair: str | None
    label: object | None


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that cannot be used, and why.

    Attributes:
        line: Line of the file on which the row begins, counted from 1; in Parquet the row's number, from 1.
        reason: What was found and what was expected.
        lines: How many lines of a CSV file it takes in: more than one where quotes enclose line breaks. 1 elsewhere.
    """

    line: int
    reason: str
    lines: int = 1


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns hold what, which of them must exist, and whether fields between delimiters may be quoted.

    Raises:
        ValueError: If one column is to be both texts.
    """

    text: str
    pair: str
    label: str
    require_label: bool
    quoting: bool | None = None

    def __post_init__(self) -> None:
        if self.text == self.pair:
            raise ValueError(
                f"the text and the second text are both column {self.text!r}; name two columns with --text-column and "
                "--text-pair-column, or rename the column."
            )

    @property
    def wanted(self) -> dict[str, tuple[str, str]]:
        """The columns that must exist, each with its meaning and the option that names it."""
        wanted = {self.text: ("text", "--text-column")}
        if self.pair != PAIR_COLUMN:  # a pair under its default name may be absent
            wanted[self.pair] = ("second text", "--text-pair-column")
        if self.require_label:
            wanted.setdefault(self.label, ("label", "--label-column"))
        return wanted

    def check(self, path: Path, found: Iterable[str]) -> None:
        """Raise if a column that is asked for is not among those of the file."""
        names = list(found)
        for column, (meaning, flag) in self.wanted.items():
            if column not in names:
                listed = ", ".join(repr(name[:60]) for name in names[:_SHOWN_COLUMNS]) or "none"
                more = f" and {len(names) - _SHOWN_COLUMNS} more" if len(names) > _SHOWN_COLUMNS else ""
                raise ValueError(
                    f"{path} has no {meaning} column {column!r}; its columns are: {listed}{more}. "
                    f"Name the right one with {flag}."
                )

    def row(self, line: int, fields: Mapping[str, object]) -> Row | BadRow:
        """Make a row of named fields, or say why it is none."""
        return self.row_of(line, fields, fields.get(self.text), fields.get(self.pair), fields.get(self.label))

    def row_of(
        self, line: int, fields: Mapping[str, object], text: object, pair: object, label: object
    ) -> Row | BadRow:
        """Make a row of named fields of which three are at hand, None where there is none, or say why it is none."""
        if not isinstance(text, str):
            return BadRow(line, _not_a_text(self.text, fields))
        if pair is None and self.pair == PAIR_COLUMN:
            pass
        elif not isinstance(pair, str):
            return BadRow(line, _not_a_text(self.pair, fields))
        if label == "":  # CSV has no other way to say that a row has no label
            label = None
        if label is None and self.require_label:
            return BadRow(line, f"no label in column {self.label!r}")
        return Row(line, fields, text, pair, label)


def _not_a_text(column: str, fields: Mapping[str, object]) -> str:
    if column not in fields:
        return f"no column {column!r}; found {sorted(fields)[:10]}"
    return f"column {column!r} must be a string, found {shown(fields[column])}"


def shown(value: object) -> str:
    """A value as JSON would write it, short enough for a message."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def damaged(path: Path, line: int, err: Exception) -> ValueError:
    """The error that says a file cannot be read on from a line."""
    return ValueError(f"{path} is damaged after line {line} ({err}); it may be cut short: write or fetch it again.")


def unique_names(path: Path, names: Sequence[str]) -> tuple[str, ...]:
    """The names of a file's columns; raise if one is there twice."""
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ValueError(f"{path} has more than one column named {twice}; rename them so that each name is there once.")
    return tuple(names)
