"""What each part of the method saves by itself: exit prediction, fused answers, exit 0, and all together.

Measured, on model folders that `geep train` made, for each promise of `PROMISES`:

- the settings that `PARTS` leaves are learned and chosen on the rows for profiling, and the speed is certified on the
  rows for calibration, as `geep calibrate` does, with the other parts switched off: where answers are not fused, the
  criterion does not read the table either;
- on the test split: accuracy, agreement with the full model, mean layers, exits asked for a text (what a CPU pays) and
  waits: batches whose answers decide who goes on (what a GPU pays), counted in a run of the engine itself;
- the rank correlation of predicted with true exit layers.

"No prediction" asks every exit from the first on, as FastBERT does. Not measured: time (see `benchmarks/study.py`).

    python benchmarks/ablation.py --runs-dir RUNS --only sst2,ag_news --cache CACHE

appends to benchmarks/results/ablation.jsonl what is not there yet; logits are kept in CACHE.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prediction import without_table
from tables import append, read

import geep
from geep.calibration import (
    TRIAL_QUANTILES,
    TRIAL_SPEEDS,
    Choice,
    ExitRun,
    Outcomes,
    Route,
    learn_settings,
    predictor_quality,
    profile,
)
from geep.calibration.certifying import walked
from geep.engine import Engine, ExitSettings
from geep.exits import AGREEMENT, CRITERIA
from geep.promise import Promise

RESULTS = Path(__file__).parent / "results" / "ablation.jsonl"

# A quantile below every share: a text is asked from the first exit on.
_FIRST_EXIT = 1e-9


@dataclass(frozen=True, slots=True)
class Part:
    """What is switched on."""

    predicts: bool = False
    fuses: bool = False
    lexical: bool = False


PARTS: dict[str, Part] = {
    "exits alone": Part(),
    "exit prediction alone": Part(predicts=True),
    "fused answers alone": Part(fuses=True),
    "exit 0 alone": Part(lexical=True),
    "fused answers and exit 0": Part(fuses=True, lexical=True),
    "all": Part(predicts=True, fuses=True, lexical=True),
}

PROMISES: dict[str, Promise] = {
    "at most 0.5 points": Promise(max_accuracy_drop=0.005),
    "at most 1 point": Promise(max_accuracy_drop=0.01),
    "99 % agreement": Promise(min_agreement=0.99),
}


def main() -> None:
    """Parse arguments and measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", type=Path, required=True, help="where the trained model folders are")
    parser.add_argument("--only", required=True, help="names of these folders, by commas")
    parser.add_argument("--cache", type=Path, required=True, help="where logits of all exits are kept")
    args = parser.parse_args()
    done = {(line["data"], line["promise"], line["part"]) for line in read(RESULTS)}
    for name in args.only.split(","):
        if all((name, promise, part) in done for promise in PROMISES for part in PARTS):
            continue
        for line in measured(args.runs_dir / name, args.cache / f"{name}.pt"):
            if (name, line["promise"], line["part"]) not in done:
                append(RESULTS, {"data": name, **line})
                print(name, line["promise"], line["part"], line["layers"], line["exits_asked"], flush=True)


def measured(folder: Path, cache: Path) -> Iterator[dict[str, Any]]:
    """One line for each promise and part."""
    engine, runs = runs_of(folder, cache)
    found = profile(engine, runs["teaching"], runs["profile"])
    for promise_name, promise in PROMISES.items():
        for part_name, part in PARTS.items():
            settings = certified(found.engine, runs["profile"], runs["calibration"], promise, part)
            deployed = found.engine.replace(settings=settings)
            yield {"promise": promise_name, "part": part_name, **outcome(deployed, runs["test"])}


def runs_of(
    folder: Path, cache: Path, *, more: Callable[[geep.Parts, geep.Dataset], geep.Split] | None = None
) -> tuple[Engine, dict[str, ExitRun]]:
    """The engine of a folder, and all exits of all its rows by part, from the cache as far as they are there.

    `more` names further rows, which become the part "more"; who needs none reads the same cache.
    """
    plan, parts = geep.parts_of(folder)
    engine, dataset = Engine.from_pretrained(folder, exits=False, dtype="float32"), plan.load()
    if dataset.test is None:
        raise SystemExit(f"{folder} was made of data without a test split, expected one to report on.")
    splits = {"teaching": parts.teaching, "profile": parts.profile, "calibration": parts.calibration}
    splits |= {"test": dataset.test, **({} if more is None else {"more": more(parts, dataset)})}
    made_of = {**engine.identity, **{name: split.digest() for name, split in splits.items()}}
    kept = torch.load(cache) if cache.exists() else {"made_of": {}, "logits": {}}
    if any(kept["made_of"].get(name, digest) != digest for name, digest in made_of.items()):
        raise SystemExit(f"{cache} holds logits of another model or of other texts; delete it.")
    if missing := [name for name in splits if name not in kept["logits"]]:
        kept["logits"] |= {name: ExitRun.of(engine, splits[name], what=name).exit_logits for name in missing}
        kept["made_of"] |= made_of
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(kept, cache)
    return engine, {
        name: ExitRun(
            engine.tokenize(split.inputs).batch,
            kept["logits"][name],
            None if split.labels is None else torch.from_numpy(split.labels),
        )
        for name, split in splits.items()
    }


