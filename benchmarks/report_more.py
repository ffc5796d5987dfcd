"""Sections of docs/results.md beyond the studies: throughput, scaling, hash table, prediction, GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report_exits import exits_parts
from tables import describe, let_go, of_kind, percent, read, system_of, table, times

Line = dict[str, Any]

NO_GPU = "Not yet measured on a GPU; `make bench-gpu` measures and writes this section."


def more_parts(results: Path) -> list[str]:
    """All sections that there are results for; the GPU section always, since its absence is a fact to be told."""
    parts: list[str] = []
    throughput = sorted(results.glob("throughput-*.jsonl"))
    if throughput:
        parts += ["## Throughput", THROUGHPUT_WORDS]
        for path in throughput:
            parts += throughput_part(results, path.stem.removeprefix("throughput-"), read(path))
    scaling = results / "scaling.jsonl"
    if scaling.exists():
        parts += ["## How time and memory grow", *scaling_part(results, read(scaling))]
    families = results / "families.jsonl"
    if families.exists():
        parts += ["## Families", *families_part(read(families))]
    learned = results / "table_scale.jsonl"
    if learned.exists():
        parts += ["## Learning a table from many texts", *table_scale_part(read(learned))]
    gpu = sorted(results.glob("gpu-*.jsonl"))
    tables = sorted(results.glob("hash_table-*.jsonl"))
    on_gpu = [path for path in tables if _is_gpu(path)]
    if on_cpu := [path for path in tables if path not in on_gpu]:
        parts += ["## Hash table", *(part for path in on_cpu for part in hash_table_part(read(path)))]
    if predictions := sorted(results.glob("prediction*.jsonl")):
        parts += ["## Prediction of exit layers", *(part for path in predictions for part in plain_tables(read(path)))]
    parts += exits_parts(results)
    parts.append("## On a GPU")
    parts += [
        *(part for path in gpu for part in plain_tables(read(path))),
        *(part for path in on_gpu for part in hash_table_part(read(path))),
    ] or [NO_GPU]
    return parts


THROUGHPUT_WORDS = (
    "Printed by `benchmarks/throughput.py`: raw text to label ids, every rival in a process of its own at its best "
    "batch size, interleaved rounds, the same weights, the same time for each: a fast way times more texts of one "
    "random order. Accuracy and agreement (with Hugging Face's float32 model) are of the timed texts alone; the "
    "studies above have them for the whole test split. A dash: see the note below the table, or not measured."
)


def _is_gpu(path: Path) -> bool:
    names = {path.stem, *(str(line.get("device", "")) for line in read(path))}
    return any(word in name.lower() for name in names for word in ("cuda", "nvidia"))


def throughput_part(results: Path, data: str, lines: list[Line]) -> list[str]:
    """One data set: rivals, budgets, where time goes, use of the machine, what was left out."""
    about, runs = of_kind(lines, "about")[0], of_kind(lines, "throughput")
    rows = [
        [
            run["name"] + (f", batch {run['batch_size']}" if run["batch_size"] else ""),
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
    header = [
        "",
        "accuracy, %",
        "agreement, %",
        "layer speed-up",
        "texts timed",
        "texts/s",
        "slowest – fastest round",
        "texts/s from ids",
        "over HF pipeline",
        "over packed full",
    ]
    idle = max(about["idle_cpu"].values(), default=0.0)
    parts = [
        f"### {data}",
        f"Test texts, median of {about['rounds']} rounds. Machine: {describe(about['machine'])}; "
        f"load {about['load_before']:g} before the run; waiting rivals used at most {100 * idle:.0f} % of a core.",
        table(header, rows),
    ]
    versions: dict[str, set[str]] = {}
    for run in runs:
        for name, version in run["versions"].items():
            versions.setdefault(name, set()).add(version)
    notes = sorted(
        {f"{run['name']}: no accuracy, since {run['not_comparable']}." for run in runs if run["not_comparable"]}
    )
    notes += [f"{line['name']} was left out: {line['why'].rstrip('.')}." for line in of_kind(lines, "failed")]
    gone = {run["engine"] for run in runs if run["engine"] and let_go(run["engine"])}
    notes += [f"{engine}: a backend that was let go." for engine in sorted(gone)]
    parts += notes
    parts.append(
        "Versions: "
        + ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in sorted(versions.items()))
        + "."
    )
    parts += _figure(results, f"throughput-{data}")
    if budgets := of_kind(lines, "budget"):
        parts += [
            "Texts that come in calls of a size; each beside the full depth of its own kind (packed for GEEP, padded "
            "in arrival order for FastBERT):",
            table(
                ["", "texts a call", "texts", "texts/s", "full depth, texts/s", "speed-up", "layer speed-up", "kept"],
                [
                    [
                        system_of(row),
                        f"{row['texts_per_call']:,}",
                        f"{row['texts']:,}",
                        f"{row['throughput']:.1f}",
                        f"{row['full_throughput']:.1f}",
                        times(row["speedup"]),
                        times(row["layer_speedup"]),
                        "–" if row["kept"] is None else f"{row['kept']:.2f}",
                    ]
                    for row in sorted(budgets, key=lambda row: (row["system"] != "geep", system_of(row)))
                ],
            ),
            *_figure(results, f"budget-{data}"),
        ]
    if shares := of_kind(lines, "parts"):
        names = {"tokenise": "tokenise, %", "plan": "predict, %", "schedule": "schedule, %", "run": "run, %"}
        parts += [
            "Where the time of a call goes:",
            table(
                ["", *names.values()],
                [
                    [
                        f"{row['engine']}, {'GEEP' if row['line'] == 'geep' else 'full model'}",
                        *(percent(row["shares"][name]) for name in names),
                    ]
                    for row in shares
                ],
            ),
        ]
    if use := of_kind(lines, "utilisation"):
        peaks = {line["dtype"]: max(line["gflops"].values()) for line in of_kind(lines, "peak")}
        measured = ", ".join(f"{dtype} {peak:.0f}" for dtype, peak in sorted(peaks.items()))
        parts += [
            f"Use of the machine by the full model, packed. Peak of matrix products in the same run, billions of "
            f"operations a second: {measured}.",
            table(
                ["", "tokens a text", "texts/s", "useful GFLOP/s", "% of the peak"],
                [
                    [
                        row["engine"],
                        f"{row['tokens'][0]}–{row['tokens'][1]}",
                        f"{row['throughput']:.1f}",
                        f"{row['gflops']:.0f}",
                        "–" if row["utilisation"] is None else f"{100 * row['utilisation']:.0f}",
                    ]
                    for row in use
                ],
            ),
        ]
    return parts


def scaling_part(results: Path, lines: list[Line]) -> list[str]:
    """Files of growing size, then the encoders of random weights."""
    parts = [
        f"Printed by `benchmarks/scaling.py`, each row in a fresh process. Machine: {describe(lines[0]['machine'])}."
    ]
    if rows := sorted(of_kind(lines, "scaling", axis="texts"), key=lambda row: row["value"]):
        parts += [
            "A file scored into another by a calibrated model:",
            table(
                ["texts", "texts/s", "mean layer", "memory after loading, MiB", "peak memory, MiB"],
                [
                    [
                        f"{row['value']:,}",
                        f"{row['throughput']:.0f}",
                        f"{row['mean_exit_layer']:.2f}",
                        _mib(row["loaded_mib"]),
                        _mib(row["peak_mib"]),
                    ]
                    for row in rows
                ],
            ),
        ]
    for axis, words in (("length", "tokens a text"), ("layers", "layers"), ("labels", "labels")):
        if rows := sorted(of_kind(lines, "scaling", axis=axis), key=lambda row: (row["every_exit"], row["value"])):
            parts.append(
                table(
                    [words, "texts/s", "tokens/s", "peak memory, MiB"],
                    [
                        [
                            f"{row['value']:,}" + (", every exit asked" if row["every_exit"] else ""),
                            f"{row['throughput']:.1f}",
                            f"{row['tokens_per_second']:.0f}",
                            _mib(row["peak_mib"]),
                        ]
                        for row in rows
                    ],
                )
            )
    return parts + _figure(results, "scaling")


def families_part(lines: list[Line]) -> list[str]:
    """A row for each encoder and dtype: time of a layer on 1,000 tokens, packed and padded."""

    def per_layer(line: Line, backend: str) -> str:
        return f"{1e6 * line[f'{backend}_seconds'] / line['layers'] / line['tokens']:.1f}"

    rows = [
        [
            f"{line['model']}, {line['dtype']}",
            *(per_layer(line, backend) for backend in ("packed", "padded", "pipeline")),
            times(line["gain"]),
            f"{min(line['gain_of_rounds']):.2f} – {max(line['gain_of_rounds']):.2f}",
            times(line["pipeline_seconds"] / line["packed_seconds"]),
            f"{line['apart']:.1g}",
        ]
        for line in sorted(lines, key=lambda line: [line["dtype"] != "float32", -line["gain"]])
    ]
    machine = lines[0]["machine"]
    return [
        "Printed by `benchmarks/families.py`: encoders of these shapes with random weights, cut to their first layers, "
        f"at full depth on {lines[0]['texts']:,} texts of {lines[0]['tokens']:,} tokens together, 8 to 256 each "
        "(lognormal). Both backends get them sorted by length, in batches of as many tokens as the engine takes; the "
        "pipeline is Hugging Face's own forward on batches of 32 in the order in which texts come. Times are "
        "milliseconds of one layer for 1,000 tokens; the last column is how far the logits are apart, as a part of "
        f"the largest. Machine: {machine['device']}, {machine['threads']} threads, torch {machine['torch']}.",
        table(
            [
                *("", "packed, ms", "padded, ms", "pipeline, ms"),
                *("packed over padded", "lowest – highest round", "packed over pipeline", "logits apart"),
            ],
            rows,
        ),
    ]


def table_scale_part(lines: list[Line]) -> list[str]:
    """A row for each case and step: seconds of the processor and the peak of memory so far."""
    rows = [
        [
            f"{line['texts']:,} texts, {line['labels']} labels, n-grams up to {line['order']}: {name}",
            f"{step['cpu_seconds']:.1f}",
            _mib(step["peak_mib"]),
        ]
        for line in sorted(lines, key=lambda line: (line["texts"], line["labels"], line["order"]))
        for name, step in line["steps"].items()
        if "seconds" in step
    ]
    return [
        "Printed by `benchmarks/table_scale.py`: made-up texts, one step after another in one process, so that each "
        "peak is the highest so far, the texts themselves included. Seconds are the processor's, all threads together. "
        f"Machine: {describe(lines[0]['machine'])}.",
        table(["", "seconds", "peak memory, MiB"], rows),
    ]


def hash_table_part(lines: list[Line]) -> list[str]:
    """Millions of operations a second: a row for each table and operation, a column for each method."""
    timed = of_kind(lines, "hash_table")
    methods = list(dict.fromkeys(line["method"] for line in timed))
    rates: dict[tuple[Any, ...], dict[str, float]] = {}
    for line in timed:
        case = (line["operation"], line.get("absent_share"), line["capacity"], line["load_factor"])
        rates.setdefault(case, {})[line["method"]] = line["per_second"] / 1e6
    rows = [
        [
            operation if absent is None else f"{operation}, {100 * absent:.0f} % absent",
            f"{capacity:,}",
            f"{load:g}",
            *(f"{found[method]:.4g}" if method in found else "–" for method in methods),
        ]
        for (operation, absent, capacity, load), found in sorted(
            rates.items(), key=lambda item: (item[0][0], item[0][1] or 0.0, *item[0][2:])
        )
    ]
    parts = [
        "Printed by `benchmarks/hash_table.py`: millions of operations a second of the table in plain torch "
        "(reference) and, on a GPU, in Triton, beside `searchsorted` in the sorted keys, a gather at known places "
        "(direct addressing, which no lookup can beat) and a Python dict. "
        f"Device: {timed[0]['device']}{_threads(timed[0])}."
        if timed
        else "",
        table(["", "capacity", "load factor", *methods], rows) if rows else "",
    ]
    others = [line for line in lines if line["kind"] != "hash_table"]
    return [part for part in parts if part] + plain_tables(others)


def _threads(line: Line) -> str:
    """Threads of the host, for a measurement that depends on them: a GPU's lines do not have any."""
    return f", {line['threads']} threads" if "threads" in line else ""


