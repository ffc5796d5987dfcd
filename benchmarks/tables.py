"""What every section of the report is written with: lines of results, tables, numbers in words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rivals.lines import FLOAT32_GROUPS

from geep.backends import BACKENDS

Line = dict[str, Any]

HALF_A_POINT = "at most 0.5 points"
"""The promise that most tables compare at, as the scripts call it."""


@dataclass(frozen=True, slots=True)
class Section:
    """A question that results answer.

    Attributes:
        question: The heading.
        parts: Tables, figures, and in a sentence what was done.
        answer: In one to three sentences; every number and comparison in it is computed.
        source: Scripts that measured, and where all rows are.
    """

    question: str
    parts: tuple[str, ...]
    answer: str
    source: str

    def __str__(self) -> str:
        """Markdown."""
        return "\n\n".join([f"## {self.question}", *self.parts, f"{self.answer} *{self.source}*"])


def read(path: Path) -> list[Line]:
    """Read a JSON-lines file; nothing where it is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def append(path: Path, line: Line) -> None:
    """Add a line to a JSON-lines file."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def of_kind(lines: list[Line], kind: str, **fields: object) -> list[Line]:
    """Lines of a kind with these fields."""
    return [line for line in lines if line["kind"] == kind and all(line.get(k) == v for k, v in fields.items())]


def system_of(budget: Line) -> str:
    """What ran in calls of a size: ours on an engine, or FastBERT's way."""
    if budget["system"] == "fastbert":
        return "FastBERT, shrinking batch"
    return f"GEEP, {budget.get('engine', 'packed')}"


def certified_races(results: Path) -> list[tuple[str, list[Line], dict[str, Line]]]:
    """Data sets that were raced with a certified engine: name, lines of the race, lines of whole test splits by engine.

    Left out are engines on a backend that was let go, those of which nothing is certified, and lines from before
    that was noted, whose models an older recipe made; docs/results has them all.
    """
    path = results / "accuracy.jsonl"
    kept: dict[str, dict[str, Line]] = {}
    for line in read(path):
        if line.get("certified") and not let_go(line["engine"]):
            kept.setdefault(line["data"], {})[line["engine"]] = line
    races = []
    for data, engines in sorted(kept.items()):
        timed = results / f"throughput-{data}.jsonl"
        lines = read(timed)
        raced = {run["engine"] for run in of_kind(lines, "throughput", group="geep") if run["over_pipeline"]}
        if mine := {engine: line for engine, line in engines.items() if engine in raced}:
            races.append((data, lines, mine))
    return races


def against_full(run: Line, lines: list[Line], kept: dict[str, Line]) -> float | None:
    """Points of accuracy against the float32 full model, on all texts that both answered; None where that is not known.

    Args:
        run: A way of a race.
        lines: Of that race.
        kept: What its engines keep on the whole test split, by engine.
    """
    if run["group"] in FLOAT32_GROUPS:
        return 0.0
    mine = kept.get(run["engine"] or "")
    if mine is not None and run["group"] in ("geep", "full", "constant"):
        depth = str(int(run["mean_exit_layer"]))
        accuracy: float = mine["accuracy"] if run["group"] == "geep" else mine["constant_accuracy"][depth]
        return 100 * (accuracy - mine["full_accuracy"])
    full = _full_accuracy(lines, kept)
    if full is None or run.get("accuracy_of_all") is None:
        return None
    return 100 * (float(run["accuracy_of_all"]) - full)


def _full_accuracy(lines: list[Line], kept: dict[str, Line]) -> float | None:
    """Of the float32 full model on all texts of a race.

    Where float32 was too slow to answer them all, by what our engine's full depth has there, less what rounding gains
    it on the whole test split.
    """
    runs = [line for line in of_kind(lines, "throughput") if line.get("accuracy_of_all") is not None]
    for run in runs:
        if run["group"] in FLOAT32_GROUPS:
            return float(run["accuracy_of_all"])
    for run in runs:
        if run["group"] == "full" and run["engine"] in kept:
            mine = kept[run["engine"]]
            gained = mine["constant_accuracy"][str(int(run["mean_exit_layer"]))] - mine["full_accuracy"]
            return float(run["accuracy_of_all"] - gained)
    return None


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


def plain(value: float) -> str:
    """Two digits behind the point."""
    return f"{value:.2f}"


def share(value: float) -> str:
    """A share in whole per cent."""
    return f"{100 * value:.0f} %"


def kept_share(line: Line) -> str:
    """Of the layers that calls of a size save, the share that became time; a dash where none were saved."""
    return "–" if line["kept"] is None else share(line["kept"])


def points(value: float) -> str:
    """A difference in points, with its sign."""
    return f"{value:+.2f}"


def span(values: Iterable[float | None], said: Callable[[float], str] = plain) -> str:
    """Least to most of what is known, in words; once where they read the same, a dash where nothing is known."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    low, high = said(min(known)), said(max(known))
    return low if low == high else f"{low} to {high}"


def figure(results: Path, name: str, words: str) -> list[str]:
    """A figure that was drawn, for a page in docs; nothing where it was not."""
    return [f"![{words}](../benchmarks/results/{name}.png)"] if (results / f"{name}.png").exists() else []
