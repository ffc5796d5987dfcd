"""Teach a trained model when it may stop: profile its exits, fill the exit table, keep a promise.

Everything here is measured on the engine as deployed (backend, dtype, table, rule on a miss), on texts that the model
was not trained on. `profile` comes first and makes the table; `keep_promise` then finds the speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from geep.backends import PackedBackend, TokenBatch
from geep.backends.int8 import observe
from geep.backends.packed_layer import packed_layers
from geep.data import Split
from geep.engine import RANGES_FILE, Engine, ExitSettings, Plan
from geep.exits import (
    AGREEMENT,
    CRITERIA,
    AgreementScore,
    Calibration,
    ExitProfile,
    OnMiss,
    Promise,
    TrialPoint,
    answer_of,
    calibrate,
    check_enough,
    fit_temperature,
    follow,
    profile_exits,
    try_speed,
)
from geep.predictor import PREDICTORS, ExitPrediction, ExitPredictor, Lexical
from geep.scheduler import CostModel, expected_seconds, schedule, thin_out

Integers = NDArray[np.int64]
Report = Callable[[str, float], None]

# Speeds for which the table holds counts; a run takes the nearest. Dense where probabilities of disagreement live.
TABLE_SPEEDS: tuple[float, ...] = (0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7)

# Speeds that `keep_promise` walks, fixed before any text is seen: dense where well-trained exits live, near 0.
TRIAL_SPEEDS: tuple[float, ...] = tuple(
    round(float(speed), 4) for speed in (*np.geomspace(0.001, 0.1, 15), *np.linspace(0.14, 1.0, 44))
)

# Quantiles tried for the predicted layer. Asking early costs a check, asking late costs layers.
TRIAL_QUANTILES: tuple[float, ...] = (0.05, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True, slots=True)
class ExitRun:
    """All exits of some texts, run once; any setting's outcome can be read off without running the model again.

    Attributes:
        batch: The texts' tokens.
        exit_logits: Logits of every exit, the full model last, (num_depths, num_texts, num_labels).
        labels: Label ids, or 0/1 for multi-label; None where unknown.
        reference: Logits of the float32 full model, (num_texts, num_labels); None where that is the last exit, or
            where nothing is compared with it.
    """

    batch: TokenBatch
    exit_logits: Tensor
    labels: Tensor | None
    reference: Tensor | None = None

    @classmethod
    def of(
        cls,
        engine: Engine,
        split: Split,
        report: Callable[[float], None] = lambda _: None,
        *,
        with_reference: bool = True,
    ) -> ExitRun:
        """Run the exits of an engine over texts, and the float32 full model of a quantised one if wanted."""
        batch = engine.tokenize(split.inputs).batch
        labels = None if split.labels is None else torch.from_numpy(split.labels)
        reference = None
        if engine.dtype == "int8" and with_reference:
            reference = engine.in_float32().run_tokens(batch, settings=ExitSettings(speed=0.0)).logits
        return cls(batch, engine.exit_logits(batch, report=report), labels, reference)

    @property
    def flat(self) -> tuple[Tensor, Tensor]:
        """Token ids and lengths as the predictor takes them."""
        return torch.from_numpy(self.batch.input_ids), torch.from_numpy(self.batch.lengths)


@dataclass(frozen=True, slots=True)
class PredictorQuality:
    """How well exit layers are foretold, at one speed, on texts that filled no table.

    Attributes:
        kind: Row of `PREDICTORS`, or "constant" or "length".
        speed: The speed at which the true exit layers were taken.
        rank_correlation: Spearman's, of the score with the true exit layer; 0 for a constant.
        mean_absolute_error: Of the predicted (median) layer, in layers.
        early_share: Share of texts predicted above (before) their true exit.
    """

    kind: str
    speed: float
    rank_correlation: float
    mean_absolute_error: float
    early_share: float


@dataclass(frozen=True, slots=True)
class ProfileResult:
    """What `profile` found.

    Attributes:
        engine: The engine with its table, criterion and temperatures; its speed is still 0.
        quality: Of the predictors that were tried, on the held-out texts.
        heldout: The held-out texts' run, which `keep_promise` can choose settings on without running them again.
        mean_exit_layers: Mean exit layer at each of `TABLE_SPEEDS`, on training and on held-out texts: exits of
            training texts are too early, which is why levels and promises come from held-out ones.
    """

    engine: Engine
    quality: tuple[PredictorQuality, ...]
    heldout: ExitRun
    mean_exit_layers: tuple[tuple[float, float, float], ...]


def profile(
    engine: Engine,
    train: Split | ExitRun,
    heldout: Split | ExitRun,
    *,
    kind: str | None = None,
    criterion: str = AGREEMENT,
    ngram_order: int = 2,
    report: Report = lambda _what, _share: None,
) -> ProfileResult:
    """Run all exits over texts and learn temperatures, criterion, exit table and lexical exit from them.

    Args:
        engine: Engine of a trained model; its table and settings are replaced.
        train: Texts that fill the table and teach the lexical exit (its labels, if there), or their run.
        heldout: Texts the model was not trained on, or their run: temperatures, agreement scores and levels come from
            them.
        kind: Row of `PREDICTORS`; None: the one whose scores rank the held-out texts best.
        criterion: "agreement", or a row of `CRITERIA`.
        ngram_order: Longest n-gram of the table's keys.
        report: Told what is being done, and the share of it that is done.

    Raises:
        ValueError: If either split is empty, the criterion is unknown, or a quantised engine answers otherwise than
            its float32 model too often.
    """
    if len(engine.depths) < 2:
        raise ValueError(
            "The model has no exits, so there is nothing to profile; train it with a recipe that has some."
        )
    for name, texts in (("training", train), ("held-out", heldout)):
        if not len(texts.batch if isinstance(texts, ExitRun) else texts):
            raise ValueError(f"No {name} texts to profile; expected at least one (a few hundred for a useful table).")
    ExitSettings(criterion=criterion)  # refuses an unknown one before any work is done
    held, seen = heldout, train
    if isinstance(held, Split):
        held = ExitRun.of(engine, held, partial(report, "all exits, held-out texts"))
    _check_quantised(held, multi_label=engine.multi_label)
    if isinstance(seen, Split):
        # Training texts fill the table with where exits are sure, not with whether they are right.
        seen = ExitRun.of(engine, seen, partial(report, "all exits, training texts"), with_reference=False)
    depths, many = engine.depths, engine.multi_label

    report("temperatures, criterion, exit table", 0.0)
    config = engine.model.encoder.config

    def fit(name: str, exits: list[Tensor], lexical: Lexical | None) -> ExitPredictor:
        return ExitPredictor.fit(
            name,
            *seen.flat,
            exits[0],
            seen.labels,
            *held.flat,
            exits[1],
            depths=depths,
            speeds=TABLE_SPEEDS,
            num_labels=len(engine.label_names),
            vocab_size=config.vocab_size,
            special_ids=sorted(set(engine.tokenizer.all_special_ids)),
            multi_label=many,
            ngram_order=ngram_order,
            lexical=lexical,
        )

    # The lexical exit does not depend on where the exits are, but they on it: the criterion reads its logits.
    nowhere = [torch.zeros(len(run.batch), len(TABLE_SPEEDS), dtype=torch.int64) for run in (seen, held)]
    draft = fit(next(iter(PREDICTORS)), nowhere, None)
    settings = _fit_settings(engine.replace(predictor=draft, settings=ExitSettings()), held, criterion)
    drafted = engine.replace(predictor=draft, settings=settings)
    seen_profile, held_profile = (full_profile(drafted, run, settings).from_depth(1) for run in (seen, held))
    exits = [_exit_grid(seen_profile), _exit_grid(held_profile)]
    fitted = {name: fit(name, exits, draft.lexical) for name in ([kind] if kind is not None else PREDICTORS)}
    quality = {
        name: [predictor_quality(held_profile, held.batch, predictor, speed) for speed in TABLE_SPEEDS]
        for name, predictor in fitted.items()
    }
    best = max(fitted, key=lambda name: float(np.mean([row.rank_correlation for row in quality[name]])))
    table_layers = np.asarray(depths)
    report("temperatures, criterion, exit table", 1.0)
    return ProfileResult(
        engine=engine.replace(predictor=fitted[best], settings=settings),
        quality=tuple(row for rows in quality.values() for row in rows),
        heldout=held,
        mean_exit_layers=tuple(
            (speed, float(table_layers[known].mean()), float(table_layers[fresh].mean()))
            for speed, known, fresh in zip(TABLE_SPEEDS, *(part.T.numpy() for part in exits), strict=True)
        ),
    )


# A quantised model that is further off than this, before any exit, is broken rather than a little less accurate.
MAX_QUANTISED_DROP = 0.01
MAX_QUANTISED_DISAGREEMENT = 0.05

# Texts on which activations are observed; their ranges hardly move beyond a few hundred.
_OBSERVED_TEXTS = 1024


def quantise(engine: Engine, texts: Split, *, folder: str | Path | None = None) -> Engine:
    """Return the int8 engine of a float32 one on the packed backend, without table.

    Args:
        engine: Engine whose weights are float32.
        texts: Texts on which the ranges of the activations are observed; the first thousand are taken.
        folder: The model's folder, where the ranges are kept for `Engine.from_pretrained`; None: nowhere.

    Raises:
        ValueError: If the encoder's layers cannot be packed or quantised, or there are no texts.
    """
    batch = engine.tokenize(texts.inputs[:_OBSERVED_TEXTS]).batch
    plain, packed = packed_layers(engine.model), PackedBackend(engine.model, layers=())  # embeds; the plain layers run
    everyone = np.full(len(batch), engine.depths[-1])
    with torch.inference_mode():
        cuts = schedule(everyone, batch.lengths, max_batch_tokens=engine.max_batch_tokens)
        starts = (packed.start(batch.select(cut.indices)) for cut in cuts)
        ranges = observe(plain, ((live.hidden, live.runs) for live in starts))
    quantised = Engine(
        engine.model,
        engine.tokenizer,
        config=replace(engine.config, backend="packed", dtype="int8"),
        identity=engine.identity,
        ranges=ranges,
    )
    if folder is not None:
        ranges.save(Path(folder) / RANGES_FILE, fingerprint=engine.identity)
    return quantised


def _check_quantised(run: ExitRun, *, multi_label: bool) -> None:
    """Refuse a quantised engine that is far from its float32 model with all layers run."""
    if run.reference is None:
        return
    every = profile_exits(
        run.exit_logits[-1:], [1], labels=run.labels, reference=run.reference, multi_label=multi_label
    )
    if every.correct is not None and every.reference_correct is not None:
        lost, most = float(every.reference_correct.mean() - every.correct.mean()), MAX_QUANTISED_DROP
        what = "points of accuracy"
    else:
        lost, most = float((~every.agrees).mean()), MAX_QUANTISED_DISAGREEMENT
        what = "% of the answers"
    if lost > most:
        raise ValueError(
            f"int8 loses {100 * lost:.1f} {what} of the float32 model on {len(every):,} held-out texts with all layers "
            f"run, expected at most {100 * most:g}; use float32 or bfloat16."
        )


def _fit_settings(engine: Engine, run: ExitRun, criterion: str) -> ExitSettings:
    """Temperatures of all depths, and agreement scores if they are the criterion, from held-out texts."""
    depths, logits = _all_logits(engine, run)
    target = answer_of(logits[-1], multi_label=engine.multi_label) if run.labels is None else run.labels
    return ExitSettings(
        criterion=criterion,
        temperatures={
            depth: fit_temperature(each, target, multi_label=engine.multi_label)
            for depth, each in zip(depths, logits, strict=True)
        },
        agreement=fit_agreement(engine, run) if criterion == AGREEMENT else {},
    )


def fit_agreement(engine: Engine, run: ExitRun) -> dict[int, AgreementScore]:
    """Learn the criterion "agreement" for every exit, and the lexical one, on texts the model was not trained on."""
    depths, logits = _all_logits(engine, run)
    agrees = full_profile(engine, run, ExitSettings()).agrees
    lexical = logits[0] if depths[0] == 0 else None
    return {
        depth: AgreementScore.fit(
            logits[column], None if depth == 0 else lexical, agrees[:, column], multi_label=engine.multi_label
        )
        for column, depth in enumerate(depths[:-1])
    }


def predictor_quality(
    profile: ExitProfile, batch: TokenBatch, predictor: ExitPredictor, speed: float
) -> PredictorQuality:
    """Compare predicted exit layers with those that the exits themselves choose at a speed."""
    actual = profile.from_depth(1).exit_layers(speed)
    found = predictor.predict(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.lengths), speed=speed)
    return layer_quality(predictor.kind, speed, found.scores.numpy(), found.exit_layers.numpy(), actual)


def layer_quality(
    kind: str, speed: float, scores: NDArray[Any], predicted: Integers, actual: Integers
) -> PredictorQuality:
    """Score predicted layers (num_texts,) and the scores behind them against the true ones."""
    varies = len(np.unique(scores)) > 1 and len(np.unique(actual)) > 1
    return PredictorQuality(
        kind=kind,
        speed=speed,
        rank_correlation=float(spearmanr(scores, actual).statistic) if varies else 0.0,
        mean_absolute_error=float(np.abs(predicted - actual).mean()),
        early_share=float((predicted < actual).mean()),
    )


@dataclass(frozen=True, slots=True)
class PromiseResult:
    """What `keep_promise` found: the engine at the calibrated speed, the trials, and the settings that were weighed."""

    engine: Engine
    calibration: Calibration
    promise: Promise


def keep_promise(
    engine: Engine,
    tuning: Split | ExitRun,
    fresh: Split | ExitRun,
    promise: Promise,
    *,
    on_miss: OnMiss = "continue",
    criterion: str | None = None,
    lexical_exit: bool | None = None,
    cost: CostModel | None = None,
    report: Report = lambda _what, _share: None,
) -> PromiseResult:
    """Set the engine to the highest speed that keeps a promise.

    Criterion, lexical exit, quantile, the layers asked and the order of the speeds are chosen on the `tuning` texts
    (the profile's held-out ones will do); the speed is certified on the `fresh` ones, which nothing was fitted or
    chosen on.

    Args:
        engine: Engine with a table (see `profile`), or without: then every exit is asked.
        tuning: Texts to choose settings on, or their run.
        fresh: Texts to certify on, or their run.
        promise: What must be kept. Two walks certify it, from speed 0 and from the speed that looks safest on the
            tuning texts, each at half of its error probability; the faster result is kept.
        on_miss: The rule to calibrate for.
        criterion: "agreement" or a row of `CRITERIA`; None: choose, if the profile learned "agreement" scores, else the
            profile's.
        lexical_exit: Allow or forbid answers without the encoder; None: choose.
        cost: What a run takes on this machine: settings are chosen for the least time, and where a check costs time
            only some exits are asked. None: settings are chosen for the fewest layers, and every exit is asked.
        report: Told what is being done, and the share of it that is done.

    Raises:
        TooFewTextsError: If there are too few fresh texts for the promise; the message says how many are needed.
        ValueError: If the promise is about accuracy and labels are missing, or the criterion is unknown or was not
            learned.
    """
    base = replace(engine.settings, on_miss=on_miss, lexical_exit=False, check_layers=None)
    criteria = _criteria(base) if criterion is None else [criterion]
    for judge in criteria:  # refuses one that is unknown, or that nothing was learned for, before any work is done
        engine.replace(settings=replace(base, criterion=judge))
    # Two walks share the error probability, so that the better of their results still keeps the promise.
    each = promise.halved()
    check_enough(len(fresh.batch if isinstance(fresh, ExitRun) else fresh), each)
    if isinstance(tuning, Split):
        tuning = ExitRun.of(engine, tuning, partial(report, "all exits, texts to choose settings on"))
    certified_on = fresh
    if isinstance(certified_on, Split):
        certified_on = ExitRun.of(engine, certified_on, partial(report, "all exits, texts to certify the promise on"))
    plans, weighed = _Plans(engine, tuning.batch), []
    for number, judge in enumerate(criteria):
        report("settings", number / len(criteria))
        settings = replace(base, criterion=judge)
        profile_of_tuning = full_profile(engine, tuning, settings)
        weighed += [
            _weigh(engine, profile_of_tuning, plans, choice, promise, cost)
            for choice in _choices(engine, settings, lexical_exit)
        ]
    report("settings", 1.0)
    best = min(weighed, key=lambda choice: choice.least)
    if cost is not None and on_miss == "continue":
        best = _with_fewer_checks(engine, tuning, plans, best, promise, cost)
    chosen = best.settings
    profile_of_fresh = full_profile(engine, certified_on, chosen)
    plans_of_fresh = _Plans(engine, certified_on.batch)
    walks = [
        calibrate(
            profile_of_fresh,
            lambda speed: plans_of_fresh.columns(replace(chosen, speed=speed)),
            each,
            on_miss=on_miss,
            speeds=speeds,
        )
        for speeds in (TRIAL_SPEEDS, _from_safest(best.trials))
    ]
    result = max(walks, key=lambda walk: walk.speed)
    kept = replace(chosen, speed=result.speed, certified_on=engine.deployed_as)
    return PromiseResult(engine.replace(settings=kept), result, promise)


class _Plans:
    """`planned_columns` of the same texts under many settings: the table is asked once for each of its answers."""

    def __init__(self, engine: Engine, batch: TokenBatch) -> None:
        self.engine, self.batch = engine, batch
        self._known: dict[tuple[int, float], ExitPrediction] = {}

    def columns(self, settings: ExitSettings) -> Integers:
        """Column of `full_profile` at which the engine would ask each text first."""
        engine = self.engine
        if engine.predictor is None or settings.speed == 0:
            return planned_columns(engine, self.batch, settings)
        key = engine.predictor.speed_index(settings.speed), settings.quantile
        if key not in self._known:
            self._known[key] = engine.foretell(self.batch, settings)
        return _columns(engine, engine.plan_from(self._known[key], self.batch.lengths, settings))


@dataclass(frozen=True, slots=True)
class _Choice:
    """Settings that were weighed on the tuning texts: every speed's trial, and the least that they take."""

    settings: ExitSettings
    trials: tuple[TrialPoint, ...]
    least: float


def _criteria(base: ExitSettings) -> list[str]:
    """Criteria worth weighing: beside a learned one the plain ones.

    "agreement" avoids every answer that differs from the full model's, even where it is the right one. Where exits
    repair many answers, a promise about accuracy is kept with fewer layers by a criterion that does not know.
    """
    return [AGREEMENT, *CRITERIA] if base.agreement else [base.criterion]


def _choices(engine: Engine, base: ExitSettings, lexical_exit: bool | None) -> list[ExitSettings]:
    """Settings worth weighing with a criterion."""
    quantiles, switches = [base.quantile], [False]
    if engine.predictor is not None:
        quantiles = list(TRIAL_QUANTILES)
        if engine.predictor.num_labels is not None and lexical_exit is not False:
            switches = [True] if lexical_exit else [False, True]
    return [replace(base, quantile=quantile, lexical_exit=lexical) for quantile in quantiles for lexical in switches]


def _weigh(
    engine: Engine,
    profile: ExitProfile,
    plans: _Plans,
    settings: ExitSettings,
    promise: Promise,
    cost: CostModel | None,
) -> _Choice:
    """Try every speed; the least is over those whose observed risk stays within the promise."""
    each = promise.halved()
    columns = [plans.columns(replace(settings, speed=speed)) for speed in TRIAL_SPEEDS]
    trials = tuple(
        try_speed(profile, plan, each, speed=speed, on_miss=settings.on_miss)
        for speed, plan in zip(TRIAL_SPEEDS, columns, strict=True)
    )
    # Where the tuning texts could certify a speed, the fresh ones, about as many, probably can; what merely looks good
    # would be chosen for its luck. Too few tuning texts certify nothing: then what looks good has to do.
    kept = [pair for pair in zip(trials, columns, strict=True) if pair[0].passed]
    kept = kept or [pair for pair in zip(trials, columns, strict=True) if pair[0].risk <= promise.allowed]
    if cost is None:
        least = min((trial.mean_exit_layer for trial, _ in kept), default=np.inf)
    else:
        seconds = (_seconds(engine, plans.batch, profile, plan, trial, settings, cost) for trial, plan in kept)
        least = min(seconds, default=np.inf)
    return _Choice(settings, trials, float(least))


def _seconds(
    engine: Engine,
    batch: TokenBatch,
    profile: ExitProfile,
    plan: Integers,
    trial: TrialPoint,
    settings: ExitSettings,
    cost: CostModel,
) -> float:
    depths = np.asarray(profile.depths)
    column = follow(profile, plan, speed=trial.speed, on_miss=settings.on_miss)
    return expected_seconds(
        depths[plan],
        depths[column],
        batch.lengths,
        settings.asked_layers(engine.depths).tolist(),
        cost,
        max_batch_tokens=engine.max_batch_tokens,
        window_tokens=engine.config.window_tokens,
    )


def _with_fewer_checks(
    engine: Engine, run: ExitRun, plans: _Plans, choice: _Choice, promise: Promise, cost: CostModel
) -> _Choice:
    """Leave out the exits that cost more time than they save."""

    def weighed(layers: tuple[int, ...]) -> _Choice:
        settings = replace(choice.settings, check_layers=layers)
        return _weigh(engine, full_profile(engine, run, settings), plans, settings, promise, cost)

    return weighed(thin_out(engine.depths[:-1], lambda layers: weighed(layers).least))


def _from_safest(trials: Sequence[TrialPoint]) -> list[float]:
    """Speeds from the one that looks safest on the tuning texts upwards.

    The walk from speed 0 has to pass where a handful of answers change: there the bound is wide and one text of bad
    luck ends it, long before speeds at which as many answers are repaired as spoilt. This walk begins there. It may
    fail at its first step, if what looked safest was luck: then the other walk's result stands.
    """
    safest = min(range(len(trials)), key=lambda number: (trials[number].bound, -number))
    return [trial.speed for trial in trials[safest:]]


def _all_logits(engine: Engine, run: ExitRun) -> tuple[tuple[int, ...], Tensor]:
    """Depths and logits of all exits, with the lexical exit in front where the engine's table has one."""
    lexical = None
    if engine.predictor is not None:
        lexical = engine.predictor.predict(*run.flat, speed=0.5).lexical_logits
    if lexical is None:
        return engine.depths, run.exit_logits
    return (0, *engine.depths), torch.cat([lexical[None].float(), run.exit_logits])


def full_profile(engine: Engine, run: ExitRun, settings: ExitSettings) -> ExitProfile:
    """Profile of all exits, with the lexical exit as column 0 where the engine's table has one.

    An exit that the settings do not ask has uncertainty 1: it is never certain enough.
    """
    depths, logits = _all_logits(engine, run)
    profile = profile_exits(
        logits,
        depths,
        criterion=settings.criterion,
        temperatures=[settings.temperature(depth) for depth in depths],
        agreement=[settings.agreement[depth] for depth in depths[:-1]] if settings.criterion == AGREEMENT else None,
        labels=run.labels,
        reference=run.reference,
        multi_label=engine.multi_label,
    )
    silent = ~np.isin(depths, [0, *settings.asked_layers(engine.depths)])
    profile.uncertainty[:, silent] = 1.0
    return profile


def planned_columns(engine: Engine, batch: TokenBatch, settings: ExitSettings) -> Integers:
    """Column of `full_profile` at which the engine would ask each text first."""
    return _columns(engine, engine.plan(batch, settings=settings))


def _columns(engine: Engine, plan: Plan) -> Integers:
    has_lexical = engine.predictor is not None and engine.predictor.num_labels is not None
    depths = (0, *engine.depths) if has_lexical else engine.depths
    return np.searchsorted(depths, plan.predicted_layers)


def _exit_grid(profile: ExitProfile) -> Tensor:
    """Column of each text's exit at each of `TABLE_SPEEDS`, (num_texts, num_speeds)."""
    return torch.from_numpy(np.stack([profile.exit_indices(speed) for speed in TABLE_SPEEDS], axis=1))
