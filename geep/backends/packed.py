"""Packed backend: BERT's layer on tokens without padding.

All linear layers, norms and activations run on (num_tokens, hidden), so no time goes into padding. Attention is the
only place where texts matter: it runs once for each run of texts of equal length, which the scheduler lays side by
side. The weights are Hugging Face's own; query, key and value are fused into one matrix at build time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from geep.backends.protocol import FLOAT_DTYPES, Integers, TokenBatch, token_positions
from geep.modeling import FAMILIES, GeepForSequenceClassification, family_of

# Where a family keeps the parts of its layer.
_BERT_PARTS: Mapping[str, str] = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "output_norm": "output.LayerNorm",
}
_DISTILBERT_PARTS: Mapping[str, str] = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "out": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
    "output_norm": "output_layer_norm",
}
LAYER_PARTS: dict[str, Mapping[str, str]] = {
    "bert": _BERT_PARTS,
    "roberta": _BERT_PARTS,
    "xlm-roberta": _BERT_PARTS,
    "electra": _BERT_PARTS,
    "distilbert": _DISTILBERT_PARTS,
}


@dataclass(frozen=True, slots=True)
class LengthRun:
    """Texts of equal length lying side by side: first token, number of texts, tokens of each."""

    start: int
    num_texts: int
    length: int


@dataclass(frozen=True, slots=True)
class PackedTexts:
    """Live texts of the packed backend: hidden states (num_tokens, hidden) and where the texts lie in them."""

    hidden: Tensor
    lengths: Integers
    runs: tuple[LengthRun, ...]

    def first(self, num_texts: int) -> PackedTexts:
        """Return the first texts; their hidden states are a view."""
        if num_texts == len(self.lengths):
            return self
        lengths = self.lengths[:num_texts]
        return PackedTexts(self.hidden[: int(lengths.sum())], lengths, length_runs(lengths))


def length_runs(lengths: Integers) -> tuple[LengthRun, ...]:
    """Describe a row of lengths as runs of equal ones; empty texts take part in no attention."""
    if not len(lengths):
        return ()
    first = np.concatenate(([0], np.flatnonzero(np.diff(lengths)) + 1))
    counts = np.diff(np.concatenate((first, [len(lengths)])))
    starts = (np.cumsum(lengths) - lengths)[first]
    return tuple(
        LengthRun(start, count, length)
        for start, count, length in zip(starts.tolist(), counts.tolist(), lengths[first].tolist(), strict=True)
        if length
    )


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One post-norm encoder layer (Devlin et al. 2019) on packed tokens."""

    qkv: tuple[Tensor, Tensor]  # (3 hidden, hidden), (3 hidden,)
    out: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    attention_norm: _Norm
    output_norm: _Norm
    activation: Callable[[Tensor], Tensor]
    num_heads: int

    @classmethod
    def from_module(cls, layer: nn.Module, parts: Mapping[str, str], activation: str, num_heads: int) -> Self:
        """Take the weights of a Hugging Face layer; only query, key and value are copied, to lie in one matrix."""

        def linear(name: str) -> tuple[Tensor, Tensor]:
            module: Any = layer.get_submodule(parts[name])
            return module.weight.detach(), module.bias.detach()

        def norm(name: str) -> _Norm:
            module: Any = layer.get_submodule(parts[name])
            return _Norm(module.weight.detach(), module.bias.detach(), module.eps)

        query, key, value = linear("query"), linear("key"), linear("value")
        return cls(
            qkv=(torch.cat([query[0], key[0], value[0]]), torch.cat([query[1], key[1], value[1]])),
            out=linear("out"),
            up=linear("up"),
            down=linear("down"),
            attention_norm=norm("attention_norm"),
            output_norm=norm("output_norm"),
            activation=F.gelu if activation == "gelu" else ACT2FN[activation],
            num_heads=num_heads,
        )

    def __call__(self, hidden: Tensor, runs: Sequence[LengthRun]) -> Tensor:
        """Run the layer on packed tokens (num_tokens, hidden)."""
        mixed = attend(F.linear(hidden, *self.qkv), runs, self.num_heads)
        hidden = self.attention_norm(F.linear(mixed, *self.out).add_(hidden))
        wide = self.activation(F.linear(hidden, *self.up))
        return self.output_norm(F.linear(wide, *self.down).add_(hidden))


def attend(qkv: Tensor, runs: Sequence[LengthRun], num_heads: int) -> Tensor:
    """Let every text attend to itself: fused queries, keys and values (num_tokens, 3 width) to (num_tokens, width)."""
    num_tokens, width = qkv.shape[0], qkv.shape[1] // 3
    head = width // num_heads
    out = qkv.new_empty(num_tokens, width)
    for run in runs:
        stop = run.start + run.num_texts * run.length
        block = qkv[run.start : stop].view(run.num_texts, run.length, 3, num_heads, head)
        query, key, value = block.permute(2, 0, 3, 1, 4)  # each (num_texts, num_heads, length, head)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out[run.start : stop].view(run.num_texts, run.length, num_heads, head).copy_(mixed.transpose(1, 2))
    return out


