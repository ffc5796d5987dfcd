"""Sections about machines and sizes: a GPU, other encoders, growth, the hash table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tables import Line, Section, describe, figure, of_kind, read, share, span, table, times

NO_GPU = "Not yet measured on a GPU; `make bench-gpu` measures and writes this section."


def machine_sections(results: Path) -> Iterator[Section]:
    """All sections that there are results for; the GPU's always, since its absence is a fact to be told."""
    gpu = [line for path in sorted(results.glob("gpu-*.jsonl")) for line in read(path)]
    yield _gpu(gpu) if of_kind(gpu, "staircase") else Section("And on a GPU?", (), NO_GPU, "From `benchmarks/gpu.py`.")
    if families := read(results / "families.jsonl"):
        yield _families(families)
    scaling = read(results / "scaling.jsonl")
    if of_kind(scaling, "scaling", axis="texts"):
        yield _growth(results, scaling, read(results / "table_scale.jsonl"))
    if paths := sorted(results.glob("hash_table-*.jsonl")):
        yield _hash_table([read(path) for path in paths])


def _gpu(lines: list[Line]) -> Section:
    found = of_kind(lines, "staircase", graphs=True)
    sizes = sorted({line["texts"] for line in found})
    ways = list(dict.fromkeys((line["head"], line["on_miss"]) for line in found))
    at = {(line["texts"], line["head"], line["on_miss"]): line for line in found}

    def cell(line: Line | None) -> str:
        return "–" if line is None else f"{times(line['speedup'])} of {times(line['layer_speedup'])}"

    rows = [
        [
            f"{size:,}",
            f"{max(size / at[size, *way]['full_seconds'] for way in ways if (size, *way) in at):,.0f}",
            *(cell(at.get((size, *way))) for way in ways),
        ]
        for size in sizes
    ]
    stop = [line for line in found if line["on_miss"] == "stop"]
    slower = [line["texts"] for line in stop if line["speedup"] < 1]
    large = [line for line in found if line["texts"] == sizes[-1]]
    pipeline = max((line["texts_per_second"] for line in of_kind(lines, "pipeline")), default=None)
    raw, tokens = (
        next((line["texts_per_second"] for line in of_kind(lines, "texts", run=name)), None)
        for name in ("raw_texts", "tokenizer")
    )
    told = f" From raw texts {raw:,.0f} a second" if raw else ""
    if raw and tokens:
        told += f", {100 * raw / tokens:.0f} % of the time being the tokenizer's"
    if raw and pipeline:
        told += f"; Hugging Face's pipeline at full depth: {pipeline:,.0f}"
    small = ""
    if slower:
        small = (
            f"Slower than full depth in {len(slower)} of {len(stop)} cases, in calls of up to {max(slower):,} texts. "
        )
    return Section(
        "And on a GPU?",
        (
            f"{found[0]['device']}, {found[0]['encoder']} (random weights), {found[0]['dtype']}, token ids of texts "
            "of some 25 tokens: speed-up over full depth, of the layers saved, by head of the exits and what follows "
            "a miss.",
            table(["texts a call", "full depth, texts/s", *(f"{head}, {miss}" for head, miss in ways)], rows),
        ),
        f"{small}At {sizes[-1]:,} texts "
        f"{span((line['realised'] for line in large), share)} of the layers saved "
        f"becomes time.{told}{'.' if told else ''}",
        "From `benchmarks/gpu.py`. All rows: [on a GPU](results/gpu.md).",
    )


def _families(lines: list[Line]) -> Section:
    def per_layer(line: Line, backend: str) -> str:
        return f"{1e6 * line[f'{backend}_seconds'] / line['layers'] / line['tokens']:.1f}"

    rows = [
        [
            f"{line['model']}, {line['dtype']}",
            *(per_layer(line, backend) for backend in ("packed", "padded", "pipeline")),
            times(line["gain"]),
            times(line["pipeline_seconds"] / line["packed_seconds"]),
            f"{line['apart']:.1g}",
        ]
        for line in sorted(lines, key=lambda line: [line["dtype"] != "float32", -line["gain"]])
    ]
    header = ["", "packed, ms", "padded, ms", "pipeline, ms", "packed over padded", "over pipeline", "logits apart"]
    machine = lines[0]["machine"]
    return Section(
        "What do other encoders gain without padding?",
        (
            "Encoders of these shapes with random weights at full depth, milliseconds of one layer for 1,000 tokens, "
            f"{lines[0]['texts']:,} texts of 8 to 256 tokens. Packed and padded get them sorted by length; the "
            f"pipeline is Hugging Face's own forward on batches of 32 as texts come. Machine: {machine['device']}, "
            f"{machine['threads']} threads, torch {machine['torch']}.",
            table(header, rows),
        ),
        f"Packed layers are {span((line['gain'] for line in lines), times)} as fast as padded ones and "
        f"{span((line['pipeline_seconds'] / line['packed_seconds'] for line in lines), times)} as the pipeline.",
        "From `benchmarks/families.py`. All columns: [encoders](results/encoders.md).",
    )


