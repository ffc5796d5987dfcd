"""Commands that make a model: train, profile; and steps that they share with others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

import geep
from geep.cli import options as opt, show

Option = typer.Option


def train_command(
    context: typer.Context,
    data: opt.DataArgument,
    output: Annotated[Path, Option("--output", "-o", help="Folder of the model.", show_default=False)],
    model: Annotated[
        str, Option("--model", "-m", help=f"Encoder: a name ({opt.names('ENCODERS')}), a folder, or a hub id.")
    ] = "all-minilm-l6-v2",
    recipe: Annotated[
        str, Option(help=f"One of {opt.names('RECIPES')}.", rich_help_panel=opt.TRAINING)
    ] = geep.TrainSettings.recipe,
    fit_exits: Annotated[
        bool,
        Option(
            "--fit-exits",
            help="After a recipe that trains exits, fit others in their place, as `fitted` does.",
            rich_help_panel=opt.TRAINING,
        ),
    ] = geep.TrainSettings.fit_exits,
    encoder_layers: Annotated[
        int | None,
        Option(
            help="Train the encoder's first so many layers alone: with `--recipe vanilla` a shallower model.",
            rich_help_panel=opt.TRAINING,
        ),
    ] = None,
    unlabelled: Annotated[
        Path | None,
        Option(
            help="File of further texts, labels in it are not read: exits are fitted on them, too.",
            rich_help_panel=opt.TRAINING,
        ),
    ] = None,
    head: Annotated[
        str,
        Option(
            help=f"The full model's classifier, and that of exits which the recipe trains: {opt.names('HEADS')}.",
            rich_help_panel=opt.TRAINING,
        ),
    ] = "mean",
    exit_head: Annotated[
        str, Option(help=f"Classifier of exits that are fitted: {opt.names('HEADS')}.", rich_help_panel=opt.TRAINING)
    ] = "conv",
    exit_layers: Annotated[
        str | None,
        Option(help="Layers with an exit, as 1,2,4. Default: all but the last two.", rich_help_panel=opt.TRAINING),
    ] = None,
    epochs: Annotated[
        float, Option(help="Passes over the training rows; the best is kept.", rich_help_panel=opt.TRAINING)
    ] = geep.TrainSettings.epochs,
    batch_size: Annotated[
        int, Option(help="Texts on a device at a time.", rich_help_panel=opt.TRAINING)
    ] = geep.TrainSettings.batch_size,
    gradient_accumulation: Annotated[
        int, Option(help="Batches to a step.", rich_help_panel=opt.TRAINING)
    ] = geep.TrainSettings.gradient_accumulation,
    learning_rate: Annotated[
        float | None, Option(help="Peak rate. Default: the recipe's.", rich_help_panel=opt.TRAINING)
    ] = None,
    max_length: Annotated[
        int, Option(help="Longest text, tokens: longer ones are cut, now and later.", rich_help_panel=opt.TRAINING)
    ] = geep.TrainSettings.max_length,
    max_train: Annotated[
        int | None, Option(help="Learn from a random part of the rows.", rich_help_panel=opt.TRAINING)
    ] = None,
    holdout: Annotated[
        float,
        Option(
            help="Share of training rows held out to profile and calibrate, if there is no dev split.",
            rich_help_panel=opt.TRAINING,
        ),
    ] = 0.2,
    bf16: Annotated[
        bool,
        Option(
            "--bf16",
            help="Mixed precision; pays on GPUs and on CPUs with AVX-512 BF16.",
            rich_help_panel=opt.TRAINING,
        ),
    ] = geep.TrainSettings.bf16,
    set_: Annotated[
        list[str] | None,
        Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other field of Hugging Face's TrainingArguments; may be repeated.",
            rich_help_panel=opt.TRAINING,
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        Option(
            "--calibrate/--no-calibrate",
            help="Also profile and calibrate, so that the model is ready.",
            rich_help_panel=opt.PROMISE,
        ),
    ] = True,
    max_drop: opt.MaxDrop = None,
    min_agreement: opt.MinAgreement = None,
    confidence: opt.Confidence = 0.95,
    conditional: opt.Conditional = False,
    calibration: opt.CalibrationRows = None,
    data_dir: opt.DataDir = None,
    text_column: opt.TextColumn = "text",
    text_pair_column: opt.TextPairColumn = "text_pair",
    label_column: opt.LabelColumn = "label",
    quoting: opt.Quoting = None,
    seed: opt.Seed = None,
    device: opt.Device = None,
    revision: opt.Revision = None,
    token: opt.Token = None,
    cache_dir: opt.CacheDir = None,
    local_files_only: opt.LocalFilesOnly = False,
    as_json: opt.AsJson = False,
) -> None:
    """Train a classifier with exits, learn its exit table and calibrate it: a folder ready for `geep predict`.

    The encoder is fine-tuned as usual, then exits are fitted to its answers; `--recipe geep-paper` is the paper's
    training in one step. Interrupted, the same command goes on where it stopped.

    Examples:
        geep train reuters-r8 -o models/r8 --max-length 64

        geep train my-folder/ -o models/mine -m bert-base-uncased --bf16 --max-drop 1.0

        geep train sst2 --data-dir data -o models/sst2 --unlabelled more.jsonl

        geep train sst2 --data-dir data -o models/sst2-fb --recipe fastbert --set lr_scheduler_type=cosine
    """
    from geep.data import DATASETS, local_path
    from geep.data.parts import is_cut

    with show.errors(as_json, goes_on=True):
        console = show.console_for(as_json)
        # Refused before an hour of training and not after it.
        _refuse_ignored(context, model, recipe, fit_exits, calibrate)
        asked = opt.promise(max_drop, min_agreement, confidence, conditional=conditional)
        settings = geep.TrainSettings(
            recipe=recipe,
            fit_exits=fit_exits,
            encoder_layers=encoder_layers,
            epochs=epochs,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            learning_rate=learning_rate,
            max_length=max_length,
            bf16=bf16,
            arguments=opt.training_arguments(set_ or []),
        )
        at_hand = local_path(data, data_dir)
        if data in DATASETS and at_hand is None and calibration is None and unlabelled is None:
            columns = ("text_column", "text_pair_column", "label_column", "quoting")
            opt.refuse_ignored(context, columns, f"with {data}, which has columns of its own")
        is_in_data_dir = data_dir is not None and at_hand == data_dir / data
        plan = geep.DataPlan(
            # Where it is, whatever folder later commands are started in.
            data if at_hand is None or is_in_data_dir else str(at_hand.resolve()),
            str(data_dir.resolve()) if data_dir else None,
            holdout,
            max_train,
            text_column,
            text_pair_column,
            label_column,
            quoting=quoting,
            unlabelled=None if unlabelled is None else str(unlabelled.resolve()),
        )
        fitting = geep.FitSettings()
        if seed is not None:
            settings, plan = replace(settings, seed=seed), replace(plan, seed=seed)
            fitting = replace(fitting, seed=seed)
        dataset = plan.load(cache_dir=cache_dir, local_files_only=local_files_only)
        if dataset.dev is not None and is_cut(dataset.dev):
            opt.refuse_ignored(context, ["holdout"], "with a development split of so many rows")
        parts = plan.divide(dataset)
        certifying = rows_to_certify(console, calibration, parts, plan)
        show.rows(console, dataset, parts)
        requested = asdict(asked)
        if calibrate and asked.needs_labels and (parts.profile.labels is None or certifying.labels is None):
            asked = replace(asked, max_accuracy_drop=None, min_agreement=1 - asked.allowed)
            console.print("[yellow]Held-out rows have no labels: the promise is agreement with the full model.[/]")
        with show.bars(console) as progress:
            result = geep.train(
                parts,
                output,
                encoder=model,
                settings=settings,
                head=head,
                exit_head=exit_head,
                fitting=fitting,
                exit_layers=opt.layers(exit_layers),
                plan=plan,
                device=device,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                progress=progress,
            )
        show.trained(console, result)
        summary: dict[str, Any] = {
            "output": str(output),
            "steps": result.steps,
            "seconds": result.seconds,
            "dev": result.dev and asdict(result.dev),
            "learned_nothing": result.learned_nothing,
            "exit_agreements": result.exit_agreements,
            "num_fitted": result.num_fitted,
        }
        if calibrate and settings.makes_exits:
            words = {**requested, "rows": certifying.digest()}
            before = calibration_of(output) if result.was_finished else None
            if before is None:
                summary |= made_ready(console, output, device, parts, certifying, asked, words)
            else:
                is_named = (max_drop, min_agreement, confidence) != (None, None, 0.95)
                named = dict.fromkeys(words, is_named) | {"rows": calibration is not None}
                keep_calibration(console, output, before, {name: words[name] for name in words if named[name]})
                summary["calibration"] = before
        show.document(summary, as_json)


def _refuse_ignored(context: typer.Context, model: str, recipe: str, fit_exits: bool, calibrate: bool) -> None:
    """Refuse options of `geep train` that others rule out."""
    promised = ("max_drop", "min_agreement", "confidence", "conditional", "calibration")
    if not calibrate:
        opt.refuse_ignored(context, promised, "with --no-calibrate")
    if recipe in opt.NAMES["RECIPES"]:
        row = geep.RECIPES[recipe]
        if row.fits_exits:
            opt.refuse_ignored(context, ["fit_exits"], f"with recipe {recipe!r}, which does so")
        elif not fit_exits:
            opt.refuse_ignored(context, ["exit_head", "unlabelled"], f"with recipe {recipe!r} and no --fit-exits")
        if not (row.fits_exits or row.trains_exits or fit_exits):
            asked = ("exit_layers", *(["calibrate"] if calibrate else []), *promised)
            opt.refuse_ignored(context, asked, f"with recipe {recipe!r}, which has no exits")
    if model in opt.NAMES["ENCODERS"] or Path(model).is_dir():
        opt.refuse_ignored(context, ["revision"], f"with {model}, which is not from the hub")


def profile_command(
    model: opt.FolderArgument,
    predictor: Annotated[
        str | None, Option(help=f"{opt.names('PREDICTORS')}. Default: what ranks held-out texts best.")
    ] = None,
    criterion: Annotated[
        str, Option(help=f"agreement (learned from held-out rows), {opt.names('CRITERIA')}.")
    ] = "agreement",
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    backend: opt.Backend = None,
    as_json: opt.AsJson = False,
) -> None:
    """Run all exits of a trained model over its data and learn table, temperatures and criterion from them.

    The rows are those that `geep train` set aside. Do it again for another backend or dtype: exits differ.

    Examples:
        geep profile models/r8

        geep profile models/r8 --predictor counts --criterion entropy
    """
    with show.errors(as_json):
        console = show.console_for(as_json)
        _, parts = geep.parts_of(model)
        if dtype == "int8" and backend in (None, "packed"):
            plain = geep.Engine.from_pretrained(model, exits=False, device=device, dtype="float32", backend="packed")
            engine = geep.quantise(plain, parts.train)
        else:
            engine = geep.Engine.from_pretrained(model, exits=False, device=device, dtype=dtype, backend=backend)
        found = run_profile(console, engine, parts, kind=predictor, criterion=criterion)
        found.save(model)
        show.document(found.record(), as_json)


# --------------------------------------------------------------------------------------------------------------------
# Steps that several commands take
# --------------------------------------------------------------------------------------------------------------------


def rows_to_certify(console: Console, calibration: Path | None, parts: geep.Parts, plan: geep.DataPlan) -> geep.Split:
    """The rows of a file that was named, or those that were held out, less those that were learned or chosen on."""
    rows, where = parts.calibration, "the held-out rows"
    if calibration is not None:
        kind: dict[str, Any] = {"label_names": parts.label_names, "multi_label": parts.multi_label}
        rows, where = geep.load_split(calibration, **kind, **plan.columns), f"the rows of {calibration}"
    fresh = geep.unseen(rows, *parts.learned)
    if len(fresh) < len(rows):
        console.print(
            f"[yellow]{len(rows) - len(fresh):,} of {escape(where)} were trained or profiled on and are left out.[/]",
            soft_wrap=True,
        )
    return fresh


def run_profile(
    console: Console,
    engine: geep.Engine,
    parts: geep.Parts,
    *,
    kind: str | None = None,
    criterion: str = "agreement",
) -> geep.ProfileResult:
    """Profile and show what was learned; it is not written yet."""
    with show.bars(console) as progress:
        found = geep.profile(engine, parts.teaching, parts.profile, kind=kind, criterion=criterion, progress=progress)
    show.profiled(console, found, len(parts.profile))
    return found


def calibration_of(folder: Path) -> dict[str, Any] | None:
    """What a folder says of its calibration; nothing where its exits were made otherwise, None where there are none."""
    try:
        return dict(geep.CalibrationFile.read(folder).record.get("calibration") or {})
    except FileNotFoundError:
        return None


def keep_calibration(console: Console, folder: Path, before: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Say that a finished folder stays as it is; refuse what was asked for by name and is not what it was made for."""
    known = before.get("asked") or {}
    if any(known.get(name) != value for name, value in asked.items()):
        raise ValueError(
            f"{folder} is trained already, and its exits were made for another promise or on other rows than those "
            f"asked for. Nothing was changed; run `geep calibrate {folder}` with the same options."
        )
    speed = geep.CalibrationFile.read(folder).settings["speed"]
    console.print(
        f"Trained already, with exits at speed {speed:g}; nothing was changed. `geep calibrate` finds another speed.",
        soft_wrap=True,
    )


