"""The speed that keeps a promise, certified on fresh rows.

Read `calibrate`: settings are chosen on one part of the rows (`choosing`), the speed is certified on another.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geep.calibration.choosing import base_settings, choose, criteria
from geep.calibration.labelling import labels_wanted
from geep.calibration.leaving import Leavers
from geep.calibration.ordering import Order, Route
from geep.calibration.runs import ExitRun, Outcomes, check_labels
from geep.data import SomeLabels, Split
from geep.engine import Certificate, Engine, ExitSettings, StoredExits
from geep.exits import OnMiss
from geep.folder import CalibrationFile
from geep.predictor import text_hashes
from geep.progress import Progress, no_progress
from geep.promise import ConstantModelError, NothingCertifiedError, Promise, Traffic, Walk, check_enough, walk
from geep.scheduler import CostModel

logger = logging.getLogger(__name__)

MAX_LABELS = 300
"""Labels that `calibrate` asks for unless told otherwise: an hour or two of a person's work."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        engine: The engine at the calibrated speed; 0, the full model, if no speed passed. Its `certificate` is what may
            be said of it: None where not even the full model keeps the promise, as a rounded one may not.
        promise: What was asked for.
        walk: The trials of the better walk.
        num_texts: Texts that the speed was certified on.
        left_out: Further ones that were given, but that something was learned or chosen on before.
        leavers: What was lost, at the kept speed, among those of them that are answered at or before each depth.
        num_labelled: Labels that were given one by one; 0 where every text came with its own, or none was needed.
        to_label: Positions, among the texts given, of those whose labels would let the walk go on, as far as
            `max_labels` reaches; empty where it ended otherwise.
        next_step: Labels that the next speed lacks; 0 where the walk ended otherwise.
    """

    engine: Engine
    promise: Promise
    walk: Walk
    num_texts: int
    left_out: int = 0
    leavers: tuple[Leavers, ...] = ()
    num_labelled: int = 0
    to_label: tuple[int, ...] = ()
    next_step: int = 0

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
            "left_out": self.left_out,
            "leavers": [asdict(leavers) for leavers in self.leavers],
            "num_labelled": self.num_labelled,
            "num_to_label": len(self.to_label),
            "certificate": None if self.engine.certificate is None else self.engine.certificate.to_dict(),
            "trials": [asdict(trial) for trial in self.walk.trials],
        }

    def save(
        self,
        folder: str | Path,
        *,
        profile: Mapping[str, Any] | None = None,
        asked: Mapping[str, Any] | None = None,
    ) -> None:
        """Write table, settings and certificate into a model folder.

        Args:
            folder: The model's folder.
            profile: What is kept of the profile. None: what the folder's record says of it.
            asked: What was asked for, in plain words.
        """
        found = {**self.record(), "asked": asked}
        self.engine.save_exits(folder, record=_record(folder, found, profile))


def save_refusal(
    engine: Engine,
    folder: str | Path,
    refusal: NothingCertifiedError,
    *,
    profile: Mapping[str, Any] | None = None,
    asked: Mapping[str, Any] | None = None,
) -> None:
    """Write into a model folder that the full model answers, and why nothing was certified.

    Args:
        engine: The engine; its table is kept.
        folder: The model's folder.
        refusal: Why.
        profile: What is kept of the profile. None: what the folder's record says of it.
        asked: What was asked for, in plain words.
    """
    settings = replace(engine.settings, speed=0.0)
    exits = StoredExits(engine.predictor, settings, engine.ranges, None)
    found = {"speed": 0.0, "refused": str(refusal), "certificate": None, "asked": asked}
    exits.save(folder, fingerprint=engine.identity, record=_record(folder, found, profile))


def _record(folder: str | Path, calibration: dict[str, Any], profile: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is known of a calibration beside the record of its profile."""
    if profile is None:
        try:
            profile = CalibrationFile.read(folder).record.get("profile")
        except FileNotFoundError:
            profile = None
    return {**({} if profile is None else {"profile": profile}), "calibration": calibration}


