"""Whether promises hold: certified on random texts, looked at on the others, two hundred times over.

Measured, on model folders that `geep train` made, for each promise of `PROMISES`:

- settings and the order of the speeds are fixed once, on the rows for profiling, as `geep calibrate` does it;
- texts that nothing was learned or chosen on (rows for calibration, the test split, training rows that were left out)
  are divided at random, `SPLITS` times: on so many as `geep calibrate` gets, the speed is certified, and the rest tells
  what it loses;
- the share of divisions whose speed breaks the promise: among all of these texts, which is what a certificate speaks
  of (it is drawn from them), and among the rest alone, where luck of the draw comes on top.

The first share has to stay below 1 - confidence, 5 %. Not measured: texts of another source, several trainings.

    python benchmarks/guarantee.py --runs-dir RUNS --only sst2,trec --cache CACHE

appends to benchmarks/results/guarantee.jsonl what is not there yet; logits are kept in CACHE.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablation import PROMISES, runs_of
from numpy.typing import NDArray
from tables import append, read

import geep
from geep.calibration import ExitRun, Outcomes, Route, choose, profile
from geep.data import Split
from geep.promise import PairedCounts, Promise, Trial, walk

RESULTS = Path(__file__).parent / "results" / "guarantee.jsonl"
SPLITS = 200
MOST_TEXTS = 12_000


def main() -> None:
    """Parse arguments and measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", type=Path, required=True, help="where the trained model folders are")
    parser.add_argument("--only", required=True, help="names of these folders, by commas")
    parser.add_argument("--cache", type=Path, required=True, help="where logits of all exits are kept")
    parser.add_argument("--splits", type=int, default=SPLITS)
    args = parser.parse_args()
    done = {(line["data"], line["promise"]) for line in read(RESULTS)}
    for name in args.only.split(","):
        if all((name, promise) in done for promise in PROMISES):
            continue
        for line in measured(args.runs_dir / name, args.cache / f"{name}.pt", splits=args.splits):
            if (name, line["promise"]) not in done:
                append(RESULTS, {"data": name, **line})
                print(name, line["promise"], line["broken"], line["broken_on_the_rest"], line["layers"], flush=True)


def measured(folder: Path, cache: Path, *, splits: int) -> Iterator[dict[str, Any]]:
    """One line for each promise."""
    engine, runs = runs_of(folder, cache, more=left_out)
    found = profile(engine, runs["teaching"], runs["profile"])
    tuned = Outcomes(found.engine, runs["profile"])
    pool = joined([runs[name] for name in ("calibration", "test", "more")])
    if found.engine.predictor is None:
        raise SystemExit("The model has no table.")
    # As `calibrate` leaves them out: texts that were learned or chosen on, whatever their part.
    used = torch.cat([found.engine.predictor.fitted.seen, runs["profile"].hashes])
    everyone = Outcomes(found.engine, pool.select((~torch.isin(pool.hashes, used)).nonzero().flatten()))
    for name, promise in PROMISES.items():
        walks = [Steps.of(tuned, everyone, route) for route in Route.all_to(promise)]
        yield {"promise": name, **checked(walks, promise, len(runs["calibration"]), splits=splits)}


def left_out(parts: geep.Parts, dataset: geep.Dataset) -> Split:
    """Training rows that are in no part, as many as make `MOST_TEXTS` with the others that certify or test."""
    test = [] if dataset.test is None else [dataset.test]
    rows = geep.unseen(dataset.train, *parts.learned, parts.calibration, *test)
    room = MOST_TEXTS - len(parts.calibration) - sum(map(len, test))
    return rows.select(np.random.default_rng(0).permutation(len(rows))[: max(room, 0)])


def joined(runs: Sequence[ExitRun]) -> ExitRun:
    """Runs of one engine as one."""
    batches = [run.batch for run in runs]
    return ExitRun(
        type(batches[0]).concat(batches),
        torch.cat([run.exit_logits for run in runs], dim=1),
        torch.cat([run.labels for run in runs if run.labels is not None]),
    )


