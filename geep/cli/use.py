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
_OF_FILES = ("target", "overwrite", "scores", "chunk_rows", "text_column", "text_pair_column", "quoting")


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
    quoting: opt.Quoting = None,
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
            opt.refuse_ignored(
                context, ("text_column", "text_pair_column", "label_column", "quoting"), "without a file"
            )
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
            {
                "text_column": text_column,
                "text_pair_column": text_pair_column,
                "label_column": label_column,
                "quoting": quoting,
            },
            {"cache_dir": cache_dir, "local_files_only": local_files_only},
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
    model: str,
    engine: geep.Engine,
    data: str | None,
    columns: Mapping[str, str | bool | None],
    network: Mapping[str, Any],
) -> tuple[geep.Split, str]:
    """The rows of the file named, else of the test split trained with; and what to call them."""
    if data is not None:
        kind: dict[str, Any] = {"label_names": engine.label_names, "multi_label": engine.multi_label}
        return geep.load_split(data, **kind, **_columns_to_read(model, **columns)), data
    record = geep.Provenance.read(model)
    plan = geep.DataPlan(**record.data)
    dataset = plan.load(**network)
    record.check_labels(dataset.label_names)
    test = dataset.test
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
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace the file to write if it exists, or a part of it by other settings.")
    ] = False,
    text: Annotated[list[str] | None, Option("--text", "-t", help="Classify this text; may be repeated.")] = None,
    text_pair: Annotated[
        list[str] | None, Option(help="Second text of each --text, for a model of pairs; as often as --text.")
    ] = None,
    speed: opt.Speed = None,
    scores: Annotated[bool, Option("--scores", help="Also write the score of every label.")] = False,
    top_k: Annotated[int | None, Option(help="Scores of the k most likely labels only. Default: of all.")] = None,
    threshold: Annotated[float, Option(help="Score from which a label holds, where a text may have several.")] = 0.5,
    chunk_rows: Annotated[
        int, Option(help="Rows held in memory at a time; small chunks take longer, each waits for the disk.")
    ] = 4096,
    text_column: opt.OtherColumn = None,
    text_pair_column: opt.OtherColumn = None,
    quoting: opt.Quoting = None,
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
    same command goes on where it stopped; what comes through a pipe starts over. Where no row could be classified,
    or a bad row takes in more than 1,000 lines, the exit code is 2.

    Examples:
        geep predict models/r8 news.jsonl -o labelled.jsonl

        zcat news.jsonl.gz | geep predict models/r8 - -o - | head

        geep predict models/r8 --text "oil prices rose again" --text "wheat exports fell"

        geep predict models/rte --text "Oil prices rose." --text-pair "Oil became cheaper."
    """
    from geep.data import is_stream

    to_output, from_pipe = str(target) == "-", source is not None and is_stream(source)
    with show.errors(as_json, goes_on=not (source is None or to_output or from_pipe)):
        # Standard output belongs to the rows, if they go there.
        console = show.console_for(as_json or to_output)
        if (source is None) == (not text):
            raise ValueError("Give a file, or texts with --text; got " + ("neither." if source is None else "both."))
        if text:
            opt.refuse_ignored(context, _OF_FILES, "with --text")
        texts = opt.inputs(text or [], text_pair or [])
        _refuse_revision(context, model)
        if as_json and to_output:
            raise ValueError("--json and --output - both take standard output; write the rows to a file.")
        if from_pipe and target is None:
            found = "from standard input" if str(source) == "-" else f"through the pipe {source}"
            raise ValueError(f"What comes {found} has no name: say with --output where the answers go.")
        if to_output:
            opt.refuse_ignored(context, ["overwrite"], "with --output -")
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
            answers = answer_texts(engine, texts, top_k=top_k, threshold=threshold)
            show.predictions(console, answers, multi_label=engine.multi_label)
            show.document(answers, as_json)
            return
        goal = result_file(source) if target is None else target
        try:
            with show.bars(console) as progress:
                result = geep.score_file(
                    engine,
                    source,
                    goal,
                    **_columns_to_read(
                        model, text_column=text_column, text_pair_column=text_pair_column, quoting=quoting
                    ),
                    chunk_rows=chunk_rows,
                    scores=scores or top_k is not None,
                    top_k=top_k,
                    threshold=threshold,
                    overwrite=overwrite,
                    progress=progress,
                )
        except BrokenPipeError:
            if not to_output:
                raise
            show.reader_left()  # `head` has read enough
            return
        show.scored(console, result, goal, engine.depths[-1])
        drift = _drift(engine, result.traffic)
        if drift is not None:
            show.drifted(console, drift)
        more = {"exit_layer_counts": result.exit_layer_counts, "drift": None if drift is None else drift.to_dict()}
        told = {name: value for name, value in asdict(result).items() if name != "traffic"}  # of which both are made
        show.document({**told, **more, "output": str(goal)}, as_json)
        if (not result.rows and result.num_bad) or show.hides_rows(result):
            raise typer.Exit(2)  # scripts that look at nothing else should not go on with what is left


def _drift(engine: geep.Engine, traffic: geep.Traffic) -> geep.Drift | None:
    """How far rows are from those that certified the engine; None where nothing is certified, or no row was scored."""
    certificate = engine.certificate
    if certificate is None or certificate.traffic is None or not traffic.num_texts:
        return None
    return geep.Drift.between(certificate.traffic, traffic)


def _columns_to_read(model: str, **given: str | bool | None) -> dict[str, Any]:
    """How columns are found, as it was said, else as trained; nothing where there is no record of that."""
    chosen = {name: column for name, column in given.items() if column is not None}
    try:
        data = geep.Provenance.read(model).about.get("data")
    except FileNotFoundError:
        return chosen
    trained = {} if data is None else geep.DataPlan(**data).columns
    return {name: column for name, column in trained.items() if name in given} | chosen


def result_file(source: Path) -> Path:
    """Where the answers to a file go unless it is said."""
    from geep.data import file_format

    return source.with_name(f"{source.name.removesuffix(file_format(source))}.predictions.jsonl")


def answer_texts(
    engine: geep.Engine, texts: Sequence[str | tuple[str, str]], *, top_k: int | None = None, threshold: float = 0.5
) -> list[dict[str, Any]]:
    """Texts, or pairs of them, with their answers, as plain records."""
    found = engine.predict(texts, top_k=top_k, threshold=threshold)
    said = [{"text": text} if isinstance(text, str) else {"text": text[0], "text_pair": text[1]} for text in texts]
    return [{**text, **asdict(answer)} for text, answer in zip(said, found, strict=True)]
