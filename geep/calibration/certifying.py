"""The speed that keeps a promise, certified on fresh rows.

Read `calibrate`: settings are chosen on one part of the rows (`choosing`), the speed is certified on another.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from geep.calibration.choosing import Choice, base_settings, choose, criteria
from geep.calibration.runs import ExitRun, Outcomes, check_labels
from geep.data import Split
from geep.engine import Certificate, Engine
from geep.exits import OnMiss
from geep.folder import CalibrationFile
from geep.progress import Progress, no_progress
from geep.promise import ConstantModelError, NothingCertifiedError, Promise, Walk, check_enough, walk
from geep.scheduler import CostModel


@dataclass(frozen=True, slots=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        engine: The engine at the calibrated speed; 0, the full model, if no speed passed. Its `certificate` is what may
            be said of it: None where not even the full model keeps the promise, as in int8 it may not.
        promise: What was asked for.
        walk: The trials of the better walk.
        num_texts: Texts that the speed was certified on.
    """

    engine: Engine
    promise: Promise
    walk: Walk
    num_texts: int

    def record(self) -> dict[str, Any]:
        """Return in plain words and numbers what is kept of it in `calibration.json`."""
        settings = self.engine.settings
        return {
            "speed": settings.speed,
            "on_miss": settings.on_miss,
            "quantile": settings.quantile,
            "check_layers": settings.check_layers,
            "lexical_exit": settings.lexical_exit,
            "criterion": settings.criterion,
            "promise": asdict(self.promise),
            "num_texts": self.num_texts,
            "trials": [asdict(trial) for trial in self.walk.trials],
        }

    def save(self, folder: str | Path) -> None:
        """Write table, settings and certificate into a model folder, keeping what its record says of the profile."""
        _save_record(self.engine, folder, self.record())


def save_refusal(engine: Engine, folder: str | Path, refusal: NothingCertifiedError) -> None:
    """Write into a model folder that the full model answers, and why nothing was certified."""
    at_full_depth = engine.replace(settings=replace(engine.settings, speed=0.0))
    _save_record(at_full_depth, folder, {"speed": 0.0, "refused": str(refusal)})


def _save_record(engine: Engine, folder: str | Path, calibration: dict[str, Any]) -> None:
    """Write an engine's settings, with what is known of their calibration, beside the record of its profile."""
    try:
        record = dict(CalibrationFile.read(folder).record)
    except FileNotFoundError:
        record = {}
    engine.save_exits(folder, record={**record, "calibration": calibration})


def calibrate(
    engine: Engine,
    tuning: Split | ExitRun,
    fresh: Split | ExitRun,
    promise: Promise,
    *,
    on_miss: OnMiss = "continue",
    criterion: str | None = None,
    lexical_exit: bool | None = None,
    cost: CostModel | None = None,
    progress: Progress = no_progress,
) -> Calibration:
    """Set an engine to the highest speed that keeps a promise.

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
        progress: Told what is being done, how much is done and how much there is.

    Raises:
        TooFewTextsError: If there are too few fresh texts for the promise; the message says how many are needed.
        ConstantModelError: If the full model gives all of the texts the same answer.
        ValueError: If the promise is about accuracy and labels are missing, or labels are not the model's, or the
            criterion is unknown or was not learned, or both texts are the same.
    """
    base = base_settings(engine, on_miss)
    for judge in criteria(base, criterion):
        # Refuses one that is unknown, or that nothing was learned for, before any work is done.
        engine.replace(settings=replace(base, criterion=judge))
    if lexical_exit and (engine.predictor is None or engine.predictor.num_labels is None):
        raise ValueError(
            "lexical_exit=True (--lexical) asks for answers by the table alone, found a model without a table that has "
            "learned labels; run `geep profile` first, or leave it out."
        )
    # Two walks share the error probability, so that the better of their results still keeps the promise.
    each = promise.halved()
    check_enough(len(fresh), each)
    for part in (tuning, fresh):
        if isinstance(part, Split):
            check_labels(engine, part)
    tuned, certified = (
        Outcomes(engine, part if isinstance(part, ExitRun) else ExitRun.of(engine, part, what=what, progress=progress))
        for part, what in (
            (tuning, "all exits, texts to choose settings on"),
            (fresh, "all exits, texts to certify the promise on"),
        )
    )
    if certified.run.texts and certified.run.texts == tuned.run.texts:
        raise ValueError(
            "The texts to certify on are those that settings are chosen on; expected others. What fits the texts that it "
            "was chosen on proves nothing: hold other rows out (`geep.divide`)."
        )
    _check_not_constant(tuned, certified)
    choice = choose(
        tuned, each, on_miss=on_miss, criterion=criterion, lexical_exit=lexical_exit, cost=cost, progress=progress
    )
    result = _certify(certified, choice, each)
    kept = engine.replace(settings=replace(choice.settings, speed=result.speed))
    return Calibration(_with_certificate(kept, promise, result, certified.run), promise, result, len(certified))


def _certify(fresh: Outcomes, choice: Choice, each: Promise) -> Walk:
    """Walk the chosen settings' speeds on fresh texts, in both orders, and return the faster walk.

    At speed 0 an engine is the reference itself, unless it is quantised: then that has to pass as well.
    """
    upwards, from_safest = choice.orders
    if fresh.run.reference is not None:
        upwards = (0.0, *upwards)
    walks = [
        walk(lambda speed: fresh.trial(replace(choice.settings, speed=speed), each), order)
        for order in (upwards, from_safest)
    ]
    return max(walks, key=lambda found: (found.kept is not None, found.speed))


def _with_certificate(engine: Engine, promise: Promise, result: Walk, fresh: ExitRun) -> Engine:
    """Say of an engine what was certified; nothing where no speed passed and the full model is not the reference."""
    if result.kept is None and fresh.reference is not None:
        return engine
    return engine.replace(
        certificate=Certificate(
            promise=promise,
            reference=engine.deployment.dtype if fresh.reference is None else "float32",
            risk=0.0 if result.kept is None else result.kept.risk,
            bound=0.0 if result.kept is None else result.kept.bound,
            num_texts=len(fresh),
            texts=fresh.texts,
            texts_from=fresh.texts_from,
            made_with=engine.made_with,
        )
    )


def _check_not_constant(*parts: Outcomes) -> None:
    """Refuse a full model that tells no texts apart: an exit that does not either would keep any promise about it."""
    answers = torch.cat([part.full_answers for part in parts])
    if len(answers) and bool((answers == answers[:1]).all()):
        names = parts[0].engine.label_names
        flags = answers[0].reshape(-1).tolist()
        shown = [name for name, on in zip(names, flags, strict=True) if on] if answers.ndim > 1 else names[flags[0]]
        raise ConstantModelError(
            f"The full model gives all {len(answers):,} held-out texts the same answer, {shown!r}; expected a model "
            "that tells texts apart. It has learned nothing: train it longer, at another learning rate or on more "
            "balanced rows. No speed was set."
        )
