"""The table that people look at first: what is lost on whole test splits, and what is gained in one timed run."""

from __future__ import annotations

from pathlib import Path

from rivals.lines import FLOAT32_GROUPS
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
    "point less accurate than the float32 model. Measured on: {machine}. All rows and rivals: "
    "[docs/results.md](docs/results.md)."
)


BESIDE_HEADER = [
    "data set",
    "engine",
    "GEEP",
    "shallow model",
    "table, then all layers",
    "table, then OpenVINO int8",
    "FastBERT",
    "TF-IDF",
]

BESIDE_WORDS = (
    "Beside other ways to be cheap, in the same run: accuracy on the test texts of the race, and GEEP's speed over "
    "theirs. *Shallow model*: the encoder's first layers, as many as GEEP runs on average, rounded up, fine-tuned at "
    "that depth, on the same engine. *Table, then …*: what geep's table is certain of it answers, for all others all "
    "layers run; certified for the same promise. *FastBERT*: its shrinking batch, texts sorted by length, at GEEP's "
    "speed. *TF-IDF*: with logistic regression, chosen by cross-validation, taught all rows that the model was made of."
)


def engine_summary(results: Path) -> str | None:
    """A line for each data set and engine that both scripts measured; None where there is none.

    Engines on a backend that was let go have none, nor those of which nothing is certified: they are in docs/results.md
    alone.
    """
    path = results / "accuracy.jsonl"
    rows, beside, texts, machine = [], [], set(), ""
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
        # In older runs the table before the full model kept no promise of its own, and the others were not there.
        if of_kind(runs, "throughput", group="lexical"):
            beside.append(_beside(kept, ours[0], runs))
    if not rows:
        return None
    parts = [table(HEADER, rows), WORDS.format(texts=_range(texts), machine=machine)]
    if beside:
        parts += [BESIDE_WORDS, table(BESIDE_HEADER, beside)]
    return "\n\n".join(parts)


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
        "–" if rival is None else _named(rival),
        times(None if rival is None else ours["throughput"] / rival["throughput"]),
        f"{100 * kept['lexical_share']:.0f} %",
    ]


def _named(rival: Line) -> str:
    """A rival with its accuracy, and how often it answers as the float32 model does, where all texts tell."""
    agrees = rival.get("agreement_of_all")
    told = f"{rival['name']}, {percent(accuracy_of(rival))} %"
    return told if agrees is None else f"{told}, agreement {percent(agrees)}"


def accuracy_of(run: Line) -> float | None:
    """Of all test texts of the race where it is known, else of those that were timed."""
    of_all: float | None = run.get("accuracy_of_all")
    return run["accuracy"] if of_all is None else of_all


def _beside(kept: Line, ours: Line, runs: list[Line]) -> list[str]:
    dtype = kept["engine"].split()[-1]

    def cell(group: str, **fields: object) -> str:
        found = [
            run
            for run in of_kind(runs, "throughput", group=group)
            if all(str(run[name]).endswith(str(value)) for name, value in fields.items())
        ]
        best = max(found, key=lambda run: float(run["throughput"]), default=None)
        if best is None:
            return "–"
        return f"{percent(accuracy_of(best))} %, {times(ours['throughput'] / best['throughput'])}"

    shallow = next((run for run in of_kind(runs, "throughput", group="shallow") if run["name"].endswith(dtype)), None)
    return [
        kept["data"],
        kept["engine"],
        f"{percent(accuracy_of(ours))} %",
        "–" if shallow is None else f"{shallow['mean_exit_layer']:.0f} layers: {cell('shallow', name=dtype)}",
        cell("cascade", engine=kept["engine"]),
        cell("table-first"),
        cell("fastbert"),
        cell("lexical"),
    ]


# Others at full depth: what somebody would run instead. What does not run all layers of the full model, and what rests
# on our engine or table, is compared apart.
_OURS = ("geep", "full", "constant", "cascade", "static", "table-first", "shallow", "lexical", "fastbert")


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
