"""What people see: tables, bars, errors. What was computed is not known here."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import geep

Report = Callable[[str, int, int | None], None]

# A row of more lines is taken for several that a quote has joined.
_MOST_LINES = 1000


def console_for(as_json: bool) -> Console:
    """People read standard output; with --json it belongs to the document, and people read standard error.

    Names and texts are shown as they are: ":tada:" in one of them is no picture. Brackets are escaped where they stand.
    """
    return Console(stderr=as_json, emoji=False)


def document(value: object, as_json: bool) -> None:
    """Print the one JSON document of a command, if it was asked for."""
    if as_json:
        sys.stdout.write(json.dumps(value, ensure_ascii=False, default=_plain) + "\n")


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple | set) else str(value)


@contextmanager
def errors(as_json: bool, *, goes_on: bool = False) -> Iterator[None]:
    """Turn errors a user can cause into one message and exit code 2; anything else keeps its traceback.

    Args:
        as_json: Whether machines read standard output.
        goes_on: Whether the same command, after Ctrl-C, goes on from where it was.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # Other libraries' bars and chatter stay out of the way of ours; read when transformers is first imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # Each try of a look-up is said by two libraries; what comes of it is one message of ours.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError, geep.FetchError) as error:
        if os.environ.get("GEEP_DEBUG"):
            raise
        if as_json:
            document({"error": str(error), "error_type": type(error).__name__}, as_json)
        # Neither wrapped nor coloured: paths and commands in it can be copied.
        console_for(True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        Console(stderr=True).print(f"Stopped; the same command {'goes on' if goes_on else 'starts over'}.")
        raise typer.Exit(130) from None


@contextmanager
def bars(console: Console) -> Iterator[Report]:
    """Show a bar with the time left for each thing that is reported; for logs, a line now and then."""
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as shown:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done, total=total)

        yield report


