"""Options that several commands share, the same words everywhere, and words made into records.

The names listed in help texts are those of tables whose rooms load torch; a test holds the two together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import geep

NAMES: dict[str, tuple[str, ...]] = {
    "ENCODERS": ("all-minilm-l6-v2",),
    "RECIPES": (
        "fitted",
        "tune",
        "geep",
        "geep-paper",
        "fastbert",
        "deebert",
        "pabee",
        "berxit",
        "gradient-equilibrium",
        "mixed",
        "vanilla",
    ),
    "HEADS": ("attention", "cls", "conv", "mean", "mean+max"),
    "PREDICTORS": ("counts", "fitted"),
    "CRITERIA": ("entropy", "confidence", "margin"),
    "BACKENDS": ("packed", "padded", "cuda"),
    "DTYPES": ("float32", "bfloat16", "float16", "int8"),
}
"""Names of rows that help texts list, by the table they are rows of."""


def names(table: str) -> str:
    """The rows of a table in words."""
    return ", ".join(NAMES[table])


# Panels of `--help`, in the order in which a newcomer needs them.
DATA, TRAINING, PROMISE, RUNNING, HUB = "Data", "Training", "Promise", "How it runs", "Hugging Face hub"
FEW_LABELS = "Few labels"

DataArgument = Annotated[
    str,
    typer.Argument(
        help="A folder with train/dev/test files, or the name of one under --data-dir, or one file (.jsonl, .csv, "
        ".parquet, also .gz), or a data set that `geep datasets` lists, such as reuters-r8.",
        show_default=False,
    ),
]
ModelArgument = Annotated[
    str, typer.Argument(help="Model folder written by `geep train`, or such a model of the hub.", show_default=False)
]
FolderArgument = Annotated[Path, typer.Argument(help="Model folder written by `geep train`.", show_default=False)]

DataDir = Annotated[Path | None, typer.Option(help="Folder of data set folders.", rich_help_panel=DATA)]
TextColumn = Annotated[str, typer.Option(help="Column of the text.", rich_help_panel=DATA)]
TextPairColumn = Annotated[
    str, typer.Option(help="Column of the second text, where there is one.", rich_help_panel=DATA)
]
Quoting = Annotated[
    bool | None,
    typer.Option(
        "--quoting/--no-quoting",
        help="Whether quotes enclose fields of CSV and TSV. Default: in CSV, not in TSV.",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
LabelColumn = Annotated[str, typer.Option(help="Column of the label.", rich_help_panel=DATA)]
OtherColumn = Annotated[
    str | None, typer.Option(help="Of the file named. Default: as trained.", rich_help_panel=DATA, show_default=False)
]
Seed = Annotated[int | None, typer.Option(help="Seed of all that is drawn. Default: a fixed one.")]

MaxDrop = Annotated[
    float | None,
    typer.Option(
        help="Accuracy lost against the full model, at most, in points. Default: 0.5.", rich_help_panel=PROMISE
    ),
]
MinAgreement = Annotated[
    float | None,
    typer.Option(
        help="Instead: share answered as the full model answers, at least, such as 0.99. Needs no labels.",
        rich_help_panel=PROMISE,
    ),
]
Confidence = Annotated[float, typer.Option(help="How sure the promise is.", rich_help_panel=PROMISE)]
CalibrationRows = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="File of rows like those to come, on which the promise is certified instead of the held-out rows; those "
        "that were trained on are left out.",
        rich_help_panel=PROMISE,
    ),
]
Conditional = Annotated[
    bool,
    typer.Option(
        "--conditional",
        help="The promise must also hold among the texts that are answered by each layer: early ones pay no more.",
        rich_help_panel=PROMISE,
    ),
]
OnMissOption = Annotated[
    str,
    typer.Option(help="Unsure at the predicted exit: 'continue', or 'stop' as the paper.", rich_help_panel=PROMISE),
]
Lexical = Annotated[
    bool | None,
    typer.Option(
        "--lexical/--no-lexical", help="Answers by the table alone. Default: if they pay.", rich_help_panel=PROMISE
    ),
]

Speed = Annotated[
    float | None,
    typer.Option(help="Exit once uncertainty is below this, 0 (full model) to 1. Default: the calibrated speed."),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, … Default: a GPU where there is one.", rich_help_panel=RUNNING)
]
Dtype = Annotated[
    str | None,
    typer.Option(help=f"{names('DTYPES')} (int8: on CPUs). Default: by device.", rich_help_panel=RUNNING),
]
Backend = Annotated[
    str | None,
    typer.Option(help=f"{names('BACKENDS')}. Default: by encoder and device.", rich_help_panel=RUNNING),
]
MaxBatchTokens = Annotated[
    int | None,
    typer.Option(help="Tokens of a staircase. Default: by the encoder's size.", rich_help_panel=RUNNING),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model of the hub.", rich_help_panel=HUB)]
Token = Annotated[
    str | None,
    typer.Option(
        help="Access token. Default: the stored one.", envvar="HF_TOKEN", show_envvar=True, rich_help_panel=HUB
    ),
]
CacheDir = Annotated[
    Path | None, typer.Option(help="Where downloads are kept. Default: the hub's cache.", rich_help_panel=HUB)
]
LocalFilesOnly = Annotated[
    bool, typer.Option("--local-files-only", help="Use what is in the cache and ask no network.", rich_help_panel=HUB)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, for machines.")]


def refuse_ignored(context: typer.Context, names: Iterable[str], where: str) -> None:
    """Refuse options that were given on the command line and that would change nothing.

    Args:
        context: Of the command.
        names: Its parameters that are not looked at.
        where: When they are not, in words that go on from "would change nothing".

    Raises:
        ValueError: With the options that were given.
    """
    known = {str(parameter.name): max(parameter.opts, key=len) for parameter in context.command.params}
    # A token or another option from the environment is there for all commands.
    sources = {name: context.get_parameter_source(name) for name in names}
    given = [known[name] for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        raise ValueError(f"{', '.join(given)} would change nothing {where}; leave it out.")


def layers(text: str | None) -> Sequence[int] | None:
    """Layer numbers of a list by commas; None for none given."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise ValueError(f"--exit-layers takes layer numbers by commas, as 1,2,4; got {text!r}.")
    return [int(part) for part in parts]


