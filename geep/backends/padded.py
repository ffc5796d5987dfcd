"""Padded backend: Hugging Face's own layers, for every family it has; layer l runs on a prefix of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from geep.backends.int8 import ActivationRanges
from geep.backends.protocol import FLOAT_DTYPES, TORCH_DTYPES, Integers, TokenBatch
from geep.modeling import FAMILIES, GeepForSequenceClassification, LayerCall, layer_calls


@dataclass(frozen=True, slots=True)
class PaddedTexts:
    """Live texts of the padded backend.

    Attributes:
        hidden: Hidden states, (rows, seq_len, hidden).
        batch: The tokens of the rows.
        mask: 1 for tokens, 0 for padding, (rows, seq_len).
        firsts: Tokens of the first text of each pair, (rows,); None where none is told apart.
        layers: The encoder's layer loop for these rows.
    """

    hidden: Tensor
    batch: TokenBatch
    mask: Tensor
    firsts: Tensor | None
    layers: tuple[LayerCall, ...]

    @property
    def lengths(self) -> Integers:
        """Tokens of each text, shape (num_texts,)."""
        return self.batch.lengths


@dataclass(frozen=True, slots=True)
class PaddedBackend:
    """The padded backend; see the module's docstring and `Backend`."""

    keeps_above: ClassVar[float] = 1.0

    model: GeepForSequenceClassification

    @classmethod
    def supports(cls, config: PreTrainedConfig) -> bool:
        """Every family of `FAMILIES`, whatever its switches: the layers are Hugging Face's own."""
        return config.model_type in FAMILIES

    @classmethod
    def dtypes(cls, device_type: str) -> tuple[str, ...]:
        """Dtypes it runs on a kind of device, its default first."""
        return FLOAT_DTYPES.get(device_type, FLOAT_DTYPES["other"])

    @classmethod
    def model_dtype(cls, dtype: str, device_type: str) -> torch.dtype:
        """The dtype itself: the model is cast as a whole."""
        return TORCH_DTYPES[dtype]

    @classmethod
    def build(cls, model: GeepForSequenceClassification, *, dtype: str, ranges: ActivationRanges | None = None) -> Self:
        """Take a model that is on its device, in its dtype, in eval mode."""
        return cls(model)

    def start(self, batch: TokenBatch) -> PaddedTexts:
        """Pad and embed texts, and let the encoder prepare its masks."""
        model = self.model
        lengths = torch.from_numpy(batch.lengths)
        # A batch of empty texts still gets one column: attention over no positions at all is undefined.
        mask = torch.arange(max(int(lengths.max()), 1)) < lengths[:, None]
        pad = model.encoder.config.pad_token_id or 0
        ids = torch.full(mask.shape, pad, dtype=torch.int64)
        ids[mask] = torch.from_numpy(batch.input_ids)
        types = torch.zeros_like(ids)
        if batch.token_type_ids is not None:
            types[mask] = torch.from_numpy(batch.token_type_ids)
        mask = mask.to(model.device)
        inputs = model.encoder_inputs(ids.to(model.device), mask.to(torch.int64), types.to(model.device))
        calls = layer_calls(model.encoder, inputs)
        firsts = batch.firsts(model.config.separator_id)
        where = None if firsts is None else torch.from_numpy(firsts).to(model.device)
        return PaddedTexts(calls.embedding_output, batch, mask, where, calls.layers)

    def advance(self, live: PaddedTexts, layer: int, num_texts: int, *, continuing: int | None = None) -> PaddedTexts:
        """Run a layer on a prefix of the rows; the prefix is a view."""
        batch = live.batch
        if num_texts < len(batch):
            batch = batch.select(np.arange(num_texts))
        hidden = live.layers[layer - 1](live.hidden[:num_texts])
        return PaddedTexts(hidden, batch, live.mask[:num_texts], _rows(live.firsts, 0, num_texts), live.layers)

    def exit_logits(
        self, live: PaddedTexts, layer: int, start: int, stop: int, *, head: nn.Module | None = None
    ) -> Tensor:
        """Run the classifier of a layer, or another head, on a range of rows; the range is a view."""
        hidden = self.model.finish(live.hidden[start:stop])
        reader = self.model.head_at(layer) if head is None else head
        found: Tensor = reader(hidden, live.mask[start:stop], _rows(live.firsts, start, stop))
        return found

    def select(self, live: PaddedTexts, rows: Integers) -> PaddedTexts:
        """Keep some rows, at the width they have: hidden states, masks and biases are gathered."""
        index = torch.from_numpy(rows).to(live.hidden.device)
        gathered: dict[int, Tensor] = {}
        return PaddedTexts(
            live.hidden.index_select(0, index),
            live.batch.select(rows),
            live.mask.index_select(0, index),
            None if live.firsts is None else live.firsts.index_select(0, index),
            tuple(layer.select(index, gathered) for layer in live.layers),
        )

    def concat(self, lives: Sequence[PaddedTexts]) -> PaddedTexts:
        """Put rows of several batches together, padded to the longest of all."""
        fresh = self.start(TokenBatch.concat([live.batch for live in lives]))
        hidden = torch.zeros_like(fresh.hidden)
        row = 0
        for live in lives:
            # A batch may be wider than its longest text, where longer ones were let go.
            rows, seq_len = live.hidden.shape[0], min(live.hidden.shape[1], hidden.shape[1])
            hidden[row : row + rows, :seq_len] = live.hidden[:, :seq_len]
            row += rows
        return PaddedTexts(hidden, fresh.batch, fresh.mask, fresh.firsts, fresh.layers)


def _rows(values: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if values is None else values[start:stop]
