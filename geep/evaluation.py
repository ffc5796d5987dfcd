"""Compare the engine with its honest rivals, in one run, interleaved, each at its best setting.

Quality (accuracy, agreement, layers) is taken on all texts of a split, from one pass over all exits of the engine as
deployed. Time is taken on a random part of them, from raw text to predictions, every rival once a round in a new
order, so that a slow minute of the machine hits all alike; the median of the rounds is reported.

Read in this order: the records, `evaluate`, the rivals' runs, the figure.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from transformers import pipeline

from geep.backends import BACKENDS, Backend, TokenBatch
from geep.calibration import ExitRun, PredictorQuality, full_profile, layer_quality, planned_columns, predictor_quality
from geep.data import Split
from geep.engine import Engine, RunResult
from geep.exits import AGREEMENT, ExitProfile, follow

Integers = NDArray[np.int64]
Report = Callable[[str, float], None]

# Speeds of the trade-off curve, fixed before any text is seen.
SWEEP: tuple[float, ...] = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)

# Batch sizes among which a rival that works by batches finds its best.
BATCH_SIZES: tuple[int, ...] = (1, 8, 32, 128)


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """One way of running the model.

    Attributes:
        name: What it is.
        group: "pipeline", "pipeline-sorted", "full", "lexical", "constant", "fastbert", "random", "geep-stop",
            "geep-continue" or "oracle".
        setting: What was set: batch size, depth or speed.
        accuracy: Share of texts with the right label, on all texts; None without labels.
        agreement: Share of texts answered as the full model answers them, on all texts.
        mean_exit_layer: Encoder layers run for a text, on all texts.
        layer_speedup: Layers of the full model over layers run, texts counted alike, on all texts; None: none run.
        timed_layer_speedup: The same on the timed texts, each text counted by its tokens: what time can follow.
        throughput: Texts a second, median of the rounds, from raw text.
        throughput_low: Slowest round.
        throughput_high: Fastest round.
        ratio: Throughput over that of the packed full model.
        lexical_share: Share of texts answered without the encoder, on all texts.
    """

    name: str
    group: str
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
class _Rival:
    """A way of running the model: its timed run, and the exit column of every text of the split."""

    name: str
    group: str
    setting: str
    run: Callable[[], object]
    columns: Integers


def evaluate(
    engine: Engine,
    split: Split,
    *,
    max_texts: int = 512,
    rounds: int = 3,
    sweep: Sequence[float] = SWEEP,
    seed: int = 0,
    report: Report = lambda _what, _share: None,
) -> EvaluationReport:
    """Measure the engine beside its rivals.

    Args:
        engine: The engine as deployed, with a table, at the speed to be evaluated (above 0).
        split: Texts to evaluate on, with labels or without.
        max_texts: Bound on the texts of the timed part.
        rounds: Rounds of timing.
        sweep: Further speeds at which the engine is run ("continue"), for the trade-off curve.
        seed: Draws the timed texts, the random depths and the order within rounds.
        report: Told what is being done, and the share of it that is done.

    Raises:
        ValueError: If there are no texts, no table, or the speed is 0.
    """
    if not len(split):
        raise ValueError("No texts to evaluate on; expected at least one.")
    if engine.predictor is None:
        raise ValueError("Evaluation compares predictions of exit layers, found no exit table; run `geep profile`.")
    if engine.settings.speed == 0:
        raise ValueError(
            "The engine's speed is 0: every text runs all layers, so there is nothing to compare. "
            "Run `geep calibrate`, or give a speed."
        )
    generator = np.random.default_rng(seed)
    run = ExitRun.of(engine, split, partial(report, "all exits, texts to evaluate"))
    batch, profile = run.batch, full_profile(engine, run, engine.settings)

    timed = np.sort(generator.permutation(len(split))[:max_texts])
    texts = split.select(timed).inputs
    report("best batch sizes of the rivals", 0.0)
    rivals = _rivals(engine, profile, batch, texts, timed, tuple(sweep), generator)

    report("best batch sizes of the rivals", 1.0)
    seconds: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    steps = (rounds + 1) * len(rivals)
    done = 0
    for number in range(rounds + 1):
        for index in generator.permutation(len(rivals)):
            rival = rivals[index]
            _wait_for_device(engine)
            begin = time.perf_counter()
            rival.run()
            _wait_for_device(engine)
            if number:  # round 0 fills caches and is not counted
                seconds[rival.name].append(time.perf_counter() - begin)
            done += 1
            report(f"timing {len(rivals)} rivals, {rounds} rounds and a warm-up", done / steps)
    full_rate = float(np.median(len(texts) / np.asarray(seconds[_FULL])))
    rows = tuple(
        _row(rival, profile, batch, timed, len(texts) / np.asarray(seconds[rival.name]), full_rate) for rival in rivals
    )
    return EvaluationReport(
        rows=rows,
        quality=_qualities(engine, profile, batch),
        num_texts=len(split),
        num_timed=len(texts),
        rounds=rounds,
        speed=engine.settings.speed,
        machine=machine(engine),
    )


_FULL = "full model, packed"


def _rivals(
    engine: Engine,
    profile: ExitProfile,
    batch: TokenBatch,
    texts: Sequence[Any],
    timed: Integers,
    sweep: tuple[float, ...],
    generator: np.random.Generator,
) -> list[_Rival]:
    """Line up everything that is compared, each at its best batch size where it has one."""
    settings = engine.settings
    last = len(profile.depths) - 1
    everyone = np.full(len(profile), last)
    depths = np.asarray(profile.depths)
    # Two batches of the largest size tell sizes apart; with fewer texts a size above their number is no size.
    trial = texts[: 2 * max(BATCH_SIZES)]
    sizes = tuple(size for size in BATCH_SIZES if size <= len(trial))
    rivals: list[_Rival] = []

    hf = _HfPipeline.of(engine)
    arrival = _fastest(sizes, lambda size: hf(trial, size, by_length=False))
    by_length = _fastest(sizes, lambda size: hf(trial, size, by_length=True))
    for size in sorted({arrival, 32}):
        note = "best batch size" if size == arrival else "common batch size"
        run = _bind(hf, texts, size, by_length=False)
        rivals.append(_Rival(f"HF pipeline, batch {size}", "pipeline", f"arrival order, {note}", run, everyone))
    run = _bind(hf, texts, by_length, by_length=True)
    rivals.append(
        _Rival(f"HF pipeline, length-sorted, batch {by_length}", "pipeline-sorted", "best batch size", run, everyone)
    )
    rivals.append(_Rival(_FULL, "full", "speed 0", _bind(engine.predict, texts, speed=0.0), everyone))

    if depths[0] == 0:
        rivals.append(
            _Rival(
                "the table alone", "lexical", "no encoder", _bind(_run_lexical, engine, texts), np.zeros_like(everyone)
            )
        )
    for column, depth in enumerate(profile.depths):
        if 0 < depth < depths[-1]:
            rivals.append(
                _Rival(
                    f"constant depth {depth}",
                    "constant",
                    f"{depth} layers",
                    _bind(_run_at, engine, texts, np.full(len(texts), depth)),
                    np.full(len(profile), column),
                )
            )

    first = int(np.searchsorted(depths, 1))
    fastbert = follow(profile, np.full(len(profile), first), speed=settings.speed, on_miss="continue")
    shrinking = ShrinkingBatch.of(engine)
    size = _fastest(sizes, lambda size: shrinking(trial, size))
    rivals.append(
        _Rival(
            f"FastBERT, shrinking batch {size}",
            "fastbert",
            f"speed {settings.speed:g}",
            _bind(shrinking, texts, size),
            fastbert,
        )
    )

    stop = replace(settings, on_miss="stop", quantile=0.5, lexical_exit=False)
    stop_columns = planned_columns(engine, batch, stop)
    shuffled = generator.permutation(stop_columns)
    rivals.append(
        _Rival(
            "random depths, stop's histogram",
            "random",
            f"speed {settings.speed:g}",
            _bind(_run_at, engine, texts, depths[shuffled][timed]),
            shuffled,
        )
    )
    stopping, going_on = engine.replace(settings=stop), engine.replace(settings=replace(settings, on_miss="continue"))
    rivals.append(
        _Rival("GEEP stop", "geep-stop", f"speed {settings.speed:g}", _bind(stopping.predict, texts), stop_columns)
    )
    speeds = [settings.speed, *(speed for speed in sweep if speed != settings.speed)]
    for number, speed in enumerate(speeds):
        at = replace(going_on.settings, speed=speed)
        columns = follow(profile, planned_columns(engine, batch, at), speed=speed, on_miss="continue")
        name = "GEEP continue" if number == 0 else f"GEEP continue, speed {speed:g}"
        rivals.append(
            _Rival(name, "geep-continue", f"speed {speed:g}", _bind(going_on.predict, texts, speed=speed), columns)
        )

    oracle = stable_oracle(profile.from_depth(1)) + first
    rivals.append(
        _Rival(
            "oracle",
            "oracle",
            "answer never changes again",
            _bind(_run_at, engine, texts, depths[oracle][timed]),
            oracle,
        )
    )
    return rivals


def _bind(function: Callable[..., object], *args: Any, **kwargs: Any) -> Callable[[], object]:
    return lambda: function(*args, **kwargs)


def _fastest(sizes: Sequence[int], run: Callable[[int], object]) -> int:
    """Try every size once, after a run that is not counted, and return the fastest."""
    run(sizes[-1])
    seconds = {}
    for size in sizes:
        begin = time.perf_counter()
        run(size)
        seconds[size] = time.perf_counter() - begin
    return min(seconds, key=lambda size: seconds[size])


def _row(
    rival: _Rival, profile: ExitProfile, batch: TokenBatch, timed: Integers, rates: NDArray[Any], full_rate: float
) -> EvaluationRow:
    texts, depths = np.arange(len(profile)), np.asarray(profile.depths)
    layers = depths[rival.columns]
    tokens = batch.lengths[timed]
    mean = float(layers.mean())
    token_layers = float((layers[timed] * tokens).sum())
    return EvaluationRow(
        name=rival.name,
        group=rival.group,
        setting=rival.setting,
        accuracy=None if profile.correct is None else float(profile.correct[texts, rival.columns].mean()),
        agreement=float(profile.agrees[texts, rival.columns].mean()),
        mean_exit_layer=mean,
        layer_speedup=float(depths[-1]) / mean if mean else None,
        timed_layer_speedup=float(depths[-1] * tokens.sum()) / token_layers if token_layers else None,
        throughput=float(np.median(rates)),
        throughput_low=float(rates.min()),
        throughput_high=float(rates.max()),
        ratio=float(np.median(rates)) / full_rate,
        lexical_share=float((layers == 0).mean()),
    )


def stable_oracle(profile: ExitProfile) -> Integers:
    """Column of the first exit from which the answer never changes again: the bound for equal answers."""
    same_from_here = np.logical_and.accumulate(profile.agrees[:, ::-1], axis=1)[:, ::-1]
    return same_from_here.argmax(1)


def _qualities(engine: Engine, profile: ExitProfile, batch: TokenBatch) -> tuple[PredictorQuality, ...]:
    """Judge the deployed predictor beside the best constant and beside what text length alone can tell."""
    speed, predictor = engine.settings.speed, engine.predictor
    if predictor is None:
        return ()
    inner = profile.from_depth(1)
    actual = inner.exit_layers(speed)
    median = np.full(len(actual), int(np.median(actual)))
    lengths = batch.lengths
    return (
        predictor_quality(inner, batch, predictor, speed),
        layer_quality("length", speed, lengths, _layers_by_length(lengths, actual), actual),
        layer_quality("constant", speed, median, median, actual),
    )


def _layers_by_length(lengths: Integers, actual: Integers, bins: int = 16) -> Integers:
    """Median exit layer of texts of about the same length, each half of the texts told from the other half."""
    predicted = np.empty_like(actual)
    folds = np.arange(len(lengths)) % 2
    for fold in (0, 1):
        known, asked = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        if not len(known):
            known = asked
        edges = np.unique(np.quantile(lengths[known], np.linspace(0, 1, bins + 1)[1:-1]))
        groups = np.searchsorted(edges, lengths[known])
        medians = np.array(
            [
                np.median(actual[known][groups == group] if (groups == group).any() else actual[known])
                for group in range(len(edges) + 1)
            ]
        )
        predicted[asked] = medians[np.searchsorted(edges, lengths[asked])].astype(np.int64)
    return predicted


# --------------------------------------------------------------------------------------------------------------------
# The rivals' runs
# --------------------------------------------------------------------------------------------------------------------


def _run_at(engine: Engine, texts: Sequence[Any], exit_layers: Integers) -> RunResult:
    """Run raw texts to given depths on the engine: tokenised, scheduled and answered as `predict` does."""
    settings = replace(engine.settings, on_miss="stop")
    return engine.run_tokens(engine.tokenize(texts).batch, settings=settings, exit_layers=exit_layers)


def _run_lexical(engine: Engine, texts: Sequence[Any]) -> Tensor | None:
    """Answer raw texts by the table's guess at the label: a bag of n-grams, and what exit 0 can do by itself."""
    batch = engine.tokenize(texts).batch
    if engine.predictor is None:
        return None
    ids, lengths = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.lengths)
    logits = engine.predictor.predict(ids, lengths, speed=engine.settings.speed).lexical_logits
    return None if logits is None else logits.softmax(-1)


