"""Draw benchmarks/results/*.jsonl as PNG files beside them; measures nothing, draws what is there.

python benchmarks/plot.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from matplotlib.figure import Figure
from plot_races import draw_promises, draw_races
from plot_staircase import draw_staircase
from tables import Line, certified_races, read, system_of

RESULTS = Path(__file__).resolve().parent / "results"

Measured = TypeVar("Measured")


def main() -> None:
    """Draw every figure that there are results for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    for path in draw_all(args.results):
        print(f"wrote {path.name}")


def draw_all(results: Path) -> list[Path]:
    """Draw the figures of a folder of results; returns the files written."""
    written = []
    for path in sorted(results.glob("throughput-*.jsonl")):
        lines = read(path)
        for kind, draw in (("throughput", draw_throughput), ("budget", draw_budgets), ("utilisation", draw_use)):
            of_kind = [line for line in lines if line["kind"] == kind]
            if of_kind:
                name = path.stem if kind == "throughput" else f"{kind}-{path.stem.removeprefix('throughput-')}"
                written.append(_save(results / f"{name}.png", draw, of_kind))
    if certified_races(results):
        written.append(_save(results / "races.png", draw_races, results))
    for name, draw_lines in (("scaling", draw_scaling), ("staircase", draw_staircase), ("guarantee", draw_promises)):
        if (results / f"{name}.jsonl").exists():
            written.append(_save(results / f"{name}.png", draw_lines, read(results / f"{name}.jsonl")))
    return written


def _save(path: Path, draw: Callable[[Figure, Measured], None], measured: Measured) -> Path:
    figure = Figure(figsize=(8, 5), layout="constrained")
    draw(figure, measured)
    # Without the date in it, the same results give the same file.
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def draw_throughput(figure: Figure, lines: list[Line]) -> None:
    """Accuracy against texts a second: up and to the right is better. What has no comparable accuracy is left out."""
    axes = figure.subplots()
    known = [line for line in lines if line["accuracy"] is not None]
    for engine in sorted({line["engine"] for line in known if line["group"] == "constant"}):
        rows = [line for line in known if line["engine"] == engine and line["group"] in ("constant", "full")]
        rows.sort(key=lambda line: line["mean_exit_layer"])
        axes.plot(_rates(rows), _percents(rows), "o-", color="tab:gray", alpha=0.6, label=f"{engine}: constant depth")
    kinds = (("geep", "s", "tab:red"), ("cascade", "d", "tab:purple"))
    for group, marker, colour in kinds:
        rows = [line for line in known if line["group"] == group]
        axes.plot(_rates(rows), _percents(rows), marker, color=colour)
    others = [line for line in known if line["group"] not in ("constant", "full", "geep", "cascade")]
    axes.plot(_rates(others), _percents(others), "^", color="tab:blue")
    for line in known:
        if line["group"] not in ("constant", "full"):
            place = (line["throughput"], 100 * line["accuracy"])
            axes.annotate(line["name"], place, xytext=(4, 3), textcoords="offset points", fontsize=6)
    axes.set_xscale("log")
    axes.set_xlabel("texts per second")
    axes.set_ylabel("accuracy of the timed texts, %")
    axes.set_title(f"{lines[0]['data']}: raw text to label")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def _rates(lines: list[Line]) -> list[float]:
    return [line["throughput"] for line in lines]


def _percents(lines: list[Line]) -> list[float]:
    return [100 * line["accuracy"] for line in lines]


def draw_budgets(figure: Figure, lines: list[Line]) -> None:
    """Lines: share of the layers saved that became time, against the number of texts in a call."""
    axes = figure.subplots()
    for name in sorted({system_of(line) for line in lines}, reverse=True):
        style = "D-" if name.startswith("FastBERT") else "s-"
        rows = sorted((line for line in lines if system_of(line) == name), key=lambda line: line["texts_per_call"])
        if rows and all(row["kept"] is not None for row in rows):
            label = f"{name} ({rows[0]['layer_speedup']:.2f}x fewer layers)"
            axes.plot([row["texts_per_call"] for row in rows], [row["kept"] for row in rows], style, label=label)
    axes.axhline(1, color="tab:gray", linewidth=0.8)
    axes.set_xscale("log", base=2)
    sizes = sorted({line["texts_per_call"] for line in lines})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("texts a call")
    axes.set_ylabel("measured speed-up / layer speed-up")
    axes.set_title(f"{lines[0]['data']}: layers saved that became time, each against its own full depth")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def draw_use(figure: Figure, lines: list[Line]) -> None:
    """Bars: operations a second of the full model over the machine's peak."""
    rows = [line for line in lines if line["utilisation"] is not None]
    axes = figure.subplots()
    names = [f"{row['engine']}\n{row['tokens'][0]}-{row['tokens'][1]} tokens" for row in rows]
    bars = axes.bar(names, [100 * row["utilisation"] for row in rows], color="tab:blue")
    axes.bar_label(bars, fmt="%.0f %%")
    axes.set_ylabel("% of the measured peak in matrix products")
    axes.set_title(f"{lines[0]['data']}: full model, packed")


def draw_scaling(figure: Figure, lines: list[Line]) -> None:
    """Four panels: memory against texts, throughput against length, layers and labels."""
    figure.set_size_inches(10, 7)
    panels = figure.subplots(2, 2).ravel()
    for axes, axis in zip(panels, ("texts", "length", "layers", "labels"), strict=True):
        rows = sorted((line for line in lines if line["axis"] == axis), key=lambda line: line["value"])
        for every_exit, name in ((False, "full model"), (True, "every exit asked")):
            some = [row for row in rows if bool(row.get("every_exit")) == every_exit]
            if not some:
                continue
            measured = "peak_mib" if axis == "texts" else "throughput"
            label = None if axis == "texts" else name
            axes.plot([row["value"] for row in some], [row[measured] for row in some], "o-", label=label)
        axes.set_xlabel({"texts": "texts in the file", "length": "tokens a text"}.get(axis, axis))
        axes.set_ylabel("peak memory, MiB" if axis == "texts" else "texts per second")
        axes.set_ylim(bottom=0)
        if axis in ("texts", "length"):
            axes.set_xscale("log")
        if axis == "labels" and axes.get_legend_handles_labels()[0]:
            axes.legend()
        axes.grid(visible=True, alpha=0.3)


if __name__ == "__main__":
    main()
