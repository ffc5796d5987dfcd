"""What each choice inside the method is worth: keys, table, rows to learn from, exits, criterion, rule.

Measured, on model folders that `geep train` made, for each promise of `PROMISES`: everything is learned and chosen as
`geep profile` and `geep calibrate` do it, but for one choice of `CHOICES`, and certified; then, on the test split, mean
layers, accuracy, agreement and what the table answers alone. For each choice of the table also how well it ranks texts
by their exit layer (rank correlation on held-out rows) and the accuracy of its own answers.

Nothing is run anew: all choices read the same logits. Not measured: time, several trainings.

    python benchmarks/choices.py --runs-dir RUNS --only sst2,trec --cache CACHE

appends to benchmarks/results/choices.jsonl what is not there yet; logits are kept in CACHE.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from ablation import PROMISES, quality, runs_of
from published import as_published
from tables import append, read

from geep.calibration import TABLE_SPEEDS, ExitRun, Outcomes, calibrate, predictor_quality, profile
from geep.engine import Engine
from geep.promise import NothingCertifiedError, Promise

RESULTS = Path(__file__).parent / "results" / "choices.jsonl"


@dataclass(frozen=True, slots=True)
class ChoiceMade:
    """What is otherwise than `geep train` does it.

    Attributes:
        about: What the choice is about, in a word.
        profile: Keywords of `geep.profile`.
        calibrate: Keywords of `geep.calibrate`.
        learned_from: Part of the rows that temperatures, scores and levels are learned from, and settings chosen on.
        every: Exits that may be asked: every so many layers. None: chosen.
        as_published: Whether the table is the paper's and exits answer by themselves, at no temperature.
    """

    about: str = ""
    profile: dict[str, Any] = field(default_factory=dict)
    calibrate: dict[str, Any] = field(default_factory=dict)
    learned_from: str = "profile"
    every: int | None = None
    as_published: bool = False


CHOICES: dict[str, ChoiceMade] = {
    "as geep train does": ChoiceMade(),
    "single tokens": ChoiceMade("keys", profile={"ngram_order": 1}),
    "up to 3 tokens": ChoiceMade("keys", profile={"ngram_order": 3}),
    "at most 1,000 n-grams": ChoiceMade("keys", profile={"max_ngrams": 1_000}),
    "at most 100 n-grams": ChoiceMade("keys", profile={"max_ngrams": 100}),
    "counts (the paper's)": ChoiceMade("table", profile={"kind": "counts"}),
    "regression": ChoiceMade("table", profile={"kind": "fitted"}),
    "training rows": ChoiceMade("learned from", learned_from="teaching"),
    "every 2nd": ChoiceMade("exits", every=2),
    "every 4th": ChoiceMade("exits", every=4),
    "entropy": ChoiceMade("criterion", calibrate={"criterion": "entropy"}),
    "confidence": ChoiceMade("criterion", calibrate={"criterion": "confidence"}),
    "margin": ChoiceMade("criterion", calibrate={"criterion": "margin"}),
    "stop (the paper's)": ChoiceMade("after a miss", calibrate={"on_miss": "stop"}),
    "off": ChoiceMade("exit 0", calibrate={"lexical_exit": False}),
    "counts, entropy, stop, no exit 0": ChoiceMade(
        "the paper's", calibrate={"criterion": "entropy", "on_miss": "stop"}, as_published=True
    ),
}


def main() -> None:
    """Parse arguments and measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", type=Path, required=True, help="where the trained model folders are")
    parser.add_argument("--only", required=True, help="names of these folders, by commas")
    parser.add_argument("--cache", type=Path, required=True, help="where logits of all exits are kept")
    args = parser.parse_args()
    done = {(line["data"], line["choice"]) for line in read(RESULTS)}
    for name in args.only.split(","):
        todo = [choice for choice in CHOICES if (name, choice) not in done]
        if not todo:
            continue
        engine, runs = runs_of(args.runs_dir / name, args.cache / f"{name}.pt")
        for choice in todo:
            line = {"data": name, "choice": choice, **measured(engine, runs, CHOICES[choice])}
            append(RESULTS, line)
            print(name, choice, line["promises"], flush=True)


def measured(engine: Engine, runs: dict[str, ExitRun], made: ChoiceMade) -> dict[str, Any]:
    """What a choice comes to, for every promise."""
    teaching, tuning = runs["teaching"], runs[made.learned_from]
    if made.as_published:
        found = as_published(engine, teaching, tuning)
    else:
        found = profile(engine, teaching, tuning, **made.profile).engine
    keywords = dict(made.calibrate)
    if made.every is not None:
        last = engine.depths[-1]
        keywords["check_layers"] = tuple(layer for layer in engine.depths[:-1] if (last - layer) % made.every == 0)
    kept, heldout = found.predictor, runs["profile"]
    if kept is None:
        raise SystemExit("The model has no table.")
    test = runs["test"]
    lexical = Outcomes(found, test).lexical_logits
    # Of held-out rows whatever it was learned from; at speed 0 no exit is asked.
    exits = Outcomes(found, heldout).profile(replace(found.settings, speed=1.0))
    ranks = [predictor_quality(exits, heldout.batch, kept, speed).rank_correlation for speed in TABLE_SPEEDS]
    return {
        "about": made.about,
        "table": kept.kind,
        "rank_correlation": round(fmean(ranks), 3),
        "table_accuracy": None
        if lexical is None or test.labels is None
        else round(100 * float((lexical.argmax(-1) == test.labels).float().mean()), 2),
        "full_layers": int(engine.depths[-1]),
        "tested_on": len(test),
        "promises": {name: _kept(found, tuning, runs, promise, keywords) for name, promise in PROMISES.items()},
    }


def _kept(
    found: Engine, tuning: ExitRun, runs: dict[str, ExitRun], promise: Promise, keywords: dict[str, Any]
) -> dict[str, Any]:
    try:
        result = calibrate(found, tuning, runs["calibration"], promise, **keywords)
    except NothingCertifiedError as refusal:
        return {"refused": str(refusal)}
    return quality(Outcomes(result.engine, runs["test"]), result.engine.settings)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
