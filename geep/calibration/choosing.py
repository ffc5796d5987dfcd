"""Settings chosen on tuning rows. The order in which they are certified, and the rows that do, are not known here.

Read `choose`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from geep.calibration.learning import learn_settings
from geep.calibration.runs import Outcomes
from geep.engine import Engine, ExitSettings
from geep.exits import AGREEMENT, CRITERIA, OnMiss
from geep.progress import Progress, no_progress
from geep.promise import Promise, Trial
from geep.scheduler import CostModel, expected_seconds, thin_out

Integers = NDArray[np.int64]

# Speeds that settings are weighed at, fixed before any text is seen: dense where well-trained exits live, near 0.
TRIAL_SPEEDS: tuple[float, ...] = tuple(
    round(float(speed), 4) for speed in (*np.geomspace(0.001, 0.1, 15), *np.linspace(0.14, 1.0, 44))
)


# Quantiles tried for the predicted layer. Asking early costs a check, asking late costs layers.
TRIAL_QUANTILES: tuple[float, ...] = (0.05, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True, slots=True)
class Choice:
    """Settings that were weighed on the tuning texts.

    Attributes:
        settings: The settings, at speed 0.
        trials: What every one of `TRIAL_SPEEDS` does with them.
        least: The least that they take within the promise: mean layers, or seconds a text; infinity if no speed is.
        is_certain: Whether the tuning texts could certify that, else it only looks good on them.
    """

    settings: ExitSettings
    trials: tuple[Trial, ...]
    least: float
    is_certain: bool = True

    @property
    def rank(self) -> tuple[float, float]:
        """Order of choices, the best first: what tuning texts could certify, then what comes nearest to it.

        Where nothing can be certified on them, fresh ones, about as many, will hardly certify what changes many
        answers, however good it looks.
        """
        return 0.0 if self.is_certain else min(trial.bound for trial in self.trials), self.least


def choose(
    tuning: Outcomes,
    promise: Promise,
    *,
    on_miss: OnMiss = "continue",
    criterion: str | None = None,
    lexical_exit: bool | None = None,
    check_layers: tuple[int, ...] | None = None,
    cost: CostModel | None = None,
    call_size: int | None = None,
    progress: Progress = no_progress,
) -> Choice:
    """Choose criterion, lexical exit, quantile and the layers asked, on tuning texts alone.

    Args:
        tuning: An engine on texts that it was not trained on.
        promise: What settings are weighed by.
        on_miss: The rule to choose for.
        criterion: "agreement" or a row of `CRITERIA`; None: choose, if the profile learned "agreement" scores, else
            the engine's.
        lexical_exit: Allow or forbid answers without the encoder; None: choose.
        check_layers: Exits that may be asked; None: choose.
        cost: What a run takes on this machine: settings are chosen for the least time. None: for the fewest layers.
        call_size: Texts of a call, where time is weighed; None: a stream of many.
        progress: Told what is being done.
    """
    base = base_settings(tuning.engine, on_miss, check_layers)
    judged = [
        replace(learned, criterion=judge)
        for learned in _fused(tuning, base, promise)
        for judge in criteria(base, criterion)
    ]
    weighed = []
    for number, each in enumerate(judged):
        progress("settings", number, len(judged))
        weighed += [
            _weigh(tuning, settings, promise, cost, call_size)
            for settings in _candidates(tuning.engine, each, lexical_exit)
        ]
    progress("settings", len(judged), len(judged))
    best = min(weighed, key=lambda choice: choice.rank)
    if cost is not None and on_miss == "continue" and check_layers is None:
        best = _with_fewer_checks(tuning, best, promise, cost, call_size)
    return best


def base_settings(engine: Engine, on_miss: OnMiss, check_layers: tuple[int, ...] | None = None) -> ExitSettings:
    """The engine's settings without what will be chosen."""
    return replace(engine.settings, speed=0.0, on_miss=on_miss, lexical_exit=False, check_layers=check_layers)


