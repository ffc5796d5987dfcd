"""Texts as sequences, in memory while they fit and in a mapped file from there on.

Read `TextCollector`, which decides where texts go, then `MappedTexts`. Labels and files are not known here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from geep.data.spool import Spool

# Characters of one column that are held as Python strings; what is longer goes to disk. A quarter of a GiB, and as much
# again while it is read, is less than the model, its gradients and AdamW's two moments take beside it. Counted as the
# texts come, for neither a .gz nor a .parquet file says by its size how long its texts are.
_MOST_IN_MEMORY = 256 * 2**20

# Texts written, and read while iterating, at a time.
_CHUNK_ROWS = 4096
_CHUNK_CHARS = 16 * 2**20


class MappedTexts(Sequence[str]):
    """Texts that lie in a mapped file and become strings one by one, or some thousands at a time while iterating.

    Choosing and joining rows copies no text. Equal to any sequence of the same texts.
    """

    __slots__ = ("_chunks", "_index", "_starts")

    def __init__(self, chunks: Sequence[pa.Array], index: NDArray[np.int64] | None = None) -> None:
        """Make a sequence of the texts at some places.

        Args:
            chunks: Arrow arrays of strings, one after another.
            index: Places in the chunks, counted through, of the texts, (num_texts,). None: all, as they lie.
        """
        self._chunks = [chunk for chunk in chunks if len(chunk)]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._chunks)]).tolist()
        self._index = index

    def __len__(self) -> int:
        return self._starts[-1] if self._index is None else len(self._index)

    @overload
    def __getitem__(self, item: int) -> str: ...

    @overload
    def __getitem__(self, item: slice) -> MappedTexts: ...

    def __getitem__(self, item: int | slice) -> str | MappedTexts:
        if isinstance(item, slice):
            return self.select(np.arange(*item.indices(len(self)), dtype=np.int64))
        if not -len(self) <= item < len(self):
            raise IndexError(f"There are {len(self)} texts, asked for number {item}.")
        place = item % len(self)
        if self._index is not None:
            place = int(self._index[place])
        chunk = bisect_right(self._starts, place) - 1
        return self._chunks[chunk][place - self._starts[chunk]].as_py()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _CHUNK_ROWS):
            yield from self._read(self._places(start, min(start + _CHUNK_ROWS, len(self))))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> MappedTexts:
        """Return the texts at these positions, in the order given; a position may come more than once."""
        chosen = np.asarray(indices, dtype=np.int64)
        chosen = np.where(chosen < 0, chosen + len(self), chosen)
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise IndexError(f"There are {len(self)} texts, asked for numbers {chosen.min()} to {chosen.max()}.")
        return MappedTexts(self._chunks, chosen if self._index is None else self._index[chosen])

    def join(self, other: MappedTexts) -> MappedTexts:
        """Return these texts and the others after them."""
        chunks = [*self._chunks, *other._chunks]
        if self._index is None and other._index is None:
            return MappedTexts(chunks)
        places = [self._places(0, len(self)), other._places(0, len(other)) + self._starts[-1]]
        return MappedTexts(chunks, np.concatenate(places))

    def _places(self, start: int, stop: int) -> NDArray[np.int64]:
        return np.arange(start, stop, dtype=np.int64) if self._index is None else self._index[start:stop]

    def _read(self, places: NDArray[np.int64]) -> list[str]:
        chunk_of = np.searchsorted(self._starts, places, side="right") - 1
        order = np.argsort(chunk_of, kind="stable")
        texts = np.empty(len(places), dtype=object)
        for at in np.split(order, np.flatnonzero(np.diff(chunk_of[order])) + 1):
            if len(at):
                chunk = chunk_of[at[0]]
                texts[at] = self._chunks[chunk].take(pa.array(places[at] - self._starts[chunk])).to_pylist()
        return texts.tolist()


class PairedTexts(Sequence[tuple[str, str]]):
    """Two sequences of texts, side by side: pairs are made when they are looked at."""

    __slots__ = ("_first", "_second")

    def __init__(self, first: Sequence[str], second: Sequence[str]) -> None:
        self._first = first
        self._second = second

    def __len__(self) -> int:
        return len(self._first)

    @overload
    def __getitem__(self, item: int) -> tuple[str, str]: ...

    @overload
    def __getitem__(self, item: slice) -> PairedTexts: ...

    def __getitem__(self, item: int | slice) -> tuple[str, str] | PairedTexts:
        if isinstance(item, slice):
            return PairedTexts(self._first[item], self._second[item])
        return self._first[item], self._second[item]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return zip(self._first, self._second, strict=True)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class TextCollector:
    """Takes the texts of a column one by one and keeps them in memory, or on disk once they are too many."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._chars = 0
        self._spool: Spool | None = None

    def append(self, text: str) -> None:
        """Add a text."""
        self._texts.append(text)
        self._chars += len(text)
        if self._spool is None:
            if self._chars > _MOST_IN_MEMORY:
                self._spool = Spool(_SCHEMA)
                self._flush(self._spool)
        elif len(self._texts) >= _CHUNK_ROWS or self._chars > _CHUNK_CHARS:
            self._flush(self._spool)

    def finish(self) -> Sequence[str]:
        """Return all texts that were added, in order."""
        if self._spool is None:
            return self._texts
        self._flush(self._spool)
        return MappedTexts([batch.column(0) for batch in self._spool.map()])

    def _flush(self, spool: Spool) -> None:
        for start in range(0, len(self._texts), _CHUNK_ROWS):
            column = pa.array(self._texts[start : start + _CHUNK_ROWS], pa.large_string())
            spool.write(pa.record_batch([column], schema=_SCHEMA))
        self._texts, self._chars = [], 0


_SCHEMA = pa.schema([("text", pa.large_string())])


def select_texts(texts: Sequence[str], indices: NDArray[np.int64]) -> Sequence[str]:
    """Return the texts at some positions; those in a mapped file stay there."""
    return texts.select(indices) if isinstance(texts, MappedTexts) else [texts[i] for i in indices.tolist()]


def join_texts(first: Sequence[str], second: Sequence[str]) -> Sequence[str]:
    """Return the texts of both, one after another; those in a mapped file stay there."""
    if isinstance(first, MappedTexts) or isinstance(second, MappedTexts):
        return _mapped(first).join(_mapped(second))
    return [*first, *second]


def _mapped(texts: Sequence[str]) -> MappedTexts:
    return texts if isinstance(texts, MappedTexts) else MappedTexts([pa.array(texts, pa.large_string())])
