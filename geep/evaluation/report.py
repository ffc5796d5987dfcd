"""What an evaluation found: its rows, its summary, its figure. Engines are not known here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from geep.calibration import PredictorQuality


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """One way of running the model.

    Attributes:
        name: What it is.
        group: "pipeline", "pipeline-sorted", "pipeline-bfloat16", "full", "lexical", "constant", "fastbert", "random",
            "geep-stop", "geep-continue" or "oracle".
        dtype: What it ran in; its accuracy, agreement and times are all of this dtype.
        deployed: Whether it is the engine as it was given: calibrated speed, rule, quantile, exits and lexical exit.
        setting: What was set: batch size, depth or speed.
        accuracy: Share of texts with the right label, on all texts; None without labels.
        agreement: Share of texts answered as the full model answers them (in float32 where the engine rounds it), on
            all texts.
        mean_exit_layer: Encoder layers run for a text, on all texts.
        layer_speedup: Layers of the full model over layers run, texts counted alike, on all texts; None: none run.
        timed_layer_speedup: The same on the timed texts, each text counted by its tokens: what time can follow.
        throughput: Texts a second, median of the rounds, from raw text.
        throughput_low: Slowest round.
        throughput_high: Fastest round.
        ratio: Throughput over that of the packed full model.
        lexical_share: Share of texts answered without the encoder, on all texts.
        verified: Share of the timed texts to which the timed run gave the most likely label that its quality was taken
            from; below 1 by rounding.
    """

    name: str
    group: str
    dtype: str
    deployed: bool
    setting: str
    accuracy: float | None
    agreement: float
    mean_exit_layer: float
    layer_speedup: float | None
    timed_layer_speedup: float | None
    throughput: float
    throughput_low: float
    throughput_high: float
    ratio: float
    lexical_share: float
    verified: float


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """All rows of one evaluation, and how well exit layers were predicted.

    Attributes:
        rows: The rivals, in a fixed order.
        quality: Of the deployed predictor, of a constant and of text length, at the evaluated speed.
        num_texts: Texts on which quality was taken.
        num_timed: Texts on which time was taken.
        rounds: Rounds of timing.
        speed: The engine's speed.
        machine: What it ran on.
    """

    rows: tuple[EvaluationRow, ...]
    quality: tuple[PredictorQuality, ...]
    num_texts: int
    num_timed: int
    rounds: int
    speed: float
    machine: dict[str, Any]

    def row(self, group: str) -> EvaluationRow:
        """Return the first row of a group.

        Raises:
            KeyError: If there is none.
        """
        for row in self.rows:
            if row.group == group:
                return row
        raise KeyError(f"No row of group {group!r}; there are {sorted({row.group for row in self.rows})}.")

    @property
    def ours(self) -> EvaluationRow:
        """The engine as it was given."""
        return next(row for row in self.rows if row.deployed)

    def save(self, path: str | Path, **about: Any) -> None:
        """Write one JSON line a row and one a predictor; `about` (model, data set, …) goes into every line."""
        shared = {
            **about,
            "num_texts": self.num_texts,
            "num_timed": self.num_timed,
            "rounds": self.rounds,
            "machine": self.machine,
        }
        lines = [{"kind": "run", **shared, **asdict(row)} for row in self.rows]
        for row in self.quality:
            fields = asdict(row)
            lines.append({"kind": "predictor", **shared, "predictor": fields.pop("kind"), **fields})
        Path(path).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Headline:
    """What the engine gains, against each rival that matters.

    Attributes:
        accuracy_drop: Of the engine against the full model, unquantised, in accuracy; None without labels.
        layer_speedup: Layers of the full model over layers run.
        over_full: Throughput over the packed full model's.
        over_pipeline: Throughput over the HF pipeline's, arrival order, at its best batch size.
        over_constant: Throughput over the fastest constant depth that is at least as good; None if none is known.
        constant_depth: That depth.
        time_share: Share of the (token-weighted) layer speed-up that became time.
    """

    accuracy_drop: float | None
    layer_speedup: float | None
    over_full: float
    over_pipeline: float
    over_constant: float | None
    constant_depth: str | None
    time_share: float | None


def headline(report: EvaluationReport) -> Headline:
    """Sum a report up. A constant depth is "at least as good" by accuracy, or by agreement where labels are missing."""
    ours, full, reference = report.ours, report.row("full"), report.row("pipeline")

    def quality(row: EvaluationRow) -> float:
        return row.agreement if row.accuracy is None else row.accuracy

    equals = [row for row in report.rows if row.group in ("constant", "full") and quality(row) >= quality(ours)]
    rival = max(equals, key=lambda row: row.throughput, default=None)
    best_pipeline = max(
        (row for row in report.rows if row.group == "pipeline"), key=lambda row: row.throughput, default=full
    )
    return Headline(
        accuracy_drop=None
        if ours.accuracy is None or reference.accuracy is None
        else reference.accuracy - ours.accuracy,
        layer_speedup=ours.layer_speedup,
        over_full=ours.throughput / full.throughput,
        over_pipeline=ours.throughput / best_pipeline.throughput,
        over_constant=None if rival is None else ours.throughput / rival.throughput,
        constant_depth=None if rival is None else rival.name,
        time_share=None if ours.timed_layer_speedup is None else ours.ratio / ours.timed_layer_speedup,
    )


def draw(report: EvaluationReport, path: str | Path, *, title: str) -> None:
    """Draw accuracy (agreement, without labels) against throughput as a PNG."""
    # Only who draws loads the drawing library: reports are read and written without it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    by_accuracy = all(row.accuracy is not None for row in report.rows)

    def point(row: EvaluationRow) -> tuple[float, float]:
        return row.throughput, 100 * (row.accuracy if by_accuracy and row.accuracy is not None else row.agreement)

    curves = (
        ("constant depth", [*(r for r in report.rows if r.group in ("constant", "full"))], "o-", "tab:gray"),
        ("GEEP, as deployed", [r for r in report.rows if r.group == report.ours.group], "s-", "tab:red"),
    )
    for name, rows, style, colour in curves:
        points = sorted(point(row) for row in rows)
        axes.plot(*zip(*points, strict=True), style, color=colour, label=name, markersize=5)
    other = "geep-stop" if report.ours.group == "geep-continue" else "geep-continue"
    singles = (
        ("pipeline", "v", "tab:blue"),
        ("pipeline-sorted", "^", "tab:blue"),
        ("pipeline-bfloat16", "v", "tab:blue"),
        ("fastbert", "D", "tab:orange"),
        ("random", "x", "tab:brown"),
        (other, "P", "tab:pink"),
        ("oracle", "*", "tab:green"),
        ("lexical", "h", "tab:purple"),
    )
    for group, marker, colour in singles:
        for row in report.rows:
            if row.group == group:
                axes.scatter(*point(row), marker=marker, color=colour, s=60, label=row.name, zorder=3)
    ours = report.ours
    axes.annotate(ours.setting, point(ours), textcoords="offset points", xytext=(6, 6))
    axes.set_xscale("log")
    axes.set_xlabel("texts per second, raw text to prediction (log scale)")
    axes.set_ylabel("accuracy, %" if by_accuracy else "agreement with the full model, %")
    axes.set_title(title, parse_math=False)  # a name may hold dollars
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
