"""What decides how many layers are run: criterion, bound, where to ask. Offline, on the logits of trained models.

Measured, for each data set of `benchmarks/study.py`, on held-out texts that the model was not trained on:

- "criteria": mean layers at a given share of answers that differ from the full model's, for each way to judge an exit.
  Judged on one half of the texts, fitted on the other.
- "promises": what `calibrate` makes of one half and certifies on the other, with each part of it switched on in
  turn: mean layers, accuracy lost, modelled seconds. The mean over several random halvings, since one is luck. The
  halvings draw from both halves, and criterion, its features and penalty were picked on such halvings: these lines
  compare, only "test" judges.
- "probe": where to ask after one look at layer p, against asking at chosen layers, by modelled seconds.
- "test": the settings of before and of now, certified once on the halves as `geep calibrate` draws them, on the test
  split. Nothing is chosen there.

Modelled seconds are an `expected_seconds` with the `COSTS` below, which stand in every line: they are not measurements.
Table, temperatures and scores are learned anew in each halving, as `geep profile` does. Not measured: several
trainings, other encoders.

    python benchmarks/prediction.py --data-dir DATA --runs-dir RUNS --cache CACHE

appends to benchmarks/results/prediction.jsonl; logits are kept in CACHE, so it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from geep.backends import TokenBatch
from geep.calibration import (
    TRIAL_QUANTILES,
    TRIAL_SPEEDS,
    Choice,
    ExitRun,
    Outcomes,
    Route,
    calibrate,
    choosing,
    profile,
    try_speed,
)
from geep.data import DataPlan
from geep.engine import Engine, ExitSettings
from geep.exits import (
    AGREEMENT,
    CRITERIA,
    AgreementScore,
    ExitProfile,
    fit_agreement_score,
    fit_temperature,
    follow,
    profile_exits,
)
from geep.folder import Provenance
from geep.predictor import fit_levels
from geep.promise import RISKS, PairedCounts, Promise, clopper_pearson_upper, walk
from geep.scheduler import CostModel, expected_seconds, thin_out

RESULTS = Path(__file__).parent / "results"
DATA_SETS = ("trec", "sst2", "thucnews", "ag_news")
PROMISES = {"drop 0.5": Promise(max_accuracy_drop=0.005), "agreement 99": Promise(min_agreement=0.99)}

# Seconds and tokens of a batch; none is a fit. "cpu": 12 layers of 384, float32; a token's time follows from the
# study's throughput of the full model, a check's from a rough timing on a busy machine. The others are assumptions for
# a GPU: 100 us to launch a layer, 300 us for a classifier, the wait and the re-packing.
COSTS: dict[str, tuple[CostModel, int]] = {
    "cpu": (CostModel(5e-4, 3e-5, 2e-4, 1e-5), 2048),
    "gpu, 2k tokens": (CostModel(1e-4, 2.3e-8, 3e-4, 1e-7), 2048),
    "gpu, 32k tokens": (CostModel(1e-4, 2.3e-8, 3e-4, 1e-7), 32768),
}
WINDOW_TOKENS = 2**17


@dataclass(frozen=True)
class Texts:
    """A data set's engine and the runs of its training texts, its held-out ones (both halves) and its test split."""

    engine: Engine
    train: ExitRun
    heldout: ExitRun
    test: ExitRun
    num_profile: int
    known: dict[tuple[int, str], Engine] = field(default_factory=dict)