@dataclass(frozen=True, slots=True)
class _HfPipeline:
    """Hugging Face's text-classification pipeline on the same model, in arrival order or sorted by length."""

    call: Any
    max_length: int

    @classmethod
    def of(cls, engine: Engine) -> _HfPipeline:
        make: Any = pipeline  # its overloads name every kind of model there is
        call = make("text-classification", model=engine.model, tokenizer=engine.tokenizer, device=engine.model.device)
        return cls(call, engine.max_length)

    def __call__(self, texts: Sequence[Any], batch_size: int, *, by_length: bool) -> list[Any]:
        inputs = [text if isinstance(text, str) else {"text": text[0], "text_pair": text[1]} for text in texts]
        if by_length:
            sizes = [len(text) if isinstance(text, str) else len(text[0]) + len(text[1]) for text in texts]
            inputs = [inputs[i] for i in np.argsort(sizes)]
        # Given a generator, the pipeline keeps its data loader busy; given a list, it warns of just that.
        return list(
            self.call((each for each in inputs), batch_size=batch_size, truncation=True, max_length=self.max_length)
        )


@dataclass(frozen=True, slots=True)
class ShrinkingBatch:
    """FastBERT's batched run as published: padded batches in arrival order, a classifier after every layer, texts that
    are certain enough leave the batch at once, the others go on in a smaller one.
    """  # noqa: D205

    engine: Engine
    backend: Backend[Any]

    @classmethod
    def of(cls, engine: Engine) -> ShrinkingBatch:
        """Run an engine's model, padded, at its settings."""
        return cls(engine, BACKENDS["padded"].build(engine.model, dtype=str(engine.model.dtype).removeprefix("torch.")))

    def __call__(self, texts: Sequence[Any], batch_size: int) -> Tensor:
        """Answer raw texts: probabilities (num_texts, num_labels)."""
        engine, backend, settings = self.engine, self.backend, self.engine.settings
        batch = engine.tokenize(texts).batch
        out = torch.empty(len(texts), len(engine.label_names))
        guess = engine.plan(batch, settings=settings).lexical_logits if settings.criterion == AGREEMENT else None
        with torch.inference_mode():
            for start in range(0, len(texts), batch_size):
                rows = np.arange(start, min(start + batch_size, len(texts)))
                live = backend.start(batch.select(rows))
                for layer in range(1, engine.depths[-1] + 1):
                    live = backend.advance(live, layer, len(rows))
                    if layer not in engine.depths:
                        continue
                    logits = backend.exit_logits(live, layer, 0, len(rows)).float().cpu()
                    if layer == engine.depths[-1]:
                        sure = np.ones(len(rows), dtype=bool)
                    else:
                        lexical = None if guess is None else guess[torch.from_numpy(rows)]
                        sure = engine.uncertainty(logits, layer, settings, lexical).numpy() < settings.speed
                    out[torch.from_numpy(rows[sure])] = logits[torch.from_numpy(sure)]
                    rows = rows[~sure]
                    if not len(rows):
                        break
                    if sure.any():
                        live = backend.select(live, np.flatnonzero(~sure))
        return out.softmax(-1)


