"""Packed backend: an encoder's layers on tokens without padding.

All linear layers, norms and activations run on (num_tokens, hidden), so no time goes into padding. Attention runs in
one call of our own kernel (CPUs), or once for each run of texts of equal length, which the scheduler lays side by side.
The layers come in three forms with the same weights: plain (`PackedLayer`, any device), fused (`FusedLayer`, CPUs) and
8-bit (`Int8Layer`, CPUs).

On a CPU the model itself stays float32, whatever its layers compute in: what promises are about is at hand.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from geep.backends import int8, kernels, onednn
from geep.backends.fused_heads import FusedConvHead
from geep.backends.int8 import ActivationRanges, Int8Layer
from geep.backends.layout import Layout
from geep.backends.onednn import FusedLayer
from geep.backends.packed_layer import each_once, packed_layers, steps_of, why_not_packed
from geep.backends.protocol import FLOAT_DTYPES, TORCH_DTYPES, Integers, TokenBatch, token_positions
from geep.modeling import ConvHead, GeepForSequenceClassification, Spans, family_of

logger = logging.getLogger(__name__)


class Layer(Protocol):
    """A layer on packed tokens, in any of its forms."""

    def __call__(self, hidden: Tensor, layout: Layout) -> Tensor:
        """Run the layer: (num_tokens, hidden) to the same shape."""

    def first_tokens(self, hidden: Tensor, layout: Layout) -> Tensor:
        """Run the layer for the first token of each text that has one: (num_tokens, hidden) to (texts, hidden)."""


class PackedHead(Protocol):
    """An exit on packed texts."""

    def forward_packed(self, hidden: Tensor, spans: Spans) -> Tensor:
        """Map packed texts to logits; see `geep.modeling.PooledHead.forward_packed`."""


@dataclass(frozen=True, slots=True)
class PackedTexts:
    """Live texts of the packed backend.

    Of a text that has ended (see `Backend.advance`) only the first token may be left; its length is then 1.

    Attributes:
        hidden: Hidden states, (num_tokens, hidden).
        firsts: Of the tokens of each text, those of the first text of a pair, (num_texts,); None where none is told
            apart.
        layout: Where they lie.
        spans: The same, for the exits that they meet.
    """

    hidden: Tensor
    firsts: Integers | None
    layout: Layout
    spans: Spans

    @classmethod
    def of(cls, hidden: Tensor, lengths: Integers, firsts: Integers | None) -> Self:
        """Lay out texts of these lengths."""
        layout = Layout(lengths)
        return cls(hidden, firsts, layout, spans_of(layout, firsts, hidden.device))

    @property
    def lengths(self) -> Integers:
        """Tokens of each text, (num_texts,)."""
        return self.layout.lengths

    def first(self, num_texts: int) -> PackedTexts:
        """Return the first texts; their hidden states are a view."""
        if num_texts == len(self.lengths):
            return self
        firsts = None if self.firsts is None else self.firsts[:num_texts]
        return PackedTexts.of(self.hidden[: self.layout.offsets[num_texts]], self.lengths[:num_texts], firsts)


@dataclass(frozen=True, slots=True)
class PackedBackend:
    """The packed backend; see the module's docstring and `Backend`.

    Attributes:
        model: Embeds texts; its heads answer, except where there are others.
        layers: The encoder's layers.
        dtype: Of the hidden states.
        heads: What answers instead of the model's heads, by layer: the same in this dtype, or on faster kernels.
    """

    keeps_above: ClassVar[float] = 1.0

    model: GeepForSequenceClassification
    layers: tuple[Layer, ...]
    dtype: torch.dtype
    heads: Mapping[int, PackedHead] = field(default_factory=dict)

    @classmethod
    def supports(cls, config: PreTrainedConfig) -> bool:
        """Whether the encoder's layer is one of `FORMS`."""
        return why_not_packed(config) is None

    @classmethod
    def dtypes(cls, device_type: str) -> tuple[str, ...]:
        """Dtypes it runs on a kind of device, its default first."""
        known = FLOAT_DTYPES.get(device_type, FLOAT_DTYPES["other"])
        if device_type == "cpu" and onednn.multiplies_bfloat16():
            known = ("bfloat16", "float32")
        return (*known, "int8") if device_type == "cpu" and int8.is_available() else known

    @classmethod
    def model_dtype(cls, dtype: str, device_type: str) -> torch.dtype:
        """On a CPU float32, else the dtype itself."""
        return torch.float32 if device_type == "cpu" else TORCH_DTYPES[dtype]

    @classmethod
    def build(cls, model: GeepForSequenceClassification, *, dtype: str, ranges: ActivationRanges | None = None) -> Self:
        """Take a model that is on its device, in eval mode, in its `model_dtype`.

        Args:
            model: The model; its layers and heads are copied where they are to compute in another dtype.
            dtype: One of `dtypes`.
            ranges: For int8: the ranges of the model's activations.

        Raises:
            ValueError: If the family's layer is another one, or int8 comes without ranges.
        """
        if model.device.type == "cpu" and not kernels.is_available():
            logger.warning(kernels.why_not_available())
        plain = packed_layers(model)
        computes_in = model.dtype
        if dtype == "bfloat16" and model.device.type == "cpu":
            computes_in = torch.bfloat16
            plain = each_once(lambda layer: layer.to(computes_in), plain)
        layers: tuple[Layer, ...] = plain
        if dtype == "int8":
            if ranges is None:
                raise ValueError(
                    "int8 on the packed backend needs the ranges of the model's activations, found none; "
                    "run `geep profile MODEL --dtype int8` first."
                )
            layers = tuple(Int8Layer.of(layer, ranges, number) for number, layer in enumerate(plain))
        elif model.device.type == "cpu" and onednn.is_available():
            layers = each_once(FusedLayer.of, plain)
        heads = {depth: _laid_out(model.head_at(depth), computes_in) for depth in model.config.depths}
        return cls(model, layers, computes_in, {depth: head for depth, head in heads.items() if head is not None})

    def start(self, batch: TokenBatch) -> PackedTexts:
        """Embed texts with the encoder's own embedding module, every token at its position in its text."""
        device, encoder = self.model.device, self.model.encoder
        family = family_of(encoder.config)
        inputs = {"input_ids": _row(batch.input_ids, device)}
        if family.has_position_ids:
            inputs["position_ids"] = _row(position_ids(batch, encoder), device)
        if family.has_token_type_ids:
            types = np.zeros_like(batch.input_ids) if batch.token_type_ids is None else batch.token_type_ids
            inputs["token_type_ids"] = _row(types, device)
        firsts = batch.firsts(self.model.config.separator_id)
        return PackedTexts.of(embed(encoder, inputs).to(self.dtype), batch.lengths, firsts)

    def advance(self, live: PackedTexts, layer: int, num_texts: int, *, continuing: int | None = None) -> PackedTexts:
        """Run a layer on a prefix of the texts; the prefix is a view."""
        live = live.first(num_texts)
        if not len(live.hidden):
            return live
        *inner, run = steps_of(self.layers, layer, self.model.config.num_hidden_layers)
        for each in inner:
            live = replace(live, hidden=each(live.hidden, live.layout))
        if not only_first_tokens_end(self.model, layer, num_texts, continuing):
            return replace(live, hidden=run(live.hidden, live.layout))
        going, ending = live.lengths[:continuing], live.lengths[continuing:]
        border = live.layout.offsets[continuing]
        hidden = run.first_tokens(live.hidden[border:], Layout(ending))
        if border:
            hidden = torch.cat([run(live.hidden[:border], Layout(going)), hidden])
        lengths = np.concatenate([going, np.minimum(ending, 1)])
        return PackedTexts.of(hidden, lengths, live.firsts)

    def exit_logits(
        self, live: PackedTexts, layer: int, start: int, stop: int, *, head: nn.Module | None = None
    ) -> Tensor:
        """Run the classifier of a layer, or another head, on a range of texts; the range is a view."""
        spans, hidden = live.spans, live.hidden
        if (start, stop) != (0, len(live.lengths)):
            hidden = hidden[live.layout.offsets[start] : live.layout.offsets[stop]]
            firsts = None if live.firsts is None else live.firsts[start:stop]
            spans = spans_of(Layout(live.lengths[start:stop]), firsts, hidden.device)
        if head is not None:
            hidden = hidden.to(self.model.dtype)
        reader: Any = head or self.heads.get(layer) or self.model.head_at(layer)
        return reader.forward_packed(self.model.finish(hidden), spans)

    def select(self, live: PackedTexts, rows: Integers) -> PackedTexts:
        """Keep some texts: one gather of their tokens."""
        tokens = torch.from_numpy(token_positions(live.lengths, rows)).to(live.hidden.device)
        lengths = live.lengths[rows]
        firsts = None if live.firsts is None else live.firsts[rows]
        return PackedTexts.of(live.hidden.index_select(0, tokens), lengths, firsts)

    def concat(self, lives: Sequence[PackedTexts]) -> PackedTexts:
        """Put live texts one after another."""
        lengths = np.concatenate([live.lengths for live in lives])
        return PackedTexts.of(
            torch.cat([live.hidden for live in lives]), lengths, joined([live.firsts for live in lives])
        )


