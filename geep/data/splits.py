"""Whole files: texts with label ids, for training and judging.

Read `Split` and `Dataset`, then `load_split`. Where files come from and where texts are kept is not known here.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from geep.data.formats import open_columns
from geep.data.rows import PAIR_COLUMN, BadRow, Columns, Row, shown
from geep.data.texts import MappedTexts, PairedTexts, TextCollector, join_texts, select_texts

logger = logging.getLogger(__name__)

_SHOWN_ERRORS = 5
_SHOWN_LABELS = 20


@dataclass(frozen=True, eq=False)
class Split:
    """Texts with their labels, in one fixed order.

    All parts that are there have the same length.

    Attributes:
        texts: The texts: a list, or `MappedTexts` where a file was too large to be held in memory.
        text_pairs: The second texts, or None where there are none.
        labels: Label ids, int64 of shape (num_rows,); for multi-label tasks float32 of shape (num_rows, num_labels)
            with ones where a label holds; None where there are none.
        origin: Where the rows came from, in words; empty where it is not known.
    """

    texts: Sequence[str]
    text_pairs: Sequence[str] | None = None
    labels: NDArray[np.int64] | NDArray[np.float32] | None = None
    origin: str = ""

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
            texts=select_texts(self.texts, index),
            text_pairs=None if self.text_pairs is None else select_texts(self.text_pairs, index),
            labels=None if self.labels is None else self.labels[index],
            origin=self.origin,
        )

    def join(self, other: Split) -> Split:
        """Return these rows and those of a split with the same columns after them."""
        pairs, more_pairs = self.text_pairs, other.text_pairs
        labels, more_labels = self.labels, other.labels
        return Split(
            texts=join_texts(self.texts, other.texts),
            text_pairs=None if pairs is None or more_pairs is None else join_texts(pairs, more_pairs),
            labels=None if labels is None or more_labels is None else np.concatenate([labels, more_labels]),
            origin=" and ".join(dict.fromkeys(filter(None, (self.origin, other.origin)))),
        )

    def digest(self) -> str:
        """Return a SHA-256 of the texts, second texts and labels: other rows, or another order, give another one."""
        digest = hashlib.sha256()
        for column in (self.texts, self.text_pairs):
            digest.update(b"column" if column is not None else b"none")
            for text in column or ():
                raw = text.encode("utf-8", "surrogatepass")
                digest.update(len(raw).to_bytes(8, "little") + raw)
        if self.labels is not None:
            digest.update(f"{self.labels.dtype} {self.labels.shape}".encode() + self.labels.tobytes())
        return digest.hexdigest()

    @property
    def inputs(self) -> Sequence[str] | Sequence[tuple[str, str]]:
        """The texts as an engine takes them: strings, or pairs of strings; none is read that is on disk."""
        if self.text_pairs is None:
            return self.texts
        if isinstance(self.texts, MappedTexts) or isinstance(self.text_pairs, MappedTexts):
            return PairedTexts(self.texts, self.text_pairs)
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
class Table:
    """One file, read whole: labels as names, a tuple of names a row in a multi-label file."""

    path: Path
    lines: Sequence[int]
    texts: Sequence[str]
    text_pairs: Sequence[str] | None
    labels: list[str] | list[tuple[str, ...]] | None

    @property
    def is_multi_label(self) -> bool:
        """Whether a row has a tuple of labels."""
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
    raise ValueError(f"a label must be an integer or a string, found {shown(value)}")


def _is_integer_name(name: str) -> bool:
    return re.fullmatch(r"0|-?[1-9][0-9]*", name) is not None


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Integers first, by value; then the other names, by code point."""

    def order(name: str) -> tuple[int, int, str]:
        return (0, int(name), "") if _is_integer_name(name) else (1, 0, name)

    return tuple(sorted(set(names), key=order))


def folded(text: str) -> str:
    """A text without what case and blanks alone make different."""
    return " ".join(text.split()).casefold()


def warn_of_similar(path: Path, labels: Iterable[str]) -> None:
    """Log a warning if labels, one or more a row, differ by blanks or case alone: few mean two by them."""
    counts = Counter(labels)
    groups: dict[str, list[str]] = {}
    for name in sorted(counts):
        groups.setdefault(folded(name), []).append(name)
    similar = [names for names in groups.values() if len(names) > 1]
    if similar:
        shown = "; ".join(
            ", ".join(f"{name!r} ({counts[name]} rows)" for name in names[:_SHOWN_LABELS])
            for names in similar[:_SHOWN_ERRORS]
        )
        logger.warning(
            "%s has labels that differ by blanks or case alone, %d groups of them: %s. Each is learned as a label of "
            "its own; write them alike if they are one.",
            path,
            len(similar),
            shown,
        )


def row_label(row: Row) -> str | tuple[str, ...] | None:
    """The label of a row as names; None where it has none.

    Raises:
        ValueError: If it is no label.
    """
    if row.label is None:
        return None
    if isinstance(row.label, list | tuple):
        names = tuple(_label_name(value) for value in row.label)
        if len(set(names)) < len(names):
            raise ValueError(f"a label is given twice: {shown(list(names))}")
        return names
    return _label_name(row.label)