def main() -> None:
    """Collect what is missing, then study one data set after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of data set folders")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where benchmarks/study.py trained")
    parser.add_argument("--cache", type=Path, default=Path("runs/prediction"), help="where the logits are kept")
    parser.add_argument("--only", default=",".join(DATA_SETS), help="data sets, by commas")
    parser.add_argument("--steps", default="criteria,promises,probe,test", help="steps, by commas")
    parser.add_argument("--halvings", type=int, default=5)
    parser.add_argument("--max-test", type=int, default=7600, help="bound on the test rows")
    args = parser.parse_args()
    for name in args.only.split(","):
        texts = collect(name, args.data_dir, args.runs_dir / name, args.cache, args.max_test)
        for step in args.steps.split(","):
            for line in STEPS[step](texts, args.halvings):
                write({"step": step, "data": name, **line})


def write(line: dict[str, Any]) -> None:
    """Show a result and append it to the results."""
    text = json.dumps(line)
    print(text, flush=True)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "prediction.jsonl").open("a", encoding="utf-8") as file:
        file.write(text + "\n")


# --------------------------------------------------------------------------------------------------------------------
# Logits
# --------------------------------------------------------------------------------------------------------------------


def collect(name: str, data_dir: Path, model: Path, cache: Path, max_test: int) -> Texts:
    """Run all exits of a trained model over all its rows, once."""
    engine = Engine.from_pretrained(model, device="cpu", dtype="float32")
    plan = replace(DataPlan(**Provenance.read(model).data), data_dir=str(data_dir))
    dataset = plan.load()
    parts = plan.divide(dataset)
    assert dataset.test is not None  # all of `DATA_SETS` have one
    runs = {}
    splits = {"train": parts.train, "profile": parts.profile, "calibration": parts.calibration, "test": dataset.test}
    for part, split in splits.items():
        file = cache / f"{name}-{part}.npz"
        if not file.exists():
            run = ExitRun.of(engine, split.select(range(min(len(split), max_test))) if part == "test" else split)
            assert run.labels is not None
            cache.mkdir(parents=True, exist_ok=True)
            np.savez(
                file.with_suffix(".part.npz"),
                input_ids=run.batch.input_ids,
                lengths=run.batch.lengths,
                logits=run.exit_logits.numpy(),
                labels=run.labels.numpy(),
            )
            file.with_suffix(".part.npz").rename(file)
        saved = np.load(file)
        batch = TokenBatch(saved["input_ids"].astype(np.int64), None, saved["lengths"])
        runs[part] = ExitRun(batch, torch.from_numpy(saved["logits"]), torch.from_numpy(saved["labels"]))
    heldout = joined(runs["profile"], runs["calibration"])
    return Texts(engine, runs["train"], heldout, runs["test"], len(runs["profile"].batch))


def joined(first: ExitRun, second: ExitRun) -> ExitRun:
    """The texts of two runs of an engine, all labelled."""
    assert first.labels is not None
    assert second.labels is not None
    return ExitRun(
        TokenBatch.concat([first.batch, second.batch]),
        torch.cat([first.exit_logits, second.exit_logits], dim=1),
        torch.cat([first.labels, second.labels]),
    )


def _select(run: ExitRun, rows: NDArray[np.int64]) -> ExitRun:
    assert run.labels is not None
    index = torch.from_numpy(rows)
    return ExitRun(run.batch.select(rows), run.exit_logits[:, index], run.labels[index])


def _halvings(texts: Texts, count: int) -> Iterator[tuple[ExitRun, ExitRun]]:
    random = np.random.default_rng(0)
    for _ in range(count):
        order = random.permutation(len(texts.heldout.batch))
        yield _select(texts.heldout, order[: texts.num_profile]), _select(texts.heldout, order[texts.num_profile :])


def learned(texts: Texts, tuning: ExitRun, criterion: str) -> Engine:
    """The engine with what `geep profile` learns from one half; that of the last half is remembered."""
    key = hash(tuning.batch.input_ids.tobytes()), criterion
    if key not in texts.known:
        for old in [old for old in texts.known if old[0] != key[0]]:
            del texts.known[old]
        texts.known[key] = profile(texts.engine, texts.train, tuning, criterion=criterion).engine
    return texts.known[key].replace()


def plainest(texts: Texts, tuning: ExitRun) -> str:
    """The criterion of before: of those without learned scores, the one with fewest layers at equal agreement."""

    def layers(name: str) -> float:
        temperatures = [fit_temperature(logits, tuning.labels) for logits in tuning.exit_logits]  # type: ignore[arg-type]
        found = profile_exits(tuning.exit_logits, texts.engine.depths, criterion=name, temperatures=temperatures)
        return float(np.mean(_layers_at(found, found.uncertainty[:, :-1])))

    return min(CRITERIA, key=layers)


# --------------------------------------------------------------------------------------------------------------------
# Criteria
# --------------------------------------------------------------------------------------------------------------------

DIFFERING = (0.005, 0.01, 0.02)


def criteria(texts: Texts, halvings: int) -> Iterator[dict[str, Any]]:
    """Mean layers at equal disagreement, for each way to judge an exit."""
    found: dict[str, list[list[float]]] = {}
    for fit, judge in _halvings(texts, halvings):
        for name, (judged, levels) in _judged(texts, fit, judge).items():
            found.setdefault(name, []).append(_layers_at(judged, levels))
    for name, rows in found.items():
        layers: list[float] = [round(float(mean), 3) for mean in np.mean(rows, axis=0)]
        at = {str(share): mean for share, mean in zip(DIFFERING, layers, strict=True)}
        yield {"method": name, "halvings": halvings, "layers_at_differing": at}


def _layers_at(judged: ExitProfile, levels: NDArray[np.float32]) -> list[float]:
    speeds = np.unique(np.quantile(levels, np.linspace(0, 1, 200)))
    rows, depths = np.arange(len(judged)), np.asarray(judged.depths)
    columns = [judged.exit_indices(float(speed)) for speed in speeds]
    differing = np.array([1 - judged.agrees[rows, column].mean() for column in columns])
    layers = np.array([depths[column].mean() for column in columns])
    return [float(layers[differing <= level].min(initial=depths[-1])) for level in DIFFERING]


def _judged(texts: Texts, fit: ExitRun, judge: ExitRun) -> dict[str, tuple[ExitProfile, NDArray[np.float32]]]:
    """Profiles of the judged half, and the uncertainties of the fitted half as levels to try."""
    engine = learned(texts, fit, AGREEMENT)
    both, settings = Outcomes(engine, joined(fit, judge)), engine.settings
    plain = both.profile(replace(settings, criterion=plainest(texts, fit)))
    learnt = both.profile(settings)
    own = {depth: replace(score, table=0.0) for depth, score in without_table(Outcomes(engine, fit)).items()}
    no_table = both.profile(replace(settings, agreement=own))
    answers = both.logits.argmax(-1).T.numpy()
    changed = answers[:, 1:-1] != answers[:, :-2]
    patience = plain.uncertainty.copy()
    patience[:, 1:-1] = np.where(changed, 1.0, patience[:, 1:-1])
    depth = np.asarray(plain.depths)
    looser = np.clip(plain.uncertainty * np.sqrt(1 - depth / (depth[-1] + 0.5)), 0, 1)
    ways = {
        "best of entropy, confidence, margin": plain.uncertainty,
        "and the exit before must agree": patience,
        "and thresholds that loosen with depth": looser,
        "agreement": learnt.uncertainty,
        "agreement, without the table": no_table.uncertainty,
        "agreement, with the exits before": _with_history(both, len(fit.batch), plain),
    }
    count = len(fit.batch)
    rows = np.arange(count, len(both))
    return {
        name: (replace(plain, uncertainty=unsure.astype(np.float32)).select(rows), unsure[:count, :-1])
        for name, unsure in ways.items()
    }


def without_table(fit: Outcomes) -> dict[int, AgreementScore]:
    """Agreement scores that do not read what the table says."""
    agrees = fit.profile(ExitSettings()).agrees
    return {
        depth: fit_agreement_score(fit.logits[column], None, agrees[:, column], multi_label=fit.engine.multi_label)
        for column, depth in enumerate(fit.depths[:-1])
    }


def _with_history(outcomes: Outcomes, num_fit: int, profile: ExitProfile) -> NDArray[np.float64]:
    """A logistic model per exit that also reads what all exits before it said, so it has to ask them all."""
    shares, rows = outcomes.logits.log_softmax(-1).numpy(), np.arange(len(outcomes))
    unsure = np.zeros(profile.uncertainty.shape)
    for column in range(len(profile.depths) - 1):
        answer = shares[column].argmax(-1)
        others = shares[column].copy()
        others[rows, answer] = -np.inf
        features = [shares[column][rows, answer] - others.max(-1)]
        for before in range(column):
            features += [shares[before][rows, answer].clip(-8), shares[before].argmax(-1) == answer]
        agrees, table = profile.agrees[:num_fit, column], np.stack(features, axis=1).clip(-12, 12)
        if not agrees.all():
            model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
            unsure[:, column] = 1 - model.fit(table[:num_fit], agrees).predict_proba(table)[:, 1]
    return unsure


# --------------------------------------------------------------------------------------------------------------------
# Promises
# --------------------------------------------------------------------------------------------------------------------


def product_bound(spoilt: int, repaired: int, num_texts: int, tail: float) -> float:
    """The bound of before: changes and direction bounded each by itself, and multiplied."""
    changed = clopper_pearson_upper(spoilt + repaired, num_texts, tail * 0.35)
    return changed * max(2 * clopper_pearson_upper(spoilt, spoilt + repaired, tail * 0.65) - 1, 0.0)


@contextmanager
def _old_bounds() -> Iterator[None]:
    """Promises of accuracy are certified by `product_bound` meanwhile."""

    def bound(counts: PairedCounts, tail: float) -> float:
        return product_bound(*counts.judged(), counts.num_texts, tail)

    kept = RISKS["max_accuracy_drop"]
    RISKS["max_accuracy_drop"] = replace(kept, bound=bound)
    try:
        yield
    finally:
        RISKS["max_accuracy_drop"] = kept


@contextmanager
def _every_exit_asked() -> Iterator[None]:
    """`choose` leaves no exit out meanwhile."""
    choosing.thin_out = lambda layers, _: tuple(layers)
    try:
        yield
    finally:
        choosing.thin_out = thin_out


Method = Callable[[Texts, ExitRun, ExitRun, Promise], Engine]


def _before(texts: Texts, tuning: ExitRun, fresh: ExitRun, promise: Promise) -> Engine:
    """Settings chosen by what looks good on the tuning texts, without asking what they could certify."""
    engine, each = learned(texts, tuning, plainest(texts, tuning)), promise.sharing(0.5)
    tuned, certified = Outcomes(engine, tuning), Outcomes(engine, fresh)
    weighed = []
    with _old_bounds():
        for quantile in TRIAL_QUANTILES:
            for lexical in (False, True):
                settings = replace(engine.settings, speed=0.0, quantile=quantile, lexical_exit=lexical)
                trials = tuple(tuned.trial(replace(settings, speed=speed), each) for speed in TRIAL_SPEEDS)
                good = [trial.mean_exit_layer for trial in trials if trial.risk <= promise.allowed]
                weighed.append(Choice(settings, trials, min(good, default=np.inf)))
        best = min(weighed, key=lambda choice: choice.least)
        orders = [Route(each, each, from_safest=safest).order(tuned, best) for safest in (False, True)]
        speed = max(walk(lambda settings: certified.trial(settings, each), order).speed for order in orders)
    return engine.replace(settings=replace(best.settings, speed=speed))


def _old_bound(texts: Texts, tuning: ExitRun, fresh: ExitRun, promise: Promise) -> Engine:
    with _old_bounds():
        return _plain(texts, tuning, fresh, promise)


def _plain(texts: Texts, tuning: ExitRun, fresh: ExitRun, promise: Promise) -> Engine:
    return calibrate(learned(texts, tuning, plainest(texts, tuning)), tuning, fresh, promise).engine


def _agreement(texts: Texts, tuning: ExitRun, fresh: ExitRun, promise: Promise) -> Engine:
    engine = learned(texts, tuning, AGREEMENT)
    return calibrate(engine, tuning, fresh, promise, criterion=AGREEMENT).engine


def _now(texts: Texts, tuning: ExitRun, fresh: ExitRun, promise: Promise) -> Engine:
    return calibrate(learned(texts, tuning, AGREEMENT), tuning, fresh, promise).engine


def _for(name: str, *, thin: bool) -> Method:
    """`calibrate` with a cost model; without thinning out, only the quantile is chosen by time."""

    def run(texts: Texts, tuning: ExitRun, fresh: ExitRun, promise: Promise) -> Engine:
        cost, tokens = COSTS[name]
        other = learned(texts, tuning, AGREEMENT)
        other.deployment = replace(other.deployment, max_batch_tokens=tokens)
        with nullcontext() if thin else _every_exit_asked():
            return calibrate(other, tuning, fresh, promise, cost=cost, criterion=AGREEMENT).engine

    return run


METHODS: dict[str, Method] = {
    "before: product bound, three criteria": _before,
    "chosen by what could be certified": _old_bound,
    "and exact bound": _plain,
    "and agreement": _agreement,
    "and the criterion chosen": _now,
    "and quantile by cost (gpu, 32k tokens)": _for("gpu, 32k tokens", thin=False),
    "and check layers by cost (gpu, 32k tokens)": _for("gpu, 32k tokens", thin=True),
    "and check layers by cost (cpu)": _for("cpu", thin=True),
}


def promises(texts: Texts, halvings: int) -> Iterator[dict[str, Any]]:
    """What `calibrate` certifies, part by part."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for tuning, fresh in _halvings(texts, halvings):
        for promise_name, promise in PROMISES.items():
            for name, method in METHODS.items():
                row = outcome(method(texts, tuning, fresh, promise), fresh)
                rows.setdefault((promise_name, name), []).append(row)
    for (promise_name, name), found in rows.items():
        numbers = {key: [row[key] for row in found] for key in found[0]}
        checks = numbers.pop("checks")
        yield {
            "promise": promise_name,
            "method": name,
            "halvings": halvings,
            **{key: round(float(np.mean(values)), 4) for key, values in numbers.items()},
            "layers_deviation": round(float(np.std(numbers["layers"])), 3),
            "check_layers": checks,
            "costs": {key: [asdict(cost), tokens] for key, (cost, tokens) in COSTS.items()},
        }


