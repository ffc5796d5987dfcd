"""Small files of every format, whole and mangled: each ends in all of its rows, or in one clear error.

A few hundred cases run as tests; `python tests/test_files_fuzz.py 10000` runs as many as it is told, and says what it
found. A case is its number: the same number always makes the same file.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data import COMPRESS
from test_scoring import FakeEngine

import geep
from geep.data import FORMATS, BadRow, Row, read_rows

NUM_CASES = 400
TEXTS = ("a", "", "two words", "№ 😀", 'says "so"', "a, b; c", "back\\slash", " blanks ", "nul\0", "'", "{}", "[1]")
TARGETS = (".jsonl", ".csv.gz", ".tsv", ".parquet")


@dataclass(frozen=True)
class Made:
    """A file, and what is known of what must come out of it.

    Attributes:
        name: Its name.
        content: Its bytes.
        texts: The texts of its good rows, in order; None where they are not known.
        num_bad: Its bad rows; None where they are not known.
        may_fail: Whether an error may be the answer; the good rows before it are a beginning of `texts` then.
        how: What was done to it, in words.
    """

    name: str
    content: bytes
    texts: list[str] | None
    num_bad: int | None
    may_fail: bool
    how: str


# --- Whole files


def rows_of(rng: random.Random, kind: str) -> list[dict[str, str]]:
    allowed = [text for text in TEXTS if kind != ".tsv" or "\t" not in text]
    if kind in (".csv", ".json", ".jsonl", ".parquet"):
        allowed += ["two\nlines", "tab\there"]
    return [
        {"text": rng.choice(allowed), "label": rng.choice("xy")}
        for _ in range(rng.choice((1, 2, 3, 8, 40, 40, 2000) if rng.random() < 0.1 else (1, 2, 3, 8)))
    ]


def written(kind: str, rows: list[dict[str, str]]) -> bytes:
    if kind == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if kind == ".json":
        return json.dumps(rows, indent=1).encode()
    if kind == ".tsv":
        return "".join(
            f"{row['text']}\t{row['label']}\n" for row in [{"text": "text", "label": "label"}, *rows]
        ).encode()
    if kind == ".csv":
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, ["text", "label"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue().encode()
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=5)
    return sink.getvalue()


def whole(rng: random.Random) -> tuple[Made, list[dict[str, str]], str, str]:
    """A file that is as it should be, its rows, its kind and its compression."""
    suffix = rng.choice(FORMATS)
    kind = next(kind for kind in (".jsonl", ".json", ".csv", ".tsv", ".parquet") if suffix.startswith(kind))
    if kind == ".json" and suffix.startswith(".jsonl"):
        kind = ".jsonl"
    packing = suffix[len(kind) :]
    rows = rows_of(rng, kind)
    content = COMPRESS[packing](written(kind, rows))
    return Made(f"file{suffix}", content, [row["text"] for row in rows], 0, False, "whole"), rows, kind, packing


# --- Mangled files. Each way takes a whole file, and gives a mangled one or None where it does not apply.


def flipped(rng: random.Random, made: Made, *_: object) -> Made:
    content = bytearray(made.content)
    for _ in range(rng.choice((1, 1, 2, 20))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return replace(made, content=bytes(content), texts=None, num_bad=None, may_fail=True, how="bits flipped")


def cut(rng: random.Random, made: Made, rows: object, kind: str, packing: str) -> Made:
    content = made.content[: rng.randrange(len(made.content))]
    # What a format says at its end is missing; a line that is cut may be a row of its own.
    texts = made.texts if packing and kind == ".jsonl" else None
    return replace(made, content=content, texts=texts, num_bad=None, may_fail=True, how="cut")


def inserted(rng: random.Random, made: Made, rows: list[dict[str, str]], kind: str, packing: str) -> Made:
    content = bytearray(written(kind, rows))
    for _ in range(rng.choice((1, 2, 5))):
        at = rng.randrange(len(content) + 1)
        content[at:at] = rng.choice(
            (b'"', b"\n", b"\r", b"\0", codecs.BOM_UTF8, b"\xff", b",", b"\t", b"[", b"}", b"\\u")
        )
    content = bytearray(COMPRESS[packing](bytes(content)))
    return replace(made, content=bytes(content), texts=None, num_bad=None, may_fail=True, how="bytes inserted")


def renamed(rng: random.Random, made: Made, rows: object, kind: str, packing: str) -> Made:
    other = rng.choice(FORMATS)
    # The name of the compression does not matter; that of the format may make it unreadable.
    same = other.startswith((".json",)) and kind in (".json", ".jsonl") or other.startswith(kind) and kind != ".json"
    texts, bad = (made.texts, 0) if same else (None, None)
    return replace(made, name=f"file{other}", texts=texts, num_bad=bad, may_fail=not same, how="renamed")


def junk_between(rng: random.Random, made: Made, rows: list[dict[str, str]], kind: str, packing: str) -> Made | None:
    junk = {
        ".jsonl": ['{"text": 3}', '{"text": "a"', "oops", '{"text": NaN}', '{"text": "a", "text": "b"}', '{"a": 1}'],
        ".csv": ["one", "a,b,c", '"x"'],
        ".tsv": ["one", "a\tb\tc", '"'],
    }.get(kind)
    if junk is None:
        return None
    parts = [written(kind, [row])[0 if kind == ".jsonl" else len(written(kind, [])) :] for row in rows]
    bad = [rng.choice(junk).encode() + b"\n" for _ in range(rng.randrange(1, 5))]
    body = parts + bad
    order = sorted(range(len(body)), key=lambda _: rng.random())
    texts = [rows[index]["text"] for index in order if index < len(parts)]
    head = b"" if kind == ".jsonl" else written(kind, [])
    content = COMPRESS[packing](head + b"".join(body[index] for index in order))
    return replace(made, content=content, texts=texts, num_bad=len(bad), how="bad rows between")


def joined(rng: random.Random, made: Made, rows: list[dict[str, str]], kind: str, packing: str) -> Made | None:
    if kind in (".json", ".parquet"):
        return None
    one = rng.choice((b"", codecs.BOM_UTF8)) + written(kind, rows)
    texts = [row["text"] for row in rows] * 2
    content = COMPRESS[packing](one + one)
    return replace(made, content=content, texts=texts, num_bad=0 if kind == ".jsonl" else 1, how="joined")


def marked(rng: random.Random, made: Made, rows: list[dict[str, str]], kind: str, packing: str) -> Made | None:
    if kind == ".parquet":
        return None
    content = written(kind, rows).decode()
    encoded = rng.choice((content.encode("utf-16"), codecs.BOM_UTF16_BE + content.encode("utf-16-be")))
    encoded = rng.choice((encoded, codecs.BOM_UTF8 + content.encode()))
    return replace(made, content=COMPRESS[packing](encoded), how="with a byte order mark")


def otherwise_delimited(
    rng: random.Random, made: Made, rows: list[dict[str, str]], kind: str, packing: str
) -> Made | None:
    if kind != ".csv":
        return None
    content = written(kind, rows).replace(b'","', rng.choice((b'";"', b'"|"')))
    return replace(made, content=COMPRESS[packing](content), how="otherwise delimited")


def with_a_column_twice(
    rng: random.Random, made: Made, rows: list[dict[str, str]], kind: str, packing: str
) -> Made | None:
    if kind not in (".csv", ".tsv"):
        return None
    names = rng.choice((["text", "text"], ["label", "label", "text"], ["text", "", ""]))
    head = ("," if kind == ".csv" else "\t").join(names).encode() + b"\n"
    content = COMPRESS[packing](head + written(kind, rows))
    return replace(made, content=content, texts=None, num_bad=None, may_fail=True, how="with a column twice")


def as_it_is(rng: random.Random, made: Made, *_: object) -> Made:
    return made


WAYS: tuple[Callable[..., Made | None], ...] = (
    as_it_is,
    flipped,
    flipped,
    cut,
    cut,
    inserted,
    inserted,
    renamed,
    junk_between,
    joined,
    marked,
    otherwise_delimited,
    with_a_column_twice,
)


def file_of(case: int) -> Made:
    """The file of a case."""
    rng = random.Random(case)
    while True:
        file, rows, kind, packing = whole(rng)
        found = rng.choice(WAYS)(rng, file, rows, kind, packing)
        if found is not None:
            return found


# --- What must hold


def check(case: int, folder: Path, *, scored: bool) -> str:
    """Read the file of a case, and score it where asked; return what became of it."""
    file = file_of(case)
    path = folder / file.name
    path.write_bytes(file.content)
    where = f"case {case}, {file.name}, {file.how}"
    rows: list[Row | BadRow] = []
    error: Exception | None = None
    try:
        rows.extend(read_rows(path))
    except (ValueError, OSError) as err:
        error = err
    if error is not None:
        assert type(error) in (ValueError, OSError), f"{where}: {error!r} says what failed inside, not what is wrong"
        assert path.name in str(error), f"{where}: {error!r} names no file"
        assert file.may_fail, f"{where}: {error!r}"
    good = [row.text for row in rows if isinstance(row, Row)]
    for text in good:
        text.encode("utf-8")
    lines = [row.line for row in rows]
    assert lines == sorted(lines), f"{where}: lines {lines} are out of order"
    if file.texts is not None:
        expected = file.texts if error is None and file.num_bad is not None else file.texts[: len(good)]
        assert good == expected, f"{where}: {good} for {expected}"
    if error is None and file.num_bad is not None:
        bad = [row for row in rows if isinstance(row, BadRow)]
        assert len(bad) == file.num_bad, f"{where}: bad rows {bad}"
    if scored:
        check_score(case, where, path, rows, error, folder)
    return "error" if error is not None else "rows"


def check_score(
    case: int, where: str, path: Path, rows: list[Row | BadRow], error: Exception | None, folder: Path
) -> None:
    """Score the file, and hold the report and the result to the rows that were read."""
    num_good = sum(isinstance(row, Row) for row in rows)
    target = folder / f"result{random.Random(case).choice(TARGETS)}"
    if error is not None:
        with pytest.raises((ValueError, OSError)):
            geep.score_file(FakeEngine(), path, target, chunk_rows=3)
        assert not target.exists(), f"{where}: a result in spite of {error!r}"
        return
    report = geep.score_file(FakeEngine(), path, target, chunk_rows=3)
    assert (report.rows, report.num_bad) == (num_good, len(rows) - num_good), where
    if num_good:  # a result without rows need not have their columns
        assert sum(isinstance(row, Row) for row in read_rows(target)) == num_good, where


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


@pytest.mark.parametrize("first", range(0, NUM_CASES, 50))
def test_every_file_ends_in_its_rows_or_in_one_clear_error(first: int, tmp_path: Path) -> None:
    for case in range(first, first + 50):
        folder = tmp_path / str(case)
        folder.mkdir()
        check(case, folder, scored=case % 4 == 0)


def test_the_cases_are_of_all_kinds() -> None:
    files = [file_of(case) for case in range(NUM_CASES)]
    assert len({file.how for file in files}) == 10
    assert {file.name.removeprefix("file") for file in files} == set(FORMATS)


def main(num_cases: int) -> int:
    """Run so many cases, show what failed and how the rest ended; return the number of those that failed."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("error")
    ends: Counter[str] = Counter()
    failed = 0
    for case in range(num_cases):
        with tempfile.TemporaryDirectory() as folder:
            try:
                ends[f"{file_of(case).how}: {check(case, Path(folder), scored=case % 4 == 0)}"] += 1
            except Exception as err:  # whatever it is, it is what is looked for
                failed += 1
                sys.stdout.write(f"case {case}: {type(err).__name__}: {str(err)[:300]}\n")
    for end, count in sorted(ends.items()):
        sys.stdout.write(f"{count:6} {end}\n")
    sys.stdout.write(f"{failed} of {num_cases} cases failed\n")
    return failed


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])) > 0)
