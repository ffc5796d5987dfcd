"""From what the workers answered to the lines of a result. Arithmetic alone: nothing is run here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rivals.runner import Worker

Line = dict[str, Any]

# The full model in float32: whoever runs it, the answers are the same.
FLOAT32_GROUPS = ("pipeline", "pipeline-sorted", "openvino-float32", "onnxruntime-float32")

# What classifies no texts, but measures something of its own.
OTHER_GROUPS = frozenset({"peak", "parts", "utilisation", "budget"})


@dataclass(frozen=True, slots=True)
class Timed:
    """The texts of a race: their labels, their tokens, and the layers of the full model."""

    labels: list[int] | None
    lengths: list[int]
    full_depth: int


@dataclass(slots=True)
class Entry:
    """One way of one worker, the number of texts that it times, and what its rounds gave."""

    worker: Worker
    way: dict[str, Any]
    versions: dict[str, str]
    count: int = 0
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    was_uneven: bool = False
    all_answers: list[int] | None = None

    @property
    def name(self) -> str:
        """Unique name."""
        return self.way["name"]

    @property
    def group(self) -> str:
        """What it is compared as."""
        return self.way["group"]

    @property
    def seconds_per_text(self) -> float:
        """Of the trial."""
        return self.way["seconds_per_text"]

    @property
    def seconds_per_run(self) -> float:
        """Of the trial, where the number of texts does not matter."""
        return self.way["seconds_per_run"]

    @property
    def expected_seconds(self) -> float:
        """What a round should take, by the trial."""
        return self.seconds_per_run + self.count * self.seconds_per_text

    @property
    def texts_per_call(self) -> int:
        """Size of the calls in which texts come; 0: what the way likes best."""
        return self.way["about"].get("texts_per_call", 0)

    def seconds(self) -> float:
        """Median of the rounds."""
        return float(np.median([outcome["seconds"] for outcome in self.outcomes]))

    def spread(self) -> float:
        """Slowest round over the fastest; 1 where there is none."""
        seconds = [outcome["seconds"] for outcome in self.outcomes]
        return max(seconds) / min(seconds) if seconds else 1.0

    def rate(self) -> float:
        """Texts a second, median of the rounds."""
        return self.count / self.seconds()

    def ids_rate(self) -> float | None:
        """Texts a second from token ids; None where that was not taken."""
        seconds = self.extra("from_ids")
        return None if seconds is None else self.count / seconds

    def extra(self, name: str) -> float | None:
        """Median of a further measurement; None where it was not taken."""
        values = [outcome["extra"][name] for outcome in self.outcomes if name in outcome["extra"]]
        return float(np.median(values)) if values else None


def lines_of(data: str, entries: Sequence[Entry], failures: dict[str, str], timed: Timed) -> list[Line]:
    """All lines: throughput, budgets, parts, peak, utilisation, failures."""
    ran = [entry for entry in entries if entry.outcomes]
    of_group: dict[str, list[Entry]] = {}
    for entry in ran:
        of_group.setdefault(entry.group, []).append(entry)
    peaks = _peaks(of_group.get("peak", []))
    lines = [
        *_throughputs(ran, of_group, timed),
        *_budgets(of_group.get("budget", []), timed),
        *(_parts(entry) for entry in of_group.get("parts", [])),
        *({"kind": "peak", "dtype": dtype, "gflops": rate} for dtype, rate in peaks.items()),
        *(_utilisation(entry, peaks) for entry in of_group.get("utilisation", [])),
        *({"kind": "failed", "name": name, "why": why} for name, why in failures.items()),
    ]
    return [{"data": data, **line} for line in lines]


def _throughputs(ran: Sequence[Entry], of_group: dict[str, list[Entry]], timed: Timed) -> list[Line]:
    pipeline = of_group.get("pipeline", [])
    reference = pipeline[0] if pipeline else None
    full = of_group.get("full", [])
    in_float32 = (entry.all_answers for group in FLOAT32_GROUPS for entry in of_group.get(group, []))
    all_of_reference = next((answers for answers in in_float32 if answers is not None), None)
    from_ids = {
        (entry.way["about"]["engine"], entry.way["about"]["line"]): entry.ids_rate()
        for entry in of_group.get("parts", [])
    }
    lines = []
    for entry in ran:
        if entry.group in OTHER_GROUPS:
            continue
        about = entry.way["about"]
        rates = [entry.count / outcome["seconds"] for outcome in entry.outcomes]
        comparable = entry.way["not_comparable"] is None
        lines.append(
            {
                "kind": "throughput",
                "name": entry.name,
                "group": entry.group,
                "engine": about.get("engine"),
                "setting": entry.way["setting"],
                "batch_size": entry.way["batch_size"],
                "versions": entry.versions,
                "texts": entry.count,
                "accuracy": share_equal(entry, timed.labels) if comparable else None,
                "accuracy_of_all": _share_of_all(entry, timed.labels) if comparable else None,
                "agreement_of_all": _share_of_all(entry, all_of_reference) if comparable else None,
                "agreement": share_equal(entry, reference.outcomes[0]["answers"])
                if comparable and reference is not None
                else None,
                "not_comparable": entry.way["not_comparable"],
                "mean_exit_layer": _mean_layer(entry),
                "layer_speedup": layer_speedup(entry, timed),
                "throughput": float(np.median(rates)),
                "throughput_low": min(rates),
                "throughput_high": max(rates),
                "measured_again": entry.was_uneven,
                "ids_throughput": entry.ids_rate() or from_ids.get((about.get("engine"), entry.group)),
                "over_pipeline": None if reference is None else entry.rate() / reference.rate(),
                "over_full": entry.rate() / full[0].rate() if full else None,
            }
        )
    return lines


def share_equal(entry: Entry, wanted: Sequence[int] | None) -> float | None:
    """Share of the answers that are as wanted, of those where that is known; None where nothing is."""
    if wanted is None:
        return None
    known = min(len(wanted), entry.count)
    return float((np.asarray(entry.outcomes[0]["answers"])[:known] == np.asarray(wanted)[:known]).mean())


def _share_of_all(entry: Entry, wanted: Sequence[int] | None) -> float | None:
    """Share of all texts that are answered as wanted; None where they were not all answered, or nothing is wanted."""
    if entry.all_answers is None or wanted is None:
        return None
    return float((np.asarray(entry.all_answers) == np.asarray(wanted)).mean())


def _mean_layer(entry: Entry) -> float | None:
    layers = entry.outcomes[0]["layers"]
    return None if layers is None else float(np.mean(layers))


def layer_speedup(entry: Entry, timed: Timed) -> float | None:
    """Layers of the full model over layers run, each text counted by its tokens: what time can follow."""
    layers = entry.outcomes[0]["layers"]
    if layers is None or not timed.lengths:
        return None
    lengths = np.asarray(timed.lengths[: entry.count])
    run = float((np.asarray(layers) * lengths).sum())
    return float(timed.full_depth * lengths.sum()) / run if run else None


def _budgets(entries: Sequence[Entry], timed: Timed) -> list[Line]:
    """Early exit beside the full depth of its own kind, at the same number of texts a call."""
    at = {
        (entry.way["about"]["engine"], entry.way["about"]["system"], entry.texts_per_call): entry for entry in entries
    }
    lines = []
    for (engine, system, size), entry in sorted(at.items(), key=lambda item: item[0][2]):
        full = at.get((engine, {"geep": "packed-full", "fastbert": "padded-full"}.get(system, ""), size))
        if full is None:
            continue
        speedup = entry.rate() / full.rate()
        layers = layer_speedup(entry, timed)
        lines.append(
            {
                "kind": "budget",
                "system": system,
                "engine": engine,
                "texts_per_call": size,
                "texts": entry.count,
                "throughput": entry.rate(),
                "full_throughput": full.rate(),
                "speedup": speedup,
                "layer_speedup": layers,
                "kept": None if layers is None else speedup / layers,
            }
        )
    return lines


def _parts(entry: Entry) -> Line:
    seconds = {name: entry.extra(name) or 0.0 for name in ("tokenise", "plan", "schedule", "run")}
    whole = sum(seconds.values())
    return {
        "kind": "parts",
        "engine": entry.way["about"]["engine"],
        "line": entry.way["about"]["line"],
        "texts": entry.count,
        "seconds": seconds,
        "shares": {name: value / whole for name, value in seconds.items()},
    }


def _peaks(entries: Sequence[Entry]) -> dict[str, dict[str, float]]:
    """Best rate of each shape in each dtype, over all rounds."""
    best: dict[str, dict[str, float]] = {}
    for entry in entries:
        for outcome in entry.outcomes:
            for dtype, rates in outcome["extra"]["gflops"].items():
                known = best.setdefault(dtype, {})
                for shape, rate in rates.items():
                    known[shape] = max(known.get(shape, 0.0), rate)
    return best


def _utilisation(entry: Entry, peaks: dict[str, dict[str, float]]) -> Line:
    about = entry.way["about"]
    rate = about["flops"] / entry.seconds() / 1e9
    dtype = about["engine"].split()[-1]
    peak = max(peaks[dtype].values()) if dtype in peaks else None
    return {
        "kind": "utilisation",
        "engine": about["engine"],
        "tokens": about["tokens"],
        "texts": about["texts"],
        "throughput": about["texts"] / entry.seconds(),
        "gflops": rate,
        "peak_gflops": peak,
        "utilisation": None if peak is None else rate / peak,
    }
