"""All exits of some texts, run once: what any setting would have done is read off.

Read `ExitRun`, then `Outcomes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geep.backends import TokenBatch
from geep.calibration.leaving import Answered
from geep.data import SomeLabels, Split
from geep.engine import Engine, ExitSettings
from geep.exits import AGREEMENT, ExitProfile, OnMiss, answer_of, follow, profile_exits
from geep.folder import digest_tensors
from geep.predictor import ExitPrediction, text_hashes
from geep.progress import Progress, no_progress
from geep.promise import Promise, Trial

Integers = NDArray[np.int64]


def run_of(engine: Engine) -> dict[str, object]:
    """All that the logits of an engine's exits depend on; table and settings decide nothing about them."""
    ranges = None if engine.ranges is None else engine.ranges.digest
    return {**engine.identity, "ranges": ranges, **engine.deployment.made_with}


@dataclass(frozen=True)
class ExitRun:
    """All exits of some texts, run once; any setting's outcome can be read off without running the model again.

    Attributes:
        batch: The texts' tokens.
        exit_logits: Logits of every exit, the full model last, (num_depths, num_texts, num_labels).
        labels: Label ids, or 0/1 for multi-label; None where unknown.
        reference: Logits of the float32 full model, (num_texts, num_labels); None where that is the last exit, or
            where nothing is compared with it.
        texts_from: Where they came from, in words; empty where it is not known.
        made_by: What ran them: weights, tokenizer, ranges and how they were deployed; None where it is not known.
    """

    batch: TokenBatch
    exit_logits: Tensor
    labels: Tensor | None
    reference: Tensor | None = None
    texts_from: str = ""
    made_by: Mapping[str, object] | None = None

    @classmethod
    def of(
        cls,
        engine: Engine,
        split: Split,
        *,
        what: str = "all exits",
        progress: Progress = no_progress,
        with_reference: bool = True,
    ) -> ExitRun:
        """Run the exits of an engine over texts, and the float32 full model of a rounded one if wanted.

        `what` names the work to `progress`.

        Raises:
            ValueError: If the labels are not the model's.
            FloatingPointError: If logits of a text are not finite: answers that are none agree with one another.
        """
        check_labels(engine, split)
        batch = engine.tokenize(split.inputs).batch
        labels = None if split.labels is None else torch.from_numpy(split.labels)
        reference = None
        if engine.deployment.is_rounded and with_reference:
            reference = engine.in_float32().run_tokens(batch, settings=ExitSettings(speed=0.0)).logits
        logits = engine.exit_logits(batch, what=what, progress=progress)
        for found in (logits, *([] if reference is None else [reference[None]])):
            broken = (~torch.isfinite(found).all(-1)).any(0).nonzero().flatten().tolist()
            if broken:
                raise FloatingPointError(
                    f"{len(broken)} of {len(batch)} texts have logits that are not finite at an exit, the first is "
                    f"text {broken[0]}; nothing can be learned or promised from them. Mend the model, or run it in "
                    "float32."
                )
        return cls(batch, logits, labels, reference, split.origin, run_of(engine))

    def __len__(self) -> int:
        return len(self.batch)

    @cached_property
    def hashes(self) -> Tensor:
        """Hash of each text's token ids (`text_hashes`), (num_texts,)."""
        return text_hashes(*self.flat)

    @property
    def digest(self) -> str:
        """Digest of all texts' token ids and labels, in order."""
        labels = {} if self.labels is None else {"labels": self.labels}
        return digest_tensors({"texts": self.hashes, **labels}, "")

    def select(self, rows: Tensor) -> ExitRun:
        """Return the texts at `rows`, in that order."""
        return replace(
            self,
            batch=self.batch.select(rows.numpy()),
            exit_logits=self.exit_logits[:, rows],
            labels=None if self.labels is None else self.labels[rows],
            reference=None if self.reference is None else self.reference[rows],
        )

    @property
    def flat(self) -> tuple[Tensor, Tensor]:
        """Token ids and lengths as the predictor takes them."""
        return torch.from_numpy(self.batch.input_ids), torch.from_numpy(self.batch.lengths)


def check_labels(engine: Engine, split: Split) -> None:
    """Refuse labels that are not the model's: of the other kind, of other labels, or none of its ids.

    Raises:
        ValueError: With what was found and what the model has.
    """
    if split.labels is None:
        return
    rows, labels, names = split.origin or "The rows", split.labels, engine.label_names
    expected = (len(split), len(names)) if engine.multi_label else (len(split),)
    if labels.shape != expected:
        kind = "ones and zeros, a row a text and a column a label" if engine.multi_label else "one label id a text"
        raise ValueError(
            f"{rows} have labels of shape {labels.shape}, expected {kind}, shape {expected}; give rows that are "
            "labelled as those that the model was trained on."
        )
    highest = 1 if engine.multi_label else len(names) - 1
    if len(split) and not (labels.min() >= 0 and labels.max() <= highest):
        raise ValueError(
            f"{rows} have label ids {labels.min():g}..{labels.max():g}, expected 0..{highest}; read them "
            "with the model's label names."
        )


