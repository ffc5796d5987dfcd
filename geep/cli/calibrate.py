"""The command that finds the speed that keeps a promise, and asks for the labels that it needs."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import geep
from geep.cli import options as opt, show
from geep.cli.make import rows_to_certify

Option = typer.Option

_TO_LABEL = "to_label.jsonl"
_WORK = ".work"
_MOST_LABELS = 300

# Of the texts of a model that keeps none, one in so many is chosen on.
_CHOSEN_ON = 5


def calibrate_command(
    context: typer.Context,
    model: opt.FolderArgument,
    max_drop: opt.MaxDrop = None,
    min_agreement: opt.MinAgreement = None,
    confidence: opt.Confidence = 0.95,
    conditional: opt.Conditional = False,
    calibration: opt.CalibrationRows = None,
    texts: Annotated[
        Path | None,
        Option(
            "--texts",
            help="File of many texts like those to come, without labels: a promise about accuracy then takes labels "
            "for the few that are answered otherwise than before, and asks for them.",
            rich_help_panel=opt.FEW_LABELS,
        ),
    ] = None,
    to_label: Annotated[
        Path | None,
        Option(
            help=f"File that asks for labels, and is read again once they stand in it. Default: MODEL/{_TO_LABEL}.",
            rich_help_panel=opt.FEW_LABELS,
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        Option(
            help="File of labels that were written elsewhere: columns id and label, any order, any part.",
            rich_help_panel=opt.FEW_LABELS,
        ),
    ] = None,
    labelled_by: Annotated[
        str | None,
        Option(
            help="Who gave the labels, a person or a model: the record says so. Default: the file's name.",
            rich_help_panel=opt.FEW_LABELS,
        ),
    ] = None,
    max_labels: Annotated[
        int, Option(min=1, help="Labels to ask for, in all.", rich_help_panel=opt.FEW_LABELS)
    ] = _MOST_LABELS,
    text_column: opt.OtherColumn = None,
    text_pair_column: opt.OtherColumn = None,
    quoting: opt.Quoting = None,
    on_miss: opt.OnMissOption = "continue",
    criterion: Annotated[
        str | None,
        Option(
            help=f"agreement, {opt.names('CRITERIA')}. Default: which keeps the promise with fewest layers.",
            rich_help_panel=opt.PROMISE,
        ),
    ] = None,
    lexical: opt.Lexical = None,
    by_time: Annotated[
        bool,
        Option(
            "--by-time",
            help="Choose settings by time on this CPU, not by layers; may ask fewer exits.",
            rich_help_panel=opt.PROMISE,
        ),
    ] = False,
    call_size: Annotated[
        int | None,
        Option(
            min=1,
            help="With --by-time: texts of a call, as a server makes them. Of few texts, fewer exits pay.",
            rich_help_panel=opt.PROMISE,
        ),
    ] = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    backend: opt.Backend = None,
    as_json: opt.AsJson = False,
) -> None:
    """Find the highest speed that keeps a promise, and write it into the model folder.

    The rows are those that `geep train` set aside for it; nothing was trained or chosen on them. `--calibration` names
    others. With `--texts` no labelled rows are needed: the texts whose labels matter are written to a file, and the
    same command goes on once they stand in it.

    Examples:
        geep calibrate models/r8 --max-drop 0.5

        geep calibrate models/r8 --min-agreement 0.99 --confidence 0.99

        geep calibrate models/r8 --calibration yesterday.jsonl --conditional

        geep calibrate models/fast --texts many.jsonl --max-drop 0.5
    """
    with show.errors(as_json, goes_on=texts is not None):
        console = show.console_for(as_json)
        promise = opt.promise(max_drop, min_agreement, confidence, conditional=conditional)
        if not by_time:
            opt.refuse_ignored(context, ["call_size"], "without --by-time")
        asking = ("to_label", "labels", "labelled_by", "max_labels")
        if texts is None:
            columns = ("text_column", "text_pair_column", "quoting")
            opt.refuse_ignored(context, (*asking, *columns), "without --texts")
        elif not promise.needs_labels:
            opt.refuse_ignored(context, asking, "with --min-agreement, which needs no labels")
        if texts is not None:
            opt.refuse_ignored(context, ["calibration"], "with --texts, which certify in its place")
        dtype, backend = _as_profiled(model, device, dtype, backend)
        engine = geep.Engine.from_pretrained(model, speed=0.0, device=device, dtype=dtype, backend=backend)
        if texts is None:
            plan, parts = geep.parts_of(model)
            tuning, fresh = parts.profile, rows_to_certify(console, calibration, parts, plan)
        else:
            named = {"text_column": text_column, "text_pair_column": text_pair_column, "quoting": quoting}
            given = {name: value for name, value in named.items() if value is not None}
            tuning, fresh = _texts_to_certify(model, engine, texts, given)
        asked = (to_label or model / _TO_LABEL) if texts is not None and promise.needs_labels else None
        known = None if asked is None else _known(engine, fresh, asked, labels, labelled_by)
        with show.bars(console) as progress:
            first, second = tuning, fresh
            if asked is not None:
                first, second = _kept_runs(engine, tuning, fresh, promise, asked.with_suffix(_WORK), progress)
            result = geep.calibrate(
                engine,
                first,
                second,
                promise,
                on_miss=opt.on_miss(on_miss),
                criterion=criterion,
                lexical_exit=lexical,
                cost=engine.measure_cost() if by_time else None,
                call_size=call_size,
                labels=known,
                max_labels=max_labels,
                progress=progress,
            )
        summary = result.record()
        if asked is not None and known is not None and result.to_label:
            geep.write_to_label(asked, fresh, result.to_label, known=known, label_names=engine.label_names)
            summary["to_label"] = str(asked)
        if result.to_label and (not result.num_labelled or result.walk.kept is None):
            show.labels_asked(console, result, asked, engine.label_names, is_set=False)
            show.document({"to_label": str(asked), "num_to_label": len(result.to_label)}, as_json)
            return
        result.save(model, asked={**asdict(promise), "rows": fresh.digest()})
        if asked is not None and not result.to_label:
            shutil.rmtree(asked.with_suffix(_WORK))
        show.calibrated(console, result)
        if result.next_step:
            show.labels_asked(console, result, asked, engine.label_names, is_set=True)
        show.document(summary, as_json)


def _as_profiled(
    model: Path, device: str | None, dtype: str | None, backend: str | None
) -> tuple[str | None, str | None]:
    """Dtype and backend whose exits the folder's table and scores were learned on, where none are named."""
    from geep.engine import EngineConfig
    from geep.folder import SETTINGS_FILE

    if not (model / SETTINGS_FILE).exists():
        return dtype, backend
    profile = geep.CalibrationFile.read(model).record.get("profile") or {}
    config = EngineConfig(device=device, dtype=dtype, backend=backend).as_certified(profile.get("made_with"))
    return config.dtype, config.backend


