"""Draws accuracy against time of all data sets, and what promises came to, in a few marks with their names beside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox
from tables import Line, against_full, certified_races, of_kind

LEAST, MOST = -4.0, 1.6  # points; what lost more stands at the lower edge, with its number
OURS, OTHERS, CURVE, DARK = "#c8321f", "#3b6fb6", "#9aa3ad", "#222222"
# Who is raced, and what is written beside it; of several of a kind, the fastest.
NAMES = {
    "pipeline": "HF pipeline",
    "onnxruntime-int8": "ONNX Runtime int8",
    "openvino-int8": "OpenVINO int8",
    "fastbert": "FastBERT",
    "table-first": "table, then OpenVINO int8",
    "shallow": "shallow model, {depth:.0f} layers",
    "lexical": "TF-IDF",
    "embeddings": "static embeddings",
}


def draw_races(figure: Figure, results: Path) -> None:
    """A panel for each data set: points of accuracy against the float32 full model, texts a second."""
    races = certified_races(results)
    rows = (len(races) + 1) // 2
    figure.set_size_inches(10, 3.5 * rows)
    panels = figure.subplots(rows, 2, squeeze=False, sharey=True).ravel()
    marks = []
    for axes, (data, lines, kept) in zip(panels, races, strict=False):
        marks.append((axes, _race(axes, data, lines, kept)))
    for axes in panels[len(races) :]:
        axes.remove()
    figure.supxlabel("texts a second, from raw text (log scale)", fontsize=10)
    figure.supylabel("accuracy against the float32 full model, points", fontsize=10)
    figure.draw_without_rendering()
    for axes, places in marks:
        _write_names(axes, places)


Mark = tuple[float, float, str, str]  # texts a second, points, name, colour


def _race(axes: Axes, data: str, lines: list[Line], kept: dict[str, Line]) -> list[Mark]:
    """Draw a panel; returns the marks whose names are still to be written."""
    runs = of_kind(lines, "throughput")
    marks: list[Mark] = []
    for engine, style in zip(sorted(kept), ("-", "--"), strict=False):
        rows = [run for run in runs if run["engine"] == engine and run["group"] in ("constant", "full")]
        rows.sort(key=lambda run: run["mean_exit_layer"])
        points = [(run["throughput"], against_full(run, lines, kept)) for run in rows]
        axes.plot(*np.array(points).reshape(-1, 2).T, style, marker=".", color=CURVE, linewidth=1.2, zorder=1)
        if points and engine == sorted(kept)[0]:
            marks.append((*points[len(points) // 3], "constant depth, same engine", "#6b747d"))
        (ours,) = of_kind(runs, "throughput", group="geep", engine=engine)
        place = (ours["throughput"], against_full(ours, lines, kept))
        axes.plot(*place, "s", color=OURS, markersize=8, zorder=3)
        marks.append((*place, f"GEEP {engine.split()[-1]}", OURS))
    for group, name in NAMES.items():
        some = [run for run in runs if run["group"].split(",")[0] == group]
        if not some:
            continue
        best = max(some, key=lambda run: float(run["throughput"]))
        points = against_full(best, lines, kept)
        if points is None:  # its accuracy was not taken on all texts
            continue
        place = (best["throughput"], max(points, LEAST + 0.2))
        is_below = points < place[1]
        axes.plot(*place, "v" if is_below else "o", color=OTHERS, zorder=2)
        told = f" ({points:+.1f})" if is_below else ""
        marks.append((*place, name.format(depth=best["mean_exit_layer"]) + told, DARK))
    accuracy = next(iter(kept.values()))["full_accuracy"]
    axes.set_title(f"{data}: full model {100 * accuracy:.1f} %", fontsize=10.5, loc="left")
    axes.axhline(0, color=CURVE, linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.margins(x=0.18)
    axes.set_ylim(LEAST, MOST)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(visible=True, alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return marks


def _write_names(axes: Axes, marks: Sequence[Mark]) -> None:
    """Beside each mark its name, where it covers neither a mark nor another name; ours first."""
    taken = [Bbox.from_bounds(*(axes.transData.transform(mark[:2]) - 5), 10, 10) for mark in marks]
    for line in axes.lines:
        if len(line.get_xdata()) > 2:  # a curve, in steps
            dots = axes.transData.transform(line.get_xydata())
            steps = np.arange(0, len(dots) - 0.99, 0.2)
            path = np.stack([np.interp(steps, np.arange(len(dots)), column) for column in dots.T], axis=1)
            taken += [Bbox.from_bounds(*(place - 2), 4, 4) for place in path]
    offsets = [(1, 0), (-1, 0), *((side, up) for up in (1, -1, 2, -2, 3, -3, 4, -4) for side in (0, 1, -1))]
    for x, y, name, colour in sorted(marks, key=lambda mark: mark[3] != OURS):
        tried = []
        for side, up in offsets:
            text = axes.annotate(
                name,
                (x, y),
                xytext=(8 * side, 11 * up),
                textcoords="offset points",
                ha=("center", "left", "right")[side],
                va="center",
                fontsize=8,
                color=colour,
                fontweight="bold" if colour == OURS else "normal",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
            )
            box, room = text.get_window_extent(), axes.bbox
            is_out = box.x0 < room.x0 or box.x1 > room.x1 + 8 or box.y0 < room.y0 or box.y1 > room.y1
            tried.append((is_out + sum(box.overlaps(other) for other in taken), abs(up), len(tried), text, box))
            if not tried[-1][0]:
                break
        *_, text, box = least = min(tried, key=lambda each: each[:3])
        for each in tried:
            if each is not least:
                each[3].remove()
        if least[1] > 1:
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 6, "shrinkB": 3}
            axes.annotate("", (x, y), text.xyann, textcoords="offset points", arrowprops=line)
        taken.append(box)


def draw_promises(figure: Figure, lines: list[Line]) -> None:
    """What was promised, and what certified speeds lost: the middle and nine tenths of all divisions."""
    figure.set_size_inches(8, 0.42 * len(lines) + 1.3)
    axes = figure.subplots()
    rows = sorted(lines, key=lambda line: (line["data"], line["allowed"], line["promise"]), reverse=True)
    for place, line in enumerate(rows):
        allowed = 100 * line["allowed"]
        axes.plot([allowed, allowed], [place - 0.32, place + 0.32], color=OURS, linewidth=3)
        if line["lost"] is not None:
            low, middle, high = line["lost"]
            axes.plot([low, high], [place, place], color=OTHERS, linewidth=5, alpha=0.45, solid_capstyle="butt")
            axes.plot(middle, place, "o", color=OTHERS)
        told = f"broken in {100 * line['broken']:.1f} % (allowed {100 * (1 - line['confidence']):.0f} %)"
        axes.text(1.02, place, told, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
    axes.set_yticks(range(len(rows)), [f"{line['data']}: {line['promise']}" for line in rows], fontsize=9)
    axes.axvline(0, color=CURVE, linewidth=0.8)
    axes.set_xlabel("lost against the full model, points of accuracy or of agreement; red: promised")
    axes.grid(visible=True, axis="x", alpha=0.3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
