"""Files as plain UTF-8 bytes: compression and UTF-16 are seen in the first bytes, whatever the file is called.

Read `open_bytes`. What the bytes mean is not known here.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import errno
import gzip
import io
import lzma
import os
import stat
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import pyarrow as pa

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".zip")
"""Endings of compressed files that are read."""

# As many bytes are read at a time, and as many can be looked at before they are read.
_BLOCK = 64 * 2**10

# Arrow fills what it is asked to fill, or fails: the less it is asked for, the less is lost.
_ZSTD_BLOCK = 4 * 2**10


class DamagedBytesError(Exception):
    """A compressed file breaks off, or its bytes are none that its compression can have made."""


@dataclass(frozen=True)
class Opened:
    """An open file.

    Attributes:
        file: The decompressed bytes; UTF-16 is UTF-8 by now. To be read once, from the start.
        head: The first of them, up to 64 KiB, still to be read. Of a pipe they may be fewer, but hold a whole line.
        compression: The entry of `COMPRESSIONS` that was found, or the empty string.
    """

    file: BinaryIO
    head: bytes
    compression: str


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether a path can be read only once, from the start: ``-`` (standard input), a FIFO or a device."""
    if os.fspath(path) == "-":
        return True
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[Opened]:
    """Open a file, or standard input for ``-``, as decompressed bytes; a pipe is opened once and never sought in.

    A `DamagedBytesError` at a read says that the rest cannot be decompressed; all bytes before were handed out.

    Raises:
        ValueError: If the file is compressed twice, or is a zip archive of more or less than one file.
    """
    with ExitStack() as stack:
        if os.fspath(path) == "-":
            # Standard input is the process's: it is not ours to close.
            file = _with_whole_line(_standard_input())
        else:
            file = stack.enter_context(path.open("rb", buffering=_BLOCK))
            if is_stream(path):
                file = _with_whole_line(file)
        head = _peek(file)
        compression = _compression_of(head)
        if compression:
            file = io.BufferedReader(_Decompressed(_decompressor(compression, path, file, stack)), _BLOCK)
            # The head of a damaged file may be beyond reach: whoever reads on is told.
            head = _peek(file)
            if again := _compression_of(head):
                raise ValueError(f"{path} is compressed twice ({again} within {compression}); decompress it once.")
        # The mark of UTF-32 begins as one of UTF-16 does.
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and not head.startswith(codecs.BOM_UTF32_LE):
            file = io.BufferedReader(_Transcoded(file), _BLOCK)
            head = _peek(file)
        yield Opened(file, head, compression)


def _standard_input() -> BinaryIO:
    file = getattr(sys.stdin, "buffer", None)
    if file is None:
        raise ValueError("There is no standard input to read bytes from; name a file.")
    return cast(BinaryIO, file)


def _peek(file: BinaryIO) -> bytes:
    try:
        return cast(io.BufferedReader, file).peek(_BLOCK)[:_BLOCK]
    except DamagedBytesError:
        return b""


def _compression_of(head: bytes) -> str:
    if head.startswith(b"\x1f\x8b\x08"):
        return ".gz"
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return ".bz2"
    if head.startswith(b"\xfd7zXZ\x00"):
        return ".xz"
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return ".zst"
    return ".zip" if head.startswith((b"PK\x03\x04", b"PK\x05\x06")) else ""


def _decompressor(compression: str, path: Path, file: BinaryIO, stack: ExitStack) -> Callable[[int], bytes]:
    """A function that gives up to so many of the next bytes, none at the end.

    Not more than one step of decompressing is taken at a time: what a step gives is not lost by the next one's failure.
    """
    if compression == ".zip":
        return _zip_member(path, file, stack)
    if compression == ".zst":
        stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
        return lambda size: cast(bytes, stream.read(min(size, _ZSTD_BLOCK)))
    if compression == ".gz":
        return gzip.GzipFile(fileobj=file, mode="rb").read1
    if compression == ".bz2":
        return _streams(file, bz2.BZ2Decompressor, padding=b"")
    return _streams(file, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), padding=b"\0")


