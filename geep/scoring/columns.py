"""Columns of a result, and its values as text."""

from __future__ import annotations

import base64
import datetime
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from geep.data.formats import read_header, read_rows
from geep.data.rows import Row

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


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
    def of(
        cls, source: Path, source_format: str, added: pa.Schema, text_column: str, text_pair_column: str
    ) -> ResultColumns:
        """Find the columns of a result: declared by the source, or gathered from its rows by reading it once."""
        header = read_header(source)
        as_json = []
        if source_format == ".parquet":
            schema = pq.read_schema(source)
            renamed = result_names(schema.names, added.names)
            fields = [item.with_name(renamed[item.name]) for item in schema]
            return cls(renamed, pa.schema(fields), frozenset(), added)
        if header is not None:
            types = dict.fromkeys(header, pa.string())
        else:
            kinds: dict[str, set[str]] = {}
            for row in read_rows(source, text_column=text_column, text_pair_column=text_pair_column):
                if isinstance(row, Row):
                    for name, value in row.fields.items():
                        kinds.setdefault(name, set()).add(_kind(value))
            types = {name: _type_of(found - {"null"}) for name, found in kinds.items()}
            as_json = [name for name, kind in types.items() if kind is None]
            types = {name: pa.string() if kind is None else kind for name, kind in types.items()}
        renamed = result_names(types, added.names)
        schema = pa.schema([(renamed[name], kind) for name, kind in types.items()])
        return cls(renamed, schema, frozenset(renamed[name] for name in as_json), added)

    @property
    def names(self) -> list[str]:
        """All columns of the result, in order."""
        return [*self.schema.names, *self.added.names]

    def values(self, rows: Sequence[Row]) -> dict[str, list[object]]:
        """The source's columns of some rows, under their names in the result; None where a row lacks one."""
        unknown = set().union(*(row.fields for row in rows)) - self.renamed.keys()
        if unknown:
            raise ValueError(
                f"Rows up to line {rows[-1].line} of the source have columns {sorted(unknown)} that it did not have "
                "when it was looked through for its columns; do not change it while it is scored, and run again."
            )
        return {new: [row.fields.get(name) for row in rows] for name, new in self.renamed.items()}

    def arrays(self, rows: Sequence[Row]) -> dict[str, pa.Array]:
        """The same columns as typed arrays."""
        columns = self.values(rows)
        for name, new in self.renamed.items():
            if new in self.as_json:
                columns[new] = [json_text(row.fields[name]) if name in row.fields else None for row in rows]
        return {item.name: pa.array(columns[item.name], type=item.type) for item in self.schema}


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


def plain_value(value: object) -> object:
    """A value that JSON lacks as one that it has: Parquet holds dates, decimals, bytes and NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | int | None):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value)


def json_text(value: object) -> str:
    """A value as JSON; what JSON lacks is written as what comes nearest."""
    try:
        return _encode(value)
    except (TypeError, ValueError):
        return _encode(plain_value(value))


def json_line(value: object) -> str:
    """A value as a line of JSON."""
    return json_text(value) + "\n"


def csv_cell(value: object) -> str:
    """A value as a CSV field: strings as they are, nothing as nothing, the rest as JSON spells it."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        return repr(value)  # as JSON spells it
    if isinstance(value, dict | list):
        return json_text(value)
    plain = plain_value(value)
    return plain if isinstance(plain, str) else json_text(plain)
