"""Where each text is asked first, before any encoder layer runs. How it is run is not known here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geep.backends import TokenBatch
from geep.engine.settings import ExitSettings
from geep.predictor import ExitPrediction, ExitPredictor

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is known of texts before any encoder layer runs.

    Attributes:
        predicted_layers: Layer at which each text is asked first; 0: answered by the table, (num_texts,).
        lexical_logits: The table's guess at the label, (num_texts, num_labels); None where there is none.
    """

    predicted_layers: Integers
    lexical_logits: Tensor | None


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans runs of a model.

    Attributes:
        predictor: The exit table, on the device where the model is: on a GPU, one kernel foretells a window's exit
            layers. None where there is none.
        depths: Layers at which an answer can be had, the full model last.
        multi_label: Whether several labels may hold at once.
        unk_token_id: The tokenizer's token for what it does not know; None where it has none.
    """

    predictor: ExitPredictor | None
    depths: tuple[int, ...]
    multi_label: bool
    unk_token_id: int | None

    @classmethod
    def of(
        cls,
        predictor: ExitPredictor | None,
        *,
        device: torch.device,
        depths: tuple[int, ...],
        multi_label: bool,
        unk_token_id: int | None,
    ) -> Planner:
        """Bring a table to a device."""
        if predictor is not None and device.type == "cuda":
            predictor = predictor.to(device)
        return cls(predictor, depths, multi_label, unk_token_id)

    def plan(self, batch: TokenBatch, settings: ExitSettings) -> Plan:
        """Say at which layer each text is to be asked first.

        Without a table every text is asked at the first exit ("continue"), and speed 0 always runs all layers. Where
        only some exits are asked, it is the next of them.
        """
        if settings.speed == 0:
            return Plan(np.full(len(batch), self.depths[-1]), None)
        if self.predictor is None:
            settings.check(self.depths, None)
            return Plan(np.full(len(batch), settings.asked_layers(self.depths)[0]), None)
        return self.plan_from(self.foretell(batch, settings), batch.lengths, settings)

    def foretell(self, batch: TokenBatch, settings: ExitSettings) -> ExitPrediction:
        """Ask the table; of the settings, only speed and quantile matter.

        Raises:
            ValueError: If there is none.
        """
        if self.predictor is None:
            raise ValueError("There is no exit table to ask; run `geep profile` first.")
        return self.predictor.predict(
            torch.from_numpy(batch.input_ids).to(self.predictor.device),
            torch.from_numpy(batch.lengths).to(self.predictor.device),
            speed=settings.speed,
            quantile=settings.quantile,
        )

    def unknown_shares(self, batch: TokenBatch) -> NDArray[np.float32] | None:
        """Share of each text's tokens that the table has never seen, (num_texts,); None where there is no table."""
        if self.predictor is None:
            return None
        return self.predictor.unknown_shares(batch.input_ids, batch.lengths, unk_token_id=self.unk_token_id)

    def plan_from(self, found: ExitPrediction, lengths: Integers, settings: ExitSettings) -> Plan:
        """Make a plan of what the table said of texts of these lengths."""
        asked = settings.asked_layers(self.depths)
        layers = asked[np.searchsorted(asked, found.exit_layers.cpu().numpy())]
        if found.lexical_logits is None:
            return Plan(layers, None)
        lexical = found.lexical_logits.cpu()
        if settings.lexical_exit:
            unsure = settings.uncertainty(lexical, 0, multi_label=self.multi_label)
            # Empty texts have no token to guess from.
            layers[(unsure < settings.speed).numpy() & (lengths > 0)] = 0
        return Plan(layers, lexical)
