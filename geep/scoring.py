"""Files scored as streams: read some rows, predict them, write them, and survive being killed.

What this room does: it carries rows of a file of any size past an engine and into another file, with memory for one
chunk of rows. What it refuses to know: how a prediction is made, and how files are read (`geep.data` does that).

Reading order: `score_file`; then `_Columns` (names of the output), the three sinks (bytes that can be continued, gzip,
Parquet) and `_Journal` (what a later run needs to go on).
"""

from __future__ import annotations

import base64
import contextlib
import csv
import datetime
import gzip
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Protocol, cast

import pyarrow as pa
import pyarrow.parquet as pq

from geep.data import BadRow, Row, file_format, read_header, read_rows

_ADDED = ("label", "score", "exit_layer", "predicted_layer", "truncated")
_MAX_REPORTED = 100
_JOURNAL_VERSION = 1


class ScoredText(Protocol):
    """What is read off a prediction."""

    @property
    def label(self) -> str:
        """Name of the label."""

    @property
    def score(self) -> float:
        """Probability of the label."""

    @property
    def scores(self) -> Mapping[str, float]:
        """Probability of every label, by name."""

    @property
    def exit_layer(self) -> int:
        """Encoder layers that were run."""

    @property
    def predicted_layer(self) -> int | None:
        """Exit layer predicted before the run, None where none was."""

    @property
    def truncated(self) -> bool:
        """Whether the text was longer than the model reads."""


class Scorer(Protocol):
    """Anything that predicts: an engine, or a stand-in."""

    def predict(self, texts: list[str] | list[tuple[str, str]], /) -> Sequence[ScoredText]:
        """Return one prediction a text, in the order of the texts."""


@dataclass(frozen=True)
class ScoreReport:
    """What became of a file; counts cover the whole file, also where an earlier run wrote a part of it.

    Attributes:
        rows: Rows written to the result.
        bad_rows: The first 100 rows left out, with their lines and reasons.
        num_bad: All rows left out.
        exit_layer_counts: Rows by exit layer, lowest layer first.
        truncated: Rows whose text was longer than the model reads.
        seconds: Time spent, earlier runs of the same result included.
    """

    rows: int
    bad_rows: list[BadRow]
    num_bad: int
    exit_layer_counts: dict[int, int]
    truncated: int
    seconds: float


def score_file(
    engine: Scorer,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    text_column: str = "text",
    text_pair_column: str = "text_pair",
    chunk_rows: int = 4096,
    scores: bool = False,
    key: str = "",
    progress: Callable[[int], None] | None = None,
) -> ScoreReport:
    """Score every row of a file into another file, and go on where a killed run stopped.

    The result holds the good rows of the source in order: their columns, then ``label``, ``score``, ``exit_layer``,
    ``predicted_layer``, ``truncated`` and, if asked for, ``scores``. A column of the source that already has such a
    name is kept as ``input_label`` and so on. Bad rows are left out and listed in ``<target>.errors.jsonl``.

    ``target`` appears only when it is complete. Until then the rows are in ``<target>.partial``, beside a journal of
    what is whole, ``<target>.partial.json``. The same call with the same source goes on from there, and its result is
    the same, byte for byte, as that of a run never stopped. Parquet and .gz results cannot be continued: they start
    over. JSON lines declare no columns, so that writing them as CSV or Parquet reads the source once more, first.

    Args:
        engine: What predicts.
        source: File to read; both names end with one of `geep.data.FORMATS`.
        target: File to write; it is replaced if it exists.
        text_column: Column of the text.
        text_pair_column: Column of the second text; absent means single texts.
        chunk_rows: Rows read, predicted and written at a time; the bound on memory.
        scores: Whether to write the score of every label: an object in JSON lines, JSON text in CSV, a struct in
            Parquet.
        key: Whatever else the predictions depend on, such as the model's path and settings: a part written under
            another key is not continued but written anew.
        progress: Called after each chunk with the rows of the source done so far, good and bad, of earlier runs too.

    Returns:
        What became of the file.

    Raises:
        FileNotFoundError: If the source, or the folder of the target, does not exist.
        ValueError: If a format is unknown, source and target are one file, the text column is missing, or the source
            is damaged. What was written until then stays, to be continued.
        OSError: If the disk refuses a write; the message says what is whole and how to go on.
    """
    source, target = Path(source), Path(target)
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}.")
    source_format, target_format = file_format(source), file_format(target)
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder {target.absolute().parent} to write {target.name} to; make it.")
    rows = read_rows(source, text_column=text_column, text_pair_column=text_pair_column)
    if target.is_dir():
        raise ValueError(f"{target} is a folder; write to a file.")
    files = _Files.of(target)
    for file in (files.target, files.partial, files.errors, files.errors_partial, files.journal):
        if file.exists() and file.samefile(source):
            raise ValueError(f"The source {source} would be overwritten; write to a file of another name.")
    columns = None
    if not target_format.startswith(".jsonl"):
        columns = _Columns.of(source, source_format, scores, text_column, text_pair_column)
    stat = source.stat()
    made_from = {
        "version": _JOURNAL_VERSION,
        "source": str(source.resolve()),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "text_column": text_column,
        "text_pair_column": text_pair_column,
        "chunk_rows": chunk_rows,  # a prediction may depend, in its last digits, on the texts run beside it
        "scores": scores,
        "key": key,
    }
    can_continue = not target_format.endswith((".gz", ".parquet"))
    journal = _Journal.read(files, made_from) if can_continue else None
    journal = _Journal() if journal is None else journal
    run = _Run(engine, files, journal, made_from, can_continue, scores, columns, target_format)
    # A missing column shows at the first row: before anything is written.
    first = list(islice(rows, 1))
    return run.over(chain(first, rows), chunk_rows, progress)


