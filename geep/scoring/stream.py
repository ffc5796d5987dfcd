"""Files scored as streams: read some rows, predict them, write them, and survive being killed.

A file of any size is carried past an engine into another file, with memory for one chunk of rows. How a prediction is
made is not known here. Read `score_file`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from geep.data.compression import is_stream, open_bytes
from geep.data.formats import RowStream, file_format, open_rows, read_rows
from geep.data.parquet import open_parquet
from geep.data.rows import BadRow, Row
from geep.progress import Progress, no_progress
from geep.promise import Traffic
from geep.scoring.answers import Answers, Question, Scorer
from geep.scoring.chunks import Chunk, chained, in_chunks
from geep.scoring.columns import ResultColumns
from geep.scoring.journal import JOURNAL_VERSION, Journal, ResultFiles
from geep.scoring.kinds import of_one_kind
from geep.scoring.result import FileResult, OutputResult, Result
from geep.scoring.sinks import RESULT_FORMATS, LineSink, ParquetSink, Sink

logger = logging.getLogger(__name__)

_MAX_REPORTED = 100

_NOT_FINITE = "the model gives this text no finite scores (NaN or infinite logits)"

# Larger files are not read a second time for their number of lines; this many bytes take about 0.2 s.
_MAX_COUNTED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class ScoreReport:
    """What became of a file; counts cover the whole file, also where an earlier run wrote a part of it.

    Attributes:
        rows: Rows written to the result.
        bad_rows: The first 100 rows left out, with their lines and reasons.
        num_bad: All rows left out.
        traffic: Rows by exit layer, and how much of them the exit table has never seen.
        truncated: Rows whose text was longer than the model reads.
        seconds: Time spent, earlier runs of the same result included.
        errors_file: File that lists the rows left out; None where none were, or where the result is standard output.
        longest_bad: Lines of the source that the longest row left out takes in; 0 where none was left out. Quotes that
            are mere characters make such of many rows.
    """

    rows: int
    bad_rows: list[BadRow]
    num_bad: int
    traffic: Traffic
    truncated: int
    seconds: float
    errors_file: str | None = None
    longest_bad: int = 0

    @property
    def exit_layer_counts(self) -> dict[int, int]:
        """Rows by exit layer, lowest layer first."""
        return dict(self.traffic.exit_layers)


def score_file(
    engine: Scorer,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    text_column: str = "text",
    text_pair_column: str = "text_pair",
    chunk_rows: int = 4096,
    scores: bool = False,
    top_k: int | None = None,
    threshold: float | None = None,
    quoting: bool | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> ScoreReport:
    r"""Score every row of a file into another file, and go on where a killed run stopped.

    The result holds the good rows of the source in order: their columns, then ``label``, ``score``, ``exit_layer``,
    ``predicted_layer``, ``truncated`` and, if asked for, ``scores``. Of a multi-label model it also has ``labels``,
    after ``score``: the names of the labels that hold. A column of the source that already has such a name is kept as
    ``input_label`` and so on. Rows that cannot be read, and those for which the model gives no finite scores, are left
    out and listed in ``<target>.errors.jsonl``.

    From Parquet to Parquet columns are carried as they are, with their types and all metadata. JSON and CSV have fewer
    types: there dates and times are ISO 8601 (nanoseconds with nine digits), durations ISO 8601 in seconds, times that
    no calendar of four-digit years has the number stored with its unit, decimals strings, bytes base64, infinity the
    string ``Infinity``; NaN is null in JSON.

    ``target`` appears only when it is complete. Until then the rows are in ``<target>.partial``, beside a journal of
    what is whole, ``<target>.partial.json``. The same call goes on from there, and its result is the same, byte for
    byte, as that of a run never stopped. The source is known again by the rows that are done: it may have been mended
    or lengthened behind them. Where they have changed, or the settings have, nothing is thrown away: the run is refused
    with what differs, unless `overwrite` is given. JSON lines declare no columns, so that writing them as CSV or
    Parquet reads the source once more, first.

    A pipe (``-`` for standard input, or a FIFO) is read once: nothing is continued, and for CSV and Parquet the columns
    are those of the first chunk; a later row that does not fit them is a bad one.

    Args:
        engine: What predicts.
        source: File to read, or ``-``.
        target: File to write: .jsonl, .csv or .tsv, each also with .gz, .bz2, .xz or .zst behind it, or .parquet. A
            link stays one: the file it leads to is written. ``-`` is standard output, as JSON lines; rows left out are
            logged then.
        text_column: Column of the text.
        text_pair_column: Column of the second text; absent means single texts. Where `engine.text_pairs` says which of
            the two the model has learned, rows of the other kind are bad ones.
        chunk_rows: Rows read, predicted and written at a time, fewer where they are long: about 64 Mi characters at
            most. It bounds memory; each chunk waits for the disk once.
        scores: Whether to write the score of every label: an object in JSON lines, JSON text in CSV, a struct in
            Parquet. ``labels`` is a list, in CSV JSON text.
        top_k: With `scores`, how many labels of a row to write, most likely first; Parquet has fields for all labels,
            of which the others are null. None: all, in the model's order.
        threshold: Probability from which a label of a multi-label model holds; None: the engine's default.
        quoting: Whether fields of CSV and TSV are quoted, see `geep.data.read_rows`; a TSV result is quoted where it is
            True. Where it is not, tabs and line breaks within a value are written as ``\t``, ``\n`` and ``\r``,
            and a backslash as two.
        overwrite: Whether to replace a target that exists, the list of rows left out of an earlier one, and a part
            that cannot be continued.
        progress: Told after each chunk how many rows of the source are done, good and bad, those of earlier runs too.
            How many there are in all is None for compressed lines, for line files above 256 MiB and for pipes; for
            others it is exact, but that line breaks inside of CSV fields and blank lines count as rows until the
            source ends.

    Returns:
        What became of the file.

    Raises:
        FileExistsError: If the target exists, or such a list or part, and `overwrite` is not given.
        FileNotFoundError: If the source, or the folder of the target, does not exist.
        BlockingIOError: If another run is writing the same target.
        ValueError: If a format is unknown, source and target are one file, the text column is missing, a number
            is out of range, or `top_k` is given without `scores`; or if not one of the first rows is of the kind that
            the model has learned; or if the source is damaged: what was read until
            then is scored and stays, to be continued.
        OSError: If the source or the disk refuses; the message says what is whole and how to go on.
    """
    if not isinstance(chunk_rows, int) or chunk_rows < 1:
        raise ValueError(f"chunk_rows must be a whole number, at least 1; got {chunk_rows!r}.")
    if top_k is not None and not scores:
        raise ValueError(f"top_k={top_k} says how many labels `scores` holds, which is not asked for; add scores=True.")
    source, is_output = Path(source), str(target) == "-"
    # The source is looked at first: its folder, which may be the result's too, is the one that was mistyped.
    read_rows(source, text_column=text_column, text_pair_column=text_pair_column)
    place = Path("-") if is_output else _file_to_write(Path(target))
    target_format = ".jsonl" if is_output else _result_format(Path(target))
    files = None if is_output else ResultFiles.of(place, target_format)
    if files is not None and source.exists():
        for file in files.all():
            if file.exists() and file.samefile(source):
                raise ValueError(f"The source {source} would be overwritten; write to a file of another name.")
    run = _Run(
        Question(engine, scores, top_k, threshold),
        source,
        target_format,
        chunk_rows,
        lambda: open_rows(source, text_column=text_column, text_pair_column=text_pair_column, quoting=quoting),
        text_pair_column,
        quoting is True,
        progress,
    )
    if files is None:
        return run.to_output()
    made_from = {
        "version": JOURNAL_VERSION,
        "text_column": text_column,
        "text_pair_column": text_pair_column,
        "chunk_rows": chunk_rows,  # a prediction may depend, in its last digits, on the texts run beside it
        "scores": scores,
        "top_k": top_k,
        "threshold": threshold,
        "quoting": quoting,
        "from_pipe": is_stream(source),
        "answered_by": dict(engine.answered_by),
    }
    with files.held():
        return run.to_file(files, made_from, overwrite=overwrite)


def _result_format(target: Path) -> str:
    found = file_format(target)
    if found not in RESULT_FORMATS:
        raise ValueError(f"{target} cannot be written chunk by chunk; write one of {', '.join(RESULT_FORMATS)}.")
    return found


def _file_to_write(target: Path) -> Path:
    """The place of a result, links followed; raise where there can be none."""
    target = target.resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {target.parent} to write {target.name} to; make it.")
    if target.exists() and not target.is_file():
        found = "folder" if target.is_dir() else "device or a pipe"
        raise ValueError(f"{target} is a {found}; write to a file, or to - for standard output.")
    return target


@dataclass(frozen=True)
class _Run:
    """One pass over a source."""

    question: Question
    source: Path
    target_format: str
    chunk_rows: int
    open: Callable[[], contextlib.AbstractContextManager[RowStream]]
    pair_column: str
    quoted_tabs: bool
    progress: Progress

    def read(self) -> Iterator[Row | BadRow]:
        """Read the rows of the source from its start; a pipe is opened at the first step."""
        with self.open() as stream:
            yield from self.rows_of(stream)

    def rows_of(self, stream: RowStream) -> Iterator[Row | BadRow]:
        """The rows of an open source, of which those that the model has not learned are bad ones."""
        pairs: bool | None = getattr(self.question.engine, "text_pairs", None)
        return of_one_kind(stream, self.source, self.pair_column, pairs=pairs)

    def to_output(self) -> ScoreReport:
        """Score into standard output."""
        self.question.about([])
        chunks = _begun(in_chunks(self.read(), self.chunk_rows))
        return _report(self._over(chunks, Journal(), OutputResult(LineSink(".jsonl", None))), None)

    def to_file(self, files: ResultFiles, made_from: dict[str, object], *, overwrite: bool) -> ScoreReport:
        """Score into a file, from where an earlier run stopped."""
        # Asked about no rows, an engine tells its labels, and refuses what it cannot do before anything is written.
        nothing = self.question.about([])
        added = pa.schema([(name, column.type) for name, column in nothing.arrays().items()])
        if is_stream(self.source):
            return self._once(files, made_from, added, overwrite=overwrite)
        columns = self._columns(added)
        made_from["columns"] = None if columns is None else columns.digest
        journal, chunks = self._continued(files, made_from, overwrite=overwrite)
        result = FileResult(files, self._sink(columns), journal, made_from, can_continue=True)
        return _report(self._over(chunks, journal, result), files)

    def _once(
        self, files: ResultFiles, made_from: dict[str, object], added: pa.Schema, *, overwrite: bool
    ) -> ScoreReport:
        """Score what comes through a pipe, which cannot be looked through for its columns first."""
        # What came through a pipe cannot be continued, so that a part of it is in nobody's way.
        found = Journal.read(files, made_from)
        _check_free(files, found if isinstance(found, str) else None, overwrite=overwrite)
        logger.warning("%s is read once: a run that is stopped starts over and does not go on.", self.source)
        with self.open() as stream:
            chunks = _begun(in_chunks(self.rows_of(stream), self.chunk_rows))
            columns = None
            if not self.target_format.startswith(".jsonl"):
                if stream.header is not None:
                    columns = ResultColumns.of_header(stream.header, added)
                else:
                    first = next(chunks, Chunk([]))
                    columns = ResultColumns.of_rows(first.rows, added)
                    chunks = (_fitted(chunk, columns, self.target_format) for chunk in chain([first], chunks))
            result = FileResult(files, self._sink(columns), Journal(), made_from, can_continue=False)
            return _report(self._over(chunks, result.journal, result), files)

    def _continued(
        self, files: ResultFiles, made_from: dict[str, object], *, overwrite: bool
    ) -> tuple[Journal, Iterator[Chunk]]:
        """What an earlier run has done, and the chunks that are to do."""
        found = Journal.read(files, made_from)
        _check_free(files, found, overwrite=overwrite)
        chunks = in_chunks(self.read(), self.chunk_rows)
        if isinstance(found, Journal):
            if _skipped(chunks, found):
                return found, chunks
            _check_free(files, f"holds answers to rows of {self.source} that have changed since", overwrite=overwrite)
            chunks = in_chunks(self.read(), self.chunk_rows)
        return Journal(), _begun(chunks)

    def _sink(self, columns: ResultColumns | None) -> Sink:
        if self.target_format == ".parquet":
            assert columns is not None, "Parquet has columns"
            return ParquetSink(columns)
        return LineSink(self.target_format, columns, quoted_tabs=self.quoted_tabs)

    def _columns(self, added: pa.Schema) -> ResultColumns | None:
        """The columns of a result that declares them: as the source does, or gathered by reading it once."""
        if self.target_format.startswith(".jsonl"):
            return None
        with self.open() as stream:
            if stream.format == ".parquet":
                with open_parquet(self.source) as file:
                    return ResultColumns.of_schema(file.schema_arrow, added)
            if stream.header is not None:
                return ResultColumns.of_header(stream.header, added)
        # Where the source is damaged, the rows before have columns too.
        chunks = _begun(in_chunks(self.read(), self.chunk_rows))
        return ResultColumns.of_rows(chain.from_iterable(chunk.rows for chunk in chunks), added)

    def _over(self, chunks: Iterator[Chunk], journal: Journal, result: Result) -> Journal:
        """Carry the rows that are not done yet to the result."""
        before, started = journal.seconds, time.perf_counter()
        total = None if self.progress is no_progress else _count_rows(self.source)
        with result:
            for chunk in chunks:
                rows, answers, bad = self._answered(chunk)
                result.write(rows, answers, bad)
                if chunk.failure is not None:
                    result.stop(chunk.failure, journal.rows_read + len(chunk.rows))
                journal.digest = chained(journal.digest, chunk)
                journal.rows_read += len(chunk.rows)
                journal.rows += len(rows)
                journal.num_bad += len(bad)
                journal.longest_bad = max([journal.longest_bad, *(row.lines for row in bad)])
                journal.bad_rows += bad[: _MAX_REPORTED - len(journal.bad_rows)]
                journal.traffic += answers.traffic
                journal.truncated += sum(answers.truncated)
                journal.seconds = before + time.perf_counter() - started
                if not chunk.is_last:  # of a source that grows, these rows would stand in another chunk
                    result.commit()
                if total is not None:
                    total = journal.rows_read if chunk.is_last else max(total, journal.rows_read + 1)
                self.progress("rows", journal.rows_read, total)
            result.finish()
        return journal

    def _answered(self, chunk: Chunk) -> tuple[list[Row], Answers, list[BadRow]]:
        """The rows of a chunk that have an answer, their answers, and the rows left out."""
        rows, bad = chunk.good, chunk.bad
        answers = self.question.about(rows)
        if not all(answers.is_finite):
            broken = [row for row, is_finite in zip(rows, answers.is_finite, strict=True) if not is_finite]
            bad = sorted([*bad, *(BadRow(row.line, _NOT_FINITE) for row in broken)], key=lambda row: row.line)
            kept = [index for index, is_finite in enumerate(answers.is_finite) if is_finite]
            rows, answers = [rows[index] for index in kept], Answers.mixed([answers], kept)
        return rows, answers, bad


def _check_free(files: ResultFiles, found: Journal | str | None, *, overwrite: bool) -> None:
    """Raise if there is anything that nobody has said may be replaced.

    Args:
        files: The files of the result.
        found: What an earlier run has left: what is gone on from, or why that cannot be; None: nothing that counts.
        overwrite: Whether it was said.
    """
    journal = found if isinstance(found, Journal) else None
    if files.target.exists() and (journal is None or not journal.is_published(files)):
        there = f"{files.target} exists: a finished result, of this run or of another"
    elif isinstance(found, str):
        there = f"{files.partial} {found}, so that it cannot be continued"
    elif files.errors.exists() and (journal is None or journal.finished is None):
        there = f"{files.errors} exists: the rows that another result, which was moved or removed, leaves out"
    else:
        return
    if not overwrite:
        raise FileExistsError(
            f"{there}. Give overwrite=True (--overwrite) to write it anew, or write to a file of another name."
        )
    if isinstance(found, str):
        logger.warning("%s: start over.", there)


def _begun(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Read the first chunk, so that a source that cannot be read at all raises before anything is written."""
    first = next(chunks, None)
    if first is None:
        return chunks
    if first.failure is not None and not first.rows:
        raise first.failure
    return chain([first], chunks)


