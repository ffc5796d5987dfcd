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
from geep.engine import RANGES_FILE, Engine, ExitSettings
from geep.exits import (
    CRITERIA,
    Calibration,
    ExitProfile,
    OnMiss,
    Promise,
    TrialPoint,
    answer_of,
    calibrate,
    check_enough,
    fit_temperature,
    profile_exits,
    try_speed,
)
from geep.predictor import PREDICTORS, ExitPredictor
from geep.scheduler import schedule

Integers = NDArray[np.int64]
Report = Callable[[str, float], None]

# Speeds for which the table holds counts; a run takes the nearest.
TABLE_SPEEDS: tuple[float, ...] = (0.02, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)

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
        reference: Logits of the float32 full model where the engine is quantised, (num_texts, num_labels).
    """

    batch: TokenBatch
    exit_logits: Tensor
    labels: Tensor | None
    reference: Tensor | None = None

    @classmethod
    def of(cls, engine: Engine, split: Split, report: Callable[[float], None] = lambda _: None) -> ExitRun:
        """Run the exits of an engine over texts."""
        batch = engine.tokenize(split.inputs).batch
        labels = None if split.labels is None else torch.from_numpy(split.labels)
        reference = None
        if engine.dtype == "int8":
            reference = engine.in_float32().run_tokens(batch, settings=ExitSettings(speed=0.0)).logits
        return cls(batch, engine.exit_logits(batch, report=report), labels, reference)

    @property
    def flat(self) -> tuple[Tensor, Tensor]:
        """Token ids and lengths as the predictor takes them."""
        return torch.from_numpy(self.batch.input_ids), torch.from_numpy(self.batch.lengths)

    def trials(self, engine: Engine, settings: ExitSettings, promise: Promise) -> list[TrialPoint]:
        """Hold every one of `TRIAL_SPEEDS` against a promise."""
        profile = full_profile(engine, self, settings)
        return [
            try_speed(
                profile,
                planned_columns(engine, self.batch, replace(settings, speed=speed)),
                promise,
                speed=speed,
                on_miss=settings.on_miss,
            )
            for speed in TRIAL_SPEEDS
        ]


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
    train: Split,
    heldout: Split,
    *,
    kind: str | None = None,
    criterion: str | None = None,
    ngram_order: int = 2,
    report: Report = lambda _what, _share: None,
) -> ProfileResult:
    """Run all exits over texts and learn temperatures, criterion, exit table and lexical exit from them.

    Args:
        engine: Engine of a trained model; its table and settings are replaced.
        train: Texts that fill the table and teach the lexical exit (its labels, if there).
        heldout: Texts the model was not trained on: temperatures, criterion and levels come from them.
        kind: Row of `PREDICTORS`; None: the one whose scores rank the held-out texts best.
        criterion: Row of `CRITERIA`; None: the one that saves most layers at equal agreement.
        ngram_order: Longest n-gram of the table's keys.
        report: Told what is being done, and the share of it that is done.

    Raises:
        ValueError: If either split is empty, or a quantised engine answers otherwise than its float32 model too often.
    """
    if len(engine.depths) < 2:
        raise ValueError(
            "The model has no exits, so there is nothing to profile; train it with a recipe that has some."
        )
    for name, split in (("training", train), ("held-out", heldout)):
        if not len(split):
            raise ValueError(f"No {name} texts to profile; expected at least one (a few hundred for a useful table).")
    held = ExitRun.of(engine, heldout, partial(report, "all exits, held-out texts"))
    _check_quantised(held, multi_label=engine.multi_label)
    seen = ExitRun.of(engine, train, partial(report, "all exits, training texts"))
    depths, many = engine.depths, engine.multi_label

    report("temperatures, criterion, exit table", 0.0)
    target = answer_of(held.exit_logits[-1], multi_label=many) if held.labels is None else held.labels
    temperatures = [fit_temperature(logits, target, multi_label=many) for logits in held.exit_logits]

    def profiles(logits: Tensor, name: str) -> ExitProfile:
        return profile_exits(logits, depths, criterion=name, temperatures=temperatures, multi_label=many)

    if criterion is None:
        criterion = min(CRITERIA, key=lambda name: _layers_at_equal_agreement(profiles(held.exit_logits, name)))
    held_profile, train_profile = profiles(held.exit_logits, criterion), profiles(seen.exit_logits, criterion)
    held_exits, train_exits = _exit_grid(held_profile), _exit_grid(train_profile)

    tried = [kind] if kind is not None else list(PREDICTORS)
    config = engine.model.encoder.config
    fitted = {
        name: ExitPredictor.fit(
            name,
            *seen.flat,
            train_exits,
            seen.labels,
            *held.flat,
            held_exits,
            depths=depths,
            speeds=TABLE_SPEEDS,
            num_labels=len(engine.label_names),
            vocab_size=config.vocab_size,
            special_ids=sorted(set(engine.tokenizer.all_special_ids)),
            multi_label=many,
            ngram_order=ngram_order,
        )
        for name in tried
    }
    quality = {
        name: [predictor_quality(held_profile, held.batch, predictor, speed) for speed in TABLE_SPEEDS]
        for name, predictor in fitted.items()
    }
    best = max(fitted, key=lambda name: float(np.mean([row.rank_correlation for row in quality[name]])))
    predictor = fitted[best]
    by_depth = dict(zip(depths, temperatures, strict=True))
    lexical = predictor.predict(*held.flat, speed=0.5).lexical_logits
    if lexical is not None:
        by_depth[0] = fit_temperature(lexical, target, multi_label=many)
    table_layers = np.asarray(depths)
    report("temperatures, criterion, exit table", 1.0)
    return ProfileResult(
        engine=engine.replace(
            predictor=predictor, settings=ExitSettings(criterion=criterion, temperatures=by_depth, speed=0.0)
        ),
        quality=tuple(row for rows in quality.values() for row in rows),
        heldout=held,
        mean_exit_layers=tuple(
            (speed, float(table_layers[known].mean()), float(table_layers[fresh].mean()))
            for speed, known, fresh in zip(TABLE_SPEEDS, train_exits.T.numpy(), held_exits.T.numpy(), strict=True)
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
    plain, packed = packed_layers(engine.model), PackedBackend.build(engine.model, dtype="float32")
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
    fresh: Split,
    promise: Promise,
    *,
    on_miss: OnMiss = "continue",
    lexical_exit: bool | None = None,
    report: Report = lambda _what, _share: None,
) -> PromiseResult:
    """Set the engine to the highest speed that keeps a promise.

    The lexical exit, the quantile and the order of the speeds are chosen on the `tuning` texts (the profile's held-out
    ones will do); the speed is certified on the `fresh` ones, which nothing was fitted or chosen on.

    Args:
        engine: Engine with a table (see `profile`), or without: then every exit is asked.
        tuning: Texts to choose settings on, or their run.
        fresh: Texts to certify on.
        promise: What must be kept. Two walks certify it, from speed 0 and from the speed that looks safest on the
            tuning texts, each at half of its error probability; the faster result is kept.
        on_miss: The rule to calibrate for.
        lexical_exit: Allow or forbid answers without the encoder; None: choose.
        report: Told what is being done, and the share of it that is done.

    Raises:
        TooFewTextsError: If there are too few fresh texts for the promise; the message says how many are needed.
        ValueError: If the promise is about accuracy and labels are missing.
    """
    # Two walks share the error probability, so that the better of their results still keeps the promise.
    each = promise.halved()
    check_enough(len(fresh), each)
    if isinstance(tuning, Split):
        tuning = ExitRun.of(engine, tuning, partial(report, "all exits, texts to choose settings on"))
    certified_on = ExitRun.of(engine, fresh, partial(report, "all exits, texts to certify the promise on"))
    base = replace(engine.settings, on_miss=on_miss, lexical_exit=False)
    settings = [base]
    if engine.predictor is not None:
        has_lexical = engine.predictor.num_labels is not None and lexical_exit is not False
        switches = [True] if has_lexical and lexical_exit else [False, True] if has_lexical else [False]
        settings = [
            replace(base, quantile=quantile, lexical_exit=lexical)
            for quantile in TRIAL_QUANTILES
            for lexical in switches
        ]
    trials = {number: tuning.trials(engine, each, promise) for number, each in enumerate(settings)}
    best = min(trials, key=lambda number: _fewest_layers(trials[number], promise))
    chosen = settings[best]
    profile_of_fresh = full_profile(engine, certified_on, chosen)
    walks = [
        calibrate(
            profile_of_fresh,
            lambda speed: planned_columns(engine, certified_on.batch, replace(chosen, speed=speed)),
            each,
            on_miss=on_miss,
            speeds=speeds,
        )
        for speeds in (TRIAL_SPEEDS, _from_safest(trials[best]))
    ]
    result = max(walks, key=lambda walk: walk.speed)
    kept = replace(chosen, speed=result.speed, certified_on=engine.deployed_as)
    return PromiseResult(engine.replace(settings=kept), result, promise)


def _fewest_layers(trials: Sequence[TrialPoint], promise: Promise) -> float:
    """Fewest mean layers whose observed risk stays within the promise."""
    return min((trial.mean_exit_layer for trial in trials if trial.risk <= promise.allowed), default=float("inf"))


def _from_safest(trials: Sequence[TrialPoint]) -> list[float]:
    """Speeds from the one that looks safest on the tuning texts upwards.

    The walk from speed 0 has to pass where a handful of answers change: there the bound is wide and one text of bad
    luck ends it, long before speeds at which as many answers are repaired as spoilt. This walk begins there. It may
    fail at its first step, if what looked safest was luck: then the other walk's result stands.
    """
    safest = min(range(len(trials)), key=lambda number: (trials[number].bound, -number))
    return [trial.speed for trial in trials[safest:]]


def full_profile(engine: Engine, run: ExitRun, settings: ExitSettings) -> ExitProfile:
    """Profile of all exits, with the lexical exit as column 0 where the engine's table has one."""
    depths, logits = engine.depths, run.exit_logits
    lexical = None
    if engine.predictor is not None:
        lexical = engine.predictor.predict(*run.flat, speed=0.5).lexical_logits
    if lexical is not None:
        depths, logits = (0, *depths), torch.cat([lexical[None].float(), logits])
    return profile_exits(
        logits,
        depths,
        criterion=settings.criterion,
        temperatures=[settings.temperature(depth) for depth in depths],
        labels=run.labels,
        reference=run.reference,
        multi_label=engine.multi_label,
    )


