"""Turn benchmarks/results/*.jsonl into docs/results.md and the table of README.md; measures nothing.

python benchmarks/report.py            # write
python benchmarks/report.py --check    # say whether the documents are what the results give; exit 1 if not
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from report_more import more_parts
from report_summary import engine_summary
from tables import Line, describe, let_go, of_kind, percent, read, table, times

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- results: written by `make bench` -->", "<!-- end of results -->"


def main() -> None:
    """Write the documents, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    head, rest = before.split(START)
    tail = rest.split(END)[1]
    documents = {
        ROOT / "docs" / "results.md": results_page(),
        readme: f"{head}{START}\n\n{summary_table()}\n\n{END}{tail}",
    }
    stale = [path for path, text in documents.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if args.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what the results give; run `make bench`.")
        sys.exit(1 if stale else 0)
    for path, text in documents.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


def studies() -> dict[str, list[Line]]:
    """Lines of every study, by data set."""
    return {path.stem.removeprefix("study-"): read(path) for path in sorted(RESULTS.glob("study-*.jsonl"))}


def summary_table() -> str:
    """What is lost and gained, by engine; from the studies alone where engines were not measured side by side."""
    return engine_summary(RESULTS) or study_summary()


def study_summary() -> str:
    """One line a data set: what the calibrated engine gains, and int8 beside it where that was measured."""
    rows = []
    machine = ""
    int8 = {name: int8_ratios(name) for name in studies()}
    has_int8 = any(ratio is not None for ratios in int8.values() for ratio in ratios)
    for name, lines in studies().items():
        runs = of_kind(lines, "run")
        # Lines from before it was noted are of engines calibrated to go on.
        ours = next(run for run in runs if run.get("deployed", run.get("group") == "geep-continue"))
        full = of_kind(runs, "run", group="full")[0]
        pipeline = max(of_kind(runs, "run", group="pipeline"), key=lambda run: run["throughput"])
        promise = of_kind(lines, "calibration")[0]["promise"]["max_accuracy_drop"]
        machine = describe(ours["machine"])
        rows.append(
            [
                name,
                f"{100 * promise:g}" if ours["calibrated_speed"] else "none",
                percent(full["accuracy"]),
                percent(ours["accuracy"]),
                times(ours["layer_speedup"]),
                f"{ours['ratio']:.2f}x",
                f"{ours['throughput'] / pipeline['throughput']:.2f}x",
                best_constant(runs, ours),
                f"{100 * ours['lexical_share']:.0f} %",
                *([times(ratio) for ratio in int8[name]] if has_int8 else []),
            ]
        )
    header = [
        "data set",
        "promised drop, points",
        "accuracy, full",
        "accuracy, GEEP",
        "fewer layers",
        "faster than packed full",
        "faster than HF pipeline",
        "against constant depth at least as good",
        "answered by the table alone",
        *(["GEEP int8 over HF pipeline", "ONNX Runtime int8 over HF pipeline"] if has_int8 else []),
    ]
    return f"{table(header, rows)}\n\nMeasured on: {machine}. All rows and rivals: [docs/results.md](docs/results.md)."


def int8_ratios(data: str) -> tuple[float | None, float | None]:
    """Throughput over the HF pipeline's: of our fastest calibrated int8 engine, of ONNX Runtime int8 at full depth."""
    path = RESULTS / f"throughput-{data}.jsonl"
    runs = of_kind(read(path), "throughput") if path.exists() else []
    ours = [run for run in runs if run["group"] == "geep" and "int8" in run["engine"] and not let_go(run["engine"])]
    theirs = [run for run in runs if run["group"] == "onnxruntime-int8"]

    def best(some: list[Line]) -> float | None:
        return max((run["over_pipeline"] for run in some if run["over_pipeline"] is not None), default=None)

    return best(ours), best(theirs)


def best_constant(runs: list[Line], ours: Line) -> str:
    """Our throughput over that of the fastest constant depth which is at least as accurate."""
    equals = [run for run in runs if run["group"] in ("constant", "full") and run["accuracy"] >= ours["accuracy"]]
    if not equals:
        return "none as good"
    rival = max(equals, key=lambda run: run["throughput"])
    depth = rival["setting"] if rival["group"] == "constant" else "all layers"
    return f"{ours['throughput'] / rival['throughput']:.2f}x ({depth})"


STUDY_WORDS = (
    "All rivals and sweeps in float32, one study a data set. They were taken before the learned criterion, the exact "
    "bound on accuracy drops and the fused CPU layers, so the summary above is the newer one."
)


def results_page() -> str:
    """The whole of docs/results.md."""
    parts = [
        "# Results",
        "Written by `make bench` from `benchmarks/results/*.jsonl`; every number was printed by the commands named at "
        "the top of the scripts in `benchmarks/`. Absolute speeds mean nothing without the machine named "
        "beside them; ratios were taken in one interleaved run.",
        "## Summary",
        summary_table(),
    ]
    if engine_summary(RESULTS) is not None and studies():
        parts += ["## Studies", STUDY_WORDS, study_summary()]
    for name, lines in studies().items():
        parts += study_part(name, lines)
    recipes = RESULTS / "recipes.jsonl"
    if recipes.exists():
        parts += ["## Recipes and heads", recipes_part(read(recipes))]
    parts += more_parts(RESULTS)
    return "\n\n".join(parts) + "\n"


def study_part(name: str, lines: list[Line]) -> list[str]:
    """Everything measured on one data set."""
    training, calibration = of_kind(lines, "training")[0], of_kind(lines, "calibration")[0]
    profile, runs = of_kind(lines, "profile")[0], of_kind(lines, "run")
    first = runs[0]
    rows = [
        [
            run["name"],
            percent(run["accuracy"]),
            percent(run["agreement"]),
            f"{run['mean_exit_layer']:.2f}",
            times(run["layer_speedup"]),
            f"{run['throughput']:.1f}",
            f"{run['throughput_low']:.1f} – {run['throughput_high']:.1f}",
            f"{run['ratio']:.2f}",
            "–" if run["timed_layer_speedup"] is None else f"{run['ratio'] / run['timed_layer_speedup']:.2f}",
        ]
        for run in runs
    ]
    header = [
        "",
        "accuracy, %",
        "agreement, %",
        "mean layer",
        "layer speed-up",
        "texts/s",
        "slowest – fastest round",
        "x packed full",
        "time kept of layers saved",
    ]
    promise = calibration["promise"]
    trials = calibration["trials"]
    predictors = [
        [
            row["predictor"],
            f"{row['speed']:g}",
            f"{row['rank_correlation']:.2f}",
            f"{row['mean_absolute_error']:.2f}",
            percent(row["early_share"]),
        ]
        for row in of_kind(lines, "predictor")
    ]
    held = [
        [row["kind"], f"{row['speed']:g}", f"{row['rank_correlation']:.2f}", f"{row['mean_absolute_error']:.2f}"]
        for row in profile["quality"]
    ]
    optimism = [
        [f"{row['speed']:g}", f"{row['training_texts']:.2f}", f"{row['heldout_texts']:.2f}"]
        for row in profile["mean_exit_layers"]
    ]
    return [
        f"## {name}",
        f"Encoder of {first['encoder_layers']} layers, {training['rows']:,} training rows, "
        f"{training['settings']['epochs']:g} epochs, recipe `{training['settings']['recipe']}`. "
        f"Quality on all {first['num_texts']:,} test texts; time on {first['num_timed']:,} of them, median of "
        f"{first['rounds']} rounds. Machine: {describe(first['machine'])}.",
        f"Promise: at most {100 * promise['max_accuracy_drop']:g} points of accuracy lost, "
        f"{100 * promise['confidence']:g} % sure, certified on {calibration['num_texts']:,} texts: speed "
        f"{calibration['speed']:g} of {len(trials)} tried, criterion {calibration['criterion']}, quantile "
        f"{calibration['quantile']:g}, lexical exit {'on' if calibration['lexical_exit'] else 'off'}.",
        table(header, rows),
        f"![accuracy against time]({'../benchmarks/results/study-' + name + '.png'})",
        "Exit layers predicted on the test texts, at the calibrated speed:",
        table(["predictor", "speed", "rank correlation", "mean error, layers", "too early, %"], predictors),
        "Predictors on the held-out texts that the levels were fitted on:",
        table(["predictor", "speed", "rank correlation", "mean error, layers"], held),
        "Mean exit layer of training and of held-out texts (exits are over-confident on what they were trained on):",
        table(["speed", "training texts", "held-out texts"], optimism),
    ]


def recipes_part(lines: list[Line]) -> str:
    """Accuracy at every exit, a table for each data set."""
    parts = []
    for data in dict.fromkeys(line["data"] for line in lines):
        of_data = [line for line in lines if line["data"] == data]
        depths = max((line["depths"] for line in of_data), key=len)
        rows = [
            [
                f"{line['settings']['recipe']}, {line['head']} head"
                + ("" if line["settings"]["standardise"] else ", heads not standardised"),
                *(percent(dict(zip(line["depths"], line["accuracy"], strict=True)).get(depth)) for depth in depths),
                f"{line['steps']:,}",
                f"{line['seconds']:.0f}",
            ]
            for line in of_data
        ]
        first = of_data[0]
        header = ["recipe and head", *(f"layer {depth}" for depth in depths), "steps", "seconds"]
        parts.append(
            f"{data}, encoder {first['encoder']}, {first['rows']:,} training rows, {first['settings']['epochs']:g} "
            f"epochs, accuracy in % on {first['dev_rows']:,} held-out rows, one seed:\n\n{table(header, rows)}"
        )
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
