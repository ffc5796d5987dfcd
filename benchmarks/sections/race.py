"""Sections about races: GEEP beside what one would run instead, in batches and in small calls, and where time goes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from rivals.lines import FLOAT32_GROUPS
from tables import (
    Line,
    Section,
    against_full,
    certified_races,
    describe,
    figure,
    kept_share,
    let_go,
    of_kind,
    percent,
    points,
    read,
    share,
    span,
    system_of,
    table,
    times,
)

# What `geep calibrate` promises unless something else is asked for, in points.
PROMISED = 0.5
# Others at full depth: what somebody would run instead. What does not run all layers of the full model, and what rests
# on our engine or table, is compared apart.
_OURS = ("geep", "full", "constant", "cascade", "static", "table-first", "shallow", "lexical", "embeddings", "fastbert")
_SOURCE = "From `benchmarks/throughput.py`{more}. All rows: {pages}."


def race_sections(results: Path) -> Iterator[Section]:
    """All sections that there are results for."""
    rows = list(_engines(results))
    if rows:
        yield _faster(results, rows)
    if any(row.ways for row in rows):
        yield _other_ways(results, [row for row in rows if row.ways])


def call_sections(results: Path) -> Iterator[Section]:
    """Small calls, and where the time of a call goes."""
    races = [(data, lines) for data, lines, _ in certified_races(results)]
    if any(of_kind(lines, "budget") for _, lines in races):
        yield _small_calls(results, races)
    if any(of_kind(lines, "parts") for _, lines in races):
        yield _time_goes(results, races)


class Row:
    """One certified engine of one data set, in its race."""

    def __init__(self, data: str, engine: str, kept: Line, lines: list[Line]) -> None:
        self.data, self.engine, self.kept = data, engine, kept
        runs = of_kind(lines, "throughput")
        (self.ours,) = of_kind(runs, "throughput", group="geep", engine=engine)
        self.rival = strongest(runs)
        self.over_rival = None if self.rival is None else self.ours["throughput"] / self.rival["throughput"]
        known = None if self.rival is None else against_full(self.rival, lines, {engine: kept})
        self.rival_points = "" if known is None else f" ({points(known)})"
        self.depth, self.over_depth = best_constant(kept, self.ours, runs) or (None, None)
        self.lost = 100 * (kept["full_accuracy"] - kept["accuracy"])
        self.chance = chance_of(kept)
        # In older runs the table before the full model kept no promise of its own, and the others were not there.
        self.ways = _ways(runs, engine) if of_kind(runs, "throughput", group="lexical") else {}


def chance_of(line: Line) -> float:
    """Half a 95 % interval of the difference in accuracy, in points, on as many texts.

    The difference is a mean over texts of -1, 0 and 1. It is not 0 at most where the answer changed, which bounds its
    variance; where both answers are wrong it is 0, so that the true interval is narrower.
    """
    gain = line["accuracy"] - line["full_accuracy"]
    variance = max(1 - line["agreement"] - gain**2, 0.0)
    return 100 * 1.96 * math.sqrt(variance / line["texts"])


def _engines(results: Path) -> Iterator[Row]:
    for data, lines, kept in certified_races(results):
        for engine, line in sorted(kept.items()):
            yield Row(data, engine, line, lines)


def readme_table(results: Path) -> str:
    """What is lost and gained, in few columns."""
    rows = [
        [
            row.data,
            row.engine.split()[-1],
            f"{percent(row.kept['full_accuracy'])} → {percent(row.kept['accuracy'])}",
            times(row.kept["layer_speedup"]),
            times(row.ours["over_pipeline"]),
            times(row.over_rival),
            "–" if row.rival is None else row.rival["name"].split(",")[0],
        ]
        for row in _engines(results)
    ]
    header = ["data set", "dtype", "test accuracy, full → GEEP, %", "fewer layers", "over HF pipeline"]
    return table([*header, "over the strongest rival", "which is, at full depth"], rows)


def _faster(results: Path, rows: list[Row]) -> Section:
    cells = [
        [
            row.data,
            row.engine.split()[-1],
            percent(row.kept["full_accuracy"]),
            f"{percent(row.kept['accuracy'])} ({points(-row.lost)} ± {row.chance:.2f})",
            percent(row.kept["agreement"]),
            times(row.kept["layer_speedup"]),
            f"{row.ours['throughput']:,.0f}",
            times(row.ours["over_pipeline"]),
            "–" if row.rival is None else row.rival["name"] + row.rival_points,
            times(row.over_rival),
            "none as good" if row.depth is None else f"{times(row.over_depth)} ({row.depth} layers)",
            share(row.kept["lexical_share"]),
        ]
        for row in rows
    ]
    header = ["data set", "dtype", "full, float32, %", "GEEP, %", "agreement, %", "fewer layers", "texts/s"]
    header += ["over HF pipeline", "strongest rival at full depth (points against the full model)", "over it"]
    header += ["over best constant depth as accurate", "by the table alone"]
    broken = [f"{row.data} in {row.engine.split()[-1]} {row.lost:.2f}" for row in rows if row.lost > PROMISED]
    surely = [row for row in rows if row.lost - row.chance > PROMISED]
    slow = min((row.over_rival for row in rows if row.over_rival is not None), default=1.0) <= 1
    about = of_kind(certified_races(results)[0][1], "about")[0]
    machine = describe({**about["machine"], "dtype": "dtypes as named"})
    lost = f"; of the promised {PROMISED:g} points the test split lost more on: {', '.join(broken)}" if broken else ""
    if broken:
        lost += f", in {len(surely)} of these {len(broken)} by more than chance may be"
    alone = sorted({row.data for row in rows if row.depth is None})
    none = f" ({', '.join(alone)}: no depth is as accurate)" if alone else ""
    refused = [
        f"{line['data']} in {line['engine'].split()[-1]}"
        for line in read(results / "accuracy.jsonl")
        if line.get("certified") is False and not let_go(line["engine"])
    ]
    nothing = f" Nothing could be certified, and the full model answers: {', '.join(refused)}." if refused else ""
    return Section(
        "Is it faster than what one would run instead?",
        (
            "Raw text to label in one interleaved run, every rival in a process of its own at its best batch size. "
            "Accuracy (against full in points, with a 95 % interval that is rather too wide), agreement with the "
            "float32 full model and layers: the whole test split. Strongest rival: the fastest of Hugging Face's "
            "pipeline, ONNX Runtime, OpenVINO and sentence-transformers that runs all layers and loses at most a "
            f"point. Machine: {machine}.",
            table(header, cells),
            *figure(results, "races", "accuracy against time"),
        ),
        f"{'Not always' if slow else 'Yes'}: {span((row.ours['over_pipeline'] for row in rows), times)} Hugging "
        f"Face's pipeline, {span((row.over_rival for row in rows), times)} the strongest rival at full depth, "
        f"{span((row.over_depth for row in rows), times)} the best constant depth of the same engine{none}. Against "
        f"the float32 model test accuracy changed by {span((-row.lost for row in rows), points)} "
        f"points{lost}.{nothing}",
        _SOURCE.format(more=" and `benchmarks/accuracy.py`", pages=_pages(results)),
    )


def _pages(results: Path) -> str:
    names = [path.stem for path in sorted(results.glob("throughput-*.jsonl"))]
    return ", ".join(f"[{name.removeprefix('throughput-')}](results/{name}.md)" for name in names)


def _ways(runs: list[Line], engine: str) -> dict[str, Line]:
    """Other ways to be cheap, by name; of several of a kind the fastest, on our own engine in the same dtype."""
    dtype, found = engine.split()[-1], {}
    for name, group in (
        ("shallow model", "shallow"),
        ("table, then all layers", "cascade"),
        ("table, then OpenVINO int8", "table-first"),
        ("FastBERT", "fastbert"),
        ("TF-IDF", "lexical"),
        ("static embeddings", "embeddings"),
    ):
        some = of_kind(runs, "throughput", group=group)
        if group == "cascade":
            some = [run for run in some if run["engine"] == engine]
        if group == "shallow":
            some = [run for run in some if run["name"].endswith(dtype)]
        if some:
            found[name] = max(some, key=lambda run: float(run["throughput"]))
    return found


def _other_ways(results: Path, rows: list[Row]) -> Section:
    names = list(dict.fromkeys(name for row in rows for name in row.ways))

    def cell(row: Row, name: str) -> str:
        if name not in row.ways:
            return "–"
        way = row.ways[name]
        depth = f"{way['mean_exit_layer']:.0f} layers: " if way["group"] == "shallow" else ""
        return f"{depth}{percent(accuracy_of(way))} %, {times(row.ours['throughput'] / way['throughput'])}"

    cells = [
        [row.data, row.engine.split()[-1], f"{percent(accuracy_of(row.ours))} %", *(cell(row, name) for name in names)]
        for row in rows
    ]
    told, better = [], 0
    for name in names:
        pairs = [(row.ours, row.ways[name]) for row in rows if name in row.ways]
        rates = [ours["throughput"] / way["throughput"] for ours, way in pairs]
        gaps = [100 * ((accuracy_of(ours) or 0.0) - (accuracy_of(way) or 0.0)) for ours, way in pairs]
        better += sum(rate < 1 and gap <= 0 for rate, gap in zip(rates, gaps, strict=True))
        told.append(f"{span(rates, times)} *{name}* ({span(gaps, points)} points)")
    return Section(
        "Does it beat other ways to be cheap?",
        (
            "In the same races: accuracy on all texts of the race, and GEEP's speed over theirs. *Shallow model*: "
            "the encoder's first layers, as many as GEEP runs on average, rounded up, fine-tuned at that depth, on "
            "the same engine. *Table, then …*: what geep's table is certain of it answers, for all others all layers "
            "run; certified for the same promise. *FastBERT*: its shrinking batch, texts sorted by length, at GEEP's "
            "speed. *TF-IDF*: with logistic regression, and *static embeddings* (model2vec), distilled from the model: "
            "taught all rows that it was made of.",
            table(["data set", "dtype", "GEEP", *names], cells),
        ),
        f"{f'Not always: {better}' if better else 'Yes: none'} of them {'are' if better > 1 else 'is'} both faster "
        f"and as accurate. GEEP's speed, and its accuracy against theirs: {'; '.join(told)}.",
        _SOURCE.format(more="", pages=_pages(results)),
    )


def accuracy_of(run: Line) -> float | None:
    """Of all test texts of the race where it is known, else of those that were timed."""
    of_all: float | None = run.get("accuracy_of_all")
    return run["accuracy"] if of_all is None else of_all


def strongest(runs: list[Line]) -> Line | None:
    """The fastest rival that is at most a point less accurate than the full model in float32; None where none is."""
    of_groups = (run for group in FLOAT32_GROUPS for run in of_kind(runs, "throughput", group=group))
    full = [run for run in of_groups if run["accuracy"] is not None]
    if not full:
        return None
    known = [run for run in full if run.get("accuracy_of_all") is not None] or full
    least = (accuracy_of(known[0]) or 0.0) - 0.01
    rivals = [run for run in runs if run["group"] not in _OURS and (accuracy_of(run) or 0.0) >= least]
    return max(rivals, key=lambda run: float(run["throughput"]), default=None)


def best_constant(kept: Line, ours: Line, runs: list[Line]) -> tuple[int, float] | None:
    """The fastest constant depth of the same engine that is as accurate, and our speed over its; None: none is."""
    constants = of_kind(runs, "throughput", engine=kept["engine"])
    rivals = [
        (run["throughput"], int(run["mean_exit_layer"]))
        for run in constants
        if run["group"] in ("constant", "full")
        and kept["constant_accuracy"].get(str(int(run["mean_exit_layer"])), 0.0) >= kept["accuracy"]
    ]
    if not rivals:
        return None
    rate, depth = max(rivals)
    return depth, ours["throughput"] / rate


def _small_calls(results: Path, races: list[tuple[str, list[Line]]]) -> Section:
    found = [(data, line) for data, lines in races for line in of_kind(lines, "budget")]
    sizes = sorted({line["texts_per_call"] for _, line in found})
    at = {(data, system_of(line), line["texts_per_call"]): line for data, line in found}
    rows = []
    for data, system in dict.fromkeys((data, system) for data, system, _ in at):
        lines = [at.get((data, system, size)) for size in sizes]
        layers = span((line["layer_speedup"] for line in lines if line), times)
        cells = [
            "–" if line is None else f"{line['throughput']:,.0f}, {times(line['speedup'])}, {kept_share(line)}"
            for line in lines
        ]
        rows.append([data, system, layers, *cells])
    ours = {(d, s, n): line for (d, s, n), line in at.items() if line["system"] == "geep" and line["kept"] is not None}
    theirs = {(d, n): line for (d, s, n), line in at.items() if line["system"] == "fastbert"}
    met = [(line, theirs[d, n]) for (d, _, n), line in ours.items() if (d, n) in theirs]
    less = sum((line["kept"] or 0.0) < (other["kept"] or 0.0) for line, other in met)
    kept = [
        f"{span((line['kept'] for (_, _, n), line in ours.items() if n == size), share)} at {size}" for size in sizes
    ]
    first = [line["kept"] for (_, _, size), line in ours.items() if size == sizes[0]]
    halved, few = sum(share < 0.5 for share in first), len(first)
    more = sum(line["throughput"] > other["throughput"] for line, other in met)
    beside = (
        f" FastBERT turns a larger share of its own into time in {less} of {len(met)} cases; GEEP runs more texts a "
        f"second in {more} of them."
        if met
        else ""
    )
    return Section(
        "What do small calls get, beside FastBERT's?",
        (
            "Texts that come in calls of a size: texts a second, over the full depth of its own kind at that size "
            "(packed for GEEP, padded in arrival order for FastBERT), and the share of the layers saved that became "
            "time.",
            table(["data set", "system", "fewer layers", *(f"{size} texts a call" for size in sizes)], rows),
        ),
        f"Of the layers that GEEP saves {', '.join(kept)} texts a call becomes time; at {sizes[0]} less than half in "
        f"{halved} of {few} engines.{beside}",
        _SOURCE.format(more="", pages=_pages(results)),
    )


def _time_goes(results: Path, races: list[tuple[str, list[Line]]]) -> Section:
    names = {"tokenise": "tokenise, %", "plan": "predict, %", "schedule": "schedule, %", "run": "layers and exits, %"}
    found = [(data, row) for data, lines in races for row in of_kind(lines, "parts", line="geep")]
    use = [line for _, lines in races for line in of_kind(lines, "utilisation") if line["utilisation"] is not None]
    by_dtype = {
        dtype: span((line["utilisation"] for line in use if line["engine"].endswith(dtype)), share)
        for dtype in sorted({line["engine"].split()[-1] for line in use})
    }
    rows = [[data, row["engine"], *(percent(row["shares"][name]) for name in names)] for data, row in found]
    used = ", ".join(f"{share} in {dtype}" for dtype, share in by_dtype.items())
    return Section(
        "Where does the time of a call go?",
        (table(["data set", "engine", *names.values()], rows),),
        "Looking up and adding the table's scores takes "
        f"{span((row['shares']['plan'] for _, row in found), lambda share: f'{100 * share:.1f} %')} of a call, the "
        f"scheduler at most {100 * max(row['shares']['schedule'] for _, row in found):.2f} %. Of the machine's peak "
        f"in matrix products the full model, packed, reaches {used or 'an unknown share'}.",
        _SOURCE.format(more="", pages=_pages(results)),
    )
