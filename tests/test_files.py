"""What a file holds decides how it is read: compression, encoding, delimiters, quotes, and files of another kind."""

import codecs
import contextlib
import csv
import gzip
import io
import json
import logging
import os
import random
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data import COMPRESS, good, in_zip

from geep import data
from geep.data import BadRow, Row, delimited, json_rows

THREE = b'{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n'


@pytest.fixture(autouse=True)
def _no_warning_is_remembered() -> None:
    delimited.warn_once.cache_clear()


def file_of(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(rows: list[Row]) -> list[str]:
    return [row.text for row in rows]


def reasons(path: Path, **columns: object) -> dict[int, str]:
    rows = data.read_rows(path, **columns)  # type: ignore[arg-type]
    return {row.line: row.reason for row in rows if isinstance(row, BadRow)}


# --- Quotes


def test_quotes_in_tsv_are_characters_unless_it_is_asked(tmp_path: Path) -> None:
    path = file_of(tmp_path, "a.tsv", 'id\ttext\n1\t"so he said\n2\tb\n3\t"\n4\t"c"\n')
    assert texts(good(path)) == ['"so he said', "b", '"', '"c"']
    assert texts(good(path, quoting=True)) == ["so he said\n2\tb\n3\t", "c"]
    assert data.load_split(path).texts == ['"so he said', "b", '"', '"c"']
    assert data.load_split(path, quoting=True).texts == ["so he said\n2\tb\n3\t", "c"]


def test_quotes_in_csv_enclose_fields_unless_it_is_denied(tmp_path: Path) -> None:
    path = file_of(tmp_path, "a.csv", 'id,text\n1,"a, b"\n2,"c\n3,d\n')
    first, second = data.read_rows(path)
    assert isinstance(first, Row)
    assert first.text == "a, b"
    assert isinstance(second, BadRow)
    assert "a quote is opened here and never closed: it takes in lines 3 to 4, the end" in second.reason
    assert reasons(path, quoting=False) == {2: "expected 2 fields as in the header, found 3"}
    assert [row.text for row in data.read_rows(path, quoting=False) if isinstance(row, Row)] == ['"c', "d"]


def test_a_row_of_many_lines_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = '"so he said' + "\nb" * delimited.MANY_LINES + '"\n'
    path = file_of(tmp_path, "a.csv", "text\nfirst\n" + long + long)
    assert len(good(path)) == len(good(path)) == 3
    assert caplog.messages == [
        f"{path}, line 3: a quoted field takes in all lines to line 103. If quotes are mere characters in this file, "
        "read it without: quoting=False, --no-quoting."
    ]
    caplog.clear()
    good(file_of(tmp_path, "b.csv", "text\n" + long.replace("\nb", "", 1)))
    assert caplog.messages == []


def test_stray_quotes_in_neighbouring_rows_merge_none_in_silence(tmp_path: Path) -> None:
    path = file_of(tmp_path, "a.csv", "text,label\n" + '"w1,2\n' * 6 + 'a,1\n"b\nc",2\n')
    rows = list(data.read_rows(path))
    assert [(row.text, row.line) for row in rows if isinstance(row, Row)] == [("a", 8), ("b\nc", 9)]
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert [(row.line, row.lines) for row in bad] == [(2, 2), (4, 2), (6, 2)]
    assert bad[0].reason == (
        "quotes pair up over lines 2 to 3, but text follows the closing one. If quotes are mere characters in this "
        "file, read it without: quoting=False, --no-quoting"
    )
    unquoted = [row for row in data.read_rows(path, quoting=False) if isinstance(row, Row)]
    assert [row.text for row in unquoted] == ['"w1'] * 6 + ["a", 'c"']


def test_quotes_that_are_doubled_or_close_a_field_are_none_of_these(tmp_path: Path) -> None:
    content = 'text,label\r\n"a ""b""\r\n""c""",1\r\n"d\r\n\r\n",\r\n1" tape,2\r\n"x" y,3\r\n'
    assert texts(good(file_of(tmp_path, "a.csv", content))) == ['a "b"\r\n"c"', "d\r\n\r\n", '1" tape', "x y"]


def test_a_header_whose_quotes_are_stray_is_refused(tmp_path: Path) -> None:
    path = file_of(tmp_path, "a.csv", 'text,"label\na,"b"\n')
    with pytest.raises(ValueError, match=r"no readable header row \(quotes pair up over lines 1 to 2, but text"):
        data.read_header(path)


def test_a_quote_that_never_closes_says_which_lines_it_takes_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited, "_MAX_FIELD_CHARS", 1000)
    limit = csv.field_size_limit(1000)
    try:
        path = file_of(tmp_path, "a.csv", 'text\n"a\n' + "0123456789\n" * 100)
        rows = list(data.read_rows(path))
    finally:
        csv.field_size_limit(limit)
    assert rows[0] == BadRow(
        2,
        "a quote is opened here and not closed within 1,000 characters: it takes in lines 2 to 93. If quotes are mere "
        "characters in this file, read it without: quoting=False, --no-quoting",
        lines=92,
    )
    assert texts(rows[1:]) == ["0123456789"] * 9  # type: ignore[arg-type]


