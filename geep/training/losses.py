"""Losses: pure functions of what the model returned, the labels and the problem type."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from geep.modeling.model import ExitOutput, label_loss

Loss = Callable[[ExitOutput, Tensor, str | None], Tensor]


def distillation(teacher_logits: Tensor, student_logits: Tensor, problem_type: str | None) -> Tensor:
    """KL(teacher ‖ student) per text, averaged over the batch, no gradient to the teacher; temperature 1.

    For multi-label problems each label is a two-way distribution and the divergences are summed over labels.
    """
    target = teacher_logits.detach()
    if problem_type == "multi_label_classification":
        p = torch.sigmoid(target)
        cross = F.binary_cross_entropy_with_logits(student_logits, p, reduction="none")
        entropy = F.binary_cross_entropy_with_logits(target, p, reduction="none")
        return (cross - entropy).sum(-1).mean()
    return F.kl_div(
        F.log_softmax(student_logits, dim=-1), F.log_softmax(target, dim=-1), reduction="batchmean", log_target=True
    )


def _distances(exits: Tensor, problem_type: str | None) -> Tensor:
    """KL(full model ‖ exit) of every exit, (num_exits,)."""
    return torch.stack([distillation(exits[-1], logits, problem_type) for logits in exits[:-1]])


def shared_exit_loss(output: ExitOutput, labels: Tensor, problem_type: str | None) -> Tensor:
    """The paper's one-step loss (Li et al. 2024): the teacher learns the labels behind every depth, exits follow it.

    Mean over the full model and every sub-network k of CE(teacher(last layer(h_k)), y), plus the mean over exits of
    KL(full model ‖ exit k). The KL reaches the encoder; the exits see no labels.

    The public code adds the terms, unweighted. Averaged they keep their directions at a scale that does not grow with
    the number of exits, so that one learning rate and one clipping norm serve encoders of any depth.
    """
    hard, soft = _shared_terms(output, labels, problem_type)
    return hard.mean() + soft.mean()


def guided_shared_exit_loss(output: ExitOutput, labels: Tensor, problem_type: str | None) -> Tensor:
    """The shared exit loss with two changes that let it start: the default (docs/results.md compares).

    The full model's own term counts as much as those of all sub-networks together, instead of as one among them: their
    shallow inputs dominate the first hundreds of steps, in which the full model would learn little and the exits would
    follow a teacher that knows nothing. And the exits see the labels, too, until there is a teacher worth following.
    """
    hard, soft = _shared_terms(output, labels, problem_type)
    guide = _label_losses(output, labels, problem_type)[:-1]
    return hard[-1] + hard[:-1].mean() + soft.mean() + guide.mean()


def _shared_terms(output: ExitOutput, labels: Tensor, problem_type: str | None) -> tuple[Tensor, Tensor]:
    """CE of every sub-network and, last, of the full model (num_exits + 1,); KL of every exit (num_exits,)."""
    shared, exits = _required(output.shared_exit_logits), _required(output.exit_logits)
    hard = torch.stack([label_loss(logits, labels, problem_type) for logits in shared])
    return hard, _distances(exits, problem_type)


def full_model_loss(output: ExitOutput, labels: Tensor, problem_type: str | None) -> Tensor:
    """Loss of the full model alone: plain fine-tuning."""
    return label_loss(_required(output.logits), labels, problem_type)


def distillation_loss(output: ExitOutput, labels: Tensor, problem_type: str | None) -> Tensor:
    """FastBERT's second step (Liu et al. 2020): sum over exits of KL(full model ‖ exit); uses no labels."""
    return _distances(_required(output.exit_logits), problem_type).sum()


def followed_loss(output: ExitOutput, labels: Tensor, problem_type: str | None) -> Tensor:
    """The full model's loss against the labels, plus the mean over exits of KL(full model ‖ exit), all in one.

    The encoder learns to say early what it says at the end; labels hold the end where it is.
    """
    exits = _required(output.exit_logits)
    return label_loss(exits[-1], labels, problem_type) + _distances(exits, problem_type).mean()


def exit_label_loss(output: ExitOutput, labels: Tensor, problem_type: str | None) -> Tensor:
    """DeeBERT's second step (Xin et al. 2020): sum over exits of the loss against the labels."""
    return _label_losses(output, labels, problem_type)[:-1].sum()


def joint_loss(output: ExitOutput, labels: Tensor, problem_type: str | None) -> Tensor:
    """Sum of the losses of all classifiers, the full model's among them, against the labels (Li et al. 2019)."""
    return _label_losses(output, labels, problem_type).sum()


def mean_joint_loss(output: ExitOutput, labels: Tensor, problem_type: str | None) -> Tensor:
    """Their mean, as Kubaty et al. (2024) train jointly."""
    return _label_losses(output, labels, problem_type).mean()


def weighted_joint_loss(output: ExitOutput, labels: Tensor, problem_type: str | None) -> Tensor:
    """PABEE's loss (Zhou et al. 2020): every classifier against the labels, weighted by its place in the row."""
    losses = _label_losses(output, labels, problem_type)
    weights = torch.arange(1, len(losses) + 1, dtype=losses.dtype, device=losses.device)
    return (weights * losses).sum() / weights.sum()


def _label_losses(output: ExitOutput, labels: Tensor, problem_type: str | None) -> Tensor:
    """Loss of every exit and, last, of the full model against the labels, (num_exits + 1,)."""
    return torch.stack([label_loss(logits, labels, problem_type) for logits in _required(output.exit_logits)])


def _required(logits: Tensor | None) -> Tensor:
    if logits is None:
        raise ValueError("The model was run without the logits this loss reads; check the stage's `needs`.")
    return logits
