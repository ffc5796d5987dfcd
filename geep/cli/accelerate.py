"""The command that makes a fine-tuned classifier faster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import geep
from geep.cli import options as opt, show

Option = typer.Option

_DEFAULT_AGREEMENT = 0.99


def accelerate_command(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="A fine-tuned sequence classifier of Hugging Face: a folder, or a model of the hub.",
            show_default=False,
        ),
    ],
    texts: Annotated[
        Path,
        Option("--texts", help="File of texts like those to come, some thousands; no labels.", show_default=False),
    ],
    output: Annotated[Path, Option("--output", "-o", help="Folder of the model.", show_default=False)],
    min_agreement: opt.MinAgreement = None,
    max_drop: opt.MaxDrop = None,
    confidence: opt.Confidence = 0.95,
    conditional: opt.Conditional = False,
    calibration: opt.CalibrationRows = None,
    exit_layers: Annotated[
        str | None,
        Option(help="Layers with an exit, as 1,2,4. Default: all but the last two.", rich_help_panel=opt.TRAINING),
    ] = None,
    head: Annotated[str, Option(help=f"Exit classifier: {opt.names('HEADS')}.", rich_help_panel=opt.TRAINING)] = "conv",
    max_length: Annotated[
        int | None,
        Option(
            help="Longest text, tokens: longer ones are cut, now and later. Default: the classifier's limit.",
            rich_help_panel=opt.TRAINING,
        ),
    ] = None,
    any_pace: Annotated[
        bool,
        Option(
            "--any-pace",
            help="Keep a certified speed that is slower here than the full model: for another machine.",
            rich_help_panel=opt.PROMISE,
        ),
    ] = False,
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
    """Make a fine-tuned classifier faster, of texts without labels: it stays as it is and gets exits that answer as it.

    Unless another promise is named, 99 % of texts are answered as before. Killed, the same command goes on.

    Examples:
        geep accelerate my-classifier/ --texts texts.jsonl -o models/fast

        geep accelerate you/sentiment --texts texts.csv --text-column body -o models/fast --min-agreement 0.98

        geep accelerate my-classifier/ --texts texts.jsonl -o models/fast --max-drop 0.5 --calibration labelled.jsonl
    """
    with show.errors(as_json, goes_on=True):
        console = show.console_for(as_json)
        if max_drop is None and min_agreement is None:
            min_agreement = _DEFAULT_AGREEMENT
        promise = opt.promise(max_drop, min_agreement, confidence, conditional=conditional)
        if Path(model).is_dir():
            opt.refuse_ignored(context, ["revision"], f"with {model}, which is not from the hub")
        columns: dict[str, Any] = {
            "text_column": text_column,
            "text_pair_column": text_pair_column,
            "quoting": quoting,
        }
        hub: dict[str, Any] = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        if calibration is None:
            opt.refuse_ignored(context, ["label_column"], "without --calibration")
        rows = geep.load_split(texts, require_label=False, **columns)
        named = None
        if calibration is not None:
            named = _labelled(model, calibration, hub, {**columns, "label_column": label_column})
        settings = geep.FitSettings() if seed is None else replace(geep.FitSettings(), seed=seed)
        with show.bars(console) as progress:
            result = geep.accelerate(
                model,
                rows,
                output,
                promise=promise,
                calibration=named,
                exit_layers=opt.layers(exit_layers),
                head=head,
                settings=settings,
                max_length=max_length,
                check_pace=not any_pace,
                device=device,
                progress=progress,
                **hub,
            )
        show.accelerated(console, result, output)
        show.document({"output": str(output), **result.record()}, as_json)


def _labelled(model: str, path: Path, hub: dict[str, Any], columns: dict[str, Any]) -> geep.Split:
    """Rows that certify, their labels numbered as the classifier numbers them."""
    from geep.folder import HubOptions, reachable
    from geep.modeling import classifier_config, label_names_of

    config = classifier_config(model, **reachable(model, HubOptions(**hub)).keywords())
    return geep.load_split(
        path,
        label_names=label_names_of(config),
        require_label=False,
        multi_label=config.problem_type == "multi_label_classification",
        **columns,
    )
