"""The files of a result, what of it is whole on disk, and who may write it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from geep.data.rows import BadRow, shown
from geep.promise import Traffic

JOURNAL_VERSION = 4


@dataclass(frozen=True)
class ResultFiles:
    """The files of one result.

    Attributes:
        target: The result.
        partial: Its rows until it is complete.
        whole: What becomes the result: the same file, or for Parquet the one that is made of it at the end.
        journal: What of `partial` is whole.
        errors: Rows left out.
        errors_partial: The same until the result is complete.
        lock: Held by the one process that writes.
    """

    target: Path
    partial: Path
    whole: Path
    journal: Path
    errors: Path
    errors_partial: Path
    lock: Path

    @classmethod
    def of(cls, target: Path, target_format: str) -> ResultFiles:
        """The files that lie beside a result."""

        def beside(suffix: str) -> Path:
            return target.with_name(target.name + suffix)

        partial = beside(".partial")
        return cls(
            target=target,
            partial=partial,
            whole=beside(".partial.parquet") if target_format == ".parquet" else partial,
            journal=beside(".partial.json"),
            errors=beside(".errors.jsonl"),
            errors_partial=beside(".errors.jsonl.partial"),
            lock=beside(".partial.lock"),
        )

    def all(self) -> tuple[Path, ...]:
        """Every file that a run may write."""
        return (self.target, self.partial, self.whole, self.journal, self.errors, self.errors_partial, self.lock)

    def has_part(self) -> bool:
        """Whether a run that did not end has left anything of a result, or a result without its name."""
        parts = (self.partial, self.whole, self.errors_partial)
        return any(path.exists() and path.stat().st_size for path in parts)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from writing this result.

        The system lets go of the lock of a killed process; the empty file that it leaves is removed by the next run.

        Raises:
            BlockingIOError: If another run writes it.
            OSError: If the folder cannot be written to.
        """
        lock = FileLock(self.lock, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            if not self.lock.exists():  # nor can it be made, which the library takes for a passing state
                raise self._no_place("it takes no new files", None) from None
            raise BlockingIOError(
                f"Another run is writing {self.target}; wait until it has ended, or write to a file of another name."
            ) from None
        except OSError as err:
            raise self._no_place(str(err.strerror or err), err.errno) from err
        try:
            yield
        finally:
            self.lock.unlink(missing_ok=True)
            lock.release()

    def _no_place(self, reason: str, number: int | None) -> OSError:
        said = (
            f"Nothing can be written to the folder {self.target.parent} ({reason}); see to its permissions, or write "
            "to another folder."
        )
        return OSError(said) if number is None else OSError(number, said)


@dataclass
class Journal:
    """How far a result has come: everything counted here is whole on disk.

    Attributes:
        rows_read: Rows of the source that are done, good and bad.
        digest: Of these rows as they were read (`geep.scoring.chunks.chained`).
        num_bytes: Length of the partial result.
        error_bytes: Length of the partial list of rows left out.
        rows: Rows in the result.
        num_bad: Rows left out.
        truncated: Rows whose text was longer than the model reads.
        seconds: Time spent.
        bad_rows: The first rows left out.
        longest_bad: Lines of the source that the longest of the rows left out takes in.
        traffic: What the rows looked like to the engine.
        finished: Size and time of the complete file that only has to be given its name; None before.
    """

    rows_read: int = 0
    digest: str = ""
    num_bytes: int = 0
    error_bytes: int = 0
    rows: int = 0
    num_bad: int = 0
    truncated: int = 0
    seconds: float = 0.0
    bad_rows: list[BadRow] = field(default_factory=list)
    longest_bad: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    finished: list[int] | None = None

    @classmethod
    def read(cls, files: ResultFiles, made_from: Mapping[str, object]) -> Journal | str | None:
        """The journal of a part that can be continued, why a part cannot be, or None where there is none."""
        found = cls._read(files, made_from)
        return None if isinstance(found, str) and not files.has_part() else found

    @classmethod
    def _read(cls, files: ResultFiles, made_from: Mapping[str, object]) -> Journal | str:
        try:
            stored = json.loads(files.journal.read_text("utf-8"))
            differing = _differences(stored.pop("made_from"), json.loads(json.dumps(made_from)))
            if differing:
                return f"is of a run with other settings ({differing})"
            stored["bad_rows"] = [BadRow(**row) for row in stored["bad_rows"]]
            stored["traffic"] = Traffic.from_dict(stored["traffic"])
            journal = cls(**stored)
            is_whole = journal._is_whole(files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"has no journal {files.journal.name} that can be read"
        return journal if is_whole else f"is shorter than its journal {files.journal.name} says"

    def _is_whole(self, files: ResultFiles) -> bool:
        # A kill may have come between the steps that give the files their names.
        named = (stamp(files.whole), stamp(files.target))
        if self.finished is not None and self.finished in named and self._lists_errors(files):
            return True
        self.finished = None
        return (
            files.partial.stat().st_size >= self.num_bytes and files.errors_partial.stat().st_size >= self.error_bytes
        )

    def _lists_errors(self, files: ResultFiles) -> bool:
        found = [stamp(path) for path in (files.errors_partial, files.errors)]
        return not self.num_bad or any(each is not None and each[0] == self.error_bytes for each in found)

    def is_published(self, files: ResultFiles) -> bool:
        """Whether the target is the result of this very run, which was killed before it said so."""
        return self.finished is not None and self.finished == stamp(files.target)

    def write(self, files: ResultFiles, made_from: Mapping[str, object]) -> None:
        """Replace the journal on disk, whole or not at all."""
        temp = ByteFile(files.journal.with_name(files.journal.name + ".new"), 0)
        with temp:
            temp.write(
                json.dumps({"made_from": made_from, **asdict(self), "traffic": self.traffic.to_dict()}).encode("utf-8")
            )
            temp.sync()
        os.replace(temp.path, files.journal)

    def publish(self, files: ResultFiles) -> None:
        """Give the finished files their names, whatever of that is done already; the journal goes last."""
        if not self.num_bad:
            files.errors_partial.unlink(missing_ok=True)
            files.errors.unlink(missing_ok=True)  # an earlier result's
        elif files.errors_partial.exists():
            os.replace(files.errors_partial, files.errors)
        if not self.is_published(files):
            os.replace(files.whole, files.target)
        files.partial.unlink(missing_ok=True)
        files.journal.unlink(missing_ok=True)


_NOT_SAID = {"columns", "version"}  # a digest and a number that say nothing to people


def _differences(there: Mapping[str, object], here: Mapping[str, object]) -> str:
    """What two runs were made from where it differs, in words; empty where it does not."""
    said = []
    for name in sorted(there.keys() | here.keys()):
        old, new = there.get(name), here.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            said.append(_differences(old, new))
        elif name in _NOT_SAID:
            said.append({"columns": "other columns", "version": "another version of geep"}[name])
        else:
            said.append(f"{name}: {shown(old)} there, {shown(new)} now")
    return "; ".join(said)


def stamp(path: Path) -> list[int] | None:
    """Size and time of a file, which it keeps when it is renamed; None where there is none."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


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
                self._file.seek(self.num_bytes)
            raise
        self.num_bytes += done
        return done

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        os.fsync(self._file.fileno())