def _streams(
    file: BinaryIO, make: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor], padding: bytes
) -> Callable[[int], bytes]:
    """A function that gives up to so many bytes of compressed streams that stand one after the other.

    `BZ2File` and `LZMAFile` take a later stream that is damaged where it begins for something that follows the end,
    and leave out all of it in silence.
    """
    decompressor = make()
    is_between = False

    def read(size: int) -> bytes:
        nonlocal decompressor, is_between
        while True:
            if decompressor.eof:
                block = decompressor.unused_data
                decompressor, is_between = make(), True
            else:
                block = b""
            if decompressor.needs_input and not block:
                block = file.read(_BLOCK)
                if not block and is_between:
                    return b""
                if not block:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            if is_between:
                block = block.lstrip(padding) if padding else block
                if not block:
                    continue
                is_between = False
            if part := decompressor.decompress(block, size):
                return part

    return read


def _zip_member(path: Path, file: BinaryIO, stack: ExitStack) -> Callable[[int], bytes]:
    if is_stream(path):
        raise ValueError(f"{path} is a zip archive in a pipe, which cannot be sought in; unpack it on the way.")
    try:
        archive = stack.enter_context(zipfile.ZipFile(file))
        names = [
            item.filename for item in archive.infolist() if not (item.is_dir() or item.filename.startswith("__MACOSX/"))
        ]
        if len(names) != 1:
            shown = ", ".join(repr(name) for name in names[:5]) + (", …" if len(names) > 5 else "")
            raise ValueError(
                f"{path} is a zip archive of {len(names)} files ({shown or 'none'}), expected one; unpack it and name "
                "the file that is meant."
            )
        return cast(zipfile.ZipExtFile, stack.enter_context(archive.open(names[0]))).read1
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError, OSError) as err:
        # Where an archive is damaged, places are sought in it that no file has.
        if isinstance(err, OSError) and err.errno not in (None, errno.EINVAL):
            raise
        raise ValueError(f"{path} is no readable zip archive ({err}); unpack it, or fetch it again.") from err


class _Raw(io.RawIOBase):
    def readable(self) -> bool:
        return True


class _Decompressed(_Raw):
    """What a decompressor gives, with one error for all the ways in which one says that bytes are damaged.

    It is raised at every later read, too: a decompressor that has failed may say that nothing is left.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._damage: DamagedBytesError | None = None

    def readinto(self, buffer: WriteableBuffer) -> int:
        if self._damage is not None:
            raise self._damage
        view = memoryview(buffer).cast("B")
        try:
            part = self._read(len(view))
        except OSError as err:
            if err.errno is not None:  # the disk's word, not the decompressor's
                raise
            self._damage = DamagedBytesError(str(err))
            raise self._damage from err
        except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError, ValueError) as err:
            self._damage = DamagedBytesError(str(err))
            raise self._damage from err
        view[: len(part)] = part
        return len(part)


class _Transcoded(_Raw):
    """UTF-16 with a byte order mark as UTF-8; what is no UTF-16 comes out as bytes that are no UTF-8."""

    def __init__(self, inner: BinaryIO) -> None:
        self._inner = cast(io.BufferedReader, inner)
        self._decoder = codecs.getincrementaldecoder("utf-16")("surrogatepass")
        self._ready = b""
        self._is_ended = False

    def readinto(self, buffer: WriteableBuffer) -> int:
        while not self._ready and not self._is_ended:
            block = self._inner.read1(_BLOCK)
            if block:
                self._ready = self._decoder.decode(block).encode("utf-8", "surrogatepass")
            else:
                self._is_ended = True
                self._ready = b"\xff" if self._decoder.getstate()[0] else b""
        view = memoryview(buffer).cast("B")
        part = self._ready[: len(view)]
        self._ready = self._ready[len(part) :]
        view[: len(part)] = part
        return len(part)


def _with_whole_line(file: BinaryIO) -> BinaryIO:
    """A pipe whose first line can be looked at before it is read, however it trickles in."""
    inner = cast(io.BufferedReader, file)
    head = b""
    while len(head) < _BLOCK and b"\n" not in head:
        block = inner.read1(_BLOCK - len(head))
        if not block:
            break
        head += block
    return io.BufferedReader(_Joined(head, inner), _BLOCK)


class _Joined(_Raw):
    """Bytes read already, then the file that they were read from."""

    def __init__(self, head: bytes, rest: io.BufferedReader) -> None:
        self._head = head
        self._rest = rest

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        part = self._head[: len(view)] if self._head else self._rest.read1(len(view))
        self._head = self._head[len(part) :]
        view[: len(part)] = part
        return len(part)