def test_a_bad_row_says_how_many_lines_it_takes_in(tmp_path: Path) -> None:
    path = file_of(tmp_path, "a.csv", 'text,label\na\n"b\nc"\nd,1\n"e\nf\ng\n')
    bad = [row for row in data.read_rows(path) if isinstance(row, BadRow)]
    assert [(row.line, row.lines) for row in bad] == [(2, 1), (3, 2), (6, 3)]
    assert "never closed: it takes in lines 6 to 8, the end" in bad[2].reason
    assert "--no-quoting" in bad[2].reason


def test_a_field_too_long_on_one_line_is_no_quote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "_MAX_FIELD_CHARS", 1000)
    limit = csv.field_size_limit(1000)
    try:
        rows = list(data.read_rows(file_of(tmp_path, "a.csv", "text\n" + "x" * 2000 + "\na\n")))
    finally:
        csv.field_size_limit(limit)
    assert rows[0] == BadRow(2, "a field is longer than 1,000 characters")
    assert texts(rows[1:]) == ["a"]  # type: ignore[arg-type]


def test_quoting_is_noted_with_the_plan_and_reaches_its_files(tmp_path: Path) -> None:
    content = 'text\tlabel\n"a\tx\nb"\ty\nc\tx\nd\ty\n'
    path = file_of(tmp_path, "train.tsv", content)
    plan = data.DataPlan(str(path), quoting=False)
    assert plan.load().train.texts == ['"a', 'b"', "c", "d"]
    again = data.DataPlan(**json.loads(json.dumps(asdict(plan))))
    assert again == plan
    assert again.columns["quoting"] is False
    assert len(data.DataPlan(str(path), quoting=True).load().train) == 3


# --- Files of another kind


def test_a_json_array_is_read_as_its_elements(tmp_path: Path) -> None:
    for content in ('[{"text":"a"},{"text":"b"}]', ' \n[\n {\n  "text": "a"\n },\n {"text": "b"}\n]\n\n'):
        for name in ("a.jsonl", "a.json"):
            assert texts(good(file_of(tmp_path, name, content))) == ["a", "b"]
    for empty in ("[]", " [ ]\n"):
        assert good(file_of(tmp_path, "empty.json", empty)) == []


def test_elements_of_an_array_that_are_no_rows_are_said_with_their_line_and_number(tmp_path: Path) -> None:
    path = file_of(
        tmp_path,
        "a.json",
        b'[{"text": "a"},\n 3, {"text": NaN},\n{"text": "caf\xe9"}, {"text": "b", "text": "c"}, ["d"],\n'
        b' {"text": "\\ud800"}, {"text": "e"}]',
    )
    rows = list(data.read_rows(path))
    assert [row.text for row in rows if isinstance(row, Row)] == ["a", "e"]
    said = [(row.line, row.reason) for row in rows if isinstance(row, BadRow)]
    expected = [
        (2, "found 3 (element 2)"),
        (2, "NaN is not JSON (element 3)"),
        (3, "not UTF-8: byte 0xe9"),
        (3, 'the key "text" is there twice'),
        (3, 'found ["d"] (element 6)'),
        (4, "half a character"),
    ]
    assert [line for line, _ in said] == [line for line, _ in expected]
    for (_, reason), (_, part) in zip(said, expected, strict=True):
        assert part in reason


