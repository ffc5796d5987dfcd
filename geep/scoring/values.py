"""Values as text: what JSON and CSV lack is written as what comes nearest."""

from __future__ import annotations

import base64
import datetime
import json
import math
from collections.abc import Mapping

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def plain_value(value: object) -> object:
    """A value that JSON lacks as one that it has: Parquet holds dates, decimals, bytes, NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None if math.isnan(value) else _not_finite(value)
    if isinstance(value, str | int | None):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value)


def _not_finite(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def json_text(value: object) -> str:
    """A value as JSON; NaN is null, what else JSON lacks is a string."""
    try:
        return _encode(value)
    except (TypeError, ValueError):
        return _encode(plain_value(value))


def json_line(value: object) -> str:
    """A value as a line of JSON."""
    return json_text(value) + "\n"


def csv_cell(value: object) -> str:
    """A value as a CSV field: strings as they are, nothing as nothing, the rest as JSON spells it."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        return repr(value)  # as JSON spells it
    if isinstance(value, float):
        return _not_finite(value)
    if isinstance(value, dict | list):
        return json_text(value)
    plain = plain_value(value)
    return plain if isinstance(plain, str) else json_text(plain)
