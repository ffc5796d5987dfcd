"""Rows of a source in chunks, and a digest by which a later run knows those that are done."""

from __future__ import annotations

import hashlib
import marshal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq

from geep.data.parquet import ArrowFields, carried
from geep.data.rows import BadRow, Row

# Characters of a chunk from which on it is closed before it has all its rows: a bound on memory for long rows.
_MAX_CONTENT = 64 * 2**20


@dataclass(frozen=True)
class Chunk:
    """Rows that are read, predicted and written together.

    Attributes:
        rows: Good and bad ones, in the source's order.
        is_last: Whether the source has no rows after these.
        failure: Why there may be rows after these that cannot be read; None where reading went well.
    """

    rows: list[Row | BadRow]
    is_last: bool = False
    failure: ValueError | OSError | None = None

    @cached_property
    def good(self) -> list[Row]:
        """The rows that can be predicted."""
        return [row for row in self.rows if isinstance(row, Row)]

    @cached_property
    def bad(self) -> list[BadRow]:
        """The rows that cannot."""
        return [row for row in self.rows if isinstance(row, BadRow)]


def in_chunks(rows: Iterable[Row | BadRow], chunk_rows: int) -> Iterator[Chunk]:
    """Divide rows; every chunk has `chunk_rows` rows but the last, and but the one that ends in a failure.

    Of long rows there are fewer: about 64 Mi characters close a chunk. Where one ends depends on the rows alone.
    """
    held: list[Row | BadRow] = []
    content = 0
    failure = None
    try:
        for row, length in _measured(rows):
            if len(held) == chunk_rows or content >= _MAX_CONTENT:
                yield Chunk(held)
                held, content = [], 0
            held.append(row)
            content += length
    except (ValueError, OSError) as err:
        failure = err
    if failure is None:
        if held:
            yield Chunk(held, is_last=True)
        return
    if len(held) == chunk_rows or content >= _MAX_CONTENT:
        yield Chunk(held)
        held = []
    yield Chunk(held, failure=failure)


def _measured(rows: Iterable[Row | BadRow]) -> Iterator[tuple[Row | BadRow, int]]:
    """Rows with the characters of their values, roughly; of Parquet with the bytes that Arrow holds for each."""
    part, share = None, 0
    for row in rows:
        if isinstance(row, BadRow):
            yield row, len(row.reason)
        elif isinstance(row.fields, ArrowFields):
            if row.fields.part is not part:
                part = row.fields.part
                share = part.batch.nbytes // part.batch.num_rows
            yield row, share
        else:
            yield row, sum(map(_length, row.fields.values()))


def _length(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return 8 + sum(map(_length, value))
    if isinstance(value, dict):
        return 8 + sum(len(name) + _length(item) for name, item in value.items())
    return 8


def chained(digest: str, chunk: Chunk) -> str:
    """The digest of a chunk and, through that given, of all before it: other lines, columns or values, another one."""
    table = carried(chunk.good)
    said = [
        [(row.line, row.reason) for row in chunk.bad],
        [row.line for row in chunk.good],
        [row.fields for row in chunk.good] if table is None else None,
    ]
    # `marshal` is the fastest writer of plain values; its version 2 writes equal ones as equal bytes, always.
    found = hashlib.sha256(digest.encode() + marshal.dumps(said, 2))
    if table is not None:
        found.update(_bytes_of(table))
    return found.hexdigest()


def _bytes_of(table: pa.Table) -> memoryview:
    """A table as bytes that do not depend on how it is held in memory, which Arrow's own bytes do."""
    buffer = pa.BufferOutputStream()
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False, "store_schema": False}
    pq.write_table(table, buffer, row_group_size=max(table.num_rows, 1), **options)
    return memoryview(buffer.getvalue())