@pytest.mark.parametrize("block", [1, 7, 64 * 2**10])
def test_an_array_is_read_a_block_at_a_time(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geep.data.json_rows._BLOCK", block)
    rows = [{"text": f"№ {i} " * (i % 40), "n": i, "more": {"x": [1.5, i, None]}} for i in range(200)]
    path = file_of(tmp_path, "a.json", json.dumps(rows, ensure_ascii=False, indent=1))
    assert [row.fields for row in good(path)] == rows


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        ('[{"text": "a"},\n{"text": "b"} {"text": "c"}]', 2, "expected a comma or ], found '{'"),
        ('[{"text": "a"},\n{"text": "b"},\n{"text', 3, "invalid JSON: "),
        ('[{"text": "a"},\n{"text": "b"},\n', 3, "the file ends inside of the array"),
        ('[{"text": "a"},\n{"text": "b"}]\n[{"text": "c"}]', 3, "more follows the end of the array"),
        ('[{"text": "a"},\n{"text": "b"},\n' + "[" * 100_000, 3, "nested too deeply"),
        ('[{"text": "a"},\n{"text": "b"},\n' + "9" * 5000 + "]", 3, "integer string conversion"),
    ],
)
def test_a_broken_array_is_read_to_where_it_breaks(content: str, line: int, what: str, tmp_path: Path) -> None:
    rows = data.read_rows(file_of(tmp_path, "a.json", content))
    assert [next(rows).text, next(rows).text] == ["a", "b"]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"a\.json, line") as raised:
        next(rows)
    assert f"line {line}: " in str(raised.value)
    assert what in str(raised.value)
    assert "after 2 elements" in str(raised.value)