def _wait_for_device(engine: Engine) -> None:
    if engine.model.device.type == "cuda":
        torch.cuda.synchronize()


def machine(engine: Engine) -> dict[str, Any]:
    """Describe what a measurement ran on; absolute times mean nothing without it."""
    device = engine.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": engine.dtype,
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """Name of this machine's CPU, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"


# --------------------------------------------------------------------------------------------------------------------
# Reading the report
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Headline:
    """What the engine gains, against each rival that matters.

    Attributes:
        accuracy_drop: Of the engine against the full model, in accuracy; None without labels.
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
    ours, full = report.row("geep-continue"), report.row("full")

    def quality(row: EvaluationRow) -> float:
        return row.agreement if row.accuracy is None else row.accuracy

    equals = [row for row in report.rows if row.group in ("constant", "full") and quality(row) >= quality(ours)]
    rival = max(equals, key=lambda row: row.throughput, default=None)
    best_pipeline = max(
        (row for row in report.rows if row.group == "pipeline"), key=lambda row: row.throughput, default=full
    )
    return Headline(
        accuracy_drop=None if ours.accuracy is None or full.accuracy is None else full.accuracy - ours.accuracy,
        layer_speedup=ours.layer_speedup,
        over_full=ours.throughput / full.throughput,
        over_pipeline=ours.throughput / best_pipeline.throughput,
        over_constant=None if rival is None else ours.throughput / rival.throughput,
        constant_depth=None if rival is None else rival.name,
        time_share=None if ours.timed_layer_speedup is None else ours.ratio / ours.timed_layer_speedup,
    )


