"""What a file seems to be, by its first bytes: for messages that name the mistake."""

from __future__ import annotations

import codecs
import json
import re

# Kinds of file that come under a name of ours and are none of ours, by how they begin.
_FOREIGN = (
    (b"PAR1", "a Parquet file; name it .parquet"),
    (b"ARROW1", "an Arrow (Feather) file; write it as Parquet"),
    (b"Obj\x01", "an Avro file; write it as JSON lines or Parquet"),
    (b"SQLite format 3\x00", "an SQLite database; export the table as CSV"),
    (b"\xd0\xcf\x11\xe0", "an old Office file; save the sheet as CSV"),
    (b"%PDF-", "a PDF document; extract its text"),
    (b"\x80\x04\x95", "a Python pickle; write its rows as JSON lines"),
    (b"\x89HDF", "an HDF5 file; write it as Parquet"),
    (b"\x93NUMPY", "a NumPy array; write its rows as JSON lines"),
    (codecs.BOM_UTF32_LE, "UTF-32; write it as UTF-8"),
    (codecs.BOM_UTF32_BE, "UTF-32; write it as UTF-8"),
    (b"version https://git-lfs", "a pointer of Git LFS; fetch the file itself with git lfs pull"),
)
_MARKUP = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|html|\?xml)\b", re.IGNORECASE)
_JSON_ROWS = re.compile(rb'(?:\xef\xbb\xbf)?\s*(?:\[\s*)?\{\s*"(?:[^"\\\n]|\\.)*"\s*:')
_JSON_ARRAY = re.compile(rb"\s*\[\s*(?:[{\]]|$)")


def foreign_kind(head: bytes) -> str | None:
    """What a file is that is none of ours, and what to do with it; None where nothing is known against it."""
    for start, kind in _FOREIGN:
        if head.startswith(start):
            return kind
    if _is_wide(head):
        return "UTF-16 without a byte order mark; write it as UTF-8"
    return "an HTML or XML page; fetch the data itself" if _MARKUP.match(head) else None


def is_json(head: bytes) -> bool:
    """Whether a file begins as JSON lines or a JSON array of objects."""
    return _JSON_ROWS.match(head) is not None


def is_json_array(head: bytes) -> bool:
    """Whether a file begins as one JSON array of objects, and not as a line of its own that is an array."""
    return _JSON_ARRAY.match(head.removeprefix(b"\xef\xbb\xbf")) is not None


def instead_of_json_lines(head: bytes) -> str:
    """What a file seems to be that has not one JSON object on a line, and what to do with it."""
    start = head[:4096]
    if b"\x00" in start:
        return "binary data; name another file"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return "text in an encoding other than UTF-8; write it as UTF-8"
    if b"\r" in start and b"\n" not in start:
        return "a file whose lines end in carriage returns alone; write it with newlines"
    first = head.lstrip().split(b"\n", 1)[0].rstrip()
    if re.match(rb"\[\s*[^\s{\]]", first):
        return "JSON arrays and not objects; write one object a line, with the names of its columns"
    if _is_json_value(first):
        return "JSON values that are no objects; write one object a line, with the names of its columns"
    if first.endswith(b",") and _is_json_value(first[:-1]):
        return "JSON objects with commas between the lines; leave them out, or write [ before and ] after all"
    if first.startswith((b"{", b"[")):
        if re.search(rb"\}\s*,?\s*\{", first):
            return "JSON with several objects on a line; write one a line, or an array of them"
        return "JSON over several lines that is no array; write one object a line, or an array of them"
    if re.search(rb"[,;\t]", start.split(b"\n", 1)[0]):
        return "CSV or TSV; name it .csv or .tsv"
    return "text that is not JSON; write one object a line"


def _is_wide(head: bytes) -> bool:
    """Whether every second byte is zero, as in UTF-16 of mostly Latin letters."""
    start = head[:4096]
    shares = sorted(part.count(0) / max(len(part), 1) for part in (start[::2], start[1::2]))
    return shares[1] > 0.7 and shares[0] < 0.3


def _is_json_value(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
