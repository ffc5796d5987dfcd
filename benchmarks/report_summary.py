"""The table that people look at first: what is lost on whole test splits, and what is gained in one timed run."""

from __future__ import annotations

from pathlib import Path

from tables import Line, describe, let_go, of_kind, percent, read, table, times

HEADER = [
    "data set",
    "engine",
    "accuracy, full float32",
    "accuracy, GEEP",
    "agreement",
    "fewer layers",
    "over packed full, same dtype",
    "over best constant depth as accurate",
    "over HF pipeline",
    "strongest rival at full depth",
    "over it",
    "answered by the table alone",
]

WORDS = (
    "Accuracy, agreement with the float32 full model and layers: whole test split. Ratios of texts a second, from raw "
    "text: one interleaved run on {texts} test texts, everything at its best batch size. Strongest rival: the fastest "
    "of Hugging Face's pipeline, ONNX Runtime, OpenVINO and sentence-transformers at full depth that is at most a "
    "point less accurate than the pipeline on the timed texts. Measured on: {machine}. All rows and rivals: "
    "[docs/results.md](docs/results.md)."
)


def engine_summary(results: Path) -> str | None:
    """A line for each data set and engine that both scripts measured; None where there is none.

    Engines on a backend that was let go have none, nor those of which nothing is certified: they are in docs/results.md
    alone.
    """
    path = results / "accuracy.jsonl"
    rows, texts, machine = [], set(), ""
    for kept in sorted(read(path) if path.exists() else [], key=lambda line: str(line["data"])):
        if let_go(kept["engine"]) or kept.get("certified") is False:
            continue
        timed = results / f"throughput-{kept['data']}.jsonl"
        lines = read(timed) if timed.exists() else []
        runs = of_kind(lines, "throughput")
        ours = of_kind(runs, "throughput", group="geep", engine=kept["engine"])
        if not ours or ours[0]["over_pipeline"] is None:
            continue
        about = of_kind(lines, "about")[0]
        texts |= {run["texts"] for run in runs}
        machine = describe({**about["machine"], "dtype": "dtypes as named"})
        rows.append(_row(kept, ours[0], runs))
    if not rows:
        return None
    return f"{table(HEADER, rows)}\n\n{WORDS.format(texts=_range(texts), machine=machine)}"


def _row(kept: Line, ours: Line, runs: list[Line]) -> list[str]:
    full = of_kind(runs, "throughput", group="full", engine=kept["engine"])
    rival = strongest(runs)
    return [
        kept["data"],
        kept["engine"],
        percent(kept["full_accuracy"]),
        percent(kept["accuracy"]),
        percent(kept["agreement"]),
        times(kept["layer_speedup"]),
        times(ours["throughput"] / full[0]["throughput"] if full else None),
        best_constant(kept, ours, runs),
        times(ours["over_pipeline"]),
        "–" if rival is None else f"{rival['name']}, {percent(rival['accuracy'])} %",
        times(None if rival is None else ours["throughput"] / rival["throughput"]),
        f"{100 * kept['lexical_share']:.0f} %",
    ]


# Others at full depth: what somebody would run instead. Ours, and what rests on our exits, are compared apart.
_OURS = ("geep", "full", "constant", "cascade", "static")


def strongest(runs: list[Line]) -> Line | None:
    """The fastest rival that is at most a point less accurate than Hugging Face's pipeline; None where none is."""
    pipeline = of_kind(runs, "throughput", group="pipeline")
    if not pipeline or pipeline[0]["accuracy"] is None:
        return None
    least = pipeline[0]["accuracy"] - 0.01
    rivals = [run for run in runs if run["group"] not in _OURS and (run["accuracy"] or 0.0) >= least]
    return max(rivals, key=lambda run: float(run["throughput"]), default=None)


def best_constant(kept: Line, ours: Line, runs: list[Line]) -> str:
    """Our throughput over that of the fastest constant depth of the same engine with at least our accuracy."""
    constants = of_kind(runs, "throughput", engine=kept["engine"])
    rivals = [
        (run["throughput"], int(run["mean_exit_layer"]))
        for run in constants
        if run["group"] in ("constant", "full")
        and kept["constant_accuracy"].get(str(int(run["mean_exit_layer"])), 0.0) >= kept["accuracy"]
    ]
    if not rivals:
        return "none as good"
    rate, depth = max(rivals)
    return f"{ours['throughput'] / rate:.2f}x ({depth} layers)"


def _range(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
