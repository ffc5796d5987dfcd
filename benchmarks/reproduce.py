"""Every measurement behind docs/results.md, in order, with one command that goes on where it was stopped.

What is in the results already is left out by each script itself, so the same command again costs little. Times are
worth something only on a machine that does nothing else; the other steps may run beside other work.

    python benchmarks/reproduce.py --list
    python benchmarks/reproduce.py --data-dir DATA --model ENCODER --work WORK
    python benchmarks/reproduce.py --data-dir DATA --model ENCODER --work WORK --only certified,cheap

DATA holds a folder for each data set (`geep datasets` names them), ENCODER is any BERT-class encoder, WORK keeps models
and logits between runs. On a GPU run `certified` first: it has the most trainings, several side by side (`--jobs`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from study import STUDY

HERE = Path(__file__).resolve().parent

# Data sets that are raced, and those among them of which other scripts read the logits.
RACED = ("ag_news", "sst2", "thucnews", "trec")
PAIRS = "sst2:yelp_polarity,book_review:shopping"


@dataclass(frozen=True, slots=True)
class Step:
    """A part of the measurements.

    Attributes:
        about: Which question it answers.
        commands: Scripts with their arguments; names in braces are filled in.
        is_timed: Whether it takes times, and wants a machine that does nothing else.
    """

    about: str
    commands: tuple[str, ...]
    is_timed: bool = False


_FOLDERS = " ".join(f"{{runs}}/{name}" for name in RACED)
_ENGINES = "packed:bfloat16,packed:int8={runs}-int8/{{data}}"
_LOGITS = f"--runs-dir {{runs}} --only {','.join(RACED)} --cache {{work}}/logits"

STEPS: dict[str, Step] = {
    "train": Step(
        "the models that the other steps look at",
        (
            f"study.py --data-dir {{data}} --model {{model}} --runs-dir {{runs}} --only {','.join(STUDY)} "
            "--steps train,profile,calibrate,int8",
        ),
    ),
    "accuracy": Step(
        "what is lost on whole test splits",
        (f"accuracy.py --data-dir {{data}} --model-dir {_FOLDERS} --engines {_ENGINES}",),
    ),
    "race": Step(
        "is it faster than what one would run instead?",
        (f"throughput.py --data-dir {{data}} --model-dir {_FOLDERS} --engines {_ENGINES} --minutes 3",),
        is_timed=True,
    ),
    "calls": Step(
        "where does the time of a small call go?",
        (f"calls.py --data-dir {{data}} --folders {_FOLDERS} {{runs}}-int8/ag_news {{runs}}-int8/trec",),
        is_timed=True,
    ),
    "parts": Step(
        "what does each part, and each choice, save?",
        (f"ablation.py {_LOGITS}", f"choices.py {_LOGITS}"),
    ),
    "promises": Step(
        "do promises hold, and does one see when other texts come?",
        (f"guarantee.py {_LOGITS}", f"drift.py --data-dir {{data}} --runs-dir {{runs}} --pairs {PAIRS}"),
    ),
    "certified": Step(
        "which training gives the exits that certify most? All data sets, recipes and seeds",
        ("certified.py --data-dir {data} --model {model} --work {work}/cells --jobs {jobs}",),
    ),
    "cheap": Step(
        "how far does one come without an encoder?",
        ("cheap.py --data-dir {data} --model {model}",),
    ),
    "staircase": Step(
        "the drawing",
        (
            "study.py --data-dir {data} --model {model} --runs-dir {runs} --only trec --steps by-time",
            "staircase.py --data-dir {data} --model-dir {runs}-by-time/trec",
        ),
    ),
    "machine": Step(
        "other encoders, growth, the hash table",
        (
            "families.py",
            "scaling.py --data-dir {data} --model-dir {runs}/thucnews",
            "table_scale.py --texts 1000000",
            "hash_table.py",
        ),
        is_timed=True,
    ),
    "report": Step("figures and documents", ("plot.py", "report.py")),
}


def main() -> None:
    """Parse arguments; list the steps or run them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show the steps and end")
    parser.add_argument("--data-dir", type=Path, help="folder of data set folders")
    parser.add_argument("--model", help="folder of the encoder")
    parser.add_argument("--work", type=Path, help="folder for models and logits")
    parser.add_argument("--only", help="steps, by commas; default: all, in their order")
    parser.add_argument("--jobs", type=int, default=1, help="cells of `certified` side by side")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(STEPS)
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"unknown steps {', '.join(unknown)}; expected some of {', '.join(STEPS)}")
    if args.list:
        show(names)
        return
    if args.data_dir is None or args.model is None or args.work is None:
        parser.error("--data-dir, --model and --work are needed; --list shows what would be run")
    values = {
        "data": str(args.data_dir.resolve()),
        "model": str(args.model),
        "work": str(args.work.resolve()),
        "runs": str(args.work.resolve() / "runs"),
        "jobs": str(args.jobs),
    }
    args.work.mkdir(parents=True, exist_ok=True)
    for name in names:
        for command in STEPS[name].commands:
            run(name, filled(command, values))


def filled(command: str, values: dict[str, str]) -> list[str]:
    """A script and its arguments, each word by itself: paths may hold blanks."""
    return [word.format(**values) for word in command.split()]


def run(name: str, words: list[str]) -> None:
    """Run a script; where it fails, end and say how to go on."""
    script, *arguments = words
    print(f"== {name}: {script} {' '.join(arguments)}", flush=True)
    begin = time.monotonic()
    done = subprocess.run([sys.executable, HERE / script, *arguments], env={**os.environ, "PYTHONUNBUFFERED": "1"})
    print(f"== {name}: {script} took {time.monotonic() - begin:.0f} s", flush=True)
    if done.returncode:
        sys.exit(f"{script} failed with code {done.returncode}; the same command goes on there, --only leaves it out.")


def show(names: list[str]) -> None:
    """Show steps in a table."""
    table = Table()
    for title in ("step", "about", "takes times", "scripts"):
        table.add_column(title)
    for name in names:
        step = STEPS[name]
        scripts = ", ".join(command.split()[0] for command in step.commands)
        table.add_row(name, step.about, "yes" if step.is_timed else "", scripts)
    Console().print(table)


if __name__ == "__main__":
    main()