def outcome(engine: Engine, run: ExitRun) -> dict[str, Any]:
    """Mean layers, accuracy and modelled microseconds a text of an engine on texts whose exits are known."""
    settings = engine.settings
    outcomes = Outcomes(engine, run)
    found, plan, column = outcomes.profile(settings), outcomes.planned(settings), outcomes.answered(settings)
    rows, depths = np.arange(len(found)), np.asarray(found.depths)
    assert found.correct is not None
    asked = settings.asked_layers(engine.depths).tolist()
    return {
        "speed": settings.speed,
        "layers": float(depths[column].mean()),
        "accuracy": float(found.correct[rows, column].mean()),
        "full_accuracy": float(found.correct[:, -1].mean()),
        "agreement": float(found.agrees[rows, column].mean()),
        "quantile": settings.quantile,
        **{f"us, {name}": _microseconds(name, depths[plan], depths[column], run, asked) for name in COSTS},
        "checks": asked[:-1],
    }


def _microseconds(
    name: str, first: NDArray[np.int64], last: NDArray[np.int64], run: ExitRun, asked: list[int]
) -> float:
    cost, tokens = COSTS[name]
    lengths = run.batch.lengths
    return 1e6 * expected_seconds(
        first, last, lengths, asked, cost, max_batch_tokens=tokens, window_tokens=WINDOW_TOKENS
    )


