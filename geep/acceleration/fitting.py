"""Exits fitted to a full model's answers and written beside it. What is promised of them is not known here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import Tensor

from geep.data import Split
from geep.distilling import FeatureCache, FitSettings, FittedHeads, fit_heads, with_exits
from geep.engine import Engine
from geep.exits import answer_of, same_answers
from geep.modeling import GeepConfig
from geep.progress import Progress

WORK = "work"
"""Folder in a model's own, in which all is kept that a killed call goes on from; gone when the model is whole."""


@dataclass(frozen=True, eq=False)
class FittedExits:
    """Exits that were fitted, and what they learned from.

    Attributes:
        heads: One for each depth.
        seen: Features and full answers of the texts that they learned from.
        heldout: Logits of each exit, the full model's last, on the texts that said when to stop, (num_exits + 1,
            num_texts, num_labels).
        agreements: Of each exit, the share of these texts that it answers as the full model does.
    """

    heads: FittedHeads
    seen: FeatureCache
    heldout: Tensor
    agreements: tuple[float, ...]


def fit_exits(
    full: Engine,
    learn: Split,
    choose: Split,
    work: Path,
    *,
    head: str,
    exit_layers: Sequence[int] | None,
    settings: FitSettings,
    progress: Progress,
) -> FittedExits:
    """Fit exits to the answers of a full model, which does not move; what is computed is kept in `work`.

    Args:
        full: The full model, in float32: heads are taught by scores.
        learn: Texts to learn from.
        choose: Other texts, which say when to stop.
        work: Folder of the features.
        head: Row of `HEADS`.
        exit_layers: See `FeatureCache.of`.
        settings: How to fit.
        progress: Told the texts whose features are known, and the epochs.
    """

    def features(rows: Split, name: str, what: str) -> FeatureCache:
        what = f"features of all depths, texts to {what}"
        return FeatureCache.of(
            full,
            rows,
            work / name,
            kind=head,
            exit_layers=exit_layers,
            max_gigabytes=settings.max_gigabytes,
            seed=settings.seed,
            what=what,
            progress=progress,
        )

    seen, heldout = features(learn, "learn", "learn from"), features(choose, "choose", "choose on")
    config, many, device = cast(GeepConfig, full.model.config), full.multi_label, full.model.device
    heads = fit_heads(seen, heldout, config, settings=settings, multi_label=many, device=device, progress=progress)
    logits = heads.logits(heldout)
    answers = answer_of(logits, multi_label=many)
    agreements = same_answers(answers[:-1], answers[-1], multi_label=many).float().mean(1)
    return FittedExits(heads, seen, logits, tuple(agreements.tolist()))


def save_with_exits(full: Engine, heads: FittedHeads, folder: Path) -> None:
    """Write the model with fitted exits and its tokenizer."""
    with_exits(full.model, heads).save_pretrained(folder)
    full.tokenizer.save_pretrained(folder)