@dataclass(frozen=True, slots=True)
class Steps:
    """What every step of a walk would do with every text: (num_steps, num_texts) each.

    Attributes:
        each: What the walk has to certify.
        speeds: Of the steps, (num_steps,).
        layers: Encoder layers run.
        changed: Whether the answer is another than the full model's.
        spoilt: Whether it is wrong, and the full model's right.
        repaired: Whether it is right, and the full model's wrong.
    """

    each: Promise
    speeds: NDArray[np.float64]
    layers: NDArray[np.int8]
    changed: NDArray[np.bool_]
    spoilt: NDArray[np.bool_]
    repaired: NDArray[np.bool_]

    @classmethod
    def of(cls, tuned: Outcomes, everyone: Outcomes, route: Route) -> Steps:
        """Choose settings and their order on the tuning texts; judge all steps on all others."""
        order = route.order(tuned, choose(tuned, route.weighed))
        judged = [everyone.judged(settings) for settings in order]
        depths = np.asarray(everyone.depths, dtype=np.int8)
        return cls(
            route.each,
            np.array([settings.speed for settings in order]),
            np.stack([depths[found.column] for found in judged]),
            *(np.stack([getattr(found, name) for found in judged]) for name in ("changed", "spoilt", "repaired")),
        )

    def counts(self, step: int, rows: NDArray[np.int64] | slice) -> PairedCounts:
        """What a step does with some texts."""
        changed, spoilt, repaired = (column[step, rows] for column in (self.changed, self.spoilt, self.repaired))
        return PairedCounts(len(changed), int(changed.sum()), int(spoilt.sum()), int(repaired.sum()))

    def kept(self, rows: NDArray[np.int64]) -> int | None:
        """The step that a walk on some texts keeps; None where not even the first passes."""

        def trial(step: int) -> Trial:
            layers = float(self.layers[step, rows].mean())
            return Trial.of(self.each, self.counts(step, rows), speed=float(self.speeds[step]), mean_exit_layer=layers)

        passed = walk(trial, range(len(self.speeds))).num_passed
        return passed - 1 if passed else None


def checked(walks: Sequence[Steps], promise: Promise, num_certifying: int, *, splits: int) -> dict[str, Any]:
    """Certify on random texts, as often as is asked, and count how often the promise is broken."""
    num_texts, random = walks[0].changed.shape[1], np.random.default_rng(0)
    found, losses = [], []
    for _ in range(splits):
        rows = random.permutation(num_texts)
        certifying, rest = rows[:num_certifying], rows[num_certifying:]
        ends = [(steps, step) for steps in walks if (step := steps.kept(certifying)) is not None]
        if not ends:
            continue
        # As `calibrate` does: of two walks the one that ends with fewer layers on the texts that certify.
        steps, step = min(ends, key=lambda end: float(end[0].layers[end[1], certifying].mean()))
        found.append(float(steps.layers[step].mean()))
        observed = promise.risk.observed
        losses.append((observed(steps.counts(step, slice(None))), observed(steps.counts(step, rest))))
    lost = np.array(losses).reshape(-1, 2)
    return {
        "splits": splits,
        "certified": len(found),
        "num_certifying": num_certifying,
        "num_texts": num_texts,
        "allowed": promise.allowed,
        "confidence": promise.confidence,
        # Of all divisions: where nothing is certified the full model answers, which breaks no promise.
        "broken": round(float((lost[:, 0] > promise.allowed).sum() / splits), 4),
        "broken_on_the_rest": round(float((lost[:, 1] > promise.allowed).sum() / splits), 4),
        "lost": [round(100 * value, 3) for value in np.quantile(lost[:, 0], [0.05, 0.5, 0.95])] if len(lost) else None,
        "layers": round(float(np.mean(found)), 3) if found else None,
    }


if __name__ == "__main__":
    main()