# --------------------------------------------------------------------------------------------------------------------
# Probe
# --------------------------------------------------------------------------------------------------------------------


def probe(texts: Texts, halvings: int) -> Iterator[dict[str, Any]]:
    """All texts are asked at layer p; those left are asked next where their uncertainty at p says, then everywhere.

    The speed is the highest that the bound of the promise allows on the judged half: an upper end for the probe.
    """
    rows: dict[tuple[str, int, float], list[float]] = {}
    for fit, judge in _halvings(texts, halvings):
        for name in ("cpu", "gpu, 32k tokens"):
            for first in (1, 2, 3):
                for quantile in (0.05, 0.4):
                    found = _probed(texts, fit, judge, first, quantile, name)
                    rows.setdefault((name, first, quantile), []).append(found)
    for (name, first, quantile), seconds in rows.items():
        yield {
            "method": f"probe at {first}, quantile {quantile}",
            "regime": name,
            "us": round(float(np.mean(seconds)), 3),
            "halvings": halvings,
            "cost": [asdict(COSTS[name][0]), COSTS[name][1]],
        }


def _probed(texts: Texts, fit: ExitRun, judge: ExitRun, first: int, quantile: float, name: str) -> float:
    engine = learned(texts, fit, AGREEMENT)
    fitted, judged = (Outcomes(engine, run).profile(engine.settings) for run in (fit, judge))
    depths, promise, least = np.asarray(judged.depths), PROMISES["drop 0.5"].sharing(0.5), np.inf
    later = np.flatnonzero(depths > first)
    column = int(np.flatnonzero(depths == first)[0])
    for speed in TRIAL_SPEEDS:
        exit_after = fitted.from_depth(first + 1).exit_indices(speed)
        levels = fit_levels(
            torch.from_numpy(fitted.uncertainty[:, [column]]),
            torch.from_numpy(exit_after[:, None]),
            num_depths=len(later),
        )
        scores = torch.from_numpy(np.ascontiguousarray(judged.uncertainty[:, column]))
        following = later[levels.exit_indices(scores, 0, quantile).numpy()]
        unsure = judged.uncertainty.copy()
        unsure[:, 1:column] = 1.0
        places = np.arange(len(depths))
        unsure[(places > column) & (places < following[:, None])] = 1.0
        asked_at = replace(judged, uncertainty=unsure)
        plan = np.zeros(len(judged), dtype=np.int64)
        trial = try_speed(asked_at, plan, promise, speed=speed, on_miss="continue")
        if not trial.passed:
            continue
        last = depths[follow(asked_at, plan, speed=speed, on_miss="continue")]
        all_layers = depths[depths > first].tolist()
        probed = np.where(last >= first, first, 99)
        seconds = _microseconds(name, probed, np.minimum(last, first), judge, [first]) - _layers_only(
            name, np.minimum(last, first), judge
        )
        seconds += _microseconds(name, depths[following], last, judge, all_layers)
        least = min(least, seconds)
    return least if np.isfinite(least) else _layers_only(name, np.full(len(judged), depths[-1]), judge)