def draw(report: EvaluationReport, path: str | Path, *, title: str) -> None:
    """Draw accuracy (agreement, without labels) against throughput as a PNG."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    by_accuracy = all(row.accuracy is not None for row in report.rows)

    def point(row: EvaluationRow) -> tuple[float, float]:
        return row.throughput, 100 * (row.accuracy if by_accuracy and row.accuracy is not None else row.agreement)

    curves = (
        ("constant depth", [*(r for r in report.rows if r.group in ("constant", "full"))], "o-", "tab:gray"),
        ("GEEP continue", [r for r in report.rows if r.group == "geep-continue"], "s-", "tab:red"),
    )
    for name, rows, style, colour in curves:
        points = sorted(point(row) for row in rows)
        axes.plot(*zip(*points, strict=True), style, color=colour, label=name, markersize=5)
    singles = (
        ("pipeline", "v", "tab:blue"),
        ("pipeline-sorted", "^", "tab:blue"),
        ("fastbert", "D", "tab:orange"),
        ("random", "x", "tab:brown"),
        ("geep-stop", "P", "tab:pink"),
        ("oracle", "*", "tab:green"),
        ("lexical", "h", "tab:purple"),
    )
    for group, marker, colour in singles:
        for row in report.rows:
            if row.group == group:
                axes.scatter(*point(row), marker=marker, color=colour, s=60, label=row.name, zorder=3)
    ours = report.row("geep-continue")
    axes.annotate(ours.setting, point(ours), textcoords="offset points", xytext=(6, 6))
    axes.set_xscale("log")
    axes.set_xlabel("texts per second, raw text to prediction (log scale)")
    axes.set_ylabel("accuracy, %" if by_accuracy else "agreement with the full model, %")
    axes.set_title(title)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