def planned_columns(engine: Engine, batch: TokenBatch, settings: ExitSettings) -> Integers:
    """Column of `full_profile` at which the engine would ask each text first."""
    has_lexical = engine.predictor is not None and engine.predictor.num_labels is not None
    depths = (0, *engine.depths) if has_lexical else engine.depths
    return np.searchsorted(depths, engine.plan(batch, settings=settings).predicted_layers)


def _exit_grid(profile: ExitProfile) -> Tensor:
    """Column of each text's exit at each of `TABLE_SPEEDS`, (num_texts, num_speeds)."""
    return torch.from_numpy(np.stack([profile.exit_indices(speed) for speed in TABLE_SPEEDS], axis=1))


def _layers_at_equal_agreement(profile: ExitProfile, levels: Sequence[float] = (0.98, 0.99, 0.995)) -> float:
    """Mean exit layer at the highest speeds that still agree with the full model this often; lower is better."""
    speeds = np.unique(np.quantile(profile.uncertainty[:, :-1], np.linspace(0, 1, 200)))
    rows, depths = np.arange(len(profile)), np.asarray(profile.depths)
    columns = [profile.exit_indices(float(speed)) for speed in speeds]
    agreement = np.array([profile.agrees[rows, column].mean() for column in columns])
    layers = np.array([depths[column].mean() for column in columns])
    return float(np.mean([layers[agreement >= level].min(initial=depths[-1]) for level in levels]))
