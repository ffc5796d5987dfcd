"""What of a result is whole on disk, and the file that is continued."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from geep.data.rows import BadRow

JOURNAL_VERSION = 1


@dataclass(frozen=True)
class ResultFiles:
    """The files of one result."""

    target: Path
    partial: Path
    journal: Path
    errors: Path
    errors_partial: Path

    @classmethod
    def of(cls, target: Path) -> ResultFiles:
        """The files that lie beside a result."""

        def beside(suffix: str) -> Path:
            return target.with_name(target.name + suffix)

        return cls(
            target=target,
            partial=beside(".partial"),
            journal=beside(".partial.json"),
            errors=beside(".errors.jsonl"),
            errors_partial=beside(".errors.jsonl.partial"),
        )


@dataclass
class Journal:
    """How far a result has come: everything counted here is whole on disk."""

    rows_read: int = 0
    num_bytes: int = 0
    error_bytes: int = 0
    rows: int = 0
    num_bad: int = 0
    truncated: int = 0
    seconds: float = 0.0
    bad_rows: list[BadRow] = field(default_factory=list)
    exit_layers: dict[int, int] = field(default_factory=dict)

    @classmethod
    def read(cls, files: ResultFiles, made_from: Mapping[str, object]) -> Journal | None:
        """The journal of a part that can be continued, or None where there is no such part."""
        try:
            stored = json.loads(files.journal.read_text("utf-8"))
            if stored.pop("made_from") != made_from:
                return None
            stored["bad_rows"] = [BadRow(**row) for row in stored["bad_rows"]]
            stored["exit_layers"] = {int(layer): count for layer, count in stored["exit_layers"].items()}
            journal = cls(**stored)
            whole = (
                files.partial.stat().st_size >= journal.num_bytes
                and files.errors_partial.stat().st_size >= journal.error_bytes
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # no journal, or none that can be trusted: start over
        return journal if whole else None

    def write(self, files: ResultFiles, made_from: Mapping[str, object]) -> None:
        """Replace the journal on disk, whole or not at all."""
        temp = ByteFile(files.journal.with_name(files.journal.name + ".new"), 0)
        with temp:
            temp.write(json.dumps({"made_from": made_from, **asdict(self)}).encode("utf-8"))
            temp.sync()
        os.replace(temp.path, files.journal)


class ByteFile:
    """A file that is appended to from a known length on; `num_bytes` have been given to the operating system."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path = path
        self.num_bytes = num_bytes
        # Unbuffered: nothing is left to be flushed, and to fail once more, when the file is closed.
        self._file = open(path, "r+b" if num_bytes else "wb", buffering=0)  # noqa: SIM115
        try:
            # A killed run may have written on after its last entry in the journal.
            self._file.truncate(num_bytes)
            self._file.seek(num_bytes)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ByteFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> int:
        """Write all of the data, or raise and leave the file as long as it was."""
        view = memoryview(data)
        done = 0
        try:
            while done < len(view):
                done += self._file.write(view[done:])
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self.num_bytes)
            raise
        self.num_bytes += done
        return done

    def flush(self) -> None:
        """Do nothing: there is no buffer."""

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        os.fsync(self._file.fileno())