def made_ready(
    console: Console,
    folder: Path,
    device: str | None,
    parts: geep.Parts,
    fresh: geep.Split,
    promise: geep.Promise,
    asked: Mapping[str, Any],
) -> dict[str, Any]:
    """Profile and calibrate a trained model, in float32 where rounding alone costs more than is promised."""
    from geep.calibration import RoundedTooFarError

    engine = geep.Engine.from_pretrained(folder, device=device, exits=False)
    why = f"In {engine.deployment.dtype} not even the full model is certified."
    try:
        found = run_profile(console, engine, parts)
        done = run_calibration(console, found, fresh, folder, promise, asked)
    except RoundedTooFarError as error:
        why, done = str(error), {"certificate": None}
    if engine.deployment.is_rounded and done["certificate"] is None and "refused" not in done:
        console.print(f"[yellow]{escape(why)} Calibrating in float32.[/]", soft_wrap=True)
        engine = geep.Engine.from_pretrained(folder, device=device, exits=False, dtype="float32")
        found = run_profile(console, engine, parts)
        done = run_calibration(console, found, fresh, folder, promise, asked)
    return {"profile": found.record(), "calibration": done}


def run_calibration(
    console: Console,
    found: geep.ProfileResult,
    fresh: geep.Split,
    folder: Path,
    promise: geep.Promise,
    asked: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Calibrate as the last step of training and write profile and calibration at once.

    That nothing can be certified is a message here, not the end.
    """
    try:
        with show.bars(console) as progress:
            result = geep.calibrate(found.engine, found.heldout, fresh, promise, progress=progress)
    except geep.NothingCertifiedError as refusal:
        console.print(f"[yellow]Not calibrated:[/] {escape(str(refusal))}", soft_wrap=True)
        geep.save_refusal(found.engine, folder, refusal, profile=found.record(), asked=asked)
        return {"speed": 0.0, "refused": str(refusal), "certificate": None}
    result.save(folder, profile=found.record(), asked=asked)
    show.calibrated(console, result)
    return result.record()