def activation_of(config: Any) -> str:
    """Name of the activation between the two wide linear layers."""
    return config.activation if config.model_type == "distilbert" else config.hidden_act


@dataclass(frozen=True, slots=True)
class PackedBackend:
    """The packed backend; see the module's docstring and `Backend`."""

    model: GeepForSequenceClassification
    layers: tuple[PackedLayer, ...]
    first_position: int

    @classmethod
    def supports(cls, model_type: str) -> bool:
        """Whether the family's layer is the plain post-norm one."""
        return model_type in FAMILIES and FAMILIES[model_type].packed

    @classmethod
    def dtypes(cls, device_type: str) -> tuple[str, ...]:
        """Dtypes it runs on a kind of device, its default first."""
        return FLOAT_DTYPES.get(device_type, FLOAT_DTYPES["other"])

    @classmethod
    def build(cls, model: GeepForSequenceClassification, *, dtype: str) -> Self:
        """Take a model that is on its device, in its dtype, in eval mode.

        Raises:
            ValueError: If the family's layer is another one.
        """
        config = model.encoder.config
        if not cls.supports(config.model_type):
            raise ValueError(
                f"The packed backend runs {sorted(LAYER_PARTS)}, got {config.model_type!r}; use backend='padded'."
            )
        family = family_of(config)
        modules = model.encoder.get_submodule(family.layers)
        activation = activation_of(config)
        return cls(
            model=model,
            layers=tuple(
                PackedLayer.from_module(layer, LAYER_PARTS[config.model_type], activation, config.num_attention_heads)
                for layer in modules
            ),
            first_position=config.pad_token_id + 1 if family.positions_after_pad else 0,
        )

    def start(self, batch: TokenBatch) -> PackedTexts:
        """Embed texts with the encoder's own embedding module, every token at its position in its text."""
        device = self.model.device
        encoder = self.model.encoder
        starts = np.cumsum(batch.lengths) - batch.lengths
        positions = np.arange(len(batch.input_ids)) - np.repeat(starts, batch.lengths) + self.first_position
        if family_of(encoder.config).positions_after_pad:
            # A text may hold the pad token itself ("<pad>" typed by someone): it stands at its own position and the
            # tokens after it are counted without it, as in Hugging Face's model.
            pad = encoder.config.pad_token_id
            is_pad = batch.input_ids == pad
            if is_pad.any():
                pads = np.cumsum(is_pad)
                before = np.concatenate(([0], pads))[starts]
                positions = np.where(is_pad, pad, positions - (pads - np.repeat(before, batch.lengths)))
        inputs = {
            "input_ids": _row(batch.input_ids, device),
            "position_ids": _row(positions, device),
        }
        if family_of(encoder.config).has_token_type_ids:
            types = np.zeros_like(batch.input_ids) if batch.token_type_ids is None else batch.token_type_ids
            inputs["token_type_ids"] = _row(types, device)
        hidden = encoder.embeddings(**inputs)
        if hasattr(encoder, "embeddings_project"):  # ELECTRA's embeddings may be narrower than its layers
            hidden = encoder.embeddings_project(hidden)
        return PackedTexts(hidden[0], batch.lengths, length_runs(batch.lengths))

    def advance(self, live: PackedTexts, layer: int, num_texts: int) -> PackedTexts:
        """Run a layer on a prefix of the texts; the prefix is a view."""
        live = live.first(num_texts)
        return PackedTexts(self.layers[layer - 1](live.hidden, live.runs), live.lengths, live.runs)

    def exit_logits(self, live: PackedTexts, layer: int, start: int, stop: int) -> Tensor:
        """Run the classifier of a layer on a range of texts; the range is a view."""
        first = int(live.lengths[:start].sum())
        lengths = live.lengths[start:stop]
        hidden = live.hidden[first : first + int(lengths.sum())]
        head: Any = self.model.head_at(layer)
        return head.forward_packed(hidden, torch.from_numpy(lengths).to(hidden.device))

    def select(self, live: PackedTexts, rows: Integers) -> PackedTexts:
        """Keep some texts: one gather of their tokens."""
        tokens = torch.from_numpy(token_positions(live.lengths, rows)).to(live.hidden.device)
        lengths = live.lengths[rows]
        return PackedTexts(live.hidden.index_select(0, tokens), lengths, length_runs(lengths))

    def concat(self, lives: Sequence[PackedTexts]) -> PackedTexts:
        """Put live texts one after another."""
        lengths = np.concatenate([live.lengths for live in lives])
        return PackedTexts(torch.cat([live.hidden for live in lives]), lengths, length_runs(lengths))


def _row(values: Integers, device: torch.device) -> Tensor:
    """A host row as a batch of one on the device, shape (1, num_tokens)."""
    return torch.from_numpy(values).to(device)[None]
