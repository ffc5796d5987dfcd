"""Pages of raw tables behind docs/results.md: every line of every result, folded as its columns allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sections.machines import hash_table_rows
from tables import Line, describe, figure, let_go, of_kind, percent, read, table, times

# A page: its title, the results on it, by name, and what to know of them beyond what the scripts say.
PAGES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "studies": (
        "Studies",
        ("study-*",),
        "All rivals and sweeps of speeds in float32, one study a data set (`benchmarks/study.py`). Taken before the "
        "learned criterion, the exact bound on accuracy drops and the fused CPU layers: newer races supersede their "
        "speeds.",
    ),
    "training": (
        "Recipes and heads",
        ("certified", "heads", "recipes", "exits-study-*"),
        "`benchmarks/certified.py`, `heads.py` and `recipes.py`; depths that lists go through are in the column "
        "`depths`. The exits study is a trial from before the heads of convolutions: heads fitted on cached features "
        "to the full model's answers (refit), and fused with a table of hashed n-grams.",
    ),
    "parts": ("Parts of the method", ("ablation", "choices"), "`benchmarks/ablation.py`, `benchmarks/choices.py`."),
    "promises": (
        "Promises",
        ("guarantee", "drift"),
        "`benchmarks/guarantee.py`, `benchmarks/drift.py`; *lost*, in points, and *figure*: lowest 5 %, median, "
        "highest 5 %.",
    ),
    "calls": ("Small calls", ("calls",), "`benchmarks/calls.py`: `ms` and `steps_ms` are milliseconds of a call."),
    "searches": ("Searches for a speed", ("searches",), "`benchmarks/searches.py`: every division."),
    "prediction": (
        "Prediction of exit layers",
        ("prediction*",),
        "`benchmarks/prediction.py`: criteria, promises, probes; microseconds are modelled, not measured.",
    ),
    "encoders": ("Other encoders", ("families",), "`benchmarks/families.py`."),
    "growth": (
        "Time, memory and size",
        ("scaling", "table_scale"),
        "`benchmarks/scaling.py`, `benchmarks/table_scale.py`.",
    ),
    "hash-table": (
        "Hash table",
        ("hash_table-*",),
        "`benchmarks/hash_table.py`: millions of operations a second of the table in plain torch (reference) and, on "
        "a GPU, in Triton, beside `searchsorted` in the sorted keys, a gather at known places and a Python dict.",
    ),
    "gpu": ("On a GPU", ("gpu-*",), "`benchmarks/gpu.py`."),
}
NOTES = {
    "chnsenticorp": "Read with care: many of its test texts occur in its training rows, too, which a table of n-grams "
    "can remember; and it was measured before the others, with recipe `geep`, without bfloat16 and on slower kernels.",
}
# Lines of a study that are tables; the others are about it.
_OF_A_STUDY = ("run", "predictor")
# Fields that say how a line was made, or are curves: left to the file.
_NAMING = ("data", "choice", "recipe", "seed", "division", "to_choose_on", "texts")
_LEFT_OUT = frozenset({"kind", "step", "costs", "cost", "versions", "rounds", "made_of", "curve", "arguments", "case"})


def raw_pages(results: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each page that there are results for."""
    for path in sorted(results.glob("throughput-*.jsonl")):
        yield path.stem, "\n\n".join(_race(results, path.stem.removeprefix("throughput-"), read(path)))
    for name, (title, patterns, words) in PAGES.items():
        paths = [path for pattern in patterns for path in sorted(results.glob(f"{pattern}.jsonl"))]
        if paths:
            yield (
                name,
                "\n\n".join([f"# {title}", words, *(part for path in paths for part in _of_file(results, path))]),
            )


def _of_file(results: Path, path: Path) -> Iterator[str]:
    lines = read(path)
    yield f"## {path.stem}"
    if path.stem.startswith("study-"):
        lines = [line for line in lines if line["kind"] in _OF_A_STUDY]
    if timed := of_kind(lines, "hash_table") if path.stem.startswith("hash_table-") else []:
        yield f"Device: {timed[0]['device']}."
        yield hash_table_rows(timed)
        lines = [line for line in lines if line["kind"] != "hash_table"]
    for some in _melted(lines):
        yield from plain_tables(some)
    for part in figure(results, path.stem, path.stem):
        yield part.replace("../", "../../")


