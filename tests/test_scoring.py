"""Files scored as streams: formats, bad rows, killed runs, full disks."""

import csv
import gzip
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from decimal import Decimal
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import Result
from conftest import make_engine, make_model, random_texts
from numpy.typing import NDArray
from typer.testing import CliRunner

import geep
from geep.cli import app
from geep.data import BadRow, Row, parquet, read_header, read_rows
from geep.engine import Engine, Prediction
from geep.scoring import Scorer, ScoreReport, chunks, score_file, sinks, stream as stream_file
from geep.scoring.journal import Journal
from geep.scoring.values import json_text


@dataclass(frozen=True)
class Made:
    """Columns of answers; `made(row)` is what a result says of one of them."""

    label_names: tuple[str, ...]
    probabilities: NDArray[np.float64]
    label_ids: NDArray[np.int64]
    exit_layers: NDArray[np.int64]
    predicted_layers: NDArray[np.int64] | None
    truncated: NDArray[np.bool_]
    multi_label: bool
    threshold: float
    unknown_shares: NDArray[np.float64] | None = None

    @property
    def is_finite(self) -> NDArray[np.bool_]:
        return np.isfinite(self.probabilities).all(axis=1)

    @property
    def scores(self) -> NDArray[np.float64]:
        return self.probabilities[np.arange(len(self.label_ids)), self.label_ids]

    @property
    def label_flags(self) -> NDArray[np.bool_]:
        return self.probabilities >= self.threshold

    def __call__(self, row: int) -> dict[str, object]:
        said: dict[str, object] = {
            "label": self.label_names[self.label_ids[row]],
            "score": float(self.scores[row]),
            "exit_layer": int(self.exit_layers[row]),
            "predicted_layer": None if self.predicted_layers is None else int(self.predicted_layers[row]),
            "truncated": bool(self.truncated[row]),
            "scores": dict(zip(self.label_names, self.probabilities[row].tolist(), strict=True)),
        }
        return said


@dataclass
class FakeEngine:
    """Answers by the length of the text; fails at a call where told to."""

    fail_at: int | None = None
    predicts: bool = True
    multi_label: bool = False
    broken: str | None = None
    answered_by: dict[str, object] = field(default_factory=lambda: {"model": "first"})
    calls: list[list[str] | list[tuple[str, str]]] = field(default_factory=list)

    def predict_columns(
        self,
        texts: list[str] | list[tuple[str, str]],
        /,
        *,
        top_k: int | None = None,
        threshold: float = 0.5,
        keep_broken: bool = False,
    ) -> Made:
        if not 0 <= threshold <= 1:
            raise ValueError("threshold out of range")
        if texts:
            if len(self.calls) == self.fail_at:
                raise RuntimeError("killed")
            self.calls.append(texts)
        lengths = np.array([len("".join(text)) for text in texts], dtype=np.int64)
        score = 1 / (1 + lengths)
        probabilities = np.stack([1 - score, score], axis=1)
        names: tuple[str, ...] = ("long", "short")
        label_ids = np.ones(len(texts), dtype=np.int64)
        if self.multi_label:
            names = ("long", "short", "even")
            probabilities = np.column_stack([probabilities, np.where(lengths % 2, 0.25, 0.75)])
            label_ids = probabilities.argmax(axis=1)
        is_broken = np.array([self.broken is not None and self.broken in "".join(text) for text in texts], dtype=bool)
        assert keep_broken or not is_broken.any()
        probabilities[is_broken] = np.nan
        layers = lengths % 3
        return Made(
            names,
            probabilities,
            label_ids,
            layers,
            layers if self.predicts else None,
            lengths > 50,
            self.multi_label,
            threshold,
        )


FORMATS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".parquet")


