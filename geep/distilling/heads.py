"""Heads of all depths fitted side by side to the full model's answers. The encoder and the full model do not move."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from geep.distilling.features import FeatureCache
from geep.modeling import HEADS, GeepConfig, GeepForSequenceClassification, PooledHead, standardise_input
from geep.progress import Progress, no_progress

# Rows that a mean and a deviation are measured on.
_STANDARDISE_ROWS = 8192

# Steps that a pass over the features has at least, as long as a step has so many texts.
_STEPS, _SMALLEST_BATCH = 32, 32


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How heads are fitted.

    Attributes:
        epochs: Passes over the features at most; fitting ends sooner where no depth improves any more.
        batch_size: Texts to a step at most: of few texts a step takes fewer, so that heads are not left unfinished.
        learning_rate: Peak rate of AdamW, reached after a tenth of the steps.
        weight_decay: Of all weights.
        dropout: Between a head's two linear layers.
        patience: Epochs without any depth's improvement after which fitting ends.
        seed: Of initial weights, order and dropout.
    """

    epochs: int = 8
    batch_size: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    dropout: float = 0.2
    patience: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}.")


_DEFAULT_SETTINGS = FitSettings()


@dataclass(frozen=True, slots=True)
class FittedHeads:
    """Heads of all depths, and how near to the full model each came on texts that it did not learn from.

    Attributes:
        kind: Row of `HEADS`.
        depths: Layers after which they sit.
        heads: One for each of these.
        losses: Cross-entropy with the full model's probabilities on held-out texts, by exit.
        epochs: Passes that were made.
    """

    kind: str
    depths: tuple[int, ...]
    heads: tuple[PooledHead, ...]
    losses: tuple[float, ...]
    epochs: int

    @torch.no_grad()
    def logits(self, texts: FeatureCache) -> Tensor:
        """Logits of each exit, the full model's last, (num_exits + 1, num_texts, num_labels); no encoder is run."""
        found = []
        for features, full in texts.batches(_STANDARDISE_ROWS):
            heads = zip(self.heads, features, strict=True)
            found.append(torch.stack([*(head.train(mode=False).classify(each) for head, each in heads), full]))
        return torch.cat(found, dim=1)