def read_table(path: str | os.PathLike[str], columns: Columns, *, with_labels: bool) -> Table:
    """Read a whole file of which every row must be good."""
    path = Path(path)
    lines = array("q")
    texts, pairs = TextCollector(), TextCollector()
    labels: list[str | tuple[str, ...]] = []
    # A file has millions of labels and few different ones: each is kept once.
    known: dict[str | tuple[str, ...], str | tuple[str, ...]] = {}
    has_pair, has_label = _Presence("second text", columns.pair), _Presence("label", columns.label)
    bad: list[BadRow] = []
    num_bad = 0
    with open_columns(path, columns) as stream:
        is_csv = stream.format in (".csv", ".tsv")
        for row in stream:
            label = None
            if isinstance(row, Row) and with_labels:
                try:
                    label = row_label(row)
                except ValueError as err:
                    row = BadRow(row.line, str(err))
            if isinstance(row, BadRow):
                num_bad += 1
                if len(bad) < _SHOWN_ERRORS:
                    bad.append(row)
                continue
            if is_csv and isinstance(label, str) and re.fullmatch(r"\[.*\]", label, re.DOTALL):
                raise ValueError(
                    f"{path}, line {row.line}: the label {label!r} looks like a list. CSV and TSV hold one label a "
                    "row; for several labels a row use .jsonl with a JSON list, or .parquet."
                )
            lines.append(row.line)
            texts.append(row.text)
            has_pair.note(row.line, row.text_pair is not None)
            if row.text_pair is not None:
                pairs.append(row.text_pair)
            has_label.note(row.line, label is not None)
            if label is not None:
                labels.append(known.setdefault(label, label))
    if num_bad:
        listed = "".join(f"\n  line {row.line}: {row.reason}" for row in bad)
        more = f"\n  and {num_bad - len(bad)} more" if num_bad > len(bad) else ""
        raise ValueError(
            f"{path} has {num_bad} bad rows beside {len(lines)} good ones; all rows of a training or evaluation file "
            f"must be good. Mend or remove them:{listed}{more}"
        )
    has_pair.check(path)
    has_label.check(path)
    if len({isinstance(label, tuple) for label in known}) > 1:
        where = next(n for n, label in enumerate(labels) if isinstance(label, tuple) != isinstance(labels[0], tuple))
        raise ValueError(
            f"{path} has both single labels and lists of labels, first on lines {lines[0]} and {lines[where]}; "
            "write every label as a list, or none."
        )
    return Table(
        path=path,
        lines=lines,
        texts=texts.finish(),
        text_pairs=pairs.finish() if has_pair.count else None,
        labels=cast("list[str] | list[tuple[str, ...]]", labels) if labels else None,
    )


class _Presence:
    """Which rows have a column filled: all and none are fine, some are not."""

    def __init__(self, meaning: str, column: str) -> None:
        self.meaning = meaning
        self.column = column
        self.count = 0
        self.missing = 0
        self.first: dict[bool, int] = {}

    def note(self, line: int, has: bool) -> None:
        self.first.setdefault(has, line)
        if has:
            self.count += 1
        else:
            self.missing += 1

    def check(self, path: Path) -> None:
        if self.count and self.missing:
            raise ValueError(
                f"{path} has {self.count} rows with a {self.meaning} and {self.missing} without, first on lines "
                f"{self.first[True]} and {self.first[False]}; fill column {self.column!r} in all rows or in none."
            )


def encode_table(table: Table, label_names: Sequence[str] | None, *, multi_label: bool) -> Split:
    """Turn a table's label names into ids."""
    labels = table.labels
    if labels is None or label_names is None:
        return Split(table.texts, table.text_pairs, None, table.path.name)
    if table.is_multi_label != multi_label:
        kinds = ("one label a row", "lists of labels")
        raise ValueError(
            f"{table.path} has {kinds[not multi_label]}, the training file {kinds[multi_label]}; write them alike."
        )
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
        return Split(table.texts, table.text_pairs, hot, table.path.name)
    single = (lookup(cast(str, name), line) for name, line in zip(labels, table.lines, strict=True))
    return Split(table.texts, table.text_pairs, np.fromiter(single, np.int64, count=len(labels)), table.path.name)


def load_split(
    path: str | os.PathLike[str],
    *,
    label_names: Sequence[str] | None = None,
    text_column: str = "text",
    text_pair_column: str = PAIR_COLUMN,
    label_column: str = "label",
    quoting: bool | None = None,
    require_label: bool = False,
    multi_label: bool | None = None,
) -> Split:
    """Read one whole file as a split, with label ids that index the names given.

    Every row of the file is in the split, in the file's order; a file with a bad row is refused.

    Args:
        path: A file whose name ends with one of `FORMATS`; or a pipe, or ``-`` for standard input.
        label_names: The known labels, by id. None: labels are not read, whatever the file holds, since ids without
            names would mean something else in each file.
        text_column: Column of the text.
        text_pair_column: Column of the second text; absent means single texts.
        label_column: Column of the label: integers or strings, or lists of them for a multi-label task.
        quoting: Whether fields of CSV and TSV may be quoted; see `geep.data.read_rows`.
        require_label: Whether a file without labels is refused.
        multi_label: Whether the labels known are those of a multi-label task; a file of the other kind is refused.
            None: either kind is read.

    Returns:
        The split; its labels are None where the file has none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If rows are bad (the first are listed with their lines), only some rows have a label or a second
            text, or a label is not among the known ones or of the other kind.
    """
    columns = Columns(text_column, text_pair_column, label_column, require_label, quoting)
    table = read_table(path, columns, with_labels=label_names is not None)
    return encode_table(table, label_names, multi_label=table.is_multi_label if multi_label is None else multi_label)


def subset(split: Split, limit: int, seed: int) -> Split:
    """Draw at most `limit` rows, in their order."""
    if limit >= len(split):
        return split
    return split.select(np.sort(np.random.default_rng(seed).permutation(len(split))[:limit]))
