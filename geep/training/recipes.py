"""Recipes: the stages a model is trained in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from geep.training.losses import (
    Loss,
    distillation_loss,
    exit_label_loss,
    followed_loss,
    full_model_loss,
    guided_shared_exit_loss,
    joint_loss,
    mean_joint_loss,
    shared_exit_loss,
    weighted_joint_loss,
)


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of the Trainer.

    Attributes:
        name: Name of the stage's folder of checkpoints.
        loss: What is minimised.
        trains: "all" parameters, or only the "exits" on a frozen encoder and teacher, which then run without dropout.
        needs: Arguments of the model's forward that make it return what the loss reads.
        epochs_scale: Epochs of this stage for each epoch asked for.
        learning_rate_scale: Learning rate of this stage for the rate asked for.
        alternate: What is minimised instead on every second step. None: `loss` on every step.
    """

    name: str
    loss: Loss
    trains: Literal["all", "exits"] = "all"
    needs: Mapping[str, bool] | None = None
    epochs_scale: float = 1.0
    learning_rate_scale: float = 1.0
    alternate: Loss | None = None

    def loss_after(self, steps: int) -> Loss:
        """What the next step minimises when the optimizer has made so many in this stage, before a stop and since."""
        return self.loss if self.alternate is None or steps % 2 == 0 else self.alternate


@dataclass(frozen=True, slots=True)
class Recipe:
    """Stages run one after another, with a learning rate that suits them (docs/results.md has comparisons).

    Attributes:
        stages: In their order.
        learning_rate: Peak rate of the encoder, where none is asked for.
        trains_exits: Whether a stage trains exits, so that the model needs some from the first step on.
        fits_exits: Whether exits are fitted to the full model's answers when all stages are done (`geep.train`).
    """

    stages: tuple[Stage, ...]
    learning_rate: float = 1e-4
    trains_exits: bool = True
    fits_exits: bool = False


_EXITS: Mapping[str, bool] = {"output_exits": True}


_BALANCED: Mapping[str, bool] = {"output_exits": True, "gradient_equilibrium": True}


_SHARED: Mapping[str, bool] = {"output_exits": True, "output_shared_exits": True}


RECIPES: dict[str, Recipe] = {
    "fitted": Recipe((Stage("fine-tune", full_model_loss),), trains_exits=False, fits_exits=True),
    "tune": Recipe(
        (
            Stage("fine-tune", full_model_loss),
            Stage("tune", followed_loss, needs=_EXITS, epochs_scale=1 / 3, learning_rate_scale=0.3),
        ),
        fits_exits=True,
    ),
    "geep": Recipe((Stage("shared-exit", guided_shared_exit_loss, needs=_SHARED),)),
    "geep-paper": Recipe((Stage("shared-exit", shared_exit_loss, needs=_SHARED),)),
    "fastbert": Recipe(
        (
            Stage("fine-tune", full_model_loss),
            # FastBERT's own proportions: 3 epochs, then 5 at ten times the rate.
            Stage("distil", distillation_loss, "exits", _EXITS, epochs_scale=5 / 3, learning_rate_scale=10.0),
        )
    ),
    "deebert": Recipe(
        (
            Stage("fine-tune", full_model_loss),
            Stage("exits", exit_label_loss, "exits", _EXITS, learning_rate_scale=10.0),
        )
    ),
    "pabee": Recipe((Stage("joint", weighted_joint_loss, needs=_EXITS),)),
    # The first step, and every other one from there, is the full model's alone, as in BERxiT's code.
    "berxit": Recipe((Stage("alternating", full_model_loss, needs=_EXITS, alternate=joint_loss),)),
    "gradient-equilibrium": Recipe((Stage("joint", joint_loss, needs=_BALANCED),)),
    "mixed": Recipe((Stage("fine-tune", full_model_loss), Stage("joint", mean_joint_loss, needs=_EXITS))),
    "vanilla": Recipe((Stage("fine-tune", full_model_loss),), trains_exits=False),
}
