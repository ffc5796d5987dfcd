"""Columns that are larger than memory: written to a file without a name, then mapped.

What the columns mean is not known here.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref

import pyarrow as pa


class Spool:
    """Record batches on their way to disk, in the temporary folder (`TMPDIR` says which).

    The file is gone with whoever reads it: once mapped it has no name any more, and one that is never mapped is removed
    together with its spool.
    """

    def __init__(self, schema: pa.Schema) -> None:
        handle, self._path = tempfile.mkstemp(prefix="geep-", suffix=".arrow")
        os.close(handle)
        self._remove = weakref.finalize(self, _unlink, self._path)
        self._sink = pa.OSFile(self._path, "wb")
        self._writer = pa.ipc.new_file(self._sink, schema)

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows."""
        self._writer.write_batch(batch)

    def map(self) -> list[pa.RecordBatch]:
        """End the file and return what was written, as it was cut; pages are read when they are looked at."""
        self._writer.close()
        self._sink.close()
        reader = pa.ipc.open_file(pa.memory_map(self._path))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._remove()
        return batches


def _unlink(path: str) -> None:
    # Windows keeps the name of a file while it is mapped; there it stays in the temporary folder.
    with contextlib.suppress(FileNotFoundError, PermissionError):
        os.unlink(path)
