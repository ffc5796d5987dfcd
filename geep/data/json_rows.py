"""JSON as a stream of rows: one object on a line, or the objects of one array, in bounded memory.

Read `read_json`, then `json_lines` and `json_array`.
"""

from __future__ import annotations

import codecs
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from geep.data.compression import DamagedBytesError, Opened
from geep.data.kinds import instead_of_json_lines, is_json_array
from geep.data.rows import BadRow, Columns, Row, damaged, shown

# A line may be as long as the file: this bounds what is held of it, and of one element of an array.
_MAX_LINE_BYTES = 64 * 2**20

# Line, the object there (empty where there is none) and what is wrong with it.
_Value = tuple[int, dict[str, object], str | None]

# Objects looked at before a column that is asked for and that none of them has is called missing.
_HEADER_ROWS = 100

_BLOCK = 64 * 2**10
_BOM = b"\xef\xbb\xbf"


def read_json(path: Path, opened: Opened, columns: Columns) -> Iterator[Row | BadRow]:
    """Stream the rows of JSON lines or of a JSON array, good and bad, in the file's order.

    Rows before a damage are handed out before it is raised.

    Raises:
        ValueError: If none of the first 100 objects has a column that is asked for, none of the first 100 lines is an
            object, the file is damaged, or an array is broken.
    """
    # JSON has no header: the first objects together stand for one, so that a wrong column name is said once and not
    # once a row.
    values = json_array(path, opened) if is_json_array(opened.head) else json_lines(opened)
    found: dict[str, None] = {}
    wanted = columns.wanted.keys()
    held: list[Row | BadRow] | None = []
    objects = 0
    line = 0
    try:
        for line, value, flaw in values:
            row = columns.row(line, value) if flaw is None else BadRow(line, flaw)
            if held is None:
                yield row
                continue
            held.append(row)
            objects += bool(value)
            found.update(dict.fromkeys(value))
            is_whole = wanted <= found.keys()
            if is_whole or objects >= _HEADER_ROWS:
                if not is_whole:
                    columns.check(path, found)
                yield from held
                held = None
            elif not objects and len(held) >= _HEADER_ROWS:
                raise _no_object(path, opened.head, held)
            elif len(held) >= 2 * _HEADER_ROWS:  # an object or two and broken lines: nothing to learn from keeping them
                yield from held
                held.clear()
    except DamagedBytesError as err:
        yield from held or ()
        raise damaged(path, line, err) from err
    if held is not None:
        if objects:
            columns.check(path, found)
        elif held:
            raise _no_object(path, opened.head, held)
        yield from held


def _no_object(path: Path, head: bytes, held: list[Row | BadRow]) -> ValueError:
    first = cast(BadRow, held[0])
    return ValueError(
        f"{path} holds no JSON object in its first {len(held)} rows (line {first.line}: {first.reason}). It seems to "
        f"be {instead_of_json_lines(head)}."
    )