def _growth(results: Path, lines: list[Line], learned: list[Line]) -> Section:
    rows = sorted(of_kind(lines, "scaling", axis="texts"), key=lambda row: row["value"])
    cells = [
        [
            f"{row['value']:,}",
            f"{row['throughput']:,.0f}",
            f"{row['mean_exit_layer']:.2f}",
            f"{row['loaded_mib']:.0f}",
            f"{row['peak_mib']:.0f}",
        ]
        for row in rows
    ]
    first, last = rows[0], rows[-1]
    table_of = ""
    for line in learned:
        steps = line["steps"].values()
        seconds = sum(step.get("cpu_seconds", 0.0) for step in steps)
        peak = max(step["peak_mib"] for step in steps)
        table_of += (
            f" A table of {line['texts']:,} texts is learned in {seconds:.0f} processor seconds and {peak:,.0f} MiB."
        )
    return Section(
        "How does it grow?",
        (
            "A file scored into another by a calibrated model, each row in a fresh process. Machine: "
            f"{describe(rows[0]['machine'])}.",
            table(["texts", "texts/s", "mean layer", "memory after loading, MiB", "peak memory, MiB"], cells),
            *figure(results, "scaling", "time and memory by texts, length, layers and labels"),
        ),
        f"{last['value'] / first['value']:,.0f} times the texts take {last['peak_mib'] / first['peak_mib']:.2f} times "
        f"the memory, at {last['throughput'] / first['throughput']:.2f} times the speed.{table_of}",
        "From `benchmarks/scaling.py` and `benchmarks/table_scale.py`. All rows: [growth](results/growth.md).",
    )


def _hash_table(files: list[list[Line]]) -> Section:
    rows, told = [], []
    for lines in files:
        finds: dict[tuple[int, float, float], dict[str, float]] = {}
        for line in of_kind(lines, "hash_table", operation="find"):
            case = (line["capacity"], -line["load_factor"], line["absent_share"])
            finds.setdefault(case, {})[line["method"]] = line["per_second"] / 1e6
        if not finds:
            continue
        # The largest table, at its emptiest.
        capacity, load, absent = max(finds)
        device, found = of_kind(lines, "hash_table")[0]["device"], finds[capacity, load, absent]
        names = ("reference", "triton", "searchsorted", "dict", "gather")
        rates = [_rate(found[name]) if name in found else "–" for name in names]
        rows.append([device, f"{capacity:,}", f"{-load:g}", f"{100 * absent:.0f} %", *rates])
        ratios = [
            each.get("triton", each.get("reference", 0.0)) / each["searchsorted"]
            for each in finds.values()
            if "searchsorted" in each
        ]
        told.append(f"{span(ratios, times)} ({device})")
    predicted = [line for lines in files for line in of_kind(lines, "predict")]
    most = max(predicted, key=lambda line: int(line["num_texts"]), default=None)
    predicts = (
        f" Exit layers are predicted of {most['per_second']:,.0f} texts a second ({most['device']})." if most else ""
    )
    header = ["device", "capacity", "load factor", "absent", "ours, plain torch", "ours, Triton"]
    return Section(
        "Is the hash table fast enough?",
        (
            "Millions of look-ups a second in the largest table measured, at its emptiest; a gather at known places is "
            "what no look-up can beat.",
            table([*header, "searchsorted", "dict", "gather"], rows),
        ),
        f"Over all sizes, loads and absent shares our table finds {', '.join(told) or '–'} as many keys a second as "
        f"searchsorted.{predicts}",
        "From `benchmarks/hash_table.py`. All operations, sizes and loads: [hash table](results/hash-table.md).",
    )


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def hash_table_rows(lines: list[Line]) -> str:
    """Millions of operations a second: a row for each table and operation, a column for each method."""
    methods = list(dict.fromkeys(line["method"] for line in lines))
    rates: dict[tuple[Any, ...], dict[str, float]] = {}
    for line in lines:
        case = (line["operation"], line.get("absent_share"), line["capacity"], line["load_factor"])
        rates.setdefault(case, {})[line["method"]] = line["per_second"] / 1e6
    rows = [
        [
            operation if absent is None else f"{operation}, {100 * absent:.0f} % absent",
            f"{capacity:,}",
            f"{load:g}",
            *(_rate(found[method]) if method in found else "–" for method in methods),
        ]
        for (operation, absent, capacity, load), found in sorted(
            rates.items(), key=lambda item: (item[0][0], item[0][1] or 0.0, *item[0][2:])
        )
    ]
    return table(["", "capacity", "load factor", *methods], rows)
