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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ablation import fewest_layers, runs_of
from prediction import joined
from tables import append, read

from geep.calibration import Outcomes, Route, choose, profile
from geep.engine import ExitSettings
from geep.promise import RISKS, Promise

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
    done = {(line["data"], line["division"], line["to_choose_on"]) for line in read(RESULTS)}
    for name in args.only.split(","):
        wanted = [(seed, share) for seed in range(args.divisions) for share in SHARES]
        if missing := [each for each in wanted if (name, *each) not in done]:
            for line in measured(args.runs_dir / name, args.cache / f"{name}.pt", missing):
                append(RESULTS, {"data": name, **line})
                print(json.dumps({"data": name, **line}), flush=True)


def measured(folder: Path, cache: Path, divisions: list[tuple[int, str]]) -> Iterator[dict[str, Any]]:
    """One line for each division."""
    engine, runs = runs_of(folder, cache)
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
                    name: outcome(tested, fewest_layers(tuned, checked, search(promise), partial(choose, tuned)))
                    for name, search in SEARCHES.items()
                }
                for promise_name, promise in PROMISES.items()
            },
        }


def outcome(tested: Outcomes, settings: ExitSettings) -> dict[str, float]:
    """Layers, and points of accuracy against the full model."""
    answered = tested.judged(settings)
    lost = RISKS["max_accuracy_drop"].observed(answered.by(len(answered.depths) - 1))
    return {"layers": round(answered.mean_exit_layer, 3), "points": round(-100 * lost, 2)}


if __name__ == "__main__":
    main()
