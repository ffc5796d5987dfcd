"""What each recipe's exits are worth: layers at certified promises, accuracy at every depth, over data sets and seeds.

Measured, for each cell (data set, recipe, seed), with everything else alike:

- the recipe trains on all rows that are not held out (`geep.train`), table and settings are learned on one held-out
  part and each of `PROMISES` is certified on another (`geep.profile`, `geep.calibrate`);
- on the test split: accuracy of the full model and of every exit, and for each promise mean layers, accuracy and
  agreement with the cell's own full model, and how many answers are spoilt and repaired; layers and accuracy along all
  speeds, for comparing at equal accuracy: a recipe may spoil the full model that its promises are about;
- as published, at the speeds that FastBERT's paper reports: FastBERT (entropy, every exit asked until one is sure) and
  GEEP (the table of counts, texts sorted by it, the answer at the predicted layer is final), on the same exits;
- of recipes that train a shared exit, its accuracy on the output of each exit's layer, one layer more than the exit;
- all of it once more without the test texts that also stand in training or development rows, told by their letters and
  digits alone, where there are such.

Recipes: `RECIPES`, of which `fitted` leaves the full model that of plain fine-tuning. Not measured: time.

Cells are run most important first, `--jobs` side by side, and each line is written when its cell is done; what is in
the results already is left out, so the same command goes on:

    python benchmarks/certified.py --data-dir DATA --model ENCODER --work WORK --jobs 2

appends to benchmarks/results/certified.jsonl; each line names its device.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import re
import shutil
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from ablation import PROMISES, quality
from numpy.typing import NDArray
from published import RULE, as_published
from tables import append, read
from transformers import AutoConfig

import geep
from geep.calibration import TRIAL_SPEEDS, Calibration, ExitRun, Outcomes, ProfileResult, calibrate, profile
from geep.data import Dataset, Split
from geep.engine import Engine
from geep.evaluation.race import cpu_name
from geep.promise import NothingCertifiedError, Promise
from geep.training import TrainSettings

RESULTS = Path(__file__).parent / "results"

MAX_LENGTH = 128

# Of fewer rows steps are smaller, passes more, and a larger share is held out: too few rows certify nothing.
_FEW_ROWS = 10_000

# Room for what heads read, of a cell.
_GIGABYTES = 4.0


@dataclass(frozen=True)
class Cell:
    """One training and all that is asked of it."""

    data: str
    recipe: str
    seed: int


RECIPES: dict[str, dict[str, Any]] = {
    "fitted": {"recipe": "fitted"},
    "geep": {"recipe": "geep"},
    "geep, fitted": {"recipe": "geep", "fit_exits": True},
    "geep-paper": {"recipe": "geep-paper"},
    "fastbert": {"recipe": "fastbert"},
    "tune": {"recipe": "tune"},
    "berxit": {"recipe": "berxit"},
    "gradient-equilibrium": {"recipe": "gradient-equilibrium"},
    "mixed": {"recipe": "mixed"},
}

# Rivals that are compared at one seed.
ONE_SEED = ("berxit", "gradient-equilibrium", "mixed")
# The encoder's first layers, fine-tuned at that depth: they have no exits, so that their accuracy alone is taken.
SHALLOW = {f"{layers} layers": {"recipe": "vanilla", "encoder_layers": layers} for layers in (1, 2, 4, 6)}

# A topic set, English and Chinese sentiment, questions, titles, pairs: where recipes are compared and seeds repeated.
FIRST = ("sst2", "lcqmc", "ag_news", "thucnews", "yahoo_answers", "trec")
FURTHER = ("book_review", "weibo", "shopping", "chnsenticorp", "dbpedia", "amazon_full", "yelp_polarity", "yelp_full")
SEEDS = 3

# Recipes that train last layer and teacher to answer on the output of every exit's layer.
SHARED = ("geep", "geep-paper")
_SHARED_BATCH = 64

# At which FastBERT's paper reports (Liu et al. 2020, table 2).
PUBLISHED_SPEEDS = (0.1, 0.5, 0.8)


def cells() -> Iterator[Cell]:
    """All cells, the most important first."""
    yield from (Cell(data, "fitted", 0) for data in FIRST)
    yield from (Cell(data, "geep", 0) for data in FIRST)
    yield from (Cell(data, recipe, 0) for recipe in ("geep-paper", "geep, fitted") for data in FIRST)
    yield from (Cell(data, "fitted", seed) for seed in range(1, SEEDS) for data in FIRST)
    yield from (Cell(data, "fitted", 0) for data in FURTHER)
    yield from (Cell(data, "geep", seed) for seed in range(1, SEEDS) for data in FIRST)
    yield from (Cell(data, "fastbert", 0) for data in FIRST)
    yield from (Cell(data, recipe, 0) for recipe in ("geep-paper", "fastbert", "geep") for data in FURTHER)
    yield from (Cell(data, recipe, 0) for recipe in SHALLOW for data in (*FIRST, *FURTHER))
    repeated = [recipe for recipe in RECIPES if recipe not in ONE_SEED]
    yield from (Cell(data, recipe, seed) for seed in range(1, SEEDS) for recipe in repeated for data in FIRST)
    yield from (Cell(data, recipe, 0) for recipe in ONE_SEED for data in FIRST)


def main() -> None:
    """Parse arguments and run the cells that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of data set folders")
    parser.add_argument("--model", required=True, help="folder of the encoder")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is computed on the way")
    parser.add_argument("--only", help="data sets, by commas; default: all that are there")
    parser.add_argument("--recipes", help=f"by semicolons; default: {';'.join([*RECIPES, *SHALLOW])}")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--max-train", type=int, help="limit on the training rows; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side")
    parser.add_argument("--seconds", type=float, help="stop after so long; what is not done by then is done next time")
    parser.add_argument("--output", type=Path, default=RESULTS / "certified.jsonl", help="file of the results")
    args = parser.parse_args()
    begin = time.monotonic()
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    output = args.output
    output.parent.mkdir(parents=True, exist_ok=True)
    wanted = list(dict.fromkeys(_wanted(args, output)))
    # Processes of their own, which stay: CUDA is started once in each.
    context = multiprocessing.get_context("spawn")
    common = (str(args.data_dir), args.model, str(args.work), args.max_train, str(output))
    with context.Pool(args.jobs, _be_quiet) as pool:
        todo = [pool.apply_async(_run, (cell, *common)) for cell in wanted]
        while not all(each.ready() for each in todo):
            if args.seconds is not None and time.monotonic() - begin > args.seconds:
                print(f"stopped: {sum(each.ready() for each in todo)} of {len(todo)} cells done", flush=True)
                pool.terminate()
                break
            time.sleep(0.5)