def certified(engine: Engine, tuning: ExitRun, fresh: ExitRun, promise: Promise, part: Part) -> ExitSettings:
    """Settings of the parts that are on, chosen on tuning rows, at the speed that fresh rows certify."""
    tuned, checked = Outcomes(engine, tuning), Outcomes(engine, fresh)
    return fewest_layers(tuned, checked, Route.all_to(promise), lambda weighed: chosen(tuned, weighed, part))


def fewest_layers(
    tuned: Outcomes, checked: Outcomes, routes: Sequence[Route], choose: Callable[[Promise], Choice]
) -> ExitSettings:
    """What walks certify with the fewest layers; the full model where nothing is."""
    found = []
    for route in routes:
        choice = choose(route.weighed)
        order = route.order(tuned, choice)
        walk = walked(checked, order, route.each)
        if walk.kept is None:
            found.append((float(tuned.depths[-1]), replace(choice.settings, speed=0.0)))
        else:
            found.append((walk.kept.mean_exit_layer, order[walk.num_passed - 1]))
    return min(found, key=itemgetter(0))[1]


def chosen(tuned: Outcomes, promise: Promise, part: Part) -> Choice:
    """Settings of the parts that are on, by what a walk weighs them by."""
    learned = [
        learn_settings(tuned, AGREEMENT, by_labels=by_labels, fuse=part.fuses, fuse_last=by_labels and last)
        for by_labels in ([promise.needs_labels] if promise.needs_labels else [False, True])
        for last in ([False, True] if part.fuses and promise.needs_labels else [False])
    ]
    if not part.fuses:
        learned = [replace(each, agreement=without_table(tuned)) for each in learned]
    weighed = []
    for settings in (
        replace(base, criterion=criterion, quantile=quantile, lexical_exit=lexical)
        for base in learned
        for criterion in (AGREEMENT, *CRITERIA)
        for quantile in (TRIAL_QUANTILES if part.predicts else (_FIRST_EXIT,))
        for lexical in ([False, True] if part.lexical else [False])
    ):
        trials = tuple(tuned.trial(replace(settings, speed=speed), promise) for speed in TRIAL_SPEEDS)
        certain = [trial.mean_exit_layer for trial in trials if trial.passed]
        weighed.append(Choice(settings, trials, min(certain, default=np.inf), bool(certain)))
    return min(weighed, key=lambda choice: choice.rank)


def outcome(engine: Engine, run: ExitRun) -> dict[str, Any]:
    """What an engine does on the rows of a run."""
    settings, outcomes = engine.settings, Outcomes(engine, run)
    if engine.predictor is None:
        raise SystemExit("The model has no table.")
    found, plan, column = outcomes.profile(settings), outcomes.planned(settings), outcomes.answered(settings)
    depths = np.asarray(found.depths)
    counted = _Counted(engine.deployment.backend, engine.depths[-1])
    replace(engine.course, backend=counted).run(run.batch, engine.plan(run.batch), engine.settings)
    asked = np.isin(depths, settings.asked_layers(engine.depths)[:-1])
    between = (depths >= depths[plan][:, None]) & (depths <= depths[column][:, None]) & asked
    foretold = predictor_quality(found.from_depth(1), run.batch, engine.predictor, max(settings.speed, TRIAL_SPEEDS[0]))
    return {
        "speed": settings.speed,
        "criterion": settings.criterion,
        "quantile": settings.quantile,
        "lexical_exit": settings.lexical_exit,
        "fused": sorted(settings.fusing),
        "full_layers": int(depths[-1]),
        **quality(outcomes, settings),
        "exits_asked": round(float(between.sum(1).mean()), 3) if settings.speed else 0.0,
        "waits": counted.waits,
        "num_texts": len(found),
        "rank_correlation": round(foretold.rank_correlation, 3),
    }


def quality(outcomes: Outcomes, settings: ExitSettings) -> dict[str, float]:
    """Mean layers of labelled texts, and accuracy, agreement and what the table answers alone, in percent."""
    found, column = outcomes.profile(settings), outcomes.answered(settings)
    if found.correct is None or found.reference_correct is None:
        raise SystemExit("The rows have no labels, expected some to report on.")
    rows, layers = np.arange(len(found)), np.asarray(found.depths)[column]
    return {
        "layers": round(float(layers.mean()), 3),
        "accuracy": round(100 * float(found.correct[rows, column].mean()), 2),
        "full_accuracy": round(100 * float(found.reference_correct.mean()), 2),
        "agreement": round(100 * float(found.agrees[rows, column].mean()), 2),
        "by_table": round(100 * float((layers == 0).mean()), 2),
    }


class _Counted:
    """A backend that counts the batches after which a run has to know who goes on."""

    def __init__(self, backend: Any, last: int) -> None:
        self.backend, self.last, self.waits = backend, last, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def exit_logits(self, live: Any, layer: int, start: int, stop: int) -> torch.Tensor:
        """Ask an exit."""
        self.waits += layer != self.last
        found: torch.Tensor = self.backend.exit_logits(live, layer, start, stop)
        return found


if __name__ == "__main__":
    main()