def write_source(path: Path, rows: int, *, changed: int | None = None) -> Path:
    """Rows of two columns; in JSON lines and CSV every tenth is bad. One may be another than usual."""
    records = [{"text": f'text "{i}",\r\nmore{"!" * (i % 7)}', "id": str(i)} for i in range(rows)]
    if changed is not None:
        records[changed]["text"] += "?"
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records, schema=pa.schema([("text", "string"), ("id", "string")])), path)
    elif path.suffix == ".jsonl":
        lines = ["broken" if i % 10 == 9 else json.dumps(record) for i, record in enumerate(records)]
        path.write_text("".join(line + "\n" for line in lines), "utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "id"])
            writer.writerows(["broken"] if i % 10 == 9 else record.values() for i, record in enumerate(records))
    return path


def read_back(path: Path) -> list[dict[str, object]]:
    return [row.fields for row in read_rows(path) if not isinstance(row, BadRow)]


def beside(path: Path) -> list[str]:
    """Names of the other files that a run has left."""
    return sorted(file.name for file in path.parent.glob(f"{path.name}.*"))


@pytest.mark.parametrize("source_suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("target_suffix", FORMATS)
def test_every_format_becomes_every_other(source_suffix: str, target_suffix: str, tmp_path: Path) -> None:
    source = write_source(tmp_path / f"in{source_suffix}", 25)
    target = tmp_path / f"out{target_suffix}"
    seen: list[int] = []
    engine = FakeEngine()
    report = score_file(
        engine, source, target, chunk_rows=10, scores=True, progress=lambda what, done, total: seen.append(done)
    )
    good = [i for i in range(25) if source_suffix == ".parquet" or i % 10 != 9]
    assert seen == [10, 20, 25]
    assert [len(call) for call in engine.calls] == ([10, 10, 5] if len(good) == 25 else [9, 9, 5])
    assert (report.rows, report.num_bad, report.truncated) == (len(good), 25 - len(good), 0)
    assert sum(report.exit_layer_counts.values()) == len(good)
    assert list(report.exit_layer_counts) == sorted(report.exit_layer_counts)
    rows = read_back(target)
    assert [row["id"] for row in rows] == [str(i) for i in good]
    added = ["label", "score", "exit_layer", "predicted_layer", "truncated", "scores"]
    for i, row in zip(good, rows, strict=True):
        assert list(row) == ["text", "id", *added]
        text = f'text "{i}",\r\nmore{"!" * (i % 7)}'
        assert row["text"] == (text.replace("\r\n", r"\r\n") if target_suffix == ".tsv" else text)
        made = FakeEngine().predict_columns([text])(0)
        expected = [made[name] for name in added]
        if "sv" in target_suffix:
            expected = [
                made["label"],
                repr(made["score"]),
                str(made["exit_layer"]),
                str(made["predicted_layer"]),
                "true" if made["truncated"] else "false",
                json.dumps(made["scores"]),
            ]
        assert [row[name] for name in added] == expected
    errors = target.with_name(target.name + ".errors.jsonl")
    assert beside(target) == ([errors.name] if report.num_bad else [])
    if report.num_bad:
        listed = [json.loads(line) for line in errors.read_text("utf-8").splitlines()]
        assert [BadRow(**row) for row in listed] == report.bad_rows


@pytest.mark.parametrize("source_suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("target_suffix", FORMATS)
@pytest.mark.parametrize("fail_at", [0, 1, 3])
def test_a_killed_run_goes_on_to_the_same_bytes(
    source_suffix: str, target_suffix: str, fail_at: int, tmp_path: Path
) -> None:
    source = write_source(tmp_path / f"in{source_suffix}", 45)
    whole, target = tmp_path / f"whole{target_suffix}", tmp_path / f"out{target_suffix}"
    expected = score_file(FakeEngine(), source, whole, chunk_rows=10)
    with pytest.raises(RuntimeError, match="killed"):
        score_file(FakeEngine(fail_at=fail_at), source, target, chunk_rows=10)
    assert not target.exists()
    with target.with_name(target.name + ".partial").open("ab") as file:
        file.write(b"half a li")  # a kill in the middle of a write
    engine = FakeEngine()
    seen: list[int] = []
    report = score_file(engine, source, target, chunk_rows=10, progress=lambda what, done, total: seen.append(done))
    assert len(engine.calls) == 5 - fail_at
    assert seen[-1] == 45
    assert target.read_bytes() == whole.read_bytes()
    assert (report.rows, report.num_bad, report.bad_rows, report.exit_layer_counts) == (
        expected.rows,
        expected.num_bad,
        expected.bad_rows,
        expected.exit_layer_counts,
    )
    errors = [path.with_name(path.name + ".errors.jsonl") for path in (target, whole)]
    if report.num_bad:
        assert errors[0].read_bytes() == errors[1].read_bytes()
    assert beside(target) == [file.name for file in errors[:1] if report.num_bad]


def test_a_process_that_is_killed_goes_on(tmp_path: Path) -> None:
    source = write_source(tmp_path / "in.jsonl", 45)
    script = f"""
import os, signal, sys, types
import numpy as np
# The package without its own __init__, which loads what this test does not need.
package = types.ModuleType("geep")
package.__path__ = [{str(Path(geep.__file__).parent)!r}]
sys.modules["geep"] = package
from geep.scoring import score_file
class Engine:
    calls = -1  # the first call is about no texts
    answered_by = dict(model=1)
    def predict_columns(self, texts, *, top_k=None, keep_broken=False):
        self.calls += 1
        if self.calls == int(sys.argv[2]) > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        ones = np.ones(len(texts), dtype=int)
        return types.SimpleNamespace(
            label_names=("a",), multi_label=False, label_ids=0 * ones, scores=ones / 2, exit_layers=ones,
            predicted_layers=ones, truncated=ones > 1, is_finite=ones > 0,
            unknown_shares=None,
        )
score_file(Engine(), {str(source)!r}, sys.argv[1], chunk_rows=10)
"""
    results = []
    for name, kills in (("whole.jsonl", [0]), ("killed.jsonl", [3, 0])):
        target = tmp_path / name
        for kill in kills:
            done = subprocess.run([sys.executable, "-c", script, str(target), str(kill)], check=False)
            assert done.returncode == (-signal.SIGKILL if kill else 0)
            assert target.exists() == (not kill)
        results.append(target.read_bytes())
    assert results[0] == results[1]
    assert results[0].count(b"\n") == 41


@pytest.mark.parametrize(
    "change",
    ["source", "chunk_rows", "scores", "top_k", "threshold", "engine", "journal", "partial", "errors", "none"],
)
def test_a_part_of_something_else_is_not_continued(change: str, tmp_path: Path) -> None:
    source = write_source(tmp_path / "in.jsonl", 45)
    target = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError, match="killed"):
        score_file(FakeEngine(fail_at=3), source, target, chunk_rows=10)
    chunk_rows, scores, engine = 10, False, FakeEngine()
    top_k, threshold = None, None
    match change:
        case "source":
            source.write_text(source.read_text("utf-8").replace("more", "mere", 1), "utf-8")
        case "chunk_rows":
            chunk_rows = 9
        case "scores":
            scores = True
        case "top_k":
            scores, top_k = True, 1
        case "threshold":
            threshold = 0.25
        case "engine":
            engine.answered_by["model"] = "another"
        case "journal":
            (tmp_path / "out.jsonl.partial.json").write_text('{"made_from": 1', "utf-8")
        case "partial":
            (tmp_path / "out.jsonl.partial").write_bytes(b"cut")
        case "errors":
            (tmp_path / "out.jsonl.errors.jsonl.partial").unlink()
    options: dict[str, Any] = {"chunk_rows": chunk_rows, "scores": scores, "top_k": top_k, "threshold": threshold}
    if change != "none":
        kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        said = {
            "source": "holds answers to rows of .*in.jsonl that have changed since",
            "chunk_rows": r"is of a run with other settings \(chunk_rows: 10 there, 9 now\)",
            "scores": "scores: false there, true now",
            "top_k": "scores: false there, true now; top_k: null there, 1 now",
            "threshold": "threshold: null there, 0.25 now",
            "engine": 'model: "first" there, "another" now',
            "journal": "has no journal out.jsonl.partial.json that can be read",
            "partial": "is shorter than its journal out.jsonl.partial.json says",
            "errors": "has no journal out.jsonl.partial.json that can be read",
        }[change]
        with pytest.raises(FileExistsError, match=f"out.jsonl.partial .*{said}.*cannot be continued.*--overwrite"):
            score_file(engine, source, target, **options)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
    score_file(engine, source, target, **options, overwrite=True)
    assert len(engine.calls) == (2 if change == "none" else 5)
    rows = read_back(target)
    assert [row["id"] for row in rows] == [str(i) for i in range(45) if i % 10 != 9]
    assert ("mere" in str(rows[0]["text"])) == (change == "source")
    assert all(("scores" in row) == scores for row in rows)


@contextmanager
def disk_of(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond this many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_full_disk_is_said_and_survived(suffix: str, tmp_path: Path) -> None:
    source = write_source(tmp_path / "in.csv", 1500)
    target, whole = tmp_path / f"out{suffix}", tmp_path / f"whole{suffix}"
    score_file(FakeEngine(), source, whole, chunk_rows=100)
    with (
        disk_of(whole.stat().st_size // 2),
        pytest.raises(
            OSError,
            match=r"refused a write.*The first [1-9]\d*00 rows .* are done and whole.*make room and run the same",
        ),
    ):
        score_file(FakeEngine(), source, target, chunk_rows=100)
    assert not target.exists()
    assert beside(target)
    score_file(FakeEngine(), source, target, chunk_rows=100)
    assert target.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("source_suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("target_suffix", FORMATS)
@pytest.mark.parametrize("scores", [False, True])
def test_no_rows_make_an_empty_valid_file(source_suffix: str, target_suffix: str, scores: bool, tmp_path: Path) -> None:
    source = write_source(tmp_path / f"in{source_suffix}", 0)
    target = tmp_path / f"out{target_suffix}"
    report = score_file(FakeEngine(), source, target, scores=scores)
    assert (report.rows, report.num_bad, report.exit_layer_counts) == (0, 0, {})
    assert read_back(target) == [] if source_suffix != ".jsonl" or "jsonl" in target_suffix else target.exists()
    if target_suffix == ".parquet":
        added = ["label", "score", "exit_layer", "predicted_layer", "truncated"] + ["scores"] * scores
        assert pq.read_schema(target).names == (["text", "id"] if source_suffix != ".jsonl" else []) + added


def test_the_first_hundred_bad_rows_are_reported(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\n' + "broken\n" * 150, "utf-8")
    report = score_file(FakeEngine(), source, tmp_path / "out.jsonl", chunk_rows=40)
    assert (report.rows, report.num_bad) == (1, 150)
    assert [row.line for row in report.bad_rows] == list(range(2, 102))
    assert (tmp_path / "out.jsonl.errors.jsonl").read_text("utf-8").count("\n") == 150
    source.write_text('{"text": "a"}\n', "utf-8")
    score_file(FakeEngine(), source, tmp_path / "out.jsonl", overwrite=True)
    assert beside(tmp_path / "out.jsonl") == []


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_columns_with_our_names_are_kept(suffix: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a", "label": "mine", "input_label": "older", "score": 1, "scores": 2}\n', "utf-8")
    target = tmp_path / f"out{suffix}"
    score_file(FakeEngine(), source, target)
    (row,) = read_back(target)
    assert list(row)[:5] == ["text", "input_input_label", "input_label", "input_score", "scores"]
    assert [row["input_input_label"], row["input_label"], row["label"]] == ["mine", "older", "short"]
    score_file(FakeEngine(), source, target, scores=True, overwrite=True)
    assert "input_scores" in read_back(target)[0]


def test_pairs_and_single_texts_may_be_mixed(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "ab", "text_pair": "c"}\n{"text": ""}\n{"text": "x", "text_pair": ""}\n', "utf-8")
    engine = FakeEngine()
    score_file(engine, source, tmp_path / "out.jsonl")
    assert engine.calls == [[""], [("ab", "c"), ("x", "")]]
    assert [row["score"] for row in read_back(tmp_path / "out.jsonl")] == [0.25, 1.0, 0.5]


def test_columns_of_json_lines_get_the_type_of_their_values(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = [
        {"text": "a", "i": 1, "f": 1, "b": True, "n": None, "m": 1, "l": [1, {"a": 2}], "big": 2**60, "huge": 2**70},
        {"text": "b", "f": 0.5, "m": "x", "late": "y", "big": 1},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    score_file(FakeEngine(), source, tmp_path / "out.parquet", chunk_rows=1)
    first, second = read_back(tmp_path / "out.parquet")
    assert [first[name] for name in ("i", "f", "b", "n", "m", "l", "late", "big", "huge")] == [
        1,
        1.0,
        True,
        None,
        "1",
        '[1, {"a": 2}]',
        None,
        2**60,
        str(2**70),
    ]
    assert [second[name] for name in ("i", "f", "m", "late", "big", "huge")] == [None, 0.5, '"x"', "y", 1, None]
    score_file(FakeEngine(), source, tmp_path / "out.csv")
    assert [row["m"] for row in read_back(tmp_path / "out.csv")] == ["1", "x"]


def test_values_that_json_lacks_are_spelled(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"], "d": [date(2024, 5, 1)], "x": [float("nan")], "raw": [b"\xff"], "s": [{"k": 1.5}]})
    pq.write_table(table, tmp_path / "in.parquet")
    score_file(FakeEngine(), tmp_path / "in.parquet", tmp_path / "out.jsonl")
    (row,) = read_back(tmp_path / "out.jsonl")
    assert [row[name] for name in ("d", "x", "raw", "s")] == ["2024-05-01", None, "/w==", {"k": 1.5}]
    score_file(FakeEngine(), tmp_path / "in.parquet", tmp_path / "out.parquet")
    scored = pq.read_table(tmp_path / "out.parquet")
    assert scored.schema.field("d").type == pa.date32()
    assert scored.schema.field("s").type == pa.struct([("k", pa.float64())])


def test_mistakes_are_said_before_anything_is_written(tiny_engine: Engine, tmp_path: Path) -> None:
    source = write_source(tmp_path / "in.jsonl", 5)
    link = tmp_path / "link.jsonl"
    link.symlink_to(source)
    engine = FakeEngine()
    before = sorted(tmp_path.iterdir())
    for target in (source, link):
        with pytest.raises(ValueError, match="would be overwritten"):
            score_file(engine, source, target)
    with pytest.raises(ValueError, match="no text column 'body'.*--text-column"):
        score_file(engine, source, tmp_path / "out.jsonl", text_column="body")
    with pytest.raises(ValueError, match="no known format"):
        score_file(engine, source, tmp_path / "out.txt")
    with pytest.raises(FileNotFoundError, match="no folder"):
        score_file(engine, source, tmp_path / "none" / "out.jsonl")
    with pytest.raises(FileNotFoundError, match="no file"):
        score_file(engine, tmp_path / "none.csv", tmp_path / "out.jsonl")
    with pytest.raises(FileNotFoundError, match="no file .*none/in.csv"):
        score_file(engine, tmp_path / "none" / "in.csv", tmp_path / "none" / "out.jsonl")
    with pytest.raises(ValueError, match="is a folder; write to a file, or to - for standard output"):
        score_file(engine, source, tmp_path)
    with pytest.raises(ValueError, match="/dev/null is a device or a pipe; write to a file, or to -"):
        score_file(engine, source, "/dev/null")
    with pytest.raises(ValueError, match=r"chunk_rows must be a whole number, at least 1; got 2\.5"):
        score_file(engine, source, tmp_path / "out.jsonl", chunk_rows=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunk_rows must be a whole number, at least 1; got 0"):
        score_file(engine, source, tmp_path / "out.jsonl", chunk_rows=0)
    with pytest.raises(ValueError, match="top_k=2 .* add scores=True"):
        score_file(engine, source, tmp_path / "out.jsonl", top_k=2)
    with pytest.raises(ValueError, match="threshold out of range"):
        score_file(engine, source, tmp_path / "out.jsonl", threshold=2)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        score_file(tiny_engine, source, tmp_path / "out.jsonl", scores=True, top_k=0)
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        score_file(engine, source, tmp_path / "folder.jsonl")
    assert engine.calls == []


def test_an_engine_that_loses_an_answer_is_caught(tmp_path: Path) -> None:
    class Short(FakeEngine):
        def predict_columns(self, texts: Any, /, **options: Any) -> Made:
            return super().predict_columns(texts[1:], **options)

    source = write_source(tmp_path / "in.jsonl", 5)
    with pytest.raises(RuntimeError, match="4 predictions for 5 texts"):
        score_file(Short(), source, tmp_path / "out.jsonl")


def test_gzip_results_do_not_depend_on_the_clock(tmp_path: Path) -> None:
    source = write_source(tmp_path / "in.csv", 30)
    report = score_file(FakeEngine(), source, tmp_path / "out.jsonl.gz")
    assert isinstance(report, ScoreReport)
    header = (tmp_path / "out.jsonl.gz").read_bytes()[:10]
    assert header[3:8] == bytes(5)
    with gzip.open(tmp_path / "out.jsonl.gz") as file:
        assert sum(1 for _ in file) == 27


def written_plainly(source: Path, suffix: str, said: list[dict[str, object]]) -> bytes | pa.Table:
    """A result made row by row, with nothing but `json`, `csv` and Arrow, of answers without scores."""
    records = [{**row, **answer} for row, answer in zip(read_back(source), said, strict=True)]
    if suffix == ".jsonl":
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    if suffix == ".csv":
        file = StringIO(newline="")
        writer = csv.writer(file)
        writer.writerow(records[0])
        for record in records:
            writer.writerow([value if isinstance(value, str) else json.dumps(value) for value in record.values()])
        return file.getvalue().replace("null", "").encode()
    kinds = {"score": pa.float64(), "exit_layer": pa.int32(), "predicted_layer": pa.int32(), "truncated": pa.bool_()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in records[0]])
    return pa.Table.from_pylist(records, schema=schema)


ADDED = ("label", "score", "exit_layer", "predicted_layer", "truncated")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("predicts", [True, False])
def test_results_of_a_stand_in_are_those_written_row_by_row(suffix: str, predicts: bool, tmp_path: Path) -> None:
    source = write_source(tmp_path / "in.jsonl", 45)
    target = tmp_path / f"out{suffix}"
    score_file(FakeEngine(predicts=predicts), source, target, chunk_rows=10)
    columns = FakeEngine(predicts=predicts).predict_columns([str(row["text"]) for row in read_back(source)])
    said = [{name: columns(row)[name] for name in ADDED} for row in range(len(columns.label_ids))]
    expected = written_plainly(source, suffix, said)
    assert (target.read_bytes() if isinstance(expected, bytes) else pq.read_table(target)) == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("table", [True, False])
def test_results_of_an_engine_are_those_written_row_by_row(
    suffix: str, table: bool, tiny_engine: Engine, tmp_path: Path
) -> None:
    engine = tiny_engine if table else make_engine(table=False)
    source = tmp_path / "in.jsonl"
    texts = random_texts(40, seed=3)
    source.write_text("".join(json.dumps({"text": text, "id": str(i)}) + "\n" for i, text in enumerate(texts)), "utf-8")
    target = tmp_path / f"out{suffix}"
    report = score_file(engine, source, target)
    answers = engine.predict(texts)
    expected = written_plainly(source, suffix, [{name: getattr(answer, name) for name in ADDED} for answer in answers])
    assert (target.read_bytes() if isinstance(expected, bytes) else pq.read_table(target)) == expected
    assert len(report.exit_layer_counts) > 1
    assert all((answer.predicted_layer is None) != table for answer in answers)


@pytest.fixture(scope="module")
def engines(tiny_engine: Engine) -> dict[str, Engine]:
    model = make_model(problem_type="multi_label_classification", num_labels=4)
    return {"single": tiny_engine, "multi": make_engine(model)}


@pytest.mark.parametrize("kind", ["single", "multi"])
@pytest.mark.parametrize(("top_k", "threshold"), [(None, None), (2, 0.3), (9, None)])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_labels_and_scores_of_an_engine_are_those_of_its_predictions(
    kind: str, top_k: int | None, threshold: float | None, suffix: str, engines: dict[str, Engine], tmp_path: Path
) -> None:
    engine = engines[kind]
    texts = random_texts(24, seed=4)
    inputs: list[Any] = [text if i % 3 else (text, f"w{i}") for i, text in enumerate(texts)]
    lines = [{"text": text} if i % 3 else {"text": text, "text_pair": f"w{i}"} for i, text in enumerate(texts)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    target = tmp_path / f"out{suffix}"
    score_file(engine, source, target, scores=True, top_k=top_k, threshold=threshold)
    answers: dict[int, Prediction] = {}
    for kept in ([i for i in range(24) if i % 3], [i for i in range(24) if i % 3 == 0]):
        options = {} if threshold is None else {"threshold": threshold}
        answers.update(zip(kept, engine.predict([inputs[i] for i in kept], top_k=top_k, **options), strict=True))
    rows = read_back(target)
    ours = ["label", "score", *["labels"] * (kind == "multi"), "exit_layer", "predicted_layer", "truncated", "scores"]
    for i, row in enumerate(rows):
        assert list(row)[-len(ours) :] == ours
        scores: Any = row["scores"]
        labels: Any = row.get("labels")
        if "sv" in suffix:
            scores, labels = json.loads(str(scores)), json.loads(str(labels)) if labels else None
        if suffix == ".parquet":
            assert list(scores) == list(engine.label_names)
            scores = {name: value for name, value in scores.items() if value is not None}
            assert scores == answers[i].scores
        else:
            assert list(scores.items()) == list(answers[i].scores.items())
        assert labels == (list(answers[i].labels) if kind == "multi" else None)
    if suffix == ".parquet" and kind == "multi":
        assert pq.read_schema(target).field("labels").type == pa.list_(pa.string())
        assert len({tuple(answer.labels) for answer in answers.values()}) > 1


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("rows", [0, 25])
def test_the_labels_that_hold_stand_after_the_score(suffix: str, rows: int, tmp_path: Path) -> None:
    source = write_source(tmp_path / "in.csv", rows)
    target = tmp_path / f"out{suffix}"
    score_file(FakeEngine(multi_label=True), source, target, chunk_rows=10, threshold=0.75)
    found = read_back(target)
    assert len(found) == rows - rows // 10
    for row in found:
        assert list(row) == ["text", "id", "label", "score", "labels", "exit_layer", "predicted_layer", "truncated"]
        expected = ["long", *["even"] * (len(str(row["text"])) % 2 == 0)]
        assert row["labels"] == (json.dumps(expected) if "sv" in suffix else expected)
    if suffix == ".parquet":
        assert pq.read_schema(target).field("labels").type == pa.list_(pa.string())


def test_a_column_called_labels_is_renamed_where_the_result_has_one(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "a", "labels": "mine"}\n', "utf-8")
    score_file(FakeEngine(), source, target)
    assert read_back(target)[0]["labels"] == "mine"
    score_file(FakeEngine(multi_label=True), source, target, overwrite=True)
    (row,) = read_back(target)
    assert (row["input_labels"], row["labels"]) == ("mine", ["long", "short"])
    score_file(FakeEngine(multi_label=True), source, tmp_path / "out.parquet")
    assert read_back(tmp_path / "out.parquet") == [row]


def test_an_empty_parquet_result_has_the_types_of_a_full_one(tmp_path: Path) -> None:
    schemas = []
    for rows in (0, 5):
        source = write_source(tmp_path / "in.csv", rows)
        options = {"scores": True, "top_k": 1, "overwrite": True}
        score_file(FakeEngine(multi_label=True), source, tmp_path / "out.parquet", **options)  # type: ignore[arg-type]
        schemas.append(pq.read_schema(tmp_path / "out.parquet"))
    assert schemas[0] == schemas[1]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".jsonl.gz"])
@pytest.mark.parametrize("rows", [20, 25])
def test_progress_tells_the_rows_and_how_many_there_are(suffix: str, rows: int, tmp_path: Path) -> None:
    source = write_source(tmp_path / f"in{suffix.removesuffix('.gz')}", rows)
    if suffix.endswith(".gz"):
        source = source.with_name("in.jsonl.gz")
        source.write_bytes(gzip.compress((tmp_path / "in.jsonl").read_bytes()))
    seen: list[tuple[str, int, int | None]] = []
    score_file(FakeEngine(), source, tmp_path / "out.jsonl", chunk_rows=10, progress=lambda *told: seen.append(told))
    dones = [10, 20, 25] if rows == 25 else [10, 20]
    assert [told[:2] for told in seen] == [("rows", done) for done in dones]
    totals = [told[2] for told in seen]
    if suffix.endswith(".gz"):
        assert set(totals) == {None}
    else:
        assert totals[-1] == rows
        # A field of the CSV file has two lines, and its header is none of its rows.
        assert set(totals[:-1]) == {rows + (rows - rows // 10 if suffix == ".csv" else 0)}


def test_lines_are_counted_only_where_that_takes_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('\n{"text": "a"}\n\n{"text": "b"}', "utf-8")  # blank lines count until they are read

    def totals() -> list[int | None]:
        seen: list[int | None] = []
        score_file(
            FakeEngine(),
            source,
            tmp_path / "out.jsonl",
            chunk_rows=1,
            overwrite=True,
            progress=lambda what, done, total: seen.append(total),
        )
        return seen

    assert totals() == [4, 2]
    monkeypatch.setattr(stream_file, "_MAX_COUNTED_BYTES", 10)
    assert totals() == [None, None]


def test_an_engine_is_a_scorer(tiny_engine: Engine) -> None:
    scorer: Scorer = tiny_engine  # mypy says so too
    assert len(scorer.predict_columns([], top_k=1, threshold=0.5).label_names) == 3


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_source_that_gains_a_column_meanwhile_is_refused(suffix: str, tmp_path: Path) -> None:
    source = write_source(tmp_path / "in.jsonl", 5)

    class Changing(FakeEngine):
        def predict_columns(self, texts: Any, /, **options: Any) -> Made:
            if texts and not self.calls:
                with source.open("a") as file:
                    file.write('{"text": "a", "new": 1}\n')
            return super().predict_columns(texts, **options)

    with pytest.raises(ValueError, match=r"up to line 6 .*\['new'\].*do not change it"):
        score_file(Changing(), source, tmp_path / f"out{suffix}", chunk_rows=2)


# What stays of a run that ends early


class Kill(BaseException):
    """Ends a run where it stands, as a kill would."""


def raising(*_: object) -> None:
    raise Kill


@pytest.mark.parametrize("suffix", [".jsonl", ".csv.gz", ".parquet"])
@pytest.mark.parametrize("source_suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("replaces", [False, True])
def test_a_kill_while_names_are_given_scores_nothing_again(
    suffix: str, source_suffix: str, replaces: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / f"in{source_suffix}", 30)
    whole = tmp_path / f"whole{suffix}"
    expected = score_file(FakeEngine(), source, whole, chunk_rows=10)
    publish = Journal.publish
    for step in range(8):
        target = tmp_path / f"out{step}{suffix}"
        if replaces:
            target.write_bytes(b"older")
            target.with_name(target.name + ".errors.jsonl").write_bytes(b"older")
        left = step

        def counted(real: Any) -> Any:
            def act(*args: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Kill
                return real(*args, **options)

            return act

        def watched(journal: Journal, files: Any) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "replace", counted(os.replace))
                patch.setattr(Path, "unlink", counted(Path.unlink))
                publish(journal, files)

        monkeypatch.setattr(Journal, "publish", watched)
        try:
            first = score_file(FakeEngine(), source, target, chunk_rows=10, overwrite=replaces)
        except Kill:
            monkeypatch.setattr(Journal, "publish", publish)
            engine = FakeEngine()
            first = score_file(engine, source, target, chunk_rows=10, overwrite=replaces)
            assert engine.calls == []
            is_killed = True
        else:
            is_killed = False
        assert replace(first, seconds=0, errors_file=None) == replace(expected, seconds=0, errors_file=None)
        assert target.read_bytes() == whole.read_bytes()
        assert beside(target) == ([f"{target.name}.errors.jsonl"] if expected.num_bad else [])
        if not is_killed:
            assert step >= 4
            return
    raise AssertionError("there are more steps than were tried")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv.gz", ".parquet"])
def test_a_finished_file_that_is_lost_is_made_again_of_what_is_whole(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, whole = write_source(tmp_path / "in.jsonl", 30), tmp_path / f"out{suffix}", tmp_path / f"w{suffix}"
    score_file(FakeEngine(), source, whole, chunk_rows=10)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "publish", raising)
        with pytest.raises(Kill):
            score_file(FakeEngine(), source, target, chunk_rows=10)
    if suffix == ".parquet":
        (tmp_path / "out.parquet.partial.parquet").unlink()
    else:
        os.utime(tmp_path / f"out{suffix}.partial", (1, 1))
    engine = FakeEngine()
    score_file(engine, source, target, chunk_rows=10)
    assert engine.calls == []
    assert target.read_bytes() == whole.read_bytes()
    errors = [path.with_name(path.name + ".errors.jsonl").read_bytes() for path in (target, whole)]
    assert errors[0] == errors[1]


def test_only_one_run_writes_a_result(tmp_path: Path) -> None:
    source, target = write_source(tmp_path / "in.jsonl", 25), tmp_path / "out.jsonl"

    class Meanwhile(FakeEngine):
        def predict_columns(self, texts: Any, /, **options: Any) -> Made:
            if texts:
                with pytest.raises(BlockingIOError, match=r"Another run is writing .*out\.jsonl.*wait"):
                    score_file(FakeEngine(), source, target)
            return super().predict_columns(texts, **options)

    (tmp_path / "out.jsonl.partial.lock").touch()  # left behind by a process that was killed
    score_file(Meanwhile(), source, target, chunk_rows=10)
    assert beside(target) == ["out.jsonl.errors.jsonl"]
    assert len(read_back(target)) == 23


def test_a_result_is_replaced_only_where_it_is_said(tmp_path: Path) -> None:
    source, target = write_source(tmp_path / "in.jsonl", 25), tmp_path / "out.jsonl"
    score_file(FakeEngine(), source, target)
    before = target.read_bytes()
    with pytest.raises(FileExistsError, match=r"out\.jsonl exists: a finished result.*overwrite=True \(--overwrite\)"):
        score_file(FakeEngine(), source, target)
    engine = FakeEngine(fail_at=1)
    with pytest.raises(RuntimeError, match="killed"):
        score_file(engine, source, target, chunk_rows=10, overwrite=True)
    assert target.read_bytes() == before
    with pytest.raises(FileExistsError):
        score_file(FakeEngine(), source, target, chunk_rows=10)
    engine = FakeEngine()
    score_file(engine, source, target, chunk_rows=10, overwrite=True)
    assert len(engine.calls) == 2
    assert target.read_bytes() == before


def test_what_an_earlier_run_has_left_is_replaced_only_where_it_is_said(tmp_path: Path) -> None:
    source, target = write_source(tmp_path / "in.jsonl", 25), tmp_path / "out.jsonl"
    score_file(FakeEngine(), source, target)
    target.rename(tmp_path / "moved.jsonl")
    errors = tmp_path / "out.jsonl.errors.jsonl"
    listed = errors.read_bytes()
    source.write_text('{"text": "a"}\n', "utf-8")
    with pytest.raises(FileExistsError, match=r"out\.jsonl\.errors\.jsonl exists: the rows that another.*--overwrite"):
        score_file(FakeEngine(), source, target)
    assert errors.read_bytes() == listed
    score_file(FakeEngine(), source, target, overwrite=True)
    assert not errors.exists()
    part = tmp_path / "other.jsonl.partial"
    part.write_bytes(b"mine")
    for name, other in (("other.jsonl", source), ("other.jsonl", Path("-"))):
        with pytest.raises(FileExistsError, match=r"other\.jsonl\.partial has no journal.*--overwrite"):
            score_file(FakeEngine(), other, tmp_path / name)
    assert part.read_bytes() == b"mine"
    score_file(FakeEngine(), source, tmp_path / "other.jsonl", overwrite=True)
    assert not part.exists()


def test_a_part_of_a_file_is_not_replaced_by_a_pipe(tmp_path: Path) -> None:
    source, target = write_source(tmp_path / "in.jsonl", 45), tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError, match="killed"):
        score_file(FakeEngine(fail_at=3), source, target, chunk_rows=10)
    with pytest.raises(FileExistsError, match="from_pipe: false there, true now"):
        score_file(FakeEngine(), "-", target, chunk_rows=10)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_long_rows_make_chunks_of_fewer(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["x" * (1000 if 20 <= i < 30 else 1) for i in range(50)]
    rows = pa.table({"text": [str(i) for i in range(50)], "body": texts})
    source, target, whole = (tmp_path / f"{name}{suffix}" for name in ("in", "out", "whole"))
    if suffix == ".parquet":
        pq.write_table(rows, source, row_group_size=10)
    elif suffix == ".csv":
        pa.csv.write_csv(rows, source)
    else:
        source.write_text("".join(json.dumps(row) + "\n" for row in rows.to_pylist()), "utf-8")
    monkeypatch.setattr(chunks, "_MAX_CONTENT", 3000)
    engine = FakeEngine()
    score_file(engine, source, whole, chunk_rows=20)
    sizes = [len(call) for call in engine.calls]
    assert sum(sizes) == 50
    assert (sizes[0], sizes[1]) == (20, 3)
    assert max(sizes) == 20
    with pytest.raises(RuntimeError, match="killed"):
        score_file(FakeEngine(fail_at=3), source, target, chunk_rows=20)
    engine = FakeEngine()
    score_file(engine, source, target, chunk_rows=20)
    assert [len(call) for call in engine.calls] == sizes[3:]
    assert target.read_bytes() == whole.read_bytes()


def test_long_rows_of_parquet_are_read_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_BATCH_BYTES", 50_000)
    source = tmp_path / "in.parquet"
    rows = pa.table({"text": [f"{i:010000}" for i in range(40)]})
    pq.write_table(rows, source, use_dictionary=False, row_group_size=20)
    fields = [row.fields for row in read_rows(source) if isinstance(row, Row)]
    assert [item["text"] for item in fields] == rows["text"].to_pylist()
    sizes = {item.part.batch.num_rows for item in fields if isinstance(item, parquet.ArrowFields)}
    assert 1 <= max(sizes) <= 5


def test_a_folder_that_takes_no_files_is_named(tmp_path: Path) -> None:
    source = write_source(tmp_path / "in.jsonl", 5)
    with pytest.raises(OSError, match="Nothing can be written to the folder /proc .*write to another folder"):
        score_file(FakeEngine(), source, "/proc/out.jsonl")


def test_the_name_of_a_link_says_the_format_and_a_device_is_no_result(tmp_path: Path) -> None:
    source, link = write_source(tmp_path / "in.jsonl", 5), tmp_path / "out.parquet"
    link.symlink_to(tmp_path / "blob")
    score_file(FakeEngine(), source, link)
    assert pq.read_table(tmp_path / "blob").num_rows == 5
    (tmp_path / "full.jsonl").symlink_to("/dev/full")
    with pytest.raises(ValueError, match="/dev/full is a device or a pipe; write to a file"):
        score_file(FakeEngine(), source, tmp_path / "full.jsonl")


def test_a_link_stays_one(tmp_path: Path) -> None:
    source = write_source(tmp_path / "in.jsonl", 25)
    (tmp_path / "there").mkdir()
    link, place = tmp_path / "out.jsonl", tmp_path / "there" / "real.jsonl"
    link.symlink_to(place)
    (tmp_path / "from.jsonl").symlink_to(source)
    report = score_file(FakeEngine(), tmp_path / "from.jsonl", link)
    assert link.is_symlink()
    assert len(read_back(place)) == report.rows == 23
    assert report.errors_file == f"{place}.errors.jsonl"
    assert beside(link) == []


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_text_without_finite_scores_is_left_out(suffix: str, tmp_path: Path) -> None:
    source, target = write_source(tmp_path / "in.jsonl", 25), tmp_path / f"out{suffix}"
    report = score_file(FakeEngine(broken='"3"'), source, target, chunk_rows=10, scores=True)
    assert [row["id"] for row in read_back(target)] == [str(i) for i in range(25) if i not in (3, 9, 19)]
    assert [row.line for row in report.bad_rows] == [4, 10, 20]
    assert "no finite scores" in report.bad_rows[0].reason
    assert report.rows == sum(report.exit_layer_counts.values()) == 22


def test_an_engine_goes_on_after_a_text_without_finite_scores(tmp_path: Path) -> None:
    engine = make_engine(table=False)
    texts = [f"w{i} w{i + 1}" for i in range(12)]
    answers = engine.predict(texts)
    vocabulary = engine.tokenizer.get_vocab()
    with torch.no_grad():
        engine.model.get_input_embeddings().weight[vocabulary["w5"]] = float("nan")
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    report = score_file(engine, source, target)
    assert [row.line for row in report.bad_rows] == [5, 6]
    kept = [answer for i, answer in enumerate(answers) if i not in (4, 5)]
    assert [row["label"] for row in read_back(target)] == [answer.label for answer in kept]
    assert [row["score"] for row in read_back(target)] == pytest.approx([answer.score for answer in kept], abs=1e-6)


def damaged_gzip(path: Path, rows: int) -> tuple[Path, bytes]:
    """A compressed file cut in its middle, and its bytes before."""
    source = write_source(path.with_name("plain.jsonl"), rows)
    whole = gzip.compress(source.read_bytes(), mtime=0)
    path.write_bytes(whole[: len(whole) // 2])
    return path, whole


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("chunk_rows", [10, 4096])
def test_rows_before_the_damage_are_kept_and_a_mended_file_goes_on(
    suffix: str, chunk_rows: int, tmp_path: Path
) -> None:
    source, bytes_of_whole = damaged_gzip(tmp_path / "in.jsonl.gz", 500)
    target, whole = tmp_path / f"out{suffix}", tmp_path / f"whole{suffix}"
    first = FakeEngine()
    with pytest.raises(
        ValueError, match=r"is damaged after line \d+.* (\d+) rows of the source are done, in .*Mend"
    ) as e:
        score_file(first, source, target, chunk_rows=chunk_rows)
    done = int(re.search(r"(\d+) rows of the source are done", str(e.value))[1])  # type: ignore[index]
    assert sum(map(len, first.calls)) == done - done // 10 > 100
    partial = tmp_path / f"out{suffix}.partial"
    if suffix != ".parquet":
        kept = tmp_path / f"kept{suffix}"
        kept.write_bytes(partial.read_bytes())
        assert len(read_back(kept)) == done - done // 10
    source.write_bytes(bytes_of_whole)
    second = FakeEngine()
    score_file(second, source, target, chunk_rows=chunk_rows)
    assert len(second.calls) == (50 - done // 10 if chunk_rows == 10 else 1)
    score_file(FakeEngine(), source, whole, chunk_rows=chunk_rows)
    assert target.read_bytes() == whole.read_bytes()


def test_rows_before_a_damaged_page_of_parquet_are_kept(tmp_path: Path) -> None:
    source, target = tmp_path / "in.parquet", tmp_path / "out.jsonl"
    table = pa.table({"text": [f"{i} " + "x" * 100 for i in range(6000)]})
    pq.write_table(table, source, row_group_size=2000, compression="none", use_dictionary=False)
    whole = source.read_bytes()
    column = pq.ParquetFile(source).metadata.row_group(2).column(0)
    start = column.data_page_offset
    source.write_bytes(whole[:start] + b"\xff" * 64 + whole[start + 64 :])
    engine = FakeEngine()
    with pytest.raises(ValueError, match="4000 rows of the source are done"):
        score_file(engine, source, target, chunk_rows=500)
    source.write_bytes(whole)
    engine = FakeEngine()
    assert score_file(engine, source, target, chunk_rows=500).rows == 6000
    assert sum(map(len, engine.calls)) == 2000


@pytest.mark.parametrize("source_suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("change", ["done", "after", "longer", "shorter", "touched"])
def test_a_source_is_known_again_by_its_rows(
    source_suffix: str, change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = write_source(tmp_path / f"in{source_suffix}", 45), tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError, match="killed"):
        score_file(FakeEngine(fail_at=3), source, target, chunk_rows=10)
    match change:
        case "done" | "after":
            write_source(source, 45, changed=5 if change == "done" else 41)
        case "longer" | "shorter":
            write_source(source, 60 if change == "longer" else 20)
        case "touched":
            os.utime(source, (1, 1))
    engine = FakeEngine()
    starts_over = change in ("done", "shorter")
    if starts_over:
        with pytest.raises(FileExistsError, match=r"rows of .* that have changed since"):
            score_file(engine, source, target, chunk_rows=10)
    report = score_file(engine, source, target, chunk_rows=10, overwrite=starts_over)
    assert len(engine.calls) == {"done": 5, "after": 2, "longer": 3, "shorter": 2, "touched": 2}[change]
    assert ("that have changed since" in caplog.text) == starts_over
    whole = score_file(FakeEngine(), source, tmp_path / "whole.jsonl", chunk_rows=10)
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert report.rows == whole.rows


# Pipes


def through_pipe(path: Path, data: bytes) -> threading.Thread:
    """Writes into a FIFO, once, when somebody reads it."""
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(data,))
    writer.start()
    return writer


@pytest.mark.parametrize("source_suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_pipe_is_read_once(source_suffix: str, suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = write_source(tmp_path / f"in{source_suffix}", 25)
    whole, target = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    score_file(FakeEngine(), plain, whole, chunk_rows=10)
    caplog.clear()
    writer = through_pipe(tmp_path / f"pipe{source_suffix}", plain.read_bytes())
    score_file(FakeEngine(), tmp_path / f"pipe{source_suffix}", target, chunk_rows=10, progress=lambda *told: None)
    writer.join()
    assert target.read_bytes() == whole.read_bytes()
    assert "is read once" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_a_row_of_a_pipe_that_fits_no_column_is_left_out(suffix: str, tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [{"text": "a", "n": 1}, {"text": "b"}, {"text": "c", "new": 2}]
    lines += [{"text": "d", "n": "x"}, {"text": "e", "n": 2}]
    pipe, target = tmp_path / "in.jsonl", tmp_path / f"out{suffix}"
    writer = through_pipe(pipe, "".join(json.dumps(line) + "\n" for line in lines).encode())
    report = score_file(FakeEngine(), pipe, target, chunk_rows=2)
    writer.join()
    reasons = {row.line: row.reason for row in report.bad_rows}
    expected = {".csv": [3], ".parquet": [3, 4], ".jsonl": []}[suffix]
    assert list(reasons) == expected
    if 3 in expected:
        assert reasons[3] == "column 'new' is not among those of the first rows: ['text', 'n']"
    if 4 in expected:
        assert reasons[4] == "column 'n' holds int64 in the first rows, found \"x\""
    assert len(read_back(target)) == 5 - len(expected)


def test_a_pipe_that_breaks_off_is_not_continued(tmp_path: Path) -> None:
    _, whole = damaged_gzip(tmp_path / "in.jsonl.gz", 500)
    target = tmp_path / "out.jsonl"
    writer = through_pipe(tmp_path / "pipe.jsonl.gz", whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="run again from the beginning: what came through a pipe"):
        score_file(FakeEngine(), tmp_path / "pipe.jsonl.gz", target, chunk_rows=10)
    writer.join()
    (tmp_path / "pipe.jsonl.gz").unlink()
    writer = through_pipe(tmp_path / "pipe.jsonl.gz", whole)
    engine = FakeEngine()
    assert score_file(engine, tmp_path / "pipe.jsonl.gz", target, chunk_rows=10).rows == 450
    writer.join()
    assert len(engine.calls) == 50


def test_standard_input_goes_to_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain, target = write_source(tmp_path / "in.jsonl", 25), tmp_path / "out.jsonl"
    expected = score_file(FakeEngine(), plain, target, chunk_rows=10)
    with plain.open("rb") as file:
        monkeypatch.setattr("sys.stdin", TextIOWrapper(file))
        report = score_file(FakeEngine(), "-", "-", chunk_rows=10)
    assert capfdbinary.readouterr().out == target.read_bytes()
    assert (report.rows, report.num_bad, report.errors_file) == (expected.rows, expected.num_bad, None)
    assert "Line 10 is left out: invalid JSON" in caplog.text
    assert sorted(tmp_path.iterdir()) == [plain, target, tmp_path / "out.jsonl.errors.jsonl"]


def test_standard_output_warns_of_a_hundred_rows_and_tells_how_many(
    tmp_path: Path, capfdbinary: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\n' + "broken\n" * 250, "utf-8")
    assert score_file(FakeEngine(), source, "-", chunk_rows=60).num_bad == 250
    said = [record.getMessage() for record in caplog.records]
    assert [message.split(":")[0] for message in said[:-1]] == [f"Line {i + 2} is left out" for i in range(100)]
    assert said[-1] == "250 rows are left out in all; the first 100 were said."


# Columns that are carried


def of_integers(kind: pa.DataType, values: list[int | None]) -> pa.Array:
    """Times by the numbers that are stored."""
    return pa.array(values, pa.int32() if kind.bit_width == 32 else pa.int64()).view(kind)


NANOSECONDS = 1_700_000_000_123_456_789
CARRIED: dict[str, tuple[pa.Array, object, str]] = {
    # Name: three values (the second a null), the first in JSON, the first in CSV.
    "ns": (
        of_integers(pa.timestamp("ns"), [NANOSECONDS, None, -1]),
        "2023-11-14T22:13:20.123456789",
        "2023-11-14T22:13:20.123456789",
    ),
    "ns_zone": (
        of_integers(pa.timestamp("ns", "Europe/Berlin"), [NANOSECONDS, None, 0]),
        "2023-11-14T23:13:20.123456789+01:00",
        "2023-11-14T23:13:20.123456789+01:00",
    ),
    "us": (of_integers(pa.timestamp("us"), [5, None, 0]), "1970-01-01T00:00:00.000005", "1970-01-01T00:00:00.000005"),
    "far": (
        of_integers(pa.timestamp("us"), [2**62, None, 0]),
        "4611686018427387904 us since 1970-01-01",
        "4611686018427387904 us since 1970-01-01",
    ),
    "far_zone": (
        of_integers(pa.timestamp("ms", "UTC"), [2**60, None, 0]),
        "1152921504606846976 ms since 1970-01-01",
        "1152921504606846976 ms since 1970-01-01",
    ),
    "far_day": (
        of_integers(pa.date32(), [2**30, None, 0]),
        "1073741824 days since 1970-01-01",
        "1073741824 days since 1970-01-01",
    ),
    "no_zone": (
        of_integers(pa.timestamp("ms", "Nowhere/Here"), [60_000, None, 0]),
        "1970-01-01T00:01:00+00:00",
        "1970-01-01T00:01:00+00:00",
    ),
    "time_ns": (of_integers(pa.time64("ns"), [1001, None, 0]), "00:00:00.000001001", "00:00:00.000001001"),
    "duration": (of_integers(pa.duration("ns"), [-1500, None, 0]), "PT-0.0000015S", "PT-0.0000015S"),
    "long_duration": (of_integers(pa.duration("s"), [2**50, None, 0]), f"PT{2**50}S", f"PT{2**50}S"),
    "decimal": (pa.array([Decimal("12.50"), None, Decimal("0.01")], pa.decimal128(9, 2)), "12.50", "12.50"),
    "wide_decimal": (
        pa.array([Decimal("9" * 60), None, Decimal(1)], pa.decimal256(70, 0)),
        "9" * 60,
        "9" * 60,
    ),
    "dictionary": (pa.array(["b", None, "a"]).dictionary_encode(), "b", "b"),
    "view": (
        pa.array(["long enough to be kept elsewhere", None, ""], pa.string_view()),
        "long enough to be kept elsewhere",
        "long enough to be kept elsewhere",
    ),
    "large": (pa.array(["x", None, ""], pa.large_string()), "x", "x"),
    "bytes": (pa.array([b"\xff\x00", None, b""]), "/wA=", "/wA="),
    "fixed": (pa.array([b"ab", None, b"cd"], pa.binary(2)), "YWI=", "YWI="),
    "unsigned": (pa.array([2**64 - 1, None, 0], pa.uint64()), 2**64 - 1, str(2**64 - 1)),
    "infinite": (pa.array([float("-inf"), None, 1.5]), "-Infinity", "-Infinity"),
    "nan": (pa.array([float("nan"), None, 1.5]), None, "NaN"),
    "half": (pa.array(np.array([0.5, 1, 2], np.float16), mask=np.array([0, 1, 0], bool)), 0.5, "0.5"),
    "nothing": (pa.nulls(3), None, ""),
    "list_ns": (
        pa.ListArray.from_arrays(pa.array([0, None, 2, 2], pa.int32()), of_integers(pa.timestamp("ns"), [1, None])),
        ["1970-01-01T00:00:00.000000001", None],
        '["1970-01-01T00:00:00.000000001", null]',
    ),
    "pair_list": (pa.array([[1, None], None, [2, 3]], pa.list_(pa.int8(), 2)), [1, None], "[1, null]"),
    "map": (
        pa.array([[("k", timedelta(seconds=90))], None, []], pa.map_(pa.string(), pa.duration("ms"))),
        [["k", "PT90S"]],
        '[["k", "PT90S"]]',
    ),
    "struct": (
        pa.array(
            [{"d": Decimal("1.0"), "l": [{"b": b"\x00"}]}, None, {"d": None, "l": None}],
            pa.struct([("d", pa.decimal128(5, 1)), ("l", pa.list_(pa.struct([("b", pa.binary())])))]),
        ),
        {"d": "1.0", "l": [{"b": "AA=="}]},
        '{"d": "1.0", "l": [{"b": "AA=="}]}',
    ),
}


def is_kept(column: pa.Array) -> bool:
    """Whether this pyarrow keeps a column in Parquet: old ones have no views, no lists of a fixed size, other maps."""
    table, file = pa.table({"it": column}), pa.BufferOutputStream()
    try:
        pq.write_table(table, file)
        found = pq.read_table(pa.BufferReader(file.getvalue())).column("it").type
    except pa.ArrowException:
        return False
    return not pa.types.is_map(column.type) or found == column.type


def carried_source(path: Path) -> pa.Table:
    """A Parquet file of every kind of column, with metadata of schema and fields; its middle row is a bad one."""
    columns = {"text": pa.array(["a", None, "b"])} | {
        name: column for name, (column, _, _) in CARRIED.items() if is_kept(column)
    }
    fields = [pa.field(name, column.type, metadata={"unit": name}) for name, column in columns.items()]
    table = pa.table(list(columns.values()), schema=pa.schema(fields, metadata={"source": "a test"}))
    pq.write_table(table, path)
    return pq.read_table(path)


def test_parquet_columns_go_to_parquet_as_they_are(tmp_path: Path) -> None:
    table = carried_source(tmp_path / "in.parquet")
    target = tmp_path / "out.parquet"
    report = score_file(FakeEngine(), tmp_path / "in.parquet", target)
    assert [row.line for row in report.bad_rows] == [2]
    found = pq.read_table(target).drop_columns(list(ADDED))
    assert found.schema.equals(table.schema, check_metadata=True)
    nan = ["nan"]
    good = pa.concat_tables([table.slice(0, 1), table.slice(2, 1)])
    assert found.drop_columns(nan).equals(good.drop_columns(nan))
    np.testing.assert_array_equal(found["nan"], good["nan"])


@pytest.mark.parametrize("name", CARRIED)
def test_every_arrow_type_has_a_form_in_json_and_csv(name: str, tmp_path: Path) -> None:
    column, in_json, in_csv = CARRIED[name]
    source = tmp_path / "in.parquet"
    # Beside slices and several batches, of which values must be those of their rows.
    table = pa.table({"text": ["a", "b", "c"], "it": column})
    if not is_kept(column):
        pytest.skip(f"pyarrow {pa.__version__} does not keep {column.type} in Parquet")
    pq.write_table(pa.concat_tables([table] * 400), source)
    score_file(FakeEngine(), source, tmp_path / "out.jsonl", chunk_rows=1000)
    score_file(FakeEngine(), source, tmp_path / "out.csv", chunk_rows=1000)
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    cells = [str(row["it"]) for row in read_back(tmp_path / "out.csv")]
    assert [record["it"] for record in records[::3]] == [in_json] * 400
    assert cells[::3] == [in_csv] * 400
    assert {record["it"] for record in records[1::3]} == {None}
    assert set(cells[1::3]) == {""}
    assert len({json.dumps(record["it"]) for record in records[2::3]}) == 1
    first, *_ = read_rows(source)
    assert isinstance(first, Row)
    assert json.loads(json_text(first.fields["it"])) == in_json


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int8(), pa.string()),
    ],
    ids=str,
)
def test_texts_of_every_string_type_are_read(kind: pa.DataType, tmp_path: Path) -> None:
    source, texts = tmp_path / "in.parquet", ["größer", "", "b" * 20, "größer"]
    table = pa.table({"text": pa.array(texts).cast(kind), "text_pair": pa.array(texts[::-1]).cast(kind)})
    if not is_kept(table.column("text")):
        pytest.skip(f"pyarrow {pa.__version__} does not keep {kind} in Parquet")
    pq.write_table(table, source)
    engine = FakeEngine()
    score_file(engine, source, tmp_path / "out.jsonl")
    assert engine.calls == [list(zip(texts, texts[::-1], strict=True))]
    assert [row["text"] for row in read_back(tmp_path / "out.jsonl")] == texts
    score_file(engine, source, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").drop_columns(list(ADDED)).equals(pq.read_table(source))


def test_bytes_that_are_no_text_are_a_bad_row_that_names_the_byte(tmp_path: Path) -> None:
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": pa.array([b"a", b"ab\xff", b"c"])}), source)
    report = score_file(FakeEngine(), source, tmp_path / "out.jsonl")
    (bad,) = report.bad_rows
    assert (bad.line, bad.reason) == (2, "column 'text' is not UTF-8: byte 0xff at byte 3 of the value")
    assert [row["text"] for row in read_back(tmp_path / "out.jsonl")] == ["a", "c"]


def test_bad_bytes_in_a_column_beside_the_text_are_kept(tmp_path: Path) -> None:
    source = tmp_path / "in.parquet"
    broken = pa.array([b"a\xff", b"b"]).view(pa.string())
    pq.write_table(pa.table({"text": ["x", "y"], "id": broken}), source)
    score_file(FakeEngine(), source, tmp_path / "out.jsonl")
    assert [row["id"] for row in read_back(tmp_path / "out.jsonl")] == ["a\\xff", "b"]
    score_file(FakeEngine(), source, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["id"].cast(pa.binary()).to_pylist() == [b"a\xff", b"b"]


def test_categories_that_differ_between_row_groups_stay_what_they_are(tmp_path: Path) -> None:
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    parts = [pa.array(words).dictionary_encode() for words in (["a", "b"], ["c", "a"], ["d", "d"])]
    schema = pa.schema([("text", pa.string()), ("it", parts[0].type)])
    with pq.ParquetWriter(source, schema) as writer:
        for part in parts:
            writer.write_table(pa.table([["x", "y"], part], schema=schema))
    score_file(FakeEngine(), source, target, chunk_rows=3)
    found = pq.read_table(target)["it"]
    assert found.type == parts[0].type
    assert found.to_pylist() == ["a", "b", "c", "a", "d", "d"]


def test_names_that_pandas_wrote_are_those_of_the_result(tmp_path: Path) -> None:
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    said = {
        "index_columns": ["label", {"kind": "range", "start": 0}],
        "columns": [{"name": "text", "field_name": "text"}, {"name": None, "field_name": "label"}],
    }
    table = pa.table({"text": ["a"], "label": [1]}).replace_schema_metadata({"pandas": json.dumps(said)})
    pq.write_table(table, source)
    score_file(FakeEngine(), source, target)
    found = json.loads(pq.read_schema(target).metadata[b"pandas"])
    assert found["index_columns"] == ["input_label", {"kind": "range", "start": 0}]
    assert [column["field_name"] for column in found["columns"]] == ["text", "input_label"]


def test_row_groups_of_a_result_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = write_source(tmp_path / "in.parquet", 100), tmp_path / "out.parquet"

    def groups(chunk_rows: int) -> list[int]:
        score_file(FakeEngine(), source, target, chunk_rows=chunk_rows, overwrite=True)
        found = pq.read_metadata(target)
        assert found.num_rows == 100
        return [found.row_group(index).num_rows for index in range(found.num_row_groups)]

    assert groups(7) == [100]
    monkeypatch.setattr(sinks, "_GROUP_ROWS", 30)
    assert groups(7) == [28, 28, 28, 16]
    assert groups(100) == [30, 30, 30, 10]
    monkeypatch.setattr(sinks, "_GROUP_BYTES", 400)
    assert max(groups(100)) < 10


def test_tsv_is_quoted_only_where_it_is_said(tmp_path: Path) -> None:
    source = tmp_path / "in.tsv"
    source.write_bytes(b'text\tid\n"a\tb"\tc"\n"d\te\n')
    score_file(FakeEngine(), source, tmp_path / "out.tsv")
    _, first = (tmp_path / "out.tsv").read_text("utf-8").splitlines()
    assert first.startswith('"d\te\tshort\t')
    assert json.loads((tmp_path / "out.tsv.errors.jsonl").read_text("utf-8"))["line"] == 2
    source.write_bytes(b'text\tid\n"a\tb"\t"c\nd"\n')
    score_file(FakeEngine(), source, tmp_path / "quoted.tsv", quoting=True)
    (row,) = read_rows(tmp_path / "quoted.tsv", quoting=True)
    assert isinstance(row, Row)
    assert (row.text, row.fields["id"]) == ("a\tb", "c\nd")


def test_escapes_of_tsv_can_be_undone(tmp_path: Path) -> None:
    texts = ["a\tb", r"a\tb", "\\", "\\\t", r"\\t", "\r\n", "plain"]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.tsv"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    score_file(FakeEngine(), source, target)
    plain = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}
    undone = [re.sub(r"\\(.)", lambda found: plain[found[1]], str(row["text"])) for row in read_back(target)]
    assert undone == texts


@pytest.mark.parametrize("suffix", [".jsonl.bz2", ".csv.xz", ".tsv.zst"])
def test_every_compression_that_is_read_chunk_by_chunk_is_written(suffix: str, tmp_path: Path) -> None:
    source, target = write_source(tmp_path / "in.csv", 45), tmp_path / f"out{suffix}"
    whole = tmp_path / f"whole{suffix}"
    with pytest.raises(RuntimeError, match="killed"):
        score_file(FakeEngine(fail_at=2), source, target, chunk_rows=10)
    score_file(FakeEngine(), source, target, chunk_rows=10)
    score_file(FakeEngine(), source, whole, chunk_rows=10)
    assert target.read_bytes() == whole.read_bytes()
    assert [row["id"] for row in read_back(target)] == [str(i) for i in range(45) if i % 10 != 9]


@pytest.mark.parametrize("suffix", [".json", ".csv.zip"])
def test_a_format_that_is_only_read_is_refused_as_a_target(suffix: str, tmp_path: Path) -> None:
    source = write_source(tmp_path / "in.csv", 5)
    with pytest.raises(ValueError, match=r"cannot be written chunk by chunk; write one of \.jsonl, .*\.parquet"):
        score_file(FakeEngine(), source, tmp_path / f"out{suffix}")


@pytest.mark.parametrize("pairs", [None, False])
def test_rows_before_early_damage_are_kept(pairs: bool | None, tmp_path: Path) -> None:
    class Learned(FakeEngine):
        text_pairs = pairs

    source, target = tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl"
    lines = [json.dumps({"text": f"{i} {i**9 % 10**7}"}).encode() + b"\n" for i in range(40)]
    source.write_bytes(gzip.compress(b"".join(lines), mtime=0)[:-40])
    with pytest.raises(ValueError, match="is damaged after line .* rows of the source are done"):
        score_file(Learned(), source, target)
    assert 10 < (tmp_path / "out.jsonl.partial").read_bytes().count(b"\n") < 40


def test_a_source_that_cannot_be_read_at_all_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl.gz"
    source.write_bytes(gzip.compress(b'{"text": "a"}\n')[:12])
    with pytest.raises(ValueError, match="damaged"):
        score_file(FakeEngine(), source, tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_pipe_of_a_header_alone_makes_an_empty_result_of_its_columns(suffix: str, tmp_path: Path) -> None:
    writer = through_pipe(tmp_path / "pipe.csv", b"text,id\n")
    score_file(FakeEngine(), tmp_path / "pipe.csv", tmp_path / f"out{suffix}")
    writer.join()
    assert read_header(tmp_path / f"out{suffix}") == ("text", "id", *ADDED)


def test_the_command_line_reads_standard_input_and_replaces_only_where_it_is_said(
    tiny_engine: Engine, tmp_path: Path
) -> None:
    model, target = tmp_path / "model", tmp_path / "out.jsonl"
    tiny_engine.save_pretrained(model)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in random_texts(5, seed=6))

    def predict(*words: object, code: int = 0) -> Result:
        options = [str(word) for word in (*words, "--device", "cpu")]
        found = CliRunner().invoke(app, ["predict", str(model), "-", *options], input=lines, catch_exceptions=False)
        assert found.exit_code == code, found.output
        return found

    predict("-o", target)
    written = target.read_text("utf-8")
    assert [json.loads(line)["text"] for line in written.splitlines()] == random_texts(5, seed=6)
    assert "exists" in predict("-o", target, code=2).stderr
    predict("-o", target, "--overwrite")
    assert predict("-o", "-").stdout == written
    assert "--output" in predict(code=2).stderr
    assert "both take standard output" in predict("-o", "-", "--json", code=2).stderr
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found = CliRunner().invoke(app, ["predict", str(model), str(pipe)])
    assert (found.exit_code, f"through the pipe {pipe} has no name: say with --output" in found.stderr) == (2, True)


def test_a_reader_that_has_enough_ends_the_command_quietly(tiny_engine: Engine, tmp_path: Path) -> None:
    tiny_engine.save_pretrained(tmp_path / "model")
    source = write_source(tmp_path / "in.parquet", 30)
    read, write = os.pipe()
    os.close(read)
    words = ["predict", str(tmp_path / "model"), str(source), "-o", "-", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "geep.cli", *words], stdout=write, stderr=subprocess.PIPE, check=False, timeout=300
    )
    os.close(write)
    assert done.returncode == 0
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["in.jsonl", "-o", "out.jsonl"], "goes on"),
        (["-", "-o", "out.jsonl"], "starts over"),
        (["in.jsonl", "-o", "-"], "starts over"),
    ],
)
def test_a_stopped_command_says_whether_it_goes_on(
    words: list[str], said: str, tiny_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    tiny_engine.save_pretrained(tmp_path / "model")
    write_source(tmp_path / "in.jsonl", 5)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(geep, "score_file", stopped)
    found = CliRunner().invoke(app, ["predict", "model", *words, "--device", "cpu"])
    assert found.exit_code == 130
    assert f"the same command {said}." in found.stderr