class Outcomes:
    """What an engine would have done, with any settings, on texts whose exits were all run.

    The columns of everything it returns are `depths`: the lexical exit, at 0, where the engine's table has one, then
    the exits, the full model last. The table and the criteria are asked once for each of their answers.
    """

    def __init__(self, engine: Engine, run: ExitRun, labels: SomeLabels | None = None) -> None:
        """Read a run of this very engine, whatever its table and settings.

        Args:
            engine: The engine.
            run: All exits of some texts.
            labels: Labels of some of the texts, for a run that has none: a setting can be judged on all of them as
                soon as those have one that it answers otherwise than the full model (`lacking`).

        Raises:
            ValueError: If the run is known to be of another engine, or has labels already.
        """
        mine = run_of(engine)
        if run.made_by is not None and run.made_by != mine:
            other = sorted(name for name in mine if run.made_by.get(name) != mine[name])
            raise ValueError(
                f"The run is of an engine with another {' and '.join(other)}, expected one of this engine; run the "
                "texts on it (`ExitRun.of`)."
            )
        if labels is not None and run.labels is not None:
            raise ValueError("The run has labels of all its texts, and was given some more; expected one or the other.")
        self.engine, self.run, self.labels = engine, run, labels
        self._foretold: dict[tuple[int, float], ExitPrediction] = {}
        self._profiles: dict[object, ExitProfile] = {}

    def __len__(self) -> int:
        return len(self.run)

    @property
    def digest(self) -> str:
        """Digest of all texts' token ids, in order, and of the labels that are known."""
        if not self.labels:
            return self.run.digest
        known = {"rows": self.labels.rows, "labels": self.labels.labels}
        return digest_tensors({name: torch.from_numpy(each) for name, each in known.items()}, self.run.digest)

    @property
    def depths(self) -> tuple[int, ...]:
        """Encoder layers run at each column."""
        return self.engine.depths if self.lexical_logits is None else (0, *self.engine.depths)

    @cached_property
    def lexical_logits(self) -> Tensor | None:
        """The table's guess at the labels, (num_texts, num_labels); None where there is none."""
        predictor = self.engine.predictor
        return None if predictor is None else predictor.predict(*self.run.flat, speed=0.5).lexical_logits

    @cached_property
    def logits(self) -> Tensor:
        """Logits of every column, (num_depths, num_texts, num_labels)."""
        if self.lexical_logits is None:
            return self.run.exit_logits
        return torch.cat([self.lexical_logits[None].float(), self.run.exit_logits])

    def answers(self, settings: ExitSettings) -> Tensor:
        """Logits of what would be answered at every column, (num_depths, num_texts, num_labels)."""
        if not settings.fusing or settings.speed == 0:
            return self.logits
        lexical = self.lexical_logits
        return torch.stack(
            [settings.answered(logits, depth, lexical) for depth, logits in zip(self.depths, self.logits, strict=True)]
        )

    @property
    def full_logits(self) -> Tensor:
        """Logits of the full model that everything is compared with, (num_texts, num_labels)."""
        return self.run.exit_logits[-1] if self.run.reference is None else self.run.reference

    @property
    def full_answers(self) -> Tensor:
        """What the full model answers: label ids (num_texts,), or flags (num_texts, num_labels)."""
        return answer_of(self.full_logits, multi_label=self.engine.multi_label)

    def profile(self, settings: ExitSettings) -> ExitProfile:
        """Profile of all columns.

        An exit that the settings do not ask has uncertainty 1: it is never certain enough.
        """
        learned = tuple(settings.temperatures.items()), tuple(settings.agreement.items())
        fused = () if settings.speed == 0 else tuple(settings.fusing.items())
        key = settings.criterion, settings.check_layers, fused, *learned
        if key not in self._profiles:
            depths, engine = self.depths, self.engine
            by_agreement = settings.criterion == AGREEMENT
            # What promises are about, wherever the last exit answers otherwise.
            last_is_full = self.run.reference is None and depths[-1] not in dict(fused)
            profile = profile_exits(
                self.answers(settings),
                depths,
                criterion=settings.criterion,
                temperatures=[settings.temperature(depth) for depth in depths],
                agreement=[settings.agreement[depth] for depth in depths[:-1]] if by_agreement else None,
                labels=self.run.labels,
                reference=None if last_is_full else self.full_logits,
                multi_label=engine.multi_label,
            )
            silent = ~np.isin(depths, [0, *settings.asked_layers(engine.depths)])
            profile.uncertainty[:, silent] = 1.0
            self._profiles[key] = profile
        return self._profiles[key]

    def planned(self, settings: ExitSettings) -> Integers:
        """Column at which the engine would ask each text first, (num_texts,)."""
        engine, batch = self.engine, self.run.batch
        if engine.predictor is None or settings.speed == 0:
            plan = engine.planner.plan(batch, settings)
        else:
            key = engine.predictor.speed_index(settings.speed), settings.quantile
            if key not in self._foretold:
                self._foretold[key] = engine.planner.foretell(batch, settings)
            plan = engine.planner.plan_from(self._foretold[key], batch.lengths, settings)
        return np.searchsorted(self.depths, plan.predicted_layers)

    def answered(self, settings: ExitSettings) -> Integers:
        """Column at which the engine would answer each text, (num_texts,)."""
        return follow(self.profile(settings), self.planned(settings), speed=settings.speed, on_miss=settings.on_miss)

    def asked(self, settings: ExitSettings) -> list[int]:
        """Columns at which the engine may answer, ascending."""
        layers = [self.depths[-1]] if settings.speed == 0 else settings.asked_layers(self.engine.depths).tolist()
        layers += [0] if settings.lexical_exit and settings.speed > 0 else []
        return [column for column, depth in enumerate(self.depths) if depth in layers]

    def judged(self, settings: ExitSettings) -> Answered:
        """Where the engine would answer each text, and how the answers compare with the full model's.

        Raises:
            ValueError: If a text that is answered otherwise is not labelled, while others are.
        """
        found = Answered.of(self.profile(settings), self.answered(settings))
        if self.labels is None:
            return found
        lacking = self._lacking(found)
        if len(lacking):
            raise ValueError(
                f"{len(lacking)} texts that speed {settings.speed:g} answers otherwise have no label, expected one for "
                "each of them (`Outcomes.lacking`)."
            )
        return Answered.of(self._filled.profile(settings), found.column)

    def lacking(self, settings: ExitSettings) -> Integers:
        """Texts whose label is needed and not known, ascending: the engine would answer them otherwise."""
        return self._lacking(Answered.of(self.profile(settings), self.answered(settings)))

    def _lacking(self, found: Answered) -> Integers:
        known = np.arange(len(self)) if self.labels is None else self.labels.rows
        return np.setdiff1d(np.flatnonzero(found.changed), known)

    @cached_property
    def _filled(self) -> Outcomes:
        """The run with labels for all texts, made up where none is known.

        Asked only of settings that answer all these texts as the full model does: whatever their label, they are
        neither spoilt nor repaired.
        """
        shape, kind = ((len(self.engine.label_names),), torch.float32) if self.engine.multi_label else ((), torch.int64)
        labels = torch.zeros(len(self), *shape, dtype=kind)
        if self.labels is not None and len(self.labels):
            labels[torch.from_numpy(self.labels.rows)] = torch.from_numpy(self.labels.labels)
        return Outcomes(self.engine, replace(self.run, labels=labels))

    def trial(self, settings: ExitSettings, promise: Promise) -> Trial:
        """Hold an engine with these settings against a promise.

        Raises:
            ValueError: If the promise is about accuracy and the texts have no labels, or not those that are needed.
        """
        return _trial(self.judged(settings), promise, self.asked(settings), settings.speed)


def try_speed(profile: ExitProfile, planned: Integers, promise: Promise, *, speed: float, on_miss: OnMiss) -> Trial:
    """Hold one speed against a promise on texts that are all profiled.

    Args:
        profile: Profile of the texts.
        planned: Column at which each text is asked first, (num_texts,).
        promise: What must be kept; a conditional one among the texts answered by each column.
        speed: The speed.
        on_miss: The engine's rule, see `geep.exits.follow`.

    Raises:
        ValueError: If the promise is about accuracy and the profile has no labels.
    """
    found = Answered.of(profile, follow(profile, planned, speed=speed, on_miss=on_miss))
    return _trial(found, promise, range(len(profile.depths)), speed)


def _trial(found: Answered, promise: Promise, asked: Sequence[int], speed: float) -> Trial:
    strata = found.strata(promise, asked)
    return Trial.of(promise, *strata, speed=float(speed), mean_exit_layer=found.mean_exit_layer)