def _race(results: Path, data: str, lines: list[Line]) -> Iterator[str]:
    """One data set: rivals, calls of a size, where time goes, use of the machine, what was left out."""
    about, runs = of_kind(lines, "about")[0], of_kind(lines, "throughput")
    yield f"# Race: {data}"
    if data in NOTES:
        yield NOTES[data]
    idle = max(about["idle_cpu"].values(), default=0.0)
    yield (
        "`benchmarks/throughput.py`: raw text to label ids, every rival in a process of its own at its best batch "
        f"size, interleaved rounds ({about['rounds']}; the median counts), the same weights, the same time for each: "
        "a fast way times more texts of one random order. Accuracy and agreement (with Hugging Face's float32 model) "
        "are of the timed texts, *of all* of every text of the race. A dash: see the notes, or not measured. "
        f"Machine: {describe(about['machine'])}; load {about['load_before']:g} before the run; waiting rivals used at "
        f"most {100 * idle:.0f} % of a core."
    )
    rows = [
        [
            run["name"] + (f", batch {run['batch_size']}" if run["batch_size"] else ""),
            percent(run.get("accuracy_of_all")),
            percent(run["accuracy"]),
            percent(run["agreement"]),
            times(run["layer_speedup"]),
            f"{run['texts']:,}",
            f"{run['throughput']:.1f}",
            f"{run['throughput_low']:.1f} – {run['throughput_high']:.1f}",
            "–" if run["ids_throughput"] is None else f"{run['ids_throughput']:.1f}",
            times(run["over_pipeline"]),
            times(run["over_full"]),
        ]
        for run in runs
    ]
    header = ["", "accuracy of all, %", "accuracy, %", "agreement, %", "layer speed-up", "texts timed", "texts/s"]
    header += ["slowest – fastest round", "texts/s from ids", "over HF pipeline", "over packed full"]
    yield table(header, rows)
    yield from sorted(
        {f"{run['name']}: no accuracy, since {run['not_comparable']}." for run in runs if run["not_comparable"]}
    )
    yield from (f"{line['name']} was left out: {line['why'].rstrip('.')}." for line in of_kind(lines, "failed"))
    gone = {run["engine"] for run in runs if run["engine"] and let_go(run["engine"])}
    yield from (f"{engine}: a backend that was let go." for engine in sorted(gone))
    versions: dict[str, set[str]] = {}
    for run in runs:
        for name, version in run["versions"].items():
            versions.setdefault(name, set()).add(version)
    named = ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in sorted(versions.items()))
    yield f"Versions: {named}."
    for name in ("throughput", "budget", "utilisation"):
        for part in figure(results, f"{name}-{data}", f"{data}: {name}"):
            yield part.replace("../", "../../")
    yield from plain_tables([line for line in lines if line["kind"] in ("budget", "parts", "peak", "utilisation")])


def _melted(lines: Sequence[Line]) -> Iterator[list[Line]]:
    """The lines without what they say of each promise or step, then a line for each of these."""
    for name in ("promises", "found", "steps"):
        if all(isinstance(line.get(name), dict) for line in lines):
            yield [{key: value for key, value in line.items() if key != name} for line in lines]
            yield [
                {key: line[key] for key in _NAMING if key in line} | {name: key_of} | value
                for line in lines
                for key_of, value in line[name].items()
            ]
            return
    yield list(lines)


def plain_tables(lines: Sequence[Line]) -> Iterator[str]:
    """A table for each kind of line; what all lines share is said once, above."""
    kinds = [line.get("kind", line.get("step", "")) for line in lines]
    for kind in dict.fromkeys(kinds):
        rows = [_flat(line) for line, own in zip(lines, kinds, strict=True) if own == kind]
        names = list(dict.fromkeys(name for row in rows for name in row))
        same = [name for name in names if len(rows) > 1 and len({str(row.get(name)) for row in rows}) == 1]
        varied = [name for name in names if name not in same]
        shared = ", ".join(f"{_words(name)} {_cell(rows[0].get(name))}" for name in same)
        if kind or shared:
            yield f"{_words(kind).capitalize() or 'All'}{f' ({shared})' if shared else ''}:"
        yield table([_words(name) for name in varied], [[_cell(row.get(name)) for name in varied] for row in rows])


def _flat(line: Line, above: str = "") -> Line:
    """Fields with one value or a row of numbers, those of nested fields under the names of both."""
    found: Line = {}
    for name, value in line.items():
        if name in _LEFT_OUT:
            continue
        if isinstance(value, dict):
            found |= _flat(value, above if name in ("machine", "settings") else f"{above}{name}: ")
        elif not isinstance(value, list) or all(isinstance(each, int | float) for each in value):
            found[above + name] = value
    return found


def _words(name: str) -> str:
    return name.replace("_", " ")


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return " ".join(_cell(each) for each in value) or "–"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
