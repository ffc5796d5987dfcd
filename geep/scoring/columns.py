"""Columns of a result: their names, and their types where a format declares them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from geep.data.parquet import carried, columns_of
from geep.data.rows import BadRow, Row
from geep.scoring.values import json_text


def result_names(names: Mapping[str, object] | Sequence[str], ours: Collection[str]) -> dict[str, str]:
    """The name in the result of each column of the source: its own, unless it is one of ours."""
    out = {}
    for name in names:
        new = name
        while new in ours or (new != name and new in names):
            new = f"input_{new}"
        out[name] = new
    return out


@dataclass(frozen=True)
class ResultColumns:
    """Columns of a result that must declare them.

    Attributes:
        renamed: Names in the result by names in the source, in order.
        schema: Types of the source's columns under their names in the result; the added ones are not in it.
        as_json: Columns, under their names in the result, that no Parquet type holds (lists, objects, strings beside
            numbers) and that Parquet gets as JSON text.
        added: Types of the added columns.
    """

    renamed: dict[str, str]
    schema: pa.Schema
    as_json: frozenset[str]
    added: pa.Schema

    @classmethod
    def of_schema(cls, schema: pa.Schema, added: pa.Schema) -> ResultColumns:
        """The columns that a Parquet file declares; all metadata stays, under the names in the result."""
        renamed = result_names(schema.names, added.names)
        fields = [item.with_name(renamed[item.name]) for item in schema]
        return cls(renamed, pa.schema(fields, metadata=_renamed_metadata(schema.metadata, renamed)), frozenset(), added)

    @classmethod
    def of_header(cls, names: Iterable[str], added: pa.Schema) -> ResultColumns:
        """The columns that a header declares: strings all."""
        return cls._of_types(dict.fromkeys(names, pa.string()), added)

    @classmethod
    def of_rows(cls, rows: Iterable[Row | BadRow], added: pa.Schema) -> ResultColumns:
        """The columns gathered from rows, each with the type of its values."""
        kinds: dict[str, set[str]] = {}
        for row in rows:
            if isinstance(row, Row):
                for name, value in row.fields.items():
                    kinds.setdefault(name, set()).add(_kind(value))
        return cls._of_types({name: _type_of(found - {"null"}) for name, found in kinds.items()}, added)

    @classmethod
    def _of_types(cls, types: Mapping[str, pa.DataType | None], added: pa.Schema) -> ResultColumns:
        renamed = result_names(types, added.names)
        as_json = frozenset(renamed[name] for name, kind in types.items() if kind is None)
        fields = [(renamed[name], pa.string() if kind is None else kind) for name, kind in types.items()]
        return cls(renamed, pa.schema(fields), as_json, added)

    @property
    def digest(self) -> str:
        """Of names and types: other ones give another digest."""
        return hashlib.sha256(self.schema.serialize()).hexdigest()

    @property
    def names(self) -> list[str]:
        """All columns of the result, in order."""
        return [*self.schema.names, *self.added.names]

    def misfit(self, row: Row, *, typed: bool) -> str | None:
        """Why a row does not fit columns that were gathered before it was read; None where it does.

        Args:
            row: A row of JSON lines.
            typed: Whether its values must be of the columns' types too.
        """
        for name, value in row.fields.items():
            new = self.renamed.get(name)
            if new is None:
                return f"column {name!r} is not among those of the first rows: {list(self.renamed)}"
            if typed and new not in self.as_json and not _holds(self.schema.field(new).type, _kind(value)):
                kind = self.schema.field(new).type
                return f"column {name!r} holds {kind} in the first rows, found {json_text(value)[:60]}"
        return None

    def values(self, rows: Sequence[Row]) -> dict[str, list[Any]]:
        """The source's columns of some rows, under their names in the result; None where a row lacks one."""
        columns = columns_of(rows)
        if columns is not None:
            return {new: columns[name] for name, new in self.renamed.items()}
        self._check_known(rows)
        return {new: [row.fields.get(name) for row in rows] for name, new in self.renamed.items()}

    def _check_known(self, rows: Sequence[Row]) -> None:
        unknown = set().union(*(row.fields for row in rows)) - self.renamed.keys()
        if unknown:
            raise ValueError(
                f"Rows up to line {rows[-1].line} of the source have columns {sorted(unknown)} that it did not have "
                "when it was looked through for its columns; do not change it while it is scored, and run again."
            )

    def arrays(self, rows: Sequence[Row]) -> dict[str, pa.ChunkedArray | pa.Array]:
        """The same columns as typed arrays; those of Parquet files as they were read."""
        table = carried(rows)
        if table is not None:
            return {new: table.column(name) for name, new in self.renamed.items()}
        columns = self.values(rows)
        for name, new in self.renamed.items():
            if new in self.as_json:
                columns[new] = [json_text(row.fields[name]) if name in row.fields else None for row in rows]
        return {item.name: pa.array(columns[item.name], type=item.type) for item in self.schema}


def _renamed_metadata(metadata: Mapping[bytes, bytes] | None, renamed: Mapping[str, str]) -> dict[bytes, bytes] | None:
    """Metadata of a schema; pandas writes names of columns into it, and would read ours as the columns they were."""
    if metadata is None or b"pandas" not in metadata or all(old == new for old, new in renamed.items()):
        return None if metadata is None else dict(metadata)
    try:
        said = json.loads(metadata[b"pandas"])
        for column in said["columns"]:
            for key in ("name", "field_name"):
                column[key] = renamed.get(column.get(key), column.get(key))
        said["index_columns"] = [
            renamed.get(name, name) if isinstance(name, str) else name for name in said["index_columns"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return dict(metadata)  # not what pandas writes: no names that are known to be columns
    return {**metadata, b"pandas": json.dumps(said).encode()}


def _kind(value: object) -> str:
    """Kind of a JSON value, as far as a typed column can tell."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        if -(2**53) <= value <= 2**53:
            return "int"
        return "long" if -(2**63) <= value < 2**63 else "mixed"
    if isinstance(value, float):
        return "float"
    return "str" if isinstance(value, str) else "mixed"


def _type_of(kinds: set[str]) -> pa.DataType | None:
    """Type of a column that holds these kinds of value; None where only JSON text does."""
    if kinds == {"bool"}:
        return pa.bool_()
    if kinds and kinds <= {"int", "long"}:
        return pa.int64()
    if kinds and kinds <= {"int", "float"}:  # integers beyond 2**53 would change as floats
        return pa.float64()
    return pa.string() if kinds <= {"str"} else None


def _holds(kind: pa.DataType, value: str) -> bool:
    """Whether a column of a type holds a kind of value without changing it."""
    held = {pa.bool_(): {"bool"}, pa.int64(): {"int", "long"}, pa.float64(): {"int", "float"}, pa.string(): {"str"}}
    return value == "null" or value in held[kind]