def _texts_to_certify(
    model: Path, engine: geep.Engine, path: Path, columns: dict[str, Any]
) -> tuple[geep.Split, geep.Split]:
    """Rows to choose settings on and texts to certify on, which nothing was learned on."""
    from geep.calibration import unlearned
    from geep.data import text_id

    if "classifier" not in geep.Provenance.read(model).about:
        plan, parts = geep.parts_of(model)
        rows = geep.load_split(path, **{**plan.columns, **columns})
        return parts.profile, geep.unseen(rows, *parts.learned)
    # The folder says of no texts what they were for: some of these are chosen on, the same in any order and company.
    rows = unlearned(engine, geep.load_split(path, **columns))
    chosen = [int(text_id(text)[1:], 16) % _CHOSEN_ON == 0 for text in rows.inputs]
    tuning, fresh = ([row for row, is_chosen in enumerate(chosen) if is_chosen == wanted] for wanted in (True, False))
    return rows.select(tuning), rows.select(fresh)


def _kept_runs(
    engine: geep.Engine,
    tuning: geep.Split,
    fresh: geep.Split,
    promise: geep.Promise,
    folder: Path,
    progress: show.Report,
) -> tuple[Any, Any]:
    """Run all exits once: while labels are written, what they said waits in a folder."""
    from geep.calibration import kept_run
    from geep.promise import check_enough

    check_enough(len(fresh), promise)
    words = ("all exits, texts to choose settings on", "all exits, texts to certify the promise on")
    first, second = (
        kept_run(engine, part, folder, what=what, progress=progress)
        for part, what in zip((tuning, fresh), words, strict=True)
    )
    return first, second


def _known(
    engine: geep.Engine, fresh: geep.Split, asked: Path, labels: Path | None, labelled_by: str | None
) -> geep.SomeLabels:
    """Labels that stand in the file that asked for them, and those that were written elsewhere."""
    found = geep.SomeLabels.none()
    for path in (asked, labels):
        if path is not None and (path == labels or path.exists()):
            read = geep.read_labels(
                path,
                fresh,
                label_names=engine.label_names,
                multi_label=engine.multi_label,
                labelled_by=labelled_by or "",
            )
            found = found.join(read)
    return found
