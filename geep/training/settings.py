"""How to train: the home of every default. Imports no torch by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from geep.training.arguments import checked_arguments


@dataclass(frozen=True)  # without slots the class still shows its defaults, which the command line reads
class TrainSettings:
    """How to train; every default has its home here.

    Attributes:
        recipe: Row of `RECIPES`.
        fit_exits: Whether exits are fitted to the full model's answers after the recipe, in the place of those that it
            trained, if any. Recipe `fitted` does so whatever this says.
        encoder_layers: Train the encoder's first so many layers; None: all. With recipe `vanilla` this is what one has
            without early exit: a model that is shallower for every text.
        epochs: Passes over the training texts (scaled by a recipe's stages).
        batch_size: Texts on a device at a time.
        gradient_accumulation: Batches whose gradients are added up to one step: a step sees this many times more texts
            in the same memory.
        learning_rate: Peak rate of the encoder. None: the recipe's.
        head_learning_rate_scale: The fresh heads learn this many times faster than the pretrained encoder.
        warmup: Share of the steps in which the rate rises.
        weight_decay: AdamW's, on matrices only.
        max_grad_norm: Clipping norm.
        max_length: Longest text in tokens.
        bf16: Mixed precision; on CPUs with AVX-512 BF16 about twice as fast, too.
        seed: Seed of heads' dropout and data order.
        standardise: Start the heads from standardised features (see `standardise_heads`): without it the paper's
            recipe starts slowly, and so does plain fine-tuning of sentence encoders. False for heads trained already.
        arguments: More fields of Hugging Face's `TrainingArguments`, by name, as JSON has values: handed through. Those
            that geep sets from the settings above are refused.
    """

    recipe: str = "fitted"
    fit_exits: bool = False
    encoder_layers: int | None = None
    epochs: float = 3.0
    batch_size: int = 32
    gradient_accumulation: int = 1
    learning_rate: float | None = None
    head_learning_rate_scale: float = 5.0
    warmup: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_length: int = 128
    bf16: bool = False
    seed: int = 42
    standardise: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        # Imported where it is needed: losses are torch, and the command line reads defaults without it.
        from geep.training.recipes import RECIPES

        if self.recipe not in RECIPES:
            raise ValueError(f"Unknown recipe {self.recipe!r}; known: {sorted(RECIPES)}.")
        for name in ("epochs", "batch_size", "gradient_accumulation", "max_length", "head_learning_rate_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        object.__setattr__(self, "arguments", checked_arguments(self.arguments))

    @property
    def fits_exits(self) -> bool:
        """Whether exits are fitted when the recipe's stages are done."""
        from geep.training.recipes import RECIPES

        return self.fit_exits or RECIPES[self.recipe].fits_exits

    @property
    def makes_exits(self) -> bool:
        """Whether the finished model has exits, trained or fitted."""
        from geep.training.recipes import RECIPES

        return self.fits_exits or RECIPES[self.recipe].trains_exits