def test_an_element_that_never_ends_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geep.data.json_rows._MAX_LINE_BYTES", 1000)
    monkeypatch.setattr("geep.data.json_rows._BLOCK", 100)
    path = file_of(tmp_path, "a.json", '[{"text": "a"}, {"text": "' + "x" * 100_000 + '"}]')
    rows = data.read_rows(path)
    next(rows)
    with pytest.raises(ValueError, match="broken, or longer than"):
        next(rows)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_with_its_mark_is_read(encoding: str, tmp_path: Path) -> None:
    mark = codecs.BOM_UTF16_LE if encoding.endswith("le") else codecs.BOM_UTF16_BE
    lines = "".join(json.dumps({"text": f"№ {i} 😀"}, ensure_ascii=False) + "\n" for i in range(9000))
    found = texts(good(file_of(tmp_path, "a.jsonl", mark + lines.encode(encoding))))
    assert found == [f"№ {i} 😀" for i in range(9000)]
    path = file_of(tmp_path, "a.csv", mark + "id,text\n1,é\n".encode(encoding))
    assert texts(good(path)) == ["é"]
    assert data.read_header(path) == ("id", "text")
    array = file_of(tmp_path, "a.json", mark + '[{"text": "é"}]'.encode(encoding))
    assert texts(good(array)) == ["é"]
    # Half a character in the middle, and half a unit at the end: what is around them is read.
    half = "\ud800".encode(encoding, "surrogatepass")
    path = file_of(tmp_path, "b.csv", mark + "text\na\nb".encode(encoding) + half + "\nc\nd".encode(encoding) + b"\x00")
    assert [(type(row), row.line) for row in data.read_rows(path)] == [(Row, 2), (BadRow, 3), (Row, 4), (BadRow, 5)]


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.jsonl", b'{"text":"a"}\r{"text":"b"}\r', "lines end in carriage returns alone"),
        ("a.jsonl", b'{"text":"a"}{"text":"b"}\n{"text":"c"}{"text":"d"}\n', "several objects on a line"),
        ("a.jsonl", b'{\n "text": "a"\n}\n{\n "text": "b"\n}\n', "over several lines that is no array"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-le"), "UTF-16 without a byte order mark"),
        ("a.jsonl", b'["a", "b"]\n["c", "d"]\n', "JSON arrays and not objects"),
        ("a.jsonl", b'"a"\n"b"\n', "JSON values that are no objects"),
        ("a.jsonl", b'{"text": "a"},\n{"text": "b"},\n', "JSON objects with commas between the lines"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-32"), "UTF-32; write it as UTF-8"),
        ("a.csv", codecs.BOM_UTF32_BE + "text\na\n".encode("utf-32-be"), "UTF-32; write it as UTF-8"),
        ("a.csv", "text\na\n".encode("utf-16-le"), "UTF-16 without a byte order mark"),
        ("a.tsv.gz", gzip.compress("text\na\n".encode("utf-16-be"), mtime=0), "UTF-16 without a byte order mark"),
        ("a.jsonl", bytes(range(256)), "binary data"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "an encoding other than UTF-8"),
        ("a.jsonl", b"id,text\n1,a\n2,b\n", "CSV or TSV; name it .csv or .tsv"),
        ("a.jsonl", b"a text\nanother\n", "text that is not JSON"),
        ("a.jsonl", b"PAR1....", "a Parquet file; name it .parquet"),
        ("a.csv", b"PAR1....", "a Parquet file; name it .parquet"),
        ("a.csv", THREE, "JSON; name it .jsonl"),
        ("a.tsv", b'[{"text": "a"}]', "JSON; name it .jsonl"),
        ("a.csv", b"<!DOCTYPE html><html>", "HTML or XML"),
        ("a.csv", b'<?xml version="1.0"?>', "HTML or XML"),
        ("a.csv", b"%PDF-1.7", "a PDF document"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.jsonl.gz", gzip.compress(b"%PDF-1.7", mtime=0), "a PDF document"),
        ("a.parquet", THREE, "no readable Parquet file; it seems to be JSON"),
        ("a.parquet", gzip.compress(b"PAR1", mtime=0), "no readable Parquet file; it is compressed (.gz)"),
        ("a.parquet", b"", "no readable Parquet file"),
        ("a.jsonl.gz", gzip.compress(gzip.compress(THREE, mtime=0), mtime=0), "compressed twice (.gz within .gz)"),
    ],
)
def test_a_file_of_another_kind_is_named(name: str, content: bytes, kind: str, tmp_path: Path) -> None:
    path = file_of(tmp_path, name, content)
    with pytest.raises(ValueError, match=r"a\.") as raised:
        list(data.read_rows(path))
    assert kind in str(raised.value)
    assert "\n" not in str(raised.value)


def test_lines_of_json_without_one_object_are_refused_early(tmp_path: Path) -> None:
    path = file_of(tmp_path, "a.jsonl", b"junk\n" * 100 + THREE)
    with pytest.raises(ValueError, match=r"no JSON object in its first 100 rows \(line 1: invalid JSON: Expecting"):
        next(data.read_rows(path))
    # One object that cannot be used is an object.
    (bad,) = data.read_rows(file_of(tmp_path, "b.jsonl", b'{"text": NaN}\n'))
    assert isinstance(bad, BadRow)
    assert len(list(data.read_rows(file_of(tmp_path, "c.jsonl", b"junk\n" * 99 + THREE)))) == 102


def test_rows_after_many_broken_ones_are_not_kept_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geep.data.json_rows._HEADER_ROWS", 3)
    content = b'{"other": 1}\n' + b"junk\n" * 20 + THREE
    rows = list(data.read_rows(file_of(tmp_path, "a.jsonl", content)))
    assert [row.line for row in rows] == list(range(1, 25))


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_another_delimiter_is_seen_and_said(delimiter: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = file_of(tmp_path, "a.csv", f"id{delimiter}text\n1{delimiter}a, b\n")
    assert texts(good(path)) == ["a, b"]
    assert data.read_header(path) == ("id", "text")
    assert caplog.messages == [f"The columns of {path} are delimited by {delimiter!r}, not ','; it is read so."]
    # A header that has the text column as it is declared is taken at its word.
    path = file_of(tmp_path, "b.csv", f"id{delimiter}text\n1{delimiter}a\n")
    assert texts(good(path, text_column=f"id{delimiter}text")) == [f"1{delimiter}a"]


def test_commas_in_a_tsv_file_are_seen(tmp_path: Path) -> None:
    assert texts(good(file_of(tmp_path, "a.tsv", 'id,text\n1,"a, b"\n'))) == ["a, b"]


# --- Values of JSON


def test_a_number_that_no_float_holds_is_refused_as_infinity_is(tmp_path: Path) -> None:
    path = file_of(
        tmp_path,
        "a.jsonl",
        '{"text": "a", "x": 1E400}\n{"text": "b", "x": [-1e400]}\n{"text": "c", "x": Infinity}\n'
        '{"text": "d", "x": 1e308, "y": 123456789012345678901234567890}\n',
    )
    assert reasons(path) == {
        1: "the number 1E400 is too large for a float",
        2: "the number -1e400 is too large for a float",
        3: "invalid JSON: Infinity is not JSON",
    }


def test_a_key_that_is_there_twice_is_named(tmp_path: Path) -> None:
    path = file_of(
        tmp_path, "a.jsonl", '{"text": "a", "text": "b"}\n{"text": "c", "x": {"é": 1, "é": 1}}\n{"text": "d"}\n'
    )
    found = reasons(path)
    assert found.keys() == {1, 2}
    assert 'the key "text" is there twice' in found[1]
    assert 'the key "é" is there twice' in found[2]


def test_what_one_row_noted_is_not_said_of_the_next(tmp_path: Path) -> None:
    content = '{"text": NaN, oops\n{"text": "a"}\n{"x": 1, "x": 2} more\n{"text": "b"}\n' + "[NaN," + "[" * 100_000
    path = file_of(tmp_path, "a.jsonl", '{"text": "first"}\n' + content + '\n{"text": "c"}\n')
    assert reasons(path).keys() == {2, 4, 6}


def test_a_reason_tells_the_place_on_the_line_of_the_file(tmp_path: Path) -> None:
    path = file_of(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": "b"} {"text": "c"}\n  {"text": "d", }\n')
    found = reasons(path)
    assert found[2] == "invalid JSON: more follows the first value, from character 15 of the line on"
    assert found[3].endswith("character 17 of the line")
    assert not any("column 1" in reason or "line 1" in reason for reason in found.values())


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv"])
def test_byte_order_marks_of_files_that_were_joined_are_skipped(name: str, tmp_path: Path) -> None:
    one = THREE if name.endswith("jsonl") else b"text\tlabel\na\tx\nb\tx\nc\tx\n"
    if name.endswith("csv"):
        one = b'"text","label"\n"a",x\n"b",x\n"c",x\n'
    rows = list(data.read_rows(file_of(tmp_path, name, (codecs.BOM_UTF8 + one) * 2)))
    assert [row.text for row in rows if isinstance(row, Row)] == ["a", "b", "c"] * 2
    if not name.endswith("jsonl"):
        (again,) = [row for row in rows if isinstance(row, BadRow)]
        assert again == BadRow(5, "the header again, as where files are joined")


def test_a_pair_column_that_no_object_has_is_said_once_and_early(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": "a", "other": "b"}) + "\n" for _ in range(100))
    path = file_of(tmp_path, "a.jsonl", lines + '{"text": "a", "second": "b"}\n')
    with pytest.raises(ValueError, match="has no second text column 'second'; its columns are: 'text', 'other'"):
        next(data.read_rows(path, text_pair_column="second"))
    with pytest.raises(ValueError, match="has no label column 'label'"):
        next(data.read_rows(path, require_label=True))
    assert len(good(path)) == 101
    # One object in the first hundred is enough.
    path = file_of(tmp_path, "b.jsonl", '{"text": "a"}\n' * 50 + '{"text": "a", "second": "b"}\n')
    rows = list(data.read_rows(path, text_pair_column="second"))
    assert [type(row) for row in rows] == [BadRow] * 50 + [Row]
    (pair,) = good(file_of(tmp_path, "c.jsonl", '{"text": "a", "second": "b"}\n'), text_pair_column="second")
    assert pair.text_pair == "b"


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_one_column_is_not_both_texts(name: str, tmp_path: Path) -> None:
    path = file_of(tmp_path, name, THREE if name.endswith("jsonl") else b"text\na\n")
    match = "the text and the second text are both column 'text'; name two columns with --text-column and"
    with pytest.raises(ValueError, match=match):
        data.read_rows(path, text_pair_column="text")
    with pytest.raises(ValueError, match=match), data.open_rows(path, text_pair_column="text"):
        pass
    with pytest.raises(ValueError, match=match):
        data.load_dataset(path, text_pair_column="text")


# --- Folders


def test_a_validation_file_is_the_dev_part(tmp_path: Path) -> None:
    for name, text in (("train.jsonl", "a"), ("validation.jsonl", "b"), ("test.csv", "c")):
        rows = [{"text": text, "label": label} for label in "xy"]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        file_of(tmp_path, name, "text,label\nc,x\n" if name.endswith("csv") else lines)
    dataset = data.load_dataset(tmp_path)
    assert dataset.dev is not None
    assert list(dataset.dev.texts) == ["b", "b"]
    file_of(tmp_path, "dev.csv", "text,label\nd,x\n")
    with pytest.raises(ValueError, match=r"has dev\.csv, validation\.jsonl; keep one dev file"):
        data.load_dataset(tmp_path)


def test_files_of_a_folder_that_are_not_used_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train.csv", "valid.csv", "more.jsonl", "test.csv"):
        file_of(tmp_path, name, "text,label\na,x\nb,y\n")
    file_of(tmp_path, "README.md", "words")
    data.load_dataset(tmp_path)
    assert caplog.messages == [
        f"Of the folder {tmp_path} these files are not used: more.jsonl, valid.csv. Its parts are called train, dev "
        "(or validation) and test."
    ]
    caplog.clear()
    data.load_dataset(tmp_path, dev=tmp_path / "valid.csv")
    assert "not used: more.jsonl." in caplog.text


# --- Headers and bytes of CSV


def test_columns_without_a_name_are_called_after_their_place(tmp_path: Path) -> None:
    path = file_of(tmp_path, "a.csv", "text,, ,column_2\na,b,c,d\n")
    assert data.read_header(path) == ("text", "column_2_", "column_3", "column_2")
    assert good(path)[0].fields == {"text": "a", "column_2_": "b", "column_3": "c", "column_2": "d"}


def test_bytes_that_are_no_utf_8_are_named_with_their_column(tmp_path: Path) -> None:
    path = file_of(tmp_path, "a.csv", b"id,text\n1,caf\xe9\n2,\xc3\xa9\xff\n3,\xc3\xa9\n4,a,\xff\n\xff\n")
    assert reasons(path) == {
        2: "not UTF-8: byte 0xe9 at byte 4 of column 'text'",
        3: "not UTF-8: byte 0xff at byte 3 of column 'text'",
        5: "not UTF-8: byte 0xff at byte 1 of column 3",
        6: "not UTF-8: byte 0xff at byte 1 of column 'id'",
    }
    header = file_of(tmp_path, "b.csv", b"text,caf\xe9\na,b\n")
    with pytest.raises(ValueError, match=r"header row of .*b\.csv is not UTF-8: byte 0xe9 at byte 4 of column 2"):
        data.read_header(header)


# --- Compression


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESS if suffix])
def test_compression_is_seen_whatever_the_name(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = file_of(tmp_path, "a.jsonl", COMPRESS[suffix](THREE))
    assert texts(good(path)) == ["a", "b", "c"]
    assert caplog.messages == [f"{path} is compressed ({suffix}), which its name does not say; it is read so."]
    caplog.clear()
    plain = file_of(tmp_path, f"b.jsonl{suffix}", THREE)
    assert texts(good(plain)) == ["a", "b", "c"]
    assert caplog.messages == [f"{plain} is not compressed, although its name ends with {suffix}; it is read as it is."]
    caplog.clear()
    assert texts(good(file_of(tmp_path, f"c.jsonl{suffix}", COMPRESS[suffix](THREE)))) == ["a", "b", "c"]
    assert good(file_of(tmp_path, f"d.jsonl{suffix}", COMPRESS[suffix](b""))) == []
    assert caplog.messages == []


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_parts_one_after_the_other_are_one_file(suffix: str, tmp_path: Path) -> None:
    path = file_of(tmp_path, f"a.jsonl{suffix}", COMPRESS[suffix](THREE) + COMPRESS[suffix](THREE))
    assert texts(good(path)) == ["a", "b", "c"] * 2


def test_a_zip_archive_holds_one_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"zip archive of 2 files \('file 0', 'file 1'\), expected one"):
        good(file_of(tmp_path, "a.csv.zip", in_zip(b"text\na\n", b"text\nb\n")))
    with pytest.raises(ValueError, match=r"zip archive of 0 files \(none\), expected one"):
        good(file_of(tmp_path, "b.csv.zip", in_zip()))
    with pytest.raises(ValueError, match="no readable zip archive"):
        good(file_of(tmp_path, "c.csv.zip", in_zip(b"text\na\n")[:-5]))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_rows_before_a_damage_are_read(suffix: str, kind: str, tmp_path: Path) -> None:
    generator = random.Random(0)
    rows = [{"text": f"row {i} {generator.getrandbits(64)}"} for i in range(60_000)]
    if kind == "csv":
        content = "text\n" + "".join(f"{row['text']}\n" for row in rows)
    else:
        content = json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows)
    whole = COMPRESS[suffix](content.encode())
    path = file_of(tmp_path, f"a.{kind}{suffix}", whole[: len(whole) * 9 // 10])
    found: list[Row | BadRow] = []
    with pytest.raises(ValueError, match=r"is damaged after line \d+"):
        found.extend(data.read_rows(path))
    assert [row.text for row in found if isinstance(row, Row)] == [row["text"] for row in rows[: len(found)]]
    assert len(found) > 20_000  # bz2 and zstd lose the block that is cut


def test_few_rows_before_a_damage_are_read_too(tmp_path: Path) -> None:
    whole = gzip.compress(THREE)
    rows = data.read_rows(file_of(tmp_path, "a.jsonl.gz", whole[:-8]))  # the check sum is gone
    assert [next(rows).text for _ in range(3)] == ["a", "b", "c"]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="damaged after line 3"):
        next(rows)
    rows = data.read_rows(file_of(tmp_path, "b.jsonl.gz", whole[:-8] + b"\0" * 8))
    assert [next(rows).text for _ in range(3)] == ["a", "b", "c"]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="damaged after line 3.*CRC"):
        next(rows)


def streams_of(suffix: str, num_streams: int) -> list[bytes]:
    """Forty rows as compressed streams, to be read one after the other."""
    lines = [json.dumps({"text": f"row {i}"}) + "\n" for i in range(40)]
    step = 40 // num_streams
    return [COMPRESS[suffix]("".join(lines[start : start + step]).encode()) for start in range(0, 40, step)]


def check_all_or_error(path: Path, what: str) -> None:
    """Read a file of forty rows that may be damaged: it ends without an error after all of them only."""
    try:
        found = list(data.read_rows(path))
    except ValueError:
        return
    assert [getattr(row, "text", row) for row in found] == [f"row {i}" for i in range(40)], what


@pytest.mark.parametrize(
    ("suffix", "num_streams"),
    [
        *((suffix, 1) for suffix in COMPRESS if suffix),
        *((suffix, 4) for suffix in COMPRESS if suffix not in ("", ".zip")),
    ],
)
def test_a_cut_file_is_never_taken_for_a_shorter_one(suffix: str, num_streams: int, tmp_path: Path) -> None:
    parts = streams_of(suffix, num_streams)
    # Nothing tells that whole streams are missing at the end.
    between = {len(b"".join(parts[:count])) for count in range(num_streams)}
    whole = b"".join(parts)
    for end in sorted(set(range(len(whole))) - between):
        check_all_or_error(file_of(tmp_path, f"a.jsonl{suffix}", whole[:end]), f"cut at {end} of {len(whole)}")


# Zstandard as Arrow writes it has no check sum: nothing tells of a flipped bit there.
@pytest.mark.parametrize(
    ("suffix", "num_streams"), [(".gz", 1), (".gz", 4), (".bz2", 1), (".bz2", 4), (".xz", 1), (".xz", 4), (".zip", 1)]
)
def test_a_flipped_bit_never_loses_a_row_in_silence(suffix: str, num_streams: int, tmp_path: Path) -> None:
    parts = streams_of(suffix, num_streams)
    whole = b"".join(parts)
    rng = random.Random(0)
    # Where a stream begins, what follows could be taken for something behind the end.
    starts = [len(b"".join(parts[:count])) * 8 + bit for count in range(num_streams) for bit in range(64)]
    for bit in [*starts, *(rng.randrange(len(whole) * 8) for _ in range(300))]:
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        check_all_or_error(file_of(tmp_path, f"a.jsonl{suffix}", bytes(content)), f"bit {bit} of {len(whole) * 8}")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_what_follows_a_stream_and_is_none_is_said_after_all_rows(suffix: str, tmp_path: Path) -> None:
    rows = data.read_rows(file_of(tmp_path, f"a.jsonl{suffix}", COMPRESS[suffix](THREE) + b"junk"))
    assert [next(rows).text for _ in range(3)] == ["a", "b", "c"]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="damaged after line 3"):
        next(rows)