def _skipped(chunks: Iterator[Chunk], journal: Journal) -> bool:
    """Read the rows that are done again, cheap beside predicting; False where they are no longer those."""
    digest, num_rows = "", 0
    while num_rows < journal.rows_read:
        chunk = next(chunks, None)
        if chunk is None:
            return False
        if chunk.failure is not None:
            raise chunk.failure
        digest = chained(digest, chunk)
        num_rows += len(chunk.rows)
    if (num_rows, digest) != (journal.rows_read, journal.digest):
        return False
    return journal.finished is None or next(chunks, None) is None


def _fitted(chunk: Chunk, columns: ResultColumns, target_format: str) -> Chunk:
    """A chunk of a pipe whose rows have no other columns than those of the first chunk."""
    rows: list[Row | BadRow] = []
    for row in chunk.rows:
        reason = columns.misfit(row, typed=target_format == ".parquet") if isinstance(row, Row) else None
        rows.append(row if reason is None else BadRow(row.line, reason))
    return replace(chunk, rows=rows)


def _report(journal: Journal, files: ResultFiles | None) -> ScoreReport:
    return ScoreReport(
        rows=journal.rows,
        bad_rows=list(journal.bad_rows),
        num_bad=journal.num_bad,
        longest_bad=journal.longest_bad,
        traffic=journal.traffic,
        truncated=journal.truncated,
        seconds=journal.seconds,
        errors_file=str(files.errors) if files is not None and journal.num_bad else None,
    )


def _count_rows(source: Path) -> int | None:
    """Rows of a file, where that is cheap to tell; some too many where fields hold line breaks or lines are blank."""
    if is_stream(source):
        return None
    source_format = file_format(source)
    if source_format == ".parquet":
        return int(pq.read_metadata(source).num_rows)
    if source_format not in (".jsonl", ".csv", ".tsv") or source.stat().st_size > _MAX_COUNTED_BYTES:
        return None
    lines, last = 0, b"\n"
    with open_bytes(source) as opened:
        if opened.compression:  # whatever the name says
            return None
        while block := opened.file.read(2**20):
            lines += block.count(b"\n")
            last = block
    lines += not last.endswith(b"\n")
    return lines if source_format == ".jsonl" else max(lines - 1, 0)  # the header is no row