def fit_heads(
    seen: FeatureCache,
    heldout: FeatureCache,
    config: GeepConfig,
    *,
    settings: FitSettings = _DEFAULT_SETTINGS,
    multi_label: bool = False,
    progress: Progress = no_progress,
) -> FittedHeads:
    """Fit a head at every depth to the full model's probabilities, all of them in one pass over the features.

    A head's weights are those of the epoch at which it is best on the held-out texts, each depth for itself.

    Args:
        seen: Features to learn from.
        heldout: Features of other texts, which say when to stop.
        config: Config of the model that the heads are for.
        settings: How to fit.
        multi_label: Whether several labels may hold at once.
        progress: Told the epochs that are done.

    Raises:
        ValueError: If the two caches are of different heads or depths, or one is empty.
    """
    if (seen.kind, seen.depths) != (heldout.kind, heldout.depths):
        raise ValueError(
            f"Features are of {seen.kind!r} heads at {seen.depths} and of {heldout.kind!r} heads at {heldout.depths}, "
            "expected both alike."
        )
    if not len(seen) or not len(heldout):
        raise ValueError(f"Found {len(seen)} texts to learn from and {len(heldout)} held out, expected some of both.")
    torch_generator = torch.Generator().manual_seed(settings.seed)
    first = torch.from_numpy(seen.features[:_STANDARDISE_ROWS]).float().transpose(0, 1)
    mean, spread = first.mean(1, keepdim=True), first.std(1, keepdim=True, correction=0)
    # A feature that hardly varies is not blown up.
    spread = spread.clamp(min=max(0.1 * float(spread.mean()), 1e-6))
    stack = _Stack.of(first.shape[0], first.shape[2], config.hidden_size, seen.logits.shape[1], torch_generator)
    optimiser = torch.optim.AdamW(stack.weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    size = min(settings.batch_size, max(len(seen) // _STEPS, _SMALLEST_BATCH))
    steps = settings.epochs * -(-len(seen) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=steps + 1, pct_start=0.1
    )
    best = torch.full((first.shape[0],), torch.inf)
    kept = [weight.detach().clone() for weight in stack.weights]
    waited = epoch = 0
    while epoch < settings.epochs and waited < settings.patience:
        for features, logits in seen.batches(size, generator=torch_generator):
            found = stack((features - mean) / spread, dropout=settings.dropout, generator=torch_generator)
            loss = _losses(found, logits, multi_label=multi_label).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        epoch += 1
        losses = _heldout_losses(stack, heldout, mean, spread, multi_label=multi_label)
        better = losses < best
        for keep, weight in zip(kept, stack.weights, strict=True):
            keep[better] = weight.detach()[better]
        waited = 0 if bool((losses < best - 1e-4).any()) else waited + 1
        best = torch.minimum(best, losses)
        progress("heads of all depths", epoch, settings.epochs)
    heads = tuple(
        _head(seen.kind, config, [keep[number] for keep in kept], mean[number, 0], spread[number, 0])
        for number in range(len(best))
    )
    return FittedHeads(seen.kind, seen.depths, heads, tuple(best.tolist()), epoch)


def with_exits(model: GeepForSequenceClassification, fitted: FittedHeads) -> GeepForSequenceClassification:
    """Return a model with fitted exits, in the place of those it has, on the same encoder and teacher.

    Encoder and teacher are shared and not copied.

    Raises:
        ValueError: If the model has no such layers.
    """
    fields = {**model.config.to_dict(), "exit_head": fitted.kind, "exit_layers": list(fitted.depths)}
    fields["teacher_head"] = model.config.teacher_head or model.config.exit_head
    config = GeepConfig(**{name: value for name, value in fields.items() if name not in ("model_type", "num_labels")})
    with torch.device("meta"):  # its weights are those of others
        other = GeepForSequenceClassification(config)
    other.encoder, other.teacher = model.encoder, model.teacher
    other.exits = nn.ModuleList(copy.deepcopy(head) for head in fitted.heads)
    return other.train(mode=model.training)


@dataclass(frozen=True, eq=False)
class _Stack:
    """Heads of all depths as one batch of products: linear, tanh, dropout, linear."""

    weights: Sequence[Tensor]

    @classmethod
    def of(cls, count: int, width: int, hidden: int, num_labels: int, generator: torch.Generator) -> _Stack:
        shapes = ((count, width, hidden), (count, 1, hidden), (count, hidden, num_labels), (count, 1, num_labels))
        scales = (width**-0.5, 0.0, 0.02, 0.0)
        weights = [torch.randn(shape, generator=generator) * scale for shape, scale in zip(shapes, scales, strict=True)]
        return cls([weight.requires_grad_() for weight in weights])

    def __call__(self, features: Tensor, *, dropout: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """Logits (num_exits, num_rows, num_labels) of standardised features (num_exits, num_rows, width)."""
        first, bias, second, last = self.weights
        hidden = torch.tanh(torch.baddbmm(bias, features, first))
        if dropout:
            hidden = hidden * (torch.rand(hidden.shape, generator=generator) >= dropout) / (1 - dropout)
        return torch.baddbmm(last, hidden, second)


def _losses(found: Tensor, logits: Tensor, *, multi_label: bool) -> Tensor:
    """Cross-entropy with the full model's probabilities, by exit, (num_exits,)."""
    if multi_label:
        target = torch.sigmoid(logits).expand_as(found)
        return F.binary_cross_entropy_with_logits(found, target, reduction="none").sum(-1).mean(1)
    return -(torch.softmax(logits, -1) * F.log_softmax(found, -1)).sum(-1).mean(1)


@torch.no_grad()
def _heldout_losses(stack: _Stack, heldout: FeatureCache, mean: Tensor, spread: Tensor, *, multi_label: bool) -> Tensor:
    total = torch.zeros(len(mean))
    for features, logits in heldout.batches(2048):
        found = stack((features - mean) / spread)
        total += _losses(found, logits, multi_label=multi_label) * len(logits)
    return total / len(heldout)


def _head(kind: str, config: GeepConfig, weights: list[Tensor], mean: Tensor, spread: Tensor) -> PooledHead:
    """A head of its own, which standardises its input by itself."""
    head = cast(PooledHead, HEADS[kind](config))
    with torch.no_grad():
        for place, value in zip(
            (head.dense.weight, head.dense.bias, head.out.weight, head.out.bias),
            (weights[0].T, weights[1][0], weights[2].T, weights[3][0]),
            strict=True,
        ):
            place.copy_(value)
    standardise_input(head, mean, spread)
    return head