def test_zeros_between_the_streams_of_an_xz_file_are_skipped(tmp_path: Path) -> None:
    one = COMPRESS[".xz"](THREE)
    path = file_of(tmp_path, "a.jsonl.xz", one + b"\0" * 8 + one + b"\0" * (2**17))
    assert texts(good(path)) == ["a", "b", "c"] * 2


def test_a_large_file_of_several_streams_is_read_whole(tmp_path: Path) -> None:
    one = "".join(json.dumps({"text": f"{i}" * 40}) + "\n" for i in range(20_000)).encode()
    for suffix in (".bz2", ".xz"):
        path = file_of(
            tmp_path, f"a.jsonl{suffix}", COMPRESS[suffix](one) + COMPRESS[suffix](b"") + COMPRESS[suffix](one)
        )
        assert len(good(path)) == 40_000


def test_an_error_of_the_disk_is_not_called_a_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("gzip.GzipFile.read1", fail)
    with pytest.raises(OSError, match="Input/output error"):
        good(file_of(tmp_path, "a.jsonl.gz", gzip.compress(THREE)))


# --- Pipes


@contextlib.contextmanager
def piped(path: Path, *parts: bytes) -> Iterator[Path]:
    """A FIFO into which the parts are written one at a time, once: opened again, it blocks for ever."""
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb", buffering=0) as file, contextlib.suppress(BrokenPipeError):
            for part in parts:
                file.write(part)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    yield path
    writer.join(timeout=10)
    assert not writer.is_alive()