def _fused(tuning: Outcomes, base: ExitSettings, promise: Promise) -> list[ExitSettings]:
    """Ways to fuse answers with the table's: as the profile has learned it, and as the promise wants it.

    One about accuracy wants what is right, and may fuse the last answer as well; one about agreement wants what the
    full model says, whatever the labels. Settings that fuse nothing stay so.
    """
    if not base.fusing or not (promise.needs_labels or tuning.run.labels is not None):
        return [base]
    learned = learn_settings(
        tuning,
        AGREEMENT if base.agreement else base.criterion,
        by_labels=promise.needs_labels,
        fuse_last=promise.needs_labels,
    )
    return [
        base,
        replace(base, fusing=learned.fusing, temperatures=learned.temperatures, agreement=learned.agreement),
    ]


def criteria(base: ExitSettings, asked: str | None) -> list[str]:
    """Criteria worth weighing: the one asked for, or beside a learned one the plain ones.

    "agreement" avoids every answer that differs from the full model's, even where it is the right one. Where exits
    repair many answers, a promise about accuracy is kept with fewer layers by a criterion that does not know.
    """
    if asked is not None:
        return [asked]
    return [AGREEMENT, *CRITERIA] if base.agreement else [base.criterion]


def _candidates(engine: Engine, base: ExitSettings, lexical_exit: bool | None) -> list[ExitSettings]:
    """Settings worth weighing with a criterion."""
    quantiles, switches = [base.quantile], [False]
    if engine.predictor is not None:
        quantiles = list(TRIAL_QUANTILES)
        if engine.predictor.num_labels is not None and lexical_exit is not False:
            switches = [True] if lexical_exit else [False, True]
    return [replace(base, quantile=quantile, lexical_exit=lexical) for quantile in quantiles for lexical in switches]


def _weigh(
    tuning: Outcomes, settings: ExitSettings, promise: Promise, cost: CostModel | None, call_size: int | None
) -> Choice:
    """Try every speed; the least is over those whose observed risk stays within the promise."""
    at_speeds = [replace(settings, speed=speed) for speed in TRIAL_SPEEDS]
    trials = tuple(tuning.trial(each, promise) for each in at_speeds)
    # Where the tuning texts could certify a speed, the fresh ones, about as many, probably can; what merely looks good
    # would be chosen for its luck. Too few tuning texts certify nothing: then what looks good has to do.
    certain = [number for number, trial in enumerate(trials) if trial.passed]
    kept = certain or [number for number, trial in enumerate(trials) if trial.risk <= promise.allowed]
    if cost is None:
        least = min((trials[number].mean_exit_layer for number in kept), default=np.inf)
    else:
        least = min((_seconds(tuning, at_speeds[number], cost, call_size) for number in kept), default=np.inf)
    return Choice(settings, trials, float(least), bool(certain))


def _seconds(tuning: Outcomes, settings: ExitSettings, cost: CostModel, call_size: int | None) -> float:
    engine, depths = tuning.engine, np.asarray(tuning.depths)
    return expected_seconds(
        depths[tuning.planned(settings)],
        depths[tuning.answered(settings)],
        tuning.run.batch.lengths,
        settings.asked_layers(engine.depths).tolist(),
        cost,
        max_batch_tokens=engine.deployment.max_batch_tokens,
        window_tokens=engine.config.window_tokens,
        call_size=call_size,
    )


def _with_fewer_checks(
    tuning: Outcomes, choice: Choice, promise: Promise, cost: CostModel, call_size: int | None
) -> Choice:
    """Leave out the exits that cost more time than they save."""

    def weighed(layers: tuple[int, ...]) -> Choice:
        return _weigh(tuning, replace(choice.settings, check_layers=layers), promise, cost, call_size)

    return weighed(thin_out(tuning.engine.depths[:-1], lambda layers: weighed(layers).least))
