"""Texts and labels as the rows of Hugging Face's Trainer, as many as the disk holds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from geep.data.spool import Spool
from geep.progress import Progress, no_progress

# Enough for a fast tokenizer to keep all cores busy; few enough that lists of ids stay small.
_CHUNK_ROWS = 4096


class EncodedRows(Sequence[dict[str, Any]]):
    """Rows of token ids and labels in a mapped file: each becomes a dictionary of lists when it is looked at."""

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        self._batches = [
            {name: _Column(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
            for batch in batches
        ]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, item: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, item: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, item: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(item, slice):
            return [self[i] for i in range(*item.indices(len(self)))]
        if not -len(self) <= item < len(self):
            raise IndexError(f"There are {len(self)} rows, asked for number {item}.")
        place = item % len(self)
        batch = place // _CHUNK_ROWS  # every batch but the last one is full
        at = place - batch * _CHUNK_ROWS
        return {name: column[at] for name, column in self._batches[batch].items()}

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, (num_rows,), without a look at any of them."""
        found = [batch["input_ids"].lengths for batch in self._batches]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def digest(self) -> str:
        """Digest ids and labels, as `digest_rows` does, without making rows."""
        hashes = _Hashes()
        for batch in self._batches:
            ids, labels = batch["input_ids"], batch["labels"]
            hashes.update(ids.values, ids.lengths, labels.values)
        return hashes.hexdigest()


class _Column:
    """A column of numbers, one a row or a list a row, seen through its Arrow buffers."""

    __slots__ = ("offsets", "values")

    def __init__(self, column: pa.Array) -> None:
        self.offsets: NDArray[np.int32] | None = None
        if pa.types.is_list(column.type):
            self.offsets = column.offsets.to_numpy()
        self.values: NDArray[Any] = (column if self.offsets is None else column.values).to_numpy()

    @property
    def lengths(self) -> NDArray[np.int64]:
        if self.offsets is None:
            return np.ones(len(self.values), dtype=np.int64)
        return np.diff(self.offsets).astype(np.int64)

    def __getitem__(self, at: int) -> Any:
        if self.offsets is None:
            return self.values[at].item()
        return self.values[self.offsets[at] : self.offsets[at + 1]].tolist()


class _Hashes:
    """Digests of streams of ids, lengths and labels: how they were cut does not matter."""

    def __init__(self) -> None:
        self._streams = [hashlib.sha256() for _ in range(3)]

    def update(self, ids: Any, lengths: Any, labels: Any) -> None:
        for stream, values, kind in zip(self._streams, (ids, lengths, labels), ("<i4", "<i8", "<f8"), strict=True):
            stream.update(np.ascontiguousarray(values, dtype=kind).tobytes())

    def hexdigest(self) -> str:
        return hashlib.sha256(b"".join(stream.digest() for stream in self._streams)).hexdigest()


def digest_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Digest ids and labels of rows: equal rows have equal digests, wherever they are kept."""
    if isinstance(rows, EncodedRows):
        return rows.digest()
    hashes = _Hashes()
    for row in rows:
        hashes.update(row["input_ids"], [len(row["input_ids"])], row["labels"])
    return hashes.hexdigest()


def lengths_of(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Tokens of each row."""
    if isinstance(rows, EncodedRows):
        return rows.lengths.tolist()
    return [len(row["input_ids"]) for row in rows]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[str] | Sequence[tuple[str, str]],
    labels: Any,
    *,
    max_length: int,
    progress: Progress = no_progress,
) -> EncodedRows:
    """Turn texts or text pairs and their labels into the Trainer's rows, one a text, not padded.

    Some thousand texts are held at a time; their tokens go to a file in the temporary folder (`TMPDIR` says which) that
    is gone with the rows. There is no second way for small data: it would not be faster.

    Args:
        tokenizer: The model's.
        inputs: Texts or pairs of texts.
        labels: Label ids (num_texts,), or ones and zeros (num_texts, num_labels).
        max_length: Longest text in tokens; what is longer is cut.
        progress: Told how many texts are done.

    Raises:
        ValueError: If there are not as many labels as texts.
    """
    labels = np.asarray(labels)
    if len(labels) != len(inputs):
        raise ValueError(f"Every text needs a label: got {len(inputs)} texts and {len(labels)} labels.")
    if not len(inputs):
        return EncodedRows([])
    spool: Spool | None = None
    for start in range(0, len(inputs), _CHUNK_ROWS):
        part = list(inputs[start : start + _CHUNK_ROWS])
        pairs = isinstance(part[0], tuple)
        columns = tokenizer(
            [text[0] for text in part] if pairs else part,
            [text[1] for text in part] if pairs else None,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
        )
        names = [name for name in ("input_ids", "token_type_ids") if name in columns]
        arrays = [pa.array(columns[name], pa.list_(pa.int32())) for name in names]
        batch = pa.record_batch([*arrays, _label_array(labels[start : start + len(part)])], [*names, "labels"])
        if spool is None:
            spool = Spool(batch.schema)
        spool.write(batch)
        progress("tokenising", start + len(part), len(inputs))
    assert spool is not None, "there is at least one text"
    return EncodedRows(spool.map())


def _label_array(labels: NDArray[Any]) -> pa.Array:
    if labels.ndim == 1:
        return pa.array(labels.astype(np.int64))
    return pa.array(list(labels.astype(np.float32)), pa.list_(pa.float32()))
