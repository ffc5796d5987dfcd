"""How a speed is looked for: what ways to weigh settings and to walk certify, over divisions of the held-out rows.

Measured, on model folders that `geep train` made: the held-out rows (those for profiling and for calibration together)
are divided anew, a half or a third of them to learn and choose settings on; every search of `SEARCHES` certifies each
of `PROMISES` on the rest; mean layers, and accuracy against the full model, are those on the test split. Where nothing
is certified all layers count. Not measured: time.

    python benchmarks/searches.py --runs-dir RUNS --only sst2,lcqmc --cache CACHE

appends to benchmarks/results/searches.jsonl what is not there yet; logits are kept in CACHE.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablation import runs_of

import geep
from geep.backends import TokenBatch
from geep.calibration import ExitRun, Outcomes, Route, choose, profile
from geep.calibration.certifying import walked
from geep.engine import Engine, ExitSettings
from geep.promise import Promise

RESULTS = Path(__file__).parent / "results" / "searches.jsonl"

PROMISES: dict[str, Promise] = {
    "at most 0.5 points": Promise(max_accuracy_drop=0.005),
    "at most 1 point": Promise(max_accuracy_drop=0.01),
}

SHARES = {"a half": 1 / 2, "a third": 1 / 3}

Search = Callable[[Promise], tuple[Route, ...]]


def _by_accuracy(promise: Promise) -> tuple[Route, ...]:
    """Settings weighed by accuracy, from the lowest speed and from the safest, each at half of the error."""
    half = promise.sharing(0.5)
    return Route(half, half), Route(half, half, from_safest=True)


def _careful(promise: Promise) -> tuple[Route, ...]:
    """Settings weighed by agreement, from the lowest speed."""
    return (replace(Route.all_to(promise)[0], each=promise),)


SEARCHES: dict[str, Search] = {
    "by accuracy, two walks": _by_accuracy,
    "careful alone": _careful,
    "careful and daring": Route.all_to,
}


def main() -> None:
    """Parse arguments and measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", type=Path, required=True, help="where the trained model folders are")
    parser.add_argument("--only", required=True, help="names of these folders, by commas")
    parser.add_argument("--cache", type=Path, required=True, help="where logits of all exits are kept")
    parser.add_argument("--divisions", type=int, default=4)
    args = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    known = RESULTS.read_text("utf-8").splitlines() if RESULTS.exists() else []
    done = {(line["data"], line["division"], line["to_choose_on"]) for line in map(json.loads, known)}
    for name in args.only.split(","):
        wanted = [(seed, share) for seed in range(args.divisions) for share in SHARES]
        if missing := [each for each in wanted if (name, *each) not in done]:
            for line in measured(args.runs_dir / name, args.cache / f"{name}.pt", missing):
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"data": name, **line}) + "\n")
                print(json.dumps({"data": name, **line}), flush=True)


def measured(folder: Path, cache: Path, divisions: list[tuple[int, str]]) -> Iterator[dict[str, Any]]:
    """One line for each division."""
    plan, parts = geep.parts_of(folder)
    engine, test = Engine.from_pretrained(folder, exits=False), plan.load().test
    if test is None:
        raise SystemExit(f"{folder} was made of data without a test split, expected one to report on.")
    splits = {"teaching": parts.teaching, "profile": parts.profile, "calibration": parts.calibration, "test": test}
    runs = runs_of(engine, splits, cache)
    held = joined(runs["profile"], runs["calibration"])
    for seed, share in divisions:
        order = torch.randperm(len(held), generator=torch.Generator().manual_seed(seed))
        count = round(SHARES[share] * len(held))
        tuning, fresh = (held.select(rows.sort().values) for rows in (order[:count], order[count:]))
        found = profile(engine, runs["teaching"], tuning).engine
        tuned, checked, tested = (Outcomes(found, run) for run in (tuning, fresh, runs["test"]))
        yield {
            "division": seed,
            "to_choose_on": share,
            "chosen_on": len(tuning),
            "certified_on": len(fresh),
            "full_layers": int(engine.depths[-1]),
            "found": {
                promise_name: {
                    name: outcome(tested, certified(tuned, checked, search(promise)))
                    for name, search in SEARCHES.items()
                }
                for promise_name, promise in PROMISES.items()
            },
        }


def joined(one: ExitRun, other: ExitRun) -> ExitRun:
    """The texts of two runs of an engine."""
    if one.labels is None or other.labels is None:
        raise SystemExit("The held-out rows have no labels, expected some.")
    types = None
    if one.batch.token_type_ids is not None and other.batch.token_type_ids is not None:
        types = np.concatenate([one.batch.token_type_ids, other.batch.token_type_ids])
    ids, lengths = (
        np.concatenate([getattr(run.batch, name) for run in (one, other)]) for name in ("input_ids", "lengths")
    )
    logits = torch.cat([one.exit_logits, other.exit_logits], 1)
    return replace(
        one, batch=TokenBatch(ids, types, lengths), exit_logits=logits, labels=torch.cat([one.labels, other.labels])
    )


def certified(tuned: Outcomes, checked: Outcomes, routes: tuple[Route, ...]) -> ExitSettings | None:
    """What walks certify with the fewest layers; None where nothing is."""
    ends = []
    for route in routes:
        order = route.order(tuned, choose(tuned, route.weighed))
        walk = walked(checked, order, route.each)
        if walk.kept is not None:
            ends.append((walk.kept.mean_exit_layer, order[walk.num_passed - 1]))
    return min(ends, key=lambda end: end[0])[1] if ends else None


def outcome(tested: Outcomes, settings: ExitSettings | None) -> dict[str, float]:
    """Layers, and points of accuracy against the full model."""
    if settings is None:
        return {"layers": float(tested.depths[-1]), "points": 0.0}
    found, column = tested.profile(settings), tested.answered(settings)
    if found.correct is None or found.reference_correct is None:
        raise SystemExit("The test rows have no labels, expected some.")
    right = found.correct[np.arange(len(found)), column].mean() - found.reference_correct.mean()
    layers = float(np.asarray(found.depths)[column].mean())
    return {"layers": round(layers, 3), "points": round(100 * float(right), 2)}


if __name__ == "__main__":
    main()