@dataclass(frozen=True)
class _Files:
    """The files of one result."""

    target: Path
    partial: Path
    journal: Path
    errors: Path
    errors_partial: Path

    @classmethod
    def of(cls, target: Path) -> _Files:
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
class _Journal:
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
    def read(cls, files: _Files, made_from: Mapping[str, object]) -> _Journal | None:
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

    def write(self, files: _Files, made_from: Mapping[str, object]) -> None:
        """Replace the journal on disk, whole or not at all."""
        temp = _ByteFile(files.journal.with_name(files.journal.name + ".new"), 0)
        with temp:
            temp.write(json.dumps({"made_from": made_from, **asdict(self)}).encode("utf-8"))
            temp.sync()
        os.replace(temp.path, files.journal)


@dataclass(frozen=True)
class _Run:
    """One pass over a file; `journal` is the one part of it that changes."""

    engine: Scorer
    files: _Files
    journal: _Journal
    made_from: Mapping[str, object]
    can_continue: bool
    scores: bool
    columns: _Columns | None
    target_format: str

    def over(
        self, rows: Iterator[Row | BadRow], chunk_rows: int, progress: Callable[[int], None] | None
    ) -> ScoreReport:
        """Carry the rows that are not done yet to the result, and put the result in its place."""
        journal = self.journal
        before = journal.seconds
        started = time.perf_counter()
        # Rows already done are read again and dropped: reading is cheap beside predicting.
        rows = islice(rows, journal.rows_read, None)
        with contextlib.ExitStack() as stack:
            if self.journal.rows_read == 0:
                self.files.journal.unlink(missing_ok=True)  # of another source, or of other settings
            if not self.can_continue:
                stack.push(self._forget_errors)
            with self._disk():
                errors = stack.enter_context(_ByteFile(self.files.errors_partial, journal.error_bytes))
                sink = self._sink()
                stack.push(sink)
            while chunk := list(islice(rows, chunk_rows)):
                good = [row for row in chunk if isinstance(row, Row)]
                bad = [row for row in chunk if isinstance(row, BadRow)]
                predictions = _predict(self.engine, good)
                records = [self._record(row, made) for row, made in zip(good, predictions, strict=True)]
                with self._disk():
                    errors.write("".join(_json_line(asdict(row)) for row in bad).encode("utf-8"))
                    sink.write(records)
                    if self.can_continue:
                        errors.sync()
                        sink.sync()
                journal.num_bytes, journal.error_bytes = sink.num_bytes, errors.num_bytes
                journal.rows += len(good)
                journal.num_bad += len(bad)
                journal.bad_rows += bad[: _MAX_REPORTED - len(journal.bad_rows)]
                for made in predictions:
                    journal.exit_layers[made.exit_layer] = journal.exit_layers.get(made.exit_layer, 0) + 1
                journal.truncated += sum(made.truncated for made in predictions)
                journal.seconds = before + time.perf_counter() - started
                with self._disk():
                    journal.rows_read += len(chunk)
                    if self.can_continue:
                        journal.write(self.files, self.made_from)
                if progress is not None:
                    progress(journal.rows_read)
            with self._disk():
                sink.finish()
                errors.sync()
        with self._disk():
            self._publish()
        return ScoreReport(
            rows=journal.rows,
            bad_rows=list(journal.bad_rows),
            num_bad=journal.num_bad,
            exit_layer_counts=dict(sorted(journal.exit_layers.items())),
            truncated=journal.truncated,
            seconds=before + time.perf_counter() - started,
        )

    def _sink(self) -> _LineSink | _ParquetSink:
        if self.target_format == ".parquet":
            assert self.columns is not None, "Parquet has columns"
            return _ParquetSink(self.files.partial, self.columns)
        return _LineSink(self.files.partial, self.journal.num_bytes, self.target_format, self.columns)

    def _record(self, row: Row, made: ScoredText) -> dict[str, object]:
        """The output row: the input's columns, then ours."""
        names = _renamed(row.fields, self.scores) if self.columns is None else self.columns.renamed
        record = {names[name]: value for name, value in row.fields.items()}
        record["label"] = made.label
        record["score"] = float(made.score)
        record["exit_layer"] = int(made.exit_layer)
        record["predicted_layer"] = None if made.predicted_layer is None else int(made.predicted_layer)
        record["truncated"] = bool(made.truncated)
        if self.scores:
            record["scores"] = {name: float(value) for name, value in made.scores.items()}
        return record

    def _forget_errors(self, error: object, *_: object) -> None:
        """Remove the list of bad rows of a run that failed and cannot be continued."""
        if error is not None:
            self.files.errors_partial.unlink(missing_ok=True)

    def _publish(self) -> None:
        """Give the finished files their names, the result last but for the journal."""
        if self.journal.num_bad:
            os.replace(self.files.errors_partial, self.files.errors)
        else:
            self.files.errors_partial.unlink(missing_ok=True)
            self.files.errors.unlink(missing_ok=True)  # an earlier result's
        os.replace(self.files.partial, self.files.target)
        self.files.journal.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Say, where the disk refuses a write, what is whole and how to go on."""
        rows_whole = self.journal.rows_read  # what the journal on disk says, whatever the block is about to add
        try:
            yield
        except OSError as err:
            refusal = f"The disk refused a write to {self.files.partial} ({err.strerror or err})."
            if self.can_continue:
                state = f"The first {rows_whole} rows of the source are done and whole there"
                todo = "make room and run the same command again: it goes on after them"
            else:
                state = f"A {self.target_format} result cannot be continued, so nothing of it can be used"
                todo = "make room and run the same command again, or write to .jsonl or .csv, which can be continued"
            raise OSError(err.errno, f"{refusal} {state}; {todo}.") from err


def _predict(engine: Scorer, rows: Sequence[Row]) -> list[ScoredText]:
    """Predictions in the order of the rows; rows with and without a second text go in calls of their own."""
    made: dict[int, ScoredText] = {}
    singles = [index for index, row in enumerate(rows) if row.text_pair is None]
    pairs = [index for index, row in enumerate(rows) if row.text_pair is not None]
    for indices in (singles, pairs):
        if not indices:
            continue
        if indices is singles:
            answers = engine.predict([rows[index].text for index in indices])
        else:
            answers = engine.predict([(rows[index].text, rows[index].text_pair or "") for index in indices])
        if len(answers) != len(indices):
            raise RuntimeError(
                f"The engine gave {len(answers)} predictions for {len(indices)} texts; expected as many."
            )
        made.update(zip(indices, answers, strict=True))
    return [made[index] for index in range(len(rows))]


# --- Columns of the result


def _renamed(names: Mapping[str, object] | Sequence[str], scores: bool) -> dict[str, str]:
    """The name in the result of each column of the source: its own, unless it is one of ours."""
    ours = (*_ADDED, "scores") if scores else _ADDED
    out = {}
    for name in names:
        new = name
        while new in ours or (new != name and new in names):
            new = f"input_{new}"
        out[name] = new
    return out


@dataclass(frozen=True)
class _Columns:
    """Columns of a result that must declare them.

    Attributes:
        renamed: Names in the result by names in the source, in order.
        schema: Types of the source's columns under their names in the result; the added ones are not in it.
        as_json: Columns, under their names in the result, that no Parquet type holds (lists, objects, strings beside
            numbers) and that Parquet gets as JSON text.
        scores: Whether the result has a column of all scores.
    """

    renamed: dict[str, str]
    schema: pa.Schema
    as_json: frozenset[str]
    scores: bool

    @classmethod
    def of(cls, source: Path, source_format: str, scores: bool, text_column: str, text_pair_column: str) -> _Columns:
        header = read_header(source)
        as_json = []
        if source_format == ".parquet":
            schema = pq.read_schema(source)
            renamed = _renamed(schema.names, scores)
            fields = [item.with_name(renamed[item.name]) for item in schema]
            return cls(renamed, pa.schema(fields), frozenset(), scores)
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
        renamed = _renamed(types, scores)
        schema = pa.schema([(renamed[name], kind) for name, kind in types.items()])
        return cls(renamed, schema, frozenset(renamed[name] for name in as_json), scores)

    @property
    def names(self) -> list[str]:
        """All columns of the result, in order."""
        return [*self.schema.names, *_ADDED, *(["scores"] if self.scores else [])]


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


# --- Values as text


def _plain(value: object) -> object:
    """A value that JSON lacks as one that it has: Parquet holds dates, decimals, bytes and NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | int | None):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value)


