"""A first look before the long part: whether exits have anything to gain. Nothing that is kept is learned here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from geep.acceleration.fitting import fit_exits
from geep.data import Split
from geep.data.splits import subset
from geep.distilling import FitSettings
from geep.engine import Engine
from geep.exits import answer_of, probabilities_of, same_answers
from geep.progress import Progress
from geep.promise import Promise

logger = logging.getLogger(__name__)

# Texts that are learned from and judged on: some seconds of work.
_LEARNED, _JUDGED = 800, 400

# Where all texts are not this many times as many, the look would cost as much as what it foretells.
_WORTH_A_LOOK = 4

# Share of the layers that has to be in reach, or little is to be gained.
_LITTLE = 0.05


@dataclass(frozen=True, slots=True)
class Outlook:
    """What exits fitted on few texts foretell.

    Attributes:
        layer: The deepest exit within three quarters of the layers, or the first one.
        agreement: How often it answers as the full model does.
        saved: Share of the layers that the best of the exits saves by itself, where the surest texts leave, as many as
            the promise allows, and all others run to the end.
    """

    layer: int
    agreement: float
    saved: float

    @property
    def is_poor(self) -> bool:
        """Whether little is to be gained."""
        return self.saved < _LITTLE


def look_ahead(
    full: Engine,
    learn: Split,
    choose: Split,
    promise: Promise,
    work: Path,
    *,
    head: str,
    exit_layers: Sequence[int] | None,
    settings: FitSettings,
    progress: Progress,
) -> Outlook | None:
    """Fit exits on some hundred texts and warn where the layers of the full model agree only at the end.

    Args:
        full: The full model.
        learn: All texts to learn from.
        choose: Others.
        promise: What is to be kept. One about accuracy is not foretold: answers that change may be repaired ones.
        work: Folder of the features.
        head: See `fit_exits`.
        exit_layers: See `fit_exits`.
        settings: See `fit_exits`.
        progress: Told what is done.

    Returns:
        What was seen; None where nothing was looked at.
    """
    if promise.needs_labels or len(learn) < _WORTH_A_LOOK * _LEARNED or (work / "learn").exists():
        return None
    few, others = subset(learn, _LEARNED, settings.seed), subset(choose, _JUDGED, settings.seed)

    def report(what: str, done: int, total: int | None) -> None:
        progress(f"a first look: {what}", done, total)

    fitted = fit_exits(
        full, few, others, work / "look", head=head, exit_layers=exit_layers, settings=settings, progress=report
    )
    found = _outlook(fitted.heldout, (*fitted.heads.depths, full.depths[-1]), promise, full.multi_label)
    if found.is_poor:
        logger.warning(
            "A first look at %d texts: after layer %d of %d an exit answers as the full model on %.0f %% of them, "
            "and with %s exits would save about %.0f %% of the layers. The layers seem to agree only at the end, as "
            "those of distilled models often do: little is to be gained, unless less is promised. Going on.",
            len(others),
            found.layer,
            full.depths[-1],
            100 * found.agreement,
            promise,
            100 * found.saved,
        )
    return found


def _outlook(logits: Tensor, depths: Sequence[int], promise: Promise, multi_label: bool) -> Outlook:
    """Outlook of logits of all exits and the full model, (num_exits + 1, num_texts, num_labels)."""
    answers, shares = answer_of(logits, multi_label=multi_label), probabilities_of(logits, multi_label=multi_label)
    same = same_answers(answers, answers[-1], multi_label=multi_label)
    sure = (shares - 0.5).abs().amin(-1) if multi_label else shares.amax(-1)
    order = sure.argsort(dim=1, descending=True, stable=True)
    wrong = (~same.gather(1, order)).long().cumsum(1)
    leave = (wrong <= promise.allowed * same.shape[1]).float().mean(1).numpy()
    last = depths[-1]
    saved = [share * (last - depth) / last for share, depth in zip(leave[:-1], depths[:-1], strict=True)]
    place = max(int(np.searchsorted(depths[:-1], 0.75 * last, side="right")) - 1, 0)
    return Outlook(depths[place], float(same[place].float().mean()), float(max(saved)))
