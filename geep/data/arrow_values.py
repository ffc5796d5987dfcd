"""Arrow's values as Python's, whatever their type: nothing raises, and nothing is rounded.

What Python has no exact value for becomes a string: times in nanoseconds are ISO 8601 with nine digits, durations are
ISO 8601 in seconds, dates and times outside of the years 1 to 9999 are the number that is stored and its unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, time
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc

_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}

_LIST_TYPES = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)


def is_binary(kind: pa.DataType) -> bool:
    """Whether values of an Arrow type are bytes."""
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def python_values(array: pa.Array | pa.ChunkedArray) -> list[object]:
    r"""Return the values of an array as Python's, None for null; see the module for those that Python lacks.

    Lists become lists, structs dictionaries (lists of pairs where two fields have one name), maps lists of pairs, and
    extension types what they are stored as. Bytes in a string column that are no UTF-8 are written as in ``\xff``.
    """
    if isinstance(array, pa.ChunkedArray):
        return [value for chunk in array.chunks for value in python_values(chunk)]
    kind = array.type
    if isinstance(array, pa.ExtensionArray) and not isinstance(kind, pa.UuidType):
        return python_values(array.storage)
    if pa.types.is_dictionary(kind):
        return python_values(array.dictionary_decode())
    if pa.types.is_run_end_encoded(kind):
        return python_values(pc.run_end_decode(array))
    if pa.types.is_struct(kind):
        return _structs(array)
    if pa.types.is_map(kind):
        return _maps(array)
    if any(test(kind) for test in _LIST_TYPES):
        return _lists(array)
    if pa.types.is_temporal(kind):
        return _times(array)
    if pa.types.is_float16(kind):
        array = array.cast(pa.float32())  # pyarrow before 22 has NumPy's numbers for these
    try:
        return cast(list[object], array.to_pylist())
    except UnicodeDecodeError:
        raw = array.cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "backslashreplace") for value in raw]


def _structs(array: pa.StructArray) -> list[object]:
    names = [item.name for item in array.type]
    columns = [python_values(column) for column in array.flatten()]
    rows: Iterator[tuple[object, ...]] = zip(*columns, strict=True) if columns else iter([()] * len(array))
    is_unique = len(set(names)) == len(names)
    return [
        None if is_null else (dict if is_unique else _pairs)(zip(names, row, strict=True))
        for is_null, row in zip(array.is_null().to_pylist(), rows, strict=True)
    ]


def _pairs(items: Iterator[tuple[str, object]]) -> list[list[object]]:
    return [list(item) for item in items]


def _maps(array: pa.MapArray) -> list[object]:
    keys, items = python_values(array.keys), python_values(array.items)
    ends = array.offsets.to_pylist()
    return [
        None if is_null else list(zip(keys[start:end], items[start:end], strict=True))
        for is_null, start, end in zip(array.is_null().to_pylist(), ends, ends[1:], strict=False)
    ]


def _lists(array: pa.Array) -> list[object]:
    values = iter(python_values(array.flatten()))
    return [
        None if length is None else [next(values) for _ in range(length)]
        for length in pc.list_value_length(array).to_pylist()
    ]


def _times(array: pa.Array) -> list[object]:
    """Dates, times of day, moments and durations."""
    kind = array.type
    if pa.types.is_duration(kind):
        return [None if value is None else _seconds(value, _UNITS[kind.unit]) for value in _integers(array)]
    if pa.types.is_interval(kind):
        return [None if value is None else list(value) for value in array.to_pylist()]
    if getattr(kind, "unit", None) == "ns":
        return _nanoseconds(array)
    try:
        return cast(list[object], array.to_pylist())
    except (ValueError, KeyError, OverflowError, pa.ArrowException):  # a zone that is not known is a KeyError
        if pa.types.is_timestamp(kind) and kind.tz is not None and not _is_zone(kind.tz):
            return _times(array.cast(pa.timestamp(kind.unit, "UTC")))  # the same moments
        unit = "days" if pa.types.is_date32(kind) else getattr(kind, "unit", "ms")
        return [_time_or_number(array.slice(index, 1), unit) for index in range(len(array))]


def _time_or_number(one: pa.Array, unit: str) -> object:
    try:
        return one.to_pylist()[0]
    except (ValueError, OverflowError, pa.ArrowException):
        return f"{_integers(one)[0]} {unit} since 1970-01-01"


def _is_zone(name: str) -> bool:
    try:
        pa.scalar(0, pa.timestamp("s", name)).as_py()
    except (ValueError, KeyError, pa.ArrowException):
        return False
    return True


def _integers(array: pa.Array) -> list[int | None]:
    width = pa.int32() if array.type.bit_width == 32 else pa.int64()
    return cast("list[int | None]", array.view(width).to_pylist())


def _seconds(value: int, per_second: int) -> str:
    """A duration as ISO 8601, such as PT90S or PT-0.000000001S."""
    whole, part = divmod(abs(value), per_second)
    fraction = f".{part:0{len(str(per_second)) - 1}d}".rstrip("0") if part else ""
    return f"PT{'-' * (value < 0)}{whole}{fraction}S"


def _nanoseconds(array: pa.Array) -> list[object]:
    """Moments or times of day in nanoseconds: what Python has down to the microsecond, and three digits more."""
    counts = _integers(array)
    micros = pa.array([None if count is None else count // 1000 for count in counts], pa.int64())
    kind = pa.timestamp("us", array.type.tz) if pa.types.is_timestamp(array.type) else pa.time64("us")
    shown = cast("list[datetime | time | None]", python_values(micros.view(kind)))
    texts: list[object] = []
    for value, count in zip(shown, counts, strict=True):
        if value is None or count is None:
            texts.append(None)
            continue
        text = value.isoformat(timespec="microseconds")
        end = text.index(".") + 7
        texts.append(f"{text[:end]}{count % 1000:03d}{text[end:]}")
    return texts
