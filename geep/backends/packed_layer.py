"""BERT's post-norm layer on tokens without padding: the reference of the packed backends, and where its weights are.

Linear layers, norms and activations run on (num_tokens, hidden). Attention is the only place where texts matter: it
runs once for each run of texts of equal length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from geep.backends.protocol import Integers
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


Watch = Callable[[str, Tensor], None]


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer norm's weights."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise every row of x (…, width)."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One post-norm encoder layer (Devlin et al. 2019) on packed tokens."""

    qkv: tuple[Tensor, Tensor]  # (3 hidden, hidden), (3 hidden,)
    out: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    attention_norm: Norm
    output_norm: Norm
    activation: Callable[[Tensor], Tensor]
    activation_name: str
    num_heads: int

    @classmethod
    def from_module(cls, layer: nn.Module, parts: Mapping[str, str], activation: str, num_heads: int) -> Self:
        """Take the weights of a Hugging Face layer; only query, key and value are copied, to lie in one matrix."""

        def linear(name: str) -> tuple[Tensor, Tensor]:
            module: Any = layer.get_submodule(parts[name])
            return module.weight.detach(), module.bias.detach()

        def norm(name: str) -> Norm:
            module: Any = layer.get_submodule(parts[name])
            return Norm(module.weight.detach(), module.bias.detach(), module.eps)

        query, key, value = linear("query"), linear("key"), linear("value")
        return cls(
            qkv=(torch.cat([query[0], key[0], value[0]]), torch.cat([query[1], key[1], value[1]])),
            out=linear("out"),
            up=linear("up"),
            down=linear("down"),
            attention_norm=norm("attention_norm"),
            output_norm=norm("output_norm"),
            activation=F.gelu if activation == "gelu" else ACT2FN[activation],
            activation_name=activation,
            num_heads=num_heads,
        )

    def to(self, dtype: torch.dtype) -> PackedLayer:
        """Return the layer with its matrices in another dtype; norms stay, which compute in float32 anyway."""

        def cast(linear: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return linear[0].to(dtype), linear[1].to(dtype)

        return replace(self, qkv=cast(self.qkv), out=cast(self.out), up=cast(self.up), down=cast(self.down))

    def __call__(self, hidden: Tensor, runs: Sequence[LengthRun], watch: Watch | None = None) -> Tensor:
        """Run the layer on packed tokens (num_tokens, hidden); `watch` is shown the input of each linear layer."""
        if watch is not None:
            watch("qkv", hidden)
        return self._finish(attend_runs(F.linear(hidden, *self.qkv), runs, self.num_heads), hidden, watch)

    def first_tokens(self, hidden: Tensor, runs: Sequence[LengthRun], lengths: Integers) -> Tensor:
        """Run the layer for the first token of each text that has one: (num_tokens, hidden) to (texts, hidden)."""
        counts = lengths[lengths > 0]
        first = hidden.index_select(0, torch.from_numpy(np.cumsum(counts) - counts).to(hidden.device))
        mixed = attend_first(first, self.qkv, self.num_heads, lambda query, scale: mix_runs(query, scale, hidden, runs))
        return self._finish(mixed, first)

    def _finish(self, mixed: Tensor, hidden: Tensor, watch: Watch | None = None) -> Tensor:
        """Everything after attention."""
        middle = self.attention_norm(F.linear(mixed, *self.out).add_(hidden))
        wide = self.activation(F.linear(middle, *self.up))
        if watch is not None:
            for name, x in (("out", mixed), ("up", middle), ("down", wide)):
                watch(name, x)
        return self.output_norm(F.linear(wide, *self.down).add_(middle))


def attend_runs(qkv: Tensor, runs: Sequence[LengthRun], num_heads: int) -> Tensor:
    """Let every text attend to itself: fused queries, keys and values (num_tokens, 3 width) to (num_tokens, width).

    Rows after the last run, which belong to no text, become zeros.
    """
    num_tokens, width = qkv.shape[0], qkv.shape[1] // 3
    head = width // num_heads
    out, stop = qkv.new_empty(num_tokens, width), 0
    for run in runs:
        stop = run.start + run.num_texts * run.length
        block = qkv[run.start : stop].view(run.num_texts, run.length, 3, num_heads, head)
        query, key, value = block.permute(2, 0, 3, 1, 4)  # each (num_texts, num_heads, length, head)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out[run.start : stop].view(run.num_texts, run.length, num_heads, head).copy_(mixed.transpose(1, 2))
    out[stop:].zero_()
    return out


def attend_first(
    first: Tensor, qkv: tuple[Tensor, Tensor], num_heads: int, mix: Callable[[Tensor, float], Tensor]
) -> Tensor:
    """Attention of the first tokens (num_texts, hidden) of texts over their texts; same shape out.

    Neither keys nor values of the other tokens are computed. A query meets a key as q·(K x + b) = (Kᵀ q)·x + q·b; the
    last term is the same for all tokens of a text and falls out of the softmax. The weights p of a text sum to one, so
    Σ p (V x + b) = V Σ p x + b. Exact but for rounding; about a twentieth of a layer's work at 25 tokens a text.

    Args:
        first: Hidden states before the layer.
        qkv: The layer's matrix (3 hidden, hidden) and bias.
        num_heads: Attention heads.
        mix: Given queries (num_texts, num_heads, hidden) and the scale of their scores, the softmax-weighted means of
            the hidden states of each text's tokens; same shape.
    """
    (weight, bias), width = qkv, first.shape[1]
    key, value = weight[width:].view(2, num_heads, width // num_heads, width)
    query = F.linear(first, weight[:width], bias[:width]).view(len(first), num_heads, -1)
    means = mix(torch.einsum("nhd,hdw->nhw", query, key), (width // num_heads) ** -0.5)
    return torch.einsum("nhw,hdw->nhd", means, value).reshape(len(first), width) + bias[2 * width :]


def mix_runs(query: Tensor, scale: float, hidden: Tensor, runs: Sequence[LengthRun]) -> Tensor:
    """The `mix` of `attend_first` by runs of equal lengths: each is a view of the hidden states."""
    out, text = torch.empty_like(query), 0
    for run in runs:
        tokens = hidden[run.start : run.start + run.num_texts * run.length].view(run.num_texts, 1, run.length, -1)
        rows = slice(text, text + run.num_texts)
        out[rows] = F.scaled_dot_product_attention(query[rows, None], tokens, tokens, scale=scale)[:, 0]
        text += run.num_texts
    return out


# Switches of a config that make a layer another one, and the value at which it is the plain one. A config that lacks a
# switch has it at that value.
_PLAIN: Mapping[str, object] = {
    "is_decoder": False,  # tokens see only those before them
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
}


def why_not_plain(config: PreTrainedConfig) -> str | None:
    """Say what makes an encoder's layers other than the plain post-norm one; None where nothing does."""
    family = FAMILIES.get(config.model_type)
    if family is None or not family.packed:
        return f"Packed layers are those of {sorted(LAYER_PARTS)}, got {config.model_type!r}"
    for name, plain in _PLAIN.items():
        found = getattr(config, name, plain)
        if found is not None and found != plain:
            return f"Packed layers have {name}={plain!r}, the encoder's config has {found!r}"
    return None


def packed_layers(model: GeepForSequenceClassification) -> tuple[PackedLayer, ...]:
    """The encoder's layers, on the model's own weights.

    Raises:
        ValueError: If the encoder's layer is another one.
    """
    config = model.encoder.config
    if (reason := why_not_plain(config)) is not None:
        raise ValueError(f"{reason}; use backend='padded'.")
    activation = config.activation if config.model_type == "distilbert" else config.hidden_act
    return tuple(
        PackedLayer.from_module(layer, LAYER_PARTS[config.model_type], activation, config.num_attention_heads)
        for layer in model.encoder.get_submodule(family_of(config).layers)
    )