def _mib(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _figure(results: Path, name: str) -> list[str]:
    return [f"![{name}](../benchmarks/results/{name}.png)"] if (results / f"{name}.png").exists() else []


def plain_tables(lines: Sequence[Line]) -> list[str]:
    """A table for each kind of line: what all lines share is said once, above; nested values are left to the file."""
    parts = []
    for kind in dict.fromkeys(_kind(line) for line in lines):
        rows = [_flat(line) for line in lines if _kind(line) == kind]
        names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("kind", "step")]
        same = [name for name in names if len(rows) > 1 and len({str(row.get(name)) for row in rows}) == 1]
        varied = [name for name in names if name not in same]
        shared = ", ".join(f"{_words(name)} {_cell(rows[0][name])}" for name in same)
        parts.append(f"{_words(kind).capitalize()}" + (f" ({shared}):" if shared else ":"))
        parts.append(
            table([_words(name) for name in varied], [[_cell(row.get(name)) for name in varied] for row in rows])
        )
    return parts


def _kind(line: Line) -> str:
    return line["kind"] if "kind" in line else line["step"]


def _flat(line: Line) -> Line:
    """Fields with one value, those of the machine among them."""
    fields = {**line, **line["machine"]} if isinstance(line.get("machine"), dict) else line
    return {name: value for name, value in fields.items() if not isinstance(value, dict | list)}


def _words(name: str) -> str:
    return name.replace("_", " ")


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
