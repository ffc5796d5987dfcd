"""Heads of all depths fitted side by side to the full model's answers. The encoder and the full model do not move."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from geep.distilling.features import MAX_GIGABYTES, FeatureBatch, FeatureCache
from geep.modeling import HEADS, GeepConfig, GeepForSequenceClassification, standardise_input
from geep.progress import Progress, no_progress

# Rows that a mean and a deviation are measured on.
_STANDARDISE_ROWS = 16384

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
        dropout: Before a head's last linear layer.
        patience: Epochs without any depth's improvement after which fitting ends.
        max_gigabytes: Room on disk for what heads read; of more texts than it holds some are learned from.
        seed: Of initial weights, order and dropout, and of the texts that are drawn.
    """

    epochs: int = 5
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    dropout: float = 0.2
    patience: int = 2
    max_gigabytes: float = MAX_GIGABYTES
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}.")
        for name in ("learning_rate", "max_gigabytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")


_DEFAULT_SETTINGS = FitSettings()


@dataclass(frozen=True, slots=True)
class FittedHeads:
    """Heads of all depths, and how near to the full model each came on texts that it did not learn from.

    Attributes:
        kind: Row of `HEADS`.
        depths: Layers after which they sit.
        heads: One for each of these, on the device that they were fitted on.
        losses: Cross-entropy with the full model's probabilities on held-out texts, by exit.
        epochs: Passes that were made.
    """

    kind: str
    depths: tuple[int, ...]
    heads: tuple[nn.Module, ...]
    losses: tuple[float, ...]
    epochs: int

    @torch.no_grad()
    def logits(self, texts: FeatureCache) -> Tensor:
        """Logits of each exit, the full model's last, (num_exits + 1, num_texts, num_labels); no encoder is run."""
        device = next(self.heads[0].parameters()).device
        found = [torch.cat([batch.answers(self.heads), batch.logits[None]]) for batch in texts.batches(1024, device)]
        return torch.cat(found, dim=1).cpu()


def fit_heads(
    seen: FeatureCache,
    heldout: FeatureCache,
    config: GeepConfig,
    *,
    settings: FitSettings = _DEFAULT_SETTINGS,
    multi_label: bool = False,
    device: torch.device | str = "cpu",
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
        device: Where to fit.
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
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        return _fitted(seen, heldout, config, settings, multi_label, device, progress)


def _fitted(
    seen: FeatureCache,
    heldout: FeatureCache,
    config: GeepConfig,
    settings: FitSettings,
    multi_label: bool,
    device: torch.device,
    progress: Progress,
) -> FittedHeads:
    """Fit heads, with torch's own random numbers."""
    scale = _Scale.of(seen, device)
    heads = [_fresh(seen.kind, config, settings.dropout).to(device) for _ in seen.depths]
    generator = torch.Generator().manual_seed(settings.seed)
    weights = [weight for head in heads for weight in head.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    size = min(settings.batch_size, max(len(seen) // _STEPS, _SMALLEST_BATCH))
    steps = settings.epochs * -(-len(seen) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=steps + 1, pct_start=0.1
    )
    best = torch.full((len(heads),), torch.inf, device=device)
    kept = [copy.deepcopy(head.state_dict()) for head in heads]
    waited = epoch = 0
    while epoch < settings.epochs and waited < settings.patience:
        for batch in seen.batches(size, device, generator=generator):
            loss = _losses(scale(batch).answers(heads), batch.logits, multi_label=multi_label).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        epoch += 1
        losses = _heldout_losses(heads, heldout, scale, device, multi_label=multi_label)
        better = losses < best
        for place in torch.nonzero(better)[:, 0].tolist():
            kept[place] = copy.deepcopy(heads[place].state_dict())
        waited = 0 if bool((losses < best - 1e-4).any()) else waited + 1
        best = torch.minimum(best, losses)
        progress("heads of all depths", epoch, settings.epochs)
    for place, head in enumerate(heads):
        head.load_state_dict(kept[place])
        _set_dropout(head, config.classifier_dropout)
        standardise_input(head, scale.mean[place, 0], scale.spread[place, 0])
    return FittedHeads(seen.kind, seen.depths, tuple(head.eval() for head in heads), tuple(best.tolist()), epoch)


def with_exits(model: GeepForSequenceClassification, fitted: FittedHeads) -> GeepForSequenceClassification:
    """Return a model with fitted exits, in the place of those it has, on the same encoder and teacher.

    Encoder and teacher are shared and not copied; exits come to their device.

    Raises:
        ValueError: If the model has no such layers.
    """
    fields = {**model.config.to_dict(), "exit_head": fitted.kind, "exit_layers": list(fitted.depths)}
    fields["teacher_head"] = model.config.teacher_head or model.config.exit_head
    config = GeepConfig(**{name: value for name, value in fields.items() if name not in ("model_type", "num_labels")})
    with torch.device("meta"):  # its weights are those of others
        other = GeepForSequenceClassification(config)
    other.encoder, other.teacher = model.encoder, model.teacher
    other.exits = nn.ModuleList(copy.deepcopy(head).to(model.device) for head in fitted.heads)
    return other.train(mode=model.training)


@dataclass(frozen=True, eq=False)
class _Scale:
    """Mean and deviation of what is read at each exit layer, both (num_exits, 1, width)."""

    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, cache: FeatureCache, device: torch.device) -> _Scale:
        first = torch.from_numpy(cache.features[:_STANDARDISE_ROWS]).to(device).float().transpose(0, 1)
        spread = first.std(1, keepdim=True, correction=0)
        # A feature that hardly varies is not blown up.
        return cls(first.mean(1, keepdim=True), spread.clamp(min=max(0.1 * float(spread.mean()), 1e-6)))

    def __call__(self, batch: FeatureBatch) -> FeatureBatch:
        """Standardise what heads read."""
        return replace(batch, features=(batch.features - self.mean) / self.spread)


def _fresh(kind: str, config: GeepConfig, dropout: float) -> nn.Module:
    head = HEADS[kind](config)
    last: nn.Linear = head.get_submodule("out")  # type: ignore[assignment]
    nn.init.normal_(last.weight, std=config.initializer_range)
    nn.init.zeros_(last.bias)
    _set_dropout(head, dropout)
    return head


def _set_dropout(head: nn.Module, share: float) -> None:
    for module in head.modules():
        if isinstance(module, nn.Dropout):
            module.p = share


def _losses(found: Tensor, logits: Tensor, *, multi_label: bool) -> Tensor:
    """Cross-entropy with the full model's probabilities, by exit, (num_exits,)."""
    if multi_label:
        target = torch.sigmoid(logits).expand_as(found)
        return F.binary_cross_entropy_with_logits(found, target, reduction="none").sum(-1).mean(1)
    return -(torch.softmax(logits, -1) * F.log_softmax(found, -1)).sum(-1).mean(1)


@torch.no_grad()
def _heldout_losses(
    heads: Sequence[nn.Module], heldout: FeatureCache, scale: _Scale, device: torch.device, *, multi_label: bool
) -> Tensor:
    total = torch.zeros(len(heads), device=device)
    for head in heads:
        head.eval()
    for batch in heldout.batches(1024, device):
        total += _losses(scale(batch).answers(heads), batch.logits, multi_label=multi_label) * len(batch.logits)
    for head in heads:
        head.train()
    return total / len(heldout)