class _Decoder:
    """A JSON decoder that also notes what Python's lets pass and JSON does not mean."""

    def __init__(self) -> None:
        self._flaw: str | None = None
        self._json = json.JSONDecoder(
            object_pairs_hook=self._object, parse_float=self._float, parse_constant=self._constant
        )
        self.decode = self._json.decode

    def raw_decode(self, text: str, start: int) -> tuple[object, int]:
        """The value that begins at `start`, and where it ends; what an earlier, vain try noted is forgotten."""
        self._flaw = None
        return self._json.raw_decode(text, start)

    def flaw_of(self, value: object, text: str) -> str | None:
        """What is wrong with a value decoded just now from this text."""
        flaw, self._flaw = self._flaw, None
        if flaw is None and "\\u" in text:
            # Escapes can spell half a character, which no tokenizer and no UTF-8 file can take.
            try:
                json.dumps(value, ensure_ascii=False).encode("utf-8")
            except UnicodeEncodeError:
                flaw = "a \\u escape stands for half a character (a lone surrogate)"
        if flaw is None and not isinstance(value, dict):
            flaw = f"expected a JSON object, found {shown(value)}"
        return flaw

    def forget(self) -> None:
        """Forget what a text noted that is no JSON."""
        self._flaw = None

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in found if names.count(name) > 1)
            self._flaw = f"the key {shown(twice)} is there twice; which of the two values holds is not known"
        return found

    def _float(self, digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            self._flaw = f"the number {digits[:40]} is too large for a float"
        return value

    def _constant(self, name: str) -> None:
        self._flaw = f"invalid JSON: {name} is not JSON"


def _parse(decoder: _Decoder, line: bytes) -> tuple[dict[str, object], str | None]:
    """The object on a line, and what is wrong with it or instead of it."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as err:
        return {}, f"not UTF-8: byte 0x{line[err.start]:02x} at byte {err.start + 1} of the line"
    try:
        value = decoder.decode(text)
    except json.JSONDecodeError as err:
        decoder.forget()
        if text.startswith("\ufeff"):  # of a file that was appended to another
            return _parse(decoder, line[len(_BOM) :])
        if err.msg == "Extra data":
            return {}, f"invalid JSON: more follows the first value, from character {err.pos + 1} of the line on"
        return {}, f"invalid JSON: {err.msg} at character {err.pos + 1} of the line"
    except RecursionError:
        decoder.forget()
        return {}, "invalid JSON: nested too deeply"
    except ValueError as err:  # an integer of thousands of digits
        decoder.forget()
        return {}, f"invalid JSON: {err}"
    return (value if isinstance(value, dict) else {}), decoder.flaw_of(value, text)


def json_lines(opened: Opened) -> Iterator[_Value]:
    """Each line that is not blank."""
    decoder = _Decoder()
    file = opened.file
    number = 0
    while line := file.readline(_MAX_LINE_BYTES):
        number += 1
        if len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(_MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield number, {}, f"longer than {_MAX_LINE_BYTES // 2**20} MiB"
        elif line.strip() not in (b"", _BOM):
            yield number, *_parse(decoder, line)


class _Window:
    """The part of a text that is being read: it grows at its end and is cut off at its start."""

    def __init__(self, opened: Opened) -> None:
        self._file = cast(io.BufferedReader, opened.file)
        # surrogateescape keeps elements with bad bytes in step.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self.text = ""
        self.at = 0
        self.line = 1
        self.is_ended = False
        self.damage: DamagedBytesError | None = None

    def grow(self, size: int) -> None:
        """Hold at least `size` more characters, fewer only at the end."""
        parts = [self.text[self.at :]]
        self.at = 0
        while size > 0 and not self.is_ended:
            try:
                block = self._file.read1(_BLOCK)
            except DamagedBytesError as err:
                self.damage = err
                block = b""
            self.is_ended = not block
            parts.append(self._decoder.decode(block, final=self.is_ended))
            size -= len(parts[-1])
        self.text = "".join(parts)

    def move(self, end: int) -> None:
        """Go on to a position, and count the lines on the way."""
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def next(self) -> str:
        """The next character that is no blank, not passed by; empty at the end."""
        while True:
            end = self.at
            while end < len(self.text) and self.text[end] in " \t\r\n":
                end += 1
            self.move(end)
            if end < len(self.text):
                return self.text[end]
            if self.is_ended:
                if self.damage is not None:
                    raise self.damage
                return ""
            self.grow(_BLOCK)


def json_array(path: Path, opened: Opened) -> Iterator[_Value]:
    """Each element of the array that a file consists of.

    Raises:
        ValueError: If the array is broken: where an element ends cannot be told then, so that nothing more is read.
    """
    window, decoder = _Window(opened), _Decoder()

    def broken(what: str) -> ValueError:
        return ValueError(
            f"{path}, line {window.line}: {what}. The JSON array is broken here, after {number} elements; mend it, or "
            "write one object a line, of which each can be read alone."
        )

    number = 0
    window.next()
    window.move(window.at + 1)
    if window.next() == "]":
        window.move(window.at + 1)
    else:
        while True:
            if not window.next():
                raise broken("the file ends inside of the array")
            line = window.line
            try:
                value, end = _element(window, decoder)
            except json.JSONDecodeError as err:
                window.move(err.pos)
                raise broken(f"invalid JSON: {err.msg}") from err
            except RecursionError as err:
                raise broken("nested too deeply") from err
            except ValueError as err:
                raise broken(str(err)) from err
            number += 1
            text = window.text[window.at : end]
            flaw = _bad_byte(text) or decoder.flaw_of(value, text)
            window.move(end)
            yield line, value if isinstance(value, dict) else {}, flaw and f"{flaw} (element {number})"
            mark = window.next()
            if mark not in (",", "]"):
                raise broken(f"expected a comma or ], found {mark!r}" if mark else "the file ends inside of the array")
            window.move(window.at + 1)
            if mark == "]":
                break
    if window.next():
        raise broken("more follows the end of the array")


def _element(window: _Window, decoder: _Decoder) -> tuple[object, int]:
    """The value that begins where the window stands, and where it ends; the window grows until it holds all of it."""
    while True:
        try:
            value, end = decoder.raw_decode(window.text, window.at)
            if end < len(window.text) or window.is_ended:
                return value, end
        except json.JSONDecodeError:
            if window.is_ended:
                if window.damage is not None:
                    raise window.damage from None
                raise
            if len(window.text) - window.at > _MAX_LINE_BYTES:
                raise ValueError(f"an element that is broken, or longer than {_MAX_LINE_BYTES // 2**20} MiB") from None
        # Twice as much every time: what is decoded in vain adds up to no more than what is decoded at last.
        window.grow(max(len(window.text) - window.at, _BLOCK))


def _bad_byte(text: str) -> str | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as err:
        return f"not UTF-8: byte 0x{ord(text[err.start]) - 0xDC00:02x} at character {err.start + 1} of the element"
    return None
