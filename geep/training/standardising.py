"""Heads that start from standardised features of the pretrained encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding

from geep.modeling.heads import first_linear, standardise_input
from geep.modeling.model import GeepForSequenceClassification

# Rows whose features are enough to measure a mean and a deviation by.
_STANDARDISE_ROWS = 512


def standardise_heads(
    model: GeepForSequenceClassification, collate: DataCollatorWithPadding, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Start every head from standardised features of the pretrained encoder, measured on some training rows.

    Changes only the heads' first linear layers; see `modeling.standardise_input`. Meant for fresh heads: on trained
    ones it would undo what they learned.
    """
    heads = [*model.exits, model.teacher]
    inputs = map(first_linear, heads)
    sums = {linear: torch.zeros(2, linear.in_features, dtype=torch.float64) for linear in inputs}
    counts = dict.fromkeys(sums, 0)
    mask = torch.ones(0)

    def note(linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features = inputs[0].detach().cpu().double()
        if features.ndim == 3:  # a head that reads tokens: padding does not count
            features = features[mask]
        sums[linear] += torch.stack([features.sum(0), features.square().sum(0)])  # type: ignore[index]
        counts[linear] += len(features)  # type: ignore[index]

    hooks = [first_linear(head).register_forward_pre_hook(note) for head in heads]
    was_training = model.training
    model.train(mode=False)
    with torch.no_grad():
        for start in range(0, min(len(rows), _STANDARDISE_ROWS), 32):
            batch = collate([dict(row) for row in rows[start : start + 32]])
            batch.pop("labels")
            mask = batch["attention_mask"].bool()
            model(**{name: value.to(model.device) for name, value in batch.items()}, output_exits=True)
    for hook in hooks:
        hook.remove()
    for head in heads:
        mean, square = sums[first_linear(head)] / max(counts[first_linear(head)], 1)
        spread = (square - mean.square()).clamp(min=0).sqrt()
        # A feature that hardly varies is not blown up; with a single row nothing varies and nothing is scaled.
        floor = 0.1 * float(spread.mean())
        spread = spread.clamp(min=floor) if floor > 1e-9 else torch.ones_like(spread)
        standardise_input(head, mean.float().to(model.device), spread.float().to(model.device))
    model.train(mode=was_training)
