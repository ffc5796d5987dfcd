"""Draws one window of texts as a staircase: a column for each text, a row for each layer."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from tables import Line, of_kind

SAVED, RAN, WENT_ON, TABLE, EDGE = "#eceff3", "#3b6fb6", "#f2a03d", "#57a773", "#16304f"
GAP = 1.2  # columns between two staircases


def draw_staircase(figure: Figure, lines: list[Line]) -> None:
    """Cells that ran, up to the predicted layer and beyond it; cells that were saved; texts of the table alone."""
    figure.set_size_inches(10, 3.8)
    axes = figure.subplots()
    (about,), texts = of_kind(lines, "window"), of_kind(lines, "text")
    depth, place, starts, last = about["layers"], 0.0, [], texts[0]["staircase"]
    starts.append((last, place))
    columns = []
    for text in texts:
        if text["staircase"] != last:
            last, place = text["staircase"], place + GAP
            starts.append((last, place))
        columns.append(place)
        place += 1
    for layer in range(1, depth + 1):
        for colour, wanted in (
            (SAVED, lambda text, layer=layer: text["exit"] < layer),
            (RAN, lambda text, layer=layer: layer <= min(text["predicted"], text["exit"])),
            (WENT_ON, lambda text, layer=layer: text["predicted"] < layer <= text["exit"]),
        ):
            some = [column for column, text in zip(columns, texts, strict=True) if wanted(text)]
            axes.bar(some, 0.86, width=0.86, bottom=layer - 0.93, align="edge", color=colour, linewidth=0)
    for column, text in zip(columns, texts, strict=True):
        if text["predicted"]:
            axes.plot([column - 0.07, column + 0.93], [text["predicted"]] * 2, color=EDGE, linewidth=2.2)
        else:
            axes.bar(column, 0.5, width=0.86, bottom=-0.6, align="edge", color=TABLE, linewidth=0)
    _frame(axes, depth, starts, place)
    figure.legend(
        handles=[
            Line2D([], [], color=EDGE, linewidth=2.2, label="predicted: asked here first"),
            Patch(color=RAN, label="layers run up to there"),
            Patch(color=WENT_ON, label="not certain enough: went on"),
            Patch(color=TABLE, label="answered by the table alone"),
            Patch(color=SAVED, label="layers saved"),
        ],
        loc="outside upper center",
        ncols=5,
        frameon=False,
        fontsize=9,
        handlelength=1.2,
        columnspacing=1.6,
    )


def _frame(axes: Axes, depth: int, starts: list[tuple[int | None, float]], end: float) -> None:
    """Names of layers and of staircases, and nothing else."""
    ends = [start - GAP for _, start in starts[1:]] + [end]
    for (number, start), stop in zip(starts, ends, strict=True):
        name = "table alone" if number is None else f"batch {number + 1}"
        axes.text((start + stop) / 2, -1.0, name, ha="center", va="top", fontsize=9, color="#444444")
    axes.set_yticks([0.5 + layer for layer in range(depth)], [f"{layer + 1}" for layer in range(depth)], fontsize=8)
    axes.set_ylabel("encoder layer", fontsize=9)
    axes.set_xticks([])
    axes.set_xlim(-0.8, end + 0.6)
    axes.set_ylim(-1.8, depth + 0.1)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
