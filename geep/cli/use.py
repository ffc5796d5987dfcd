"""Commands that use a model: evaluate, predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

import geep
from geep.cli import options as opt, show

Option = typer.Option

# Options of `geep predict` that are about the file that is read or written.
_OF_FILES = ("target", "overwrite", "scores", "chunk_rows", "text_column", "text_pair_column")


def evaluate_command(
    context: typer.Context,
    model: opt.ModelArgument,
    data: Annotated[
        str | None, typer.Argument(help="A labelled file. Default: the test split trained with.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, Option("--output", "-o", help="Folder of report and figure. Default: the model's.")
    ] = None,
    max_texts: Annotated[int, Option(help="Bound on the texts of the timed part.")] = 512,
    rounds: Annotated[int, Option(help="Rounds of timing; every rival runs once a round.")] = 3,
    speed: opt.Speed = None,
    text_column: opt.OtherColumn = None,
    text_pair_column: opt.OtherColumn = None,
    label_column: opt.OtherColumn = None,
    seed: opt.Seed = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    backend: opt.Backend = None,
    max_batch_tokens: opt.MaxBatchTokens = None,
    revision: opt.Revision = None,
    token: opt.Token = None,
    cache_dir: opt.CacheDir = None,
    local_files_only: opt.LocalFilesOnly = False,
    as_json: opt.AsJson = False,
) -> None:
    """Measure the model beside its rivals, in one interleaved run: table, JSON lines and a figure.

    Full model (HF pipeline, length-sorted, packed), every constant depth, FastBERT's shrinking batch, random depths,
    GEEP stop and continue, the oracle.

    Examples:
        geep evaluate models/r8

        geep evaluate models/r8 my-test.jsonl --max-texts 2000 --rounds 5
    """
    with show.errors(as_json):
        console = show.console_for(as_json)
        if data is None:
            opt.refuse_ignored(context, ("text_column", "text_pair_column", "label_column"), "without a file")
        _refuse_revision(context, model)
        engine = geep.Engine.from_pretrained(
            model,
            speed=speed,
            device=device,
            dtype=dtype,
            backend=backend,
            max_batch_tokens=max_batch_tokens,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        test, title = _rows_to_judge(
            model,
            engine,
            data,
            {"text_column": text_column, "text_pair_column": text_pair_column, "label_column": label_column},
        )
        if output is None and not Path(model).is_dir():
            raise ValueError(f"{model} is no folder that a report could be written to; name one with --output.")
        folder = Path(model) if output is None else output
        folder.mkdir(parents=True, exist_ok=True)
        report = run_evaluation(console, engine, test, folder, max_texts, rounds, title=title, seed=seed or 0)
        summary = {"headline": asdict(geep.headline(report)), "report": asdict(report), "folder": str(folder)}
        show.document(summary, as_json)


def _refuse_revision(context: typer.Context, model: str) -> None:
    if Path(model).is_dir():
        opt.refuse_ignored(context, ["revision"], f"with {model}, which is not from the hub")


def _rows_to_judge(
    model: str, engine: geep.Engine, data: str | None, columns: Mapping[str, str | None]
) -> tuple[geep.Split, str]:
    """The rows of the file named, else of the test split trained with; and what to call them."""
    try:
        plan = geep.DataPlan(**geep.Provenance.read(model).data)
    except FileNotFoundError:
        if data is None:
            raise
        plan = geep.DataPlan(data)  # a model without the record of its training: the usual columns
    if data is not None:
        given = {name: column for name, column in columns.items() if column is not None}
        kind: dict[str, Any] = {"label_names": engine.label_names, "multi_label": engine.multi_label}
        return geep.load_split(data, **kind, **(plan.columns | given)), data
    test = plan.load().test
    if test is None:
        raise ValueError(f"{plan.name} has no test split; name a labelled file: geep evaluate {model} FILE.")
    return test, plan.name


def run_evaluation(
    console: Console,
    engine: geep.Engine,
    test: geep.Split,
    folder: Path,
    max_texts: int,
    rounds: int,
    *,
    title: str,
    seed: int = 0,
) -> geep.EvaluationReport:
    """Race the rivals, write report and figure, show them."""
    with show.bars(console) as progress:
        found = geep.evaluate(engine, test, max_texts=max_texts, rounds=rounds, seed=seed, progress=progress)
    settings, name = engine.settings, Path(title).name
    found.save(
        folder / "evaluation.jsonl",
        data=name,
        encoder_layers=engine.depths[-1],
        criterion=settings.criterion,
        quantile=settings.quantile,
        lexical_exit=settings.lexical_exit,
        calibrated_speed=settings.speed if engine.certificate else None,
    )
    geep.draw(found, folder / "evaluation.png", title=f"{name}, {engine.depths[-1]} layers")
    show.evaluated(console, found)
    if engine.certificate is None:
        console.print("[yellow]No promise covers this engine as it runs here: its speed is not certified.[/]")
    console.print(escape(f"Written: {folder / 'evaluation.jsonl'}, {folder / 'evaluation.png'}"), soft_wrap=True)
    return found


def predict_command(
    context: typer.Context,
    model: opt.ModelArgument,
    source: Annotated[
        Path | None,
        typer.Argument(
            help="File to classify (.jsonl, .csv, .parquet, also .gz); - is standard input.", show_default=False
        ),
    ] = None,
    target: Annotated[
        Path | None,
        Option(
            "--output",
            "-o",
            help="File to write; - is standard output, as JSON lines. Default: beside the source, as "
            "NAME.predictions.jsonl.",
        ),
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the file to write if it exists.")] = False,
    text: Annotated[list[str] | None, Option("--text", "-t", help="Classify this text; may be repeated.")] = None,
    speed: opt.Speed = None,
    scores: Annotated[bool, Option("--scores", help="Also write the score of every label.")] = False,
    top_k: Annotated[int | None, Option(help="Scores of the k most likely labels only. Default: of all.")] = None,
    threshold: Annotated[float, Option(help="Score from which a label holds, where a text may have several.")] = 0.5,
    chunk_rows: Annotated[int, Option(help="Rows held in memory at a time.")] = 4096,
    text_column: opt.TextColumn = "text",
    text_pair_column: opt.TextPairColumn = "text_pair",
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    backend: opt.Backend = None,
    max_batch_tokens: opt.MaxBatchTokens = None,
    revision: opt.Revision = None,
    token: opt.Token = None,
    cache_dir: opt.CacheDir = None,
    local_files_only: opt.LocalFilesOnly = False,
    as_json: opt.AsJson = False,
) -> None:
    """Classify a file, or texts given with --text: label, score and exit layer for each.

    Streams in bounded memory and keeps the order. Bad rows are reported with their line and left out. Killed, the
    same command goes on where it stopped; what comes through a pipe starts over.

    Examples:
        geep predict models/r8 news.jsonl -o labelled.jsonl

        zcat news.jsonl.gz | geep predict models/r8 - -o - | head

        geep predict models/r8 --text "oil prices rose again" --text "wheat exports fell"
    """
    with show.errors(as_json):
        to_output = str(target) == "-"
        # Standard output belongs to the rows, if they go there.
        console = show.console_for(as_json or to_output)
        if (source is None) == (not text):
            raise ValueError("Give a file, or texts with --text; got " + ("neither." if source is None else "both."))
        if text:
            opt.refuse_ignored(context, _OF_FILES, "with --text")
        _refuse_revision(context, model)
        if as_json and to_output:
            raise ValueError("--json and --output - both take standard output; write the rows to a file.")
        engine = geep.Engine.from_pretrained(
            model,
            speed=speed,
            device=device,
            dtype=dtype,
            backend=backend,
            max_batch_tokens=max_batch_tokens,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        if not engine.multi_label:
            opt.refuse_ignored(context, ["threshold"], "with a model that gives each text one label")
        if len(engine.depths) == 1:
            opt.refuse_ignored(context, ["speed"], "with a model that has no exits")
        if source is None:
            answers = answer_texts(engine, text or [], top_k=top_k, threshold=threshold)
            show.predictions(console, answers, multi_label=engine.multi_label)
            show.document(answers, as_json)
            return
        with show.bars(console) as progress:
            goal = result_file(source) if target is None else target
            result = geep.score_file(
                engine,
                source,
                goal,
                text_column=text_column,
                text_pair_column=text_pair_column,
                chunk_rows=chunk_rows,
                scores=scores or top_k is not None,
                top_k=top_k,
                threshold=threshold,
                overwrite=overwrite,
                progress=progress,
            )
        show.scored(console, result, goal, engine.depths[-1])
        show.document({**asdict(result), "output": str(goal)}, as_json)


def result_file(source: Path) -> Path:
    """Where the answers to a file go unless it is said."""
    from geep.data import file_format

    if str(source) == "-":
        raise ValueError("What comes from standard input has no name: say with --output where the answers go.")

    return source.with_name(f"{source.name.removesuffix(file_format(source))}.predictions.jsonl")


def answer_texts(
    engine: geep.Engine, texts: Sequence[str], *, top_k: int | None = None, threshold: float = 0.5
) -> list[dict[str, Any]]:
    """Texts with their answers, as plain records."""
    found = engine.predict(texts, top_k=top_k, threshold=threshold)
    return [{"text": text, **asdict(answer)} for text, answer in zip(texts, found, strict=True)]
