"""The whole pipeline on real data sets, with a real encoder: train, profile, calibrate, evaluate; one file a data set.

Measured: what `geep evaluate` measures (quality on the whole test split, time on part of it, all rivals in one
interleaved run), after training with the settings of `STUDY`. Not measured: several seeds.

Every step is a `geep` command and each can be stopped and started again: finished trainings are not repeated. Train in
any load; time on an otherwise idle machine:

    python benchmarks/study.py --data-dir DATA --model ENCODER --steps train,profile
    python benchmarks/study.py --data-dir DATA --model ENCODER --steps calibrate,evaluate

writes benchmarks/results/study-<data set>.jsonl and .png; `make bench` turns them into docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Study:
    """How a data set is trained: as many rows as two cores afford in about a quarter of an hour.

    Attributes:
        epochs: Passes over the rows.
        max_length: Longest text in tokens.
        max_train: Rows trained on; None: all.
        holdout: Share of the rows held out where there is no large development split. None: the command's.
        batch_size: Texts to a step.
        learning_rate: Peak rate; None: the command's.
        unlabelled: Whether exits are fitted on the other training rows, too, whose labels are not read.
    """

    epochs: float
    max_length: int
    max_train: int | None
    holdout: float | None = None
    batch_size: int = 32
    learning_rate: float | None = None
    unlabelled: bool = False


STUDY: dict[str, Study] = {
    "sst2": Study(epochs=2, max_length=64, max_train=8000, batch_size=64, learning_rate=1.5e-4),
    "trec": Study(epochs=3, max_length=64, max_train=None, holdout=0.4),
    "ag_news": Study(epochs=2, max_length=64, max_train=8000, batch_size=64, learning_rate=1.5e-4),
    "thucnews": Study(epochs=2, max_length=64, max_train=8000, batch_size=64, learning_rate=1.5e-4),
    "book_review": Study(epochs=2, max_length=64, max_train=8000, batch_size=64, learning_rate=1.5e-4),
    "lcqmc": Study(epochs=2, max_length=64, max_train=8000, batch_size=64, learning_rate=1.5e-4),
}

# The promise, in points.
MAX_DROP = 0.5


def main() -> None:
    """Parse arguments and run the steps asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of data set folders")
    parser.add_argument("--model", required=True, help="folder of the encoder")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where the trained models go")
    parser.add_argument("--only", help="data sets, by commas; default: all")
    parser.add_argument("--steps", default="train,profile,calibrate,evaluate", help="steps, by commas")
    parser.add_argument("--max-texts", type=int, default=512, help="bound on the timed texts")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(STUDY)
    for name in names:
        study, folder = STUDY[name], args.runs_dir / name
        for step in args.steps.split(","):
            STEPS[step](name, study, folder, args)


def train(name: str, study: Study, folder: Path, args: argparse.Namespace) -> None:
    """Train, unless the folder holds this very training already."""
    limit = [] if study.max_train is None else ["--max-train", str(study.max_train)]
    if study.holdout is not None:
        limit += ["--holdout", str(study.holdout)]
    if study.learning_rate is not None:
        limit += ["--learning-rate", str(study.learning_rate)]
    if study.unlabelled:
        limit += ["--unlabelled", str(next((args.data_dir / name).glob("train.*")))]
    _geep(
        *("train", name, "--data-dir", str(args.data_dir), "--model", args.model, "--output", str(folder)),
        *("--epochs", str(study.epochs), "--max-length", str(study.max_length), "--batch-size", str(study.batch_size)),
        *(*limit, "--bf16", "--no-calibrate"),
    )


def profile(name: str, study: Study, folder: Path, args: argparse.Namespace) -> None:
    """Learn table, temperatures and criterion."""
    _geep("profile", str(folder))


def calibrate(name: str, study: Study, folder: Path, args: argparse.Namespace) -> None:
    """Certify the promise."""
    _geep("calibrate", str(folder), "--max-drop", str(MAX_DROP))


def int8(name: str, study: Study, folder: Path, args: argparse.Namespace) -> None:
    """Certify the same promise in 8 bits, in a copy; refused, it stays uncertified."""
    _in_a_copy(folder, "int8", ("profile", "--dtype", "int8"), ("calibrate", "--max-drop", str(MAX_DROP)))


def by_time(name: str, study: Study, folder: Path, args: argparse.Namespace) -> None:
    """Certify the same promise with settings chosen for the least time, in a copy."""
    _in_a_copy(folder, "by-time", ("calibrate", "--by-time", "--max-drop", str(MAX_DROP)))


def _in_a_copy(folder: Path, kind: str, *commands: tuple[str, ...]) -> None:
    """Run commands on a copy of a folder, in a folder of copies beside the others; a copy that is there is kept."""
    copy = folder.parent.with_name(f"{folder.parent.name}-{kind}") / folder.name
    if copy.exists():
        return
    shutil.copytree(folder, partial := copy.with_name(f"{folder.name}.partial"), dirs_exist_ok=True)
    for command, *options in commands:
        _geep(command, str(partial), *options)
    partial.rename(copy)


def evaluate(name: str, study: Study, folder: Path, args: argparse.Namespace) -> None:
    """Race the rivals and keep the measurements with what they were made of."""
    _geep("evaluate", str(folder), "--max-texts", str(args.max_texts), "--rounds", str(args.rounds))
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    record = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    made_of: list[dict[str, Any]] = [
        {
            "kind": "training",
            "data": name,
            "rows": training["about"]["rows"],
            "settings": training["about"]["settings"],
            **training["result"],
        },
        {"kind": "calibration", "data": name, **record["record"]["calibration"]},
        {"kind": "profile", "data": name, **record["record"]["profile"]},
    ]
    measured = (folder / "evaluation.jsonl").read_text(encoding="utf-8")
    RESULTS.mkdir(exist_ok=True)
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in made_of)
    (RESULTS / f"study-{name}.jsonl").write_text(lines + measured, encoding="utf-8")
    shutil.copy(folder / "evaluation.png", RESULTS / f"study-{name}.png")


STEPS = {
    "train": train,
    "profile": profile,
    "calibrate": calibrate,
    "int8": int8,
    "by-time": by_time,
    "evaluate": evaluate,
}


def _geep(*arguments: str) -> dict[str, Any]:
    """Run a command in a process of its own; its tables go to the terminal, its JSON comes back."""
    print("+ geep", *arguments, flush=True)
    done = subprocess.run([sys.executable, "-m", "geep.cli", *arguments, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"geep {arguments[0]} failed with code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