def _laid_out(head: Any, dtype: torch.dtype) -> PackedHead | None:
    """A model's head as this backend runs it; None: as it is."""
    weight = head.out.weight
    may_fuse = weight.device.type == "cpu" and kernels.is_available() and onednn.is_available()
    if may_fuse and isinstance(head, ConvHead) and dtype in kernels.DTYPES:
        return FusedConvHead.of(head, dtype)
    return None if weight.dtype == dtype else copy.deepcopy(head).to(dtype)


def spans_of(layout: Layout, firsts: Integers | None, device: torch.device) -> Spans:
    """Where packed texts lie, on the device."""
    there = None if firsts is None else torch.from_numpy(firsts).to(device)
    return Spans(torch.from_numpy(layout.offsets).to(device), layout.num_tokens, layout.longest, there)


def joined(parts: Sequence[Integers | None]) -> Integers | None:
    """Put rows behind one another; all are there or none is."""
    there = [part for part in parts if part is not None]
    return np.concatenate(there) if there else None


def embed(encoder: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Run an encoder's own embedding module on rows of tokens, each (1, num_tokens): (num_tokens, hidden)."""
    hidden = encoder.embeddings(**inputs)
    # The embeddings of ELECTRA and ALBERT may be narrower than their layers.
    if hasattr(encoder, "embeddings_project"):
        hidden = encoder.embeddings_project(hidden)
    elif encoder.config.model_type == "albert":
        hidden = encoder.encoder.embedding_hidden_mapping_in(hidden)
    return hidden[0]


def only_first_tokens_end(
    model: GeepForSequenceClassification, layer: int, num_texts: int, continuing: int | None
) -> bool:
    """Whether some texts end at a layer and its exit reads nothing but their first tokens; see `Backend.advance`."""
    if continuing is None or continuing >= num_texts:
        return False
    head: Any = model.head_at(layer)
    return bool(head.reads_first_token_only)


def position_ids(batch: TokenBatch, encoder: Any) -> Integers:
    """Position of every token in its text, as the encoder counts, (num_tokens,)."""
    starts = np.cumsum(batch.lengths) - batch.lengths
    positions = np.arange(len(batch.input_ids)) - np.repeat(starts, batch.lengths)
    if not family_of(encoder.config).positions_after_pad:
        return positions
    pad: int = encoder.embeddings.padding_idx  # of MPNet always 1, whatever its config says
    positions += pad + 1
    # A text may hold the pad token itself ("<pad>" typed by someone): it stands at its own position and the tokens
    # after it are counted without it, as in Hugging Face's model.
    is_pad = batch.input_ids == pad
    if is_pad.any():
        pads = np.cumsum(is_pad)
        before = np.concatenate(([0], pads))[starts]
        positions = np.where(is_pad, pad, positions - (pads - np.repeat(before, batch.lengths)))
    return positions


def _row(values: Integers, device: torch.device) -> Tensor:
    """A host row as a batch of one on the device, shape (1, num_tokens)."""
    return torch.from_numpy(values).to(device)[None]
