"""The command line: accelerate, train, profile, calibrate, evaluate, predict, demo, datasets.

A thin coat over the public API: commands parse arguments, call what any Python user would call (`geep.train`,
`geep.profile`, …) and show what comes back. What they compute is computed elsewhere. Every command takes `--json` for
machines: one JSON document on standard output, everything else on standard error.

Nothing here imports torch: `geep` looks its names up when they are first asked for, so that help is there at once.
Read `options.py`, `accelerate.py`, `make.py`, `calibrate.py`, `use.py`, `demo.py`, `datasets.py`, `show.py`.
"""

import sys
from typing import Annotated

import typer

from geep._version import __version__
from geep.cli.accelerate import accelerate_command
from geep.cli.calibrate import calibrate_command
from geep.cli.datasets import datasets_command
from geep.cli.demo import demo_command
from geep.cli.make import profile_command, train_command
from geep.cli.use import evaluate_command, predict_command

app = typer.Typer(
    name="geep",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

app.command(name="demo", rich_help_panel="Start here")(demo_command)
app.command(name="datasets", rich_help_panel="Start here")(datasets_command)
app.command(name="accelerate", rich_help_panel="Make a model")(accelerate_command)
app.command(name="train", rich_help_panel="Make a model")(train_command)
app.command(name="profile", rich_help_panel="Make a model")(profile_command)
app.command(name="calibrate", rich_help_panel="Make a model")(calibrate_command)
app.command(name="evaluate", rich_help_panel="Use a model")(evaluate_command)
app.command(name="predict", rich_help_panel="Use a model")(predict_command)


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