def inputs(texts: Sequence[str], second: Sequence[str]) -> list[str] | list[tuple[str, str]]:
    """The texts of --text, with those of --text-pair where there are some."""
    if not second:
        return list(texts)
    if len(second) != len(texts):
        raise ValueError(f"Every --text needs one --text-pair; got {len(texts)} and {len(second)}.")
    return list(zip(texts, second, strict=True))


def promise(
    max_drop: float | None, min_agreement: float | None, confidence: float, *, conditional: bool = False
) -> geep.Promise:
    """The promise that options name; half a point of accuracy if they name none.

    Raises:
        ValueError: If they name two, or a number that is out of range; in the words and units of the options.
    """
    if max_drop is not None and min_agreement is not None:
        raise ValueError(
            f"A model keeps one promise, got --max-drop {max_drop:g} and --min-agreement {min_agreement:g}."
        )
    if max_drop is None and min_agreement is None:
        max_drop = 0.5
    if max_drop is not None and not 0 < max_drop < 100:
        raise ValueError(
            f"--max-drop is in points of accuracy, above 0 and below 100: 0.5 is half a point; got {max_drop:g}."
        )
    if min_agreement is not None and not 0 < min_agreement < 1:
        raise ValueError(f"--min-agreement is a share, above 0 and below 1: 0.99 is 99 %; got {min_agreement:g}.")
    if not 0.5 <= confidence < 1:
        raise ValueError(f"--confidence is a share, at least 0.5 and below 1: 0.95 is 95 %; got {confidence:g}.")
    return geep.Promise(None if max_drop is None else max_drop / 100, min_agreement, confidence, conditional)


def on_miss(value: str) -> Literal["stop", "continue"]:
    """The rule on a miss."""
    if value == "stop":
        return "stop"
    if value == "continue":
        return "continue"
    raise ValueError(f"--on-miss is 'stop' or 'continue', got {value!r}.")


def training_arguments(assignments: Sequence[str]) -> dict[str, Any]:
    """Values by name from a list of NAME=VALUE; a value that is no JSON is a string."""
    found: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name:
            raise ValueError(f"--set takes NAME=VALUE, as lr_scheduler_type=cosine; got {assignment!r}.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