def _done(output: Path) -> set[Cell]:
    return {Cell(line["data"], line["recipe"], line["seed"]) for line in read(output)}


def _wanted(args: argparse.Namespace, output: Path) -> Iterator[Cell]:
    done = _done(output)
    names = args.only.split(",") if args.only else [path.name for path in args.data_dir.iterdir()]
    recipes = args.recipes.split(";") if args.recipes else [*RECIPES, *SHALLOW]
    for cell in cells():
        is_wanted = cell.data in names and cell.recipe in recipes and cell.seed < args.seeds
        if is_wanted and cell not in done:
            yield cell


def _be_quiet() -> None:
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _run(cell: Cell, data_dir: str, model: str, work: str, max_train: int | None, output: str) -> None:
    """Measure a cell and append its line; an error is shown and ends this cell alone."""
    begin = time.perf_counter()
    folder = Path(work) / f"{cell.data}-{cell.recipe.replace(', ', '-')}-{cell.seed}"
    try:
        line = measured(cell, data_dir, model, folder, max_train)
        # A process whose parent was killed ends its cell, which another may have begun again meanwhile.
        if cell not in _done(Path(output)):
            append(Path(output), line)
        print(f"{cell} done in {time.perf_counter() - begin:.0f} s", flush=True)
    except Exception:
        print(f"{cell} failed:\n{traceback.format_exc()}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measured(cell: Cell, data_dir: str, encoder: str, folder: Path, max_train: int | None) -> dict[str, Any]:
    """Everything of a cell."""
    clock = {"start": time.perf_counter()}
    plan = geep.DataPlan(cell.data, data_dir=data_dir, holdout=0.3, max_train=max_train)
    dataset = plan.load()
    if len(dataset.train) < _FEW_ROWS:
        plan = replace(plan, holdout=0.4)
    parts = plan.divide(dataset)
    is_small = len(parts.train) < _FEW_ROWS
    settings = TrainSettings(
        **(RECIPES | SHALLOW)[cell.recipe],
        epochs=4 if is_small else 2,
        batch_size=64 if is_small else 128,
        learning_rate=1.5e-4 if is_small else 2e-4,
        max_length=MAX_LENGTH,
        bf16=True,
        seed=cell.seed,
    )
    fitting = geep.FitSettings(max_gigabytes=_GIGABYTES, seed=cell.seed)
    # All but the last two, for every recipe with exits.
    has_exits = cell.recipe not in SHALLOW
    exit_layers = range(1, AutoConfig.from_pretrained(encoder).num_hidden_layers - 1) if has_exits else None
    trained = geep.train(
        parts, folder, encoder=encoder, settings=settings, fitting=fitting, exit_layers=exit_layers, plan=plan
    )
    clock["train"] = time.perf_counter()
    engine = Engine.from_pretrained(folder, exits=False, dtype="float32", compile=False)
    if dataset.test is None or dataset.test.labels is None:
        raise ValueError(f"{cell.data} has no labelled test split, expected one to report on.")
    test = ExitRun.of(engine, dataset.test)
    clock["test"] = time.perf_counter()
    about = {
        "data": cell.data,
        "recipe": cell.recipe,
        "seed": cell.seed,
        "encoder": Path(encoder).name,
        "layers": int(engine.depths[-1]),
        "labels": len(engine.label_names),
        "rows": len(parts.train),
        "tested_on": len(test),
        "epochs": settings.epochs,
        "steps": trained.steps,
        "depths": list(engine.depths),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
    }
    if not has_exits:
        right = test.exit_logits.argmax(-1) == test.labels
        return {**about, "accuracy": _percent(right.float().mean(1).tolist()), "seconds": _seconds(clock)}
    teaching, tuning = (ExitRun.of(engine, part) for part in (parts.teaching, parts.profile))
    found = profile(engine, teaching, tuning)
    paper = as_published(engine, teaching, tuning)
    clock["profile"] = time.perf_counter()
    fresh = ExitRun.of(engine, parts.calibration)
    calibrated = {name: _calibrated(found, fresh, promise) for name, promise in PROMISES.items()}
    new = torch.from_numpy(np.flatnonzero(~repeated(dataset)))
    clock["calibrate"] = time.perf_counter()
    return {
        **about,
        "fitted_on": trained.num_fitted,
        "profiled_on": len(parts.profile),
        "certified_on": len(parts.calibration),
        "search": "careful and daring",
        "shared_accuracy": _shared_accuracy(engine, dataset.test, test.batch.lengths)
        if RECIPES[cell.recipe]["recipe"] in SHARED
        else None,
        "repeated": len(test) - len(new),
        **_outcomes(engine, found, paper, calibrated, test),
        "without_repeated": _outcomes(engine, found, paper, calibrated, test.select(new))
        if 0 < len(new) < len(test)
        else None,
        "seconds": _seconds(clock),
    }


def _shared_accuracy(engine: Engine, test: Split, lengths: NDArray[np.int64]) -> list[float]:
    """Accuracy, %, where last layer and teacher answer on the output of each exit's layer, a layer more than the exit.

    The paper trains them to (the shared exit), so that they may answer in the exit's place.
    """
    model, order = engine.model, np.argsort(lengths, kind="stable")
    right = torch.zeros(len(engine.depths))
    with torch.inference_mode():
        for start in range(0, len(order), _SHARED_BATCH):
            some = test.select(order[start : start + _SHARED_BATCH])
            inputs = engine.tokenizer(
                some.texts,
                some.text_pairs,
                padding=True,
                truncation=True,
                max_length=engine.deployment.max_length,
                return_tensors="pt",
            ).to(model.device)
            answers = model(**inputs, output_shared_exits=True).shared_exit_logits.argmax(-1).cpu()
            right += (answers == torch.from_numpy(some.labels)).float().sum(1)
    return _percent((right / len(test)).tolist())


def _seconds(clock: dict[str, float]) -> dict[str, float]:
    """Seconds of each step, of the moments at which they ended."""
    times = list(clock.items())
    return {name: round(after - before, 1) for (_, before), (name, after) in zip(times, times[1:], strict=False)}


def repeated(dataset: Dataset) -> NDArray[np.bool_]:
    """Which test texts stand in training or development rows, too, but for case, blanks and punctuation."""

    def told(part: Split) -> list[str]:
        pairs = [""] * len(part) if part.text_pairs is None else part.text_pairs
        both = zip(part.texts, pairs, strict=True)
        # A text of signs alone is told by these.
        return ["|".join(re.sub(r"[\W_]+", "", text.lower()) or text for text in pair) for pair in both]

    known = {text for part in (dataset.train, dataset.dev) if part is not None for text in told(part)}
    return np.array([text in known for text in told(dataset.test)]) if dataset.test else np.zeros(0, dtype=bool)


def _outcomes(
    bare: Engine, found: ProfileResult, paper: Engine, calibrated: dict[str, Calibration | str], test: ExitRun
) -> dict[str, Any]:
    """What of a cell is seen on test rows."""
    answers, labels = test.exit_logits.argmax(-1), test.labels
    return {
        "accuracy": _percent((answers == labels).float().mean(1).tolist()),
        "agreement": _percent((answers == answers[-1]).float().mean(1).tolist()),
        "table_accuracy": _table_accuracy(Outcomes(found.engine, test)),
        "promises": {name: _kept(calibration, test) for name, calibration in calibrated.items()},
        "published": _published(bare, paper, test),
    }


def _published(bare: Engine, paper: Engine, test: ExitRun) -> dict[str, Any]:
    """FastBERT's and GEEP's own rules on the exits of a cell, with none of what was added since.

    FastBERT has no table: every text is asked at every exit.
    """
    rules = {
        "FastBERT": (Outcomes(bare, test), replace(RULE, on_miss="continue")),
        "GEEP": (Outcomes(paper, test), RULE),
    }
    return {
        name: [{"speed": speed, **quality(outcomes, replace(rule, speed=speed))} for speed in PUBLISHED_SPEEDS]
        for name, (outcomes, rule) in rules.items()
    }


def _percent(shares: list[float]) -> list[float]:
    return [round(100 * share, 2) for share in shares]


def _table_accuracy(outcomes: Outcomes) -> float | None:
    """Of the answers by the table alone, %."""
    found = outcomes.profile(outcomes.engine.settings)
    if found.correct is None or found.depths[0] != 0:
        return None
    return round(100 * float(found.correct[:, 0].mean()), 2)


def _calibrated(found: ProfileResult, fresh: ExitRun, promise: Promise) -> Calibration | str:
    """The settings that keep a promise; why there are none."""
    try:
        return calibrate(found.engine, found.heldout, fresh, promise)
    except NothingCertifiedError as refusal:
        return str(refusal)


def _kept(calibration: Calibration | str, test: ExitRun) -> dict[str, Any]:
    """What a certified speed does on the test rows, and what every other speed of these settings would do."""
    if isinstance(calibration, str):
        return {"refused": calibration}
    engine = calibration.engine
    outcomes = Outcomes(engine, test)

    def outcome(speed: float) -> dict[str, Any]:
        return {"speed": speed, **quality(outcomes, replace(engine.settings, speed=speed))}

    judged = outcomes.judged(engine.settings)
    curve = [outcome(speed) for speed in TRIAL_SPEEDS]
    return {
        **outcome(engine.settings.speed),
        "spoilt": int(judged.spoilt.sum()),
        "repaired": int(judged.repaired.sum()),
        "criterion": engine.settings.criterion,
        "quantile": engine.settings.quantile,
        "lexical_exit": engine.settings.lexical_exit,
        "certified_on": calibration.num_texts,
        "curve": [[row["layers"], row["accuracy"], row["agreement"]] for row in curve],
    }


if __name__ == "__main__":
    main()