@pytest.mark.parametrize("name", ["fifo", "fifo.csv", "fifo.jsonl.gz"])
def test_a_fifo_is_opened_once(name: str, tmp_path: Path) -> None:
    csv, kind = [b"id,te", b"xt\n1,a\n", b"2,b\n"], ".csv"
    if name.endswith(".gz"):
        csv, kind = [gzip.compress(b'{"text": "a"}\n'), gzip.compress(b'{"text": "b"}\n')], ".jsonl"
    with piped(tmp_path / name, *csv) as path:
        assert data.is_stream(path)
        with data.open_rows(path) as rows:
            assert rows.format == kind
            assert rows.header == (("id", "text") if kind == ".csv" else None)
            assert [row.text for row in rows if isinstance(row, Row)] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "kind", "header"),
    [
        (THREE, ".jsonl", None),
        (b'[{"text": "a"}, {"text": "b"}, {"text": "c"}]', ".jsonl", None),
        (b"text\na\nb\nc\n", ".csv", ("text",)),
        (b"id\ttext\n1\ta\n2\tb\n3\tc\n", ".csv", ("id", "text")),
        (gzip.compress(THREE, mtime=0), ".jsonl", None),
        (codecs.BOM_UTF16_LE + THREE.decode().encode("utf-16-le"), ".jsonl", None),
    ],
)
def test_standard_input_is_read_as_what_it_seems_to_hold(
    content: bytes, kind: str, header: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(buffer))
    with data.open_rows("-") as rows:
        assert (rows.format, rows.header) == (kind, header)
        assert [row.text for row in rows if isinstance(row, Row)] == ["a", "b", "c"]
    assert not buffer.closed
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert list(data.load_split("-").texts) == ["a", "b", "c"]