def _json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def _json_line(value: object) -> str:
    return _json(value) + "\n"


def _cell(value: object) -> str:
    """A value as a CSV field: strings as they are, nothing as nothing, the rest as JSON spells it."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    plain = _plain(value)
    return plain if isinstance(plain, str) else _json(plain)


# --- Sinks


class _ByteFile:
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

    def __enter__(self) -> _ByteFile:
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


class _LineSink:
    """Rows as JSON lines, CSV or TSV, plain or through gzip."""

    def __init__(self, path: Path, num_bytes: int, target_format: str, columns: _Columns | None) -> None:
        self._columns = columns
        self._delimiter = "\t" if target_format.startswith(".tsv") else ","
        self._has_header = columns is None or num_bytes > 0
        self._file = _ByteFile(path, num_bytes)
        # No name and no time in the gzip header: the same rows always give the same bytes.
        self._gzip = (
            gzip.GzipFile(filename="", mode="wb", fileobj=cast(io.BufferedIOBase, self._file), mtime=0, compresslevel=6)
            if target_format.endswith(".gz")
            else None
        )

    @property
    def num_bytes(self) -> int:
        """Length of the file."""
        return self._file.num_bytes

    def __enter__(self) -> _LineSink:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if self._gzip is not None and error is not None:
            with contextlib.suppress(OSError):  # its last bytes, written into a file that is thrown away
                self._gzip.close()
        self._file.__exit__()
        if self._gzip is not None and error is not None:
            self._file.path.unlink(missing_ok=True)

    def write(self, records: Sequence[Mapping[str, object]]) -> None:
        """Append rows."""
        if self._columns is None:
            text = "".join(_json_line(record) for record in records)
        else:
            text = self._csv(self._columns, records)
        data = text.encode("utf-8")
        if self._gzip is None:
            self._file.write(data)
        else:
            self._gzip.write(data)

    def _csv(self, columns: _Columns, records: Sequence[Mapping[str, object]]) -> str:
        buffer = io.StringIO(newline="")
        # With "\r\n" between rows, as RFC 4180 has it, the module quotes both characters inside of a field.
        writer = csv.writer(buffer, delimiter=self._delimiter, lineterminator="\r\n")
        names = columns.names
        if not self._has_header:
            writer.writerow(names)
            self._has_header = True
        for record in records:
            writer.writerow([_cell(record.get(name)) for name in names])
        return buffer.getvalue()

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        self._file.sync()

    def finish(self) -> None:
        """Write what a complete file still needs."""
        if not self._has_header:
            self.write([])
        if self._gzip is not None:
            self._gzip.close()
        self._file.sync()


class _ParquetSink:
    """Rows as Parquet, one row group a chunk."""

    def __init__(self, path: Path, columns: _Columns) -> None:
        self._path = path
        self._columns = columns
        self._schema: pa.Schema | None = None
        self._file = open(path, "wb")  # noqa: SIM115
        self._writer: pq.ParquetWriter | None = None

    @property
    def num_bytes(self) -> int:
        """Nothing: a part of a Parquet file is no Parquet file."""
        return 0

    def __enter__(self) -> _ParquetSink:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            self._file.close()
            return
        with contextlib.suppress(OSError):  # the first failure is the one to tell of
            if self._writer is not None:
                self._writer.close()
        with contextlib.suppress(OSError):
            self._file.close()
        self._path.unlink(missing_ok=True)

    def write(self, records: Sequence[Mapping[str, object]]) -> None:
        """Append rows."""
        if not records:
            return
        writer = self._open(cast(Mapping[str, float], records[0].get("scores", {})))
        as_json = self._columns.as_json
        arrays = []
        for item in cast(pa.Schema, self._schema):
            values = [record.get(item.name) for record in records]
            if item.name in as_json:
                values = [
                    _json(value) if item.name in record else None for value, record in zip(values, records, strict=True)
                ]
            arrays.append(pa.array(values, type=item.type))
        writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))

    def _open(self, scores: Mapping[str, float]) -> pq.ParquetWriter:
        """The writer; the labels of its scores are those of the first row, and without a row there are none."""
        if self._writer is None:
            added = [
                ("label", pa.string()),
                ("score", pa.float64()),
                ("exit_layer", pa.int32()),
                ("predicted_layer", pa.int32()),
                ("truncated", pa.bool_()),
            ]
            if self._columns.scores:
                kind = pa.struct([(name, pa.float64()) for name in scores]) if scores else pa.null()
                added.append(("scores", kind))
            self._schema = pa.schema([*self._columns.schema, *(pa.field(name, kind) for name, kind in added)])
            self._writer = pq.ParquetWriter(self._file, self._schema)
        return self._writer

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Write the footer, and the schema if there was no row."""
        self._open({}).close()
        self.sync()
