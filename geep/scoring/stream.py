"""Files scored as streams: read some rows, predict them, write them, and survive being killed.

A file of any size is carried past an engine into another file, with memory for one chunk of rows. How a prediction is
made is not known here. Read `score_file`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from geep.data.formats import file_format, read_rows
from geep.data.rows import BadRow, Row
from geep.progress import Progress, no_progress
from geep.scoring.answers import Question, Scorer
from geep.scoring.columns import ResultColumns, json_line
from geep.scoring.journal import JOURNAL_VERSION, ByteFile, Journal, ResultFiles
from geep.scoring.sinks import LineSink, ParquetSink

_MAX_REPORTED = 100

# Larger files are not read a second time for their number of lines; this many bytes take about 0.2 s.
_MAX_COUNTED_BYTES = 256 * 2**20


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
    top_k: int | None = None,
    threshold: float | None = None,
    key: str = "",
    progress: Progress = no_progress,
) -> ScoreReport:
    """Score every row of a file into another file, and go on where a killed run stopped.

    The result holds the good rows of the source in order: their columns, then ``label``, ``score``, ``exit_layer``,
    ``predicted_layer``, ``truncated`` and, if asked for, ``scores``. Of a multi-label model it also has ``labels``,
    after ``score``: the names of the labels that hold. A column of the source that already has such a name is kept as
    ``input_label`` and so on. Bad rows are left out and listed in ``<target>.errors.jsonl``.

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
            Parquet. ``labels`` is a list, in CSV JSON text.
        top_k: With `scores`, how many labels of a row to write, most likely first; Parquet has fields for all labels,
            of which the others are null. None: all, in the model's order.
        threshold: Probability from which a label of a multi-label model holds; None: the engine's default.
        key: Whatever else the predictions depend on, such as the model's path and settings: a part written under
            another key is not continued but written anew.
        progress: Told after each chunk how many rows of the source are done, good and bad, those of earlier runs too.
            How many there are in all is None for compressed lines and for line files above 256 MiB; for others it is
            exact, but that line breaks inside of CSV fields and blank lines count as rows until the source ends.

    Returns:
        What became of the file.

    Raises:
        FileNotFoundError: If the source, or the folder of the target, does not exist.
        ValueError: If a format is unknown, source and target are one file, the text column is missing, a number
            is out of range, or `top_k` is given without `scores`; or if the source is damaged: what was written until
            then stays, to be continued.
        OSError: If the disk refuses a write; the message says what is whole and how to go on.
    """
    source, target = Path(source), Path(target)
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}.")
    if top_k is not None and not scores:
        raise ValueError(f"top_k={top_k} says how many labels `scores` holds, which is not asked for; add scores=True.")
    source_format, target_format = file_format(source), file_format(target)
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder {target.absolute().parent} to write {target.name} to; make it.")
    rows = read_rows(source, text_column=text_column, text_pair_column=text_pair_column)
    if target.is_dir():
        raise ValueError(f"{target} is a folder; write to a file.")
    files = ResultFiles.of(target)
    for file in (files.target, files.partial, files.errors, files.errors_partial, files.journal):
        if file.exists() and file.samefile(source):
            raise ValueError(f"The source {source} would be overwritten; write to a file of another name.")
    question = Question(engine, scores, top_k, threshold)
    # Asked about no rows, an engine tells its labels, and refuses what it cannot do before anything is written.
    nothing = question.about([])
    columns = None
    if not target_format.startswith(".jsonl"):
        added = pa.schema([(name, column.type) for name, column in nothing.arrays().items()])
        columns = ResultColumns.of(source, source_format, added, text_column, text_pair_column)
    stat = source.stat()
    made_from = {
        "version": JOURNAL_VERSION,
        "source": str(source.resolve()),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "text_column": text_column,
        "text_pair_column": text_pair_column,
        "chunk_rows": chunk_rows,  # a prediction may depend, in its last digits, on the texts run beside it
        "scores": scores,
        "top_k": top_k,
        "threshold": threshold,
        "key": key,
    }
    can_continue = not target_format.endswith((".gz", ".parquet"))
    journal = Journal.read(files, made_from) if can_continue else None
    journal = Journal() if journal is None else journal
    run = _FileRun(question, files, journal, made_from, can_continue, columns, target_format)
    # A missing column shows at the first row: before anything is written.
    first = list(islice(rows, 1))
    total = None if progress is no_progress else _count_rows(source, source_format)
    return run.over(chain(first, rows), chunk_rows, progress, total)


def _count_rows(source: Path, source_format: str) -> int | None:
    """Rows of a file, where that is cheap to tell; some too many where fields hold line breaks or lines are blank."""
    if source_format == ".parquet":
        return int(pq.read_metadata(source).num_rows)
    if source_format.endswith(".gz") or source.stat().st_size > _MAX_COUNTED_BYTES:
        return None
    lines, last = 0, b"\n"
    with source.open("rb") as file:
        while block := file.read(2**20):
            lines += block.count(b"\n")
            last = block
    lines += not last.endswith(b"\n")
    return lines if source_format == ".jsonl" else max(lines - 1, 0)  # the header is no row


@dataclass(frozen=True)
class _FileRun:
    """One pass over a file; `journal` is the one part of it that changes."""

    question: Question
    files: ResultFiles
    journal: Journal
    made_from: Mapping[str, object]
    can_continue: bool
    columns: ResultColumns | None
    target_format: str

    def over(self, rows: Iterator[Row | BadRow], chunk_rows: int, progress: Progress, total: int | None) -> ScoreReport:
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
                errors = stack.enter_context(ByteFile(self.files.errors_partial, journal.error_bytes))
                sink = self._sink()
                stack.push(sink)
            chunk = list(islice(rows, chunk_rows))
            while chunk:
                good = [row for row in chunk if isinstance(row, Row)]
                bad = [row for row in chunk if isinstance(row, BadRow)]
                answers = self.question.about(good)
                with self._disk():
                    errors.write("".join(json_line(asdict(row)) for row in bad).encode("utf-8"))
                    sink.write(good, answers)
                    if self.can_continue:
                        errors.sync()
                        sink.sync()
                journal.num_bytes, journal.error_bytes = sink.num_bytes, errors.num_bytes
                journal.rows += len(good)
                journal.num_bad += len(bad)
                journal.bad_rows += bad[: _MAX_REPORTED - len(journal.bad_rows)]
                for layer, count in Counter(answers.exit_layers).items():
                    journal.exit_layers[layer] = journal.exit_layers.get(layer, 0) + count
                journal.truncated += sum(answers.truncated)
                journal.seconds = before + time.perf_counter() - started
                with self._disk():
                    journal.rows_read += len(chunk)
                    if self.can_continue:
                        journal.write(self.files, self.made_from)
                following = list(islice(rows, 1))
                if total is not None:
                    total = max(total, journal.rows_read + 1) if following else journal.rows_read
                progress("rows", journal.rows_read, total)
                chunk = following + list(islice(rows, chunk_rows - len(following)))
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

    def _sink(self) -> LineSink | ParquetSink:
        if self.target_format == ".parquet":
            assert self.columns is not None, "Parquet has columns"
            return ParquetSink(self.files.partial, self.columns)
        return LineSink(self.files.partial, self.journal.num_bytes, self.target_format, self.columns)

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
