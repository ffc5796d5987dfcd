"""What every section of the report is written with: lines of results, tables, numbers in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from geep.backends import BACKENDS

Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """Read a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def of_kind(lines: list[Line], kind: str, **fields: object) -> list[Line]:
    """Lines of a kind with these fields."""
    return [line for line in lines if line["kind"] == kind and all(line.get(k) == v for k, v in fields.items())]


def system_of(budget: Line) -> str:
    """What ran in calls of a size: ours on an engine, or FastBERT's way."""
    if budget["system"] == "fastbert":
        return "FastBERT, shrinking batch"
    return f"GEEP, {budget.get('engine', 'packed')}"


def let_go(engine: str) -> bool:
    """Whether an engine ("backend dtype") ran on a backend that was let go; results keep it, since they say why."""
    return engine.split()[0] not in BACKENDS


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned right."""
    marks = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, marks, *rows))


def percent(value: float | None) -> str:
    """A share in percent, or a dash."""
    return "–" if value is None else f"{100 * value:.2f}"


def times(value: float | None) -> str:
    """A factor, or a dash where nothing ran."""
    return "–" if value is None else f"{value:.2f}x"


def describe(machine: Line) -> str:
    """A machine in words."""
    return f"{machine['device']}, {machine['threads']} threads, {machine['dtype']}, torch {machine['torch']}"