def _layers_only(name: str, last: NDArray[np.int64], run: ExitRun) -> float:
    return _microseconds(name, last, last, run, [])


# --------------------------------------------------------------------------------------------------------------------
# Test
# --------------------------------------------------------------------------------------------------------------------


def test(texts: Texts, _halvings_: int) -> Iterator[dict[str, Any]]:
    """The halves as `geep calibrate` draws them, and once the test split."""
    rows = np.arange(len(texts.heldout.batch))
    tuning, fresh = (_select(texts.heldout, part) for part in np.split(rows, [texts.num_profile]))
    line = {"costs": {key: [asdict(cost), tokens] for key, (cost, tokens) in COSTS.items()}}
    for promise_name, promise in PROMISES.items():
        for name in (
            "before: product bound, three criteria",
            "and exact bound",
            "and agreement",
            "and the criterion chosen",
            "and check layers by cost (gpu, 32k tokens)",
        ):
            kept = METHODS[name](texts, tuning, fresh, promise)
            yield {
                "promise": promise_name,
                "method": name,
                "calibration": outcome(kept, fresh),
                "test": outcome(kept, texts.test),
                "test_rows": len(texts.test.batch),
                **line,
            }


STEPS: dict[str, Callable[[Texts, int], Iterator[dict[str, Any]]]] = {
    "criteria": criteria,
    "promises": promises,
    "probe": probe,
    "test": test,
}


if __name__ == "__main__":
    main()