def calibrate(
    engine: Engine,
    tuning: Split | ExitRun,
    fresh: Split | ExitRun,
    promise: Promise,
    *,
    on_miss: OnMiss = "continue",
    criterion: str | None = None,
    lexical_exit: bool | None = None,
    check_layers: tuple[int, ...] | None = None,
    cost: CostModel | None = None,
    call_size: int | None = None,
    labels: SomeLabels | None = None,
    max_labels: int = MAX_LABELS,
    progress: Progress = no_progress,
) -> Calibration:
    """Set an engine to the highest speed that keeps a promise.

    Criterion, lexical exit, quantile, the layers asked and the order of the speeds are chosen on the `tuning` texts
    (the profile's held-out ones will do); the speed is certified on the `fresh` ones, which nothing was fitted or
    chosen on.

    Args:
        engine: Engine with a table (see `profile`), or without: then every exit is asked.
        tuning: Texts to choose settings on, or their run.
        fresh: Texts to certify on, or their run. Those among them that the table was made from, or that settings are
            chosen on, are left out.
        promise: What must be kept. The walks of `Route.all_to` certify it; that with the fewest layers is kept. Where
            the promise is conditional, it opens exits from the deepest on.
        on_miss: The rule to calibrate for.
        criterion: "agreement" or a row of `CRITERIA`; None: choose, if the profile learned "agreement" scores, else the
            profile's.
        lexical_exit: Allow or forbid answers without the encoder; None: choose.
        check_layers: Exits that may be asked, ascending; (): the table alone, then all layers. None: choose.
        cost: What a run takes on this machine: settings are chosen for the least time, and where a check costs time
            only some exits are asked. None: settings are chosen for the fewest layers, and every exit is asked.
        call_size: Texts of a call, as a server makes them: of few texts a check costs as much as a layer, so fewer are
            asked. Read with `cost`; None: a stream of many texts.
        labels: For a promise about accuracy on fresh texts without labels, those of some of them, by their position:
            `SomeLabels.none()` to begin with. A speed is tested once every text that it answers otherwise than the
            full model has one; `Calibration.to_label` says which are needed next. Settings are then chosen by
            agreement, and labels of the tuning texts not read.
        max_labels: Labels to ask for, in all.
        progress: Told what is being done, how much is done and how much there is.

    Raises:
        TooFewTextsError: If there are too few fresh texts for the promise, or too few different ones; the message says
            how many are needed.
        ConstantModelError: If the full model gives all of the texts the same answer.
        ValueError: If the promise is about accuracy and labels are missing, or labels are not the model's, or the
            criterion is unknown or was not learned, or a run is of another engine.
        FloatingPointError: If logits are not finite.
    """
    if call_size is not None and (cost is None or call_size < 1):
        raise ValueError(
            f"call_size (--call-size) is at least 1 and weighs time, with cost (--by-time); found {call_size} and "
            f"{'no cost' if cost is None else 'a cost'}."
        )
    base = base_settings(engine, on_miss, check_layers)
    base.check(engine.depths, None)
    for judge in criteria(base, criterion):
        # Refuses one that is unknown, or that nothing was learned for, before any work is done.
        engine.replace(settings=replace(base, criterion=judge))
    if lexical_exit and (engine.predictor is None or engine.predictor.num_labels is None):
        raise ValueError(
            "lexical_exit=True (--lexical) asks for answers by the table alone, found a model without a table that has "
            "learned labels; run `geep profile` first, or leave it out."
        )
    # Where two walks share the error probability, the better of their results still keeps the promise.
    routes = Route.all_to(promise, few_labels=labels is not None)
    check_enough(len(fresh), routes[0].each)
    _check_given_labels(engine, fresh, promise, labels)
    for part, what in ((tuning, "texts to choose settings on"), (fresh, "texts to certify on")):
        if isinstance(part, Split):
            check_labels(engine, part)
        if promise.needs_labels and part.labels is None and labels is None:
            raise ValueError(
                f"The {what} have no labels, which max_accuracy_drop (--max-drop) needs; give them, have some "
                "labelled (labels=, --texts), or promise agreement with the full model: min_agreement "
                "(--min-agreement)."
            )
    rows, given = _unused(engine, tuning, fresh, routes[0].each), len(fresh)
    if len(rows) < given:
        fresh = fresh.select(rows) if isinstance(fresh, ExitRun) else fresh.select(rows.numpy())
    known = None if labels is None else labels.at(rows.numpy())
    tuned, certified = (
        Outcomes(
            engine, part if isinstance(part, ExitRun) else ExitRun.of(engine, part, what=what, progress=progress), some
        )
        for part, what, some in (
            (tuning, "all exits, texts to choose settings on", None),
            (fresh, "all exits, texts to certify the promise on", known),
        )
    )
    for outcomes in (tuned, certified):
        if engine.deployment.is_rounded and outcomes.run.reference is None:
            raise ValueError(
                f"The run of an engine in {engine.deployment.dtype} lacks the float32 model's answers, which promises "
                "are about; make it with ExitRun.of(engine, texts)."
            )
    _check_not_constant(tuned, certified)
    choices = [
        choose(
            tuned,
            replace(route.weighed, conditional=False),
            on_miss=on_miss,
            criterion=criterion,
            lexical_exit=lexical_exit,
            check_layers=check_layers,
            cost=cost,
            call_size=call_size,
            progress=progress,
        )
        for route in routes
    ]
    rounded = certified.run.reference is not None
    orders = [route.order(tuned, choice, rounded=rounded) for route, choice in zip(routes, choices, strict=True)]
    walks = [walked(certified, order, route.each) for order, route in zip(orders, routes, strict=True)]
    ends = [inf if found.kept is None else found.kept.mean_exit_layer for found in walks]
    best = ends.index(min(ends))
    result, passed = walks[best], walks[best].num_passed
    settings = orders[best][passed - 1] if passed else replace(choices[best].settings, speed=0.0)
    kept = _with_certificate(engine.replace(settings=settings), promise, result, certified)
    wanted = None if known is None else labels_wanted(certified, orders, walks, most=max_labels)
    if wanted is not None and not labels and wanted.next_step > max_labels:
        raise ValueError(
            f"The first speed that changes an answer changes {wanted.next_step} of {len(certified):,} texts and takes "
            f"as many labels, expected at most {max_labels}; allow more (max_labels, --max-labels)."
        )
    return Calibration(
        kept,
        promise,
        result,
        len(certified),
        given - len(certified),
        leavers=_leavers(certified, settings, promise),
        num_labelled=0 if known is None else len(known),
        to_label=() if wanted is None else tuple(rows.numpy()[wanted.rows].tolist()),
        next_step=0 if wanted is None else wanted.next_step,
    )


