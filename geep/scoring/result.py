"""A result while it is written: a file that can be continued, or standard output."""

from __future__ import annotations

import contextlib
import errno
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import NoReturn, Protocol

from geep.data.rows import BadRow, Row
from geep.scoring.answers import Answers
from geep.scoring.journal import ByteFile, Journal, ResultFiles, stamp
from geep.scoring.sinks import Sink
from geep.scoring.values import json_line

logger = logging.getLogger(__name__)

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

# Rows left out of standard output that are said one by one.
_MAX_WARNINGS = 100

_PIPE = "run again from the beginning: what came through a pipe cannot be continued"


class Result(Protocol):
    """Takes rows with their answers, chunk by chunk; a context that is left when all is written."""

    def __enter__(self) -> Result:
        """Open what is written to."""

    def __exit__(self, *_: object) -> None:
        """Close it."""

    def write(self, rows: Sequence[Row], answers: Answers, bad: Sequence[BadRow]) -> None:
        """Append a chunk: rows, and rows left out."""

    def commit(self) -> None:
        """Note what the journal counts as whole."""

    def finish(self) -> None:
        """Complete the result and give it its name."""

    def stop(self, failure: ValueError | OSError, num_rows: int) -> NoReturn:
        """Raise, as the source cannot be read beyond this many rows, with what is done and how to go on."""


class FileResult:
    """A file, its list of rows left out, and the journal that tells what of both is whole.

    It is a context: what it opens is closed at its end. A part that is finished is not opened.
    """

    def __init__(
        self, files: ResultFiles, sink: Sink, journal: Journal, made_from: Mapping[str, object], *, can_continue: bool
    ) -> None:
        self.journal = journal
        self._files, self._sink, self._made_from = files, sink, made_from
        self._can_continue = can_continue
        self._rows_whole = journal.rows_read
        self._open = contextlib.ExitStack()

    def __enter__(self) -> FileResult:
        if self.journal.finished is None:
            with self._disk(), contextlib.ExitStack() as stack:
                self._errors = stack.enter_context(ByteFile(self._files.errors_partial, self.journal.error_bytes))
                self._rows = stack.enter_context(ByteFile(self._files.partial, self.journal.num_bytes))
                self.commit()  # in the place of a journal of another source, or of other settings
                self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def write(self, rows: Sequence[Row], answers: Answers, bad: Sequence[BadRow]) -> None:
        """Append a chunk; what the journal never comes to count is written over by a later run."""
        data = self._sink.chunk(rows, answers, is_first=self._rows.num_bytes == 0) if rows else b""
        with self._disk():
            self._errors.write("".join(json_line(asdict(row)) for row in bad).encode("utf-8"))
            self._rows.write(data)
            self._errors.sync()
            self._rows.sync()

    def commit(self) -> None:
        """Note what is whole, in the journal on disk."""
        self._measure()
        with self._disk():
            self.journal.write(self._files, self._made_from)
        self._rows_whole = self.journal.rows_read

    def _measure(self) -> None:
        self.journal.num_bytes, self.journal.error_bytes = self._rows.num_bytes, self._errors.num_bytes

    def finish(self) -> None:
        """Complete the file, note that only names are to be given, and give them."""
        with self._disk():
            if self.journal.finished is None:
                self._measure()
                self._rows.write(self._sink.ending(is_empty=self._rows.num_bytes == 0))
                self._rows.sync()
                self._open.close()
                self._sink.finish(self._files.partial, self._files.whole)
                self.journal.finished = stamp(self._files.whole)
                self.journal.write(self._files, self._made_from)
            self.journal.publish(self._files)

    def stop(self, failure: ValueError | OSError, num_rows: int) -> NoReturn:
        """Raise, as the source cannot be read beyond this many rows, with what is done and how to go on."""
        _stop(
            failure,
            f"What comes before is scored: {num_rows} rows of the source are done, in {self._files.partial}. "
            f"Mend the source and {self._how}.",
        )

    @property
    def _how(self) -> str:
        # A chunk that is not complete is scored again: the rows of one are run together, and may be others.
        again = f"run the same command again: it goes on after {self._rows_whole} rows"
        return again if self._can_continue else _PIPE

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Say, where the disk refuses a write, what is whole and how to go on."""
        try:
            yield
        except OSError as err:
            todo = "make room" if err.errno in _FULL else "see to the cause"
            raise OSError(
                err.errno,
                f"The disk refused a write to {self._files.partial} ({err.strerror or err}). The first "
                f"{self._rows_whole} rows of the source are done and whole there; {todo} and {self._how}.",
            ) from err


class OutputResult:
    """Standard output: lines that are gone once they are written, and rows left out as warnings."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._num_bad = 0

    def __enter__(self) -> OutputResult:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, rows: Sequence[Row], answers: Answers, bad: Sequence[BadRow]) -> None:
        """Write a chunk."""
        for row in bad[: max(0, _MAX_WARNINGS - self._num_bad)]:
            logger.warning("Line %d is left out: %s", row.line, row.reason)
        self._num_bad += len(bad)
        sys.stdout.buffer.write(self._sink.chunk(rows, answers, is_first=False))
        sys.stdout.buffer.flush()

    def commit(self) -> None:
        """Do nothing: no later run goes on."""

    def finish(self) -> None:
        """Say how many rows are left out, where not each was said; all is written."""
        if self._num_bad > _MAX_WARNINGS:
            logger.warning("%d rows are left out in all; the first %d were said.", self._num_bad, _MAX_WARNINGS)

    def stop(self, failure: ValueError | OSError, num_rows: int) -> NoReturn:
        """Raise, as the source cannot be read beyond this many rows."""
        _stop(failure, f"What comes before, {num_rows} rows, is scored and written.")


def _stop(failure: ValueError | OSError, said: str) -> NoReturn:
    if isinstance(failure, OSError):
        raise OSError(failure.errno, f"{failure.strerror or failure}. {said}") from failure
    raise ValueError(f"{failure} {said}") from failure
