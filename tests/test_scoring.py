"""Files scored as streams: formats, bad rows, killed runs, full disks."""

import csv
import gzip
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import geep
from geep.data import BadRow, read_rows
from geep.scoring import ScoreReport, score_file


@dataclass(frozen=True)
class Made:
    label: str
    score: float
    scores: dict[str, float]
    exit_layer: int
    predicted_layer: int | None
    truncated: bool


@dataclass
class FakeEngine:
    """Answers by the length of the text; fails at a call where told to."""

    fail_at: int | None = None
    calls: list[list[str] | list[tuple[str, str]]] = field(default_factory=list)

    def predict(self, texts: list[str] | list[tuple[str, str]]) -> list[Made]:
        if len(self.calls) == self.fail_at:
            raise RuntimeError("killed")
        self.calls.append(texts)
        made = []
        for text in texts:
            length = len("".join(text))
            score = 1 / (1 + length)
            scores = {"long": 1 - score, "short": score}
            layer = length % 3
            made.append(Made("short", score, scores, layer, layer or None, length > 50))
        return made


FORMATS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".parquet")


def write_source(path: Path, rows: int) -> Path:
    """Rows of two columns; in JSON lines and CSV every tenth is bad."""
    records = [{"text": f'text "{i}",\r\nmore{"!" * (i % 7)}', "id": str(i)} for i in range(rows)]
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
    report = score_file(engine, source, target, chunk_rows=10, scores=True, progress=seen.append)
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
        assert row["text"] == f'text "{i}",\r\nmore{"!" * (i % 7)}'
        (made,) = FakeEngine().predict([str(row["text"])])
        expected = [made.label, made.score, made.exit_layer, made.predicted_layer, made.truncated, made.scores]
        if "sv" in target_suffix:
            expected = [
                made.label,
                repr(made.score),
                str(made.exit_layer),
                str(made.predicted_layer or ""),
                "true" if made.truncated else "false",
                json.dumps(made.scores),
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
    continues = target_suffix in (".jsonl", ".csv", ".tsv")
    if continues:
        with target.with_name(target.name + ".partial").open("ab") as file:
            file.write(b"half a li")  # a kill in the middle of a write
    else:
        assert beside(target) == []
    engine = FakeEngine()
    seen: list[int] = []
    report = score_file(engine, source, target, chunk_rows=10, progress=seen.append)
    assert len(engine.calls) == (5 - fail_at if continues else 5)
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
# The package without its own __init__, which loads what this test does not need.
package = types.ModuleType("geep")
package.__path__ = [{str(Path(geep.__file__).parent)!r}]
sys.modules["geep"] = package
from geep.scoring import score_file
class Made:
    label, score, scores, exit_layer, predicted_layer, truncated = "a", 0.5, {{"a": 0.5}}, 1, 1, False
class Engine:
    calls = 0
    def predict(self, texts):
        self.calls += 1
        if self.calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return [Made] * len(texts)
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


@pytest.mark.parametrize("change", ["source", "chunk_rows", "scores", "key", "journal", "partial", "errors", "none"])
def test_a_part_of_something_else_is_not_continued(change: str, tmp_path: Path) -> None:
    source = write_source(tmp_path / "in.jsonl", 45)
    target = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError, match="killed"):
        score_file(FakeEngine(fail_at=3), source, target, chunk_rows=10, key="model")
    chunk_rows, scores, key = 10, False, "model"
    match change:
        case "source":
            write_source(source, 44)
        case "chunk_rows":
            chunk_rows = 9
        case "scores":
            scores = True
        case "key":
            key = "another model"
        case "journal":
            (tmp_path / "out.jsonl.partial.json").write_text('{"made_from": 1', "utf-8")
        case "partial":
            (tmp_path / "out.jsonl.partial").write_bytes(b"cut")
        case "errors":
            (tmp_path / "out.jsonl.errors.jsonl.partial").unlink()
    engine = FakeEngine()
    score_file(engine, source, target, chunk_rows=chunk_rows, scores=scores, key=key)
    assert len(engine.calls) == (2 if change == "none" else 5)
    rows = read_back(target)
    assert [row["id"] for row in rows] == [str(i) for i in range(44 if change == "source" else 45) if i % 10 != 9]
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
    continues = suffix in (".jsonl", ".csv", ".tsv")
    message = r"The first [1-9]\d*00 rows .* are done and whole" if continues else "cannot be continued"
    with (
        disk_of(whole.stat().st_size // 2),
        pytest.raises(OSError, match=rf"refused a write.*{message}.*run the same command again"),
    ):
        score_file(FakeEngine(), source, target, chunk_rows=100)
    assert not target.exists()
    assert bool(beside(target)) == continues
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
    source.write_text("broken\n" * 150 + '{"text": "a"}\n', "utf-8")
    report = score_file(FakeEngine(), source, tmp_path / "out.jsonl", chunk_rows=40)
    assert (report.rows, report.num_bad) == (1, 150)
    assert [row.line for row in report.bad_rows] == list(range(1, 101))
    assert (tmp_path / "out.jsonl.errors.jsonl").read_text("utf-8").count("\n") == 150
    source.write_text('{"text": "a"}\n', "utf-8")
    score_file(FakeEngine(), source, tmp_path / "out.jsonl")
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
    score_file(FakeEngine(), source, target, scores=True)
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


def test_mistakes_are_said_before_anything_is_written(tmp_path: Path) -> None:
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
    with pytest.raises(ValueError, match="chunk_rows must be at least 1"):
        score_file(engine, source, tmp_path / "out.jsonl", chunk_rows=0)
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        score_file(engine, source, tmp_path / "folder.jsonl")
    assert engine.calls == []


def test_an_engine_that_loses_an_answer_is_caught(tmp_path: Path) -> None:
    class Short(FakeEngine):
        def predict(self, texts: list[str] | list[tuple[str, str]]) -> list[Made]:
            return super().predict(texts)[1:]

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