def walked(fresh: Outcomes, order: Order, each: Promise) -> Walk:
    """Walk settings on fresh texts, as far as there are labels to judge them."""
    testable = order if fresh.labels is None else takewhile(lambda settings: not len(fresh.lacking(settings)), order)
    return walk(lambda settings: fresh.trial(settings, each), testable)


def _leavers(fresh: Outcomes, settings: ExitSettings, promise: Promise) -> tuple[Leavers, ...]:
    """What was lost among those that leave by each depth; nothing where labels are lacking to tell, as of rounding."""
    if len(fresh.lacking(settings)):
        return ()
    return fresh.judged(settings).leavers(promise, fresh.asked(settings))


def _check_given_labels(engine: Engine, fresh: Split | ExitRun, promise: Promise, labels: SomeLabels | None) -> None:
    """Refuse labels of some texts where they are of no use, or of none of the texts."""
    if labels is None:
        return
    if not promise.needs_labels:
        raise ValueError(
            "Labels of some texts (labels=) were given for a promise of agreement, which needs none; leave them out."
        )
    if fresh.labels is not None:
        raise ValueError(
            "The texts to certify on have labels, and some were given beside them (labels=); expected one or the other."
        )
    if len(labels):
        if labels.rows[-1] >= len(fresh):
            raise ValueError(
                f"Found the label of text {labels.rows[-1]} (from 0) of {len(fresh)}; are these the texts?"
            )
        check_labels(engine, Split([""] * len(labels), labels=labels.labels, origin=labels.labelled_by))


def _hashes(engine: Engine, part: Split | ExitRun) -> Tensor:
    if isinstance(part, ExitRun):
        return part.hashes
    batch = engine.tokenize(part.inputs).batch
    return text_hashes(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.lengths))


def unlearned(engine: Engine, rows: Split) -> Split:
    """Return the rows that an engine's table was not made from, told by their token ids, in order."""
    if engine.predictor is None:
        return rows
    kept = ~torch.isin(_hashes(engine, rows), engine.predictor.fitted.seen)
    return rows.select(kept.nonzero().flatten().numpy())


def _unused(engine: Engine, tuning: Split | ExitRun, fresh: Split | ExitRun, each: Promise) -> Tensor:
    """Fresh texts that nothing was learned or chosen on, told by their token ids: case and blanks may differ.

    Returns:
        Their positions, ascending.

    Raises:
        TooFewTextsError: If they are too few, or too few of them different: copies of a text are no further draws.
    """
    used, hashes = [_hashes(engine, tuning)], _hashes(engine, fresh)
    if engine.predictor is not None:
        used.append(engine.predictor.fitted.seen)
    rows = (~torch.isin(hashes, torch.cat(used))).nonzero().flatten()
    count, distinct, left_out = len(rows), len(hashes[rows].unique()), len(fresh) - len(rows)
    why = f" {left_out:,} were left out, which something was learned or chosen on." if left_out else ""
    check_enough(count, each, note=why)
    check_enough(distinct, each, note=f"{why} Of {count:,} texts so many are different; the others are copies.")
    if distinct < count / 2:
        logger.warning(
            "Of %d texts to certify on, only %d are different. If texts to come do not repeat so often, the promise is "
            "less sure than it says.",
            count,
            distinct,
        )
    return rows


def _with_certificate(engine: Engine, promise: Promise, result: Walk, fresh: Outcomes) -> Engine:
    """Say of an engine what was certified; nothing where no speed passed and the full model is not the reference."""
    run, labels = fresh.run, fresh.labels
    if result.kept is None and run.reference is not None:
        return engine
    return engine.replace(
        certificate=Certificate(
            promise=promise,
            reference=engine.deployment.dtype if run.reference is None else "float32",
            risk=0.0 if result.kept is None else result.kept.risk,
            bound=0.0 if result.kept is None else result.kept.bound,
            num_texts=len(run),
            texts=fresh.digest,
            texts_from=run.texts_from,
            made_with=engine.made_with,
            traffic=Traffic.of(
                np.array(fresh.depths)[fresh.answered(engine.settings)],
                engine.planner.unknown_shares(run.batch),
            ),
            labels_from=f"{len(labels):,} labels from {labels.labelled_by or 'an unknown source'}" if labels else "",
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