def _lines(console: Console) -> Report:
    """For logs: a line when something begins and at every quarter, or whenever an unknown number has doubled."""
    said: dict[str, int] = {}

    def report(what: str, done: int, total: int | None) -> None:
        step = min(4 * done // total, 4) if total else done.bit_length()
        if said.get(what, -1) < step:
            said[what] = step
            console.print(escape(f"{what}: {25 * step} %" if total else f"{what}: {done:,}"), soft_wrap=True)

    return report


# --------------------------------------------------------------------------------------------------------------------
# What each command found
# --------------------------------------------------------------------------------------------------------------------


def rows(console: Console, dataset: geep.Dataset, parts: geep.Parts) -> None:
    """Say how many rows there are for what."""
    test = "no test split" if dataset.test is None else f"{len(dataset.test):,} test"
    more = "" if parts.unlabelled is None else f", {len(parts.unlabelled):,} further texts without labels"
    console.print(
        f"{escape(dataset.name)}: {len(dataset.label_names)} labels; {len(parts.train):,} rows to train on, "
        f"{len(parts.profile):,} to profile, {len(parts.calibration):,} to calibrate, {test}{more}.",
        soft_wrap=True,
    )


def trained(console: Console, result: geep.TrainResult) -> None:
    """Say what training did, and how good the model is beside always answering the most frequent label."""
    if result.was_finished:
        console.print("The folder holds a model trained with these settings already; nothing was trained.")
    else:
        console.print(f"Trained {result.steps:,} steps, {result.seconds:.0f} s.")
    _quality(console, result)
    if result.exit_agreements:
        named = [f"layer {layer} {share:.1%}" for layer, share in result.exit_agreements.items()]
        console.print(
            f"Exits fitted on {result.num_fitted:,} texts answer as the full model does, on others: "
            f"{', '.join(named)}.",
            soft_wrap=True,
        )


def _quality(console: Console, result: geep.TrainResult) -> None:
    """How good the full model is on rows that it did not learn from, where these have labels."""
    dev = result.dev
    if dev is None:
        return
    measure = "accuracy" if dev.micro_f1 is None else "micro F1"
    console.print(
        f"On {dev.num_rows:,} rows it did not learn from: {measure} {100 * dev.score:.2f} %, macro F1 "
        f"{100 * dev.macro_f1:.2f} %; always answering the most frequent label: {100 * dev.majority:.2f} %. "
        f"Weights of epoch {dev.best_epoch:g}."
    )
    if result.learned_nothing is not None:
        console.print(f"[bold yellow]{escape(result.learned_nothing)}[/]", soft_wrap=True)


def profiled(console: Console, found: geep.ProfileResult, num_texts: int) -> None:
    """Show how well exit layers are predicted."""
    table = Table(title=f"How well exit layers are predicted on {num_texts:,} held-out texts")
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
    if not found.scores_calibrated:
        console.print(
            "[yellow]The held-out rows have no labels: scores are the full model's own, and are not calibrated.[/]"
        )
    predictor = found.engine.predictor
    console.print(
        f"Criterion {found.engine.settings.criterion}, predictor {predictor.kind if predictor else None}. "
        "Speed 0 (the full model) until `geep calibrate` finds one."
    )


def calibrated(console: Console, result: geep.Calibration) -> None:
    """Show the walk that was kept."""
    what, trials = result.promise.risk.name, result.walk.trials
    table = Table(title=f"Certifying {what} of at most {result.promise.allowed:.2%} on {result.num_texts:,} texts")
    for name in ("speed", "mean exit layer", f"{what} seen", "its bound", ""):
        table.add_column(name, justify="right")
    step = 1 if len(trials) <= 12 else len(trials) // 10
    for trial in (*trials[:-1:step], *trials[-1:]):
        table.add_row(
            f"{trial.speed:g}",
            f"{trial.mean_exit_layer:.2f}",
            f"{trial.risk:.2%}",
            f"{trial.bound:.2%}",
            "[green]kept[/]" if trial.passed else "[red]stop[/]",
        )
    console.print(table)
    if result.left_out:
        console.print(f"{result.left_out:,} texts were left out, which something was learned or chosen on.")
    _leavers(console, result)
    settings, certificate = result.engine.settings, result.engine.certificate
    if certificate is None and not trials:
        console.print("[red]Nothing is certified:[/] there are too few labels for any speed. It is written at speed 0.")
        return
    if certificate is None:
        full = trials[0]
        console.print(
            f"[red]Nothing is certified:[/] with all layers run, {result.engine.deployment.dtype} already loses "
            f"{full.risk:.2%} of float32's full model, {full.bound:.2%} at most. It is written at speed 0, "
            "and runs in float32 until something is certified: give more held-out texts, ask for less, or run "
            "`geep profile --dtype float32` and calibrate again."
        )
        return
    if settings.speed == 0:
        console.print(
            "[yellow]No speed keeps this promise: the full model will answer. More held-out texts would help.[/]"
        )
    else:
        console.print(
            f"Speed {settings.speed:g}, quantile {settings.quantile:g}, "
            f"lexical exit {'on' if settings.lexical_exit else 'off'}."
        )
    console.print(
        escape(
            f"Certified: {certificate.promise}, for {result.engine.deployment.deployed_as}, "
            f"on {certificate.texts_from or 'texts of unknown origin'}"
            + (f", with {certificate.labels_from}." if certificate.labels_from else ".")
        ),
        soft_wrap=True,
    )


def _leavers(console: Console, result: geep.Calibration) -> None:
    """Show what those lose that are answered early; depths at which nobody is are left out."""
    what, before = result.promise.risk.name, 0
    table = Table(title=f"Of those answered by a layer, at speed {result.engine.settings.speed:g}", box=SIMPLE_HEAD)
    for name in ("layer", "texts", f"{what} seen"):
        table.add_column(name, justify="right")
    for row in result.leavers:
        if row.num_texts > before:
            table.add_row(str(row.depth), f"{row.num_texts:,}", f"{row.risk:.2%}")
            before = row.num_texts
    if table.row_count > 1:
        console.print(table)


def labels_asked(
    console: Console, result: geep.Calibration, path: object, names: Sequence[str], *, is_set: bool
) -> None:
    """Say which labels the walk waits for, and what to do."""
    if not result.to_label:
        console.print(
            f"[yellow]The walk ended for want of labels:[/] the next speed takes {result.next_step:,} more beside the "
            f"{result.num_labelled:,} given. More of them (--max-labels) may give a higher speed.",
            soft_wrap=True,
        )
        return
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    done = "A higher speed may follow" if is_set else "No speed is set yet"
    console.print(
        f"[bold]{done}: {len(result.to_label):,} of {result.num_texts:,} texts need a label.[/] "
        + escape(f'Write it to "label" in {path} (one of: {shown}), of any of them, and run the same command again.'),
        soft_wrap=True,
    )


def accelerated(console: Console, result: geep.Acceleration, folder: object) -> None:
    """Show a classifier before and after, and what may be said of it."""
    if result.was_finished:
        console.print("The folder holds this classifier with exits already; nothing was done.")
    copies = f", and {result.copies:,} copies that were left out" if result.copies else ""
    console.print(
        f"{result.num_texts:,} different texts{copies}: learned from {result.num_learned:,}, chosen on "
        f"{result.num_chosen:,}, certified on {result.num_certified:,} texts.",
        soft_wrap=True,
    )
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for name in ("layers", "texts/s", "agrees %"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, pace in (("the classifier", result.before), (f"at speed {result.speed:g}", result.after)):
        table.add_row(name, f"{pace.layers:.2f}", f"{pace.texts_per_second:,.1f}", f"{100 * pace.agreement:.2f}")
    console.print(table)
    refused = result.calibration.get("refused")
    if refused is not None:
        console.print(f"[yellow]Not faster:[/] {escape(str(refused))}", soft_wrap=True)
        _prospects(console, result)
        return
    certificate = result.calibration["certificate"]
    loss = "agreement" if result.calibration["promise"]["max_accuracy_drop"] is None else "accuracy"
    console.print(
        f"Certified: {result.promise}. Seen on {certificate['num_texts']:,} texts: {certificate['risk']:.2%} of "
        f"{loss} lost, at most {certificate['bound']:.2%}.",
        soft_wrap=True,
    )
    times = result.after.texts_per_second / result.before.texts_per_second
    if times < 1:
        console.print(
            f"[yellow]On this machine that is slower ({times:.2f}x), though fewer layers run: use speed 0 here.[/]"
        )
    else:
        console.print(f"[bold]{times:.2f}x the texts a second.[/] Next: geep predict {escape(str(folder))} FILE")
    _prospects(console, result)


def _prospects(console: Console, result: geep.Acceleration) -> None:
    """Say what it would take to promise more."""
    share = result.num_certified / result.num_texts
    for each in result.prospects:
        if each.layers is None or each.num_texts is None:
            console.print(f"To promise {each.promise}: no exit serves.", soft_wrap=True)
        else:
            texts = "" if each.num_texts <= result.num_certified else f", {each.num_texts / share:,.0f} texts in all"
            console.print(
                f"To promise {each.promise}: about {each.layers:.2f} layers, {each.num_texts:,} texts that "
                f"certify{texts}.",
                soft_wrap=True,
            )


def evaluated(console: Console, report: geep.EvaluationReport) -> None:
    """Show the engine beside its rivals."""
    title = f"{report.num_texts:,} texts; timed on {report.num_timed:,}, median of {report.rounds} rounds"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    # The numbers keep their width on a terminal of 80 columns; long names go on in a second line.
    table.add_column("", overflow="fold")
    for name in ("accuracy %", "agrees %", "layers run", "fewer", "texts/s", "x full"):
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    for row in report.rows:
        table.add_row(
            escape(row.name if row.dtype == report.ours.dtype else f"{row.name} ({row.dtype})"),
            "-" if row.accuracy is None else f"{100 * row.accuracy:.2f}",
            f"{100 * row.agreement:.2f}",
            f"{row.mean_exit_layer:.2f}",
            "-" if row.layer_speedup is None else f"{row.layer_speedup:.2f}x",
            f"{row.throughput:,.1f}",
            f"{row.ratio:.2f}x",
            style="bold red" if row.deployed else None,
        )
    console.print(table)
    for row in report.rows:
        if row.verified < 0.99:
            console.print(
                f"[yellow]{escape(row.name)}: the timed run gave {1 - row.verified:.1%} of its texts another answer "
                "than its accuracy was taken from.[/]"
            )
    for quality in report.quality:
        console.print(
            f"Exit layers by {quality.kind}: rank correlation {quality.rank_correlation:.2f}, mean error "
            f"{quality.mean_absolute_error:.2f} layers, too early {quality.early_share:.0%}"
        )
    best = geep.headline(report)
    drop = "" if best.accuracy_drop is None else f"accuracy {-100 * best.accuracy_drop:+.2f} points, "
    lexical = report.ours.lexical_share
    constant = "no constant depth is as good"
    if best.over_constant is not None:
        constant = f"{best.over_constant:.2f}x the fastest constant depth as good ({best.constant_depth})"
    console.print(
        f"[bold]GEEP at speed {report.speed:g}[/]: {drop}layers / {best.layer_speedup or float('inf'):.2f}, "
        f"time: {best.over_full:.2f}x packed full, {best.over_pipeline:.2f}x HF pipeline, "
        f"{constant}; {lexical:.0%} answered by the table alone."
    )


def hides_rows(result: geep.ScoreReport) -> bool:
    """Whether a bad row is so long that it must be many rows, joined by a quote."""
    return result.longest_bad > _MOST_LINES


def reader_left() -> None:
    """Let nothing more be said to a standard output that nobody reads, not even when the program ends."""
    with suppress(OSError, ValueError):  # of a test it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def scored(console: Console, result: geep.ScoreReport, goal: object, num_layers: int) -> None:
    """Say what became of a file."""
    if result.num_bad:
        taken = "" if result.longest_bad <= 1 else f" of {result.longest_bad:,} lines"
        one = f", one{taken}," if taken else ""
        said = f"1 bad row{taken}" if result.num_bad == 1 else f"{result.num_bad:,} bad rows{one}"
        console.print(
            f"[yellow]{said} left out[/]"
            + (f", listed in {escape(result.errors_file)}" if result.errors_file else "")
            + ("; the first:" if result.num_bad > 1 else ":"),
            soft_wrap=True,
        )
        for bad in result.bad_rows[:3]:
            console.print(f"  line {bad.line}: {escape(bad.reason)}", soft_wrap=True)
    if hides_rows(result):
        console.print(
            f"[bold yellow]The {result.longest_bad:,} lines may be rows of their own, which quotes that are mere "
            "characters join: see --no-quoting.[/]",
            soft_wrap=True,
        )
    mean = result.traffic.mean_exit_layer
    console.print(
        f"{result.rows:,} rows in {result.seconds:.1f} s "
        f"({result.rows / max(result.seconds, 1e-9):,.0f} a second), "
        f"{mean:.2f} of {num_layers} layers a text, {result.truncated:,} cut: {escape(str(goal))}",
        soft_wrap=True,
    )


def drifted(console: Console, drift: geep.Drift) -> None:
    """Say how far rows are from those that certified."""
    unknown = "" if drift.unknown is None else f", unknown tokens {100 * drift.unknown:+.1f} points"
    said = f"Drift from the texts that certified: exit layers {100 * drift.layers:.1f} points{unknown}"
    if drift.is_large:
        console.print(
            f"[bold yellow]{said}. These are other texts than the promise is about:[/] certify it on some like them "
            "(geep calibrate --calibration FILE, or --texts FILE).",
            soft_wrap=True,
        )
    else:
        by_chance = "" if drift.is_certain else ", no more than by chance"
        console.print(f"{said}{by_chance}.", soft_wrap=True)


def predictions(console: Console, answers: Sequence[Mapping[str, Any]], *, multi_label: bool) -> None:
    """Show texts with their labels."""
    table = Table()
    for name in ("labels" if multi_label else "label", "score", "exit layer", "predicted", "text"):
        table.add_column(name, justify="left" if name in ("label", "labels", "text") else "right")
    for answer in answers:
        predicted = answer["predicted_layer"]
        text = " / ".join(answer[part] for part in ("text", "text_pair") if part in answer)
        table.add_row(
            escape((", ".join(answer["labels"]) or "none") if multi_label else answer["label"]),
            f"{answer['score']:.3f}",
            str(answer["exit_layer"]),
            "-" if predicted is None else str(predicted),
            escape(text[:70] + ("…" if len(text) > 70 else "")),
        )
    console.print(table)