def test_what_cannot_be_read_from_a_pipe_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data.is_stream("-")
    assert data.is_stream("/dev/null")
    assert not data.is_stream(tmp_path)
    assert not data.is_stream(tmp_path / "none")
    assert not data.is_stream("\0")
    with pytest.raises(ValueError, match="read only once; use open_rows"):
        data.read_header("-")
    for content, reason in (
        (in_zip(THREE), "zip archive in a pipe"),
        (b"PAR1", "seems to be a Parquet file"),
        (b"a,b\n1,2\n", "no text column 'text'; its columns are: 'a', 'b'"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        with pytest.raises(ValueError, match=reason):
            list(data.read_rows("-"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(ValueError, match="no standard input"):
        list(data.read_rows("-"))
    os.mkfifo(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="is a pipe, and Parquet is read from its end"):
        list(data.read_rows(tmp_path / "a.parquet"))


def test_a_file_named_by_a_dash_is_reached_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-.jsonl").write_bytes(THREE)
    assert len(good(Path("-.jsonl"))) == 3


# --- Labels


def test_labels_that_differ_by_blanks_or_case_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [" a,b", "a,b", "a,b", "A,B ", "c", "c"]
    lines = "".join(json.dumps({"text": "x", "label": label}) + "\n" for label in rows)
    path = file_of(tmp_path, "train.jsonl", lines)
    with caplog.at_level(logging.WARNING):
        dataset = data.load_dataset(path)
    assert len(dataset.label_names) == 4  # said, and not decided for the user
    assert caplog.messages == [
        f"{path} has labels that differ by blanks or case alone, 1 groups of them: ' a,b' (1 rows), 'A,B ' (1 rows), "
        "'a,b' (2 rows). Each is learned as a label of its own; write them alike if they are one."
    ]
    caplog.clear()
    lists = "".join(json.dumps({"text": "x", "label": label}) + "\n" for label in (["a", "b"], ["a "], []))
    data.load_dataset(file_of(tmp_path, "multi.jsonl", lists))
    assert "'a' (1 rows), 'a ' (1 rows)" in caplog.text
    caplog.clear()
    data.load_dataset(file_of(tmp_path, "fine.jsonl", lines.replace(" a,b", "d").replace("A,B ", "e")))
    assert caplog.messages == []


def test_parquet_still_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with data.open_rows(tmp_path / "a.parquet") as rows:
        assert (rows.format, rows.header) == (".parquet", ("text",))
        assert len(list(rows)) == 1
    named = file_of(tmp_path, "named.parquet", (tmp_path / "a.parquet").read_bytes().replace(b"text", b"te\xe9t"))
    with pytest.raises(ValueError, match=r"named\.parquet is no readable Parquet file \('utf-8' codec"):
        good(named)
    cut = (tmp_path / "a.parquet").read_bytes()[:-6]
    with pytest.raises(ValueError, match="no readable Parquet"):
        good(file_of(tmp_path, "cut.parquet", cut))


def test_the_reader_holds_no_more_than_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "_MAX_LINE_BYTES", 50)
    lines = b'{"text": "a"}\n' + b'{"text": "' + b"x" * 1000 + b'"}\n' + THREE
    rows = list(data.read_rows(file_of(tmp_path, "a.jsonl", lines)))
    assert [row.line for row in rows] == [1, 2, 3, 4, 5]
    assert isinstance(rows[1], BadRow)
