"""Labels of some texts: asked for in a file, given back in any order and number. Why they are needed is not known here.

Read `SomeLabels`, `write_to_label`, `read_labels`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geep.data.formats import read_rows
from geep.data.rows import PAIR_COLUMN, Row, shown
from geep.data.splits import Split, Table, encode_table, folded, row_label

ID_COLUMN = "id"

_SHOWN = 5


@dataclass(frozen=True, eq=False)
class SomeLabels:
    """Labels of some rows of a split, or of a run of its texts.

    Attributes:
        rows: Positions of the rows that have a label, increasing, (num_labelled,).
        labels: Their labels, as `Split.labels` has them.
        labelled_by: In words, who gave them; empty where it is not known.
    """

    rows: NDArray[np.int64]
    labels: NDArray[np.int64] | NDArray[np.float32]
    labelled_by: str = ""

    def __post_init__(self) -> None:
        rows = self.rows
        if rows.ndim != 1 or len(rows) != len(self.labels):
            raise ValueError(f"Found {len(self.labels)} labels of rows of shape {rows.shape}, expected one a row.")
        if len(rows) and (rows[0] < 0 or (np.diff(rows) <= 0).any()):
            raise ValueError("The rows that have a label must increase from 0 or more; sort them and their labels.")

    @classmethod
    def none(cls) -> SomeLabels:
        """No row has a label yet."""
        return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def join(self, other: SomeLabels) -> SomeLabels:
        """Return the labels of both.

        Raises:
            ValueError: If they have different labels for a row.
        """
        if not len(self) or not len(other):
            return self if len(self) else other
        rows, first = np.unique(np.concatenate([self.rows, other.rows]), return_index=True)
        labels = np.concatenate([self.labels, other.labels])
        found = SomeLabels(rows, labels[first])
        differs = found.of(other.rows) != other.labels
        if differs.any():
            row = int(other.rows[differs.reshape(len(other), -1).any(1)][0])
            raise ValueError(f"Text {row} (from 0) has two labels; leave out the one that is wrong.")
        words = dict.fromkeys(filter(None, (self.labelled_by, other.labelled_by)))
        return replace(found, labelled_by=" and ".join(words))

    def of(self, rows: NDArray[np.int64]) -> NDArray[np.int64] | NDArray[np.float32]:
        """Labels of rows that all have one."""
        return self.labels[np.searchsorted(self.rows, rows)]

    def at(self, kept: NDArray[np.int64]) -> SomeLabels:
        """Labels of the split that `Split.select` makes of the rows `kept`, which increase."""
        place = np.searchsorted(kept, self.rows)
        stays = place < len(kept)
        stays[stays] = kept[place[stays]] == self.rows[stays]
        return replace(self, rows=place[stays], labels=self.labels[stays])


def text_id(text: str | Sequence[str]) -> str:
    """Name of a text, or a pair, in a file of labels: the same text has the same one in any file and order."""
    parts = (text,) if isinstance(text, str) else text
    raw = json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass")
    # Begins with a letter, so that no spreadsheet takes it for a number.
    return f"t{hashlib.sha256(raw).hexdigest()[:15]}"


def write_to_label(
    path: str | os.PathLike[str],
    texts: Split,
    rows: Sequence[int] | NDArray[np.int64],
    *,
    known: SomeLabels,
    label_names: Sequence[str],
) -> Path:
    """Write JSON lines that ask for labels, and return their path: `id`, `text` (`text_pair`) and an empty `label`.

    Labels that are known stand in them too, so that no work is lost; copies of a text are asked once. What the models
    answered is not said: who labels must not be led by it.

    Args:
        path: The file; it is replaced whole.
        texts: The texts.
        rows: Positions of those whose labels are asked for.
        known: Labels that are known already.
        label_names: Names of the labels, by id.
    """
    lines: dict[str, str] = {}
    is_multi = known.labels.ndim == 2
    for row, label in zip(known.rows.tolist(), known.labels, strict=True):
        names = [name for name, on in zip(label_names, label, strict=True) if on] if is_multi else None
        lines.setdefault(*_line(texts, row, label_names[int(label)] if names is None else names))
    for row in np.asarray(rows, dtype=np.int64).tolist():
        lines.setdefault(*_line(texts, row, None))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text("".join(f"{line}\n" for line in lines.values()), encoding="utf-8", errors="surrogatepass")
    return partial.replace(path)


def _line(texts: Split, row: int, label: str | list[str] | None) -> tuple[str, str]:
    """Id and line of a text."""
    text = texts.inputs[row]
    parts = {"text": text} if isinstance(text, str) else {"text": text[0], PAIR_COLUMN: text[1]}
    name = text_id(text)
    return name, json.dumps({ID_COLUMN: name, **parts, "label": label}, ensure_ascii=False)


def read_labels(
    path: str | os.PathLike[str],
    texts: Split,
    *,
    label_names: Sequence[str],
    multi_label: bool,
    labelled_by: str = "",
    label_column: str = "label",
) -> SomeLabels:
    """Read what became of a file of `write_to_label`: any of its rows, in any order and format, with other columns too.

    A row whose label is empty is not labelled yet. Where the text stands beside its id, the two must belong together.

    Args:
        path: The file, with columns `id` and `label`.
        texts: The texts that the rows were asked of. Copies of a text all get its label.
        label_names: Names of the labels, by id.
        multi_label: Whether a text has any number of labels and not exactly one.
        labelled_by: In words, who gave them; empty: the file's name.
        label_column: Column of the label.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a row is bad, an id is of none of the texts or not of the text beside it, or is labelled twice
            and otherwise; or a label is none of the names.
    """
    path = Path(path)
    places: dict[str, list[int]] = {}
    for number, text in enumerate(texts.inputs):
        places.setdefault(text_id(text), []).append(number)
    known: dict[str, tuple[int, str | tuple[str, ...]]] = {}
    bad: list[str] = []
    for row in read_rows(path, text_column=ID_COLUMN, label_column=label_column):
        try:
            if not isinstance(row, Row):
                raise ValueError(row.reason)
            _check_text(row, places, texts)
            label = row_label(row)
            if label is not None and known.setdefault(row.text, (row.line, label))[1] != label:
                raise ValueError(f"id {row.text!r} has another label than in line {known[row.text][0]}")
        except ValueError as error:
            bad.append(f"\n  line {row.line}: {error}")
    if bad:
        raise ValueError(
            f"{path} has {len(bad)} rows that give no label to one of the {len(texts):,} texts; expected the ids that "
            f"were asked for. Mend them, or give the texts that they were written of:{''.join(bad[:_SHOWN])}"
        )
    if not known:
        return SomeLabels.none()
    lines, names = zip(*known.values(), strict=True)
    table = Table(path=path, lines=lines, texts=list(known), text_pairs=None, labels=list(names))
    labels = encode_table(table, label_names, multi_label=multi_label).labels
    counts = [len(places[name]) for name in known]
    rows = np.concatenate([places[name] for name in known]).astype(np.int64)
    order = np.argsort(rows)
    return SomeLabels(rows[order], np.repeat(np.asarray(labels), counts, axis=0)[order], labelled_by or path.name)


def _check_text(row: Row, places: dict[str, list[int]], texts: Split) -> None:
    """Refuse an id that is of no text, or of another than stands beside it; tools may change case and blanks."""
    if row.text not in places:
        raise ValueError(f"id {shown(row.text)} is of none of the texts")
    own = texts.inputs[places[row.text][0]]
    for name, part in zip(("text", PAIR_COLUMN), (own,) if isinstance(own, str) else own, strict=False):
        beside = row.fields.get(name)
        if isinstance(beside, str) and folded(beside) != folded(part):
            raise ValueError(f"the {name} {shown(beside)} is not the one that id {row.text!r} is of")
